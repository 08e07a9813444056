"""Whether an auxiliary loss has learned its pairs: statistics of micro-batches, and the verdict on a run."""

import math
from typing import Any

import torch
import torch.nn.functional as F

PAIR_STATISTICS = ("cosine", "compared", "shuffled", "shuffled_variance", "retrieved", "chance")
MARGIN, NITP_MARGIN = 1.5, 0.1  # see judge_pairs and judge_predictions
MIN_COUNT = 50  # pairs or tokens that a judgement needs: the standard error of (c − s) / σ is then 0.14


@torch.no_grad()
def pair_statistics(views: torch.Tensor, not_negatives: torch.Tensor) -> torch.Tensor:
    """PAIR_STATISTICS of a micro-batch (6,), sums over pairs, from views (2, P, D) and find_not_negatives (P, P).

    cosine             cosines of the pairs
    compared           Texts that have negatives: Codes of other pairs, without those of `not_negatives`
    shuffled           for each of these the mean cosine of all Texts with their negatives
    shuffled_variance  the variance of these cosines
    retrieved          whether its own Code is nearer than its negatives; a share if several are equally near
    chance             the same if no Code were nearer than another: 1 / (1 + number of its negatives)
    """
    text, code = F.normalize(views.float(), dim=-1)  # (P, D) each
    cosines, is_negative = text @ code.T, ~not_negatives  # (P, P) each
    own, negatives = cosines.diagonal()[:, None], is_negative.sum(dim=1)  # (P, 1), (P,)
    compared, total = negatives > 0, negatives.sum().clamp(min=1)  # (P,), ()
    mean = (cosines * is_negative).sum() / total
    variance = ((cosines - mean).square() * is_negative).sum() / total
    nearer, ties = (((x & is_negative).sum(dim=1)) for x in (cosines > own, cosines == own))  # (P,) each
    retrieved = compared * (nearer == 0) / (1 + ties)
    n, chance = compared.sum(), compared / (1 + negatives)
    return torch.stack([(text * code).sum(), n, n * mean, n * variance, retrieved.sum(), chance.sum()])


@torch.no_grad()
def effective_rank(vectors: torch.Tensor) -> float:
    """exp of the entropy of the normalized singular values of the centred vectors (N, D): 1 to min(N − 1, D).

    It is the number of directions in which they vary (Roy and Vetterli, 2007); 0 if they are all equal.
    """
    vectors = vectors.cpu().double()  # on a GPU small decompositions are slow
    centred = vectors - vectors.mean(dim=0)
    products = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    if not singular.sum() > vectors.norm() * max(vectors.shape) * torch.finfo(torch.float32).eps:  # only rounding
        return 0.0
    shares = singular / singular.sum()
    return torch.special.entr(shares).sum().exp().item()


def gradient_statistics(losses: dict[str, torch.Tensor], parameters: list[torch.Tensor]) -> dict[str, float]:
    """For each loss () but the first, its gradient relative to the first's: the ratio of norms and the cosine."""

    def gradient(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)

    def dot(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> float:
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


def judged_lines(history: list[dict[str, Any]], max_steps: int, key: str, count: str) -> list[dict[str, Any]]:
    """The lines of the log history that a judgement uses: those with `key`, the newest first.

    They are the lines of the last tenth of the steps, and older ones until there are MIN_COUNT of `count` (a log key)
    in all. Lines of the first two fifths of the steps are not used; the result is empty if the others do not suffice.
    """
    lines, found, n = [line for line in history if "label_tokens" in line], [], 0
    starts = [0, *(line["step"] for line in lines)]  # a line is about the steps after `start`
    for start, line in reversed([*zip(starts, lines, strict=False)]):
        is_old = 10 * (lines[-1]["step"] - line["step"]) >= max_steps
        if 5 * start < 2 * max_steps or (is_old and n >= MIN_COUNT):
            break
        if key in line:
            found.append(line)
            n += line[count]
    return found if n >= MIN_COUNT else []


def retrieval_of(d: float, n: float) -> float:
    """The probability that a Text's own Code is the nearest of n, if all cosines are normal with standard deviation 1.

    ∫ φ(x − d) · Φ(x)ⁿ⁻¹ dx,   d: how far the mean cosine of pairs is above that of shuffled pairs
    """
    x = torch.linspace(-8, 8 + d, 4001, dtype=torch.float64)
    density = (-((x - d) ** 2) / 2).exp() / math.sqrt(2 * math.pi)
    return torch.trapezoid(density * torch.special.ndtr(x) ** (n - 1), x).item()


def judge_pairs(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the views tell pairs apart, from lines of judged_lines: `collapsed`, and the mean figures over all pairs.

    Let c be the mean cosine of pairs, s that of shuffled pairs, σ the standard deviation of the shuffled cosines of a
    micro-batch, r the retrieval over n pairs, and q its chance level. The term has not learned its pairs ("collapsed")
    if r is not above chance (one-sided: 2.3 % of the runs whose retrieval is at chance pass),

        r ≤ q + 2 · sqrt(q · (1 − q) / n),

    or if neither the cosines nor the retrieval reach the margin d = MARGIN:

        (c − s) / σ < d   and   r < retrieval_of(d, 1 / q).

    retrieval_of(1.5, 8) = .55 and retrieval_of(1.5, 2000) = .03, so a term has learned if a Text finds its Code among
    eight in more than half of the cases. Measured (c − s) / σ and r of five runs from random parameters, 1000 steps of
    8 SYNTH pairs (experiments/plans/terms.md): l2 −.3 to −.1 and .13; placebo and sigreg 0 and .11 to .18; cosine and
    mse .1 to .3 and .15 to .28; center 1.0 and .35 to .50; stop-gradient .4 to .8 and .51 to .64; vicreg 1.3 to 1.8
    and .77 to .93 (λ = .1), 3.0 to 3.5 and .99 (λ = 1); infonce 3.3 to 3.4, clip 3.8 to 4.4, both .99.
    """
    n = sum(line["pairs"] for line in lines)

    def mean(key: str, power: float = 1) -> float:
        return (sum(line[key] ** power * line["pairs"] for line in lines) / n) ** (1 / power)

    means = {key: mean(key) for key in ("cosine", "cosine_shuffled", "retrieval", "retrieval_chance", "effective_rank")}
    c, s, r, q, _ = means.values()
    sd = mean("cosine_shuffled_sd", 2)
    at_chance = r <= q + 2 * (q * (1 - q) / n) ** 0.5
    collapsed = at_chance or c - s < MARGIN * sd and r < retrieval_of(MARGIN, 1 / q)
    return {"collapsed": collapsed, "pairs": n, "cosine_shuffled_sd": sd} | means


def judge_predictions(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether NITP predicts the next token's state: not ("collapsed") if (c − s) / (1 − s) < NITP_MARGIN.

    From lines of judged_lines; also has the mean figures over all tokens. c is the mean cosine of prediction and
    target, s that with the targets of other tokens. For the best constant prediction c = s. Measured: .89 after 1000
    steps of models/tiny, .001 with targets of shuffled positions, which cannot be predicted.
    """
    n = sum(line["next_tokens"] for line in lines)
    keys = ("nitp_cosine", "nitp_cosine_shuffled")
    c, s = (sum(line[key] * line["next_tokens"] for line in lines) / n for key in keys)
    return {"collapsed": c - s < NITP_MARGIN * (1 - s), "next_tokens": n, "cosine": c, "cosine_shuffled": s}


JUDGED = {"jepa": ("cosine_shuffled", "pairs", judge_pairs),
          "nitp": ("nitp_cosine_shuffled", "next_tokens", judge_predictions)}  # fmt: skip


def judge(history: list[dict[str, Any]], max_steps: int) -> dict[str, dict[str, Any]]:
    """By term of JUDGED the judgement of its latest lines in the log history; without terms whose lines do not suffice.

    These are terms without weight, and the JEPA term if micro-batches have one pair. `grad_ratio` is the mean of all
    lines, if gradients were compared.
    """
    found = {}
    for term, (key, count, judgement) in JUDGED.items():
        if lines := judged_lines(history, max_steps, key, count):
            ratios = [line[f"{term}_grad_ratio"] for line in history if f"{term}_grad_ratio" in line]
            found[term] = judgement(lines) | ({"grad_ratio": sum(ratios) / len(ratios)} if ratios else {})
    return found


def judge_at(history: list[dict[str, Any]], line: dict[str, Any], max_steps: int) -> dict[str, dict[str, Any]]:
    """What `judge` says at a new line of the history; at the last one (train_runtime), of the steps taken."""
    return judge([*history, line], line["step"] if "train_runtime" in line else max_steps)


def announcements(history: list[dict[str, Any]], line: dict[str, Any], max_steps: int) -> dict[str, int]:
    """`TERM_collapsed` for each term that a new line of the history shows not to have learned, once in a history.

    Terms are judged at the first line after each tenth of the steps and at the end, which --early_stopping_patience can
    bring forward; `judged_lines` is empty before half of the steps.
    """
    before = next((x["step"] for x in reversed(history) if "label_tokens" in x), 0)
    if line["step"] * 10 // max_steps == before * 10 // max_steps and "train_runtime" not in line:
        return {}
    judged = judge_at(history, line, max_steps)
    failed = [f"{term}_collapsed" for term, found in judged.items() if found["collapsed"]]
    return {key: 1 for key in failed if not any(key in line for line in history)}
