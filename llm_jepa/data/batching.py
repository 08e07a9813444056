"""Encoded examples, and the micro-batches that they are grouped into."""

import contextlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import patch_environment

from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.segments import Encoder, Item
from llm_jepa.distributed import cores

EXAMPLES_PER_PROCESS = 10_000  # fewer are not worth a process of their own
# For code that forks: a tokenizer's threads do not survive a fork, and the child would wait for them.
NO_THREADS = {"tokenizers_parallelism": "false"}


def encode_rows(columns: dict[str, list], encoder: Encoder) -> dict[str, list]:
    """Encodes a batch of `Dataset.map`: a column of examples to pickled items, their tokens, and errors."""
    rows: dict[str, list] = {"item": [], "tokens": [], "longest": [], "error": []}
    for item in encoder([Example(**json.loads(example)) for example in columns["example"]]):
        error, item = (str(item), ()) if isinstance(item, ValueError) else (None, item)
        lengths = [len(segment.ids) for segment in item]
        for name, value in zip(rows, (pickle.dumps(item), sum(lengths), max(lengths, default=0), error), strict=True):
            rows[name].append(value)
    return rows


def encode_all(encoder: Encoder, examples: list[Example], processes: int = 0) -> Any:
    """A `datasets.Dataset` with the columns of `encode_rows`, one row per example.

    `processes`: 0 means one for each EXAMPLES_PER_PROCESS examples, at most this process's share of the cores.
    """
    import datasets

    kinds = {"item": "large_binary", "tokens": "int64", "longest": "int64", "error": "string"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    data = datasets.Dataset.from_dict({"example": [json.dumps(vars(example)) for example in examples]})
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of torchrun that share this node's cores
    processes = processes or min(len(examples) // EXAMPLES_PER_PROCESS, max(1, cores() // local))
    no_bar = len(examples) < EXAMPLES_PER_PROCESS or os.environ.get("LOCAL_RANK", "0") != "0"  # too short for one
    with contextlib.ExitStack() as stack:
        if no_bar and datasets.is_progress_bar_enabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        if processes > 1:
            stack.enter_context(patch_environment(**NO_THREADS))
        return data.map(
            encode_rows, batched=True, remove_columns="example", features=features,
            fn_kwargs={"encoder": encoder}, num_proc=processes if processes > 1 else None, desc="tokenize",
            keep_in_memory=True, load_from_cache_file=False, new_fingerprint="tokens",
        )  # fmt: skip


class Items(Sequence):
    """Encoded examples as items, unpickled when they are requested: worker processes share the memory of the bytes."""

    def __init__(self, encoded: Any, rows: list[int]):
        """`encoded`: the return value of `encode_all`; `rows`: the usable rows."""
        self._rows = np.asarray(rows, dtype=np.int64)  # an array, because counting references copies pages of a list
        self._pickled = encoded.data.column("item").combine_chunks()
        self.lengths = np.array(encoded["tokens"])[self._rows]  # tokens of each example
        self.longest = max(encoded["longest"], default=0)  # tokens of a segment

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return pickle.loads(self._pickled[self._rows[index]].as_buffer())


class SegmentDataset(torch.utils.data.Dataset):
    """Encoded examples, indexed by one micro-batch at a time: (epoch, indices) → list of items.

    `draws(item, epoch, index)` makes the random draws of an epoch, see `spans.Draws`.
    """

    def __init__(
        self, examples: list[Example], encoder: Encoder, problems: Problems, draws: Callable[[Item, int, int], Item],
        processes: int = 0,
    ):  # fmt: skip
        """Raises ExampleError for an example that cannot be used, unless `problems` skips those."""
        encoded = encode_all(encoder, examples, processes)
        good = []
        for row, (error, size) in enumerate(zip(encoded["error"], encoded["tokens"], strict=True)):
            if error is not None:
                problems.add(examples[row].source, error)
            elif size:  # not views only in regular fine-tuning
                good.append(row)
        self.items, self.examples, self.draws = Items(encoded, good), [examples[row] for row in good], draws
        if not self.items.longest:
            raise ExampleError(f"no usable example is left: {problems.report() or 'they have neither chats nor pairs'}")

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
