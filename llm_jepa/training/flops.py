"""The share of FLOPs for --same_flop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_jepa.data.batching import MicroBatches, SegmentDataset
from llm_jepa.data.segments import Item
from llm_jepa.data.spans import without_views


def flop_share(
    dataset: SegmentDataset, sampler: MicroBatches, loss: Callable[[list[Item]], torch.Tensor], jepa_ratio: float
) -> float:
    """FLOPs of regular fine-tuning divided by those with views, counted by torch on micro-batches of training.

    `loss(items)` is the loss of a micro-batch whose backward pass is counted too.
    """
    spent = [0, 0]
    count = 8 if jepa_ratio == 1 else 32  # which views are dropped is random
    for epoch in range(math.ceil(count / len(sampler))):
        sampler.epoch = epoch
        for key in itertools.islice(sampler, count):
            items = dataset[key]
            for views in (False, True):
                with FlopCounterMode(display=False) as counter:
                    loss(items if views else [without_views(item) for item in items]).backward()
                spent[views] += counter.get_total_flops()
    return spent[False] / spent[True]
