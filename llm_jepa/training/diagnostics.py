"""Whether an auxiliary loss has learned its pairs: statistics of micro-batches, and the verdict on a run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

PAIR_STATISTICS = ("cosine", "contrasted", "shuffled", "shuffled_variance", "retrieved", "chance")


@torch.no_grad()
def pair_statistics(views: torch.Tensor) -> torch.Tensor:
    """PAIR_STATISTICS of a micro-batch's views (2, P, D), each a sum over pairs.

    cosine             cosines of the pairs
    contrasted         P, if there are other pairs to compare with; the following are 0 if there are none
    shuffled           mean cosine of a Text with the Codes of the other pairs
    shuffled_variance  variance of these cosines
    retrieved          whether the Text's nearest Code is its own; a share if several are equally near
    chance             the same if no Code were nearer than another, 1 / P
    """
    text, code = F.normalize(views.float(), dim=-1)  # (P, D) each
    total, cosines, p = (text * code).sum(), text @ code.T, len(text)  # (), (P, P)
    own = cosines.diagonal()  # (P,)
    if p < 2:
        return torch.stack([total, *own.new_zeros(5)])
    others = cosines[~torch.eye(p, dtype=torch.bool, device=views.device)]  # (P · (P − 1),)
    best = cosines == cosines.max(dim=1, keepdim=True).values  # (P, P)
    retrieved = (best.diagonal() / best.sum(dim=1)).sum()
    contrasted, one = own.new_tensor(p), own.new_ones(())
    sums = (total, contrasted, others.mean() * p, others.var(unbiased=False) * p, retrieved, one)
    return torch.stack(sums)


@torch.no_grad()
def effective_rank(vectors: torch.Tensor) -> float:
    """exp of the entropy of the normalized singular values of the centred vectors (N, D): 1 to min(N − 1, D).

    It is the number of directions in which they vary (Roy and Vetterli, 2007); 0 if they are all equal.
    """
    vectors = vectors.float()
    singular = torch.linalg.svdvals(vectors - vectors.mean(dim=0))
    if not singular.sum() > vectors.norm() * max(vectors.shape) * torch.finfo(vectors.dtype).eps:  # only rounding
        return 0.0
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp().item()


def gradient_statistics(losses: dict[str, torch.Tensor], parameters: list[torch.Tensor]) -> dict[str, float]:
    """For each loss but the first, its gradient relative to the first's: the ratio of norms and the cosine."""

    def gradient(loss: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return sum((x.float() * y.float()).sum() for x, y in zip(a, b, strict=True)).item()

    (_, first), *rest = losses.items()
    reference, logs = gradient(first), {}
    norm = dot(reference, reference) ** 0.5
    for name, loss in rest:
        own = gradient(loss)
        size = dot(own, own) ** 0.5
        logs[f"{name}_grad_ratio"] = size / max(norm, 1e-30)
        logs[f"{name}_grad_cosine"] = dot(own, reference) / max(size * norm, 1e-30)
        del own  # before the next one is computed
    return logs


def verdict(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Whether the views tell pairs apart, from lines of metrics.jsonl; None without pairs that could be contrasted.

    Let c be the mean cosine of pairs, s that of shuffled pairs, and σ the standard deviation of the shuffled cosines of
    a micro-batch. A term has not learned its pairs ("collapsed") if

        c − s < σ                            a true pair is no nearer than one of six shuffled pairs (normal: 16 %), or
        r ≤ q + 2 · sqrt(q · (1 − q) / n)    the retrieval r over n pairs is not above its chance level q (one-sided,
                                             2.3 % of all runs whose retrieval is at chance exceed it)
    """
    lines = [line for line in lines if line.get("cosine_shuffled") is not None]
    if not lines:
        return None
    n = sum(line["pairs"] for line in lines)

    def mean(key: str, power: float = 1) -> float:
        return (sum(line[key] ** power * line["pairs"] for line in lines) / n) ** (1 / power)

    c, s, sd = mean("cosine"), mean("cosine_shuffled"), mean("cosine_shuffled_sd", 2)
    r, q = mean("retrieval"), mean("retrieval_chance")
    collapsed = c - s < sd or r <= q + 2 * (q * (1 - q) / n) ** 0.5
    return {
        "collapsed": collapsed, "cosine": c, "cosine_shuffled": s, "cosine_shuffled_sd": sd, "retrieval": r,
        "retrieval_chance": q, "pairs": n,
    }  # fmt: skip
