"""The losses: pure functions of tensors that return (sum, count), and the registries that name them.

An entry of JEPA_LOSSES or STP_LOSSES is a value of --jepa_loss or --stp, the name in reports and the formula in --help
and in model cards. docs/extending.md says how to add one, or a loss of CHAT_LOSSES.

Letters in shape comments: P pairs, A pairs that they are contrasted with, D hidden size, V vocabulary, N label tokens,
S spans of K points each, M tokens with a next token, U random directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        """torch, imported at its first use: settings.py reads the registries before the slow imports."""

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()


def lm_loss(logits: torch.Tensor, label_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum, count) of the next-token cross-entropy in nats: logits (N, V), label_ids (N,)."""
    return torch.nn.functional.cross_entropy(logits.float(), label_ids, reduction="sum"), len(label_ids)


# --------------------------------------------------------------------------------------- losses of pairs of views


class ContrastSet(NamedTuple):
    """The pairs of which a contrastive loss is computed, and those that they are contrasted with.

    The first P of the A pairs are those of all ranks, in rank order; each has a loss. The other A − P are those of the
    queue.
    """

    views: torch.Tensor  # (2, A, D), with gradient only to this rank's own pairs
    not_negatives: torch.Tensor  # (P, A) bool, True for the pair itself: see find_not_negatives


def find_not_negatives(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Which pairs must not be contrasted with each other: view_ids (3, P) and (3, A) → (P, A).

    They have the same Text or the same Code, or with --shuffle_pairs one has the Code that the other's Text has in the
    data. A pair is none of its own negatives.
    """
    first, second, true = ids[:, :, None]  # (P, 1) each
    other_first, other_second, other_true = others[:, None]  # (1, A) each
    return (first == other_first) | (second == other_second) | (true == other_second) | (second == other_true)


def _similarities(views: torch.Tensor, others: ContrastSet, temperature: float) -> torch.Tensor:
    """cos / τ of each first view to all second views, (2, P, D) → (P, A); −inf to those that are no negatives."""
    first = torch.nn.functional.normalize(views[0], dim=-1)  # (P, D)
    second = torch.nn.functional.normalize(others.views[1], dim=-1)  # (A, D)
    logits = first @ second.T / temperature  # (P, A)
    own = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)  # (P, A)
    return logits.masked_fill(others.not_negatives & ~own, -torch.inf)


def _infonce(views: torch.Tensor, others: ContrastSet, temperature: float) -> torch.Tensor:
    logits, own = _similarities(views, others, temperature), torch.arange(views.shape[1], device=views.device)
    return torch.nn.functional.cross_entropy(logits, own, reduction="sum")  # (P, A), (P,) → ()


def _clip(views: torch.Tensor, others: ContrastSet, temperature: float) -> torch.Tensor:
    back = others._replace(views=others.views.flip(0))
    return (_infonce(views, others, temperature) + _infonce(views.flip(0), back, temperature)) / 2


def _vicreg(views: torch.Tensor, others: ContrastSet, temperature: float) -> torch.Tensor:
    invariance = (views[0] - views[1]).square().mean(dim=-1).sum()  # (P, D) → (P,) → ()
    if views.shape[1] < 2:  # a single pair has no variance
        return invariance
    centred = views - views.mean(dim=1, keepdim=True)  # (2, P, D)
    covariance = centred.mT @ centred / (views.shape[1] - 1)  # (2, D, D)
    variances = covariance.diagonal(dim1=1, dim2=2)  # (2, D)
    variance = torch.relu(1 - (variances + 1e-4).sqrt()).mean()  # (2, D) → ()
    off_diagonal = (covariance.square().sum() - variances.square().sum()) / views.shape[2]
    return invariance + views.shape[1] * (variance + 0.04 * off_diagonal)


@dataclass(frozen=True)
class JepaLoss:
    """A loss of pairs of views a and b (--jepa_loss): its formula, and the sum over pairs."""

    formula: str
    loss: Callable[[torch.Tensor, ContrastSet, float], torch.Tensor]  # views (2, P, D), set, temperature → ()
    temperature: float | None = None  # the default of --temperature, None without
    contrasts: bool = False  # whether it depends on other pairs


# Sources: cosine, l2, mse and infonce are the paper's (arXiv 2509.14252, section 3.1 and the ablations), clip is
# arXiv 2103.00020, vicreg arXiv 2105.04906 with its weights 25 : 25 : 1, as in the authors' code.
JEPA_LOSSES = {
    "cosine": JepaLoss("1 − cos(a, b)", lambda v, _, t: (1 - torch.cosine_similarity(*v, dim=-1)).sum()),
    "l2": JepaLoss("‖a − b‖₂", lambda v, _, t: torch.linalg.vector_norm(v[0] - v[1], dim=-1).sum()),
    "mse": JepaLoss("mean of (a − b)²", lambda v, _, t: (v[0] - v[1]).square().mean(dim=-1).sum()),
    "infonce": JepaLoss("InfoNCE of cos / τ, Text → Code", _infonce, 0.07, contrasts=True),
    "clip": JepaLoss("InfoNCE of cos / τ in both directions", _clip, 0.1, contrasts=True),
    "vicreg": JepaLoss("mse + Σ of both views' (variance hinge / 2 + 0.04 covariance)", _vicreg, contrasts=True),
}
TEMPERATURES = {name: entry.temperature for name, entry in JEPA_LOSSES.items() if entry.temperature}


def jepa_loss(
    views: torch.Tensor, name: str = "cosine", others: ContrastSet | None = None, *, temperature: float | None = None,
    stop_gradient: int | None = None, center: bool = False,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """(sum, count) over pairs of a loss of JEPA_LOSSES, from the views' embeddings (2, P, D).

    `others` has the pairs to contrast with, by default these. No gradient flows into view `stop_gradient` (0 or 1), by
    default it flows into both. `center` subtracts each view's mean over the pairs of all ranks. Without pairs the sum
    is 0 but still part of the graph.

    Every rank computes the loss of all ranks' pairs. The value returned is P / (all ranks' P) of it; the gradient is
    the complete gradient with respect to this rank's views.
    """
    count = views.shape[1]
    if others is None:
        others = ContrastSet(views, torch.eye(count, dtype=torch.bool, device=views.device))
    views = others.views.float()  # (2, A, D)
    total = len(others.not_negatives)
    if total == 0:
        return views.sum() * 0, 0
    if stop_gradient is not None:
        views = torch.stack([v.detach() if i == stop_gradient else v for i, v in enumerate(views)])
    if center:
        centred = views - views[:, :total].mean(dim=1, keepdim=True)
        if name in ("cosine", *TEMPERATURES):
            # A view at the mean has no direction; the gradient of its cosine would be divided by a rounding error.
            centred = centred * (centred.norm(dim=-1, keepdim=True) > 1e-5 * views.norm(dim=-1, keepdim=True))
        views = centred
    entry = JEPA_LOSSES[name]
    loss = entry.loss(views[:, :total], others._replace(views=views), temperature or entry.temperature)
    return loss - (1 - count / total) * loss.detach(), count


KNOTS = 17  # at which SIGReg compares characteristic functions, from 0 to 3


def moments(points: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Sums over points of cos and sin of t · projection: points (2, P, D), directions (D, U) → (2, 2, KNOTS, U).

    The first axis is cos and sin, the second the view.
    """
    knots = torch.linspace(0, 3, KNOTS, device=points.device)[:, None, None]  # (KNOTS, 1, 1)
    angles = knots * (points.float() @ directions)[:, None]  # (2, 1, P, U) → (2, KNOTS, P, U)
    return torch.stack([angles.cos().sum(dim=2), angles.sin().sum(dim=2)])


def sigreg_loss(
    points: torch.Tensor, directions: torch.Tensor, rest_of_step: tuple[torch.Tensor, int] | None = None
) -> tuple[torch.Tensor, int]:
    """(sum, count) over pairs of SIGReg (arXiv 2511.08544): the distance of both views' embeddings from N(0, 1).

        N · mean over directions of ∫ φ(t) · ((mean cos(t·u) − φ(t))² + (mean sin(t·u))²) dt,   φ(t) = exp(−t²/2)

    The integral is over [−3, 3]: twice that over [0, 3], by the trapezoidal rule. u are the projections of points
    (2, P, D) on unit directions (D, U). The distance is averaged over the two views.

    N is the number of all pairs of the optimizer step. `rest_of_step` has the moments and the number of those that are
    not among these P, without gradient. The value returned is P times the distance; the gradient is that of N times the
    distance with respect to these points.
    """
    count = points.shape[1]
    total, n = moments(points, directions), count
    if rest_of_step is not None:
        total, n = total + rest_of_step[0], count + rest_of_step[1]
    knots = torch.linspace(0, 3, KNOTS, device=points.device)  # (KNOTS,)
    normal = (-knots.square() / 2).exp()  # (KNOTS,)
    cos, sin = total / max(1, n)  # (2, KNOTS, U) each
    error = (cos - normal[:, None]).square() + sin.square()  # (2, KNOTS, U)
    value = n * 2 * torch.trapezoid(normal[:, None] * error, knots, dim=1).mean()  # (2, U) → ()
    return n * value - (n - count) * value.detach(), count


# ----------------------------------------------------------------------- losses of hidden states along the chat


def _geodesic(path: torch.Tensor) -> torch.Tensor:
    first, second = path.diff(dim=0)  # (3, S, D) → (2, S, D) → (S, D) each
    return 1 - torch.cosine_similarity(second, first, dim=-1)  # (S,)


def _patch(path: torch.Tensor) -> torch.Tensor:
    # The points are, in each of two parts (the user turn and the answer): before the part, before the span, the span's
    # last, the part's last. The changes between them are summed over the parts.
    parts = path.unflatten(0, (2, 4))  # (8, S, D) → (2, 4, S, D)
    before, inside, after = parts.diff(dim=1).sum(dim=0)  # → (2, 3, S, D) → (3, S, D) → (S, D) each
    return 1 - torch.cosine_similarity(inside, before + after, dim=-1)  # (S,)


@dataclass(frozen=True)
class StpLoss:
    """A variant of Semantic Tube Prediction (--stp), from the hidden states (K, S, D) of one layer at K points."""

    formula: str
    points: int  # K
    loss: Callable[[torch.Tensor], torch.Tensor]  # (K, S, D) → (S,)


# arXiv 2602.22617: geodesic is the paper's formula, 0 on a straight path; patch that of the released code.
STP_LOSSES = {
    "geodesic": StpLoss("1 − cos(h_t − h_r, h_r − h_s) for random tokens s < r < t", 3, _geodesic),
    "patch": StpLoss(
        "1 − cos(change of the hidden state along a random span, change along the rest of the chat)", 8, _patch
    ),
}


def stp_loss(path: torch.Tensor, variant: str) -> tuple[torch.Tensor, int]:
    """(sum, count) over spans of a loss of STP_LOSSES, from hidden states (K, S, D) of one layer.

    Gradients flow into all points. Without spans the sum is 0 but still part of the graph.
    """
    return STP_LOSSES[variant].loss(path.float()).sum(), path.shape[1]


NITP_FORMULA = "1 − cos(P(h_t), sg(z_{t+1})), P a SwiGLU projector, z the hidden state of a lower layer"


def shuffled(states: torch.Tensor) -> torch.Tensor:
    """The rows of states (M, D) in a random order that depends only on M."""
    # Not at a fixed offset, where chats of similar lengths have the same tokens of the chat template.
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))
    return states[order.to(states.device)]


def nitp_loss(predicted: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum, count) over tokens of 1 − cos(P(h_t), sg(z_{t+1})), from (M, D) each (arXiv 2605.24956)."""
    return (1 - torch.cosine_similarity(predicted.float(), target.detach().float(), dim=-1)).sum(), len(predicted)


# The losses that --regular and the JEPA loss can be combined with, by the name of their Term: the title in run logs and
# model cards, and the formula, or the formulas of the values of --NAME. Their flags: CHAT_FLAGS in settings.py.
CHAT_LOSSES: dict[str, tuple[str, str | dict[str, str]]] = {
    "stp": ("Semantic Tube Prediction", {name: f"{name}: {entry.formula}" for name, entry in STP_LOSSES.items()}),
    "nitp": ("NITP", NITP_FORMULA),
}


# --------------------------------------------------------------------------------------------------- objective

COUNTS = ("labels", "pairs", "spans", "next_tokens")  # the order of a batch's `counts`


class Term(NamedTuple):
    """An auxiliary loss. Its name is the prefix of its log keys."""

    name: str
    reads: tuple[str, ...]  # the fields of States that `loss` takes
    divisor: str  # one of COUNTS: what its sum is divided by
    loss: Callable[..., tuple[torch.Tensor, int]]  # of these fields → (sum (), count)
    weight: float
    warmup: float = 0.0  # steps of the weight's linear warm-up, or a fraction of all steps if below 1
    start_weight: float = 0.0  # at step 0, before the first step

    def weight_at(self, step: int, max_steps: int) -> float:
        """The weight at an optimizer step counted from 1."""
        steps = self.warmup if self.warmup >= 1 else self.warmup * max_steps
        return self.start_weight + (self.weight - self.start_weight) * min(1.0, step / max(1.0, steps))


def objective(
    lm_sum: torch.Tensor, states: Any, counts: torch.Tensor, gamma: float, terms: list[tuple[Term, float]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The loss gamma · L_LM + Σ weight · term, each term's unweighted sum by name, and the summands of the loss.

    `counts` (4,) are what the sums are divided by, in the order of COUNTS; in training they are those of the complete
    optimizer step, of which a micro-batch has a share. A pair that loss dropout removes is counted but adds nothing to
    the sum, so with --jepa_ratio r the expected weight of the JEPA term is λ·r, as published. It also is no other
    pair's negative, so the value of a contrastive loss changes beyond this factor.
    """
    sums, shares = {}, {"lm": gamma * lm_sum / counts[0]}
    for term, weight in terms:
        sums[term.name], _ = term.loss(*(getattr(states, name) for name in term.reads))
        shares[term.name] = weight * sums[term.name] / counts[COUNTS.index(term.divisor)]
    return sum(shares.values()), sums, shares
