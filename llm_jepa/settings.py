"""The flags of finetune.py, and which of them contradict each other."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_jepa.cli import Refusals, UsageError, first_line, flag
from llm_jepa.data.examples import Fields, dataset_name, files_of
from llm_jepa.distributed import processes
from llm_jepa.files import read_json
from llm_jepa.losses import CHAT_LOSSES, JEPA_LOSSES, NITP_FORMULA, STP_LOSSES, TEMPERATURES
from llm_jepa.scoring.tasks import TASK_NAMES, TASKS, find_task

DATA, MODEL, METHOD, BATCH, OPTIM, RUN = "Data", "Model", "Method", "Batches", "Optimization", "Run"
# Settings that change no number: a resumed run may change them, and they do not distinguish arms. The last two set
# lm_labels.
VOLATILE = {"output_dir", "config", "resume", "overwrite", "dry_run", "report_to", "run_name", "project",
            "sample_generations", "allow_code_execution", "save_total_limit", "keep_checkpoints", "logging_steps",
            "gradient_stats", "dataloader_num_workers", "preprocessing_num_workers", "use_default_data_collator",
            "unmask_assistant_special_tokens"}  # fmt: skip
# Flags of the JEPA loss, without effect otherwise.
JEPA_FLAGS = ("lbd predictors last_token jepa_loss jepa_l2 jepa_mse infonce temperature negatives_queue stop_gradient "
              "center sigreg shuffle_pairs front_pred reverse_pred text_view jepa_ratio same_flop").split()  # fmt: skip
LORA_FLAGS = "lora_rank lora_alpha target_modules modules_to_save use_rslora use_dora init_lora_weights".split()
JepaLossName = Literal[*JEPA_LOSSES] | None
StpName = Literal[*STP_LOSSES] | None
Strategy = Literal["epoch", "steps", "no"] | None
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass
class Settings:
    """Every flag of finetune.py; the help texts make `--help` and docs/flags.md."""

    train_file: str | None = flag(None, "training file, glob or hub dataset OWNER/NAME[:CONFIG]:SPLIT[@REVISION]", DATA)
    data_file: str | None = flag(None, "one file that is split into training and held-out examples", DATA)
    eval_split: float = flag(0.2, "fraction of --data_file held out", DATA)
    split_seed: int = flag(42, "seed of the --data_file or --val_fraction split", DATA)
    eval_file: str | None = flag(None, "held-out examples", DATA)
    val_fraction: float = flag(0.0, "fraction of --train_file held out, instead of --eval_file", DATA)
    text_field: str | None = flag(None, "field of the Text view in other JSON, CSV, TSV, Parquet or hub data", DATA)
    code_field: str | None = flag(None, "field of the Code view in such data", DATA)
    view_text_field: str | None = flag(None, "field of the Text view if --text_field is only the user turn", DATA)
    view_code_field: str | None = flag(None, "field of the Code view if --code_field is only the answer", DATA)
    system: str | None = flag(None, "system turn of such data; default: none", DATA)
    max_length: int = flag(512, "maximum length of a chat or view in tokens; a longer one is an error", DATA)
    skip_bad_examples: bool = flag(False, "skip bad examples, count and report them", DATA)
    streaming: bool = flag(False, "read and tokenize --train_file during training, for data larger than memory", DATA)
    preprocessing_num_workers: int = flag(0, "tokenizing processes; 0: one per 10,000 examples, up to all cores", DATA)

    model_name: str | None = flag(None, "model folder or hub name", MODEL)
    revision: str | None = flag(None, "commit of a hub model", MODEL)
    tokenizer_name: str | None = flag(None, "folder or hub name of the tokenizer; default: that of the model", MODEL)
    chat_template: str | None = flag(None, "file with a Jinja chat template that replaces the tokenizer's", MODEL)
    trust_remote_code: bool = flag(False, "run the Python code that a model's repository contains", MODEL)
    pretrain: bool = flag(False, "train the architecture of --model_name from random parameters", MODEL)
    lora: bool = flag(
        False,
        "train a LoRA adapter on the text decoder's weight matrices, the embeddings of the predictor tokens, and the "
        "embedding and output rows of tokens that the model lacked (with --plain of the turn tokens)",
        MODEL,
    )
    lora_rank: int = flag(16, "rank of the adapter", MODEL)
    lora_alpha: int | None = flag(None, "scale of the adapter; default: twice the rank", MODEL)
    lora_dropout: float | None = flag(
        None,
        "dropout before the adapter; default: 0.1, or that of a continued adapter. Fused experts have no dropout",
        MODEL,
    )
    target_modules: str | None = flag(
        None,
        "ends of the names of the weights to adapt, with commas (q_proj,v_proj); all-linear: all linear layers but the "
        "output layer; default: these and fused experts",
        MODEL, "--lora_target_modules",
    )  # fmt: skip
    modules_to_save: str | None = flag(
        None, "ends of the names of modules that train completely and are stored with the adapter, with commas",
        MODEL, "--lora_modules_to_save",
    )  # fmt: skip
    use_rslora: bool = flag(False, "rank-stabilized LoRA: alpha / √rank instead of alpha / rank", MODEL)
    use_dora: bool = flag(False, "DoRA: the adapter also trains the norm of each output", MODEL)
    init_lora_weights: Literal["gaussian", "orthogonal", "olora", "pissa", "mica"] | None = flag(
        None, "initialization of the adapter; default: PEFT's", MODEL
    )
    merge: bool = flag(False, "also write the model with the adapter merged in, to OUTPUT_DIR/merged", MODEL)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "precision of the computation (parameters stay float32); auto: bfloat16 if the GPU supports it", MODEL
    )
    attn_implementation: str | None = flag(None, "attention kernel of transformers (sdpa, flash_attention_2 …)", MODEL)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass", MODEL)
    torch_compile: bool = flag(False, "compile the model's decoder for training", MODEL)
    use_liger_kernel: bool = flag(False, "kernels of the package liger-kernel, on a GPU", MODEL)

    regular: bool = flag(False, "regular fine-tuning: no JEPA term and no views", METHOD)
    predictors: int = flag(0, "number of predictor tokens after the Text view, 0 to 10", METHOD)
    lbd: float = flag(0.1, "weight λ of the JEPA loss; 0 is regular fine-tuning", METHOD)
    gamma: float = flag(1.0, "weight γ of the language-model loss", METHOD)
    last_token: int | None = flag(None, "view token's index, -1 the view's last; default: last content token", METHOD)
    jepa_loss: JepaLossName = flag(
        None, "loss of the pairs, default cosine: " + "; ".join(f"{n}: {x.formula}" for n, x in JEPA_LOSSES.items()),
        METHOD,
    )  # fmt: skip
    jepa_l2: bool = flag(False, "the same as --jepa_loss l2", METHOD)
    jepa_mse: bool = flag(False, "the same as --jepa_loss mse", METHOD)
    infonce: bool = flag(False, "the same as --jepa_loss infonce", METHOD)
    temperature: float | None = flag(
        None, "τ of --jepa_loss " + " and ".join(f"{n} (default {t})" for n, t in TEMPERATURES.items()), METHOD
    )
    negatives_queue: int = flag(
        0, f"{', '.join(TEMPERATURES)}: also contrast with this many earlier pairs, no gradient", METHOD
    )
    stop_gradient: Literal["text", "code"] | None = flag(None, "view into which no JEPA gradient flows", METHOD)
    center: bool = flag(False, "subtract each view's mean over all processes before --jepa_loss", METHOD)
    sigreg: float = flag(0.0, "W: (1 − W) · JEPA loss + W · SIGReg of the projected views; usual: 0.02 to 0.05", METHOD)
    shuffle_pairs: bool = flag(False, "placebo: pair each Text view with the Code view of another example", METHOD)
    front_pred: bool = flag(False, "predictor tokens before the view's content", METHOD)
    reverse_pred: bool = flag(False, "the assistant turn is the first view and gets the predictor tokens", METHOD)
    text_view: Literal["alone", "in_chat"] = flag(
        "alone",
        "where the Text view is read. alone: in its own segment; in_chat: at the end of the chat's user turn, which "
        "needs fewer tokens (a variant of the method, in which the Text view also attends to the system turn)",
        METHOD,
    )
    jepa_ratio: float = flag(1.0, "fraction of examples that get the JEPA term (1 − the paper's LD rate)", METHOD)
    stp: StpName = flag(
        None,
        "add the loss of Semantic Tube Prediction, with the JEPA loss or with --regular. "
        + "; ".join(f"{name}: {loss.formula}" for name, loss in STP_LOSSES.items()),
        METHOD,
    )
    stp_lbd: float = flag(0.02, "weight of the --stp loss; 0 turns it off", METHOD)
    stp_spans: int = flag(1, "--stp: number of random triples or spans per example", METHOD)
    stp_part: Literal["content", "user", "answer", "chat"] = flag(
        "content", "--stp: the part of the chat that spans are drawn from; content: user turn and answer", METHOD
    )
    stp_max_length: int = flag(0, "--stp: maximum tokens of a span, or from s to t; 0: no limit", METHOD)
    stp_warmup: float = flag(0.0, "--stp: linear warm-up of its weight in steps; below 1: a fraction of all", METHOD)
    stp_min_lbd: float = flag(0.0, "--stp_warmup: weight at the start of the warm-up", METHOD)
    stp_layer: int = flag(-1, "--stp: layer, as evaluate.py's --embedding_layer; 0: embeddings, -1: the last", METHOD)
    nitp: bool = flag(
        False, f"add the next-latent loss, with the JEPA loss or with --regular: mean over the chat of {NITP_FORMULA}",
        METHOD,
    )  # fmt: skip
    nitp_lbd: float = flag(0.8, "weight of the --nitp loss; 0 turns it off", METHOD)
    nitp_layer: int = flag(0, "--nitp: layer of the target z; 0: the embeddings, -1: the last layer", METHOD)
    nitp_targets: Literal["states", "random", "shuffled"] = flag(
        "states",
        "--nitp: its targets; states: of --nitp_layer; controls: a fixed random vector per token, shuffled states",
        METHOD,
    )
    gradient_stats: int = flag(150, "log size and direction of auxiliary gradients every N steps; 0: never", RUN)
    lm_labels: Literal["answer", "answer_text", "all", "reference"] | None = flag(
        None, "labels of the language-model loss; default answer: the answer and its end-of-turn token", METHOD
    )
    lm_turns: Literal["last", "all"] = flag("last", "answers of a multi-turn chat that --lm_labels labels", METHOD)
    use_default_data_collator: bool = flag(False, "flag of the published code: as --lm_labels answer_text", METHOD)
    unmask_assistant_special_tokens: bool = flag(
        False,
        "flag of the published code: as --lm_labels reference, or answer with --use_default_data_collator",
        METHOD,
    )
    plain: bool = flag(False, "no chat format: user<|perception|>assistant<|eot_id|>", METHOD)
    reference_grad_scale: bool = flag(
        False, "divide a micro-batch's loss by its own counts, as published: gradients grow --grad_accum times", METHOD
    )
    train_all: bool = flag(False, "label every token; --plain: the chat is only the user text", METHOD, "--trainall")

    batch_size: int = flag(4, "examples per micro-batch of each process", BATCH)
    tokens_per_batch: int = flag(
        0, "about this many tokens (with views; at least one example) per micro-batch, instead of --batch_size", BATCH
    )
    grad_accum: int = flag(4, "micro-batches per optimizer step", BATCH)
    layout: Literal["packed", "separate", "additive"] | None = flag(
        None, "how segments share rows, which does not change the losses; default packed", BATCH
    )
    additive_mask: bool = flag(False, "the same as --layout additive", BATCH)
    tokens_per_row: int = flag(0, "tokens per packed row; 0: 256 (CPU), 4096 (GPU), one row (flash attention)", BATCH)
    dataloader_num_workers: int | None = flag(
        None, "processes that prepare batches; default 2 on a GPU (1 with --streaming), else 0", BATCH
    )

    learning_rate: float = flag(2e-5, "peak learning rate", OPTIM)
    num_epochs: float = flag(4.0, "number of epochs", OPTIM)
    max_steps: int = flag(-1, "optimizer steps, instead of --num_epochs", OPTIM)
    weight_decay: float = flag(0.0, "AdamW's weight decay", OPTIM)
    warmup_steps: float = flag(0.0, "linear warm-up in steps; below 1: a fraction of all steps", OPTIM)
    lr_scheduler_type: str = flag("linear", "schedule of transformers (linear, cosine, constant …)", OPTIM)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: no clipping", OPTIM)
    optim: str = flag("adamw_torch_fused", "optimizer of transformers", OPTIM)
    adam_beta2: float = flag(0.999, "AdamW's second beta", OPTIM)
    finetune_seed: int = flag(42, "seed of random parameters, data order and loss dropout", OPTIM)
    same_flop: bool = flag(False, "train with the FLOPs that regular fine-tuning needs for --num_epochs", OPTIM)

    output_dir: str | None = flag(None, "run folder; default runs/<dataset>-<model>-<method>-…", RUN)
    config: str | None = flag(
        None, "YAML file of flags, or a run folder whose settings are the defaults; flags on the command line win", RUN
    )
    resume: bool | str = flag(False, "resume at the last complete checkpoint; --resume RUN: with RUN's settings", RUN)
    overwrite: bool = flag(False, "replace an existing run folder", RUN)
    dry_run: int | None = flag(None, "print the losses of the first N examples as one JSON object; write nothing", RUN)
    eval_strategy: Strategy = flag(None, "when held-out examples are evaluated; default epoch if there are any", RUN)
    eval_steps: int = flag(500, "steps between evaluations with --eval_strategy steps", RUN)
    eval_on_start: bool = flag(False, "also evaluate before the first step", RUN)
    eval_generate: int = flag(0, "also generate for N held-out examples; log the scores of --task", RUN)
    sample_generations: int = flag(
        0, "print the generations for the first N held-out examples; write them to generations.jsonl and trackers", RUN
    )
    task: str | None = flag(
        None, f"scores of generations ({TASK_NAMES}); default: by the base name of the file, else text", RUN
    )
    spider_path: str = flag("spider_data.zip", "task spider: folder or zip file of Spider with its databases", RUN)
    allow_code_execution: bool = flag(
        False, "task mbpp: run programs without isolation, with all your rights, if bubblewrap does not work", RUN
    )
    save_best: bool = flag(
        False,
        "save the model of the evaluation with the best score: the first of --task with --eval_generate, else "
        "eval_lm_loss; a checkpoint is saved at each evaluation",
        RUN,
    )
    early_stopping_patience: int | None = flag(
        None, "stop after N evaluations without a better score (see --save_best)", RUN
    )
    save_strategy: Strategy = flag(None, "when checkpoints are saved; default epoch, or steps with --streaming", RUN)
    save_steps: int = flag(500, "steps between checkpoints with --save_strategy steps", RUN)
    save_total_limit: int = flag(1, "number of complete checkpoints to keep, besides that of --save_best", RUN)
    keep_checkpoints: bool = flag(False, "keep checkpoints after training (by default only the final model)", RUN)
    logging_steps: int = flag(1, "optimizer steps per line of metrics.jsonl", RUN)
    report_to: str = flag("none", f"none, {', '.join(TRACKERS)}, or several with commas", RUN)
    run_name: str | None = flag(None, "name of the run in trackers; default: that of the run folder", RUN)
    project: str | None = flag(None, "W&B or trackio project, MLflow experiment; default: the tracker's", RUN)
    track_flop: bool = flag(False, "log floating-point operations to metrics.jsonl (slower)", RUN)

    @property
    def fields(self) -> Fields | None:
        """The fields of the examples, None for data in the project's own format."""
        views = (self.view_text_field, self.view_code_field)
        return Fields(self.text_field, self.code_field, self.system, *views) if self.text_field else None

    @property
    def generates(self) -> bool:
        """Whether evaluations generate."""
        return self.eval_generate > 0 or self.sample_generations > 0

    @property
    def scored_task(self) -> str:
        """The task whose scores the generations get: a key of TASKS, or a file."""
        name = dataset_name(self.eval_file or self.data_file or self.train_file)
        return self.task or (name if name in TASKS else "text")

    @property
    def best_metric(self) -> str | None:
        """What decides which evaluation is the best, a key of metrics.jsonl; None without --save_best and stopping."""
        if not (self.save_best or self.early_stopping_patience):
            return None
        return f"eval_{find_task(self.scored_task).primary}" if self.eval_generate else "eval_lm_loss"

    @property
    def label_scope(self) -> str | None:
        """The value of --lm_labels that the flags ask for, also by the reference implementation's flags."""
        scopes = (self.lm_labels, "answer_text", "reference", "answer")
        return scopes[self.use_default_data_collator + 2 * self.unmask_assistant_special_tokens]

    @classmethod
    def stored(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The settings of the run that `--resume RUN` in the given flags names. Raises UsageError if it is none."""
        run = Path(given["resume"])
        if not (run / "args.json").is_file():
            raise UsageError(f"--resume {run} is not a run folder (it has no args.json)")
        if Path(given.get("output_dir", run)).resolve() != run.resolve():
            raise UsageError(f"--resume {run}: not with --output_dir {given['output_dir']}")
        settings, known = read_json(run / "args.json"), {f.name for f in dataclasses.fields(cls)}
        known -= {"resume", "overwrite", "dry_run"}
        return {name: settings[name] for name in known & settings.keys()} | {"output_dir": given["resume"]}

    @classmethod
    def configured(cls, run: Path) -> dict[str, Any]:
        """The settings of a run for another run. Raises UsageError if it is no run folder.

        What the run derived from other settings is left out, so that it is derived again.
        """
        names = {f.name for f in dataclasses.fields(cls)}.difference(
            ("output_dir", "config", "resume", "overwrite", "dry_run", "additive_mask")
        )
        stored = read_json(run / "args.json")
        found = {name: value for name, value in stored.items() if name in names}
        for name in ("layout", "jepa_loss", "lm_labels", "eval_strategy", "save_strategy"):
            rest = {k: v for k, v in found.items() if k != name}
            if name in found and getattr(resolve(cls(**rest)), name) == found[name]:
                found = rest
        return found

    @property
    def jepa(self) -> bool:
        """Whether any example gets the JEPA term."""
        return not self.regular and self.lbd > 0 and self.jepa_ratio > 0

    @property
    def stored_predictors(self) -> int:
        """The number of predictor tokens whose rows are stored: all ten, in an adapter those in use."""
        return 10 if not self.lora else self.predictors if self.jepa else 0

    @property
    def base(self) -> tuple[str, str | None]:
        """Name and revision of the model without an adapter."""
        found = adapter_config(self.model_name)
        return (found["base_model_name_or_path"], found.get("revision")) if found else (self.model_name, self.revision)

    @property
    def dropout_or_default(self) -> float:
        """The adapter's dropout: that of the flag, of the adapter that training continues, or 0.1."""
        config = adapter_config(self.model_name)
        stored = config and not config.get("target_parameters")  # with these, fused experts, it is always 0
        kept = config["lora_dropout"] if stored else 0.1
        return kept if self.lora_dropout is None else self.lora_dropout

    @property
    def lora_options(self) -> dict[str, Any]:
        """The options of add_adapter."""
        names = {name: (getattr(self, name) or "").split(",") for name in ("target_modules", "modules_to_save")}
        lists = {name: [x.strip() for x in found if x.strip()] or None for name, found in names.items()}
        options = {name: getattr(self, name) for name in ("lora_alpha", "use_rslora", "use_dora", "plain")}
        options |= {"rank": self.lora_rank, "dropout": self.dropout_or_default, "predictors": self.stored_predictors}
        return options | lists | {"init_lora_weights": self.init_lora_weights or True}

    @property
    def stp_variant(self) -> str | None:
        """The variant of Semantic Tube Prediction, a key of STP_LOSSES; None if it has no weight."""
        return self.stp if "stp" in self.chat_losses else None

    @property
    def jepa_loss_or_default(self) -> str:
        """The loss of the pairs that the flags ask for, a key of JEPA_LOSSES."""
        old = {"l2": self.jepa_l2, "mse": self.jepa_mse, "infonce": self.infonce}
        return self.jepa_loss or next((name for name, given in old.items() if given), "cosine")

    @property
    def contrasts(self) -> bool:
        """Whether a pair's loss depends on other pairs."""
        return JEPA_LOSSES[self.jepa_loss_or_default].contrasts or self.center

    @property
    def chat_losses(self) -> list[str]:
        """The losses of CHAT_LOSSES that are turned on and have a weight."""
        return [name for name in chosen_losses(vars(self)) if getattr(self, f"{name}_lbd") > 0]

    @property
    def projectors(self) -> list[str]:
        """The names of the projectors that the losses need."""
        return ["nitp"] * ("nitp" in self.chat_losses) + ["sigreg"] * bool(self.jepa and self.sigreg)

    @property
    def layout_or_default(self) -> str:
        """The layout that the flags ask for."""
        return self.layout or ("additive" if self.additive_mask else "packed")


# The flags of each loss of CHAT_LOSSES: NAME and NAME_…, in the order of Settings. The first one turns the loss on, and
# NAME_lbd is its weight.
CHAT_FLAGS = {
    name: [f.name for f in dataclasses.fields(Settings) if f"{f.name}_".startswith(f"{name}_")] for name in CHAT_LOSSES
}


def adapter_config(name: str | None) -> dict[str, Any]:
    """The configuration of the adapter that a model folder contains, {} for another model."""
    path = Path(name or "") / "adapter_config.json"
    return read_json(path) if path.is_file() else {}


def chosen_losses(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """The losses of CHAT_LOSSES that settings turn on, whatever their weight. `prefix`: before the settings' names."""
    return [name for name, flags in CHAT_FLAGS.items() if settings.get(f"{prefix}{flags[0]}")]  # older runs lack some


def read_settings(settings: dict[str, Any]) -> Settings:
    """A run's args.json with the defaults of flags that are newer than the run, and --jepa_loss for its old names."""
    known = {f.name for f in dataclasses.fields(Settings)}
    s = Settings(**{name: value for name, value in settings.items() if name in known})
    old = dict.fromkeys(("jepa_l2", "jepa_mse", "infonce"), False)
    return dataclasses.replace(s, jepa_loss=s.jepa_loss_or_default, **old)


def check_data(s: Settings, r: Refusals) -> None:
    """Which examples are trained on and which are held out."""
    sources = (s.data_file, s.eval_file, s.val_fraction)
    r.refuse(not s.model_name, "--model_name is missing")
    r.only_if(not Path(s.model_name or "-").is_dir(), "revision", "only with a model of the hub")
    r.refuse(bool(s.train_file) == bool(s.data_file), "give one of --train_file and --data_file")
    r.refuse(sum(map(bool, sources)) > 1, "give at most one of --data_file, --eval_file and --val_fraction")
    r.refuse(bool(s.text_field) != bool(s.code_field), "give --text_field and --code_field together")
    r.only_if(bool(s.text_field), "system view_text_field view_code_field", "only with --text_field and --code_field")
    r.only_if(bool(s.data_file), "eval_split", "only with --data_file")
    r.only_if(bool(s.data_file or s.val_fraction), "split_seed", "only with --data_file or --val_fraction")
    evaluating = "eval_on_start eval_generate sample_generations save_best early_stopping_patience"
    r.only_if(any(sources), f"eval_strategy eval_steps {evaluating}", "there are no held-out examples")
    for action in ("eval", "save"):
        in_steps = (getattr(s, f"{action}_strategy") or ("steps" if s.streaming else "epoch")) == "steps"
        r.only_if(in_steps, f"{action}_steps", f"only with --{action}_strategy steps")
    r.only_if(s.eval_strategy != "no", evaluating, "not with --eval_strategy no")
    r.only_if(not s.save_best, "save_strategy save_steps", "not with --save_best, which saves at each evaluation")
    more = 0 < s.eval_generate < s.sample_generations
    r.refuse(more, f"--sample_generations {s.sample_generations} is above --eval_generate {s.eval_generate}")
    r.only_if(s.generates, "task spider_path allow_code_execution", "only with --eval_generate or --sample_generations")
    try:
        task = find_task(s.scored_task if s.generates and any(sources) and not r else s.task or "text")
        r.only_if(task.runs_programs or not s.generates, "allow_code_execution", "only with task mbpp")
    except UsageError as error:
        r.append(str(error))
    if s.streaming:
        r.only_if(False, "data_file val_fraction num_epochs same_flop", "not with --streaming: the length is unknown")
        r.refuse(s.max_steps == -1 and not s.dry_run, "--streaming: give --max_steps")
        epochs = [n for n in ("save_strategy", "eval_strategy") if getattr(s, n) == "epoch"]
        r.refuse(bool(epochs), f"--{' and --'.join(epochs)} epoch: not with --streaming, use steps")
        r.refuse((s.dataloader_num_workers or 0) > 1, "--dataloader_num_workers: at most 1 with --streaming")


def check_method(s: Settings, r: Refusals, several: bool) -> None:
    """The loss, the views and their layout. `several`: whether several processes train together."""
    views = " ".join((*JEPA_FLAGS, "additive_mask reference_grad_scale"))
    layout, dense = s.layout_or_default, s.attn_implementation in (None, "sdpa", "eager")
    kernel = f"--attn_implementation {s.attn_implementation}"
    r.only_if(not s.regular, views, "not with --regular, which has no views")
    r.refuse(s.regular and s.layout == "additive", "--layout additive: not with --regular, which has no views")
    r.only_if(s.grad_accum > 1, "reference_grad_scale", "not with --grad_accum 1, where it changes nothing")
    r.only_if(s.predictors > 0, "front_pred reverse_pred", "only with --predictors")
    r.refuse(s.front_pred and s.reverse_pred, "give one of --front_pred and --reverse_pred")
    losses = s.jepa_l2 + s.jepa_mse + s.infonce + (s.jepa_loss is not None)
    r.refuse(losses > 1, "give one of --jepa_loss, --jepa_l2, --jepa_mse and --infonce")
    auxiliary = bool(s.jepa or s.chat_losses)
    r.refuse(s.gamma == 0 and not auxiliary, "--gamma 0: no loss is left")
    compares = auxiliary and s.gamma or not s.gradient_stats
    r.only_if(bool(compares), "gradient_stats", "only with a language-model loss and an auxiliary loss")
    single, name = s.batch_size == 1 and not s.tokens_per_batch, s.jepa_loss_or_default
    contrasts = JEPA_LOSSES[name].contrasts and not s.negatives_queue
    need_other_pairs = {f"--jepa_loss {name}": contrasts, "--center": s.center, "--shuffle_pairs": s.shuffle_pairs}
    no_other_pair = single and (s.shuffle_pairs or not several)
    for what, given in need_other_pairs.items():
        r.refuse(given and no_other_pair, f"{what}: not with --batch_size 1, which leaves no other pair")
    tempered = f"only with --jepa_loss {' or '.join(TEMPERATURES)}"
    r.only_if(name in TEMPERATURES, "temperature negatives_queue", tempered)
    for first, *others in CHAT_FLAGS.values():
        r.only_if(bool(getattr(s, first)), " ".join(others), f"only with --{first}")
    r.only_if(not s.tokens_per_batch, "batch_size", "not together with --tokens_per_batch")
    r.only_if(layout == "packed", "tokens_per_batch tokens_per_row", "only with --layout packed")
    flash = "flash" in (s.attn_implementation or "")
    r.only_if(not flash, "tokens_per_row", "flash attention packs each micro-batch into one row")
    r.refuse(s.additive_mask and layout != "additive", f"--additive_mask: not with --layout {layout}")
    r.refuse(layout == "additive" and not dense, f"{kernel}: not with --layout additive")
    same = f"--use_default_data_collator or --unmask_assistant_special_tokens, here --lm_labels {s.label_scope}"
    r.refuse(s.lm_labels not in (None, s.label_scope), f"--lm_labels {s.lm_labels}: not with {same}")
    partial = s.label_scope in ("answer", "answer_text")
    r.refuse(s.train_all and partial, f"--lm_labels {s.label_scope}: not with --train_all")
    r.only_if(partial or not (s.label_scope or s.train_all), "lm_turns", "only with --lm_labels answer or answer_text")
    if s.text_view == "in_chat":
        r.only_if(False, "front_pred reverse_pred last_token", "not with --text_view in_chat")
        r.refuse(s.plain and s.train_all, "--text_view in_chat: not with --plain --train_all, whose chat has no answer")
        r.refuse(s.predictors > 0 and not dense, f"{kernel}: not with --predictors and --text_view in_chat")
    r.only_if(not s.stp or s.stp_warmup > 0, "stp_min_lbd", "only with --stp_warmup")
    above = s.stp_min_lbd > s.stp_lbd
    r.refuse(above, f"--stp_min_lbd {s.stp_min_lbd} is above --stp_lbd {s.stp_lbd}, where the warm-up ends")
    turn = s.plain and s.train_all and s.stp_part in ("user", "answer")
    r.refuse(turn, f"--stp_part {s.stp_part}: not with --plain --train_all, whose chat is one text")
    short = s.stp_max_length == 1 and s.stp and STP_LOSSES[s.stp].points == 3
    r.refuse(short, f"--stp_max_length 1: --stp {s.stp} needs three tokens")


def check_training(s: Settings, r: Refusals) -> None:
    """The model, the optimizer and the run."""
    r.only_if(not s.plain, "chat_template", "not with --plain")
    r.only_if(s.lora, f"{' '.join(LORA_FLAGS)} lora_dropout merge", "only with --lora")
    name = s.model_name
    if adapter_config(name):
        merge = f"python -m llm_jepa.export merged {name} {name}/merged"
        r.refuse(not s.lora, f"--model_name {name} is an adapter: continue it with --lora, or merge it: {merge}")
        r.only_if(False, " ".join(LORA_FLAGS), f"not with the adapter {name}, which has its own")
    r.refuse(s.lora and s.pretrain, "--lora: not with --pretrain, because the random base would not be saved")
    r.refuse(s.track_flop and s.torch_compile, "--track_flop: not with --torch_compile")
    measures = s.gradient_stats > 0 and (s.torch_compile or s.track_flop)
    r.only_if(not measures, "gradient_stats", "not with --torch_compile or --track_flop")
    flex = s.attn_implementation == "flex_attention"
    r.only_if(not flex, "track_flop same_flop", "not with --attn_implementation flex_attention")
    missing = s.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None
    r.refuse(missing, "--use_liger_kernel: install the package liger-kernel first")
    r.only_if(not r.given & {"num_epochs", "same_flop"}, "max_steps", "not together with --num_epochs or --same_flop")
    r.refuse(s.resume and s.overwrite, "give one of --resume and --overwrite")
    r.only_if(not s.dry_run, "resume overwrite", "not with --dry_run, which writes nothing")
    for tracker in s.report_to.split(","):
        known = tracker in ("none", *TRACKERS)
        r.refuse(not known, f"--report_to {tracker} is not one of none, {', '.join(TRACKERS)}")
        missing = known and tracker != "none" and importlib.util.find_spec(tracker) is None
        r.refuse(missing, f"--report_to {tracker}: install the package {tracker} first")
    r.only_if(s.report_to != "none", "run_name project", "only with --report_to")


def check_libraries(s: Settings, r: Refusals) -> None:
    """What only torch and transformers know, which take seconds to import: only for flags that are not the default."""
    needs_gpu = {"--dtype float16": s.dtype == "float16", "--use_liger_kernel": s.use_liger_kernel,
                 "--attn_implementation flex_attention": s.attn_implementation == "flex_attention"}  # fmt: skip
    for name in [name for name, given in needs_gpu.items() if given]:
        import torch

        r.refuse(not torch.cuda.is_available(), f"{name} needs a GPU")
    if (s.lr_scheduler_type, s.optim) != (Settings.lr_scheduler_type, Settings.optim):
        import torch
        from transformers import get_scheduler
        from transformers.training_args import OptimizerNames

        try:
            get_scheduler(s.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)], lr=s.learning_rate), 0, 1)
        except (ValueError, TypeError) as error:
            which = f"--lr_scheduler_type {s.lr_scheduler_type} with --learning_rate {s.learning_rate:g}"
            r.append(f"{which} cannot be used ({first_line(error)})")
        r.refuse(s.optim not in list(OptimizerNames), f"--optim {s.optim} is not known")


RANGES = {  # smallest and largest value of these flags
    "positive": (math.ulp(0), sys.float_info.max, "batch_size grad_accum lora_rank lora_alpha max_length max_steps "
                 "save_steps eval_steps logging_steps save_total_limit stp_spans early_stopping_patience dry_run "
                 "learning_rate num_epochs temperature"),
    "0 or more": (0, sys.float_info.max, f"lbd gamma {' '.join(f'{name}_lbd' for name in CHAT_LOSSES)} negatives_queue "
                  "stp_warmup stp_min_lbd stp_max_length max_grad_norm warmup_steps weight_decay gradient_stats "
                  "eval_generate sample_generations tokens_per_row tokens_per_batch dataloader_num_workers "
                  "preprocessing_num_workers"),
    "0 to 1": (0, 1, "jepa_ratio"),
    "0 or more and below 1": (0, math.nextafter(1, 0), "sigreg lora_dropout val_fraction adam_beta2"),
    "between 0 and 1": (math.ulp(0), math.nextafter(1, 0), "eval_split"),
    "0 to 10": (0, 10, "predictors"),
    "negative": (-sys.float_info.max, -1, "last_token"),
    "0 to 2**32 - 1": (0, 2**32 - 1, "finetune_seed split_seed"),
}  # fmt: skip


def check_settings(s: Settings, given: set[str], refusals: Sequence[str] = (), several: bool | None = None) -> Settings:
    """Resolves defaults that depend on other flags. Raises UsageError with all contradictions.

    `given`: flags given on the command line with another value than their default; `refusals`: earlier findings;
    `several`: whether several processes will train together, by default whether they do now.
    """
    r = Refusals(given)
    r.extend(refusals)
    check_data(s, r)
    check_method(s, r, processes() > 1 if several is None else several)
    check_training(s, r)
    for what, (smallest, largest, names) in RANGES.items():
        for name in names.split():
            value = getattr(s, name)
            wrong = value not in (None, getattr(Settings, name)) and not smallest <= value <= largest
            r.refuse(wrong, f"--{name} {value} is not {what}")
    if not r:  # after other mistakes the slow imports could only add to them
        check_libraries(s, r)
    if r:
        raise UsageError("\n".join(r))
    s = resolve(s)
    s = dataclasses.replace(s, output_dir=s.output_dir or default_output_dir(s))
    folder = Path(s.output_dir).resolve()
    for name in ("model_name", "train_file", "data_file", "eval_file") if s.overwrite else ():
        for path in map(Path, files_of(getattr(s, name)) if getattr(s, name) else ()):
            if folder in (path.resolve(), *path.resolve().parents):
                raise UsageError(f"--overwrite would remove --{name} {path}, inside --output_dir {s.output_dir}")
    return s


def resolve(s: Settings) -> Settings:
    """Fills in the defaults that depend on other flags, but for --output_dir."""
    held_out, steps = s.data_file or s.eval_file or s.val_fraction, "steps" if s.streaming else "epoch"
    eval_strategy = s.eval_strategy or (steps if held_out else "no")
    config, own = adapter_config(s.model_name), {}
    if config:  # --model_name is an adapter, which keeps its configuration
        init, whole = config["init_lora_weights"], config["modules_to_save"]
        own = {name: config[name] for name in ("lora_alpha", "use_rslora", "use_dora")} | {"lora_rank": config["r"]}
        own |= {"init_lora_weights": init if isinstance(init, str) else None}
        own |= {"modules_to_save": ",".join(whole) if whole else None}
    return dataclasses.replace(
        s,
        **own,
        lora_dropout=s.dropout_or_default,
        layout=s.layout_or_default,
        additive_mask=s.layout_or_default == "additive",
        jepa_loss=s.jepa_loss_or_default,
        jepa_l2=False,
        jepa_mse=False,
        infonce=False,
        lm_labels=s.label_scope or ("all" if s.train_all else "answer"),
        use_default_data_collator=False,
        unmask_assistant_special_tokens=False,
        eval_strategy=eval_strategy,
        save_strategy=eval_strategy if s.save_best else s.save_strategy or steps,
        save_steps=s.eval_steps if s.save_best else s.save_steps,
    )


def default_output_dir(s: Settings) -> str:
    """runs/<dataset>-<model>-<method>-lr…-lbd…-k…-s…, and a hash of all other settings that are not the default."""
    dataset = dataset_name(s.train_file or s.data_file)
    method = "regular" if s.regular else f"jepa-lbd{s.lbd:g}-k{s.predictors}"
    named = {"train_file", "model_name", "regular", "lbd", "predictors", "learning_rate", "finetune_seed"}
    usual = vars(resolve(type(s)()))
    others = {k: v for k, v in dataclasses.asdict(s).items() if k not in named | VOLATILE and v != usual[k]}
    mark = "-x" + hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:8] if others else ""
    return f"runs/{dataset}-{Path(s.model_name).name}-{method}-lr{s.learning_rate:g}{mark}-s{s.finetune_seed}"
