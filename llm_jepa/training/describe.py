"""The start block and the dry run's first example: what will be trained on what."""

from __future__ import annotations

from typing import Any

from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.rendering import Renderer
from llm_jepa.run_folder import processes
from llm_jepa.settings import Settings


def first_example(renderer: Renderer, dataset: SegmentDataset) -> dict[str, str | None]:
    """The first example as the model sees it: texts, label text, and the tokens at which the views are read."""
    example, (chat, *views) = dataset.examples[0], dataset.items[0]

    def decode(ids: Any) -> str:
        return renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    row = dict.fromkeys(("chat", "label_text", "text_view", "code_view", "text_view_token", "code_view_token"))
    row |= {"chat": renderer.chat(example).text, "label_text": decode(chat.ids[chat.labels])}
    if views:
        views = views if chat.view is None else [chat.text_view, *views]
        texts = [view.text for view in renderer.views(example)]
        if chat.view is not None:
            texts[0] = decode(views[0].ids)
        row |= {"text_view": texts[0], "code_view": texts[1]}
        row |= {f"{v.kind}_token": decode([v.ids[v.view]]) for v in views}
    return row


def start_block(s: Settings, model: Any, renderer: Renderer, train_set: SegmentDataset, held_out: int) -> str:
    """The text at the start of a run: model, method, data and the first example as the model sees it."""
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row = first_example(renderer, train_set)
    examples = "a stream" if s.streaming else f"{len(train_set)} examples"
    method = f"JEPA, λ {s.lbd:g}, γ {s.gamma:g}, k {s.predictors}, {s.distance}" if s.jepa else "regular"
    method += f" + STP {s.stp_variant}, weight {s.stp_lbd:g}" if s.stp_variant else ""
    method += f", layer {s.stp_layer}" if s.stp_variant and s.stp_layer != -1 else ""
    lines = [
        f"model    {s.model_name}, {parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained",
        f"method   {method}; labels: {s.lm_labels}; layout: {s.layout}",
        f"data     {examples}, {held_out} held out",
        f"chat     {row['chat']!r}",
        f"labels   {row['label_text']!r}",
    ]
    if s.jepa:
        lines += [f"{k:9}{row[f'{k}_view']!r}, read at {row[f'{k}_view_token']!r}" for k in ("text", "code")]
    length = f"{s.max_steps} steps" if s.max_steps > 0 else f"{s.num_epochs:g} epochs"
    size = f"{s.tokens_per_batch} tokens" if s.tokens_per_batch else f"{s.batch_size} examples"
    size += f" x {s.grad_accum} micro-batches" + (f" x {processes()} processes" if processes() > 1 else "")
    lines.append(f"steps    {length}, {size} each, learning rate {s.learning_rate:g}, seed {s.finetune_seed}")
    return "\n".join([*lines, f"run      {s.output_dir}"])
