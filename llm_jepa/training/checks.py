"""Checks on the first examples: whether segments may share a row, and whether logits may be computed in slices."""

import dataclasses
import sys
from typing import Any

import torch
from accelerate.utils import send_to_device

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.segments import Item
from llm_jepa.model import attention_window


@torch.no_grad()
def inspect_model(model: Any, selector: Any, collator: Any, items: list[Item], *, half: bool, longest: int) -> None:
    """Checks the layout and finds out whether logits can be sliced. Raises UsageError if the layout does not work.

    `half`: the model computes in half precision. `longest`: the length of the longest segment that can come. A dense
    mask replaces the model's own, which may limit attention to a window.
    """
    window, branches = attention_window(model.config), any(x.branch for item in items for x in item)
    if (collator.layout == "additive" or branches) and window and longest > window:
        flags = "--text_view in_chat with --predictors" if branches else "--layout additive"
        raise UsageError(f"{flags}: its mask would hide the model's window of {window} tokens from {longest} tokens")
    device, training = next(model.parameters()).device, model.training
    flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
    half, random_states = half or flash, [device] if device.type == "cuda" else []
    with torch.autocast(device.type, torch.bfloat16, enabled=flash):  # flash kernels need half precision
        if collator.layout != "separate":
            check_layout(model.eval(), selector, collator, items, half)
        batch = send_to_device(collator(items), device)
        with torch.random.fork_rng(random_states):
            forward(model.train(), selector, batch, collator.layout)  # some models refuse only in training
        selector.slices = logits_can_be_sliced(model.eval(), selector, batch, half)
    model.train(training)


def forward(model: Any, selector: Any, batch: dict[str, Any], layout: str) -> Any:
    """The states of a forward pass. Raises UsageError for whatever the model raises."""
    try:
        return selector.read(model, batch)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind, from the model's own code
        reason = first_line(error) + (")" if layout == "separate" else "); give --layout separate")
        raise UsageError(f"{selector.model_name} does not support --layout {layout} ({reason}") from None


def logits_can_be_sliced(model: Any, selector: Any, batch: dict[str, Any], half: bool) -> bool:
    """Whether sliced logits give the same loss: not if the model does more to logits than its output layer."""
    if len(batch["label_ids"]) < 2:  # one label is one slice, which shows nothing
        return False
    usual = selector.max_logits
    full, _ = selector.lm_sum(model, batch)
    selector.slices, selector.max_logits = True, selector.vocab_size
    sliced, _ = selector.lm_sum(model, batch)
    selector.slices, selector.max_logits = False, usual
    return torch.allclose(full, sliced, rtol=1e-2 if half else 1e-3)


def check_layout(model: Any, selector: Any, collator: Any, items: list[Item], half: bool) -> None:
    """Encodes a few examples in shared rows. Raises UsageError if a segment's outputs depend on its neighbors.

    The first segment of the longest row gets other tokens. The shapes are the same and forward kernels repeat their
    results, so without leakage the outputs at the other segments' views and labels stay the same, bit for bit. In a
    mixture of experts, and under kernels that add in any order, they may change as much as they do when the last
    segment, which no earlier one can attend to, gets other tokens. Compared with separate rows they may differ by
    rounding. All is measured twice and the smaller difference counts, because two threads of a CPU do not always repeat
    a result. Models that carry state along the row (Mamba, linear attention, convolutions) fail.
    """
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    name, one_row = selector.model_name, dataclasses.replace(collator, tokens_per_row=sys.maxsize)

    def read(items: list[Item], layout: str) -> list[torch.Tensor]:
        batch = dataclasses.replace(one_row, layout=layout)(items)
        states = forward(model, selector, send_to_device(batch, device), layout)
        return [states.logits.float(), *states.views.float()]  # (N, V), (P, D), (P, D)

    def difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        pairs = [(a, b) for a, b in zip(some, others, strict=True) if a.numel()]
        return max((((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-6)).max().item() for a, b in pairs), default=0)

    def change(number: int, shared: list[torch.Tensor]) -> float:
        """How much the others' outputs differ from `shared` if that segment of the longest row has other tokens."""
        old = rows[longest][number]
        other = dataclasses.replace(old, ids=(old.ids + 1) % vocabulary)
        found = read([tuple(other if x is old else x for x in item) for item in items], collator.layout)
        return difference(*([x[o != number] for x, o in zip(y, owners, strict=True)] for y in (found, shared)))

    twice, separate = [read(items, collator.layout) for _ in range(2)], read(items, "separate")
    if not all(torch.isfinite(x).all() for x in separate):
        raise UsageError(f"{name} gives numbers that are not finite: its weights are damaged")
    rows, batch = one_row.rows(items), one_row(items)
    longest = max(range(len(rows)), key=lambda r: len(rows[r]))
    owners = [  # the number of each label's and view's segment in the longest row, −1 in others: (N,), (P,), (P,)
        torch.where(row == longest, batch["segment_ids"][row, column], -1).to(device)
        for row, column in (batch["label_at"], *batch["view_at"].unbind(1))
    ]
    # Measured by every process, for sharded parameters.
    rounding = min(difference(shared, separate) for shared in twice)
    leak = min(change(0, shared) for shared in twice)
    noise = min(change(len(rows[longest]) - 1, shared) for shared in twice)
    experts = any("expert" in name.lower() for name, _ in model.named_modules())
    floor = 0 if not experts else 2e-3 if half else 2e-6  # their rounding may happen to stay the same
    allowed = min(max(2 * noise, floor), 1e-2 if half else 1e-5)
    if not leak <= allowed or not rounding < (0.1 if half else 1e-3):
        raise UsageError(
            f"{name} does not support --layout {collator.layout}: segments in one row change each other (by "
            f"{max(leak, rounding):.2g}); give --layout separate"
        )
