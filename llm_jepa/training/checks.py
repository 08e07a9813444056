"""Checks on the first examples: whether segments may share a row, and whether logits may be computed in slices."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.segments import Item


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of the collator on a device."""
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}


def inspect_model(model: Any, selector: Any, collator: Any, items: list[Item], *, half: bool, compiled: bool) -> None:
    """Checks the layout and finds out whether logits can be sliced. Raises UsageError if the layout does not work.

    `half`: the model computes in half precision. `compiled`: it is going to be compiled.
    """
    device = next(model.parameters()).device
    if collator.layout != "separate":
        check_layout(model, selector, collator, items, half)
    if not compiled:  # each number of slices would be compiled anew
        selector.slices = logits_can_be_sliced(model, selector, on_device(collator(items), device), half)


@torch.no_grad()
def logits_can_be_sliced(model: Any, selector: Any, batch: dict[str, Any], half: bool = False) -> bool:
    """Whether sliced logits give the same loss: not if the model does more to logits than its output layer."""
    if len(batch["label_ids"]) < 2:  # one label is one slice, which shows nothing
        return False
    usual, training = selector.max_logits, model.training
    model.eval()
    try:
        full, _ = selector.lm_sum(model, batch)
        selector.slices, selector.max_logits = True, selector.vocab_size
        sliced, _ = selector.lm_sum(model, batch)
    finally:
        selector.slices, selector.max_logits = False, usual
        model.train(training)
    return torch.allclose(full, sliced, rtol=1e-2 if half else 1e-3)


@torch.no_grad()
def check_layout(model: Any, selector: Any, collator: Any, items: list[Item], half: bool = False) -> None:
    """Encodes a few examples in shared rows. Raises UsageError if a segment's outputs depend on its neighbors.

    The first segment of the longest row gets other tokens. The shapes are the same, so without leakage the outputs at
    the other segments' views and labels agree up to kernel nondeterminism. Compared with separate rows they may differ
    by rounding. Models that carry state along the row (Mamba, linear attention, convolutions) fail.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    branches, longest = (max(f(x) for item in items for x in item) for f in (lambda x: x.branch, lambda x: len(x.ids)))
    if (collator.layout == "additive" or branches) and window and longest > window:
        flags = "--text_view in_chat with --predictors" if branches else "--layout additive"
        raise UsageError(f"{flags}: its mask would hide the model's sliding window of {window} tokens")
    device, training = next(model.parameters()).device, model.training
    flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
    precision = torch.autocast(device.type, torch.bfloat16, enabled=flash)  # flash kernels need half precision
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # without an adapter
    name, one_row = type(base).__name__, dataclasses.replace(collator, tokens_per_row=sys.maxsize)
    model.eval()

    def read(items: list[Item], layout: str) -> list[torch.Tensor]:
        batch = dataclasses.replace(one_row, layout=layout)(items)
        try:
            with precision:
                states = selector.read(model, on_device(batch, device))
        except (RuntimeError, ValueError, IndexError) as error:
            raise UsageError(
                f"{name} does not support --layout {layout} ({first_line(error)}); give --layout separate"
            ) from None
        return [states.logits.float(), *states.views.float()]  # (N, V), (P, D), (P, D)

    def difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        pairs = [(a, b) for a, b in zip(some, others, strict=True) if a.numel()]
        return max((((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-6)).max().item() for a, b in pairs), default=0)

    shared, separate = read(items, collator.layout), read(items, "separate")
    if not all(torch.isfinite(x).all() for x in separate):
        raise UsageError(f"{name} gives numbers that are not finite: its weights are damaged")
    row = max(one_row.rows(items), key=len)
    other = dataclasses.replace(row[0], ids=(row[0].ids + 1) % config.vocab_size)
    changed = read([tuple(other if x is row[0] else x for x in item) for item in items], collator.layout)
    owner = next(i for i, item in enumerate(items) if any(x is row[0] for x in item))
    first = sum(int(item[0].labels[1:].sum()) for item in items[:owner])
    own_labels = torch.arange(first, first + int(items[owner][0].labels[1:].sum()), device=device)
    keep = [torch.ones(len(x), dtype=torch.bool, device=device) for x in shared]
    keep[0][own_labels] = row[0].kind != "chat"
    for k, kind in ((1, "text_view"), (2, "code_view")):
        if row[0].view is not None and kind == ("text_view" if row[0].kind == "chat" else row[0].kind):
            keep[k][owner] = False
    kept = [[x[mask] for x, mask in zip(states, keep, strict=True)] for states in (changed, shared)]
    leak, rounding = difference(*kept), difference(shared, separate)
    model.train(training)
    if not leak < (1e-2 if flash else 1e-6) or not rounding < (0.1 if flash or half else 1e-3):
        raise UsageError(
            f"{name} does not support --layout {collator.layout}: segments in one row change each other (by "
            f"{max(leak, rounding):.2g}); give --layout separate"
        )
