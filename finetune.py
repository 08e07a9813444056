"""Fine-tunes a causal language model on pairs of views with the LLM-JEPA objective (arXiv 2509.14252).

    L = gamma * L_LM + lbd * d(h_text, h_code)  (+ stp_lbd * L_STP with --stp, + nitp_lbd * L_NITP with --nitp)

L_LM is the mean over label tokens, d the mean over pairs of views. h_text and h_code are the last hidden states at the
views' view tokens: the last content token, or the last predictor token if --predictors is above 0.

    python finetune.py --train_file datasets/synth_train.jsonl --model_name models/tiny --pretrain \\
        --predictors 1 --lbd 1 --learning_rate 1e-3 --num_epochs 2 --batch_size 8 --grad_accum 1 \\
        --warmup_steps 0.05 --adam_beta2 0.98

The method is in these files, in the order in which an example passes through them:

    llm_jepa/data/segments.py   example → segments: the chat, on which L_LM is computed, and its two views
    llm_jepa/layouts.py         segments → batch: rows, positions and masks; layouts give the same losses
    llm_jepa/forward.py         batch → hidden states, only where a label or an auxiliary loss needs them
    llm_jepa/losses.py          hidden states → (sum, count) of each loss → the objective
    finetune.py                 the Trainer, and a run from start to end

The output layer receives the hidden states of labels only. All losses are sums that are divided by the counts of the
complete optimizer step over all ranks.

With --text_view in_chat the chat also contains the Text view: predictor tokens at its end (the branch) attend to the
chat up to the end of the user turn (the stem). A path is the sequence of tokens of a chat whose hidden states --stp
reads.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llm_jepa.cli import UsageError, first_line, parse_flags
from llm_jepa.data.examples import Problems, read_examples, require_files, split_examples
from llm_jepa.distributed import agreed, start
from llm_jepa.settings import Settings, adapter_config, check_settings

if __name__ == "__main__":  # before the slow imports, so that --help and mistakes are fast
    start("finetune.py", lambda: require_files(check_settings(*parse_flags(Settings, __doc__))))

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, set_seed

from llm_jepa import losses
from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder, end_of_turn
from llm_jepa.data.spans import Draws
from llm_jepa.data.streaming import SegmentStream
from llm_jepa.forward import LMHeadSelector, States
from llm_jepa.layouts import Collator
from llm_jepa.model import (
    add_adapter,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    not_adapted,
    stop_tokens,
    tokenizer_options,
)
from llm_jepa.projectors import add_projectors
from llm_jepa.reports.results import describe_learning
from llm_jepa.run_folder import RunFolder, complete_checkpoints
from llm_jepa.training.arguments import training_arguments
from llm_jepa.training.callbacks import Bar, MetricsCallback
from llm_jepa.training.checks import inspect_model
from llm_jepa.training.describe import final_record, first_example, last_checkpoint, start_block, start_record
from llm_jepa.training.flops import FlopCounter, flop_share
from llm_jepa.training.generations import Generations, GenerationsCallback
from llm_jepa.training.pairs import Contrast
from llm_jepa.training.process import run_script, write_errors
from llm_jepa.training.trackers import start_trackers
from llm_jepa.training.trainer import StepTrainer, compile_decoder, micro_batches

# -------------------------------------------------------------------------------------------------------------- trainer


def random_directions(selector: LMHeadSelector, step: int) -> torch.Tensor:
    """256 random unit directions (D, 256) for SIGReg, new at each step and equal on all ranks."""
    weight = selector.projectors["sigreg"].down.weight  # (D, 4D)
    drawn = torch.randn(len(weight), 256, generator=torch.Generator().manual_seed(step))
    return (drawn / drawn.norm(dim=0)).to(weight.device)


def add_contrast(
    states: States, batch: dict[str, Any], terms: list[losses.Term], contrast: Contrast, selector: LMHeadSelector,
    step: int,
) -> States:  # fmt: skip
    """The states with what the terms also read: the pairs to contrast with, and what SIGReg compares."""
    reads = {name for term in terms for name in term.reads}
    if "contrast_set" in reads:
        views = states.projected if "projected" in reads else states.views
        states = states._replace(contrast_set=contrast(views, batch["view_ids"], training=torch.is_grad_enabled()))
    if "directions" in reads:
        directions = random_directions(selector, step)
        states = states._replace(directions=directions, rest_of_step=batch.get("rest_of_step"))
    return states


class JepaTrainer(StepTrainer):
    """The Trainer with the LLM-JEPA objective, normalized over the optimizer step and all ranks by default."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, torch.Tensor]:
        """The step's micro-batches, and their counts (4,) in the order of COUNTS over all ranks, at least 1 each."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        # Labels, pairs, spans, next tokens and tokens (5,) of each micro-batch.
        counts = [torch.cat([b["counts"], b["tokens"][:3].sum()[None]]) for b in batches]
        none = torch.zeros(len(losses.COUNTS) + 1, dtype=torch.long, device=device)  # for a rank without micro-batches
        counts = torch.stack([*counts, none]).sum(dim=0)  # (micro-batches + 1, 5) → (5,)
        counts = self.accelerator.reduce(counts, "sum")
        self.seen_tokens += counts[-1]
        self.follow_stream(batches)
        if "sigreg" in self.selector.projectors and (len(batches) > 1 or self.args.world_size > 1):
            with FlopCounter() if self.settings.track_flop else contextlib.nullcontext() as counter:
                self._add_moments(batches)
            self.current_flos += counter.get_total_flops() if counter else 0
        self.begin_step()
        return batches, counts[:-1].clamp(min=1).float()

    @torch.no_grad()
    def _add_moments(self, batches: list[dict[str, Any]]) -> None:
        """Adds to each micro-batch the moments of the rest of the optimizer step, from a pass without gradient."""
        self.model_wrapped.train()  # as training_step does: the pass has the dropout of a training step
        directions, own = random_directions(self.selector, self.state.global_step), []
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.compute_loss_context_manager():
            # A resumed run draws the same dropout: the Trainer restores the generators only after this pass.
            torch.manual_seed(self.state.global_step)
            for batch in batches:
                few = batch | {"label_at": batch["label_at"][:, :1]}  # logits are not used
                projected = self.selector.read(self.model_wrapped, few).projected
                own.append((losses.moments(projected, directions), projected.shape[1]))
        total = self.accelerator.reduce(torch.stack([m for m, _ in own]).sum(dim=0), "sum")
        count = int(self.accelerator.reduce(torch.tensor(sum(n for _, n in own), device=self.args.device), "sum"))
        for batch, (moment, n) in zip(batches, own, strict=True):
            batch["rest_of_step"] = (total - moment, count - n)

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This micro-batch's share of the objective over the step; `num_items_in_batch` (4,) from get_batch_samples.

        With --reference_grad_scale it is the micro-batch's own objective, divided by its own counts.
        """
        lm_sum, states = self.selector.lm_sum(model, inputs)
        states = add_contrast(states, inputs, self.terms, self.contrast, self.selector, self.state.global_step)
        counts, ranks = num_items_in_batch, self.args.world_size
        if self.settings.reference_grad_scale:
            counts, ranks = inputs["counts"].clamp(min=1), 1
        step = self.state.global_step + 1
        terms = [(term, term.weight_at(step, self.state.max_steps)) for term in self.terms]
        loss, sums, shares = losses.objective(lm_sum, states, counts, self.settings.gamma, terms)
        self.add_statistics(shares, {"lm": lm_sum} | sums, states, inputs)
        return loss * ranks  # data parallelism averages gradients, but the loss is a sum over ranks


# ----------------------------------------------------------------------------------------------------------------- main


@dataclass
class Parts:
    """The loaded parts of a run. With --streaming `train_set` has only the first examples."""

    train_set: SegmentDataset
    stream: SegmentStream | None
    held_out: SegmentDataset | None
    problems: Problems
    encoder: Encoder
    model: Any
    selector: LMHeadSelector
    collator: Collator
    terms: list[losses.Term]

    def objective(self, batch: dict[str, Any], gamma: float) -> tuple[torch.Tensor, torch.Tensor, dict, States]:
        """(loss (), sum of the cross-entropy (), sums () of the terms by name, states) of a batch on its own."""
        lm_sum, states = self.selector.lm_sum(self.model, batch)
        states = add_contrast(states, batch, self.terms, Contrast(0), self.selector, 0)
        terms = [(term, term.weight) for term in self.terms]
        loss, sums, _ = losses.objective(lm_sum, states, batch["counts"].clamp(min=1), gamma, terms)
        return loss, lm_sum, sums, states

    def inspect(self, half: bool) -> None:
        """Checks the layout on three of the first examples. `half`: the parameters are in half precision."""
        first = list(itertools.islice(self.train_set.items, 1000))
        items = sorted(first, key=lambda item: (item[0].kind != "chat", -len(item)))[:3]  # complete ones, if any
        sets = [x for x in (self.train_set, self.held_out) if x is not None]
        longest = self.encoder.max_length if self.stream else max(x.items.longest for x in sets)
        inspect_model(self.model, self.selector, self.collator, items, half=half, longest=longest)
        self.selector.slices &= not any("logits" in term.reads for term in self.terms)  # slices keep none


def load_data(
    s: Settings, encoder: Encoder, state: PartialState
) -> tuple[SegmentDataset, SegmentStream | None, SegmentDataset | None, Problems]:
    """(training set, stream, held-out set, problems) of the examples that the flags name. Raises UsageError.

    With --streaming the training set has only the first examples.
    """
    problems, stream = Problems(s.skip_bad_examples), None
    draws = Draws(s.finetune_seed, s.jepa_ratio, s.stp_variant, s.stp_part, s.stp_spans, s.stp_max_length)
    if s.streaming:
        stream = SegmentStream(
            s.train_file, encoder, draws, fields=s.fields, seed=s.finetune_seed, skip=s.skip_bad_examples,
            batch_size=s.batch_size, tokens=s.tokens_per_batch, process=state.process_index,
            processes=state.num_processes,
        )  # fmt: skip
        train = stream.first(s.dry_run or 4 * s.batch_size)
    else:
        train = read_examples(s.train_file or s.data_file, problems, s.fields)
        encoder.renderer.fix_template(thinking=any("</think>" in (e.assistant or "") for e in train))
    if share := s.eval_split if s.data_file else s.val_fraction:
        train, held_out = split_examples(train, share, s.split_seed)
    else:
        held_out = read_examples(s.eval_file, problems, s.fields) if s.eval_file else []
    train_set = SegmentDataset(train[: s.dry_run or None], encoder, problems, draws, s.preprocessing_num_workers)
    if s.dry_run or not held_out:
        return train_set, stream, None, problems
    if not any(example.has_chat for example in held_out):
        raise UsageError("no held-out example has a chat, so there is no eval_lm_loss")
    draws = dataclasses.replace(draws, jepa_ratio=1.0)  # held-out examples always have their views
    held_out_set = SegmentDataset(held_out, encoder, problems, draws, s.preprocessing_num_workers)
    return train_set, stream, held_out_set, problems


def load_base(s: Settings, tokenizer: Any, **options: Any) -> Any:
    """The model of the flags without an adapter; `options` as of load_model."""
    options |= {name: getattr(s, name) for name in ("pretrain", "attn_implementation", "trust_remote_code")}
    return load_model(*s.base, tokenizer, predictors=s.stored_predictors, **options)


def adapted(model: Any, s: Settings, tokenizer: Any) -> Any:
    """The model with the adapter of the flags, if they ask for one."""
    adapter = s.model_name if adapter_config(s.model_name) else None
    return add_adapter(model, tokenizer, revision=s.revision, adapter=adapter, **s.lora_options) if s.lora else model


def load_on_device(s: Settings, tokenizer: Any, device: torch.device) -> Any:
    """The model with float32 parameters, on its device."""
    return adapted(load_base(s, tokenizer), s, tokenizer).to(device)


def auxiliary_terms(s: Settings) -> list[losses.Term]:
    """The auxiliary losses that the flags ask for."""
    terms = []
    if s.jepa:
        detached = s.stop_gradient and int((s.stop_gradient == "code") != s.reverse_pred)  # a view's number
        options = {"temperature": s.temperature, "stop_gradient": detached, "center": s.center}
        reads = ("projected" if s.sigreg else "views", *(["contrast_set"] if s.contrasts else []))

        def jepa(views: torch.Tensor, others: losses.ContrastSet | None = None) -> tuple[torch.Tensor, int]:
            return losses.jepa_loss(views, s.jepa_loss_or_default, others, **options)

        terms.append(losses.Term("jepa", reads, "pairs", jepa, s.lbd * (1 - s.sigreg)))
        if s.sigreg:
            reads = ("projected", "directions", "rest_of_step")
            terms.append(losses.Term("sigreg", reads, "pairs", losses.sigreg_loss, s.lbd * s.sigreg))
    chat = {  # what follows the name in the Term of each loss of CHAT_LOSSES
        "stp": (("path",), "spans", partial(losses.stp_loss, variant=s.stp), s.stp_lbd, s.stp_warmup, s.stp_min_lbd),
        "nitp": (("predicted", "target"), "next_tokens", losses.nitp_loss, s.nitp_lbd),
    }
    return terms + [losses.Term(name, *chat[name]) for name in s.chat_losses]


def prepare(s: Settings, state: PartialState, load: Callable = load_on_device) -> Parts:
    """Reads and encodes the data and loads the model. Raises UsageError; writes no file."""
    device = torch.device("cpu") if s.dry_run else state.device
    tokenizer = load_tokenizer(s.model_name, s.revision, **tokenizer_options(s))
    config = load_config(*s.base, trust_remote_code=s.trust_remote_code)
    max_length = min(s.max_length, context_length(config) or s.max_length)
    if max_length < s.max_length and state.is_main_process:
        print(f"--max_length {max_length}, the model's context, instead of {s.max_length}", file=sys.stderr)
    renderer = Renderer(tokenizer, s.plain, s.train_all, s.predictors, s.front_pred, s.reverse_pred)
    locate_user = s.stp_variant is not None and s.stp_part in ("content", "user")
    encoder = Encoder(renderer, s.lm_labels, max_length, s.last_token, s.jepa, s.text_view, locate_user, s.lm_turns)
    data = load_data(s, encoder, state)
    set_seed(s.finetune_seed)
    model = load(s, tokenizer, device)
    if s.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UsageError(f"--gradient_checkpointing: {type(model).__name__} does not support it")
    # A dense mask is quadratic in the row, so short rows are faster on a CPU; flash kernels want one long row.
    flash = "flash" in (s.attn_implementation or "")
    tokens_per_row = s.tokens_per_row or (sys.maxsize if flash else 4096 if device.type == "cuda" else 256)
    points, nitp = losses.STP_LOSSES[s.stp_variant].points if s.stp_variant else 0, "nitp" in s.chat_losses
    collator = Collator(s.layout, tokenizer.pad_token_id, tokens_per_row, points, nitp, s.shuffle_pairs)
    add_projectors(model, s.projectors, s.finetune_seed)
    layers = {"target_layer": s.nitp_layer, "targets": s.nitp_targets} if nitp else {}
    selector = LMHeadSelector(model, s.stp_layer if s.stp_variant else -1, **layers)
    return Parts(*data, encoder, model, selector, collator, auxiliary_terms(s))


def dry_run(s: Settings, parts: Parts) -> dict[str, Any]:
    """Scores the first --dry_run examples (all of `train_set`) as one micro-batch, with gradient."""
    model = parts.model.eval()
    batch = parts.collator(parts.train_set[0, range(len(parts.train_set))])  # (epoch, indices)
    loss, lm_sum, sums, states = parts.objective(batch, s.gamma)
    counts = batch["counts"].clamp(min=1)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}")
    loss.backward()
    there = dict(zip(losses.COUNTS, batch["counts"].tolist(), strict=True)) | {"pairs": states.views.shape[1]}
    means = {t.name: (sums[t.name] / there[t.divisor]).item() for t in parts.terms if there[t.divisor]}
    return {
        "lm_loss": (lm_sum / counts[0]).item(),
        "jepa_loss": means.get("jepa"),
        **{f"{t.name}_loss": means.get(t.name) for t in parts.terms},
        **({"spans": there["spans"]} if s.stp_variant else {}),
        "total_loss": loss.item(),
        "grad_norm": torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item(),
        "label_tokens": len(batch["label_ids"]),
        "pairs": there["pairs"],
        "tokens": dict(zip(("chat", "text_view", "code_view", "padding"), batch["tokens"].tolist(), strict=True)),
        "first_row": first_example(parts.encoder.renderer, parts.train_set),
    }


def build_trainer(
    s: Settings, parts: Parts, state: PartialState, *, trainer_class: type = JepaTrainer,
    make_arguments: Callable = training_arguments,
) -> JepaTrainer:  # fmt: skip
    """The Trainer of a run. Raises UsageError if the Trainer refuses the settings."""
    generate = None
    if s.generates:
        chats = [example for example in parts.held_out.examples if example.has_chat]
        generate = Generations(s, parts.encoder.renderer, chats, state)
    try:
        arguments = make_arguments(s, state.device)
        Trainer.get_optimizer_cls_and_kwargs(arguments, parts.model)  # raises if the optimizer is not installed
        if s.same_flop and parts.terms:
            batches = len(micro_batches(s, parts.train_set, state.num_processes))
            steps_per_epoch = math.ceil(batches // state.num_processes / s.grad_accum)
            share = flop_share(s, parts, micro_batches(s, parts.train_set, 1), arguments.bf16)
            arguments.max_steps = max(1, round(steps_per_epoch * s.num_epochs * share))
        trainer = trainer_class(parts, arguments, generate)
    except (ValueError, ImportError, OverflowError) as error:
        raise UsageError(f"the Trainer refuses these settings: {first_line(error)}") from None
    trainer.remove_callback(ProgressCallback)
    if s.torch_compile:
        compile_decoder(parts.model)
    return trainer


def fine_tune(
    s: Settings, state: PartialState, *, load: Callable = load_on_device, half: bool = False, sharded: bool = False,
    **trainer_options: Any,
) -> None:  # fmt: skip
    """A complete run: checks everything, starts the run folder, trains, saves.

    The keyword arguments are what a large model does differently: how it is loaded, whether its parameters are in half
    precision, whether the Trainer shards them, so that the layout is checked only then, and the `trainer_options` of
    build_trainer.
    """
    is_main = state.is_main_process
    say = partial(print, file=sys.stderr, flush=True) if is_main else lambda text: None
    with contextlib.closing(RunFolder(s.output_dir, dataclasses.asdict(s))) as run:
        with agreed():
            if not s.dry_run:
                run.check(s.resume, s.overwrite)
            parts = prepare(s, state, load)
        if not sharded:
            parts.inspect(half)
        if parts.problems.found:
            say(parts.problems.report())
        if s.dry_run:
            found = dry_run(s, parts)
            if is_main:
                print(json.dumps(found, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))
            return

        trainer, bar = build_trainer(s, parts, state, **trainer_options), Bar()
        check = partial(parts.inspect, half) if sharded else None
        reports = [bar, MetricsCallback(run, trainer, check)] + ([GenerationsCallback(trainer)] if s.generates else [])
        stopping = [EarlyStoppingCallback(s.early_stopping_patience)] if s.early_stopping_patience else []
        for callback in (*reports, *stopping):
            trainer.add_callback(callback)
        renderer = parts.encoder.renderer
        stop = end_of_turn(renderer) if s.lm_labels != "answer_text" else None
        config = trainer.generation_config
        config.eos_token_id = stop_tokens(config, stop) or None  # plain `generate` stops where a turn ends
        state.wait_for_everyone()  # every process has checked the folder before the main process fills it
        with agreed():
            if is_main:
                record = start_record(s, parts.train_set, parts.problems)
                record |= {"not_adapted": not_adapted(parts.model)} if s.lora else {}
                start_trackers(trainer, s.project)
                say(start_block(s, parts.model, renderer, parts.train_set, len(parts.held_out or ())))
                run.start(s.overwrite, record)

        try:
            checkpoint = last_checkpoint(run.path, say) if s.resume else None
            with write_errors(s.output_dir):
                trainer.train_from(checkpoint)
                trainer.save_model()
                (run.path / "training_args.bin").unlink(missing_ok=True)  # a pickle of the Trainer that nothing reads
                if s.merge and is_main:
                    trainer.as_saved(trainer.merged_model()).save_pretrained(run.path / "merged")
                    renderer.tokenizer.save_pretrained(run.path / "merged")
        except BaseException as error:
            bar.close()
            if is_main:
                if isinstance(error, OSError):  # the disk may be full
                    run.remove_checkpoints(keep=complete_checkpoints(run.path))
                interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
                repeats = isinstance(error, (UsageError, FloatingPointError))
                with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                    run.update("interrupted" if interrupted else "failed", error=first_line(error), repeats=repeats)
                    if interrupted:
                        say(f"to continue this run: --resume {s.output_dir}")
            raise
        facts = final_record(trainer)
        if is_main:
            run.update("finished", **facts)
            if not s.keep_checkpoints:
                run.remove_checkpoints()
            if s.streaming and parts.problems.found:
                say(parts.problems.report())
            shown = ", ".join(f"{name} {value:.4g}" for name, value in facts["final"].items())
            best = f" (the model is that of step {facts['best']['step']})" if s.save_best else ""
            say(f"finished {facts['steps']} steps, {facts['tokens']} tokens; last logged: {shown}{best}")
            announced = {key for line in trainer.state.log_history for key in line}
            for term, judged in facts["learned"].items():
                if not judged["collapsed"] or f"{term}_collapsed" not in announced:
                    say(describe_learning(term, judged))
        state.wait_for_everyone()  # a process that leaves first would break the others' connections


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 finished, 1 failed, 2 wrong usage or data, 130 interrupted."""
    settings, given = parse_flags(Settings, __doc__, argv)
    return run_script("finetune.py", lambda state: fine_tune(check_settings(settings, given), state))


if __name__ == "__main__":
    gc.freeze()  # otherwise each collection examines all imported modules: 1 s of the start with 8000 examples
    sys.exit(main())
