"""Micro-batches from data that is tokenized as it is read, for data larger than memory.

`datasets.IterableDataset.state_dict` is not used: it does not restore the shuffle buffer, so a resumed run would see
other examples than an uninterrupted one.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import patch_environment

from llm_jepa.data.batching import NO_THREADS
from llm_jepa.data.examples import Example, ExampleError, Fields, Problems, columns_of, parse_example, read_rows
from llm_jepa.data.segments import Encoder, Item, or_error

BLOCK = 8192  # examples that are shuffled together
CHUNK = 256  # examples that are tokenized together
Place = tuple[int, int, int]  # epoch, block, and how many of this process's examples in the block were used


class SegmentStream(torch.utils.data.IterableDataset):
    """Endless micro-batches from a file or hub dataset.

    Examples are read in blocks, shuffled within the block in an order decided by seed, epoch and block, and distributed
    over the processes in turn. Each micro-batch comes with the place after it, from which another stream resumes, and
    with the bad examples that were skipped on the way (reasons by place). After an example that cannot be used, every
    micro-batch is the ExampleError itself: an exception raised in a DataLoader worker would arrive as a traceback.
    """

    def __init__(
        self, path: str, encoder: Encoder, draws: Callable[[Item, int, int], Item], *, fields: Fields | None, seed: int,
        skip: bool, batch_size: int, tokens: int = 0, process: int = 0, processes: int = 1,
    ):  # fmt: skip
        """A micro-batch has `batch_size` examples, or as many as stay within `tokens`. `skip`: skip bad examples."""
        self.path, self.encoder, self.draws, self.fields, self.seed = path, encoder, draws, fields, seed
        self.problems, self.batch_size, self.tokens = Problems(skip), batch_size, tokens
        self.process, self.processes = process, processes
        self.place: Place = (0, 0, 0)

    def first(self, count: int) -> list[Example]:
        """The first usable examples in file order, at most `count`. Raises ExampleError."""
        encoded = (pair for block in self._blocks() for row in block for pair in self._encoded([row]))
        examples = list(itertools.islice((example for example, item in encoded if item), count))
        if not examples:
            raise ExampleError(f"{self.path}: no usable example")
        self.problems.found = {}  # met again by the micro-batches
        return examples

    def __iter__(self) -> Iterator[tuple[list[Item], Place, dict[str, str]] | ExampleError]:
        with patch_environment(**NO_THREADS) if torch.utils.data.get_worker_info() else contextlib.nullcontext():
            try:
                yield from self._micro_batches()
            except ExampleError as error:
                yield from itertools.repeat(error)

    def _micro_batches(self) -> Iterator[tuple[list[Item], Place, dict[str, str]]]:
        batch, size, last = [], 0, self.place
        for item, place in self._items():
            length = sum(len(segment.ids) for segment in item)
            if batch and (size + length > self.tokens if self.tokens else len(batch) == self.batch_size):
                skipped, self.problems.found = self.problems.found, {}
                yield batch, last, skipped
                batch, size = [], 0
            batch.append(item)
            size, last = size + length, place

    def _blocks(self) -> Iterator[list[tuple[str, int, Callable[[], Any]]]]:
        rows = read_rows(self.path, columns_of(self.fields), streaming=True)
        while block := list(itertools.islice(rows, BLOCK)):
            yield block

    def _items(self) -> Iterator[tuple[Item, Place]]:
        begin, used = self.place[:2], self.place[2]
        for epoch in itertools.count(begin[0]):
            found = (epoch, 0, 0) < self.place  # the part before the place had usable examples
            for number, block in enumerate(self._blocks()):
                if (epoch, number) < begin:
                    continue
                order = np.random.default_rng([self.seed, epoch, number]).permutation(len(block))
                order = order[self.process :: self.processes].tolist()
                for start in range(used if (epoch, number) == begin else 0, len(order), CHUNK):
                    chunk = order[start : start + CHUNK]
                    for after, (example, item) in enumerate(self._encoded([block[i] for i in chunk]), start + 1):
                        if item:
                            found = True
                            yield self.draws(item, epoch, example.id), (epoch, number, after)
            if not found:
                raise ExampleError(f"{self.path}: no usable example for process {self.process}")

    def _encoded(self, rows: list) -> list[tuple[Example | None, Item | None]]:
        """An (example, item) for each row, (None, None) for a bad one that is skipped."""
        examples = [or_error(parse_example, *row, self.fields) for row in rows]
        encoded = iter(self.encoder([e for e in examples if isinstance(e, Example)]))
        out = []
        for (source, _, _), example in zip(rows, examples, strict=True):
            item = next(encoded) if isinstance(example, Example) else example
            if isinstance(item, ValueError):
                self.problems.add(source, str(item))
            out.append((None, None) if isinstance(item, ValueError) else (example, item))
        return out
