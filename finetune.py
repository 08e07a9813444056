"""Fine-tunes a causal language model on pairs of views with the LLM-JEPA objective (arXiv 2509.14252).

    L = gamma * L_LM + lbd * d(h_text, h_code)  (+ stp_lbd * L_STP with --stp, arXiv 2602.22617)

L_LM is the mean over label tokens, d the mean over pairs of views. h_text and h_code are the last hidden states at the
views' view tokens: the last content token, or the last predictor token if --predictors is above 0.

    python finetune.py --train_file datasets/synth_train.jsonl --model_name models/tiny --pretrain \\
        --predictors 1 --lbd 1 --learning_rate 1e-3 --num_epochs 2 --batch_size 8 --grad_accum 1 \\
        --warmup_steps 0.05 --adam_beta2 0.98

This file is the method from top to bottom: layouts and masks, forward, losses, trainer, main. An example becomes
segments (llm_jepa/data/segments.py): the chat, on which L_LM is computed, and its two views. Segments are placed in
rows (the layout). The output layer receives the hidden states of labels only; the other losses read those of view
tokens and span points. All losses are sums that are divided by the counts of the complete optimizer step.

With --text_view in_chat the chat also contains the Text view: predictor tokens at its end (the branch) attend to the
chat up to the end of the user turn (the stem). A path is the sequence of tokens of a chat whose
hidden states --stp reads.

Letters in shape comments: R rows, T tokens in a row, D hidden size, V vocabulary, N label tokens, P pairs, S spans of
K points each, G segments and runs of padding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import inspect
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from llm_jepa.cli import UsageError, first_line, parse_flags
from llm_jepa.distributed import agreed, start
from llm_jepa.settings import Settings, check_settings, is_flash

if __name__ == "__main__":  # before the slow imports, so that --help and flag errors are fast
    start("finetune.py", lambda: check_settings(*parse_flags(Settings, __doc__)))

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch.utils.checkpoint import checkpoint
from transformers import ProgressCallback, Trainer, TrainerCallback, set_seed

from llm_jepa.data.batching import MicroBatches, SegmentDataset
from llm_jepa.data.examples import Problems
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder, Item, Segment, end_of_turn
from llm_jepa.data.spans import POINTS
from llm_jepa.data.streaming import SegmentStream
from llm_jepa.evaluation.generation import exact_match
from llm_jepa.model import (
    MAX_LOGITS,
    add_adapter,
    blocks_after,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    not_adapted,
    stop_tokens,
    tokenizer_options,
)
from llm_jepa.run_folder import RunFolder, complete_checkpoints
from llm_jepa.training.arguments import training_arguments, uses_bfloat16
from llm_jepa.training.callbacks import Bar, MetricsCallback
from llm_jepa.training.checks import inspect_model
from llm_jepa.training.data import load_data
from llm_jepa.training.describe import final_record, first_example, last_checkpoint, start_block, start_record
from llm_jepa.training.flops import flop_share
from llm_jepa.training.process import run_script, write_errors
from llm_jepa.training.trainer import StepTrainer, compile_decoder

# ---------------------------------------------------------------------------------------------- layouts and masks

Row = list[Segment]


def packed_rows(items: list[Item], tokens_per_row: int) -> list[Row]:
    """Packs all segments into as few rows as a greedy search finds.

    A row has at most `tokens_per_row` tokens, or the longest segment's if that has more. All rows are padded to the
    longest, so segments are placed from the longest to the shortest, each in the row that is shortest so far.
    """
    segments = sorted((s for item in items for s in item), key=lambda s: -len(s.ids))
    lengths = [len(s.ids) for s in segments]
    budget = max(tokens_per_row, max(lengths, default=0))
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


# (items, tokens_per_row) → rows. separate: each segment has its own row; additive: the chat (an item's first segment)
# has a row, and its views share a second one.
LAYOUTS = {
    "separate": lambda items, _: [[segment] for item in items for segment in item],
    "additive": lambda items, _: [list(row) for item in items for row in (item[:1], item[1:]) if row],
    "packed": packed_rows,
}


@dataclass
class Collator:
    """Places the segments of a micro-batch in rows, padded to the longest. A call returns a dict:

    mask           how attention is restricted: "padding" (one segment per row, a 2D mask), "positions" (position_ids
                   restart) or "dense" (a T x T mask)
    boundaries     (G + 1,)   where segments and padding begin in the concatenated rows, and the end
    longest        int        length of the longest segment or run of padding
    input_ids      (R, T)
    position_ids   (R, T)     restart at 0 in each segment and in padding; a branch continues the stem's positions
    segment_ids    (R, T)     number of the token's segment in its row, −1 for padding
    branches       (2, R, T)  columns a and b: in its segment a token attends, causally, to columns < a and >= b;
                              a = b = 0: to all
    label_at       (2, N)     row and column of the hidden state that predicts each label
    label_ids      (N,)
    view_at        (2, 2, P)  row and column of the first view (of the Text, unless --reverse_pred) and of the second
    path_at        (2, K, S)  row and column of each span's K = `points` points (0 without --stp)
    counts         (3,)       N, the pairs before loss dropout (P without it), S
    tokens         (4,)       tokens of chats, text views (and predictor tokens in chats) and code views, and padding
    """

    layout: str
    pad_id: int
    tokens_per_row: int
    points: int = 0

    def rows(self, items: list[Item]) -> list[Row]:
        """The rows of these items."""
        return LAYOUTS[self.layout](items, self.tokens_per_row) or [[]]  # one empty row without items

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        items = list(items)  # a lazy sequence makes new segments at each read; `place` needs the same ones
        rows = self.rows(items)
        width = max(1, max(sum(len(s.ids) for s in row) for row in rows))
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)  # (R, T)
        positions = np.zeros((len(rows), width), dtype=np.int64)  # (R, T)
        segment_ids = np.full((len(rows), width), -1, dtype=np.int64)  # (R, T)
        branches = np.zeros((2, len(rows), width), dtype=np.int64)  # (2, R, T)
        place = {}  # id(segment) → (row, first column)
        for r, row in enumerate(rows):
            begin = 0
            for number, segment in enumerate(row):
                end = begin + len(segment.ids)
                ids[r, begin:end] = segment.ids
                segment_ids[r, begin:end] = number
                positions[r, begin:end] = segment.positions
                # Predictor tokens of a chat attend to the chat's stem and, causally, to one another.
                branches[:, r, end - segment.branch : end] = [[begin + segment.stem], [end - segment.branch]]  # (2, 1)
                place[id(segment)] = (r, begin)
                begin = end
            positions[r, begin:] = np.arange(width - begin)  # so that padding is separated from the last segment

        label_at, label_ids, view_at = [], [], ([], [])
        paths = [np.zeros((0, self.points, 2), dtype=np.int64)]  # keeps the shape if there are no spans
        tokens = dict.fromkeys(("chat", "text_view", "code_view"), 0)
        for item in items:
            for segment in item:
                r, begin = place[id(segment)]
                tokens[segment.kind] += len(segment.ids) - segment.branch
                tokens["text_view"] += segment.branch
                if segment.view is not None:
                    view_at[1 if segment.kind == "code_view" else 0].append((r, begin + segment.view))
                if self.points and segment.path is not None:
                    row = np.full_like(segment.path, r)
                    paths.append(np.stack([row, begin + segment.path], axis=-1))  # (S, K) → (S, K, 2)
                targets = np.flatnonzero(segment.labels[1:]) + 1  # the first token has no predecessor to predict it
                label_at += [(r, begin + t - 1) for t in targets]
                label_ids += segment.ids[targets].tolist()
        padding = ids.size - sum(tokens.values())
        dense = self.layout == "additive" or any(s.branch for row in rows for s in row)
        boundaries = np.append(np.flatnonzero(positions == 0), positions.size)
        path_at = torch.from_numpy(np.concatenate(paths)).permute(2, 1, 0)  # (S, K, 2) → (2, K, S)
        return {
            "mask": "dense" if dense else "padding" if self.layout == "separate" else "positions",
            "boundaries": torch.from_numpy(boundaries.astype(np.int32)),
            "longest": int(np.diff(boundaries).max()),
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "segment_ids": torch.from_numpy(segment_ids),
            "branches": torch.from_numpy(branches),
            "label_at": torch.tensor(label_at, dtype=torch.long).reshape(-1, 2).T,  # (N, 2) → (2, N)
            "label_ids": torch.tensor(label_ids, dtype=torch.long),  # (N,)
            "view_at": torch.tensor(view_at, dtype=torch.long).reshape(2, -1, 2).movedim(2, 0),  # (2, P, 2) → (2, 2, P)
            "path_at": path_at,
            "counts": torch.tensor([len(label_ids), sum(map(bool, items)), path_at.shape[2]]),
            "tokens": torch.tensor([*tokens.values(), padding]),
        }


def attention_mask(segment_ids: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Which tokens (rows of the mask) attend to which (columns), bool (R, T, T).

    From a batch's segment_ids (R, T) and branches (2, R, T).
    """
    stem_end, branch_start = branches[:, :, :, None]  # (R, T, 1) each
    column = torch.arange(segment_ids.shape[1], device=segment_ids.device)  # (T,)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None]  # (R, T, 1), (R, 1, T) → (R, T, T)
    causal = column <= column[:, None]  # (T,), (T, 1) → (T, T)
    return same_segment & causal & ((column < stem_end) | (column >= branch_start))  # (R, T, T)


# -------------------------------------------------------------------------------------------------------- forward


class States(NamedTuple):
    """What a forward pass keeps."""

    logits: torch.Tensor  # (N, V), or in their place the cross-entropy of each label (N, 1) if logits are sliced
    views: torch.Tensor  # (2, P, D) hidden states of the first and the second view
    path: torch.Tensor  # (K, S, D) hidden states of the spans' points


class LMHeadSelector:
    """Runs the model on a batch so that its output layer receives the hidden states of labels only.

    A forward pre-hook on the output layer selects them: everything before it runs as in any forward of the (wrapped)
    model. Outside of `read` and `lm_sum` the hook does nothing, so generation is not affected.

    Layer k is what the k-th block receives, 0 the embeddings, −1 what the output layer receives: the last hidden state,
    after the final norm, and after the transform that some models have before the output layer. Views are read from −1,
    paths from `layer`. A pre-hook on the block keeps an inner layer's states, so that no other layer's are kept.
    """

    def __init__(self, model: torch.nn.Module, layer: int = -1, flag: str = "stp_layer"):
        """Raises UsageError if the model has no such layer; `flag` is the one that asks for it."""
        config = model.config.get_text_config()
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parameters = inspect.signature(base.forward).parameters
        self.batch: dict[str, Any] | None = None
        self.views = self.path = self._inner = self._block = None
        self.model_name, self.where = type(base).__name__, f"--{flag} {layer}"
        self.vocab_size, self.max_logits = config.vocab_size, MAX_LOGITS
        self.slices = False  # set by inspect_model if sliced logits give the same loss
        self.accepts_positions, self.accepts_kwargs = "position_ids" in parameters, "kwargs" in parameters
        self.attn_implementation = getattr(config, "_attn_implementation", None) or ""
        self.windowed = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        self._layer = model.get_output_embeddings()
        self._hooks = [self._layer.register_forward_pre_hook(self._select)]
        self._blocks = blocks_after(model, layer, flag)
        self._hooks += [block.register_forward_pre_hook(self._keep, with_kwargs=True) for block in self._blocks]

    def close(self) -> None:
        """Removes the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.batch is None or (self._block is not None and self._block is not module):
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        shape = getattr(hidden, "shape", ())  # R, T, D
        if self._block is module or len(shape) != 3 or shape[:2] != self.batch["input_ids"].shape:
            raise UsageError(f"{self.where}: {self.model_name} has no single state of a token there")
        self._block, self._inner = module, hidden

    def _select(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        if self.batch is None:
            return None
        hidden = args[0]  # (R, T, D)
        if hidden.dim() != 3 or hidden.shape[:2] != self.batch["input_ids"].shape:
            raise UsageError(f"the output layer of {self.model_name} does not receive one state per token")
        if self._blocks and self._inner is None:
            raise UsageError(f"{self.where}: the layers of {self.model_name} are not found; leave it out")
        inner = hidden if self._inner is None else self._inner.to(hidden.device)  # a model may be on several devices
        label_at, view_at, path_at = (self.batch[x].to(hidden.device) for x in ("label_at", "view_at", "path_at"))
        self.views = hidden[view_at[0], view_at[1]]  # (R, T, D) → (2, P, D)
        self.path = inner[path_at[0], path_at[1]]  # (R, T, D) → (K, S, D)
        return (hidden[label_at[0], label_at[1]][None], *args[1:])  # (R, T, D) → (N, D) → (1, N, D)

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward.

        transformers separates packed segments by position_ids only if attention_mask is None and use_cache is False.
        Finding the boundaries makes the host wait for the device in each forward pass, so flash kernels get them here.
        """
        used, ids = batch["segment_ids"] >= 0, batch["input_ids"]  # (R, T)
        # The embedding of the padding token is often zero, where the norms of some models have no gradient.
        inputs = {"input_ids": torch.where(used, ids, ids[:, :1]), "attention_mask": None, "use_cache": False}
        if self.accepts_positions:
            inputs["position_ids"] = batch["position_ids"]
        if batch["mask"] == "padding":
            inputs["attention_mask"] = used.long()  # (R, T)
        elif batch["mask"] == "dense" or (self.attn_implementation == "sdpa" and not self.windowed):
            mask = attention_mask(batch["segment_ids"], batch["branches"])[:, None]  # (R, 1, T, T)
            lowest = torch.finfo(torch.float32).min  # eager attention adds the mask to its scores
            inputs["attention_mask"] = mask if self.attn_implementation == "sdpa" else torch.where(mask, 0.0, lowest)
        elif "flash" in self.attn_implementation and self.accepts_kwargs:
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch["boundaries"])
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), batch["longest"])
        return inputs

    def read(self, model: torch.nn.Module, batch: dict[str, Any]) -> States:
        """One forward pass of the (wrapped) `model` on a batch of the Collator."""
        self.batch = batch
        try:
            logits = model(**self._inputs(batch)).logits[0]  # (1, N, V) → (N, V), sliced: (1, N, 1) → (N, 1)
            return States(logits, self.views, self.path)
        finally:
            self.batch = self.views = self.path = self._inner = self._block = None

    def lm_sum(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, States]:
        """The cross-entropy summed over the labels, and the states, from one forward pass.

        If `slices` is set, more than `max_logits` logits are computed slice by slice, and again in the backward pass.
        """
        if not (self.slices and len(batch["label_ids"]) * self.vocab_size > self.max_logits):
            states = self.read(model, batch)
            return lm_loss(states.logits, batch["label_ids"])[0], states
        # The slices are computed inside the layer's call: wrappers that shard its parameters gather them for that call.
        forward, own = self._layer.forward, vars(self._layer).get("forward")  # `own`: set by such a wrapper
        self._layer.forward = partial(self._sliced, forward)
        try:
            states = self.read(model, batch)
        finally:
            del self._layer.forward
            if own is not None:
                self._layer.forward = own
        return states.logits.sum(), states

    def _sliced(self, layer: Callable, hidden: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of each label (1, N, 1) in place of logits, from hidden states (1, N, D)."""

        def nll(states: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(layer(states).float(), label_ids, reduction="none")  # (n, D) → (n, V) → (n,)

        size = max(1, self.max_logits // self.vocab_size)
        chunks = zip(hidden[0].split(size), self.batch["label_ids"].split(size), strict=True)  # (≤ size, D), (≤ size,)
        return torch.cat([checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks])[None, :, None]  # (1, N, 1)


# --------------------------------------------------------------------------------------------------------- losses


def lm_loss(logits: torch.Tensor, label_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum, count) of the next-token cross-entropy in nats: logits (N, V), label_ids (N,)."""
    return F.cross_entropy(logits.float(), label_ids, reduction="sum"), len(label_ids)


def _infonce(text: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """InfoNCE from text to code at temperature 0.07, (P, D) and (P, D) → (P,)."""
    logits = F.normalize(text, dim=-1) @ F.normalize(code, dim=-1).T / 0.07  # (P, P)
    return F.cross_entropy(logits, torch.arange(len(text), device=text.device), reduction="none")  # (P,)


# d(text, code) of each pair, (P, D) and (P, D) → (P,): arXiv 2509.14252, section 3.1 and the ablations.
DISTANCES = {
    "cosine": lambda text, code: 1 - F.cosine_similarity(text, code, dim=-1),
    "jepa_l2": lambda text, code: torch.linalg.vector_norm(text - code, dim=-1),
    "jepa_mse": lambda text, code: (text - code).square().mean(dim=-1),
    "infonce": _infonce,
}


def jepa_loss(views: torch.Tensor, distance: str = "cosine") -> tuple[torch.Tensor, int]:
    """(sum, count) over pairs of the distance between the views' embeddings (2, P, D). Gradients flow into both views.

    Without pairs the sum is 0 but still part of the graph, so that backward works on every rank. `infonce` contrasts
    the pairs of one micro-batch, so it is the only distance that depends on the micro-batch's size.
    """
    text, code = views.float()  # (P, D) each
    return DISTANCES[distance](text, code).sum(), len(text)


def geodesic(path: torch.Tensor) -> torch.Tensor:
    """1 − cos(h_t − h_r, h_r − h_s) at points s < r < t, (3, S, D) → (S,): 0 on a straight path (arXiv 2602.22617)."""
    first, second = path.diff(dim=0)  # (3, S, D) → (2, S, D) → (S, D) each
    return 1 - F.cosine_similarity(second, first, dim=-1)  # (S,)


def patch(path: torch.Tensor) -> torch.Tensor:
    """1 − cos(inside, before + after), (8, S, D) → (S,): the released code's formula.

    The points are, in each of two parts (the user turn and the answer): before the part, before the span, the span's
    last, the part's last. The changes between them are summed over the parts.
    """
    parts = path.unflatten(0, (2, 4))  # (8, S, D) → (2, 4, S, D)
    before, inside, after = parts.diff(dim=1).sum(dim=0)  # → (2, 3, S, D) → (3, S, D) → (S, D) each
    return 1 - F.cosine_similarity(inside, before + after, dim=-1)  # (S,)


STP_VARIANTS = {"geodesic": geodesic, "patch": patch}


def stp_loss(path: torch.Tensor, variant: str) -> tuple[torch.Tensor, int]:
    """(sum, count) over spans of Semantic Tube Prediction's loss, from hidden states (K, S, D) of one layer.

    Gradients flow into all points. Without spans the sum is 0 but still part of the graph.
    """
    return STP_VARIANTS[variant](path.float()).sum(), path.shape[1]


COUNTS = ("labels", "pairs", "spans")  # the order of a batch's `counts`


class Term(NamedTuple):
    """An auxiliary loss. Its name is the prefix of its log key."""

    name: str
    reads: str  # the field of States: views or path
    divisor: str  # what its sum is divided by: pairs or spans
    loss: Callable[[torch.Tensor], tuple[torch.Tensor, int]]  # hidden states → (sum, count)
    weight: float
    warmup: float = 0.0  # steps of the weight's linear warm-up, or a fraction of all steps if below 1
    start_weight: float = 0.0  # at step 0, before the first step

    def weight_at(self, step: int, max_steps: int) -> float:
        """The weight at an optimizer step counted from 1."""
        steps = self.warmup if self.warmup >= 1 else self.warmup * max_steps
        return self.start_weight + (self.weight - self.start_weight) * min(1.0, step / max(1.0, steps))


def objective(
    lm_sum: torch.Tensor, states: States, counts: torch.Tensor, gamma: float, terms: list[tuple[Term, float]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss gamma · L_LM + Σ weight · term, and each term's unweighted sum by name.

    `counts` (3,): the labels, pairs and spans that the sums are divided by, in training those of the complete optimizer
    step, of which a micro-batch has a share. A pair that loss dropout removes is counted but adds nothing to the sum,
    so with --jepa_ratio r the expected weight of the JEPA term is λ·r, as published.
    """
    loss, sums = gamma * lm_sum / counts[0], {}
    for term, weight in terms:
        sums[term.name], _ = term.loss(getattr(states, term.reads))
        loss = loss + weight * sums[term.name] / counts[COUNTS.index(term.divisor)]
    return loss, sums


# -------------------------------------------------------------------------------------------------------- trainer


class JepaTrainer(StepTrainer):
    """The Trainer with the LLM-JEPA objective, normalized over the optimizer step and all ranks by default."""

    def __init__(self, *args: Any, selector: LMHeadSelector, reference_grad_scale: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.selector, self.reference_grad_scale = selector, reference_grad_scale

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, torch.Tensor]:
        """The step's micro-batches, and their labels, pairs and spans (3,) over all ranks, at least 1 each."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        # Labels, pairs, spans and tokens (4,) of each micro-batch.
        counts = [torch.cat([b["counts"], b["tokens"][:3].sum()[None]]) for b in batches]
        none = torch.zeros(4, dtype=torch.long, device=device)  # for a rank without micro-batches
        counts = torch.stack([*counts, none]).sum(dim=0)  # (micro-batches + 1, 4) → (4,)
        counts = self.accelerator.reduce(counts, "sum")
        self.seen_tokens += counts[3]
        self.follow_stream(batches)
        return batches, counts[:3].clamp(min=1).float()

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This micro-batch's share of the objective over the step; `num_items_in_batch` (3,) from get_batch_samples.

        With --reference_grad_scale it is the micro-batch's own objective, divided by its own counts.
        """
        lm_sum, states = self.selector.lm_sum(model, inputs)
        counts, ranks = num_items_in_batch, self.args.world_size
        if self.reference_grad_scale:
            counts, ranks = inputs["counts"].clamp(min=1), 1
        step = self.state.global_step + 1
        terms = [(term, term.weight_at(step, self.state.max_steps)) for term in self.terms]
        loss, sums = objective(lm_sum, states, counts, self.gamma, terms)
        self.add_statistics(loss, lm_sum, sums, states.views, inputs)
        return loss * ranks  # data parallelism averages gradients, but the loss is a sum over ranks


# ----------------------------------------------------------------------------------------------------------- main


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
    terms: list[Term]

    def inspect(self, half: bool) -> None:
        """Checks the layout on the first three examples. `half`: the parameters are in half precision."""
        items, sets = self.train_set.items[:3], [x for x in (self.train_set, self.held_out) if x is not None]
        longest = self.encoder.max_length if self.stream else max(x.items.longest for x in sets)
        inspect_model(self.model, self.selector, self.collator, items, half=half, longest=longest)


def load_on_device(s: Settings, tokenizer: Any, device: torch.device) -> Any:
    """Loads the model on its device, and adds an adapter with --lora."""
    model = load_model(s.model_name, s.revision, tokenizer, **loading(s))
    return (adapted(model, s, tokenizer) if s.lora else model).to(device)


def loading(s: Settings) -> dict[str, Any]:
    """The options of load_model that the flags describe."""
    return {
        "pretrain": s.pretrain,
        "attn_implementation": s.attn_implementation,
        "trust_remote_code": s.trust_remote_code,
        "predictors": s.stored_predictors,
    }


def adapted(model: Any, s: Settings, tokenizer: Any) -> Any:
    """The model with the adapter that the flags describe."""
    return add_adapter(
        model, tokenizer, rank=s.lora_rank, dropout=s.lora_dropout, predictors=s.stored_predictors, plain=s.plain,
        revision=s.revision,
    )  # fmt: skip


def auxiliary_terms(s: Settings) -> list[Term]:
    """The auxiliary losses that the flags ask for."""
    terms = []
    if s.jepa:
        terms.append(Term("jepa", "views", "pairs", partial(jepa_loss, distance=s.distance), s.lbd))
    if s.stp_variant:
        loss = partial(stp_loss, variant=s.stp_variant)
        terms.append(Term("stp", "path", "spans", loss, s.stp_lbd, s.stp_warmup, s.stp_min_lbd))
    return terms


def prepare(s: Settings, state: PartialState, load: Callable = load_on_device) -> Parts:
    """Reads and encodes the data and loads the model. Raises UsageError; writes no file."""
    device = torch.device("cpu") if s.dry_run else state.device
    tokenizer = load_tokenizer(s.model_name, s.revision, **tokenizer_options(s))
    config = load_config(s.model_name, s.revision, trust_remote_code=s.trust_remote_code)
    max_length = min(s.max_length, context_length(config) or s.max_length)
    if max_length < s.max_length and state.is_main_process:
        print(f"--max_length {max_length}, the model's context, instead of {s.max_length}", file=sys.stderr)
    renderer = Renderer(tokenizer, s.plain, s.train_all, s.predictors, s.front_pred, s.reverse_pred)
    encoder = Encoder(renderer, s.lm_labels, max_length, s.last_token, s.jepa, s.text_view, s.locates_user)
    data = load_data(s, encoder, state)
    set_seed(s.finetune_seed)
    model = load(s, tokenizer, device)
    if s.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UsageError(f"--gradient_checkpointing: {type(model).__name__} does not support it")
    # A dense mask is quadratic in the row, so short rows are faster on a CPU; flash kernels want one long row.
    tokens_per_row = s.tokens_per_row or (sys.maxsize if is_flash(s) else 4096 if device.type == "cuda" else 256)
    collator = Collator(s.layout, tokenizer.pad_token_id, tokens_per_row, POINTS.get(s.stp_variant, 0))
    selector = LMHeadSelector(model, s.stp_layer if s.stp_variant else -1)
    return Parts(*data, encoder, model, selector, collator, auxiliary_terms(s))


def dry_run(s: Settings, parts: Parts) -> dict[str, Any]:
    """Scores the first --dry_run examples (all of `train_set`) as one micro-batch, with gradient."""
    model = parts.model.eval()
    batch = parts.collator(parts.train_set[0, range(len(parts.train_set))])  # (epoch, indices)
    lm_sum, states = parts.selector.lm_sum(model, batch)
    counts = batch["counts"].clamp(min=1)
    loss, sums = objective(lm_sum, states, counts, s.gamma, [(term, term.weight) for term in parts.terms])
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}")
    loss.backward()
    there = {"pairs": states.views.shape[1], "spans": states.path.shape[1]}  # pairs that loss dropout leaves
    means = {t.name: (sums[t.name] / there[t.divisor]).item() for t in parts.terms if there[t.divisor]}
    return {
        "lm_loss": (lm_sum / counts[0]).item(),
        "jepa_loss": means.get("jepa"),
        **({"stp_loss": means.get("stp"), "spans": there["spans"]} if s.stp_variant else {}),
        "total_loss": loss.item(),
        "grad_norm": torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item(),
        "label_tokens": len(batch["label_ids"]),
        "pairs": there["pairs"],
        "tokens": dict(zip(("chat", "text_view", "code_view", "padding"), batch["tokens"].tolist(), strict=True)),
        "first_row": first_example(parts.encoder.renderer, parts.train_set),
    }


def share_of_flop(s: Settings, parts: Parts, micro_batches: Callable, bf16: bool) -> float:
    """The FLOPs of regular fine-tuning as a fraction of those of these settings."""
    device, model = parts.model.device, parts.model
    if s.gradient_checkpointing:  # what the backward pass computes again counts
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()

    def loss(items: list[Item]) -> torch.Tensor:
        lm_sum, states = parts.selector.lm_sum(model, send_to_device(parts.collator(items), device))
        return lm_sum + jepa_loss(states.views, s.distance)[0]  # only its FLOPs count

    sampler = micro_batches(parts.train_set.items.lengths, shuffle=True, processes=1)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        share = flop_share(parts.train_set, sampler, loss, s.jepa_ratio)
    model.zero_grad()
    return share


def build_trainer(
    s: Settings, parts: Parts, state: PartialState, *, trainer_class: type = JepaTrainer,
    make_arguments: Callable = training_arguments, bf16: bool | None = None,
) -> JepaTrainer:  # fmt: skip
    """The Trainer of a run. Raises UsageError if the Trainer refuses the settings.

    `bf16`: whether float32 parameters are autocast to bfloat16; None follows --dtype.
    """
    bf16 = uses_bfloat16(s, state.device) if bf16 is None else bf16
    micro_batches = partial(MicroBatches, seed=s.finetune_seed, batch_size=s.batch_size, tokens=s.tokens_per_batch)
    steps = s.max_steps
    if s.same_flop and s.jepa:
        batches = len(micro_batches(parts.train_set.items.lengths, shuffle=False, processes=state.num_processes))
        steps_per_epoch = math.ceil(batches // state.num_processes / s.grad_accum)
        steps = max(1, round(steps_per_epoch * s.num_epochs * share_of_flop(s, parts, micro_batches, bf16)))
    generate = None
    if s.eval_generate:
        examples = parts.held_out.examples[: s.eval_generate]
        generate = exact_match(parts.encoder.renderer, examples, state.process_index, state.num_processes)
    try:
        arguments = make_arguments(s, bf16=bf16, max_steps=steps, device=state.device)
        Trainer.get_optimizer_cls_and_kwargs(arguments, parts.model)  # raises if the optimizer is not installed
        trainer = trainer_class(
            model=parts.model,
            args=arguments,
            train_dataset=parts.stream or parts.train_set,
            eval_dataset=parts.held_out,
            processing_class=parts.encoder.renderer.tokenizer,
            collator=parts.collator,
            micro_batches=micro_batches,
            problems=parts.problems,
            track_flop=s.track_flop,
            selector=parts.selector,
            gamma=s.gamma,
            terms=parts.terms,
            reference_grad_scale=s.reference_grad_scale,
            generate=generate,
        )
    except (ValueError, ImportError, OverflowError) as error:
        raise UsageError(f"the Trainer refuses these settings: {first_line(error)}") from None
    trainer.remove_callback(ProgressCallback)
    if s.torch_compile:
        compile_decoder(parts.model)
    return trainer


def fine_tune(
    s: Settings, state: PartialState, *, load: Callable = load_on_device, half: bool | None = False,
    callbacks: Callable[[Parts], list[TrainerCallback]] = lambda parts: [], **trainer_options: Any,
) -> None:  # fmt: skip
    """A complete run: checks everything, starts the run folder, trains, saves.

    The keyword arguments are what a large model does differently: how it is loaded, whether its parameters are in half
    precision (None: they are going to be sharded, so a callback checks the first examples), additional callbacks, and
    the `trainer_options` of build_trainer.
    """
    is_main = state.is_main_process
    say = partial(print, file=sys.stderr, flush=True) if is_main else lambda text: None
    with contextlib.closing(RunFolder(s.output_dir, dataclasses.asdict(s))) as run:
        with agreed():
            if not s.dry_run:
                run.check(s.resume, s.overwrite)
            parts = prepare(s, state, load)
        if half is not None:
            parts.inspect(half)
        if parts.problems.found:
            say(parts.problems.report())
        if s.dry_run:
            print(json.dumps(dry_run(s, parts), ensure_ascii=False))
            return

        trainer, bar = build_trainer(s, parts, state, **trainer_options), Bar()
        for callback in (bar, MetricsCallback(run, trainer), *callbacks(parts)):
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
            raise
        facts = final_record(trainer)
        if is_main:
            run.update("finished", **facts)
            if not s.keep_checkpoints:
                run.remove_checkpoints()
            if s.streaming and parts.problems.found:
                say(parts.problems.report())
            shown = ", ".join(f"{name} {value:.4g}" for name, value in facts["final"].items())
            say(f"finished {facts['steps']} steps, {facts['tokens']} tokens: {shown}")
        state.wait_for_everyone()  # a process that leaves first would break the others' connections


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 finished, 1 failed, 2 wrong usage or data, 130 interrupted."""
    settings, given = parse_flags(Settings, __doc__, argv)
    return run_script("finetune.py", lambda state: fine_tune(check_settings(settings, given), state))


if __name__ == "__main__":
    sys.exit(main())
