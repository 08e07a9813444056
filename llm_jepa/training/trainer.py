"""What the Trainer needs besides the loss: micro-batches, finite steps, statistics, complete checkpoints."""

import contextlib
import copy
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from llm_jepa.cli import UsageError
from llm_jepa.data.batching import MicroBatches, SegmentDataset
from llm_jepa.data.examples import ExampleError
from llm_jepa.data.segments import Item
from llm_jepa.data.streaming import Place
from llm_jepa.files import read_json, write_json
from llm_jepa.losses import COUNTS, find_not_negatives, nitp_loss, shuffled
from llm_jepa.projectors import load_projectors, save_projectors, without_projectors
from llm_jepa.run_folder import mark_checkpoint
from llm_jepa.settings import Settings
from llm_jepa.training import diagnostics
from llm_jepa.training.arguments import Arguments
from llm_jepa.training.flops import FlopCounter
from llm_jepa.training.pairs import Contrast

TOKENS = ("chat", "text_view", "code_view", "padding")
VIEWS_KEPT = 256  # the last pairs of a logging interval: their effective rank is logged


def compile_decoder(model: torch.nn.Module) -> None:
    """Compiles the decoder's forward pass in training, once for any number of rows and tokens.

    The output layer is outside, because its hook reads another number of labels, views and spans in every step. So are
    evaluation and generation, which would compile it again. Raises UsageError without the compiler that a CPU needs.
    """
    from torch._inductor import cpp_builder, exc

    decoder = model.get_decoder()
    forward = decoder.forward
    if decoder.device.type == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise UsageError("--torch_compile: on a CPU it needs a C++ compiler; install g++ or set CXX") from None
    torch._inductor.config.fallback_random = True  # the same dropout as without compiling
    compiled = torch.compile(forward, dynamic=True)

    @wraps(forward)
    def compiled_in_training(*args: Any, **kwargs: Any) -> Any:
        return (compiled if decoder.training else forward)(*args, **kwargs)

    decoder.forward = compiled_in_training


def micro_batches(s: Settings, dataset: SegmentDataset, processes: int, shuffle: bool = True) -> MicroBatches:
    """The micro-batches of a data set for this number of processes."""
    return MicroBatches(dataset.items.lengths, s.finetune_seed, shuffle, processes, s.batch_size, s.tokens_per_batch)


def collate(collator: Callable, micro_batches: list[list[Item]]) -> dict[str, Any]:
    """For a DataLoader whose items are complete micro-batches."""
    return collator(micro_batches[0])


def collate_stream(
    collator: Callable, micro_batch: tuple[list[Item], Place, dict[str, str]] | ExampleError
) -> dict[str, Any]:
    """The same for a stream. `place` is the place after this micro-batch, `skipped` the bad examples before it."""
    if isinstance(micro_batch, ExampleError):
        return collator(()) | {"error": micro_batch}
    items, place, skipped = micro_batch
    return collator(items) | {"place": place, "skipped": skipped}


class StepTrainer(Trainer):
    """transformers' Trainer on complete micro-batches, for losses that are normalized over the optimizer step.

    A subclass's compute_loss calls `add_statistics`; its get_batch_samples adds to `seen_tokens` and calls
    `follow_stream`.
    """

    def __init__(self, parts: Any, args: Arguments, generate: Callable[[Any], dict[str, float]] | None):
        """`parts`: the Parts of a run in finetune.py. At each evaluation `generate(model)` returns more metrics."""
        model, s = parts.model, args.settings
        # The Trainer changes both for its own purposes (use_cache, special tokens); saved is what the model had.
        self.config, self.generation_config = copy.deepcopy((model.config, model.generation_config))
        train_set, tokenizer = parts.stream or parts.train_set, parts.encoder.renderer.tokenizer
        super().__init__(model, args, partial(collate, parts.collator), train_set, parts.held_out, tokenizer)
        self.settings, self.selector, self.collator = s, parts.selector, parts.collator
        self.problems, self.terms, self.generate = parts.problems, parts.terms, generate
        self.contrast = Contrast(s.negatives_queue)
        exact = torch.float32 if self.args.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        sums = ("lm", *(term.name for term in self.terms), "nitp_shuffled", *diagnostics.PAIR_STATISTICS)
        self.statistics_names = (*sums, "effective_rank", "ranks", *COUNTS, *TOKENS)
        self.statistics = torch.zeros(len(self.statistics_names), dtype=exact, device=self.args.device)
        self._measures, self._measured = False, {}
        self._views: list[torch.Tensor] = []  # empty, or one tensor (2, ≤ VIEWS_KEPT, D)
        # Tells the Trainer that the loss is already scaled for gradient accumulation.
        self.model_accepts_loss_kwargs = True
        self.sampler: MicroBatches | None = None
        self.place: Place | None = None  # after the last micro-batch of a stream
        self.seen_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._step_loss = torch.zeros((), device=self.args.device)
        self._grad_norm = torch.zeros((), device=self.args.device)
        self._error: ExampleError | None = None  # of the stream
        self._flops, self._since = 0.0, time.time()

    # -- data

    def _get_train_sampler(self, train_dataset: Any = None) -> MicroBatches:
        self.sampler = micro_batches(self.settings, self.train_dataset, self.args.world_size)
        return self.sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> MicroBatches:
        return micro_batches(self.settings, eval_dataset, self.args.world_size, shuffle=False)

    def get_train_dataloader(self) -> Any:
        """Of a stream: each process reads its own share of the examples, so accelerate distributes nothing."""
        if not self.settings.streaming:
            return super().get_train_dataloader()
        # An iterator draws one random number at its start; a resumed stream must not draw it again.
        generator = torch.Generator() if any(self.train_dataset.place) else None
        return DataLoaderShard(
            self.train_dataset, device=self.args.device, batch_size=None, generator=generator,
            collate_fn=partial(collate_stream, self.collator), _non_blocking=True,
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip

    def follow_stream(self, batches: list[dict[str, Any]]) -> None:
        """Notes where the stream is after these micro-batches, and its error if there is one."""
        for batch in batches if self.settings.streaming else ():
            if "error" in batch:  # the other processes learn of it in require_finite_step
                self._error, self._step_loss = batch["error"], torch.full_like(self._step_loss, torch.nan)
                break
            self.place = batch["place"]
            self.problems.found |= batch["skipped"]

    # -- steps

    def training_step(self, *args: Any) -> torch.Tensor:
        """A micro-batch's forward and backward pass, with --track_flop under a counter."""
        with FlopCounter() if self.settings.track_flop else contextlib.nullcontext() as counter:
            loss = super().training_step(*args)
        self._flops = float(counter.get_total_flops()) if counter else 0.0
        return loss

    def floating_point_ops(self, inputs: dict) -> float:
        """The FLOPs of the last micro-batch; the Trainer sums them over ranks and keeps the sum in checkpoints."""
        return self._flops

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> torch.Tensor:
        norm = super()._get_grad_norm(model, grad_norm)
        self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shards
        return self._grad_norm

    def require_finite_step(self) -> None:
        """Raises on every process, before the parameters change.

        FloatingPointError if the step's loss or gradient is not finite, ExampleError if any process's stream has
        reached an example that cannot be used.
        """
        loss = self.accelerator.reduce(self._step_loss, "sum")
        self._step_loss = torch.zeros_like(self._step_loss)
        figures = [loss] if self.args.fp16 else [loss, self._grad_norm.to(loss)]  # fp16's scaler skips such steps
        if not torch.isfinite(torch.stack(figures)).all():
            for error in gather_object([self._error]):
                if error is not None:
                    raise error
            what, value = ("gradient norm", self._grad_norm) if torch.isfinite(loss) else ("loss", loss)
            step = self.state.global_step + 1
            raise FloatingPointError(f"the {what} of step {step} is {value.item()}; training stopped")

    # -- statistics

    def begin_step(self) -> None:
        """Decides whether gradients are compared in the next micro-batch that has something for each term."""
        s = self.settings  # compiled passes, and counters of FLOPs, do not allow a second backward pass
        every = 0 if s.torch_compile or s.track_flop else s.gradient_stats
        self._measures |= bool(s.gamma and self.terms and every and self.state.global_step % every == 0)

    def add_statistics(self, shares: dict, sums: dict[str, torch.Tensor], states: Any, batch: dict) -> None:
        """Adds a micro-batch: its shares () of the step's loss, its unweighted sums (), its States and counts."""
        found = {"pairs": states.views.shape[1], "spans": states.path.shape[1]}
        something = len(batch["label_ids"]) and all(found.get(term.divisor, 1) for term in self.terms)
        if self._measures and torch.is_grad_enabled() and something:
            own = [p for name, p in self.model.named_parameters() if p.requires_grad and "projectors" not in name]
            self._measured, self._measures = diagnostics.gradient_statistics(shares, own), False
        self._step_loss = self._step_loss + sum(shares.values()).detach()
        figures = dict.fromkeys(self.statistics_names, self.statistics.new_zeros(())) | sums
        if "jepa" in sums:
            not_negatives = find_not_negatives(batch["view_ids"], batch["view_ids"]).to(states.views.device)
            sums_of_pairs = diagnostics.pair_statistics(states.views, not_negatives)
            figures |= dict(zip(diagnostics.PAIR_STATISTICS, sums_of_pairs, strict=True))
            if torch.is_grad_enabled():
                self._views = [torch.cat([*self._views, states.views.detach()], dim=1)[:, -VIEWS_KEPT:]]
        if "nitp" in sums:  # with the targets of other tokens
            shuffled_sum, count = nitp_loss(states.predicted, shuffled(states.target))
            figures["nitp_shuffled"] = count - shuffled_sum
        figures |= dict(zip(COUNTS, batch["counts"], strict=True)) | dict(zip(TOKENS, batch["tokens"], strict=True))
        figures["pairs"] = torch.full_like(figures["labels"], found["pairs"])  # that loss dropout has left
        self.statistics += torch.stack([x.detach().to(self.statistics) for x in figures.values()])

    def _drain(self, statistics: torch.Tensor) -> dict[str, float]:
        total = dict(zip(self.statistics_names, self.accelerator.reduce(statistics, "sum").tolist(), strict=True))
        statistics.zero_()
        return total

    def _means(self, total: dict[str, float]) -> dict[str, float]:
        """The terms' means and what shows whether they learn, by log key; nothing without pairs, spans or tokens."""
        logs = {f"{t.name}_loss": total[t.name] / total[t.divisor] for t in self.terms if total[t.divisor]}
        if "nitp_loss" in logs:
            logs["nitp_cosine"] = 1 - logs["nitp_loss"]
            logs["nitp_cosine_shuffled"] = total["nitp_shuffled"] / total["next_tokens"]
        if "jepa_loss" in logs:
            logs["cosine"] = total["cosine"] / total["pairs"]
        if total["ranks"]:
            logs["effective_rank"] = total["effective_rank"] / total["ranks"]
        if n := total["compared"]:
            logs["cosine_shuffled"] = total["shuffled"] / n
            logs["cosine_shuffled_sd"] = (total["shuffled_variance"] / n) ** 0.5
            logs |= {"retrieval": total["retrieved"] / n, "retrieval_chance": total["chance"] / n}
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the method's figures to what the Trainer logs."""
        if "loss" in logs:
            for views in self._views:
                if views.shape[1] > 1:
                    figures = {"effective_rank": sum(map(diagnostics.effective_rank, views.cpu())) / 2, "ranks": 1}
                    self.statistics += self.statistics.new_tensor([figures.get(n, 0) for n in self.statistics_names])
            self._views = []
            t, now = self._drain(self.statistics), time.time()
            tokens = t["chat"] + t["text_view"] + t["code_view"]
            if t["labels"]:  # there are none if all examples of the steps have only views
                logs["lm_loss"] = t["lm"] / t["labels"]
            logs |= {
                "tokens": int(tokens),
                "padding": int(t["padding"]),
                "label_tokens": int(t["labels"]),
                "tokens_per_second": round(tokens / max(1e-9, now - self._since), 1),
            }
            self._since = now
            logs |= self._means(t) | self._measured
            self._measured = {}
            for term in self.terms:
                logs[term.divisor] = int(t[term.divisor])
                if term.warmup:
                    logs[f"{term.name}_lbd"] = term.weight_at(self.state.global_step, self.state.max_steps)
            if self.settings.track_flop:
                logs["flops"] = self.state.total_flos
        if "loss" in logs or "train_runtime" in logs:
            line = {"step": self.state.global_step} | logs
            logs |= diagnostics.announcements(self.state.log_history, line, self.state.max_steps)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Mean losses of the held-out examples, and with --eval_generate the scores of generations.

        Contrastive losses compare the pairs of one micro-batch of all ranks, SIGReg those of one rank's micro-batch.
        """
        model, one = self.accelerator.unwrap_model(self.model), torch.ones(len(COUNTS), device=self.args.device)
        model.eval()
        during_training, self.statistics = self.statistics, torch.zeros_like(self.statistics)
        step_loss = self._step_loss
        for batch in dataloader:
            self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=one)
        t = self._drain(self.statistics)
        self.statistics, self._step_loss = during_training, step_loss
        lm = t["lm"] / max(1, t["labels"])
        metrics = {"loss": self.settings.gamma * lm, "lm_loss": lm} | self._means(t)
        for term in self.terms:  # at its full weight whatever the warm-up, so that evaluations are comparable
            metrics["loss"] += term.weight * metrics.get(f"{term.name}_loss", 0)
        if self.generate is not None:
            metrics |= self.generate(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._since = time.time()
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    # -- saving and checkpoints

    def as_saved(self, model: Any) -> Any:
        """The model with the settings that are saved with it: in the run folder, in checkpoints and merged."""
        config = copy.copy(self.config)
        if not hasattr(model.config, "quantization_config"):  # merged into the base without quantization
            vars(config).pop("quantization_config", None)
        model.config, model.generation_config = config, self.generation_config
        return model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.as_saved(self.accelerator.unwrap_model(self.model))
        if state_dict is not None:  # gathered from shards
            state_dict = {name: v for name, v in state_dict.items() if not name.startswith("projectors.")}
        with without_projectors(model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:  # an adapter comes without
            model.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with contextlib.nullcontext() if self.is_fsdp_enabled else without_projectors(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_projectors(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))
        self.contrast.load(Path(resume_from_checkpoint))

    def load_checkpoint(self, folder: Path) -> None:
        """Loads the parameters of a checkpoint without training."""
        self._load_from_checkpoint(str(folder))

    def merged_model(self) -> Any:
        """The model with its adapter merged in; only on the main process."""
        return self.accelerator.unwrap_model(self.model).merge_and_unload()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.state.num_input_tokens_seen = int(self.seen_tokens)
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.settings.streaming:
            place = {"place": self.place, "processes": self.args.world_size, "skipped": self.problems.found}
            write_json(folder / f"stream-{self.args.process_index}.json", place)
        save_projectors(self.accelerator.unwrap_model(self.model), folder)
        if self.args.should_save:
            self.contrast.save(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_checkpoint(folder)
            # After the new one is complete, so that a kill while saving leaves one to resume.
            best = self.best_checkpoint if self.args.load_best_model_at_end else None
            # Not by the Trainer's own argument, with which it removes others than these.
            kept = self.settings.save_total_limit + (best not in (None, folder))
            rotate_checkpoints(self.args.output_dir, kept, best)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this evaluation is the best one. Of equal scores, it is that of the lower eval_lm_loss."""
        score, best, step = self.args.metric_for_best_model, self.state.best_metric, self.state.best_global_step
        if super()._determine_best_metric(metrics, trial):
            return True
        if not self.args.load_best_model_at_end or metrics[score] != best:
            return False
        losses = {line["step"]: line["eval_lm_loss"] for line in self.state.log_history if "eval_lm_loss" in line}
        if metrics["eval_lm_loss"] >= losses[step]:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the best evaluation; the Trainer's own record has the path at the time."""
        return Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"

    def _load_best_model(self) -> None:
        self.load_checkpoint(self.best_checkpoint)

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains from a complete checkpoint, or from the start. One of the last step is only loaded."""
        if checkpoint is not None and self.settings.streaming:
            self._resume_stream(checkpoint)
        if checkpoint is not None:
            self.args.eval_on_start = False
            reached = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            stopped = reached.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
            if stopped or reached.global_step >= reached.max_steps:  # the Trainer would train beyond it
                self.state = reached
                self.load_checkpoint(self.best_checkpoint if self.args.load_best_model_at_end else checkpoint)
                self.seen_tokens.fill_(reached.num_input_tokens_seen)
                return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _resume_stream(self, checkpoint: Path) -> None:
        """Raises UsageError if the checkpoint was written by another number of processes."""
        stream = self.train_dataset
        path = checkpoint / f"stream-{stream.process}.json"
        kept = read_json(path) if path.is_file() else {"processes": "fewer"}
        if kept["processes"] != stream.processes:
            raise UsageError(f"{checkpoint} was written by {kept['processes']} processes, not {stream.processes}")
        stream.place = tuple(kept["place"])
        self.problems.found |= kept["skipped"]
