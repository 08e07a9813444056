"""Callbacks of a training: metrics.jsonl and the progress bar."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from llm_jepa.files import write_text
from llm_jepa.losses import CHAT_LOSSES
from llm_jepa.reports.results import describe_learning
from llm_jepa.run_folder import RunFolder
from llm_jepa.training.diagnostics import JUDGED, judge_at


def computation(trainer: Any) -> dict[str, Any]:
    """What run.json records about precision, compilation and sharding."""
    state, sharded = trainer.accelerator.state, trainer.is_fsdp_enabled
    policy = state.fsdp_plugin.mixed_precision_policy if sharded else None
    autocast = str(policy.param_dtype) if policy else {"bf16": "bfloat16", "fp16": "float16"}.get(state.mixed_precision)
    return {
        "parameters": sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}),
        "autocast": autocast and autocast.removeprefix("torch."),
        "compiled": trainer.settings.torch_compile,
        "sharding": f"fsdp{state.fsdp_plugin.fsdp_version}" if sharded else "ddp" if state.num_processes > 1 else None,
    }


def announcement(term: str, found: dict[str, Any], settings: dict[str, Any]) -> str:
    """The line on the console about a term that has not learned; `found`: what `judge` says of it."""
    advice = "try a larger --lbd or --batch_size" if settings["jepa_loss"] == "clip" else "try --jepa_loss clip"
    if term == "nitp":
        advice = "try a larger --nitp_lbd"
    elif settings["shuffle_pairs"]:
        advice = "as expected of --shuffle_pairs"
    return f"{describe_learning(term, found)}; {advice}"


def reopen(path: Path, step: int) -> TextIO:
    """Opens a file of JSON lines to append to, without those that a run repeats: after `step`, or all before step 1."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    write_text(path, "".join(x for x in lines if step and x.endswith("\n") and json.loads(x)["step"] <= step))
    return open(path, "a", encoding="utf-8")


class MetricsCallback(TrainerCallback):
    """Sets the epoch, stops at a step that is not finite, and writes metrics.jsonl.

    The last steps, and the steps before an evaluation or a checkpoint, get a line even if --logging_steps does not ask
    for one, so that the counts of all lines add up to those of the run, also if it is resumed.
    """

    def __init__(self, run: RunFolder, trainer: Any, check: Callable[[], None] | None):
        """`check` is called on every process when the model is ready, before the first step."""
        self.run, self.trainer, self.check, self.file = run, trainer, check, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.check:
            self.check()
        self.trainer.seen_tokens.fill_(state.num_input_tokens_seen)
        if not state.is_world_process_zero:
            return
        self.file = reopen(self.run.path / "metrics.jsonl", state.global_step)  # closed in on_train_end
        self.run.update("running", computation=computation(self.trainer))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.sampler is not None:  # a stream counts its own epochs
            self.trainer.sampler.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save or control.should_evaluate or control.should_training_stop
        if self.trainer.settings.streaming:  # the Trainer, which does not know the length, counts a share of max_steps
            state.epoch = self.trainer.place[0]

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save or control.should_evaluate

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.require_finite_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.file is not None:
            line = {"step": state.global_step} | {k: v for k, v in logs.items() if k != "total_flos"}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            if any(f"{term}_collapsed" in line for term in JUDGED):
                learned = judge_at(state.log_history[:-1], line, state.max_steps)
                self.run.update("running", learned=learned)
                for term in learned:
                    if f"{term}_collapsed" in line:
                        place = f"step {state.global_step} of {state.max_steps}"
                        text = announcement(term, learned[term], self.run.settings)
                        tqdm.write(f"{place}: {text}", file=sys.stderr)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.run.update("running")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class Bar(ProgressCallback):
    """One progress bar that shows the latest losses instead of printing a line per step."""

    def close(self) -> None:
        """Ends the bar's line, so that an error message gets a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Shows no second bar during an evaluation."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            shown = ("lm_loss", "jepa_loss", "cosine", "cosine_shuffled", *(f"{name}_loss" for name in CHAT_LOSSES),
                     "eval_lm_loss", "eval_exact")  # fmt: skip
            self.training_bar.set_postfix({k: f"{logs[k]:.4g}" for k in shown if k in logs}, refresh=False)
