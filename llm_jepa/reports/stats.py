"""Two arms compared on the same seeds: paired differences, their tests, Holm's correction, and a verdict in words.

Scores and differences are in percent and percentage points. `compare` makes one comparison, `conclude` corrects all
comparisons of a table together and writes their verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.optimize
import scipy.stats

LEVEL, POWER = 0.05, 0.8
RESAMPLES = 2**16  # sign flips: all of them up to n = 16, beyond that as many drawn at random
ROUNDING = (
    9  # decimals: differences of scores that are equal in percent differ by float64's rounding, which is no spread
)


@dataclass
class Comparison:
    """One score of one arm less that of the reference arm, on the seeds that both have; what cannot be said is None."""

    arm: str
    reference: str
    score: str
    seeds: list[int]
    differences: list[float]
    arm_alone: list[int]  # seeds
    reference_alone: list[int]
    mean: float
    bound: float | None = None  # 0 or 100, where every run of both arms has it
    sd: float | None = None
    interval: tuple[float, float] | None = None  # of this comparison alone, 95 %
    p_two_sided: float | None = None
    p_one_sided: float | None = None  # against: the arm scores no higher
    p_sign_flip: float | None = None
    p_sign_flip_least: float | None = None  # what that test gives at the very least with so many seeds
    p_holm: float | None = None
    family: int = 0  # comparisons of the table
    detectable: float | None = None
    verdict: str = field(default="", repr=False)

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.seeds)

    @property
    def differs(self) -> bool:
        """Whether a difference is shown, by the corrected two-sided test."""
        return self.p_holm is not None and self.p_two_sided is not None and self.p_holm <= LEVEL


def compare(arm: str, reference: str, score: str, ours: dict[int, float], theirs: dict[int, float]) -> Comparison:
    """One comparison; `ours` and `theirs` map a seed to the score of the arm and of the reference.

    The interval and both t tests are Student's on the differences. One pair has no interval and no test. Equal
    differences have no t test either, whose statistic divides by their spread.

    Raises ValueError where no seed is in both.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        raise ValueError(f"no seed is in both {arm} and {reference}")
    a, b = np.array([ours[s] for s in seeds]), np.array([theirs[s] for s in seeds])
    differences = np.round(a - b, ROUNDING)
    alone = [s for s in ours if s not in theirs], [s for s in theirs if s not in ours]
    mean = float(differences.mean())
    made = Comparison(arm, reference, score, seeds, differences.tolist(), *alone, mean)
    made.bound = next((bound for bound in (0.0, 100.0) if (a == bound).all() and (b == bound).all()), None)
    if len(seeds) == 1:
        return made
    made.sd = float(differences.std(ddof=1)) if np.ptp(differences) else 0.0
    made.p_sign_flip, made.p_sign_flip_least = sign_flip(differences)
    if made.sd:
        half = float(scipy.stats.t.ppf(1 - LEVEL / 2, len(seeds) - 1)) * made.sd / math.sqrt(len(seeds))
        made.interval = (mean - half, mean + half)
        zeros = np.zeros_like(differences)
        made.p_two_sided = float(scipy.stats.ttest_rel(differences, zeros).pvalue)
        made.p_one_sided = float(scipy.stats.ttest_rel(differences, zeros, alternative="greater").pvalue)
    return made


def sign_flip(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """(two-sided p, the least p there can be) of the permutation test that gives each difference either sign.

    Exact up to 16 pairs, where the least p is 2 / 2ⁿ: 0.0625 for five seeds, so that it alone never shows anything at
    0.05 with five. It needs no normal distribution, only differences that are as likely of either sign.
    """
    values = np.asarray(differences, dtype=np.float64)
    found = scipy.stats.permutation_test(
        (values, np.zeros_like(values)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue), max(2 / 2 ** len(values), 2 / (RESAMPLES + 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's corrected p values, in the order given: the familywise error is at most 0.05 where 0.05 is asked of each.

    The i-th smallest of m (from 0) is multiplied by m − i, and is never below a smaller one's.
    """
    corrected, least = [0.0] * len(ps), 0.0
    for i, at in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - i) * ps[at]))
        corrected[at] = least
    return corrected


def power(difference: float, sd: float, n: int, level: float) -> float:
    """How often a two-sided paired t test shows a true difference > 0 as one, given the sd of the n differences."""
    critical, noncentral = scipy.stats.t.ppf(1 - level / 2, n - 1), difference * math.sqrt(n) / sd
    return float(scipy.stats.nct.sf(critical, n - 1, noncentral))


def detectable(sd: float, n: int, level: float = LEVEL) -> float:
    """The true difference that the test shows four times in five (noncentral t); a smaller one is missed more often."""
    high = sd
    while power(high, sd, n, level) < POWER:
        high *= 2
    return float(scipy.optimize.brentq(lambda d: power(d, sd, n, level) - POWER, 0, high, rtol=1e-6))


def conclude(comparisons: list[Comparison]) -> None:
    """Corrects a table's comparisons together and writes what follows from each.

    A comparison without a test stays in the family as one of p = 1: which have none depends on the data, and leaving
    those out would make the correction of the others too weak. A difference that is not shown was held against
    0.05 / (m − k), where k of m are shown: what could have been detected is by that level.
    """
    tested = [1.0 if c.p_two_sided is None else c.p_two_sided for c in comparisons]
    for c, p in zip(comparisons, holm(tested), strict=True):
        c.family, c.p_holm = len(comparisons), None if c.p_two_sided is None else p
    shown = sum(c.differs for c in comparisons)
    for c in comparisons:
        if c.sd and not c.differs:
            c.detectable = detectable(c.sd, c.n, LEVEL / (c.family - shown))
    for c in comparisons:
        c.verdict = verdict(c) + in_stopping(c, comparisons)


def p_text(p: float | None) -> str:
    """A p value to two digits, or a dash for a test there is none of."""
    return "–" if p is None else f"{p:.2g}" if p >= 0.0001 else "< 0.0001"


def points(value: float) -> str:
    """A difference with its sign, a true minus; what rounds to nothing has none."""
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def interval_text(c: Comparison) -> str:
    """`[low, high]`, or a dash where there is none."""
    return "–" if c.interval is None else "[{}, {}]".format(*(f"{x:.2f}".replace("-", "−") for x in c.interval))


def verdict(c: Comparison) -> str:
    """What the corrected two-sided test says, in words."""
    if c.n == 1:
        return f"nothing shown: {points(c.mean)} points on the one seed of both arms, which gives no interval, no test"
    if c.sd == 0:
        same = f"{points(c.mean)} points on each of the {c.n} seeds"
        if c.mean:
            return f"{same}: without spread there is no interval and no t test"
        bound = "" if c.bound is None else f"; every run has {c.bound:g} %, where no difference can show"
        return f"no difference: {same}{bound}"
    p = "p " + ("" if p_text(c.p_holm).startswith("<") else "= ") + p_text(c.p_holm)
    plural = "s" if c.family > 1 else ""
    said = f"{points(c.mean)} points {interval_text(c)}, n = {c.n}, {p} after Holm's correction over {c.family} "
    said += f"comparison{plural}"
    if c.differs:
        does, more, less = (
            ("stops", "more often", "less often") if c.score == "stop_rate" else ("scores", "higher", "lower")
        )
        return f"{c.arm} {does} {more if c.mean > 0 else less} than {c.reference}: {said}"
    alone = f" (this comparison alone: {p_text(c.p_two_sided)})" if c.p_two_sided <= LEVEL else ""
    missed = f"a true difference below {c.detectable:.2f} points would have been missed more than one time in five"
    if c.detectable > 100:
        missed = f"{c.n} seeds that differ so much can hardly show any difference"
    return f"no difference shown: {said}{alone}; {missed}"


def in_stopping(c: Comparison, comparisons: list[Comparison]) -> str:
    """What to add to a gain that startswith, which does not ask for the answer's end, does not share.

    The stop rate rises where its own test, uncorrected, says so, or where it rises alike on every seed.
    """
    others = {other.score: other for other in comparisons if other.arm == c.arm}
    begins, stops = others.get("startswith"), others.get("stop_rate")
    if c.score in ("startswith", "stop_rate") or not (c.differs and c.mean > 0 and begins and stops):
        return ""
    rises = stops.mean > 0 and (stops.sd == 0 or (stops.p_two_sided is not None and stops.p_two_sided <= LEVEL))
    if (begins.differs and begins.mean > 0) or not rises:
        return ""
    return (
        f". This is a gain in stopping: the stop rate is {points(stops.mean)} points, while startswith shows no gain "
        f"({points(begins.mean)} points{f' {interval_text(begins)}' if begins.interval else ''})"
    )
