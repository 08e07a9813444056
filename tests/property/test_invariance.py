"""What must not change the numbers: the layout, padding and order, and examples that have no part in a loss."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import FOLDERS, dataset, encoder, model, tokenizer

from llm_jepa.data.examples import Example
from llm_jepa.data.spans import Draws
from llm_jepa.layouts import LAYOUTS, Collator
from llm_jepa.losses import JEPA_LOSSES, jepa_loss, lm_loss

text = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=30)
# Hypothesis also draws the project's own strings, such as <|eot_id|> and </think>, which examples cannot consist of.
content = text.filter(lambda t: t.strip() and not re.search("<.+>", t))
pair = st.builds(lambda s, u, a: Example(s, u, a, "rows:1", 1), content, content, content)
quick = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
few = settings(quick, max_examples=4)
PAIRS = [Example("s", "one", "two", "rows:1", 1), Example(None, "Is it (a|b)?", "c d", "rows:2", 2)]


def items_of(name: str, examples: list[Example], k: int = 1, **flags) -> list:
    return dataset(examples, encoder(name, predictors=k, max_length=1000, **flags)).items[:]


def score(name: str, items: list, layout: str, tokens_per_row: int = 64, distance: str = "cosine") -> dict:
    """The mean losses, the gradient of their sum, and the views."""
    network, selector = model(name)
    batch = Collator(layout, tokenizer(name).pad_token_id, tokens_per_row)(items)
    states = selector.read(network, batch)
    labels, pairs = batch["counts"][:2].clamp(min=1)
    lm = lm_loss(states.logits, batch["label_ids"])[0] / labels
    jepa = jepa_loss(states.views, distance)[0] / pairs
    gradient = torch.autograd.grad(lm + jepa, list(network.parameters()))
    return {"counts": batch["counts"].tolist(), "lm": lm.detach(), "jepa": jepa.detach(),
            "gradient": torch.cat([g.flatten() for g in gradient]), "views": states.views.detach()}  # fmt: skip


def assert_same(a: dict, b: dict) -> None:
    assert a["counts"] == b["counts"]
    for loss in ("lm", "jepa"):
        torch.testing.assert_close(a[loss], b[loss], rtol=1e-5, atol=1e-6)
    difference, scale = (a["gradient"] - b["gradient"]).abs(), b["gradient"].norm()
    assert difference.max() <= 1e-4 * scale and difference.mean() <= 1e-6 * scale


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("name", FOLDERS)
@few
@given(st.lists(pair, min_size=1, max_size=4), st.sampled_from([1, 60, 5000]))
def test_layouts_agree(name, k, examples, tokens_per_row):
    items = items_of(name, examples, k)
    separate = score(name, items, "separate")
    for layout in {*LAYOUTS} - {"separate"}:
        assert_same(score(name, items, layout, tokens_per_row), separate)


MIXED = [
    *PAIRS,
    Example("s", "(d)", "e f", "rows:3", 3, history=("u", "a")),
    Example("s", "replay", "only", "rows:4", 4, pair=False),
    Example(None, None, None, "rows:5", 5, text="a view", code="[of] it"),
]


@pytest.mark.parametrize("distance", ["cosine", "clip"])
def test_examples_without_a_pair_or_a_chat_count_for_one_loss_only(distance):
    flags = {"lm_turns": "all"}
    items = items_of("llama3", MIXED, **flags)
    chats = items_of("llama3", MIXED[:4], **flags, jepa=False)
    pairs = items_of("llama3", MIXED[:3] + MIXED[4:], **flags)
    dropped = dataset(MIXED, encoder("llama3", predictors=1, **flags), Draws(0, 0.0))[0, range(5)]
    parts = (items, chats, pairs, dropped)
    mixed, of_chats, of_pairs, without = (score("llama3", part, "packed", 90, distance) for part in parts)
    assert mixed["counts"][1] == len(pairs)
    for loss, alone in (("lm", of_chats), ("jepa", of_pairs), ("lm", without)):
        torch.testing.assert_close(mixed[loss], alone[loss], rtol=1e-5, atol=1e-6)
    assert without["counts"] == mixed["counts"] and without["views"].shape[1] == 0
    for layout in {*LAYOUTS} - {"packed"}:
        assert_same(score("llama3", items, layout, 90, distance), mixed)
    assert len(items_of("llama3", MIXED, jepa=False)) == 4  # without the views


@pytest.mark.parametrize("distance", sorted(JEPA_LOSSES))
@quick
@given(st.lists(pair, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_order_and_padding_change_nothing(distance, examples, random):
    items = items_of("chatml", examples)
    shuffled = random.sample(items, len(items))
    expected = score("chatml", items, "packed", 5000, distance)
    assert_same(score("chatml", [*shuffled, (), ()], "packed", 70, distance), expected)
    assert_same(score("chatml", shuffled, "separate", 0, distance), expected)
