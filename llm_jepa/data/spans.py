"""Random draws for each example: JEPA-loss dropout, and the tokens at which Semantic Tube Prediction reads a chat.

Each draw is decided by the seed, the epoch and the example's number, so layouts, batch sizes and ranks agree on it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_jepa.data.segments import Item, without_pair
from llm_jepa.losses import STP_LOSSES


@dataclass(frozen=True)
class Draws:
    """Applies the random draws to an item. The fields are flags of finetune.py.

    A fraction 1 − `jepa_ratio` of the examples loses its views: random JEPA-loss dropout (paper section 3.3). Each chat
    gets `stp_spans` spans as `Segment.path` (S, K), or none if it is too short.
    """

    seed: int
    jepa_ratio: float = 1.0
    stp_variant: str | None = None
    stp_part: str = "content"
    stp_spans: int = 1
    stp_max_length: int = 0

    def __call__(self, item: Item, epoch: int, number: int) -> Item:
        """The item of example `number` in an epoch."""
        keep = self.jepa_ratio >= 1 or np.random.default_rng([self.seed, epoch, number]).random() < self.jepa_ratio
        if not keep:  # a pair without a chat keeps its tokens, so that it still counts
            item = without_pair(item) or tuple(dataclasses.replace(segment, view=None) for segment in item)
        if self.stp_variant is None or not item or item[0].kind != "chat":
            return item
        chat = item[0]
        full = (0, len(chat.ids) - chat.branch)
        parts = {"content": (chat.user, chat.answer), "user": (chat.user,), "answer": (chat.answer,), "chat": (full,)}
        count = STP_LOSSES[self.stp_variant].points
        rng = np.random.default_rng([self.seed, epoch, number, 1])  # the 1 makes it independent of the dropout
        longest = self.stp_max_length or full[1]
        drawn = [DRAWS[count](rng, parts[self.stp_part], longest) for _ in range(self.stp_spans)]
        path = np.array([points for points in drawn if points is not None], dtype=np.int64)
        path = path.reshape(-1, count)  # (S, K)
        return (dataclasses.replace(chat, path=path), *item[1:])


def draw_triple(rng: np.random.Generator, parts: Sequence[tuple[int, int]], longest: int) -> np.ndarray | None:
    """Tokens s < r < t (3,) of the parts, t at most `longest` tokens after s; every such triple is equally likely.

    The parts, [first, stop) each, count as one text. Returns None if there is no such triple.
    """
    tokens = np.concatenate([np.arange(*part) for part in parts])
    reach = np.minimum(longest, np.arange(len(tokens))[::-1])  # tokens after each one that could be r or t
    pairs = reach * (reach - 1) / 2
    if not pairs.sum():
        return None
    first = rng.choice(len(tokens), p=pairs / pairs.sum())
    after = np.sort(rng.choice(reach[first], 2, replace=False))
    return tokens[[first, *(first + 1 + after)]]


def draw_patch(rng: np.random.Generator, parts: Sequence[tuple[int, int]], longest: int) -> np.ndarray | None:
    """Tokens (8,) at which a random span of the parts is read, four in each of two parts; None if there is no span.

    The span [a, b) has 1 to `longest` tokens of the parts as one text, but not all of them; a, then b, is drawn
    uniformly. The four tokens of a part are: the one before the part, the one before the span's share of the part, the
    last one of that share, and the part's last one. As in the released code, a token's step on the path goes from the
    token before it to itself, so text between the parts and a chat's first token have no step.
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


DRAWS = {3: draw_triple, 8: draw_patch}  # by the number of points of a loss of STP_LOSSES
