"""The losses against their formulas, and their zero cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finetune
from llm_jepa.data import spans


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 7, generator=generator, requires_grad=True) for _ in range(2))


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
def test_distance_is_its_formula_and_reaches_both_views(pairs, distance):
    text, code = pairs
    total, count = finetune.jepa_loss(text, code, distance)
    expected = FORMULAS[distance](*(x.detach().double().numpy() for x in pairs))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count == 5
    total.backward()
    assert text.grad.abs().sum() > 0 and code.grad.abs().sum() > 0


@pytest.mark.parametrize("distance", sorted(finetune.DISTANCES))
def test_no_pairs_give_a_zero_with_a_graph(distance):
    text, code = (torch.zeros(0, 7, requires_grad=True) for _ in range(2))
    total, count = finetune.jepa_loss(text, code, distance)
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert text.grad is not None and code.grad is not None


def test_lm_loss_is_summed_cross_entropy():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    total, count = finetune.lm_loss(logits, torch.tensor([0, 2]))
    expected = -np.log(np.exp(2) / (np.exp(2) + 1 + np.exp(-1))) + np.log(3)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert count == 2


def test_no_labels_give_a_zero_with_a_graph():
    logits = torch.zeros(0, 3, requires_grad=True)
    total, count = finetune.lm_loss(logits, torch.zeros(0, dtype=torch.long))
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert logits.grad is not None


def test_losses_of_half_precision_are_summed_in_float32(pairs):
    text, code = (x.detach().to(torch.bfloat16) for x in pairs)
    assert finetune.jepa_loss(text, code)[0].dtype == torch.float32
    assert finetune.lm_loss(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1]))[0].dtype == torch.float32


def test_spread_is_zero_when_collapsed_and_one_when_orthogonal():
    collapsed = torch.ones(4, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    assert finetune.view_statistics(collapsed, collapsed)[1].item() == pytest.approx(0, abs=1e-5)
    assert finetune.view_statistics(torch.eye(4), torch.eye(4))[1].item() == pytest.approx(4)
    assert finetune.view_statistics(torch.eye(4), torch.eye(4))[0].item() == pytest.approx(4)
    assert finetune.view_statistics(torch.eye(4), -torch.eye(4))[0].item() == pytest.approx(-4)


def path(*points: tuple[float, float]) -> torch.Tensor:
    """(K, 1, 2)"""
    return torch.tensor(points)[:, None]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (((0, 0), (1, 1), (3, 3)), 0),
        (((1, 0), (2, 0), (0.5, 0)), 2),
        (((0, 0), (2, 0), (2, 5)), 1),
        (((5, 5), (6, 5), (7, 6)), 1 - 0.5**0.5),
    ],
    ids=["straight on", "reversal", "right angle", "half a right angle"],
)
def test_geodesic_is_one_minus_the_cosine_of_the_two_steps(points, expected):
    total, count = finetune.stp_loss(path(*points), "geodesic")
    assert (total.item(), count) == (pytest.approx(expected, abs=1e-6), 1)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # In the first part the patch moves by (2, 0), the rest by (1, 0) in front, (0, 1) behind, (0, 2) in the second.
        (((0, 0), (1, 0), (3, 0), (3, 1), (9, 9), (9, 9), (9, 9), (9, 11)), 1 - 1 / 10**0.5),
        # A patch over both parts: (1, 0) + (0, 1) against (0, −1) + (−1, 0).
        (((0, 0), (0, -1), (1, -1), (1, -1), (4, 4), (4, 4), (4, 5), (3, 5)), 2),
        (((0, 0), (1, 1), (2, 2), (3, 3), (0, 0), (0, 0), (0, 0), (0, 0)), 0),
    ],
    ids=["first part", "both parts", "straight on"],
)
def test_patch_is_one_minus_the_cosine_of_the_span_and_the_rest(points, expected):
    total, count = finetune.stp_loss(path(*points), "patch")
    assert (total.item(), count) == (pytest.approx(expected, abs=1e-6), 1)


@pytest.mark.parametrize("tube", sorted(finetune.TUBES))
def test_spans_are_summed_in_float32_and_reach_every_point_and_none_give_a_zero_with_a_graph(tube):
    k = spans.POINTS[tube]
    hidden = torch.randn(k, 6, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    total, count = finetune.stp_loss(hidden, tube)
    apart = [finetune.stp_loss(hidden[:, [i]], tube)[0].item() for i in range(6)]
    assert count == 6 and total.item() == pytest.approx(sum(apart), rel=1e-6)
    total.backward()
    assert (hidden.grad.abs().sum(dim=-1) > 0).all()
    assert finetune.stp_loss(hidden.detach().to(torch.bfloat16), tube)[0].dtype == torch.float32
    none = torch.zeros(k, 0, 7, requires_grad=True)
    total, count = finetune.stp_loss(none, tube)
    total.backward()
    assert (total.item(), count) == (0.0, 0) and none.grad is not None
