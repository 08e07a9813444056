"""Encoded examples, and the micro-batches that they are grouped into."""

import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate.utils import patch_environment

from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.segments import Encoder, Item

EXAMPLES_PER_PROCESS = 10_000  # fewer are not worth a process of their own
CHUNK = 1000  # examples that are tokenized together
# For code that forks: a tokenizer's threads do not survive a fork, and the child would wait for them.
NO_THREADS = {"tokenizers_parallelism": "false"}


def encode_share(encoder: Encoder, examples: list[Example]) -> list[Item | ValueError]:
    """Each example's segments, or the reason why there are none; in the memory of a CHUNK's tokens and offsets."""
    return [item for i in range(0, len(examples), CHUNK) for item in encoder(examples[i : i + CHUNK])]


def encode_all(encoder: Encoder, examples: list[Example], processes: int = 0) -> list[Item | ValueError]:
    """The same in several processes.

    `processes`: 0 means one for each EXAMPLES_PER_PROCESS examples, at most this process's share of the cores.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of torchrun that share this node's cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or min(len(examples) // EXAMPLES_PER_PROCESS, max(1, cores // local))
    if processes < 2:
        return encode_share(encoder, examples)
    ends = [len(examples) * i // processes for i in range(processes + 1)]
    shares = [(encoder, examples[first:stop]) for first, stop in itertools.pairwise(ends)]
    with patch_environment(**NO_THREADS), multiprocessing.Pool(processes) as pool:
        return list(itertools.chain.from_iterable(pool.starmap(encode_share, shares)))


class Items(list):
    """Encoded examples."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.array([sum(len(segment.ids) for segment in item) for item in self])

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max((len(segment.ids) for item in self for segment in item), default=0)


class SegmentDataset(torch.utils.data.Dataset):
    """Encoded examples, indexed by one micro-batch at a time: (epoch, indices) → list of items.

    `draws(item, epoch, index)` makes the random draws of an epoch, see `spans.Draws`.
    """

    def __init__(
        self, examples: list[Example], encoder: Encoder, problems: Problems, draws: Callable[[Item, int, int], Item],
        processes: int = 0,
    ):  # fmt: skip
        """Raises ExampleError for an example that cannot be used, unless `problems` skips those."""
        self.items, self.examples, self.draws = Items(), [], draws
        for example, item in zip(examples, encode_all(encoder, examples, processes), strict=True):
            if isinstance(item, ValueError):
                problems.add(example.source, str(item))
            else:
                self.items.append(item)
                self.examples.append(example)
        if not self.items.longest:
            raise ExampleError(f"no usable example is left: {problems.report()}")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> list[Item]:
        epoch, indices = key
        return [self.draws(self.items[i], epoch, i) for i in indices]


class MicroBatches(torch.utils.data.Sampler):
    """(epoch, indices) of each micro-batch, in an order decided by seed and epoch.

    A micro-batch has `batch_size` examples. With `tokens` it has as many as have about that many tokens, at least one:
    the shuffled examples are cut into parts of similar total length, on average at most `tokens`. The number of
    micro-batches is the same in each epoch and a multiple of the number of processes. Empty micro-batches are appended
    to reach it, instead of repeating examples, so that ranks stay in step and no example counts twice.

    Micro-batches of `batch_size` that different processes run at the same time exchange examples until their numbers of
    tokens are similar, so that no process waits for the one with the longest examples.
    """

    def __init__(
        self, lengths: np.ndarray, seed: int, shuffle: bool, processes: int = 1, batch_size: int = 1, tokens: int = 0
    ):
        """`lengths`: tokens of each example."""
        self.lengths, self.seed, self.shuffle, self.batch_size, self.tokens = lengths, seed, shuffle, batch_size, tokens
        self.epoch, self.processes = 0, processes
        # At most one micro-batch per example: in a step without examples only AdamW's moments would change them.
        count = min(math.ceil(lengths.sum() / tokens), len(lengths)) if tokens else math.ceil(len(lengths) / batch_size)
        self._count = math.ceil(count / processes) * processes

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        order = np.arange(len(self.lengths))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(order))
        if self.tokens:
            lengths = self.lengths[order]
            middles = np.cumsum(lengths) - lengths / 2
            cuts = np.searchsorted(middles, np.arange(1, len(self)) * (lengths.sum() / len(self)))
            numbers = np.arange(1, len(self))
            room = max(0, len(order) - len(self))  # examples beyond one per micro-batch
            cuts = np.maximum.accumulate(np.clip(cuts - numbers, 0, room)) + numbers
        else:
            cuts = np.arange(1, len(self)) * self.batch_size
            if self.processes > 1:
                order = self._balanced(order)
        yield from ((self.epoch, part.tolist()) for part in np.split(order, cuts))

    def _balanced(self, order: np.ndarray) -> np.ndarray:
        """The order after this exchange: the longest go first, each to the process with the fewest tokens and room."""
        size, parts = self.batch_size, []
        for start in range(0, len(order), size * self.processes):
            together = order[start : start + size * self.processes]
            room = np.clip(len(together) - size * np.arange(self.processes), 0, size)
            tokens, mine = np.zeros(self.processes), [[] for _ in range(self.processes)]
            for i in sorted(together.tolist(), key=lambda i: (-self.lengths[i], i)):
                p = int(np.where(room > 0, tokens, np.inf).argmin())
                mine[p].append(i)
                tokens[p] += self.lengths[i]
                room[p] -= 1
            parts += mine
        return np.concatenate([np.array(part, dtype=order.dtype) for part in parts])
