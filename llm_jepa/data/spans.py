"""Random spans of a chat at which Semantic Tube Prediction reads hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jepa.data.segments import Segment

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
