"""Layouts: how the segments of a micro-batch are placed in rows, and which tokens attend to which.

A layout only decides where segments go; all layouts give the same losses. Letters in shape comments: R rows, T tokens
in a row, N label tokens, P pairs, S spans of K points each, M tokens with a next token, G segments and runs of padding.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_jepa.data.segments import Item, Segment

Row = list[Segment]


def packed_rows(items: list[Item], tokens_per_row: int) -> list[Row]:
    """Packs all segments into as few rows as a greedy search finds.

    A row has at most `tokens_per_row` tokens, or the longest segment's if that has more. All rows are padded to the
    longest, so segments are placed from the longest to the shortest, each in the row that is shortest so far.
    """
    segments = sorted((s for item in items for s in item), key=lambda s: -len(s.ids))
    lengths = [len(s.ids) for s in segments]
    budget = max(tokens_per_row, max(lengths, default=0))
    for count in range(math.ceil(sum(lengths) / budget), len(segments) + 1):
        rows: list[Row] = [[] for _ in range(count)]
        filled = [(0, r) for r in range(count)]
        for segment, length in zip(segments, lengths, strict=True):
            tokens, r = filled[0]
            rows[r].append(segment)
            heapq.heapreplace(filled, (tokens + length, r))
        if max(filled, default=(0, 0))[0] <= budget:
            break
    return rows if segments else []


def additive_rows(items: list[Item], tokens_per_row: int) -> list[Row]:
    """A row for each chat, and one that its views share."""
    parts = ([s for s in item if (s.kind == "chat") is chat] for item in items for chat in (True, False))
    return [part for part in parts if part]


# (items, tokens_per_row) → rows. separate: each segment has its own row.
LAYOUTS = {
    "separate": lambda items, _: [[segment] for item in items for segment in item],
    "additive": additive_rows,
    "packed": packed_rows,
}


@dataclass
class Collator:
    """Places the segments of a micro-batch in rows, padded to the longest. A call returns a dict:

    mask           how attention is restricted: "padding" (one segment per row, a 2D mask), "positions" (position_ids
                   restart) or "dense" (a T x T mask)
    boundaries     (G + 1,)   where segments and padding begin in the concatenated rows, and the end
    longest        int        length of the longest segment or run of padding
    input_ids      (R, T)
    position_ids   (R, T)     restart at 0 in each segment and in padding; a branch continues the stem's positions
    segment_ids    (R, T)     number of the token's segment in its row, −1 for padding
    branches       (2, R, T)  columns a and b: in its segment a token attends, causally, to columns < a and >= b;
                              a = b = 0: to all
    label_at       (2, N)     row and column of the hidden state that predicts each label
    label_ids      (N,)
    view_at        (2, 2, P)  row and column of the first view (of the Text, unless --reverse_pred) and of the second
    view_ids       (3, P)     of the first view, the second, and the one that the first has in the data (the second,
                              unless `shuffle_pairs`); equal for views with the same tokens
    path_at        (2, K, S)  row and column of each span's K = `points` points (0 without --stp)
    next_at        (2, M)     row and column of each chat token that a token of the chat follows (M = 0 without --nitp)
    counts         (4,)       N, the pairs before loss dropout (P without it), S, M
    tokens         (4,)       tokens of chats, text views (and predictor tokens in chats) and code views, and padding
    """

    layout: str
    pad_id: int
    tokens_per_row: int
    points: int = 0
    next_tokens: bool = False  # --nitp
    shuffle_pairs: bool = False  # pair each first view with the next pair's second view, if that is another one

    def rows(self, items: list[Item]) -> list[Row]:
        """The rows of these items."""
        return LAYOUTS[self.layout](items, self.tokens_per_row) or [[]]  # one empty row without items

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        items = list(items)  # a lazy sequence makes new segments at each read; `place` needs the same ones
        rows = self.rows(items)
        width = max(1, max(sum(len(s.ids) for s in row) for row in rows))
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)  # (R, T)
        positions = np.zeros((len(rows), width), dtype=np.int64)  # (R, T)
        segment_ids = np.full((len(rows), width), -1, dtype=np.int64)  # (R, T)
        branches = np.zeros((2, len(rows), width), dtype=np.int64)  # (2, R, T)
        place = {}  # id(segment) → (row, first column)
        for r, row in enumerate(rows):
            begin = 0
            for number, segment in enumerate(row):
                end = begin + len(segment.ids)
                ids[r, begin:end] = segment.ids
                segment_ids[r, begin:end] = number
                positions[r, begin:end] = segment.positions
                # Predictor tokens of a chat attend to the chat's stem and, causally, to one another.
                branches[:, r, end - segment.branch : end] = [[begin + segment.stem], [end - segment.branch]]  # (2, 1)
                place[id(segment)] = (r, begin)
                begin = end
            positions[r, begin:] = np.arange(width - begin)  # so that padding is separated from the last segment

        label_at, label_ids, next_at, views = [], [], [], ([], [])
        paths = [np.zeros((0, self.points, 2), dtype=np.int64)]  # keeps the shape if there are no spans
        tokens = dict.fromkeys(("chat", "text_view", "code_view"), 0)
        for item in items:
            for segment in item:
                r, begin = place[id(segment)]
                tokens[segment.kind] += len(segment.ids) - segment.branch
                tokens["text_view"] += segment.branch
                if segment.view is not None:
                    views[segment.kind == "code_view"].append((r, begin + segment.view, segment.view_id))
                if self.next_tokens and segment.kind == "chat":
                    next_at += [(r, begin + t) for t in range(len(segment.ids) - segment.branch - 1)]
                if self.points and segment.path is not None:
                    row = np.full_like(segment.path, r)
                    paths.append(np.stack([row, begin + segment.path], axis=-1))  # (S, K) → (S, K, 2)
                targets = np.flatnonzero(segment.labels[1:]) + 1  # the first token has no predecessor to predict it
                label_at += [(r, begin + t - 1) for t in targets]
                label_ids += segment.ids[targets].tolist()
        first, second = torch.tensor(views, dtype=torch.long).reshape(2, -1, 3)  # (P, 3) each: row, column, id
        true = second[:, 2]  # (P,)
        if self.shuffle_pairs:
            second = second.roll(-1, dims=0)
            kept = second[:, 2] != true  # the others are still true pairs
            first, second, true = first[kept], second[kept], true[kept]
        pairs = sum(item[0].paired for item in items if item)
        padding = ids.size - sum(tokens.values())
        dense = self.layout == "additive" or any(s.branch for row in rows for s in row)
        boundaries = np.append(np.flatnonzero(positions == 0), positions.size)
        path_at = torch.from_numpy(np.concatenate(paths)).permute(2, 1, 0)  # (S, K, 2) → (2, K, S)
        return {
            "mask": "dense" if dense else "padding" if self.layout == "separate" else "positions",
            "boundaries": torch.from_numpy(boundaries.astype(np.int32)),
            "longest": int(np.diff(boundaries).max()),
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "segment_ids": torch.from_numpy(segment_ids),
            "branches": torch.from_numpy(branches),
            "label_at": torch.tensor(label_at, dtype=torch.long).reshape(-1, 2).T,  # (N, 2) → (2, N)
            "label_ids": torch.tensor(label_ids, dtype=torch.long),  # (N,)
            "view_at": torch.stack([first[:, :2].T, second[:, :2].T], dim=1),  # (2, P) each → (2, 2, P)
            "view_ids": torch.stack([first[:, 2], second[:, 2], true]),  # (3, P)
            "path_at": path_at,
            "next_at": torch.tensor(next_at, dtype=torch.long).reshape(-1, 2).T,  # (M, 2) → (2, M)
            "counts": torch.tensor([len(label_ids), pairs, path_at.shape[2], len(next_at)]),
            "tokens": torch.tensor([*tokens.values(), padding]),
        }


def attention_mask(segment_ids: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Which tokens (rows of the mask) attend to which (columns), bool (R, T, T).

    From a batch's segment_ids (R, T) and branches (2, R, T).
    """
    stem_end, branch_start = branches[:, :, :, None]  # (R, T, 1) each
    column = torch.arange(segment_ids.shape[1], device=segment_ids.device)  # (T,)
    same_segment = segment_ids[:, :, None] == segment_ids[:, None]  # (R, T, 1), (R, 1, T) → (R, T, T)
    causal = column <= column[:, None]  # (T,), (T, 1) → (T, T)
    return same_segment & causal & ((column < stem_end) | (column >= branch_start))  # (R, T, T)
