"""The statistics that show whether an auxiliary loss learns: against their formulas and on hand-made views."""

import numpy as np
import pytest
import torch

from llm_jepa.training.diagnostics import (
    PAIR_STATISTICS,
    effective_rank,
    gradient_statistics,
    pair_statistics,
    retrieval_of,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def means(text: torch.Tensor, code: torch.Tensor, not_negatives: torch.Tensor | None = None) -> dict[str, float]:
    """The statistics of a pair. By default all pairs are different."""
    same = torch.eye(len(text)).bool() if not_negatives is None else not_negatives
    found = pair_statistics(torch.stack([text, code]), same)
    return {k: v / len(text) for k, v in zip(PAIR_STATISTICS, found.tolist(), strict=True)}


@pytest.mark.parametrize(
    ("views", "shuffled", "retrieved"),
    [(torch.ones(4, 3), 1, 1 / 4), (torch.eye(4)[[0, 0, 1, 1]], 1 / 3, 1 / 2)], ids=["all", "in-twos"],
)  # fmt: skip
def test_equal_views_count_as_in_a_random_order(views, shuffled, retrieved):
    expected = {"cosine": 1, "shuffled": shuffled, "retrieved": retrieved, "chance": 1 / 4}
    got = means(torch.arange(1.0, 5)[:, None] * views, views)
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("linked", [(), ((0, 1), (2, 4), *((3, j) for j in range(5)))], ids=["all", "some"])
def test_pair_statistics_equal_their_formulas_over_the_negatives(linked):
    """With `linked` pair 3 has no negative; 0 and 1, and 2 and 4, are none of each other."""
    text, code, same = random(5, 4), random(5, 4, seed=3), torch.eye(5).bool()
    for i, j in linked:
        same[i, j] = same[j, i] = True
    cosines = np.array([[float(torch.cosine_similarity(a, b, dim=0)) for b in code] for a in text])
    negatives = ~same.numpy()
    found = [i for i in range(5) if negatives[i].any()]
    expected = {
        "cosine": np.diag(cosines).mean(), "compared": len(found) / 5,
        "shuffled": cosines[negatives].mean() * len(found) / 5,
        "shuffled_variance": cosines[negatives].var() * len(found) / 5,
        "chance": sum(1 / (1 + negatives[i].sum()) for i in found) / 5,
        "retrieved": sum(cosines[i, i] > cosines[i, negatives[i]].max() for i in found) / 5,
    }  # fmt: skip
    assert means(text, code, same) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["retrieved"] < expected["compared"]


@pytest.mark.parametrize("p", [0, 1])
def test_too_few_pairs_to_contrast_have_a_cosine_only(p):
    views = random(2, p, 5)
    expected = torch.cosine_similarity(*views, dim=-1).sum().item()
    assert pair_statistics(views, torch.eye(p).bool()).tolist() == [pytest.approx(expected, abs=1e-6), *[0] * 5]


@pytest.mark.parametrize(("d", "n"), [(0, 8), (1.5, 8), (1.5, 100)])
def test_retrieval_of_normal_cosines_equals_a_simulation(d, n):
    cosines = random(40_000, n)
    cosines[:, 0] += d
    assert retrieval_of(d, n) == pytest.approx((cosines.argmax(dim=1) == 0).float().mean().item(), abs=0.01)


def test_effective_rank_equals_its_formula():
    vectors = random(9, 4) * torch.tensor([5.0, 1, 1, 0.1])
    singular = np.linalg.svd(vectors.numpy() - vectors.numpy().mean(axis=0), compute_uv=False)
    shares = singular / singular.sum()
    assert effective_rank(vectors) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert effective_rank(random(1, 5).expand(7, 5)) == pytest.approx(0, abs=1e-3)  # equal except for rounding


def test_gradient_statistics_equal_autograd_by_hand():
    w, v = random(3, 4).requires_grad_(), random(2, seed=1).requires_grad_()
    losses = {
        "lm": w.square().sum() + v.sum(),
        "jepa": (w**3).sum(),  # does not depend on v
        "nitp": -3 * (w.square().sum() + v.sum()),
        "nothing": 0 * w.sum(),
    }
    lm = torch.cat([2 * w.detach().flatten(), torch.ones(2)])
    jepa = torch.cat([3 * w.detach().flatten() ** 2, torch.zeros(2)])
    got = gradient_statistics(losses, [w, v])
    assert got == pytest.approx({
        "jepa_grad_ratio": (jepa.norm() / lm.norm()).item(),
        "jepa_grad_cosine": torch.cosine_similarity(jepa, lm, dim=0).item(),
        "nitp_grad_ratio": 3, "nitp_grad_cosine": -1, "nothing_grad_ratio": 0, "nothing_grad_cosine": 0,
    }, rel=1e-5)  # fmt: skip
    assert w.grad is None and v.grad is None
    sum(losses.values()).backward()  # the graph is still there
