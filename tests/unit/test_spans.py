"""The spans of --stp: which are drawn, where they lie, and what decides the draws."""

import itertools
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from templates import dataset, encoder

from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.data.spans import Draws, draw_patch, draw_triple
from llm_jepa.losses import STP_LOSSES, stp_loss

EXAMPLES = read_examples(str(GOLDEN / "regex_rows.jsonl"), Problems())[:6]
PARTS = ((3, 7), (10, 13))  # seven tokens, with three tokens of the template between them
TOKENS = [3, 4, 5, 6, 10, 11, 12]


def encoded(name: str = "llama3", draws: Draws | None = None, **flags) -> SegmentDataset:
    return dataset(EXAMPLES, encoder(name, predictors=1, locate_user=True, **flags), draws)


def paths(data: SegmentDataset, epoch: int = 0, batch: int = 6) -> list[list]:
    parts = [range(i, min(6, i + batch)) for i in range(0, 6, batch)]
    return [item[0].path.tolist() for part in parts for item in data[epoch, part]]


@pytest.mark.parametrize("longest", [99, 3])
def test_triples_of_the_allowed_length_are_drawn_uniformly(longest):
    every = [t for t in itertools.combinations(TOKENS, 3) if TOKENS.index(t[2]) - TOKENS.index(t[0]) <= longest]
    rng = np.random.default_rng(0)
    drawn = Counter(tuple(draw_triple(rng, PARTS, longest).tolist()) for _ in range(200 * len(every)))
    assert set(drawn) == set(every) and min(drawn.values()) > 140 and max(drawn.values()) < 270


@pytest.mark.parametrize("longest", [99, 2])
def test_every_span_but_the_complete_text_is_drawn(longest):
    rng, drawn = np.random.default_rng(0), set()
    for _ in range(3000):
        points = draw_patch(rng, PARTS, longest).reshape(2, 4)
        assert points[:, 0].tolist() == [2, 9] and points[:, 3].tolist() == [6, 12]
        assert (np.diff(points) >= 0).all()
        drawn.add(tuple(t for _, a, b, _ in points for t in range(a + 1, b + 1)))
    spans = [tuple(TOKENS[a:b]) for a in range(7) for b in range(a + 1, 8)]
    assert drawn == {span for span in spans if len(span) <= min(6, longest)}


@pytest.mark.parametrize("parts", [PARTS, ((4, 4), (6, 9)), ((2, 8),), ((0, 5),), ((0, 3), (3, 6))], ids=str)
def test_patch_loss_compares_the_steps_inside_a_span_with_the_other_steps(parts):
    hidden = np.random.default_rng(1).normal(size=(14, 5))
    tokens = [t for first, stop in parts for t in range(first, stop) if t > 0]  # the first token has no step
    steps = np.array([hidden[t] - hidden[t - 1] for t in tokens])
    for a in range(len(tokens)):
        for b in range(a + 1, min(len(tokens), a + len(tokens) - 1) + 1):
            inside, rest = steps[a:b].sum(axis=0), steps[:a].sum(axis=0) + steps[b:].sum(axis=0)
            expected = 1 - inside @ rest / np.linalg.norm(inside) / np.linalg.norm(rest)
            points = draw_patch(Mock(integers=Mock(side_effect=[a, b - 1])), parts, 99)
            loss, count = stp_loss(torch.from_numpy(hidden[points])[:, None], "patch")
            assert count == 1 and loss.item() == pytest.approx(expected, abs=1e-5), (a, b)


@pytest.mark.parametrize("parts", [((0, 0), (0, 0)), ((3, 4), (7, 8)), ((5, 6),)], ids=str)
def test_text_too_short_for_a_span_has_none(parts):
    rng, tokens = np.random.default_rng(0), sum(stop - first for first, stop in parts)
    assert draw_triple(rng, parts, 99) is None
    assert (draw_patch(rng, parts, 99) is None) == (tokens < 2)
    assert draw_triple(rng, ((0, 9),), 1) is None


@pytest.mark.parametrize("flags", [{}, {"jepa": False}, {"text_view": "in_chat"}, {"plain": True}], ids=str)
@pytest.mark.parametrize("part", ["content", "user", "answer", "chat"])
@pytest.mark.parametrize("variant", sorted(STP_LOSSES))
def test_spans_lie_in_their_part_of_the_chat(variant, part, flags):
    draws = Draws(42, stp_variant=variant, stp_part=part, stp_spans=20)
    for chat, *_ in encoded(draws=draws, **flags)[0, range(6)]:
        inside = {*range(*chat.user)} if part in ("content", "user") else set()
        inside |= {*range(*chat.answer)} if part in ("content", "answer") else set()
        inside = {*range(len(chat.ids) - chat.branch)} if part == "chat" else inside
        assert chat.path.shape == (20, STP_LOSSES[variant].points) and chat.path.min() >= 0
        if STP_LOSSES[variant].points == 3:
            assert {*chat.path.flatten().tolist()} <= inside and (np.diff(chat.path) > 0).all()
        else:  # the step of token t is read at t − 1 and t
            between = {t for s in chat.path.reshape(-1, 4).tolist() for t in range(s[0] + 1, s[3] + 1)}
            assert between == inside - {0}


@pytest.mark.parametrize("variant", sorted(STP_LOSSES))
def test_draws_depend_on_seed_epoch_and_example_only(variant):
    def drawn(seed: int = 42, spans: int = 3, ratio: float = 1.0, **flags) -> SegmentDataset:
        return encoded(draws=Draws(seed, ratio, variant, stp_spans=spans), **flags)

    first = paths(drawn())
    for batch in (1, 2, 5):
        assert paths(drawn(), batch=batch) == first
    for same in (drawn(jepa=False), drawn(ratio=0.5), drawn(text_view="in_chat")):
        assert paths(same) == first
    assert paths(drawn(spans=2)) == [path[:2] for path in first]
    assert paths(drawn(), epoch=1) != first and paths(drawn(seed=7)) != first
    assert len({str(path[0]) for path in first}) > 1
    assert encoded()[0, [0]][0][0].path is None
