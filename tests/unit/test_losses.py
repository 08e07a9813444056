"""The losses against their formulas, their zero cases, and their weights in the objective's gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from templates import dataset, encoder, model, tokenizer

import finetune
from llm_jepa.data.examples import Example
from llm_jepa.data.spans import POINTS
from llm_jepa.training.trainer import view_statistics


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]


FORMULAS = {
    "cosine": lambda a, b: (1 - np.diag(cosines(a, b))).sum(),
    "jepa_l2": lambda a, b: np.sqrt(((a - b) ** 2).sum(axis=1)).sum(),
    "jepa_mse": lambda a, b: ((a - b) ** 2).mean() * len(a),
    "infonce": lambda a, b: sum(
        -row[i] / 0.07 + np.log(np.exp(row / 0.07).sum()) for i, row in enumerate(cosines(a, b))
    ),
}


@pytest.mark.parametrize("distance", sorted(finetune.DISTANCES))
def test_distance_equals_its_formula_and_has_gradient_in_both_views(distance):
    views = random(2, 5, 7)
    total, count = finetune.jepa_loss(views, distance)
    assert total.item() == pytest.approx(FORMULAS[distance](*views.detach().double().numpy()), rel=1e-5)
    assert count == 5
    total.backward()
    assert (views.grad.abs().sum(dim=-1) > 0).all()  # (2, P)


def test_lm_loss_is_summed_cross_entropy():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    total, count = finetune.lm_loss(logits, torch.tensor([0, 2]))
    expected = -np.log(np.exp(2) / (np.exp(2) + 1 + np.exp(-1))) + np.log(3)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert count == 2


LOSSES = {
    **{f"jepa {d}": (lambda x, d=d: finetune.jepa_loss(x, d), (2, 0, 7)) for d in finetune.DISTANCES},
    **{f"stp {v}": (lambda x, v=v: finetune.stp_loss(x, v), (POINTS[v], 0, 7)) for v in finetune.STP_VARIANTS},
    "lm": (lambda x: finetune.lm_loss(x, torch.zeros(len(x), dtype=torch.long)), (0, 7)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_score_gives_zero_with_gradient(name):
    loss, shape = LOSSES[name]
    empty = torch.zeros(shape, requires_grad=True)
    total, count = loss(empty)
    total.backward()
    assert (total.item(), count) == (0.0, 0) and empty.grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_summed_in_float32(name):
    loss, shape = LOSSES[name]
    assert loss(random(*(n or 3 for n in shape)).bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (((0, 0), (1, 1), (3, 3)), 0),
        (((1, 0), (2, 0), (0.5, 0)), 2),
        (((0, 0), (2, 0), (2, 5)), 1),
        (((5, 5), (6, 5), (7, 6)), 1 - 0.5**0.5),
        # In the first part the patch moves by (2, 0), the rest by (1, 0) before it, (0, 1) after it and (0, 2).
        (((0, 0), (1, 0), (3, 0), (3, 1), (9, 9), (9, 9), (9, 9), (9, 11)), 1 - 1 / 10**0.5),
        # A patch over both parts: (1, 0) + (0, 1) against (0, −1) + (−1, 0).
        (((0, 0), (0, -1), (1, -1), (1, -1), (4, 4), (4, 4), (4, 5), (3, 5)), 2),
        (((0, 0), (1, 1), (2, 2), (3, 3), (0, 0), (0, 0), (0, 0), (0, 0)), 0),
    ],
    ids=["straight", "reversal", "right angle", "45 degrees", "patch in one part", "in both parts", "straight patch"],
)
def test_stp_loss_is_one_minus_cosine_of_steps(points, expected):
    variant = {3: "geodesic", 8: "patch"}[len(points)]
    total, count = finetune.stp_loss(torch.tensor(points)[:, None], variant)
    assert (total.item(), count) == (pytest.approx(expected, abs=1e-6), 1)


@pytest.mark.parametrize("variant", sorted(finetune.STP_VARIANTS))
def test_stp_loss_sums_spans_and_has_gradient_in_every_point(variant):
    path = random(POINTS[variant], 6, 7)
    total, count = finetune.stp_loss(path, variant)
    single = [finetune.stp_loss(path[:, [i]], variant)[0].item() for i in range(6)]
    assert count == 6 and total.item() == pytest.approx(sum(single), rel=1e-6)
    total.backward()
    assert (path.grad.abs().sum(dim=-1) > 0).all()


def test_objective_weighs_each_term_and_divides_by_its_count_in_the_step():
    lm_sum, views, path = random(1).sum(), random(2, 4, 3), random(3, 5, 3)
    states = finetune.States(torch.zeros(0, 1), views, path)
    terms = [
        (finetune.Term("jepa", "views", "pairs", finetune.jepa_loss, 0), 0.3),
        (finetune.Term("stp", "path", "spans", lambda x: finetune.stp_loss(x, "geodesic"), 0), 0.7),
    ]
    loss, sums = finetune.objective(lm_sum, states, torch.tensor([10.0, 8.0, 5.0]), 0.5, terms)
    assert loss.item() == pytest.approx((0.05 * lm_sum + 0.3 / 8 * sums["jepa"] + 0.7 / 5 * sums["stp"]).item())
    got = torch.autograd.grad(loss, [lm_sum, views, path], retain_graph=True)
    want = [torch.tensor(0.05), *(torch.autograd.grad(sums[n], x)[0] for n, x in (("jepa", views), ("stp", path)))]
    for gradient, expected, weight in zip(got, want, (1, 0.3 / 8, 0.7 / 5), strict=True):
        torch.testing.assert_close(gradient, weight * expected)


@pytest.mark.parametrize("layout", sorted(finetune.LAYOUTS))
def test_loss_dropout_scales_the_term_by_the_fraction_of_pairs_that_it_leaves(layout):
    """Items with the same views: without the others' pairs the term has a fraction of its gradient."""
    items = dataset(4 * [Example("s", "Is it (a|b)?", "c d", "rows:1", 1)], encoder("llama3", predictors=1)).items[:]
    network, selector = model("llama3")

    def gradient(kept: int) -> tuple[torch.Tensor, torch.Tensor]:
        dropped = [*items[:kept], *((item[0].without_view,) for item in items[kept:])]
        batch = finetune.Collator(layout, tokenizer("llama3").pad_token_id, 64)(dropped)
        assert batch["counts"][1] == 4
        states = selector.read(network, batch)
        term = finetune.Term("jepa", "views", "pairs", lambda x: finetune.jepa_loss(x, "jepa_mse"), 1)
        loss, _ = finetune.objective(states.logits.sum() * 0, states, batch["counts"].clamp(min=1), 0, [(term, 2.0)])
        return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])

    (loss, full), *rest = (gradient(kept) for kept in (4, 3, 1, 0))
    assert full.norm() > 0
    for ratio, (part, parts) in zip((0.75, 0.25, 0), rest, strict=True):
        torch.testing.assert_close(part, ratio * loss, rtol=1e-4, atol=1e-6)
        assert (parts - ratio * full).norm() < 1e-4 * full.norm()


@pytest.mark.parametrize(
    ("warmup", "start", "expected"), [(0, 0, [2, 2, 2]), (4, 0, [0.5, 1, 2]), (0.2, 1, [1.5, 2, 2])]
)
def test_weight_warms_up_linearly(warmup, start, expected):
    term = finetune.Term("stp", "path", "spans", len, 2.0, warmup, start)
    assert [term.weight_at(step, 10) for step in (1, 2, 10)] == pytest.approx(expected)


def test_view_statistics_sum_cosines_and_spread():
    collapsed, eye = torch.ones(4, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None], torch.eye(4)
    for text, code, expected in ((collapsed, collapsed, (4, 0)), (eye, eye, (4, 4)), (eye, -eye, (-4, 4))):
        cosine, spread = view_statistics(torch.stack([text, code]))
        assert (cosine.item(), spread.item()) == (pytest.approx(expected[0]), pytest.approx(expected[1], abs=1e-5))
