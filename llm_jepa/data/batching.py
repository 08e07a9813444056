"""Encoded examples and the micro-batches that they are grouped into."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import ENCODING_FLAGS, KINDS, TEXTS, Segment, encode, special_ids
from llm_jepa.data.spans import draw_spans

FEW = 5000  # examples; fewer are tokenised sooner than a cache is looked up
A_PROCESS = 10_000  # examples that are worth a process of their own


def encode_columns(columns: dict[str, list], renderer: Renderer) -> dict[str, list]:
    """`encode` for the map of `datasets`: columns of texts to the columns that its Arrow file holds."""
    texts = [dict(zip(TEXTS, values, strict=True)) for values in zip(*(columns[n] for n in TEXTS), strict=True)]
    rows: dict[str, list] = {"ids": [], "labels": [], "shapes": [], "error": []}
    for item in encode(renderer, [Example(**t, source="", id=0) for t in texts]):
        error, item = (str(item), ()) if isinstance(item, ValueError) else (None, item)
        rows["ids"].append(np.concatenate([x.ids for x in item] or [np.empty(0)]).astype(np.int32))
        rows["labels"].append(np.concatenate([x.labels for x in item] or [np.empty(0)]).astype(np.uint8))
        shapes = [
            (KINDS.index(x.kind), len(x.ids), -1 if x.view is None else x.view, x.stem, x.branch, *x.user, *x.answer)
            for x in item
        ]
        rows["shapes"].append(np.asarray(shapes, dtype=np.int32).reshape(-1))
        rows["error"].append(error)
    return rows


def cache_key(renderer: Renderer, examples: list[Example]) -> str:
    """Start of the SHA-256 of all that decides how examples are encoded: texts, tokenizer, flags, code, versions."""
    tokenizer, here = renderer.tokenizer, Path(__file__).parent
    digest = hashlib.sha256()
    what = {name: getattr(renderer.s, name) for name in ENCODING_FLAGS}
    what |= {"template": tokenizer.chat_template, "special": sorted(special_ids(tokenizer))}
    what |= {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token}
    what |= {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")}
    digest.update(json.dumps(what, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name in ("segments.py", "rendering.py", "batching.py"):
        digest.update((here / name).read_bytes())
    for example in examples:
        digest.update(repr([getattr(example, name) for name in TEXTS]).encode())
    return digest.hexdigest()[:32]  # `datasets` allows 64 characters, with what it adds for each process


def encode_all(renderer: Renderer, examples: list[Example], processes: int = 0, cached: bool = False) -> Any:
    """A `datasets.Dataset` of `encode_columns`' columns, a row an example.

    `processes`: 0 as many as the number of examples is worth and there are cores. `cached`: taken from, and kept in,
    the cache folder of `datasets`, unless there are few examples or the folder cannot be written.
    """
    import datasets

    text, numbers = datasets.Value("string"), {"ids": "int32", "labels": "uint8", "shapes": "int32"}
    data = datasets.Dataset.from_dict(
        {name: [getattr(e, name) for e in examples] for name in TEXTS},
        features=datasets.Features(dict.fromkeys(TEXTS, text)),
    )
    encoded = {name: datasets.LargeList(datasets.Value(kind)) for name, kind in numbers.items()} | {"error": text}
    processes = processes or min(len(examples) // A_PROCESS, len(os.sched_getaffinity(0)))
    run = partial(
        data.map, encode_columns, batched=True, remove_columns=list(TEXTS), features=datasets.Features(encoded),
        fn_kwargs={"renderer": renderer}, num_proc=processes if processes > 1 else None, desc="tokenise",
    )  # fmt: skip
    bar = contextlib.nullcontext() if len(examples) >= A_PROCESS else _no_bar(datasets)
    with bar, _no_threads() if processes > 1 else contextlib.nullcontext():
        if cached and len(examples) >= FEW:
            key = cache_key(renderer, examples)
            path = Path(datasets.config.HF_DATASETS_CACHE) / "llm-jepa" / f"{key}.arrow"
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                return run(cache_file_name=str(path), new_fingerprint=key)
        return run(keep_in_memory=True, load_from_cache_file=False, new_fingerprint="tokens")


@contextlib.contextmanager
def _no_bar(datasets: Any) -> Iterator[None]:
    """For what is done before a bar could be read."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _no_threads() -> Iterator[None]:
    """For processes that are forked here: a tokenizer's threads do not survive that, and would be waited for."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class Items(Sequence):
    """Encoded examples as tuples of segments, cut out of Arrow's columns where they are asked for."""

    def __init__(self, encoded: Any, rows: list[int]):
        """`encoded`: what `encode_all` gives; `rows`: which of them."""
        self._rows = np.asarray(rows, dtype=np.int64)
        columns = [encoded.data.column(name).combine_chunks() for name in ("ids", "labels", "shapes")]
        self._values = [c.values.to_numpy() for c in columns]
        self._offsets = [c.offsets.to_numpy() for c in columns]
        self.lengths = np.diff(self._offsets[0])[self._rows]  # tokens of each example

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, segments, begin = self._rows[index], [], 0
        ids, labels, shapes = (v[o[row] : o[row + 1]] for v, o in zip(self._values, self._offsets, strict=True))
        for kind, length, view, stem, branch, *turns in shapes.reshape(-1, 9).tolist():
            part = slice(begin, begin + length)
            view = None if view < 0 else view
            user, answer = tuple(turns[:2]), tuple(turns[2:])
            segments.append(Segment(KINDS[kind], ids[part], labels[part].view(bool), view, stem, branch, user, answer))
            begin += length
        return tuple(segments)


def without_views(item: tuple[Segment, ...]) -> tuple[Segment]:
    """What regular fine-tuning has of an example."""
    return (item[0].without_view,)


def drop_views(item: tuple[Segment, ...], s: Any, epoch: int, number: int) -> tuple[Segment, ...]:
    """The item, without its views where --jepa_ratio leaves it out: random JEPA-loss dropout (paper section 3.3).

    Decided by seed, epoch and number of the example, so that layouts, batch sizes and ranks agree on it and a dropped
    pair is never encoded by the model.
    """
    if s.jepa_ratio >= 1:
        return item
    draw = np.random.default_rng([s.finetune_seed, epoch, number]).random()
    return item if draw < s.jepa_ratio else without_views(item)


class SegmentDataset(torch.utils.data.Dataset):
    """Examples as tuples of segments (`encode`), asked for a micro-batch at a time by (epoch, indices).

    With `dropout` the items of --jepa_ratio's share alone have views.
    """

    def __init__(
        self, examples: list[Example], renderer: Renderer, problems: Problems, dropout: bool = False,
        processes: int = 0, cached: bool = False,
    ):  # fmt: skip
        """Raises ExampleError for an example that cannot be used, unless `problems` skips those."""
        encoded = encode_all(renderer, examples, processes, cached)
        self.s, self.dropout, good = renderer.s, dropout, []
        for row, error in enumerate(encoded["error"]):
            if error is None:
                good.append(row)
            else:
                problems.add(examples[row].source, error)
        if not good:
            raise ExampleError("no usable example is left: " + "; ".join(problems.messages[:3]))
        self.items, self.examples = Items(encoded, good), [examples[row] for row in good]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> list[tuple[Segment, ...]]:
        epoch, indices = key
        items = [(i, self.items[i]) for i in indices]
        items = [(i, drop_views(item, self.s, epoch, i) if self.dropout else item) for i, item in items]
        return [draw_spans(item, self.s, epoch, i) for i, item in items]


class MicroBatches(torch.utils.data.Sampler):
    """(epoch, indices) of each micro-batch, in an order decided by seed and epoch.

    A micro-batch has `batch_size` examples, or with `tokens` as many as have about so many tokens, at least one: the
    examples in their order are cut into parts of like total length, `tokens` on average at most. Their number is the
    same in each epoch and a multiple of the processes'; filling up with empty ones behind the others, instead of
    repeating examples, keeps every rank in step without counting an example twice.

    Micro-batches of `batch_size` that different processes have at the same time exchange examples until their tokens
    are about the same, so that no process waits for the one with the longest.
    """

    def __init__(
        self, lengths: np.ndarray, seed: int, shuffle: bool, processes: int = 1, batch_size: int = 1, tokens: int = 0
    ):
        self.lengths, self.seed, self.shuffle, self.batch_size, self.tokens = lengths, seed, shuffle, batch_size, tokens
        self.epoch, self.processes = 0, processes
        # Not more micro-batches than examples: a step of empty ones would move the weights by AdamW's moments alone.
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
            room = max(0, len(order) - len(self))  # examples beyond one for each
            cuts = np.maximum.accumulate(np.clip(cuts - numbers, 0, room)) + numbers
        else:
            cuts = np.arange(1, len(self)) * self.batch_size
            if self.processes > 1:
                order = self._balanced(order)
        yield from ((self.epoch, part.tolist()) for part in np.split(order, cuts))

    def _balanced(self, order: np.ndarray) -> np.ndarray:
        """The order with the examples that the processes have at the same time dealt out anew: each the next longest to
        whoever has the fewest tokens and still room. Each process has as many as before."""
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
