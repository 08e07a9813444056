"""The losses against their formulas, the queue of pairs, and zero cases.

test_terms.py compares a training step of each term with these losses, and the logged loss with the weighted sum.
"""

import numpy as np
import pytest
import torch

from llm_jepa.losses import (
    JEPA_LOSSES,
    STP_LOSSES,
    ContrastSet,
    find_not_negatives,
    jepa_loss,
    lm_loss,
    nitp_loss,
    shuffled,
    sigreg_loss,
    stp_loss,
)
from llm_jepa.training.pairs import Contrast


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]


def cross_entropies(a: np.ndarray, b: np.ndarray, negatives: np.ndarray, temperature: float) -> float:
    """−log of the share of each a's own b in exp(cos / τ), among its own and its negatives."""
    total = 0.0
    for i, (row, allowed) in enumerate(zip(cosines(a, b) / temperature, negatives, strict=True)):
        total += np.log(np.exp(row)[allowed | (np.arange(len(b)) == i)].sum()) - row[i]
    return total


def vicreg(a: np.ndarray, b: np.ndarray) -> float:
    total = ((a - b) ** 2).mean() * len(a)
    for points in (a, b):
        covariance = np.cov(points.T)  # divides by P − 1
        hinge = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
        off_diagonal = (covariance[~np.eye(len(covariance), dtype=bool)] ** 2).sum() / len(covariance)
        total += len(a) * (hinge / 2 + 0.04 * off_diagonal)
    return total


# From the views a and b (P, D), those of the queue after them (A, D), the negatives (P, A) and the temperature.
FORMULAS = {
    "cosine": lambda a, b, *_: (1 - np.diag(cosines(a, b))).sum(),
    "l2": lambda a, b, *_: np.sqrt(((a - b) ** 2).sum(axis=1)).sum(),
    "mse": lambda a, b, *_: ((a - b) ** 2).mean() * len(a),
    "infonce": lambda a, b, all_a, all_b, negatives, t: cross_entropies(a, all_b, negatives, t),
    "clip": lambda a, b, all_a, all_b, negatives, t: (
        cross_entropies(a, all_b, negatives, t) + cross_entropies(b, all_a, negatives, t)
    ) / 2,
    "vicreg": lambda a, b, *_: vicreg(a, b),
}  # fmt: skip
TEMPERATURES = {"infonce": 0.07, "clip": 0.1}


def expected_loss(name: str, others: ContrastSet, temperature: float | None, center: bool) -> float:
    views, pairs = others.views.detach().double().numpy(), len(others.not_negatives)
    if center:
        views = views - views[:, :pairs].mean(axis=1, keepdims=True)
    t = temperature or TEMPERATURES.get(name, 1.0)
    return FORMULAS[name](*views[:, :pairs], *views, ~others.not_negatives.numpy(), t)


CENTER = pytest.mark.parametrize("center", [False, True], ids=["as-is", "center"])


# Ten pairs, of which the last two are of the queue: 0 has the Text of 4, 9 the Code of 3.
IDS = torch.tensor([[4, 1, 2, 3, 4, 5, 6, 7, 8, 9], *2 * [[20, 21, 22, 23, 24, 25, 26, 27, 28, 23]]])
EQUAL = torch.eye(8, 10, dtype=torch.bool)
EQUAL[0, 4] = EQUAL[4, 0] = EQUAL[3, 9] = True


def test_pairs_with_an_equal_text_or_an_equal_code_are_found():
    assert find_not_negatives(IDS[:, :8], IDS).equal(EQUAL)


def test_the_code_that_a_shuffled_text_has_in_the_data_is_no_negative():
    """Pair i has Text i and Code i + 1; the true Code of Text i is i, which pair i − 1 has."""
    ids = torch.tensor([[10, 11, 12, 13], [21, 22, 23, 24], [20, 21, 22, 23]])
    linked = torch.eye(4).bool() | torch.ones(4, 4).bool().triu(1).tril(1) | torch.ones(4, 4).bool().tril(-1).triu(-1)
    assert find_not_negatives(ids, ids).equal(linked)


@CENTER
@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("name", sorted(JEPA_LOSSES))
def test_loss_of_pairs_equals_its_formula_and_has_gradient_in_both_views(name, temperature, center):
    """Pairs are contrasted with those of the queue, too, except with an equal Text or Code."""
    options = {"temperature": temperature, "center": center}
    others = ContrastSet(random(2, 10, 7), EQUAL)
    total, count = jepa_loss(others.views[:, :8], name, others, **options)
    assert total.item() == pytest.approx(expected_loss(name, others, temperature, center), rel=1e-5) and count == 8
    (gradient,) = torch.autograd.grad(total, others.views)
    assert (gradient[:, :8].abs().sum(dim=-1) > 0).all()  # (2, P)
    if JEPA_LOSSES[name].temperature:
        unmasked = ContrastSet(others.views, torch.eye(8, 10, dtype=torch.bool))
        assert total < jepa_loss(others.views[:, :8], name, unmasked, **options)[0]


@CENTER
@pytest.mark.parametrize("detached", [0, 1])
@pytest.mark.parametrize("name", sorted(JEPA_LOSSES))
def test_stopped_gradient_is_zero_in_that_view_and_the_same_in_the_other(name, detached, center):
    views = random(2, 5, 7)
    total, _ = jepa_loss(views, name, stop_gradient=detached, center=center)
    full, _ = jepa_loss(views, name, center=center)
    assert total.item() == full.item()
    (got,), (want,) = torch.autograd.grad(total, views), torch.autograd.grad(full, views)
    assert not got[detached].any() and want[detached].any()
    torch.testing.assert_close(got[1 - detached], want[1 - detached])


@pytest.mark.parametrize("name", ["cosine", "infonce", "clip"])
def test_centered_pairs_with_one_text_have_no_gradient_of_rounding_errors(name):
    views = random(2, 4, 7).detach()
    views[0] = views[0, :1] + 1e-7 * random(4, 7, seed=1).detach()
    views.requires_grad_()
    (gradient,) = torch.autograd.grad(jepa_loss(views, name, center=True)[0], views)
    assert gradient.norm() < 100


def test_shuffled_states_are_not_those_at_the_same_place_of_other_chats():
    chats, length = 6, 220
    place = shuffled(torch.arange(chats * length)) % length
    assert (place == torch.arange(chats * length) % length).float().mean() < 0.02


# ------------------------------------------------------------------------------------------ other losses, and their sum


def sigreg(points: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Epps and Pulley's statistic, a mean over both views' projections, by the trapezoidal rule."""
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    normal, angles = (-(t**2) / 2).exp(), (points @ directions)[..., None] * t  # (2, P, K, 33)
    distance = (angles.cos().mean(dim=1) - normal) ** 2 + angles.sin().mean(dim=1) ** 2  # (2, K, 33)
    return points.shape[1] * torch.trapezoid(normal * distance, t).mean()


def test_sigreg_equals_its_formula():
    points, directions = random(2, 6, 5), torch.nn.functional.normalize(random(5, 3, seed=1).detach(), dim=0)
    total, count = sigreg_loss(points, directions)
    expected = sigreg(points.detach().double(), directions.double())
    assert count == 6 and total.item() == pytest.approx(6 * expected.item(), rel=1e-5)


def test_next_latent_loss_equals_its_formula_without_gradient_in_the_target():
    predicted, target = random(4, 7), random(4, 7, seed=1)
    total, count = nitp_loss(predicted, target)
    expected = (1 - np.diag(cosines(predicted.detach().numpy(), target.detach().numpy()))).sum()
    assert total.item() == pytest.approx(expected, rel=1e-5) and count == 4
    total.backward()
    assert (predicted.grad.abs().sum(dim=-1) > 0).all() and target.grad is None


# Variants of --stp, points and their loss.
STP_VALUES = {
    "straight": ("geodesic", ((0, 0), (1, 1), (3, 3)), 0),
    "reversal": ("geodesic", ((1, 0), (2, 0), (0.5, 0)), 2),
    "right angle": ("geodesic", ((0, 0), (2, 0), (2, 5)), 1),
    # In the first part the patch moves by (2, 0), the rest by (1, 0) before it, (0, 1) after it and (0, 2).
    "one part": ("patch", ((0, 0), (1, 0), (3, 0), (3, 1), (9, 9), (9, 9), (9, 9), (9, 11)), 1 - 1 / 10**0.5),
    # A patch over both parts: (1, 0) + (0, 1) against (0, −1) + (−1, 0).
    "both parts": ("patch", ((0, 0), (0, -1), (1, -1), (1, -1), (4, 4), (4, 4), (4, 5), (3, 5)), 2),
}


@pytest.mark.parametrize("name", STP_VALUES)
def test_stp_loss_of_points_on_a_path(name):
    variant, points, expected = STP_VALUES[name]
    total, count = stp_loss(torch.tensor(points)[:, None], variant)
    assert (total.item(), count) == (pytest.approx(expected, abs=1e-6), 1)


# ---------------------------------------------------------------------------------------------------- queue of pairs


def micro_batch(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(views, ids): pair i has views full of i and the ids i, 100 + i and 100 + i."""
    numbers = torch.arange(first, first + count)
    views = numbers[:, None].expand(2, count, 3).float().clone().requires_grad_()
    return views, torch.stack([numbers, 100 + numbers, 100 + numbers])


def test_queue_has_the_newest_pairs_first_without_gradient_and_equal_ones_are_no_negatives():
    contrast = Contrast(5)
    for first, count, queue in ((0, 2, []), (2, 2, [0, 1]), (4, 3, [2, 3, 0, 1]), (7, 6, [4, 5, 6, 2, 3]), (
        9, 2, [7, 8, 9, 10, 11])):  # fmt: skip
        views, ids = micro_batch(first, count)
        others = contrast(views, ids, training=True)
        numbers = [*range(first, first + count), *queue]
        assert others.views[0, :, 0].tolist() == numbers
        assert others.not_negatives.tolist() == [[i == j for j in numbers] for i in numbers[:count]]
        (gradient,) = torch.autograd.grad(others.views.sum(), views)
        assert gradient.equal(torch.ones_like(views))
    assert contrast.queue["views"][1, :, 0].tolist() == [9, 10, 7, 8, 9]
    assert not contrast.queue["views"].requires_grad


def test_an_evaluation_neither_reads_nor_changes_the_queue():
    contrast = Contrast(5)
    contrast(*micro_batch(0, 2), training=True)
    others = contrast(*micro_batch(2, 2), training=False)
    assert others.views[0, :, 0].tolist() == [2, 3] and others.not_negatives.shape == (2, 2)
    assert contrast.queue["ids"].tolist() == [[0, 1], [100, 101], [100, 101]]


# Each loss of one tensor, and the tensor's shape with 0 for what is counted.
LOSSES = {
    **{f"jepa {name}": (lambda x, n=name: jepa_loss(x, n), (2, 0, 7)) for name in JEPA_LOSSES},
    **{f"stp {name}": (lambda x, n=name: stp_loss(x, n), (loss.points, 0, 7)) for name, loss in STP_LOSSES.items()},
    "sigreg": (lambda x: sigreg_loss(x, torch.eye(7)), (2, 0, 7)),
    "nitp": (lambda x: nitp_loss(x, torch.ones(len(x), 7)), (0, 7)),
    "lm": (lambda x: lm_loss(x, torch.zeros(len(x), dtype=torch.long)), (0, 7)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_score_gives_zero_with_gradient(name):
    loss, shape = LOSSES[name]
    empty = torch.zeros(shape, requires_grad=True)
    total, count = loss(empty)
    total.backward()
    assert (total.item(), count) == (0.0, 0) and empty.grad is not None


@pytest.mark.parametrize("name", sorted(JEPA_LOSSES))
def test_single_pair_has_a_finite_loss_and_gradient(name):
    views = random(2, 1, 7)
    total, _ = jepa_loss(views, name)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(views.grad).all()
    assert (total.item() == 0) == (name in ("infonce", "clip"))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_summed_in_float32(name):
    loss, shape = LOSSES[name]
    assert loss(random(*(n or 3 for n in shape)).bfloat16())[0].dtype == torch.float32
