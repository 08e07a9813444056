"""Paired comparison of two arms on the same seeds: differences, tests, Holm's correction and a verdict in words.

Scores are in percent, differences in percentage points. `compare` makes one comparison. `conclude` corrects those
of the primary score together, leaves the other scores descriptive, and writes the verdicts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # loads scipy.stats and scipy.special on first use

LEVEL, POWER = 0.05, 0.8
RESAMPLES = 2**16  # sign flips: all of them up to n = 16, above that a random sample
FEW = 3  # with up to this many seeds a verdict says what they cannot show; a t test needs at least as many
WIDEST = 100.0  # points; a wider interval says nothing about a score between 0 and 100 %
DECIMALS = 9  # differences are rounded, so that float64 errors of equal differences do not count as variance


@dataclass
class Comparison:
    """One score of an arm minus the reference's, on the seeds that both have. A value that does not exist is None."""

    arm: str
    reference: str
    score: str
    seeds: list[int]
    differences: list[float]
    arm_only_seeds: list[int]
    reference_only_seeds: list[int]
    n: int  # pairs
    mean: float
    same: float | None = None  # the score of all runs of both arms if it is equal: 0 is its floor, 100 its ceiling
    sd: float | None = None
    interval: tuple[float, float] | None = None  # 95 %, not corrected; None if it is wider than WIDEST
    p_two_sided: float | None = None  # like all p, only of the primary score
    p_one_sided: float | None = None  # null hypothesis: the arm scores no higher
    p_sign_flip: float | None = None
    p_sign_flip_least: float | None = None  # the smallest p possible with this number of seeds
    p_holm: float | None = None
    family: int = 0  # number of comparisons that p_holm is corrected for; 0: a descriptive score
    detectable: float | None = None
    verdict: str = ""

    @property
    def differs(self) -> bool:
        """Whether the corrected two-sided test shows a difference."""
        return self.p_holm is not None and self.p_holm <= LEVEL


def mean_sd(values: Sequence[float]) -> str:
    """`mean ± sd` with the sample standard deviation (n − 1); the mean only for a single value."""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def compare(
    arm: str, reference: str, score: str, arm_scores: dict[int, float], reference_scores: dict[int, float]
) -> Comparison:
    """Compares two arms whose scores are given by seed.

    The interval and both t tests are Student's on the paired differences, of at least FEW pairs. One pair has no test;
    equal differences have no interval and no t test, because its statistic divides by their sd.
    """
    seeds = [seed for seed in arm_scores if seed in reference_scores]
    a, b = np.array([arm_scores[s] for s in seeds]), np.array([reference_scores[s] for s in seeds])
    differences = np.round(a - b, DECIMALS)  # (n,)
    unpaired = [s for s in arm_scores if s not in seeds], [s for s in reference_scores if s not in seeds]
    n, mean = len(seeds), float(differences.mean())
    comparison = Comparison(arm, reference, score, seeds, differences.tolist(), *unpaired, n, mean)
    comparison.same = float(a[0]) if len({*a.tolist(), *b.tolist()}) == 1 else None
    if n == 1:
        return comparison
    comparison.sd = float(differences.std(ddof=1)) if np.ptp(differences) else 0.0
    comparison.p_sign_flip, comparison.p_sign_flip_least = sign_flip(differences)
    if comparison.sd and n >= FEW:
        half = float(scipy.stats.t.ppf(1 - LEVEL / 2, n - 1)) * comparison.sd / math.sqrt(n)
        comparison.interval = (mean - half, mean + half) if 2 * half <= WIDEST else None
        comparison.p_two_sided = float(scipy.stats.ttest_1samp(differences, 0).pvalue)
        comparison.p_one_sided = float(scipy.stats.ttest_1samp(differences, 0, alternative="greater").pvalue)
    return comparison


def sign_flip(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Two-sided permutation test that gives each difference either sign: (p, smallest p possible with this n).

    The test is exact up to 16 pairs, where the smallest p is 2 / 2ⁿ: 0.0625 for five seeds, which is never below 0.05.
    It assumes no normal distribution, only that both signs are equally likely.
    """
    values = np.asarray(differences, dtype=np.float64)
    test = scipy.stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    return float(test.pvalue), max(2 / 2 ** len(values), 2 / (RESAMPLES + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the given order; they bound the familywise error.

    The i-th smallest of m (i from 0) is multiplied by m − i, and is never below a smaller one's corrected value.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return corrected.tolist()


def detectable(sd: float, n: int, level: float = LEVEL) -> float:
    """The true difference that the two-sided paired t test detects with probability POWER.

    `sd`: of the n differences. The statistic of a true difference d is noncentral t with noncentrality d √n / sd.
    """
    critical = scipy.stats.t.ppf(1 - level / 2, n - 1)
    return float(scipy.special.nctdtrinc(n - 1, 1 - POWER, critical)) * sd / math.sqrt(n)


def conclude(comparisons: list[Comparison], primary: str) -> None:
    """Corrects the comparisons of a table's primary score together and writes all verdicts.

    The other scores are descriptive: they keep their intervals and lose their tests.

    A comparison without a test counts as one of p = 1: whether it has a test depends on the data, so leaving it out
    would make the correction of the others too weak. If k of m tests show a difference, the others were tested at
    0.05 / (m − k); their detectable difference is for that level.
    """
    tested = [c for c in comparisons if c.score == primary]
    corrected = holm([1.0 if c.p_two_sided is None else c.p_two_sided for c in tested])
    for c, p in zip(tested, corrected, strict=True):
        c.family, c.p_holm = len(tested), None if c.p_two_sided is None else p
    shown = sum(c.differs for c in tested)
    for c in comparisons:
        if not c.family:
            c.p_two_sided = c.p_one_sided = c.p_sign_flip = None
        elif c.p_two_sided is not None and not c.differs:
            c.detectable = detectable(c.sd, c.n, LEVEL / (c.family - shown))
        c.verdict = describe(c) + stopping_note(c, comparisons)


def format_p(p: float | None) -> str:
    """A p-value to two digits, or a dash if there was no test."""
    return "–" if p is None else f"{p:.2g}" if p >= 0.0001 else "< 0.0001"


def format_points(value: float) -> str:
    """A difference with its sign (a true minus); no sign if it rounds to zero."""
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def format_interval(c: Comparison) -> str:
    """`[low, high]`, or a dash if there is no interval."""
    return "–" if c.interval is None else "[{:.2f}, {:.2f}]".format(*c.interval).replace("-", "−")


def describe(c: Comparison) -> str:
    """The result of the corrected two-sided test in words; a descriptive score's difference and interval."""
    points = f"{format_points(c.mean)} points"
    if c.same is not None:
        end = {0.0: ", the floor of the score; train longer or use a pretrained model",
               100.0: ", the ceiling of the score"}.get(c.same, "")  # fmt: skip
        return f"nothing can show here: every run of both arms scores {c.same:g} %{end}"
    if c.n == 1:
        return f"nothing shown: {points} on one shared seed, so there is no interval and no test"
    least = f"the smallest p that the sign-flip test can give for them is {format_p(c.p_sign_flip_least)}"
    few = f"; {c.n} seeds cannot show more: {least}" if c.n <= FEW else ""
    if c.sd == 0 and c.mean:
        return f"{points} on each of the {c.n} seeds: without variance there is no interval and no t test{few}"
    if c.sd == 0:
        return f"no difference: the arms score the same on each of the {c.n} seeds{few}"
    if not c.family or c.p_two_sided is None:
        each = ", ".join(map(format_points, c.differences))
        what = format_interval(c) if c.interval else f"(without an interval; by seed: {each})"
        return f"{'nothing shown' if c.family else 'descriptive'}: {points} {what}, n = {c.n}{few}"
    p = format_p(c.p_holm)
    interval = format_interval(c) if c.interval else f"(the interval is wider than {WIDEST:g} points)"
    test = f"{points} {interval}, n = {c.n}, p {'' if p.startswith('<') else '= '}{p} after Holm's correction"
    test += f" over {c.family} comparison{'s' if c.family > 1 else ''}"
    if c.differs:
        stops = ("stops less often", "stops more often")
        outcome = (stops if c.score == "stop_rate" else ("scores lower", "scores higher"))[c.mean > 0]
        return f"{c.arm} {outcome} than {c.reference}: {test}{few}"
    uncorrected = f" (uncorrected: {format_p(c.p_two_sided)})" if c.p_two_sided <= LEVEL else ""
    detectable = f"the smallest difference that is detected with 80 % power is {c.detectable:.2f} points"
    if c.detectable > 100:
        detectable = f"{c.n} seeds with this variance can hardly show any difference"
    return f"no significant difference: {test}{uncorrected}; {detectable}{few}"


def stopping_note(c: Comparison, comparisons: list[Comparison]) -> str:
    """The note on a gain that comes from stopping: the stop rate rises; startswith, which ignores the end, does not.

    A descriptive score rises if its interval is above 0, or if it rises equally on every seed.
    """
    of_arm = {other.score: other for other in comparisons if other.arm == c.arm}
    start, stop = of_arm.get("startswith"), of_arm.get("stop_rate")
    if c.score in ("startswith", "stop_rate") or not (c.differs and c.mean > 0 and start and stop):
        return ""

    def rises(score: Comparison) -> bool:
        return score.mean > 0 and (score.sd == 0 or (score.interval is not None and score.interval[0] > 0))

    if rises(start) or not rises(stop):
        return ""
    interval = f" {format_interval(start)}" if start.interval else ""
    return (
        f". This is a gain in stopping: the stop rate changes by {format_points(stop.mean)} points, but startswith "
        f"shows no gain ({format_points(start.mean)} points{interval})"
    )
