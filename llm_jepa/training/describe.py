"""Descriptions of a run: start block, first example, and the records of run.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.examples import Problems, data_sha256
from llm_jepa.data.rendering import PINNED_DATE, Renderer
from llm_jepa.distributed import processes
from llm_jepa.model import not_adapted
from llm_jepa.reports.results import describe_method
from llm_jepa.run_folder import complete_checkpoints, origin_of_model, provenance
from llm_jepa.scoring.tasks import find_task
from llm_jepa.settings import Settings
from llm_jepa.training.diagnostics import judge


def first_example(renderer: Renderer, dataset: SegmentDataset) -> dict[str, str | None]:
    """The first chat (or pair) as the model sees it: texts, label text, and the tokens at which the views are read."""
    number = max(range(len(dataset)), key=lambda i: (dataset.examples[i].has_chat, dataset.examples[i].pair))
    example, item = dataset.examples[number], dataset.items[number]
    chat, views = (item[0], item[1:]) if example.has_chat else (None, item)

    def decode(ids: Any) -> str:
        return renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    row = dict.fromkeys(("chat", "label_text", "text_view", "code_view", "text_view_token", "code_view_token"))
    if chat:
        row |= {"chat": renderer.chat(example).text, "label_text": decode(chat.ids[chat.labels])}
    if views:
        in_chat = chat and chat.view is not None
        views = [chat.text_view, *views] if in_chat else views
        texts = [view.text for view in renderer.views(example)]
        if in_chat:
            texts[0] = decode(views[0].ids)
        row |= {"text_view": texts[0], "code_view": texts[1]}
        row |= {f"{v.kind}_token": decode([v.ids[v.view]]) for v in views}
    return row


def start_block(s: Settings, model: Any, renderer: Renderer, train_set: SegmentDataset, held_out: int) -> str:
    """The text at the start of a run: model, method, data and the first example as the model sees it."""
    parameters, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    row = first_example(renderer, train_set)
    examples = "a stream" if s.streaming else f"{len(train_set)} examples"
    lines = [
        f"model    {s.model_name}, {parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained",
        f"method   {describe_method(s)}; labels: {s.lm_labels}; layout: {s.layout}",
        f"data     {examples}, {held_out} held out",
        f"chat     {row['chat']!r}",
        f"labels   {row['label_text']!r}",
    ]
    if s.lm_labels == "reference" and renderer.tokenizer.pad_token_id != renderer.tokenizer.eos_token_id:
        lines.append("note     the tokenizer has its own pad token, so unlike Llama 3's its turn end is a label")
    if s.lora and (frozen := not_adapted(model)):
        lines.insert(1, f"adapter  does not reach {', '.join(frozen)}")
    if s.jepa:
        lines += [f"{k:9}{row[f'{k}_view']!r}, read at {row[f'{k}_view_token']!r}" for k in ("text", "code")]
    length = f"{s.max_steps} steps" if s.max_steps > 0 else f"{s.num_epochs:g} epochs"
    size = f"{s.tokens_per_batch} tokens" if s.tokens_per_batch else f"{s.batch_size} examples"
    size += f" x {s.grad_accum} micro-batches" + (f" x {processes()} processes" if processes() > 1 else "")
    lines.append(f"steps    {length}, {size} each, learning rate {s.learning_rate:g}, seed {s.finetune_seed}")
    return "\n".join([*lines, f"run      {s.output_dir}"])


def start_record(s: Settings, train_set: SegmentDataset, problems: Problems) -> dict[str, Any]:
    """What run.json records at the start."""
    record = {"seed": s.finetune_seed, "skipped_examples": len(problems.found)}
    record["template_date"] = PINNED_DATE.date().isoformat()
    turns = {s.fields.system} if s.fields else {e.system for e in train_set.examples if e.has_chat}
    if len(turns) == 1 and (s.fields or not s.streaming):  # otherwise there may be several
        record["system_turn"] = turns.pop()
    record |= origin_of_model(s.model_name)
    files = (f for f in (s.train_file, s.data_file, s.eval_file) if f)
    return record | provenance({f: data_sha256(f, s.fields, s.streaming and f == s.train_file) for f in files})


def last_checkpoint(run: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from, the same on every process."""
    # The main process decides. On a shared file system processes can see different checkpoints, and would then wait for
    # each other forever.
    (checkpoints,) = broadcast_object_list([complete_checkpoints(run)])
    damaged = sorted({p.name for p in run.glob("checkpoint-*")} - {p.name for p in checkpoints})
    if damaged:
        say(f"incomplete, not used: {', '.join(damaged)}")
    say(f"resuming from {checkpoints[-1].name if checkpoints else 'the start: no complete checkpoint'}")
    return checkpoints[-1] if checkpoints else None


def final_record(trainer: Any) -> dict[str, Any]:
    """What run.json records at the end: steps, tokens, the last value of each loss, and what the terms learned.

    With --save_best the values on held-out examples are those of the saved model.
    """
    losses = ("lm_loss", *(f"{term.name}_loss" for term in trainer.terms), "eval_exact")
    if trainer.generate is not None:
        losses += (f"eval_{find_task(trainer.generate.task).primary}",)
    history, best = trainer.state.log_history, trainer.state.best_global_step
    if trainer.args.load_best_model_at_end:
        history = [*history, *(line for line in history if "eval_loss" in line and line["step"] == best)]
    final = {k: v for line in history for k, v in line.items() if k.endswith(losses)}
    facts = {"steps": trainer.state.global_step, "tokens": int(trainer.seen_tokens), "final": final}
    if trainer.args.load_best_model_at_end:
        facts["best"] = {"step": best, trainer.args.metric_for_best_model: trainer.state.best_metric}
    facts["learned"] = judge(trainer.state.log_history, trainer.state.global_step)
    if trainer.settings.streaming:  # each process has met the bad examples of its own share
        for found in gather_object([trainer.problems.found]):
            trainer.problems.found |= found
        facts["skipped_examples"] = len(trainer.problems.found)
    if trainer.args.device.type == "cuda":
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()  # on the main process's GPU
    return facts
