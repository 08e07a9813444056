"""Generations at the evaluations of a training: their scores, and samples on the console and in generations.jsonl."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback

from llm_jepa.data.examples import Example, Problems
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder
from llm_jepa.distributed import agreed
from llm_jepa.evaluation import generation
from llm_jepa.evaluation.model import label_logits
from llm_jepa.evaluation.scores import scored_row, scorer, summarize, verdicts
from llm_jepa.reports.results import score_names
from llm_jepa.scoring.tasks import find_task, is_task_file
from llm_jepa.settings import Settings
from llm_jepa.training.callbacks import reopen
from llm_jepa.training.trackers import log_table

BATCH_SIZE = 32


class Generations:
    """A function of the model: the scores of its responses to the examples, as evaluate.py computes them.

    The processes share the examples, and all return the same scores. `samples` are the rows of the first `shown`
    examples in the last evaluation. Raises UsageError if the task cannot score the examples.
    """

    def __init__(self, s: Settings, renderer: Renderer, examples: list[Example], state: PartialState):
        self.renderer, self.task = renderer, s.scored_task
        self.scored, self.shown = s.eval_generate, s.sample_generations
        self.examples = examples[: self.scored or self.shown]
        self.mine = self.examples[state.process_index :: state.num_processes]
        self.limit = generation.answer_limit(renderer, self.examples)
        self.scorer = partial(scorer, self.task, s.spider_path, self.mine, s.allow_code_execution)
        self.samples: list[dict[str, Any]] = []
        score = scorer(self.task, s.spider_path, self.examples, s.allow_code_execution)
        if is_task_file(self.task):  # otherwise a mistake of the user's code would be found only after the first epoch
            with score as score:
                score(self.examples[0].assistant, self.examples[0])

    def _responses(self, model: Any) -> generation.Responses:
        if not (choices := find_task(self.task).choices):
            yield from generation.generate(model, self.renderer, self.mine, BATCH_SIZE, max_new_tokens=self.limit)
            return
        encoder = Encoder(self.renderer, "answer_text", sys.maxsize)
        examples, chats = generation.encode_choices(model.config, encoder, self.mine, choices, Problems())
        batches = generation.batches([generation.forward_size(chat) for chat in chats], BATCH_SIZE)
        with label_logits(model, self.renderer.tokenizer.pad_token_id) as read:
            yield from generation.respond(examples, chats, partial(generation.choose, read, choices), batches)

    def __call__(self, model: Any) -> dict[str, float]:
        """Each score and, as `_low` and `_high`, the 95 % interval of the primary one; {} if none is wanted."""
        with agreed(), self.scorer() as score:
            rows = [(e, scored_row(e, found, score)) for batch in self._responses(model) for e, found in batch]
        rows = {example.id: (example, row) for example, row in gather_object(rows)}
        pairs = [rows[example.id] for example in self.examples]
        self.samples = [{"prompt": e.user, "answer": e.assistant} | row for e, row in pairs[: self.shown]]
        if not self.scored:
            return {}
        found = summarize([row for _, row in pairs], self.task)
        primary = found["score"]
        limits = dict(zip((f"{primary}_low", f"{primary}_high"), found["ci95"][primary], strict=True))
        return {name: found[name] for name in score_names(found)} | limits


def shorten(text: str) -> str:
    """The text for the console: long ones lose their middle."""
    return repr(text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}")


class GenerationsCallback(TrainerCallback):
    """Prints the primary score of each evaluation and the samples, which also go to generations.jsonl and trackers."""

    def __init__(self, trainer: Any):
        self.trainer, self.generate, self.file = trainer, trainer.generate, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.generate.shown:
            self.file = reopen(Path(args.output_dir) / "generations.jsonl", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        task, step, lines = self.generate.task, state.global_step, []
        if self.generate.scored:
            name = find_task(task).primary
            value, low, high = (100 * metrics[f"eval_{name}{end}"] for end in ("", "_low", "_high"))
            n = len(self.generate.examples)
            lines.append(f"step {step}: {name} {value:.2f} % [{low:.2f}, {high:.2f}], n = {n}")
        rows = [{"step": step} | row for row in self.generate.samples]
        for row in rows:
            lines.append(f"step {step}, example {row['id']}: {verdicts(row, task)}")
            names = {"prompt": "prompt", "answer": "answer", "output": "prediction"}
            lines += [f"  {name} {shorten(row[key])}" for name, key in names.items()]
        tqdm.write("\n".join(lines), file=sys.stderr)
        if rows:
            self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            self.file.flush()
            log_table(self.trainer.callback_handler.callbacks, "generations", rows, step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.file is not None:
            self.file.close()
