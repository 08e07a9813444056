"""Micro-batches from data that is tokenized as it is read."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from llm_jepa.data.batching import _no_threads, drop_views
from llm_jepa.data.examples import Example, ExampleError, Problems, parse_example, read_rows
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Segment, encode
from llm_jepa.data.spans import draw_spans

BLOCK = 8192  # rows that are shuffled together
CHUNK = 256  # rows that are tokenised together
Place = tuple[int, int, int]  # epoch, block and how many of this process's rows in it are used up


class SegmentStream(torch.utils.data.IterableDataset):
    """Micro-batches without end from rows that are tokenised as they are read, for data larger than memory.

    Rows are read in blocks, shuffled within the block in an order decided by seed, epoch and block, and dealt out to
    the processes in turn. Each micro-batch comes with the place behind it, from which another stream goes on, and with
    the bad rows that were skipped on the way, reasons by place. From a row that cannot be used on all items are the
    ExampleError itself: out of a DataLoader's worker a raised one would come as a traceback.
    """

    def __init__(
        self, path: str, renderer: Renderer, skip: bool, batch_size: int, tokens: int = 0,
        process: int = 0, processes: int = 1,
    ):  # fmt: skip
        """`batch_size` examples a micro-batch, or as many as stay within `tokens`; `skip`: bad rows."""
        self.path, self.renderer, self.problems, self.s = path, renderer, Problems(skip), renderer.s
        self.batch_size, self.tokens, self.process, self.processes = batch_size, tokens, process, processes
        self.place: Place = (0, 0, 0)

    def first(self, count: int) -> list[Example]:
        """The first usable examples in the order of the file, so many at most. Raises ExampleError."""
        encoded = (pair for block in self._blocks() for row in block for pair in self._encoded([row]))
        examples = list(itertools.islice((example for example, item in encoded if item is not None), count))
        if not examples:
            raise ExampleError(f"{self.path}: no usable example")
        return examples

    def __iter__(self) -> Iterator[tuple[list[tuple[Segment, ...]], Place, dict[str, str]] | ExampleError]:
        with _no_threads() if torch.utils.data.get_worker_info() else contextlib.nullcontext():
            try:
                yield from self._micro_batches()
            except ExampleError as error:
                yield from itertools.repeat(error)
            except OSError as error:
                reason = f"{self.path}: cannot be read ({error.strerror or error})"
                yield from itertools.repeat(ExampleError(reason))

    def _micro_batches(self) -> Iterator[tuple[list[tuple[Segment, ...]], Place, dict[str, str]]]:
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
        rows = read_rows(self.path, streaming=True)
        while block := list(itertools.islice(rows, BLOCK)):
            yield block

    def _items(self) -> Iterator[tuple[tuple[Segment, ...], Place]]:
        begin, used = self.place[:2], self.place[2]
        for epoch in itertools.count(begin[0]):
            found = (epoch, 0, 0) < self.place  # the part before the place had some
            for number, block in enumerate(self._blocks()):
                if (epoch, number) < begin:
                    continue
                order = np.random.default_rng([self.s.finetune_seed, epoch, number]).permutation(len(block))
                order = order[self.process :: self.processes].tolist()
                for start in range(used if (epoch, number) == begin else 0, len(order), CHUNK):
                    chunk = order[start : start + CHUNK]
                    for behind, (example, item) in enumerate(self._encoded([block[i] for i in chunk]), start + 1):
                        if item is not None:
                            found = True
                            item = drop_views(item, self.s, epoch, example.id)
                            yield draw_spans(item, self.s, epoch, example.id), (epoch, number, behind)
            if not found:
                raise ExampleError(f"{self.path}: no usable example for process {self.process}")

    def _encoded(self, rows: list) -> list[tuple[Example | None, tuple[Segment, ...] | None]]:
        """An (example, item) for each row, (…, None) for a bad one that is skipped."""
        examples: list[Example | ValueError] = []
        for source, number, row in rows:
            try:
                examples.append(parse_example(row(), source, number, self.s.fields))
            except ValueError as error:
                examples.append(error)
        encoded = iter(encode(self.renderer, [e for e in examples if isinstance(e, Example)]))
        out = []
        for (source, _, _), example in zip(rows, examples, strict=True):
            item = next(encoded) if isinstance(example, Example) else example
            if isinstance(item, ValueError):
                self.problems.add(source, str(item))
            out.append((None, None) if isinstance(item, ValueError) else (example, item))
        return out
