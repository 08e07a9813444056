"""What must not change the numbers: the layout, padding, batch order; and what one text may not do to another."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from conftest import GOLDEN, MODELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finetune
from llm_jepa.data import batching, rendering, segments
from llm_jepa.data.examples import Example, Problems
from llm_jepa.model import load_model, load_tokenizer

text = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=30)
content = text.filter(lambda t: t.strip())
pair = st.builds(lambda s, u, a: Example(s, u, a, "rows:1", 1), content, content, content)
quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def model_and_tokenizer(name: str):
    s = finetune.Settings(model_name=str(GOLDEN / "models" / name))
    tokenizer = load_tokenizer(s)
    model = load_model(s, tokenizer).eval()
    return model, finetune.HeadInput(model), tokenizer


def items_of(name: str, examples: list[Example], k: int = 1, **flags) -> list[tuple[segments.Segment, ...]]:
    s = finetune.Settings(model_name=name, predictors=k, lm_labels="answer", max_length=1000, **flags)
    return batching.SegmentDataset(examples, rendering.Renderer(model_and_tokenizer(name)[2], s), Problems()).items


def score(name: str, items: list, layout: str, tokens_per_row: int = 64, distance: str = "cosine") -> dict:
    """Sums of both losses, the gradient of their means' sum, and the embeddings at views and labels."""
    model, head, tokenizer = model_and_tokenizer(name)
    batch = finetune.Collator(layout, tokenizer.pad_token_id, tokens_per_row)(items)
    logits, views = head.read(model, batch)
    lm, labels = finetune.lm_loss(logits, batch["label_ids"])
    jepa, pairs = finetune.jepa_loss(*views, distance)
    model.zero_grad()
    (lm / max(1, labels) + jepa / max(1, pairs)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"lm": lm / max(1, labels), "jepa": jepa / max(1, pairs), "gradient": gradient, "views": views.detach(),
            "logits": logits.detach(), "labels": labels, "pairs": pairs}  # fmt: skip


def assert_same(a: dict, b: dict) -> None:
    assert (a["labels"], a["pairs"]) == (b["labels"], b["pairs"])
    for loss in ("lm", "jepa"):
        torch.testing.assert_close(a[loss], b[loss], rtol=1e-5, atol=1e-6)
    difference = (a["gradient"] - b["gradient"]).abs()
    scale = b["gradient"].norm()
    assert difference.max() <= 1e-4 * scale and difference.mean() <= 1e-6 * scale


@pytest.mark.parametrize("name", MODELS)
@quick
@given(st.lists(pair, min_size=1, max_size=5), st.integers(0, 4), st.sampled_from([1, 40, 100, 5000]))
def test_layouts_agree(name, examples, k, tokens_per_row):
    items = items_of(name, examples, k)
    separate = score(name, items, "separate")
    assert_same(score(name, items, "additive"), separate)
    assert_same(score(name, items, "packed", tokens_per_row), separate)


@pytest.mark.parametrize("distance", sorted(finetune.DISTANCES))
@quick
@given(st.lists(pair, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_batch_order_and_padding_do_not_matter(distance, examples, random):
    items = items_of("chatml", examples)
    shuffled = random.sample(items, len(items))
    expected = score("chatml", items, "packed", 5000, distance)
    assert_same(score("chatml", [*shuffled, (), ()], "packed", 70, distance), expected)
    assert_same(score("chatml", shuffled, "separate", 0, distance), expected)


@pytest.mark.parametrize("layout", sorted(finetune.LAYOUTS))
@quick
@given(pair, pair, content)
def test_one_view_does_not_see_the_other(layout, example, other, changed):
    before = score("llama3", items_of("llama3", [example, other]), layout)
    code = score("llama3", items_of("llama3", [dataclasses.replace(example, assistant=changed), other]), layout)
    torch.testing.assert_close(code["views"][0], before["views"][0], rtol=1e-5, atol=1e-5)
    user = score("llama3", items_of("llama3", [dataclasses.replace(example, user=changed), other]), layout)
    torch.testing.assert_close(user["views"][1], before["views"][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", sorted(finetune.LAYOUTS))
@quick
@given(pair, pair, pair)
def test_one_example_does_not_see_another(layout, example, other, changed):
    items = items_of("llama3", [example, other])
    labels = int(items[0][0].labels.sum())
    before = score("llama3", items, layout)
    after = score("llama3", items_of("llama3", [example, changed]), layout)
    torch.testing.assert_close(after["logits"][:labels], before["logits"][:labels], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["views"][:, 0], before["views"][:, 0], rtol=1e-5, atol=1e-5)


def test_a_view_does_see_its_own_text():
    example = Example("s", "one", "two", "rows:1", 1)
    before = score("llama3", items_of("llama3", [example]), "packed")
    after = score("llama3", items_of("llama3", [dataclasses.replace(example, user="three")]), "packed")
    assert (after["views"][0] - before["views"][0]).abs().max() > 1e-2


@quick
@given(st.lists(pair, min_size=1, max_size=4))
def test_reading_only_what_is_needed_equals_the_models_own_forward(examples):
    model, head, tokenizer = model_and_tokenizer("chatml")
    items = items_of("chatml", examples, k=2)
    logits, views = (x.detach() for x in head.read(model, finetune.Collator("separate", 0, 0)(items)))
    first = 0
    for i, item in enumerate(items):
        outs = [model(torch.tensor(s.ids)[None], output_hidden_states=True) for s in item]
        targets = np.flatnonzero(item[0].labels[1:])
        full = outs[0].logits[0, targets].detach()
        torch.testing.assert_close(logits[first : first + len(targets)], full, rtol=1e-4, atol=1e-5)
        first += len(targets)
        for v in (0, 1):
            own = outs[1 + v].hidden_states[-1][0, item[1 + v].view].detach()
            torch.testing.assert_close(views[v, i], own, rtol=1e-4, atol=1e-5)


def test_the_head_leaves_other_forward_passes_alone():
    model, _, _ = model_and_tokenizer("llama3")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 531)
