"""Segments: an example's chat and views as tokens, which of them are labels, and where a view is read.

Examples are tokenised once, in several processes where there are many, and kept on disk for the next run; a data set
too large for that is tokenised as it is read (`SegmentStream`). Both give micro-batches: tuples of segments an example.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError

from examples import Example, ExampleError, Problems, parse_example, read_rows
from rendering import Rendered, Renderer, predictor_token


@dataclass(frozen=True)
class Segment:
    """A chat or a view as tokens. `ids` and `labels` are (T,); `view` is where the view is read.

    A chat has no view, or with --text_view in_chat the Text view. Its predictor tokens then stand at the chat's end
    (the last `branch` tokens) but branch off behind its first `stem` tokens: they have the positions that follow those,
    see nothing else of the chat, and nothing else sees them.

    Of a chat `answer` is the [first, stop) of its answer's content, `user` that of its user turn's where the settings
    ask for it, and `path` (S, K) are the tokens at which --stp reads each of S spans, once they are drawn.
    """

    kind: Literal["chat", "text_view", "code_view"]
    ids: np.ndarray
    labels: np.ndarray
    view: int | None = None
    stem: int = 0
    branch: int = 0
    user: tuple[int, int] = (0, 0)
    answer: tuple[int, int] = (0, 0)
    path: np.ndarray | None = None

    @property
    def positions(self) -> np.ndarray:
        """Position ids (T,)."""
        trunk = np.arange(len(self.ids) - self.branch)
        return np.concatenate([trunk, self.stem + np.arange(self.branch)])

    @property
    def without_view(self) -> Segment:
        """The chat as regular fine-tuning has it."""
        end = len(self.ids) - self.branch
        rest = {"view": None, "stem": 0, "branch": 0}
        return dataclasses.replace(self, ids=self.ids[:end], labels=self.labels[:end], **rest)

    @property
    def text_view(self) -> Segment:
        """The Text view of a chat with one, as a segment of its own: what the view sees and no more."""
        end = len(self.ids) - self.branch
        ids = np.concatenate([self.ids[: self.stem], self.ids[end:]])
        return Segment("text_view", ids, np.zeros(len(ids), dtype=bool), len(ids) - 1)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (T,) and character offsets (T, 2) of texts that already hold their special tokens."""
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return [
        (np.asarray(i, dtype=np.int64), np.asarray(o, dtype=np.int64).reshape(-1, 2))
        for i, o in zip(out["input_ids"], out["offset_mapping"], strict=True)
    ]


def content_tokens(offsets: np.ndarray, r: Rendered) -> tuple[int, int]:
    """[first, stop): the tokens of a rendered text's content, by offsets (T, 2).

    Byte-level tokenizers trim white space off their offsets, so a token of spaces has no width; it belongs to what
    stands before it. Raises ValueError where a token holds both content and the template's own text.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside, behind = ends > r.start, (starts >= r.end) & (ends > starts)
    first = int(inside.argmax()) if inside.any() else len(starts)
    stop = int(behind.argmax()) if behind.any() else len(starts)
    if first >= stop:
        raise ValueError("no token of the content can be located")
    if r.text[starts[first] : r.start].strip() or r.text[r.end : max(ends[first:stop])].strip():
        raise ValueError("a token joins the content with the chat template's text, so it cannot be located")
    return first, stop


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens."""
    return set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def label_tokens(tokenizer: Any, scope: str, ids: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Which tokens (T,) are labels: --lm_labels. Raises ValueError where no special token ends the answer."""
    labels = np.zeros(len(ids), dtype=bool)
    if scope == "all":
        return ~labels
    if scope == "reference":
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return ids != pad
    if scope == "answer":
        special = special_ids(tokenizer)
        ends = [t for t in range(stop, len(ids)) if int(ids[t]) in special]
        if not ends:
            raise ValueError(
                "the chat template ends the answer without a special token, so a model could not learn to stop; "
                "mend the template or give --lm_labels answer_text"
            )
        stop = ends[0] + 1
    labels[first:stop] = True
    return labels


def encode_chats(renderer: Renderer, examples: list[Example]) -> list[Segment | ValueError]:
    """The chat segment of each example, or why there is none."""
    return _encode(renderer, "chat", [_try(renderer.chat, e) for e in examples])


def encode_views(renderer: Renderer, examples: list[Example]) -> list[tuple[Segment | ValueError, ...]]:
    """The two view segments of each example, or why there are none."""
    views = [_try(renderer.views, e) for e in examples]
    first, second = ([v if isinstance(v, ValueError) else v[i] for v in views] for i in (0, 1))
    return list(zip(_encode(renderer, "text_view", first), _encode(renderer, "code_view", second), strict=True))


def _try(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        return error
    except TemplateError as error:
        return ValueError(f"the chat template refuses the example ({error})")


def _encode(renderer: Renderer, kind: str, texts: list[Rendered | ValueError]) -> list[Segment | ValueError]:
    s, tokenizer = renderer.s, renderer.tokenizer
    tokens = iter(_tokenize(tokenizer, [r.text for r in texts if isinstance(r, Rendered)] or [""]))

    def segment(rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> Segment:
        if len(ids) > s.max_length:
            raise ValueError(f"the {kind.replace('_', ' ')} has {len(ids)} tokens, over --max_length {s.max_length}")
        first, stop = content_tokens(offsets, rendered)
        if kind == "chat":
            labels = label_tokens(tokenizer, s.lm_labels, ids, first, stop)
            turns = {"answer": (first, stop)}
            if rendered.user is not None:
                turns["user"] = content_tokens(offsets, Rendered(rendered.text, *rendered.user))
            if s.text_view == "alone":
                return Segment("chat", ids, labels, **turns)
            stem = turns["user"][1]
            branch = tokenizer.convert_tokens_to_ids([predictor_token(i) for i in range(s.predictors, 0, -1)])
            ids = np.concatenate([ids, np.asarray(branch, dtype=np.int64)])
            labels = np.concatenate([labels, np.zeros(len(branch), dtype=bool)])
            return Segment("chat", ids, labels, len(ids) - 1 if branch else stem - 1, stem, len(branch), **turns)
        view = stop - 1 if s.last_token is None else len(ids) + s.last_token
        if view < 0:
            raise ValueError(f"the {kind.replace('_', ' ')} has {len(ids)} tokens, no --last_token {s.last_token}")
        return Segment(kind, ids, np.zeros(len(ids), dtype=bool), view)

    return [r if isinstance(r, ValueError) else _try(segment, r, *next(tokens)) for r in texts]


def end_of_turn(renderer: Renderer) -> int | None:
    """Id of the special token that ends the assistant turn, None where the template has none."""
    s = dataclasses.replace(renderer.s, train_all=False, lm_labels="answer", text_view="alone", stp=None)
    segment = encode_chats(Renderer(renderer.tokenizer, s), [Example(None, "a", "b", "the chat template", 0)])[0]
    return None if isinstance(segment, ValueError) else int(segment.ids[segment.labels][-1])


# ---------------------------------------------------------------------------------------------------------- store

TEXTS = ("system", "user", "assistant", "text", "code")  # what of an example is encoded
ENCODING_FLAGS = ("plain", "train_all", "predictors", "front_pred", "reverse_pred", "text_view", "lm_labels",
                  "max_length", "last_token", "jepa", "locates_user")  # fmt: skip
KINDS = ("chat", "text_view", "code_view")
FEW = 5000  # examples; fewer are tokenised sooner than a cache is looked up
A_PROCESS = 10_000  # examples that are worth a process of their own


def encode(renderer: Renderer, examples: list[Example]) -> list[tuple[Segment, ...] | ValueError]:
    """Each example's segments, or why there are none.

    (chat,), (chat, text view, code view), or with --text_view in_chat (chat with a view, code view).
    """
    s, items = renderer.s, []
    chats = encode_chats(renderer, examples)
    views = encode_views(renderer, examples) if s.jepa else [()] * len(examples)
    for example, chat, pair in zip(examples, chats, views, strict=True):
        pair = pair[1:] if s.text_view == "in_chat" else pair
        bad = next((x for x in (chat, *pair) if isinstance(x, ValueError)), None)
        if bad is None and s.text_view == "in_chat" and example.text is not None:
            bad = ValueError("its Text view is no part of the chat, which --text_view in_chat needs")
        items.append(bad or ((chat, *pair) if pair else (chat.without_view,)))
    return items


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
    for name in ("segments.py", "rendering.py"):
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


# ------------------------------------------------------------------------------------------------------- data sets


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


POINTS = {"geodesic": 3, "patch": 8}  # tokens at which --stp reads a span


def draw_spans(item: tuple[Segment, ...], s: Any, epoch: int, number: int) -> tuple[Segment, ...]:
    """The item, its chat with --stp_spans random spans, or with none where it is too short for one.

    Decided, like `drop_views`, by seed, epoch and number of the example.
    """
    if not s.tube:
        return item
    chat = item[0]
    whole = (0, len(chat.ids) - chat.branch)
    parts = {"content": (chat.user, chat.answer), "user": (chat.user,), "answer": (chat.answer,), "chat": (whole,)}
    draw = {"geodesic": draw_triple, "patch": draw_patch}[s.tube]
    rng = np.random.default_rng([s.finetune_seed, epoch, number, 1])  # the 1 makes it another than that of drop_views
    drawn = [draw(rng, parts[s.stp_part], s.stp_max_length or whole[1]) for _ in range(s.stp_spans)]
    path = np.array([points for points in drawn if points is not None], dtype=np.int64)
    return (dataclasses.replace(chat, path=path.reshape(-1, POINTS[s.tube])), *item[1:])  # (S, K)


def draw_triple(rng: np.random.Generator, parts: Sequence[tuple[int, int]], longest: int) -> np.ndarray | None:
    """Tokens s < r < t (3,) of the parts, t at most `longest` tokens behind s, each triple as likely as another.

    The parts, [first, stop) each, count as one text. None where there is no such triple.
    """
    tokens = np.concatenate([np.arange(*part) for part in parts])
    reach = np.minimum(longest, np.arange(len(tokens))[::-1])  # tokens behind each that could be r or t
    pairs = reach * (reach - 1) / 2
    if not pairs.sum():
        return None
    first = rng.choice(len(tokens), p=pairs / pairs.sum())
    behind = np.sort(rng.choice(reach[first], 2, replace=False))
    return tokens[[first, *(first + 1 + behind)]]


def draw_patch(rng: np.random.Generator, parts: Sequence[tuple[int, int]], longest: int) -> np.ndarray | None:
    """Tokens (8,) at which a random span of the parts is read, four in each of two parts; None without such a span.

    The span [a, b) has 1 to `longest` tokens of the parts as one text, but not all of them; a, then b, is drawn evenly.
    The four tokens of a part are the one in front of it, the one in front of what the span has of it, the last of that,
    and the part's last: as in the released code, a token's step on the path is from the one in front of it to itself,
    and what stands between the parts has none. Nor has a chat's first token.
    """
    parts = [(max(1, first), max(1, first, stop)) for first, stop in parts]
    count = sum(stop - first for first, stop in parts)
    if count < 2:
        return None
    while True:
        a = rng.integers(count)
        b = rng.integers(a, min(count, a + longest)) + 1
        if b - a < count:
            break
    points, begin = [], 0
    for first, stop in parts:
        inside = np.clip([begin, a, b, begin + stop - first], begin, begin + stop - first) - begin
        points.append(first - 1 + inside)
        begin += stop - first
    return np.concatenate([*points, np.zeros(8 - 4 * len(points), dtype=np.int64)])


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
