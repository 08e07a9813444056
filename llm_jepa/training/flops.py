"""Floating-point operations of --track_flop, and the share of them for --same_flop."""

import itertools
import math
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch.utils.flop_counter import FlopCounterMode

from llm_jepa.data.batching import MicroBatches
from llm_jepa.data.segments import without_pair
from llm_jepa.distributed import processes
from llm_jepa.forward import LMHeadSelector
from llm_jepa.settings import Settings

PRODUCT = re.compile(r"(mm|mv|dot|attention|linear|lstm|gru|rnn)(_|$)|conv")  # names of torch's matrix products
NO_PRODUCT = ("prim", "prims", "profiler", "c10d", "_c10d_functional", "fsdp")  # namespaces


class FlopCounter(FlopCounterMode):
    """torch's counter with formulas for the operators that it counts as 0: attention kernels, products of experts.

    What a causal mask hides counts, as in torch's own formulas.
    """

    def __init__(self) -> None:
        super().__init__(display=False)

    def _count_flops(self, func_packet: Any, out: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func_packet not in self.flop_registry and (formula := missing_formula(func_packet)):
            self.flop_registry[func_packet] = formula
        return super()._count_flops(func_packet, out, args, kwargs)


@cache
def missing_formula(operator: Any) -> Callable[..., int] | None:
    """The formula of an operator that torch has none for. If there is none here either, says so once."""
    space, _, name = str(operator).rpartition(".")
    if operator is torch.ops.aten._grouped_mm:
        return grouped_flops
    if isinstance(operator, torch._ops.OpOverloadPacket):
        names = [argument.name for argument in getattr(operator, operator.overloads()[0])._schema.arguments]
        for query in (("query", "key", "value"), ("q", "k", "v")):
            if set(query) <= set(names):
                return attention_formula(names, *query)
    if (PRODUCT.search(name) if space == "aten" else space not in NO_PRODUCT) and PartialState().is_main_process:
        print(f"FLOPs: there is no formula for the operator {operator}, it counts as 0", file=sys.stderr)
    return None


def grouped_flops(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """FLOPs of products of groups of rows: (N, K) and (G, K, M), backward (K, N) and (N, M)."""
    return 2 * a.numel() * b.shape[-1] // (len(a) if a.ndim > b.ndim else 1)


def attention_formula(names: list[str], query: str, key: str, value: str) -> Callable[..., int]:
    """The formula of a fused attention kernel, from the names of its arguments.

    Forward it has 2 matrix products, backward 5, because it computes the scores again. torch's kernels get queries
    (R, heads, T, d), those of flash-attn (R, T, heads, d), or (T, heads, d) and where segments begin in the row.
    """
    heads, tokens = (-3, -2) if query == "query" else (-2, -3)
    scores, sums = (3, 2) if {"grad_out", "dout"} & set(names) else (1, 1)

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k, v = (given[name] for name in (query, key, value))
        begins = [given.get(f"cu_seqlens_{name}") for name in "qk"]
        if begins[0] is None:
            pairs = len(q) * q.shape[tokens] * k.shape[tokens]
        else:
            pairs = int((begins[0].diff().long() * begins[1].diff()).sum())
        return 2 * pairs * q.shape[heads] * (scores * q.shape[-1] + sums * v.shape[-1])

    return flops


def flop_share(s: Settings, parts: Any, sampler: MicroBatches, bf16: bool) -> float:
    """FLOPs of regular fine-tuning divided by those of these settings, counted on micro-batches of training.

    `parts`: the Parts of a run in finetune.py. The backward pass counts, and what it computes again.
    """
    model, device, regular, own = parts.model, parts.model.device, 0, 0
    if s.gradient_checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    plain = LMHeadSelector(model)
    plain.projectors, plain.slices = {}, parts.selector.slices
    reads_twice = "sigreg" in parts.selector.projectors and s.grad_accum * processes() > 1  # JepaTrainer._add_moments
    count = 8 if s.jepa_ratio == 1 else 32  # which views are dropped is random
    for epoch in range(math.ceil(count / len(sampler))):
        sampler.epoch = epoch
        for key in itertools.islice(sampler, count):
            items = parts.train_set[key]
            batch, chats = (send_to_device(parts.collator(x), device) for x in (items, [*map(without_pair, items)]))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                with FlopCounter() as counter:
                    plain.lm_sum(model, chats)[0].backward()
                regular += counter.get_total_flops()
                with FlopCounter() as counter:
                    if reads_twice:
                        with torch.no_grad():
                            parts.selector.read(model, batch | {"label_at": batch["label_at"][:, :1]})
                    parts.objective(batch, s.gamma)[0].backward()
                own += counter.get_total_flops()
    plain.close()
    model.zero_grad()
    return regular / own
