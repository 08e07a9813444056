"""Fine-tunes a causal language model on pairs of views with the LLM-JEPA objective (arXiv 2509.14252).

    L = gamma * L_LM + lbd * d(h_text, h_code)

    python finetune.py --train_file datasets/synth_train.jsonl --model_name models/tiny --pretrain \\
        --predictors 1 --lbd 1 --learning_rate 2e-3 --num_epochs 3 --batch_size 16 --grad_accum 1

The file is the method, top to bottom: flags, rendering, segments, layouts, losses, trainer, main.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.training_args import OptimizerNames
from transformers.utils import logging as transformers_logging

from examples import (
    END_OF_TURN,
    PERCEPTION,
    Example,
    ExampleError,
    Fields,
    Problems,
    Rendered,
    Renderer,
    data_sha256,
    dataset_name,
    predictor_token,
    read_examples,
    split_examples,
)
from runs import (
    VOLATILE,
    Run,
    UsageError,
    flag,
    mark_checkpoint,
    parse_flags,
    provenance,
    whole_checkpoints,
    write_text,
)

# ---------------------------------------------------------------------------------------------------------- flags

DATA, MODEL, METHOD, BATCH, OPTIM, RUN = "Data", "Model", "Method", "Batches", "Optimisation", "Run"


@dataclass
class Settings:
    """Every flag of finetune.py; its help texts make `--help` and the README's table."""

    train_file: str | None = flag(
        None,
        "rows to train on: a file, or with the fields named a hub dataset OWNER/NAME[:CONFIG]:SPLIT[@REVISION]",
        DATA,
    )
    data_file: str | None = flag(None, "the same, split into train and held-out rows", DATA)
    eval_split: float = flag(0.2, "share of --data_file held out", DATA)
    split_seed: int = flag(42, "seed of the --data_file or --val_fraction split", DATA)
    eval_file: str | None = flag(None, "held-out rows", DATA)
    val_fraction: float = flag(0.0, "share of --train_file held out instead of an --eval_file", DATA)
    text_field: str | None = flag(None, "field of the Text view, in JSONL, CSV, Parquet or hub rows of any kind", DATA)
    code_field: str | None = flag(None, "field of the Code view in such rows", DATA)
    system: str | None = flag(None, "system turn of such rows; default: none", DATA)
    max_length: int = flag(512, "longest chat or view in tokens; a longer example is an error, never cut", DATA)
    skip_bad_examples: bool = flag(False, "leave bad examples out, count and report them", DATA)

    model_name: str | None = flag(None, "model folder or hub name", MODEL)
    revision: str | None = flag(None, "commit of a hub model", MODEL)
    pretrain: bool = flag(False, "start from random weights of the model's shape", MODEL)
    lora: bool = flag(False, "train a LoRA adapter; added tokens' embedding rows train too", MODEL)
    lora_rank: int = flag(16, "rank of the adapter; alpha is twice the rank, dropout 0.1", MODEL)
    merge: bool = flag(False, "also write the adapter merged into the model, to OUTPUT_DIR/merged", MODEL)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "precision of the computation, weights stay float32; auto: bfloat16 where the GPU has it", MODEL
    )
    attn_implementation: str | None = flag(None, "attention kernel of transformers (sdpa, flash_attention_2 …)", MODEL)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass", MODEL)
    torch_compile: bool = flag(False, "compile the model", MODEL)

    regular: bool = flag(False, "regular fine-tuning: no JEPA term and no views", METHOD)
    predictors: int = flag(0, "predictor tokens behind the Text view, 0 to 10", METHOD)
    lbd: float = flag(0.1, "weight λ of the JEPA loss; 0 is regular fine-tuning", METHOD)
    gamma: float = flag(1.0, "weight γ of the language-model loss", METHOD)
    last_token: int | None = flag(
        None, "view token as an index from the view's end (-1 the last); default: the last content token", METHOD
    )
    jepa_l2: bool = flag(False, "distance ‖a−b‖₂ instead of 1 − cosine", METHOD)
    jepa_mse: bool = flag(False, "mean squared difference instead of 1 − cosine", METHOD)
    infonce: bool = flag(False, "contrast a text with the micro-batch's codes, temperature 0.07", METHOD)
    front_pred: bool = flag(False, "predictor tokens in front of the view's content", METHOD)
    reverse_pred: bool = flag(False, "the assistant turn is the first view and takes the predictors", METHOD)
    text_view: Literal["alone", "in_chat"] = flag(
        "alone",
        "where the Text view is read: alone, or behind the user turn of the chat itself, which saves its tokens: "
        "a variant of the method, whose Text view also sees the system turn",
        METHOD,
    )
    jepa_ratio: float = flag(1.0, "share of examples that get the JEPA term (1 − the paper's LD rate)", METHOD)
    lm_labels: Literal["answer", "answer_text", "all", "reference"] | None = flag(
        None, "tokens under the language-model loss; default answer: the answer and its end-of-turn token", METHOD
    )
    plain: bool = flag(False, "no chat format: user<|perception|>assistant<|eot_id|>", METHOD)
    train_all: bool = flag(
        False, "every token is a label; with --plain the chat is the user text alone", METHOD, "--trainall"
    )

    batch_size: int = flag(4, "examples a micro-batch, per device", BATCH)
    grad_accum: int = flag(4, "micro-batches an optimiser step", BATCH)
    layout: Literal["packed", "separate", "additive"] | None = flag(
        None, "how segments share rows; never changes the numbers; default packed", BATCH
    )
    additive_mask: bool = flag(False, "the same as --layout additive", BATCH)
    tokens_per_row: int = flag(
        0, "packed: tokens a row; 0: 256 on a CPU, 4096 on a GPU, with flash attention one row", BATCH
    )
    dataloader_num_workers: int = flag(0, "processes that lay out batches", BATCH)

    learning_rate: float = flag(2e-5, "peak learning rate", OPTIM)
    num_epochs: float = flag(4.0, "passes over the training rows", OPTIM)
    max_steps: int = flag(-1, "optimiser steps, instead of --num_epochs", OPTIM)
    weight_decay: float = flag(0.0, "AdamW's weight decay", OPTIM)
    warmup_steps: float = flag(0.0, "linear warm-up in steps; below 1 a share of all steps", OPTIM)
    lr_scheduler_type: str = flag("linear", "schedule of transformers (linear, cosine, constant …)", OPTIM)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: not at all", OPTIM)
    optim: str = flag("adamw_torch", "optimiser of transformers", OPTIM)
    adam_beta2: float = flag(0.999, "AdamW's second beta", OPTIM)
    finetune_seed: int = flag(42, "seed of weights, data order and loss dropout", OPTIM)
    same_flop: bool = flag(False, "as many steps as spend what regular fine-tuning spends in --num_epochs", OPTIM)

    output_dir: str | None = flag(None, "run folder; default runs/<dataset>-<model>-<method>-…", RUN)
    resume: bool = flag(False, "go on from the last whole checkpoint of the run folder", RUN)
    overwrite: bool = flag(False, "replace an existing run folder", RUN)
    dry_run: int = flag(0, "score the first N rows as one micro-batch, print one JSON object, write nothing", RUN)
    eval_strategy: Literal["epoch", "steps", "no"] | None = flag(
        None, "when held-out rows are scored; default epoch where there are any", RUN
    )
    eval_steps: int = flag(500, "steps between evaluations with --eval_strategy steps", RUN)
    eval_generate: int = flag(0, "also generate for N held-out rows and log exact match", RUN)
    save_strategy: Literal["epoch", "steps", "no"] = flag("epoch", "when checkpoints are saved", RUN)
    save_steps: int = flag(500, "steps between checkpoints with --save_strategy steps", RUN)
    save_total_limit: int = flag(1, "whole checkpoints kept", RUN)
    logging_steps: int = flag(1, "steps a line of metrics.jsonl", RUN)
    report_to: str = flag("none", "none, tensorboard, wandb, trackio, or several with commas", RUN)
    track_flop: bool = flag(False, "count floating-point operations into metrics.jsonl (slower)", RUN)

    @property
    def fields(self) -> Fields | None:
        """Where the rows have their views, None for rows in the project's own format."""
        return Fields(self.text_field, self.code_field, self.system) if self.text_field else None

    @property
    def jepa(self) -> bool:
        """Whether any example gets the JEPA term."""
        return not self.regular and self.lbd > 0 and self.jepa_ratio > 0

    @property
    def distance(self) -> str:
        """Name of the distance between the views, a key of DISTANCES."""
        return next((n for n in ("jepa_l2", "jepa_mse", "infonce") if getattr(self, n)), "cosine")


class Refusals(list):
    """Messages about wrong or inapplicable flags, collected so that all are said at once."""

    def __init__(self, given: set[str]):
        self.given = given

    def refuse(self, condition: bool, message: str) -> None:
        """Adds the message where the condition holds."""
        if condition:
            self.append(message)

    def only_if(self, applies: bool, names: str, reason: str) -> None:
        """Refuses those of the named flags that were given, unless they apply."""
        unused = [f"--{n}" for n in names.split() if n in self.given]
        self.refuse(bool(unused) and not applies, f"{', '.join(unused)}: {reason}")


def check_data(s: Settings, r: Refusals) -> None:
    """Which rows are trained on and which held out."""
    sources = (s.data_file, s.eval_file, s.val_fraction)
    held_out = any(sources)
    r.refuse(not s.model_name, "--model_name is missing")
    r.refuse(bool(s.train_file) == bool(s.data_file), "give one of --train_file and --data_file")
    r.refuse(sum(map(bool, sources)) > 1, "give at most one of --data_file, --eval_file and --val_fraction")
    r.refuse(bool(s.text_field) != bool(s.code_field), "give --text_field and --code_field together")
    r.only_if(bool(s.text_field), "system", "only with --text_field and --code_field")
    r.only_if(bool(s.data_file), "eval_split", "only with --data_file")
    r.only_if(bool(s.data_file or s.val_fraction), "split_seed", "only with --data_file or --val_fraction")
    r.only_if(held_out, "eval_strategy eval_steps eval_generate", "there are no held-out rows")
    r.only_if(s.eval_strategy == "steps", "eval_steps", "only with --eval_strategy steps")
    r.only_if(s.eval_strategy != "no", "eval_generate", "not with --eval_strategy no")
    r.refuse(not 0 < s.eval_split < 1, f"--eval_split {s.eval_split} is not between 0 and 1")
    r.refuse(not 0 <= s.val_fraction < 1, f"--val_fraction {s.val_fraction} is not in 0 to 1")


def check_method(s: Settings, r: Refusals) -> None:
    """The loss, the views and their layout."""
    views = (
        "lbd predictors last_token jepa_l2 jepa_mse infonce front_pred reverse_pred text_view jepa_ratio additive_mask "
        "same_flop"
    )
    r.only_if(not s.regular, views, "not with --regular, which has no views")
    r.refuse(s.regular and s.layout == "additive", "--layout additive: not with --regular, which has no views")
    r.only_if(s.predictors > 0, "front_pred reverse_pred", "only with --predictors")
    r.refuse(s.front_pred and s.reverse_pred, "give one of --front_pred and --reverse_pred")
    r.refuse(s.jepa_l2 + s.jepa_mse + s.infonce > 1, "give one of --jepa_l2, --jepa_mse and --infonce")
    r.refuse(s.infonce and s.batch_size == 1, "--infonce: not with --batch_size 1, which leaves nothing to contrast")
    r.refuse(not 0 <= s.predictors <= 10, f"--predictors {s.predictors} is not in 0 to 10")
    r.refuse(s.last_token is not None and s.last_token >= 0, f"--last_token {s.last_token} is not negative")
    r.refuse(not 0 <= s.jepa_ratio <= 1, f"--jepa_ratio {s.jepa_ratio} is not in 0 to 1")
    partial = s.lm_labels in ("answer", "answer_text")
    r.refuse(s.train_all and partial, f"--lm_labels {s.lm_labels}: not with --train_all")
    r.refuse(s.additive_mask and s.layout not in (None, "additive"), f"--additive_mask: not with --layout {s.layout}")
    r.only_if(layout_of(s) == "packed", "tokens_per_row", "only with --layout packed")
    r.only_if(not is_flash(s), "tokens_per_row", "flash attention packs each micro-batch into one row")
    dense = s.attn_implementation in (None, "sdpa", "eager")
    additive = layout_of(s) == "additive"
    r.refuse(additive and not dense, f"--attn_implementation {s.attn_implementation}: not with --layout additive")
    if s.text_view == "in_chat":
        r.only_if(False, "front_pred reverse_pred last_token", "not with --text_view in_chat")
        r.refuse(s.plain and s.train_all, "--text_view in_chat: not with --plain --train_all, whose chat has no answer")
        kernel = f"--attn_implementation {s.attn_implementation}: not with --predictors and --text_view in_chat"
        r.refuse(s.predictors > 0 and not dense, f"{kernel}, whose predictor tokens need a mask of their own")


def check_training(s: Settings, r: Refusals) -> None:
    """The model, the optimiser and the run."""
    r.only_if(s.lora, "lora_rank merge", "only with --lora")
    r.refuse(s.lora and s.pretrain, "--lora: not with --pretrain, whose random base would not be saved")
    r.refuse(s.dtype == "float16" and not torch.cuda.is_available(), "--dtype float16 needs a GPU")
    r.refuse(s.track_flop and s.torch_compile, "--track_flop: not with --torch_compile")
    r.only_if(s.save_strategy == "steps", "save_steps", "only with --save_strategy steps")
    r.only_if(not r.given & {"num_epochs", "same_flop"}, "max_steps", "not together with --num_epochs or --same_flop")
    r.refuse(s.resume and s.overwrite, "give one of --resume and --overwrite")
    r.refuse("dry_run" in r.given and s.dry_run == 0, "--dry_run 0 would score nothing; leave it out to train")
    r.only_if(not s.dry_run, "resume overwrite output_dir", "not with --dry_run, which writes nothing")
    try:
        get_scheduler(s.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), 0, 1)
    except (ValueError, TypeError) as error:
        r.append(f"--lr_scheduler_type {s.lr_scheduler_type} cannot be used ({first_line(error)})")
    r.refuse(s.optim not in list(OptimizerNames), f"--optim {s.optim} is not known")
    for tracker in s.report_to.split(","):
        known = tracker in ("none", "tensorboard", "wandb", "trackio")
        r.refuse(not known, f"--report_to {tracker} is not known")
        missing = known and tracker != "none" and importlib.util.find_spec(tracker) is None
        r.refuse(missing, f"--report_to {tracker}: install the package {tracker} first")


POSITIVE = ("batch_size grad_accum lora_rank max_length save_steps eval_steps logging_steps save_total_limit "
            "learning_rate num_epochs").split()  # fmt: skip
NOT_NEGATIVE = ("lbd gamma finetune_seed split_seed eval_generate dry_run tokens_per_row max_grad_norm warmup_steps "
                "weight_decay dataloader_num_workers").split()  # fmt: skip


def check_settings(s: Settings, given: set[str]) -> Settings:
    """Resolves defaults that depend on other flags. Raises UsageError naming all that is wrong or inapplicable."""
    r = Refusals(given)
    check_data(s, r)
    check_method(s, r)
    check_training(s, r)
    r.refuse(s.max_steps != -1 and s.max_steps < 1, f"--max_steps {s.max_steps} is not positive")
    r.refuse(not 0 <= s.adam_beta2 < 1, f"--adam_beta2 {s.adam_beta2} is not in 0 to 1")
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(s, name)
        r.refuse(name in POSITIVE and not value > 0, f"--{name} {value} is not positive")
        r.refuse(name in NOT_NEGATIVE and not value >= 0, f"--{name} {value} is negative")
        r.refuse(math.isinf(value), f"--{name} is not finite")
    if r:
        raise UsageError("\n".join(r))
    resolved = dataclasses.replace(
        s,
        layout=layout_of(s),
        additive_mask=layout_of(s) == "additive",
        lm_labels=s.lm_labels or ("all" if s.train_all else "answer"),
        eval_strategy=s.eval_strategy or ("epoch" if s.data_file or s.eval_file or s.val_fraction else "no"),
    )
    return dataclasses.replace(resolved, output_dir=s.output_dir or default_output_dir(resolved))


def layout_of(s: Settings) -> str:
    """The layout the flags ask for, packed where they ask for none."""
    return s.layout or ("additive" if s.additive_mask else "packed")


def is_flash(s: Settings) -> bool:
    """Whether attention runs in a flash kernel, which knows packed segments in a batch of one row alone."""
    return "flash" in (s.attn_implementation or "")


def default_output_dir(s: Settings) -> str:
    """runs/<dataset>-<model>-<method>-lr…-lbd…-k…-s…, and a mark of every other setting that is not the default."""
    dataset = dataset_name(s.train_file or s.data_file)
    method = "regular" if s.regular else f"jepa-lbd{s.lbd:g}-k{s.predictors}"
    named = {"train_file", "model_name", "regular", "lbd", "predictors", "learning_rate", "finetune_seed"}
    usual = {f.name: f.default for f in dataclasses.fields(s)} | {
        "layout": "packed",
        "lm_labels": "answer",
        "eval_strategy": "no",
    }
    others = {k: v for k, v in dataclasses.asdict(s).items() if k not in named | VOLATILE and v != usual[k]}
    mark = "-x" + hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:8] if others else ""
    return f"runs/{dataset}-{Path(s.model_name).name}-{method}-lr{s.learning_rate:g}{mark}-s{s.finetune_seed}"


# ------------------------------------------------------------------------------------------------------- segments


@dataclass(frozen=True)
class Segment:
    """A chat or a view as tokens. `ids` and `labels` are (T,); `view` is where the view is read.

    A chat has no view, or with --text_view in_chat the Text view. Its predictor tokens then stand at the chat's end
    (the last `branch` tokens) but branch off behind its first `stem` tokens: they have the positions that follow those,
    see nothing else of the chat, and nothing else sees them.
    """

    kind: Literal["chat", "text_view", "code_view"]
    ids: np.ndarray
    labels: np.ndarray
    view: int | None = None
    stem: int = 0
    branch: int = 0

    @property
    def positions(self) -> np.ndarray:
        """Position ids (T,)."""
        trunk = np.arange(len(self.ids) - self.branch)
        return np.concatenate([trunk, self.stem + np.arange(self.branch)])

    @property
    def without_view(self) -> Segment:
        """The chat as regular fine-tuning has it."""
        end = len(self.ids) - self.branch
        return Segment(self.kind, self.ids[:end], self.labels[:end])

    @property
    def text_view(self) -> Segment:
        """The Text view of a chat with one, as a segment of its own: what the view sees and no more."""
        end = len(self.ids) - self.branch
        ids = np.concatenate([self.ids[: self.stem], self.ids[end:]])
        return Segment("text_view", ids, np.zeros(len(ids), dtype=bool), len(ids) - 1)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (T,) and character offsets (T, 2) of texts that already hold their special tokens."""
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return [
        (np.asarray(i, dtype=np.int64), np.asarray(o, dtype=np.int64).reshape(-1, 2))
        for i, o in zip(out["input_ids"], out["offset_mapping"], strict=True)
    ]


def content_tokens(offsets: np.ndarray, r: Rendered) -> tuple[int, int]:
    """[first, stop): the tokens of a rendered text's content, by offsets (T, 2).

    Byte-level tokenizers trim white space off their offsets, so a token of spaces has no width; it belongs to what
    stands before it. Raises ValueError where a token holds both content and the template's own text.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside, behind = ends > r.start, (starts >= r.end) & (ends > starts)
    first = int(inside.argmax()) if inside.any() else len(starts)
    stop = int(behind.argmax()) if behind.any() else len(starts)
    if first >= stop:
        raise ValueError("no token of the content can be located")
    if r.text[starts[first] : r.start].strip() or r.text[r.end : max(ends[first:stop])].strip():
        raise ValueError("a token joins the content with the chat template's text, so it cannot be located")
    return first, stop


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens."""
    return set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def label_tokens(tokenizer: Any, scope: str, ids: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Which tokens (T,) are labels: --lm_labels. Raises ValueError where no special token ends the answer."""
    labels = np.zeros(len(ids), dtype=bool)
    if scope == "all":
        return ~labels
    if scope == "reference":
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return ids != pad
    if scope == "answer":
        special = special_ids(tokenizer)
        ends = [t for t in range(stop, len(ids)) if int(ids[t]) in special]
        if not ends:
            raise ValueError(
                "the chat template ends the answer without a special token, so a model could not learn to stop; "
                "mend the template or give --lm_labels answer_text"
            )
        stop = ends[0] + 1
    labels[first:stop] = True
    return labels


def encode_chats(renderer: Renderer, examples: list[Example]) -> list[Segment | ValueError]:
    """The chat segment of each example, or why there is none."""
    return _encode(renderer, "chat", [_try(renderer.chat, e) for e in examples])


def encode_views(renderer: Renderer, examples: list[Example]) -> list[tuple[Segment | ValueError, ...]]:
    """The two view segments of each example, or why there are none."""
    views = [_try(renderer.views, e) for e in examples]
    first, second = ([v if isinstance(v, ValueError) else v[i] for v in views] for i in (0, 1))
    return list(zip(_encode(renderer, "text_view", first), _encode(renderer, "code_view", second), strict=True))


def _try(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        return error
    except TemplateError as error:
        return ValueError(f"the chat template refuses the example ({error})")


def _encode(renderer: Renderer, kind: str, texts: list[Rendered | ValueError]) -> list[Segment | ValueError]:
    s, tokenizer = renderer.s, renderer.tokenizer
    tokens = iter(_tokenize(tokenizer, [r.text for r in texts if isinstance(r, Rendered)] or [""]))

    def segment(rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> Segment:
        if len(ids) > s.max_length:
            raise ValueError(f"the {kind.replace('_', ' ')} has {len(ids)} tokens, over --max_length {s.max_length}")
        first, stop = content_tokens(offsets, rendered)
        if kind == "chat":
            labels = label_tokens(tokenizer, s.lm_labels, ids, first, stop)
            if rendered.user is None:
                return Segment("chat", ids, labels)
            _, stem = content_tokens(offsets, Rendered(rendered.text, *rendered.user))
            branch = tokenizer.convert_tokens_to_ids([predictor_token(i) for i in range(s.predictors, 0, -1)])
            ids = np.concatenate([ids, np.asarray(branch, dtype=np.int64)])
            labels = np.concatenate([labels, np.zeros(len(branch), dtype=bool)])
            return Segment("chat", ids, labels, len(ids) - 1 if branch else stem - 1, stem, len(branch))
        view = stop - 1 if s.last_token is None else len(ids) + s.last_token
        if view < 0:
            raise ValueError(f"the {kind.replace('_', ' ')} has {len(ids)} tokens, no --last_token {s.last_token}")
        return Segment(kind, ids, np.zeros(len(ids), dtype=bool), view)

    return [r if isinstance(r, ValueError) else _try(segment, r, *next(tokens)) for r in texts]


def end_of_turn(renderer: Renderer) -> int | None:
    """Id of the special token that ends the assistant turn, None where the template has none."""
    s = dataclasses.replace(renderer.s, train_all=False, lm_labels="answer", text_view="alone")
    segment = encode_chats(Renderer(renderer.tokenizer, s), [Example(None, "a", "b", "the chat template", 0)])[0]
    return None if isinstance(segment, ValueError) else int(segment.ids[segment.labels][-1])


def without_views(item: tuple[Segment, ...]) -> tuple[Segment]:
    """What regular fine-tuning has of an example."""
    return (item[0].without_view,)


class SegmentDataset(torch.utils.data.Dataset):
    """Examples as tuples of segments: (chat,), (chat, text view, code view), or in_chat (chat with view, code view).

    Items are asked for by (epoch, index); index −1 is an empty item that fills up the last batch. With `dropout` the
    items of --jepa_ratio's share alone have views.
    """

    def __init__(self, examples: list[Example], renderer: Renderer, problems: Problems, dropout: bool = False):
        """Raises ExampleError for an example that cannot be used, unless `problems` skips those."""
        self.s, self.items, self.examples = renderer.s, [], []
        self.ratio = self.s.jepa_ratio if dropout else 1.0
        for begin in range(0, len(examples), 1000):
            part = examples[begin : begin + 1000]
            chats = encode_chats(renderer, part)
            views = encode_views(renderer, part) if self.s.jepa else [()] * len(part)
            if self.s.text_view == "in_chat":
                views = [pair[1:] for pair in views]
            for example, chat, pair in zip(part, chats, views, strict=True):
                bad = next((x for x in (chat, *pair) if isinstance(x, ValueError)), None)
                if bad is None and self.s.text_view == "in_chat" and example.text is not None:
                    bad = ValueError("its Text view is no part of the chat, which --text_view in_chat needs")
                if bad is not None:
                    problems.add(example.source, str(bad))
                    continue
                self.items.append((chat, *pair) if pair else (chat.without_view,))
                self.examples.append(example)
        if not self.items:
            raise ExampleError("no usable example is left: " + "; ".join(problems.messages[:3]))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Segment, ...]:
        epoch, index = key
        if index < 0:
            return ()
        # Random JEPA-loss dropout (paper section 3.3): decided by seed, epoch and row, so that layouts, batch sizes
        # and ranks agree on it and a dropped pair is never encoded.
        draw = np.random.default_rng([self.s.finetune_seed, epoch, index]) if self.ratio < 1 else None
        item = self.items[index]
        return without_views(item) if draw is not None and draw.random() >= self.ratio else item


class EpochSampler(torch.utils.data.Sampler):
    """(epoch, index) pairs in an order decided by seed and epoch, filled up with index −1 to whole batches.

    Filling up instead of repeating rows keeps every rank in step without counting an example twice.
    """

    def __init__(self, size: int, multiple: int, seed: int, shuffle: bool):
        self.size, self.multiple, self.seed, self.shuffle, self.epoch = size, multiple, seed, shuffle, 0

    def __len__(self) -> int:
        return math.ceil(self.size / self.multiple) * self.multiple

    def __iter__(self):
        order = (
            np.random.default_rng([self.seed, self.epoch]).permutation(self.size) if self.shuffle else range(self.size)
        )
        yield from ((self.epoch, int(i)) for i in order)
        yield from [(self.epoch, -1)] * (len(self) - self.size)


# -------------------------------------------------------------------------------------------------------- layouts
# Letters: B examples, R rows, T tokens in a row, D hidden size, V vocabulary, N label tokens, P pairs.

Row = list[Segment]


def separate_rows(items: list[tuple[Segment, ...]], tokens_per_row: int) -> list[Row]:
    """Every segment in a row of its own."""
    return [[segment] for item in items for segment in item]


def additive_rows(items: list[tuple[Segment, ...]], tokens_per_row: int) -> list[Row]:
    """The chat in a row of its own, the views of an example sharing another."""
    return [list(row) for item in items for row in (item[:1], item[1:]) if row]


def packed_rows(items: list[tuple[Segment, ...]], tokens_per_row: int) -> list[Row]:
    """All segments in few rows of `tokens_per_row` tokens (first fit, longest first); a longer one stands alone."""
    rows: list[Row] = []
    room: list[int] = []
    for segment in sorted((s for item in items for s in item), key=lambda s: -len(s.ids)):
        r = next((r for r, free in enumerate(room) if free >= len(segment.ids)), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(tokens_per_row)
        rows[r].append(segment)
        room[r] -= len(segment.ids)
    return rows


LAYOUTS = {"separate": separate_rows, "additive": additive_rows, "packed": packed_rows}


@dataclass
class Collator:
    """Lays out the segments of a micro-batch in rows.

    Returns `input_ids`, `position_ids` (R, T) restarting at 0 for each segment; `attention_mask`: None when packed
    (transformers then builds the block-diagonal mask from the positions), (R, T) when separate, (R, 1, T, T) additive
    and wherever predictor tokens branch off a chat;
    `label_at` (2, N) row and column whose hidden state predicts `label_ids` (N,); `view_at` (2, 2, P) row and column of
    the first and the second view; `tokens` (4,) counts of chat, text view, code view and padding.
    """

    layout: str
    pad_id: int
    tokens_per_row: int

    def __call__(self, items: list[tuple[Segment, ...]]) -> dict[str, torch.Tensor | None]:
        rows = LAYOUTS[self.layout](items, self.tokens_per_row) or [[]]
        width = max(1, max(sum(len(s.ids) for s in row) for row in rows))
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)  # (R, T)
        positions = np.zeros((len(rows), width), dtype=np.int64)  # (R, T)
        owner = np.full((len(rows), width), -1, dtype=np.int64)  # (R, T), number of the segment in its row
        place = {}
        for r, row in enumerate(rows):
            begin = 0
            for number, segment in enumerate(row):
                end = begin + len(segment.ids)
                ids[r, begin:end], owner[r, begin:end] = segment.ids, number
                positions[r, begin:end] = segment.positions
                place[id(segment)] = (r, begin)
                begin = end
            positions[r, begin:] = np.arange(width - begin)  # padding is a segment of its own

        label_at, label_ids, view_at = [], [], ([], [])
        counts = dict.fromkeys(("chat", "text_view", "code_view"), 0)
        for item in items:
            for segment in item:
                r, begin = place[id(segment)]
                counts[segment.kind] += len(segment.ids) - segment.branch
                counts["text_view"] += segment.branch
                if segment.view is not None:
                    view_at[segment.kind == "code_view"].append((r, begin + segment.view))
                targets = np.flatnonzero(segment.labels[1:]) + 1  # the first token has no predecessor to predict it
                label_at += [(r, begin + t - 1) for t in targets]
                label_ids += segment.ids[targets].tolist()
        padding = ids.size - sum(counts.values())
        branched = [(*place[id(segment)], segment) for item in items for segment in item if segment.branch]
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": self._mask(torch.from_numpy(owner), branched),
            "label_at": torch.tensor(label_at, dtype=torch.long).reshape(-1, 2).T,  # (2, N)
            "label_ids": torch.tensor(label_ids, dtype=torch.long),  # (N,)
            "view_at": torch.tensor(view_at, dtype=torch.long).reshape(2, -1, 2).movedim(2, 0),  # (2, 2, P)
            "tokens": torch.tensor([*counts.values(), padding]),
        }

    def _mask(self, owner: torch.Tensor, branched: list[tuple[int, int, Segment]]) -> torch.Tensor | None:
        """`owner`: each token's segment (R, T); `branched`: row, first column and segment of each with a branch."""
        if self.layout == "packed" and not branched:
            return None
        if self.layout == "separate" and not branched:
            return (owner >= 0).long()  # (R, T)
        causal = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
        allowed = (owner[:, :, None] == owner[:, None, :]) & causal  # (R, T, T)
        for r, begin, segment in branched:
            end = begin + len(segment.ids)
            allowed[r, end - segment.branch : end, begin + segment.stem : end - segment.branch] = False
        return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]  # (R, 1, T, T)


# --------------------------------------------------------------------------------------------------------- losses


def lm_loss(logits: torch.Tensor, label_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum, count) of the next-token cross-entropy in nats: logits (N, V) at the labels, label_ids (N,)."""
    return F.cross_entropy(logits.float(), label_ids, reduction="sum"), len(label_ids)


def _infonce(text: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    logits = F.normalize(text, dim=-1) @ F.normalize(code, dim=-1).T / 0.07  # (P, P)
    return F.cross_entropy(logits, torch.arange(len(text), device=text.device), reduction="none")


# d(text, code) of each pair, (P, D) and (P, D) → (P,): the paper's section 3.1 and its ablations.
DISTANCES = {
    "cosine": lambda text, code: 1 - F.cosine_similarity(text, code, dim=-1),
    "jepa_l2": lambda text, code: torch.linalg.vector_norm(text - code, dim=-1),
    "jepa_mse": lambda text, code: (text - code).square().mean(dim=-1),
    "infonce": _infonce,
}


def jepa_loss(text: torch.Tensor, code: torch.Tensor, distance: str = "cosine") -> tuple[torch.Tensor, int]:
    """(sum, count) over pairs of the distance between the views' embeddings (P, D); gradients flow into both.

    No pairs give a zero that still carries a gradient graph. `infonce` contrasts the pairs of one micro-batch, so it
    alone depends on the micro-batch's size.
    """
    return DISTANCES[distance](text.float(), code.float()).sum(), len(text)


@torch.no_grad()
def view_statistics(text: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the pairs' cosines, spread × P) of the views' embeddings (P, D).

    Spread is 1 − the mean cosine between different examples' views of one kind, averaged over the two kinds: 0 where
    all embeddings have collapsed into one direction, near 1 where they point everywhere. It needs P > 1.
    """
    text, code = F.normalize(text.float(), dim=-1), F.normalize(code.float(), dim=-1)
    p = len(text)
    between = [(u.sum(dim=0).square().sum() - p) / max(1, p * (p - 1)) for u in (text, code)]
    return (text * code).sum(), (1 - (between[0] + between[1]) / 2) * p


class HeadInput:
    """Hands the output layer only what is needed, so that logits exist at labels alone.

    A forward pre-hook on the model's output layer: everything before it runs as in any forward of the (wrapped) model.
    Outside of `read` it does nothing, so generation works as ever.
    """

    def __init__(self, model: torch.nn.Module):
        self.batch: dict[str, torch.Tensor] | None = None
        self.views: torch.Tensor | None = None
        self.accepts_positions = "position_ids" in inspect.signature(_forward_of(model)).parameters
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._pick)

    def close(self) -> None:
        """Takes the hook off the model."""
        self._hook.remove()

    def _pick(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        if self.batch is None:
            return None
        hidden, (label_at, view_at) = args[0], (self.batch["label_at"], self.batch["view_at"])  # (R, T, D)
        self.views = hidden[view_at[0], view_at[1]]  # (2, P, D)
        return (hidden[label_at[0], label_at[1]][None], *args[1:])  # (1, N, D)

    def read(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the labels (N, V) and hidden states at the views (2, P, D), by one forward pass of `model`.

        use_cache=False and, when packed, attention_mask=None: otherwise packed segments would see each other.
        """
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if self.accepts_positions:
            inputs["position_ids"] = batch["position_ids"]
        self.batch = batch
        try:
            logits = model(**inputs).logits[0]  # (N, V)
            return logits, self.views
        finally:
            self.batch = self.views = None


def _forward_of(model: torch.nn.Module) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward


@torch.no_grad()
def check_layout(model: torch.nn.Module, head: HeadInput, items: list[tuple[Segment, ...]], collator: Collator) -> None:
    """Encodes a few examples in shared rows. Raises UsageError where a segment's outputs depend on its neighbours.

    The first segment of the row gets other tokens: nothing may change at the views and labels of the others, whatever
    the precision, since the shapes are the same. Compared with rows of their own they may differ by rounding alone.
    Models whose layers carry state along the row (Mamba, linear attention, convolutions) fail.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    branches, longest = (max(f(x) for item in items for x in item) for f in (lambda x: x.branch, lambda x: len(x.ids)))
    if (collator.layout == "additive" or branches) and window and longest > window:
        asked = "--text_view in_chat with --predictors" if branches else "--layout additive"
        raise UsageError(f"{asked}: its mask would hide the model's sliding window of {window} tokens")
    device, training = next(model.parameters()).device, model.training
    flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
    precision = torch.autocast(device.type, torch.bfloat16, enabled=flash)  # flash kernels know half precision alone
    model.eval()

    def read(items: list[tuple[Segment, ...]], layout: str) -> list[torch.Tensor]:
        batch = dataclasses.replace(collator, layout=layout, tokens_per_row=sys.maxsize)(items)
        with precision:
            logits, views = head.read(model, on_device(batch, device))
        return [logits.float(), *views.float()]  # (N, V), (P, D), (P, D)

    def differ(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        pairs = [(a, b) for a, b in zip(some, others, strict=True) if a.numel()]
        return max(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-6)).max().item() for a, b in pairs)

    shared, apart = read(items, collator.layout), read(items, "separate")
    row = max(LAYOUTS[collator.layout](items, sys.maxsize), key=len)
    other = dataclasses.replace(row[0], ids=(row[0].ids + 1) % model.config.get_text_config().vocab_size)
    changed = read([tuple(other if x is row[0] else x for x in item) for item in items], collator.layout)
    owner = next(i for i, item in enumerate(items) if any(x is row[0] for x in item))
    first = sum(int(item[0].labels[1:].sum()) for item in items[:owner])
    mine = torch.arange(first, first + int(items[owner][0].labels[1:].sum()), device=device)
    keep = [torch.ones(len(x), dtype=torch.bool, device=device) for x in shared]
    keep[0][mine] = row[0].kind != "chat"
    for k, kind in ((1, "text_view"), (2, "code_view")):
        if row[0].view is not None and kind == ("text_view" if row[0].kind == "chat" else row[0].kind):
            keep[k][owner] = False
    leak = differ([a[m] for a, m in zip(changed, keep, strict=True)], [b[m] for b, m in zip(shared, keep, strict=True)])
    model.train(training)
    # A leak-free model agrees but for a kernel's own disorder; apart the shapes differ, so rounding does too.
    if not leak < (1e-2 if flash else 1e-6) or not differ(shared, apart) < (0.1 if flash else 1e-3):
        raise UsageError(
            f"{type(model).__name__} cannot be laid out as {collator.layout}: segments that share a row change one "
            f"another (by {max(leak, differ(shared, apart)):.2g}); give --layout separate"
        )


def on_device(batch: dict[str, torch.Tensor | None], device: torch.device) -> dict[str, torch.Tensor | None]:
    """A batch of the collator, moved."""
    return {name: value if value is None else value.to(device) for name, value in batch.items()}


# -------------------------------------------------------------------------------------------------------- trainer

STATISTICS = ("lm_sum", "labels", "jepa_sum", "pairs", "cosine_sum", "spread_sum", "spread_pairs",
              "chat", "text_view", "code_view", "padding")  # fmt: skip


class JepaTrainer(Trainer):
    """transformers' Trainer with the LLM-JEPA loss, normalised over the whole optimiser step and all ranks."""

    def __init__(self, *args: Any, settings: Settings, head: HeadInput, generate: Any = None, **kwargs: Any):
        """`generate`: a function of the model that returns metrics from generation, called at each evaluation."""
        super().__init__(*args, **kwargs)
        self.s, self.head, self.generate = settings, head, generate
        # Tells the Trainer that the loss is already scaled for gradient accumulation.
        self.model_accepts_loss_kwargs = True
        self.sampler: EpochSampler | None = None
        self.statistics = torch.zeros(len(STATISTICS), dtype=torch.float64, device=self.args.device)
        self.seen_tokens = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self._step_loss = torch.zeros((), device=self.args.device)
        self._flops, self._since = 0.0, time.time()

    # -- data

    def _sampler_of(self, dataset: SegmentDataset, batch_size: int, shuffle: bool) -> EpochSampler:
        return EpochSampler(len(dataset), batch_size * self.args.world_size, self.s.finetune_seed, shuffle)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        self.sampler = self._sampler_of(self.train_dataset, self.args.train_batch_size, shuffle=True)
        return self.sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> EpochSampler:
        return self._sampler_of(eval_dataset, self.args.eval_batch_size, shuffle=False)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, torch.Tensor]:
        """The step's micro-batches and the label tokens and pairs (2,) in all of them, over all ranks."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counts = [(len(b["label_ids"]), b["view_at"].shape[-1]) for b in batches]
        counts = torch.tensor([*counts, (0, 0)], dtype=torch.float64).sum(dim=0).to(device)
        tokens = sum((b["tokens"][:3].sum() for b in batches), counts.new_zeros(()))
        counts = self.accelerator.reduce(torch.stack([*counts, tokens]), "sum")
        self.seen_tokens += counts[2]
        return batches, counts[:2].clamp(min=1).float()

    # -- loss

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This micro-batch's share of gamma · L_LM + lbd · L_JEPA over the step; `num_items_in_batch` (2,) as above."""
        logits, (text, code) = self.head.read(model, inputs)
        lm_sum, labels = lm_loss(logits, inputs["label_ids"])
        loss = self.s.gamma * lm_sum / num_items_in_batch[0]
        zero = lm_sum.new_zeros(())
        jepa_sum, pairs, cosine, spread = zero, 0, zero, zero
        if self.s.jepa:
            jepa_sum, pairs = jepa_loss(text, code, self.s.distance)
            loss = loss + self.s.lbd * jepa_sum / num_items_in_batch[1]
            cosine, spread = view_statistics(text, code)
        spread, spread_pairs = (spread, pairs) if pairs > 1 else (zero, 0)
        values = [lm_sum.detach(), labels, jepa_sum.detach(), pairs, cosine, spread, spread_pairs, *inputs["tokens"]]
        self.statistics += torch.stack([torch.as_tensor(v, dtype=torch.float64, device=loss.device) for v in values])
        self._step_loss = self._step_loss + loss.detach()
        return loss * self.args.world_size  # the ranks' gradients are averaged, the loss is a sum over ranks

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        """A micro-batch's forward and backward pass, with --track_flop under torch's counter."""
        if not self.s.track_flop:
            return super().training_step(model, inputs, num_items_in_batch)
        with FlopCounterMode(display=False) as counter:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._flops = float(counter.get_total_flops())
        return loss

    def floating_point_ops(self, inputs: dict) -> float:
        """What --track_flop counted in this micro-batch; the Trainer sums it over ranks and keeps it in checkpoints."""
        return self._flops

    def require_finite_loss(self) -> None:
        """Raises FloatingPointError before the weights are touched where the step's loss is not a number."""
        loss = self.accelerator.reduce(self._step_loss, "sum")
        self._step_loss = torch.zeros_like(self._step_loss)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}; training stopped"
            )

    # -- logs and checkpoints

    def _drain(self, statistics: torch.Tensor) -> dict[str, float]:
        total = dict(zip(STATISTICS, self.accelerator.reduce(statistics, "sum").tolist(), strict=True))
        statistics.zero_()
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the method's own figures to what the Trainer logs."""
        if "loss" in logs:
            t, now = self._drain(self.statistics), time.time()
            tokens = t["chat"] + t["text_view"] + t["code_view"]
            logs |= {
                "total": logs.pop("loss"),
                "lm_loss": t["lm_sum"] / max(1, t["labels"]),
                "tokens": int(tokens),
                "padding": int(t["padding"]),
                "label_tokens": int(t["labels"]),
                "tokens_per_second": round(tokens / max(1e-9, now - self._since), 1),
            }
            self._since = now
            if self.s.jepa:
                logs |= {"jepa_loss": t["jepa_sum"] / max(1, t["pairs"]), "pairs": int(t["pairs"])}
                logs |= {"cosine": t["cosine_sum"] / t["pairs"]} if t["pairs"] else {}
                logs |= {"spread": t["spread_sum"] / t["spread_pairs"]} if t["spread_pairs"] else {}
            if self.s.track_flop:
                logs["flops"] = self.state.total_flos
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Losses of the held-out rows, each normalised over all of them, and with --eval_generate exact match."""
        model, one = self.accelerator.unwrap_model(self.model), torch.ones(2, device=self.args.device)
        model.eval()
        during_training, self.statistics = self.statistics, torch.zeros_like(self.statistics)
        step_loss = self._step_loss
        for batch in dataloader:
            self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=one)
        t = self._drain(self.statistics)
        self.statistics, self._step_loss = during_training, step_loss
        lm, jepa = t["lm_sum"] / max(1, t["labels"]), t["jepa_sum"] / max(1, t["pairs"])
        metrics = {"loss": self.s.gamma * lm, "lm_loss": lm}
        if self.s.jepa:
            metrics |= {"loss": self.s.gamma * lm + self.s.lbd * jepa, "jepa_loss": jepa}
            metrics["cosine"] = t["cosine_sum"] / max(1, t["pairs"])
        if self.generate is not None:
            metrics |= self.generate(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._since = time.time()
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Older checkpoints go only when the new one is whole, so that a kill while saving leaves one to resume from.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.state.num_input_tokens_seen = int(self.seen_tokens)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
            rotate_checkpoints(self.args.output_dir, limit)


class Watch(TrainerCallback):
    """Drives the sampler's epoch, stops at a loss that is not finite, writes metrics.jsonl."""

    def __init__(self, run: Run, trainer: JepaTrainer):
        self.run, self.trainer, self.file = run, trainer, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops the lines of steps that a resumed run takes again."""
        self.trainer.seen_tokens.fill_(state.num_input_tokens_seen)
        if not state.is_world_process_zero:
            return
        path = self.run.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        write_text(path, "".join(kept))
        self.file = open(path, "a", encoding="utf-8")  # closed in on_train_end

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sampler.epoch = int(state.epoch or 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.require_finite_loss()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.file is not None:
            line = {"step": state.global_step} | {k: v for k, v in logs.items() if k != "total_flos"}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.run.update("running")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class Bar(ProgressCallback):
    """One progress bar, with the losses behind it instead of a line a step."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar while held-out rows are scored."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            shown = ("lm_loss", "jepa_loss", "cosine", "eval_lm_loss", "eval_exact")
            self.training_bar.set_postfix({k: f"{logs[k]:.4g}" for k in shown if k in logs}, refresh=False)


# ----------------------------------------------------------------------------------------------------------- main


def load_tokenizer(s: Settings, predictors: bool = True) -> Any:
    """The model's tokenizer with the special tokens the method needs. Raises UsageError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(s.model_name, revision=s.revision)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--model_name {s.model_name}: its tokenizer cannot be loaded ({first_line(error)})") from None
    if not tokenizer.is_fast:
        raise UsageError(f"--model_name {s.model_name}: its tokenizer gives no character offsets (not a fast one)")
    # Always all ten, in both arms: softmax over another vocabulary would be another loss.
    wanted = [predictor_token(i) for i in range(1, 11)] if predictors else []
    wanted += [PERCEPTION, END_OF_TURN] if s.plain else []
    missing = [t for t in wanted if t not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or END_OF_TURN
    return tokenizer


LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


def load_weights(name: str, **options: Any) -> Any:
    """A pretrained causal language model. Raises ValueError where weights are missing, one of LOADING_ERRORS else."""
    model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if loading["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"weights are missing ({', '.join(sorted(loading['missing_keys'])[:3])} …)")
    return model


def load_model(s: Settings, tokenizer: Any) -> Any:
    """The causal language model in float32, its embeddings as long as the tokenizer, with --lora an adapter on top.

    Raises UsageError where it cannot be loaded.
    """
    try:
        options = {"dtype": torch.float32}
        if s.attn_implementation:
            options["attn_implementation"] = s.attn_implementation
        if s.pretrain:
            config = AutoConfig.from_pretrained(s.model_name, revision=s.revision)
            model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = load_weights(s.model_name, revision=s.revision, **options)
    except LOADING_ERRORS as error:
        hint = "" if s.pretrain else " (without weights, give --pretrain)"
        raise UsageError(f"--model_name {s.model_name} cannot be loaded{hint}: {first_line(error)}") from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if model.config.get_text_config() is not model.config:
        # A multimodal model's other towers get no gradient here, and DDP would wait for it.
        text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in text)
    return add_adapter(model, s, tokenizer) if s.lora else model


def add_adapter(model: Any, s: Settings, tokenizer: Any) -> Any:
    """The model under a LoRA adapter on its text layers' projections; the added tokens' embedding rows train too."""
    from peft import LoraConfig, get_peft_model

    inside = {id(module) for module in model.get_decoder().modules()} - {id(model.get_output_embeddings())}
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and id(m) in inside]
    usual = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    # Some models join these (qkv_proj) or name them otherwise (c_attn): then all linear layers.
    if usual <= {name.rpartition(".")[2] for name in linear}:
        linear = [name for name in linear if name.rpartition(".")[2] in usual]
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings()).rpartition(".")[2]
    added = [predictor_token(i) for i in range(1, s.predictors + 1)] if s.jepa else []
    added += [PERCEPTION, END_OF_TURN] if s.plain else []
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=s.lora_rank,
        lora_alpha=2 * s.lora_rank,
        lora_dropout=0.1,
        target_modules=linear or "all-linear",
        # Without this the predictor tokens would stay at their random start.
        trainable_token_indices={embedding: tokenizer.convert_tokens_to_ids(added)} if added else None,
    )
    return get_peft_model(model, config, revision=s.revision)


def first_line(error: BaseException) -> str:
    """An error's message without what libraries append to it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_examples(s: Settings, problems: Problems) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples of the settings' files."""
    examples = read_examples(s.train_file or s.data_file, problems, s.fields)
    if s.data_file or s.val_fraction:
        return split_examples(examples, s.eval_split if s.data_file else s.val_fraction, s.split_seed)
    return examples, read_examples(s.eval_file, problems, s.fields) if s.eval_file else []


def first_row(renderer: Renderer, dataset: SegmentDataset) -> dict[str, str | None]:
    """The first example as the model sees it: texts, the label text, the tokens at which the views are read."""
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


def dry_run(s: Settings, parts: Parts) -> dict[str, Any]:
    """Scores the first rows as one micro-batch in float32, with gradient."""
    model, dataset = parts.model.eval(), parts.train_set
    batch = parts.collator([dataset[0, i] for i in range(len(dataset))])
    logits, (text, code) = parts.head.read(model, batch)
    lm_sum, labels = lm_loss(logits, batch["label_ids"])
    jepa_sum, pairs = jepa_loss(text, code, s.distance)
    lm, jepa = lm_sum / max(1, labels), jepa_sum / max(1, pairs)
    total = s.gamma * lm + s.lbd * jepa if s.jepa else s.gamma * lm
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "lm_loss": lm.item(),
        "jepa_loss": jepa.item() if s.jepa else None,
        "total_loss": total.item(),
        "grad_norm": torch.nn.utils.get_total_norm(gradients).item(),
        "label_tokens": labels,
        "pairs": pairs,
        "tokens": dict(zip(("chat", "text_view", "code_view", "padding"), batch["tokens"].tolist(), strict=True)),
        "first_row": first_row(parts.renderer, dataset),
    }


def flop_share(model: Any, head: HeadInput, dataset: SegmentDataset, collator: Collator, s: Settings) -> float:
    """FLOPs of a regular step over those of a step with --jepa_ratio, counted by torch on the first micro-batches."""
    spent = []
    for views in (False, True):
        with FlopCounterMode(display=False) as counter:
            for begin in range(0, min(len(dataset), 4 * s.batch_size), s.batch_size):
                items = dataset.items[begin : begin + s.batch_size]
                batch = on_device(collator([item if views else without_views(item) for item in items]), model.device)
                logits, (text, code) = head.read(model, batch)
                (lm_loss(logits, batch["label_ids"])[0] + jepa_loss(text, code, s.distance)[0]).backward()
        spent.append(counter.get_total_flops())
    model.zero_grad()
    regular, jepa = spent
    return regular / (regular + s.jepa_ratio * (jepa - regular))


def training_arguments(s: Settings, bf16: bool, steps: int, device: torch.device) -> TrainingArguments:
    """The Trainer's own settings."""
    names = {f.name for f in dataclasses.fields(TrainingArguments)}  # transformers 5.23 renamed this one
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=s.output_dir,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        gradient_accumulation_steps=s.grad_accum,
        learning_rate=s.learning_rate,
        num_train_epochs=s.num_epochs,
        max_steps=steps,
        weight_decay=s.weight_decay,
        warmup_steps=s.warmup_steps if s.warmup_steps < 1 else int(s.warmup_steps),
        lr_scheduler_type=s.lr_scheduler_type,
        max_grad_norm=s.max_grad_norm,
        optim=s.optim,
        adam_beta2=s.adam_beta2,
        seed=s.finetune_seed,
        use_cpu=device.type == "cpu",
        bf16=bf16,
        fp16=s.dtype == "float16",
        **{checkpointing: s.gradient_checkpointing},
        torch_compile=s.torch_compile,
        eval_strategy=s.eval_strategy,
        eval_steps=s.eval_steps,
        save_strategy=s.save_strategy,
        save_steps=s.save_steps,
        save_total_limit=s.save_total_limit,
        logging_steps=s.logging_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=False,
        log_level="error",
        report_to=s.report_to.split(","),
        run_name=Path(s.output_dir).name,
        remove_unused_columns=False,
        dataloader_num_workers=s.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        label_names=["label_ids"],
    )
    # Without torchrun one device: torch's DataParallel would tear packed rows apart.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def describe(s: Settings, parts: Parts) -> str:
    """The start block: what will be trained on what, and the first example as the model sees it."""
    weights = sum(p.numel() for p in parts.model.parameters())
    trainable = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    row = first_row(parts.renderer, parts.train_set)
    method = f"JEPA, λ {s.lbd:g}, γ {s.gamma:g}, k {s.predictors}, {s.distance}" if s.jepa else "regular"
    lines = [
        f"model    {s.model_name}, {weights / 1e6:.2f} M weights, {trainable / 1e6:.2f} M trained",
        f"method   {method}; labels: {s.lm_labels}; layout: {s.layout}",
        f"data     {len(parts.train_set)} examples, {len(parts.held_out or ())} held out",
        f"chat     {row['chat']!r}",
        f"labels   {row['label_text']!r}",
    ]
    if s.jepa:
        lines += [f"{k:9}{row[f'{k}_view']!r}, read at {row[f'{k}_view_token']!r}" for k in ("text", "code")]
    return "\n".join([*lines, f"run      {s.output_dir}"])


@dataclass
class Parts:
    """What a run is made of, all of it checked."""

    renderer: Renderer
    train_set: SegmentDataset
    held_out: SegmentDataset | None
    model: Any
    head: HeadInput
    collator: Collator
    problems: Problems


def prepare(s: Settings, device: torch.device) -> Parts:
    """Loads, checks and encodes everything. Raises UsageError and ExampleError; writes nothing."""
    problems, tokenizer = Problems(s.skip_bad_examples), load_tokenizer(s)
    renderer = Renderer(tokenizer, s)
    examples, held_out = load_examples(s, problems)
    train_set = SegmentDataset(examples[: s.dry_run or None], renderer, problems, dropout=True)
    set_seed(s.finetune_seed)
    model = load_model(s, tokenizer).to(device)
    # A dense mask is quadratic in the row, so short rows win on a CPU; flash kernels want one long row.
    tokens_per_row = s.tokens_per_row or (sys.maxsize if is_flash(s) else 4096 if device.type == "cuda" else 256)
    parts = Parts(
        renderer=renderer,
        train_set=train_set,
        held_out=SegmentDataset(held_out, renderer, problems) if held_out and not s.dry_run else None,
        model=model,
        head=HeadInput(model),
        collator=Collator(s.layout, tokenizer.pad_token_id, tokens_per_row),
        problems=problems,
    )
    if s.layout != "separate":
        check_layout(model, parts.head, train_set.items[:3], parts.collator)
    return parts


def build_trainer(s: Settings, parts: Parts, state: PartialState) -> JepaTrainer:
    """The Trainer of a run. Raises UsageError where its own settings do not fit together."""
    on_gpu, steps = state.device.type == "cuda", s.max_steps
    bf16 = s.dtype == "bfloat16" or (s.dtype == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    if s.same_flop and s.jepa:
        micro_batches = math.ceil(len(parts.train_set) / (s.batch_size * state.num_processes))
        with torch.autocast(state.device.type, torch.bfloat16, enabled=bf16):
            share = flop_share(parts.model, parts.head, parts.train_set, parts.collator, s)
        steps = max(1, round(math.ceil(micro_batches / s.grad_accum) * s.num_epochs * share))
    try:
        arguments = training_arguments(s, bf16, steps, state.device)
        Trainer.get_optimizer_cls_and_kwargs(arguments, parts.model)
        trainer = JepaTrainer(
            model=parts.model,
            args=arguments,
            train_dataset=parts.train_set,
            eval_dataset=parts.held_out,
            data_collator=parts.collator,
            processing_class=parts.renderer.tokenizer,
            settings=s,
            head=parts.head,
            generate=held_out_generation(s, parts, state) if s.eval_generate else None,
        )
    except (ValueError, ImportError, OverflowError) as error:
        raise UsageError(f"the Trainer refuses these settings: {first_line(error)}") from None
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    return trainer


def train(s: Settings, state: PartialState, run: Run) -> None:
    """A whole run: checks everything, starts the run folder, trains, saves."""
    if not s.dry_run:
        run.check(s.resume, s.overwrite)
    parts = prepare(s, torch.device("cpu") if s.dry_run else state.device)
    if s.dry_run:
        _say(parts.problems.report())
        print(json.dumps(dry_run(s, parts), ensure_ascii=False))
        return

    trainer = build_trainer(s, parts, state)
    trainer.add_callback(Watch(run, trainer))
    add_stop_token(parts.model.generation_config, end_of_turn(parts.renderer) if s.lm_labels != "answer_text" else None)
    files = [f for f in (s.train_file, s.data_file, s.eval_file) if f]
    record = {"seed": s.finetune_seed, "skipped_examples": len(parts.problems.messages)}
    record |= provenance({f: data_sha256(f) for f in files})
    state.wait_for_everyone()  # every process has checked the folder before the first one fills it
    if state.is_main_process:
        _say(parts.problems.report())
        _say(describe(s, parts))
        run.start(s.overwrite, record)
    state.wait_for_everyone()
    try:
        checkpoints = whole_checkpoints(run.path) if s.resume else []
        if s.resume and state.is_main_process:
            damaged = sorted({p.name for p in run.path.glob("checkpoint-*")} - {p.name for p in checkpoints})
            _say(f"not whole, left aside: {', '.join(damaged)}" if damaged else None)
            _say(f"resuming from {checkpoints[-1].name if checkpoints else 'the start: no whole checkpoint'}")
        run_trainer(trainer, checkpoints[-1:])
        trainer.save_model()
        if s.merge and state.is_main_process:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.save_pretrained(run.path / "merged")
            parts.renderer.tokenizer.save_pretrained(run.path / "merged")
    except BaseException as error:
        if state.is_main_process:
            interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
            with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                run.update("interrupted" if interrupted else "failed", error=first_line(error))
        raise
    if state.is_main_process:
        log, tokens = trainer.state.log_history, int(trainer.seen_tokens)
        final = {k: v for line in log for k, v in line.items() if k.endswith(("lm_loss", "jepa_loss", "eval_exact"))}
        run.update("finished", steps=trainer.state.global_step, tokens=tokens, final=final)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in final.items())
        _say(f"finished {trainer.state.global_step} steps, {tokens} tokens: {shown}")
    state.wait_for_everyone()  # a process that leaves first would tear the others' connections down
    state.destroy_process_group()


def run_trainer(trainer: JepaTrainer, checkpoints: list[Path]) -> None:
    """Trains from the checkpoint there is; one of the last step is only loaded: the Trainer would go past it."""
    if checkpoints:
        reached = TrainerState.load_from_json(str(checkpoints[-1] / "trainer_state.json"))
        if reached.global_step >= reached.max_steps:
            trainer._load_from_checkpoint(str(checkpoints[-1]))
            trainer.state = reached
            trainer.seen_tokens.fill_(reached.num_input_tokens_seen)
            return
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)


def held_out_generation(s: Settings, parts: Parts, state: PartialState) -> Any:
    """A function of the model: exact match on this process's share of the first --eval_generate held-out rows."""
    # Imported here since generation.py builds on this file.
    from generation import generate
    from scoring import score_text

    mine = parts.held_out.examples[: s.eval_generate][state.process_index :: state.num_processes]

    def exact(model: Any) -> dict[str, float]:
        batches = generate(model, parts.renderer, mine, batch_size=32, max_new_tokens=128) if mine else []
        hits = sum(score_text(g.text, e.assistant)["exact"] for batch in batches for e, g in batch)
        counts = torch.tensor([float(hits), float(len(mine))], device=model.device)
        counts = counts if state.num_processes == 1 else _all_reduce(counts)
        return {"exact": (counts[0] / counts[1]).item()}

    return exact


def _all_reduce(values: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(values)
    return values


def add_stop_token(config: Any, token: int | None) -> None:
    """Makes plain `generate` of the saved model stop where it was trained to."""
    known = config.eos_token_id
    known = set() if known is None else {known} if isinstance(known, int) else set(known)
    config.eos_token_id = sorted((known | {token}) - {None}) or None


def _say(text: str | None) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 finished, 1 failed, 2 wrong usage or data, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings, given = parse_flags(Settings, __doc__, argv)

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        settings = check_settings(settings, given)
        with contextlib.closing(Run(settings.output_dir, dataclasses.asdict(settings))) as run:
            train(settings, state, run)
        # The wrapped model holds gloo's threads in reference cycles; one that still has work to let go of when the
        # interpreter ends would abort it.
        gc.collect()
    except (UsageError, ExampleError) as error:
        for line in str(error).splitlines() if state.is_main_process else ():
            _say(f"finetune.py: error: {line}")
        return 2
    except FloatingPointError as error:  # the same on every process
        if state.is_main_process:
            _say(f"finetune.py: error: {error}")
        return 1
    except OSError as error:
        _say(f"finetune.py: error: {first_line(error)}")
        return 1
    except KeyboardInterrupt:
        if state.is_main_process:
            _say("finetune.py: interrupted; a run that has begun goes on with --resume")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
