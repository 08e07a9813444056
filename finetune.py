"""Fine-tunes a causal language model on pairs of views with the LLM-JEPA objective (arXiv 2509.14252).

    L = gamma * L_LM + lbd * d(h_text, h_code)  (+ stp_lbd * L_STP with --stp, arXiv 2602.22617)

    python finetune.py --train_file datasets/synth_train.jsonl --model_name models/tiny --pretrain \\
        --predictors 1 --lbd 1 --learning_rate 2e-3 --num_epochs 3 --batch_size 16 --grad_accum 1

The file is the method, top to bottom: layouts, losses, trainer, main; settings.py has the flags, segments.py what is
encoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import heapq
import inspect
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.utils import logging as transformers_logging

from llm_jepa.cli import UsageError, first_line, parse_flags
from llm_jepa.data.batching import MicroBatches, SegmentDataset, without_views
from llm_jepa.data.examples import Example, ExampleError, Problems, data_sha256, read_examples, split_examples
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Segment, end_of_turn
from llm_jepa.data.spans import POINTS
from llm_jepa.data.streaming import SegmentStream
from llm_jepa.files import read_json, write_json, write_text
from llm_jepa.model import context, load_model, load_tokenizer
from llm_jepa.run_folder import Run, mark_checkpoint, processes, provenance, whole_checkpoints
from llm_jepa.settings import Settings, check_settings, is_flash

# -------------------------------------------------------------------------------------------------------- layouts
# Letters: B examples, R rows, T tokens in a row, D hidden size, V vocabulary, N label tokens, P pairs,
# S spans of K points.

Row = list[Segment]


def separate_rows(items: list[tuple[Segment, ...]], tokens_per_row: int) -> list[Row]:
    """Every segment in a row of its own."""
    return [[segment] for item in items for segment in item]


def additive_rows(items: list[tuple[Segment, ...]], tokens_per_row: int) -> list[Row]:
    """The chat in a row of its own, the views of an example sharing another."""
    return [list(row) for item in items for row in (item[:1], item[1:]) if row]


def packed_rows(items: list[tuple[Segment, ...]], tokens_per_row: int) -> list[Row]:
    """All segments in few rows of like length, of at most `tokens_per_row` tokens or the longest segment's.

    Rows are as wide as the longest of them, so the longest segment goes first and each into the shortest row yet.
    """
    segments = sorted((s for item in items for s in item), key=lambda s: -len(s.ids))
    lengths = [len(s.ids) for s in segments]
    budget = max([tokens_per_row, *lengths[:1]])
    for count in range(math.ceil(sum(lengths) / budget), len(segments) + 1):
        rows: list[Row] = [[] for _ in range(count)]
        filled = [(0, r) for r in range(count)]
        for segment, length in zip(segments, lengths, strict=True):
            tokens, r = filled[0]
            rows[r].append(segment)
            heapq.heapreplace(filled, (tokens + length, r))
        if max(filled, default=(0, 0))[0] <= budget:
            break
    return rows if segments else []


LAYOUTS = {"separate": separate_rows, "additive": additive_rows, "packed": packed_rows}


@dataclass
class Collator:
    """Lays out the segments of a micro-batch in rows.

    Returns `input_ids`, `position_ids` (R, T) restarting at 0 for each segment; `spans` (3, R, T), of each token its
    segment's number in the row (−1: padding) and two columns: in its segment it sees those before the first and those
    from the second on; `label_at` (2, N) row and column whose hidden state predicts `label_ids` (N,); `view_at`
    (2, 2, P) row and column of the first and the second view; `span_at` (2, K, S) row and column of each span's points,
    K being `points`; `targets` (3,) = N, P, S; `tokens` (4,) counts of chat, text
    view, code view and padding; `boundaries` (S + 1,) where segments and padding begin in all rows as one, the last of
    them its end, and `longest` of them; `mask`: what tells segments of a row apart, `padding` alone where each has a
    row of its own, their `positions`, or nothing less than a `dense` mask. Rows are padded to a multiple of `multiple`
    tokens.
    """

    layout: str
    pad_id: int
    tokens_per_row: int
    multiple: int = 1
    points: int = 0

    def __call__(self, items: Sequence[tuple[Segment, ...]]) -> dict[str, Any]:
        items = list(items)  # the same segments each time they are looked at
        rows = LAYOUTS[self.layout](items, self.tokens_per_row) or [[]]
        width = max(1, max(sum(len(s.ids) for s in row) for row in rows))
        width = math.ceil(width / self.multiple) * self.multiple
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)  # (R, T)
        positions = np.zeros((len(rows), width), dtype=np.int64)  # (R, T)
        spans = np.zeros((3, len(rows), width), dtype=np.int64)
        spans[0] = -1
        place = {}
        for r, row in enumerate(rows):
            begin = 0
            for number, segment in enumerate(row):
                end = begin + len(segment.ids)
                ids[r, begin:end], spans[0, r, begin:end] = segment.ids, number
                positions[r, begin:end] = segment.positions
                # Predictor tokens see the chat up to their stem and each other.
                spans[1:, r, end - segment.branch : end] = [[begin + segment.stem], [end - segment.branch]]
                place[id(segment)] = (r, begin)
                begin = end
            positions[r, begin:] = np.arange(width - begin)  # padding is a segment of its own

        label_at, label_ids, view_at, span_at = [], [], ([], []), [np.zeros((0, self.points, 2), dtype=np.int64)]
        counts = dict.fromkeys(("chat", "text_view", "code_view"), 0)
        for item in items:
            for segment in item:
                r, begin = place[id(segment)]
                counts[segment.kind] += len(segment.ids) - segment.branch
                counts["text_view"] += segment.branch
                if segment.view is not None:
                    view_at[segment.kind == "code_view"].append((r, begin + segment.view))
                if self.points and segment.path is not None:
                    span_at.append(np.stack([np.full_like(segment.path, r), begin + segment.path], axis=-1))
                targets = np.flatnonzero(segment.labels[1:]) + 1  # the first token has no predecessor to predict it
                label_at += [(r, begin + t - 1) for t in targets]
                label_ids += segment.ids[targets].tolist()
        padding = ids.size - sum(counts.values())
        dense = self.layout == "additive" or any(s.branch for row in rows for s in row)
        boundaries = np.append(np.flatnonzero(positions == 0), positions.size)
        span_at = torch.from_numpy(np.concatenate(span_at)).permute(2, 1, 0)  # (2, K, S)
        return {
            "mask": "dense" if dense else "padding" if self.layout == "separate" else "positions",
            "boundaries": torch.from_numpy(boundaries.astype(np.int32)),
            "longest": int(np.diff(boundaries).max()),
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "spans": torch.from_numpy(spans),
            "label_at": torch.tensor(label_at, dtype=torch.long).reshape(-1, 2).T,  # (2, N)
            "label_ids": torch.tensor(label_ids, dtype=torch.long),  # (N,)
            "view_at": torch.tensor(view_at, dtype=torch.long).reshape(2, -1, 2).movedim(2, 0),  # (2, 2, P)
            "span_at": span_at,
            "targets": torch.tensor([len(label_ids), len(view_at[0]), span_at.shape[2]]),
            "tokens": torch.tensor([*counts.values(), padding]),
        }


def collate(collator: Collator, micro_batches: list[list[tuple[Segment, ...]]]) -> dict[str, Any]:
    """What a DataLoader needs whose items are whole micro-batches."""
    return collator(micro_batches[0])


def collate_stream(
    collator: Collator, micro_batch: tuple[list[tuple[Segment, ...]], Any, dict[str, str]] | ExampleError
) -> dict[str, Any]:
    """The same for a stream; `place` says where it goes on behind this micro-batch, `skipped` what it left out."""
    if isinstance(micro_batch, ExampleError):
        return collator(()) | {"error": micro_batch}
    items, place, skipped = micro_batch
    return collator(items) | {"place": place, "skipped": skipped}


def may_see(spans: torch.Tensor) -> torch.Tensor:
    """Which tokens see which (R, T, T), from a batch's `spans` (3, R, T)."""
    owner, before, behind = spans[:, :, :, None]  # (R, T, 1) each
    key = torch.arange(spans.shape[-1], device=spans.device)  # (T,)
    causal = key <= key[:, None]  # (T, T)
    # Both columns are 0 where a token sees all of its segment.
    return (owner == owner.transpose(1, 2)) & causal & ((key < before) | (key >= behind))


# --------------------------------------------------------------------------------------------------------- losses


def lm_loss(logits: torch.Tensor, label_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum, count) of the next-token cross-entropy in nats: logits (N, V) at the labels, label_ids (N,)."""
    return F.cross_entropy(logits.float(), label_ids, reduction="sum"), len(label_ids)


SLICE = 2**26  # logits held at once, 256 MiB in float32; their gradient and softmax take as much again each


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


def _turn(step: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(step, other, dim=-1)  # (S,)


def geodesic(path: torch.Tensor) -> torch.Tensor:
    """1 − cos(h_t − h_r, h_r − h_s), (3, S, D) → (S,): 0 on a straight path (arXiv 2602.22617)."""
    before, behind = path.diff(dim=0)  # (S, D) each
    return _turn(behind, before)


def patch(path: torch.Tensor) -> torch.Tensor:
    """1 − cos(patch, before + after), (8, S, D) → (S,): four points in each of two parts (the released code's formula).

    The patch is what the span moves the hidden state by, before + after what the rest of the parts does.
    """
    before, inside, after = path.unflatten(0, (2, 4)).diff(dim=1).sum(dim=0)  # (S, D) each
    return _turn(inside, before + after)


TUBES = {"geodesic": geodesic, "patch": patch}


def stp_loss(path: torch.Tensor, tube: str) -> tuple[torch.Tensor, int]:
    """(sum, count) over spans of Semantic Tube Prediction's loss, from hidden states (K, S, D) of one layer.

    Gradients flow into all points. No spans give a zero that still carries a gradient graph.
    """
    return TUBES[tube](path.float()).sum(), path.shape[1]


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
    """Hands the output layer only what is needed, so that logits exist at labels alone, and at most SLICE at once.

    A forward pre-hook on the model's output layer: everything before it runs as in any forward of the (wrapped) model.
    Outside of `read` and `losses` it does nothing, so generation works as ever.

    `stp_layer`: the hidden states at which spans are read. An inner layer's are noted by a pre-hook on the block that
    takes them in, so that no other layer's are kept.
    """

    def __init__(self, model: torch.nn.Module, stp_layer: int = -1):
        """Raises UsageError where the model has no such layer."""
        config, taken = model.config.get_text_config(), inspect.signature(_forward_of(model)).parameters
        self.batch: dict[str, Any] | None = None
        self.views: torch.Tensor | None = None
        self.path: torch.Tensor | None = None
        self.vocabulary, self.slices = config.vocab_size, False
        self.accepts_positions, self.accepts_more = "position_ids" in taken, "kwargs" in taken
        self.kernel = getattr(config, "_attn_implementation", None) or ""
        self.windowed = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        self._layer = model.get_output_embeddings()
        self._hooks = [self._layer.register_forward_pre_hook(self._pick)]
        self._inner: torch.Tensor | None = None
        if (block := block_behind(model, stp_layer)) is not None:
            self._hooks.append(block.register_forward_pre_hook(self._note, with_kwargs=True))

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.batch is not None:
            self._inner = args[0] if args else kwargs["hidden_states"]  # (R, T, D)

    def _pick(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        if self.batch is None:
            return None
        hidden, (label_at, view_at) = args[0], (self.batch["label_at"], self.batch["view_at"])  # (R, T, D)
        self.views = hidden[view_at[0], view_at[1]]  # (2, P, D)
        states = hidden if self._inner is None else self._inner
        self.path = states[self.batch["span_at"][0], self.batch["span_at"][1]]  # (K, S, D)
        return (hidden[label_at[0], label_at[1]][None], *args[1:])  # (1, N, D)

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model's forward takes.

        transformers tells packed segments apart by their positions, with attention_mask=None and use_cache=False alone.
        Finding the segments makes the host wait for the device in each forward pass, so they are told where possible.
        """
        inputs = {"input_ids": batch["input_ids"], "attention_mask": None, "use_cache": False}
        if self.accepts_positions:
            inputs["position_ids"] = batch["position_ids"]
        if batch["mask"] == "padding":
            inputs["attention_mask"] = (batch["spans"][0] >= 0).long()  # (R, T)
        elif batch["mask"] == "dense" or (self.kernel == "sdpa" and not self.windowed):
            seen = may_see(batch["spans"])[:, None]  # (R, 1, T, T)
            lowest = torch.finfo(torch.float32).min
            inputs["attention_mask"] = seen if self.kernel == "sdpa" else torch.where(seen, 0.0, lowest)
        elif "flash" in self.kernel and self.accepts_more:
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch["boundaries"])
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), batch["longest"])
        return inputs

    def read(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the labels (N, V) and hidden states at the views (2, P, D), by one forward pass of `model`."""
        return self._read(model, batch)[:2]

    def _read(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.batch = batch
        try:
            logits = model(**self._inputs(batch)).logits[0]  # (N, V)
            return logits, self.views, self.path
        finally:
            self.batch = self.views = self.path = self._inner = None

    def losses(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sum of `lm_loss`, hidden states at the views (2, P, D) and the spans (K, S, D), by one forward pass.

        Where there would be more than SLICE logits they are made a slice at a time, and again in the backward pass.
        """
        if not (self.slices and len(batch["label_ids"]) * self.vocabulary > SLICE):
            logits, views, path = self._read(model, batch)
            return lm_loss(logits, batch["label_ids"])[0], views, path
        # Within the layer's own call, since wrappers that shard its weights gather them for that call.
        whole, own = self._layer.forward, vars(self._layer).get("forward")
        self._layer.forward = partial(self._sliced, whole)
        try:
            losses, views, path = self._read(model, batch)  # (N, 1)
        finally:
            del self._layer.forward
            if own is not None:
                self._layer.forward = own
        return losses.sum(), views, path

    def _sliced(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """In place of logits the cross-entropy of each label (1, N, 1), from hidden states (1, N, D)."""

        def nll(hidden: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(layer(hidden).float(), label_ids, reduction="none")

        size = max(1, SLICE // self.vocabulary)
        parts = zip(hidden[0].split(size), self.batch["label_ids"].split(size), strict=True)
        return torch.cat([checkpoint(nll, *part, use_reentrant=False) for part in parts])[None, :, None]


def block_behind(model: torch.nn.Module, layer: int) -> torch.nn.Module | None:
    """The block that takes in a layer's hidden states: 0 the embedding layer's … −1 the last, which no block does.

    Raises UsageError where the model has no such layer.
    """
    count = model.config.get_text_config().num_hidden_layers
    if not -count - 1 <= layer <= count:
        raise UsageError(f"--stp_layer {layer} is not in {-count - 1} to {count}, the layers of {type(model).__name__}")
    if layer in (-1, count):
        return None
    lists = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    blocks = next(lists, None)
    if blocks is None:
        raise UsageError(f"--stp_layer {layer}: the layers of {type(model).__name__} are not found; leave it out")
    return blocks[layer % (count + 1)]


@torch.no_grad()
def check_slices(model: torch.nn.Module, head: HeadInput, batch: dict[str, Any], half: bool = False) -> None:
    """Finds out whether logits can be made a slice at a time: not where the model does more to them than its layer.

    `half`: whether the model computes in half precision.
    """
    global SLICE
    if len(batch["label_ids"]) < 2:  # one label is one slice, which tells nothing
        return
    usual, training = SLICE, model.training
    model.eval()
    try:
        whole, *_ = head.losses(model, batch)
        head.slices, SLICE = True, head.vocabulary
        sliced, *_ = head.losses(model, batch)
    finally:
        SLICE = usual
        model.train(training)
    head.slices = torch.allclose(whole, sliced, rtol=1e-2 if half else 1e-3)


def _forward_of(model: torch.nn.Module) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward


@torch.no_grad()
def check_layout(
    model: torch.nn.Module, head: HeadInput, items: list[tuple[Segment, ...]], collator: Collator, half: bool = False
) -> None:
    """Encodes a few examples in shared rows. Raises UsageError where a segment's outputs depend on its neighbours.

    The first segment of the row gets other tokens: nothing may change at the views and labels of the others, whatever
    the precision, since the shapes are the same. Compared with rows of their own they may differ by rounding alone.
    Models whose layers carry state along the row (Mamba, linear attention, convolutions) fail. `half`: whether the
    model computes in half precision.
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
        try:
            with precision:
                logits, views = head.read(model, on_device(batch, device))
        except (RuntimeError, ValueError, IndexError) as error:
            where = f"{type(model).__name__} cannot be laid out as {layout}"
            raise UsageError(f"{where} ({first_line(error)}); give --layout separate") from None
        return [logits.float(), *views.float()]  # (N, V), (P, D), (P, D)

    def differ(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        pairs = [(a, b) for a, b in zip(some, others, strict=True) if a.numel()]
        return max((((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-6)).max().item() for a, b in pairs), default=0)

    shared, apart = read(items, collator.layout), read(items, "separate")
    if not all(torch.isfinite(x).all() for x in apart):
        raise UsageError(f"{type(model).__name__} gives numbers that are not finite: its weights are damaged")
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
    if not leak < (1e-2 if flash else 1e-6) or not differ(shared, apart) < (0.1 if flash or half else 1e-3):
        raise UsageError(
            f"{type(model).__name__} cannot be laid out as {collator.layout}: segments that share a row change one "
            f"another (by {max(leak, differ(shared, apart)):.2g}); give --layout separate"
        )


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of the collator, moved."""
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}


# -------------------------------------------------------------------------------------------------------- trainer

STATISTICS = ("lm_sum", "jepa_sum", "cosine_sum", "spread_sum", "stp_sum", "labels", "pairs", "spans",
              "spread_pairs", "chat", "text_view", "code_view", "padding")  # fmt: skip


def micro_batches(s: Settings, dataset: SegmentDataset, shuffle: bool, processes: int = 1) -> MicroBatches:
    """Which examples of a data set each micro-batch of all processes has."""
    sizes = {"batch_size": s.batch_size, "tokens": s.tokens_per_batch}
    return MicroBatches(dataset.items.lengths, s.finetune_seed, shuffle, processes, **sizes)


class JepaTrainer(Trainer):
    """transformers' Trainer with the LLM-JEPA loss, normalised over the whole optimiser step and all ranks."""

    def __init__(
        self, *args: Any, settings: Settings, head: HeadInput, problems: Problems, generate: Any = None, **kwargs: Any
    ):
        """`problems` gets the bad rows that a stream skips; `generate`: a function of the model that returns metrics
        from generation, called at each evaluation."""
        super().__init__(*args, **kwargs)
        self.s, self.head, self.problems, self.generate = settings, head, problems, generate
        # Tells the Trainer that the loss is already scaled for gradient accumulation.
        self.model_accepts_loss_kwargs = True
        self.sampler: MicroBatches | None = None
        self.place: Any = None  # behind the last micro-batch of a stream
        exact = torch.float32 if self.args.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        self.statistics = torch.zeros(len(STATISTICS), dtype=exact, device=self.args.device)
        self.seen_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._step_loss = torch.zeros((), device=self.args.device)
        self._grad_norm = torch.zeros((), device=self.args.device)
        self._error: ExampleError | None = None  # of the stream
        self._flops, self._since = 0.0, time.time()

    # -- data

    def _get_train_sampler(self, train_dataset: Any = None) -> MicroBatches:
        self.sampler = micro_batches(self.s, self.train_dataset, True, self.args.world_size)
        return self.sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> MicroBatches:
        return micro_batches(self.s, eval_dataset, False, self.args.world_size)

    def get_train_dataloader(self) -> Any:
        """Of a stream: each process reads its own share of the rows, so nothing is dealt out by accelerate."""
        if not self.s.streaming:
            return super().get_train_dataloader()
        return DataLoaderShard(
            self.train_dataset, device=self.args.device, batch_size=None,
            collate_fn=partial(collate_stream, self.data_collator.args[0]), _non_blocking=True,
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, torch.Tensor]:
        """The step's micro-batches and the label tokens, pairs and spans (3,) in all of them, over all ranks."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        counts = [torch.cat([b["targets"], b["tokens"][:3].sum()[None]]) for b in batches]
        counts = torch.stack([*counts, torch.zeros(4, dtype=torch.long, device=device)]).sum(dim=0)  # (4,)
        counts = self.accelerator.reduce(counts, "sum")
        self.seen_tokens += counts[3]
        for batch in batches if self.s.streaming else ():
            if "error" in batch:  # the others are told where they wait for this process anyway
                self._error, self._step_loss = batch["error"], torch.full_like(self._step_loss, torch.nan)
                break
            self.place = batch["place"]
            self.problems.found |= batch["skipped"]
        return batches, counts[:3].clamp(min=1).float()

    # -- loss

    def stp_weight(self, step: int) -> float:
        """--stp_lbd, or what --stp_warmup has reached of it at an optimiser step counted from 1."""
        steps = self.s.stp_warmup if self.s.stp_warmup >= 1 else self.s.stp_warmup * self.state.max_steps
        least = self.s.stp_min_lbd
        return least + (self.s.stp_lbd - least) * min(1.0, step / max(1.0, steps))

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This micro-batch's share of gamma · L_LM + lbd · L_JEPA + stp_lbd · L_STP over the step.

        `num_items_in_batch` (3,) as above. With --reference_grad_scale the micro-batch's own sum of these losses,
        whatever the step has.
        """
        lm_sum, (text, code), path = self.head.losses(model, inputs)
        counts, ranks = num_items_in_batch, self.args.world_size
        if self.s.reference_grad_scale:
            counts, ranks = inputs["targets"].clamp(min=1), 1
        loss = self.s.gamma * lm_sum / counts[0]
        pairs, zero = len(text), lm_sum.new_zeros(())
        jepa_sum, cosine, spread, stp_sum = zero, zero, zero, zero
        if self.s.jepa:
            jepa_sum, _ = jepa_loss(text, code, self.s.distance)
            loss = loss + self.s.lbd * jepa_sum / counts[1]
            cosine, spread = view_statistics(text, code)
        if self.s.tube:
            stp_sum, _ = stp_loss(path, self.s.tube)
            loss = loss + self.stp_weight(self.state.global_step + 1) * stp_sum / counts[2]
        sums = (lm_sum, jepa_sum, cosine, spread if pairs > 1 else zero, stp_sum)
        sums = torch.stack([x.detach().float() for x in sums])
        spread_pairs = inputs["targets"][1:2] * (pairs > 1)
        # Made of what is on the device already: to bring a number there would make the host wait.
        self.statistics += torch.cat([sums.to(self.statistics), inputs["targets"], spread_pairs, inputs["tokens"]])
        self._step_loss = self._step_loss + loss.detach()
        return loss * ranks  # the ranks' gradients are averaged, the loss is a sum over ranks

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

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> torch.Tensor:
        norm = super()._get_grad_norm(model, grad_norm)
        self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shards
        return self._grad_norm

    def require_finite_step(self) -> None:
        """Raises, on every process, before the weights are touched: FloatingPointError where the step's loss or
        gradient is not finite, ExampleError where the stream of any process has come to a row that cannot be used."""
        loss = self.accelerator.reduce(self._step_loss, "sum")
        self._step_loss = torch.zeros_like(self._step_loss)
        figures = [loss] if self.args.fp16 else [loss, self._grad_norm.to(loss)]  # fp16's scaler leaves such steps out
        if not torch.isfinite(torch.stack(figures)).all():
            for error in gather_object([self._error]):
                if error is not None:
                    raise error
            what, value = ("gradient norm", self._grad_norm) if torch.isfinite(loss) else ("loss", loss)
            raise FloatingPointError(
                f"the {what} of step {self.state.global_step + 1} is {value.item()}; training stopped"
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
            if self.s.tube:
                logs |= {"stp_loss": t["stp_sum"] / max(1, t["spans"]), "spans": int(t["spans"])}
                logs |= {"stp_lbd": self.stp_weight(self.state.global_step)} if self.s.stp_warmup else {}
            if self.s.track_flop:
                logs["flops"] = self.state.total_flos
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Losses of the held-out rows, each normalised over all of them, and with --eval_generate exact match."""
        model, one = self.accelerator.unwrap_model(self.model), torch.ones(3, device=self.args.device)
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
        if self.s.tube:  # at its whole weight, whatever the warm-up, so that evaluations compare
            metrics["stp_loss"] = t["stp_sum"] / max(1, t["spans"])
            metrics["loss"] += self.s.stp_lbd * metrics["stp_loss"]
        if self.generate is not None:
            metrics |= self.generate(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._since = time.time()
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    def load_checkpoint(self, folder: Path) -> None:
        """Takes the weights of a checkpoint, without training on."""
        self._load_from_checkpoint(str(folder))

    def merged_model(self) -> Any:
        """The model with its adapter merged in; on the main process alone."""
        return self.accelerator.unwrap_model(self.model).merge_and_unload()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Older checkpoints go only when the new one is whole, so that a kill while saving leaves one to resume from.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.state.num_input_tokens_seen = int(self.seen_tokens)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.s.streaming:
            place = {"place": self.place, "processes": self.args.world_size, "skipped": self.problems.found}
            write_json(stream_file(Path(self.args.output_dir), self.state.global_step, self.args.process_index), place)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
            rotate_checkpoints(self.args.output_dir, limit)


def stream_file(run: Path, step: int, process: int) -> Path:
    """Where a checkpoint keeps the place of a process in its stream."""
    return run / f"checkpoint-{step}" / f"stream-{process}.json"


class Watch(TrainerCallback):
    """Drives the sampler's epoch, stops at a step that is not finite, writes metrics.jsonl."""

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
        if self.trainer.sampler is not None:  # a stream counts its own
            self.trainer.sampler.epoch = int(state.epoch or 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.require_finite_step()

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

    def close(self) -> None:
        """Ends the bar's line, so that what stopped the training is said on one of its own."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar while held-out rows are scored."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            shown = ("lm_loss", "jepa_loss", "cosine", "stp_loss", "eval_lm_loss", "eval_exact")
            self.training_bar.set_postfix({k: f"{logs[k]:.4g}" for k in shown if k in logs}, refresh=False)


# ----------------------------------------------------------------------------------------------------------- main


def load_data(s: Settings, renderer: Renderer, problems: Problems) -> tuple[SegmentDataset, SegmentDataset | None]:
    """(training, held-out) data sets of the settings' files; of a stream the first rows stand for the training data."""
    options = {"processes": s.preprocessing_num_workers, "cached": not s.dry_run}
    if s.streaming:
        first = SegmentStream(s.train_file, renderer, s.skip_bad_examples, batch_size=1)
        first = first.first(s.dry_run or 4 * s.batch_size)
        examples, held_out = first, read_examples(s.eval_file, problems, s.fields) if s.eval_file else []
    else:
        examples, held_out = load_examples(s, problems)
    train_set = SegmentDataset(examples[: s.dry_run or None], renderer, problems, dropout=True, **options)
    if s.dry_run or not held_out:
        return train_set, None
    return train_set, SegmentDataset(held_out, renderer, problems, **options)


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
    batch = parts.collator(dataset[0, range(len(dataset))])
    lm_sum, (text, code), path = parts.head.losses(model, batch)
    labels = len(batch["label_ids"])
    jepa_sum, pairs = jepa_loss(text, code, s.distance)
    lm, jepa = lm_sum / max(1, labels), jepa_sum / max(1, pairs)
    total = s.gamma * lm + s.lbd * jepa if s.jepa else s.gamma * lm
    tube = {}
    if s.tube:
        stp_sum, spans = stp_loss(path, s.tube)
        stp = stp_sum / max(1, spans)
        total, tube = total + s.stp_lbd * stp, {"stp_loss": stp.item(), "spans": spans}
    if not torch.isfinite(total):
        raise FloatingPointError(f"the loss is {total.item()}")
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "lm_loss": lm.item(),
        "jepa_loss": jepa.item() if s.jepa else None,
        **tube,
        "total_loss": total.item(),
        "grad_norm": torch.nn.utils.get_total_norm(gradients).item(),
        "label_tokens": labels,
        "pairs": pairs,
        "tokens": dict(zip(("chat", "text_view", "code_view", "padding"), batch["tokens"].tolist(), strict=True)),
        "first_row": first_row(parts.renderer, dataset),
    }


def flop_share(model: Any, head: HeadInput, dataset: SegmentDataset, collator: Collator, s: Settings) -> float:
    """FLOPs of regular fine-tuning over those of these settings, counted by torch on micro-batches of training."""
    sampler, spent = micro_batches(s, dataset, True), [0, 0]
    count = 8 if s.jepa_ratio == 1 else 32  # which views are dropped is a matter of chance
    for epoch in range(math.ceil(count / len(sampler))):
        sampler.epoch = epoch
        for key in itertools.islice(sampler, count):
            items = dataset[key]
            for views in (False, True):
                batch = collator(items if views else [without_views(item) for item in items])
                with FlopCounterMode(display=False) as counter:
                    lm_sum, (text, code), _ = head.losses(model, on_device(batch, model.device))
                    (lm_sum + jepa_loss(text, code, s.distance)[0]).backward()
                spent[views] += counter.get_total_flops()
    model.zero_grad()
    return spent[False] / spent[True]


def training_arguments(
    s: Settings, bf16: bool, steps: int, device: torch.device, sharding: dict[str, Any] | None = None
) -> TrainingArguments:
    """The Trainer's own settings. `sharding`: its fsdp_config, for a model that is shared out over the processes."""
    names = {f.name for f in dataclasses.fields(TrainingArguments)}  # transformers 5.23 renamed this one
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=s.output_dir,
        # Its items are whole micro-batches.
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
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
        fsdp=bool(sharding) or None,
        fsdp_config=sharding,
        torch_compile=s.torch_compile,
        use_liger_kernel=s.use_liger_kernel,
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
        dataloader_num_workers=workers(s, device),
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={
            "non_blocking": device.type == "cuda",
            # To put off the reduction would keep whole gradients.
            "gradient_accumulation_kwargs": {"sync_each_batch": bool(sharding)},
        },
        ignore_data_skip=s.streaming,  # a stream goes on by itself
        ddp_find_unused_parameters=False,
        label_names=["label_ids"],
    )
    # Without torchrun one device: torch's DataParallel would tear packed rows apart.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def workers(s: Settings, device: torch.device) -> int:
    """Processes that lay out micro-batches ahead of the device."""
    usual = (1 if s.streaming else 2) if device.type == "cuda" else 0
    return usual if s.dataloader_num_workers is None else s.dataloader_num_workers


def describe(s: Settings, parts: Parts) -> str:
    """The start block: what will be trained on what, and the first example as the model sees it."""
    weights = sum(p.numel() for p in parts.model.parameters())
    trainable = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    row = first_row(parts.renderer, parts.train_set)
    rows = "a stream" if s.streaming else f"{len(parts.train_set)} examples"
    method = f"JEPA, λ {s.lbd:g}, γ {s.gamma:g}, k {s.predictors}, {s.distance}" if s.jepa else "regular"
    method += f" + STP {s.tube}, weight {s.stp_lbd:g}" if s.tube else ""
    method += f", layer {s.stp_layer}" if s.tube and s.stp_layer != -1 else ""
    lines = [
        f"model    {s.model_name}, {weights / 1e6:.2f} M weights, {trainable / 1e6:.2f} M trained",
        f"method   {method}; labels: {s.lm_labels}; layout: {s.layout}",
        f"data     {rows}, {len(parts.held_out or ())} held out",
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


@dataclass
class Parts:
    """What a run is made of, all of it checked; of a stream `train_set` holds the first rows."""

    renderer: Renderer
    train_set: SegmentDataset
    stream: SegmentStream | None
    held_out: SegmentDataset | None
    model: Any
    head: HeadInput
    collator: Collator
    problems: Problems


class Engine:
    """How a script holds the weights: here whole on each process's device. finetune8bh200.py has another."""

    name, doc, settings, trainer = "finetune.py", __doc__, Settings, JepaTrainer

    def check(self, s: Settings, given: set[str]) -> Settings:
        """The resolved settings. Raises UsageError naming all that is wrong or inapplicable."""
        return check_settings(s, given)

    def load(self, s: Settings, tokenizer: Any, device: torch.device) -> Any:
        """The model. Raises UsageError where it cannot be loaded."""
        return load_model(s, tokenizer).to(device)

    def half(self, s: Settings, device: torch.device) -> bool:
        """Whether the Trainer computes in bfloat16."""
        on_gpu = device.type == "cuda"
        return s.dtype == "bfloat16" or (s.dtype == "auto" and on_gpu and torch.cuda.is_bf16_supported())

    def inspect(self, s: Settings, parts: Parts) -> None:
        """Finds out how the model can be fed. Raises UsageError where not as the settings ask for."""
        inspect_model(s, parts)

    def arguments(self, s: Settings, bf16: bool, steps: int, device: torch.device) -> TrainingArguments:
        """The Trainer's own settings."""
        return training_arguments(s, bf16, steps, device)

    def callbacks(self, s: Settings, parts: Parts, device: torch.device) -> list[TrainerCallback]:
        """What watches the training besides the run folder's own."""
        return []

    def clean_up(self, s: Settings) -> None:
        """Removes what a finished run does not need; by the main process alone."""


WHOLE = Engine()


def inspect_model(s: Settings, parts: Parts, half: bool = False) -> None:
    """Checks the layout, and whether logits can be sliced, on the first examples. Raises UsageError."""
    device, items = next(parts.model.parameters()).device, parts.train_set.items[:3]
    if s.layout != "separate":
        check_layout(parts.model, parts.head, items, parts.collator, half)
    if not s.torch_compile:  # which would compile anew for each number of slices
        check_slices(parts.model, parts.head, on_device(parts.collator(items), device), half)


def prepare(s: Settings, state: PartialState, engine: Engine = WHOLE) -> Parts:
    """Loads, checks and encodes everything. Raises UsageError and ExampleError; writes nothing but a token cache."""
    device = torch.device("cpu") if s.dry_run else state.device
    problems, tokenizer = Problems(s.skip_bad_examples), load_tokenizer(s)
    limit = context(s) or s.max_length
    if limit < s.max_length and state.is_main_process:
        _say(f"--max_length {limit}, the model's context, instead of {s.max_length}")
    renderer = Renderer(tokenizer, dataclasses.replace(s, max_length=min(limit, s.max_length)))
    mistake = None
    with state.local_main_process_first():  # the others find its token cache, and its mistakes: they wait for it
        try:
            train_set, held_out = load_data(s, renderer, problems)
        except ExampleError as error:
            mistake = error
    if mistake:
        raise mistake
    stream = None
    if s.streaming:
        where = {"process": state.process_index, "processes": state.num_processes}
        stream = SegmentStream(s.train_file, renderer, s.skip_bad_examples, s.batch_size, s.tokens_per_batch, **where)
    set_seed(s.finetune_seed)
    model = engine.load(s, tokenizer, device)
    # A dense mask is quadratic in the row, so short rows win on a CPU; flash kernels want one long row.
    tokens_per_row = s.tokens_per_row or (sys.maxsize if is_flash(s) else 4096 if device.type == "cuda" else 256)
    parts = Parts(
        renderer=renderer,
        train_set=train_set,
        stream=stream,
        held_out=held_out,
        model=model,
        head=HeadInput(model, s.stp_layer if s.tube else -1),
        # Few widths, so that --torch_compile meets few shapes.
        collator=Collator(
            s.layout, tokenizer.pad_token_id, tokens_per_row, 64 if s.torch_compile else 1, POINTS.get(s.tube, 0)
        ),
        problems=problems,
    )
    engine.inspect(s, parts)
    return parts


def build_trainer(s: Settings, parts: Parts, state: PartialState, engine: Engine = WHOLE) -> JepaTrainer:
    """The Trainer of a run. Raises UsageError where its own settings do not fit together."""
    steps, bf16 = s.max_steps, engine.half(s, state.device)
    if s.same_flop and s.jepa:
        each = len(micro_batches(s, parts.train_set, False, state.num_processes)) // state.num_processes
        with torch.autocast(state.device.type, torch.bfloat16, enabled=bf16):
            share = flop_share(parts.model, parts.head, parts.train_set, parts.collator, s)
        steps = max(1, round(math.ceil(each / s.grad_accum) * s.num_epochs * share))
    try:
        arguments = engine.arguments(s, bf16, steps, state.device)
        Trainer.get_optimizer_cls_and_kwargs(arguments, parts.model)
        trainer = engine.trainer(
            model=parts.model,
            args=arguments,
            train_dataset=parts.stream or parts.train_set,
            eval_dataset=parts.held_out,
            data_collator=partial(collate, parts.collator),
            processing_class=parts.renderer.tokenizer,
            settings=s,
            head=parts.head,
            problems=parts.problems,
            generate=held_out_generation(s, parts, state) if s.eval_generate else None,
        )
    except (ValueError, ImportError, OverflowError) as error:
        raise UsageError(f"the Trainer refuses these settings: {first_line(error)}") from None
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    for callback in engine.callbacks(s, parts, state.device):
        trainer.add_callback(callback)
    return trainer


FINAL = ("lm_loss", "jepa_loss", "stp_loss", "eval_exact")  # what run.json says of the end


def train(s: Settings, state: PartialState, run: Run, engine: Engine) -> None:
    """A whole run: checks everything, starts the run folder, trains, saves."""
    if not s.dry_run:
        run.check(s.resume, s.overwrite)
    parts = prepare(s, state, engine)
    if s.dry_run:
        _say(parts.problems.report())
        print(json.dumps(dry_run(s, parts), ensure_ascii=False))
        return

    trainer = build_trainer(s, parts, state, engine)
    trainer.add_callback(Watch(run, trainer))
    add_stop_token(parts.model.generation_config, end_of_turn(parts.renderer) if s.lm_labels != "answer_text" else None)
    files = [f for f in (s.train_file, s.data_file, s.eval_file) if f]
    record = {"seed": s.finetune_seed, "skipped_examples": len(parts.problems.messages)}
    turns = {example.system for example in parts.train_set.examples}
    record |= {"system_turn": turns.pop()} if len(turns) == 1 and not s.streaming else {}  # else there may be several
    record |= provenance({f: data_sha256(f, s.streaming and f == s.train_file) for f in files})
    state.wait_for_everyone()  # every process has checked the folder before the first one fills it
    if state.is_main_process:
        _say(parts.problems.report())
        _say(describe(s, parts))
        run.start(s.overwrite, record)
    state.wait_for_everyone()
    try:
        # One process decides: where the file system shows another one less, they would wait for each other for ever.
        (checkpoints,) = broadcast_object_list([whole_checkpoints(run.path) if s.resume else []])
        if s.resume and state.is_main_process:
            damaged = sorted({p.name for p in run.path.glob("checkpoint-*")} - {p.name for p in checkpoints})
            _say(f"not whole, left aside: {', '.join(damaged)}" if damaged else None)
            _say(f"resuming from {checkpoints[-1].name if checkpoints else 'the start: no whole checkpoint'}")
        if s.streaming and checkpoints:
            go_on(parts, checkpoints[-1])
        run_trainer(trainer, checkpoints[-1:])
        trainer.save_model()
        if s.merge and state.is_main_process:
            trainer.merged_model().save_pretrained(run.path / "merged")
            parts.renderer.tokenizer.save_pretrained(run.path / "merged")
    except BaseException as error:
        if state.is_main_process:
            interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
            with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                repeats = isinstance(error, (UsageError, ExampleError, FloatingPointError))
                run.update("interrupted" if interrupted else "failed", error=first_line(error), repeats=repeats)
        raise
    if s.streaming:  # each process has met the bad rows of its own share
        for found in gather_object([parts.problems.found]):
            parts.problems.found |= found
    if state.is_main_process:
        log, tokens = trainer.state.log_history, int(trainer.seen_tokens)
        final = {k: v for line in log for k, v in line.items() if k.endswith(FINAL)}
        facts = {"steps": trainer.state.global_step, "tokens": tokens, "final": final}
        if s.streaming:
            facts["skipped_examples"] = len(parts.problems.found)
            _say(parts.problems.report())
        if state.device.type == "cuda":
            facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated()  # on the main process's GPU
        run.update("finished", **facts)
        engine.clean_up(s)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in final.items())
        _say(f"finished {trainer.state.global_step} steps, {tokens} tokens: {shown}")
    state.wait_for_everyone()  # a process that leaves first would tear the others' connections down


def go_on(parts: Parts, checkpoint: Path) -> None:
    """Sets the stream to where a checkpoint left it. Raises UsageError where there were more or fewer processes."""
    stream = parts.stream
    path = stream_file(checkpoint.parent, int(checkpoint.name.rpartition("-")[2]), stream.process)
    kept = read_json(path) if path.is_file() else {"processes": "fewer"}
    if kept["processes"] != stream.processes:
        raise UsageError(f"{checkpoint} was written by {kept['processes']} processes, not {stream.processes}")
    stream.place = tuple(kept["place"])
    parts.problems.found |= kept["skipped"]


def run_trainer(trainer: JepaTrainer, checkpoints: list[Path]) -> None:
    """Trains from the checkpoint there is; one of the last step is only loaded: the Trainer would go past it."""
    if checkpoints:
        reached = TrainerState.load_from_json(str(checkpoints[-1] / "trainer_state.json"))
        if reached.global_step >= reached.max_steps:
            trainer.load_checkpoint(checkpoints[-1])
            trainer.state = reached
            trainer.seen_tokens.fill_(reached.num_input_tokens_seen)
            return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Bar):
                callback.close()


def held_out_generation(s: Settings, parts: Parts, state: PartialState) -> Any:
    """A function of the model: exact match on this process's share of the first --eval_generate held-out rows."""
    # Imported here since generation.py builds on this file.
    from llm_jepa.evaluation.generation import generate
    from llm_jepa.scoring.tasks import score_text

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


def main(argv: list[str] | None = None, engine: Engine = WHOLE) -> int:
    """Exit code: 0 finished, 1 failed, 2 wrong usage or data, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings, given = parse_flags(engine.settings, engine.doc, argv)

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    # The others wait while the main process loads and saves; torch's ten minutes are short for that.
    patience = {"timeout": timedelta(hours=2)} if "LOCAL_RANK" in os.environ else {}
    state = PartialState(cpu=not torch.accelerator.is_available(), **patience)
    state.wait_for_everyone()  # a process that leaves at once would be missed by one that still looks for it
    try:
        settings = engine.check(settings, given)
        with contextlib.closing(Run(settings.output_dir, dataclasses.asdict(settings))) as run:
            train(settings, state, run, engine)
        # A thread of the process group that still has work to let go of when the interpreter ends would abort it, so
        # the group goes first; and the trainer, which holds it too, before that: what frees a group along with a
        # wrapped model waits for such a thread while it keeps the lock that the thread waits for.
        gc.collect()
        state.destroy_process_group()
    except (UsageError, ExampleError) as error:
        for line in str(error).splitlines() if state.is_main_process else ():
            _say(f"{engine.name}: error: {line}")
        return 2
    except FloatingPointError as error:  # the same on every process
        if state.is_main_process:
            _say(f"{engine.name}: error: {error}")
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and not error.filename
        where = f" (--output_dir {settings.output_dir})" if full else ""
        _say(f"{engine.name}: error: {first_line(error)}{where}")
        return 1
    except (SafetensorError, RuntimeError) as error:
        if not any(said in str(error) for said in ("No space left", "inline_container")):  # safetensors' and torch's
            raise
        _say(f"{engine.name}: error: cannot write to {settings.output_dir}; is its disk full? ({first_line(error)})")
        return 1
    except KeyboardInterrupt:
        if state.is_main_process:
            _say(f"{engine.name}: interrupted; a run that has begun goes on with --resume")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
