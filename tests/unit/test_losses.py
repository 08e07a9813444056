"""The losses against their formulas, and their zero cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finetune


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
