"""The statistics of paired arms against scipy, against values computed by hand, and by simulation."""

import itertools
import re

import numpy as np
import pytest
import scipy.stats
from test_comparison import BETTER, EXACT

from llm_jepa.reports import stats
from llm_jepa.reports.stats import LEVEL, Comparison, compare, conclude, detectable, holm

GAIN, NOISE, STOPS = [2.0, 2.2, 1.9, 2.1, 2.3], [0.1, -0.1, 0.2, -0.2, 0.05], [2.1, 2.0, 1.8, 2.2, 2.5]


def comparison(differences: list[float], score: str = "exact", arm: str = "JEPA") -> Comparison:
    base = {seed: 50.0 for seed in range(len(differences))}
    return compare(arm, "regular", score, {s: 50 + d for s, d in enumerate(differences)}, base)


def concluded(*comparisons: Comparison) -> list[Comparison]:
    """With exact match as the primary score."""
    conclude(list(comparisons), "exact")
    return list(comparisons)


def test_three_differences_by_hand():
    # 1, 2, 3: mean 2, sd 1, t = 2√3 with 2 degrees of freedom, so two-sided p = 1 − t/√(2 + t²) = 1 − √(12/14)
    c = comparison([1.0, 2.0, 3.0])
    assert (c.mean, c.sd) == (2.0, 1.0)
    assert c.p_two_sided == pytest.approx(1 - np.sqrt(12 / 14)) and c.p_one_sided == pytest.approx(c.p_two_sided / 2)
    half = 4.302653 / np.sqrt(3)
    assert c.interval == pytest.approx((2 - half, 2 + half))
    assert c.p_sign_flip == pytest.approx(0.25)  # 2 of 8 sign patterns are as extreme


def test_pairs_are_formed_by_seed():
    c = compare("JEPA", "regular", "exact", {4: 1.0, 82: 5.0, 23: 7.0}, {23: 6.0, 37: 9.0, 4: 3.0, 84: 9.0})
    assert dict(zip(c.seeds, c.differences, strict=True)) == {4: -2.0, 23: 1.0}
    assert (c.arm_only_seeds, c.reference_only_seeds) == ([82], [37, 84])


def test_sign_flip_counts_all_signs_and_is_sampled_above_sixteen_pairs():
    values = np.array([3.35, 0.45, -1.0, 0.95, 0.0])
    means = [abs((values * signs).mean()) for signs in itertools.product((1, -1), repeat=5)]
    by_hand = np.mean([mean >= abs(values.mean()) - 1e-12 for mean in means])
    assert stats.sign_flip(values) == (pytest.approx(by_hand), 2 / 2**5)
    assert stats.sign_flip(np.ones(30)) == pytest.approx((2 / (2**16 + 1),) * 2)


@pytest.mark.parametrize(
    ("ps", "corrected"),
    [([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # ×3; ×1 = 0.04, but not below the third's; ×2; ×4
     ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),
     ([0.9, 0.6, 0.7], [1.0, 1.0, 1.0]),
     ([], [])],
)  # fmt: skip
def test_holm_by_hand(ps, corrected):
    assert holm(ps) == pytest.approx(corrected)


def test_one_pair_has_no_interval_and_no_test():
    (c,) = concluded(comparison([2.0]))
    assert (c.sd, c.interval, c.p_two_sided, c.p_one_sided, c.p_sign_flip, c.p_holm) == (None,) * 6
    assert c.verdict.startswith("nothing shown: +2.00 points")


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("score", ["exact", "startswith"])
def test_few_seeds_have_no_useless_interval_and_the_verdict_has_the_smallest_p(n, score):
    (c,) = concluded(comparison([-35.0, 45.0, 90.0][:n], score))
    assert c.interval is None and (c.p_two_sided is None) == (n == 2 or score != "exact")
    assert f"{2 / 2**n:.2g}" in c.verdict and not c.differs
    assert not [float(x) for x in re.findall(r"\d+\.\d+", c.verdict) if float(x) >= 100]


def test_only_the_primary_score_is_tested():
    first, second, other = concluded(comparison(GAIN), comparison(NOISE, arm="k=2"), comparison(STOPS, "stop_rate"))
    assert (first.family, second.family, other.family) == (2, 2, 0)
    assert first.p_holm == 2 * first.p_two_sided and second.p_holm == second.p_two_sided
    assert (other.p_two_sided, other.p_one_sided, other.p_sign_flip, other.p_holm) == (None,) * 4 and not other.differs
    assert other.interval[0] > 0 and stats.format_interval(other) in other.verdict


def test_equal_differences_have_no_t_test():
    same, shifted = concluded(comparison([0.0] * 5), comparison([0.5] * 5, arm="other"))
    for c in (same, shifted):
        assert (c.sd, c.interval, c.p_two_sided, c.p_holm) == (0.0, None, None, None) and not c.differs
    assert shifted.verdict.startswith("+0.50 points")
    assert shifted.p_sign_flip == pytest.approx(0.0625)
    ours, theirs = {0: 95.5, 1: 80.3, 2: 0.3}, {0: 95.3, 1: 80.1, 2: 0.1}
    assert len({ours[s] - theirs[s] for s in ours}) > 1  # float64 errors, which do not count as variance
    assert compare("JEPA", "regular", "exact", ours, theirs).p_two_sided is None


@pytest.mark.parametrize(
    ("value", "n", "word"), [(0.0, 5, "floor"), (100.0, 2, "ceiling"), (37.5, 3, "37.5 %"), (0, 1, "0 %")]
)
def test_equal_scores_of_all_runs_are_no_result(value, n, word):
    scores = dict.fromkeys(range(n), value)
    (c,) = concluded(compare("jepa", "regular", "exact", scores, scores))
    assert c.same == value and word in c.verdict and "no difference" not in c.verdict
    scores = dict(enumerate((0.0, 50.0)))
    (c,) = concluded(compare("jepa", "regular", "exact", scores, scores))
    assert c.same is None and "no difference" in c.verdict


def test_verdicts_of_gain_and_loss():
    gain, loss = concluded(comparison(GAIN), comparison([-2.0, -2.2, -1.9, -2.1, -2.4], arm="JEPA k=2"))
    assert gain.verdict.startswith("JEPA scores higher than regular: +2.10 points [1.90, 2.30], n = 5, p ")
    assert loss.verdict.startswith("JEPA k=2 scores lower than regular: −2.12 points [−2.36, −1.88], n = 5, p ")
    assert gain.p_holm == 2 * gain.p_two_sided and stats.format_p(gain.p_holm) in gain.verdict


def test_verdict_without_difference_has_the_detectable_difference():
    (c,) = concluded(compare("JEPA", "regular", "exact", BETTER, EXACT))
    assert c.verdict.startswith("no significant difference: +0.75 points [−1.26, 2.76], n = 5, p = 0.36")
    assert f"{detectable(c.sd, 5):.2f} points" in c.verdict
    noncentral = scipy.stats.nct(4, c.detectable * np.sqrt(5) / c.sd)
    assert noncentral.sf(scipy.stats.t.ppf(1 - LEVEL / 2, 4)) == pytest.approx(0.8, abs=1e-3)
    (wide,) = concluded(comparison([-5.0, 9.0, 70.0]))
    assert wide.detectable > 100 and f"{wide.detectable:.2f}" not in wide.verdict


def test_correction_decides_and_sets_the_level_of_the_detectable_difference():
    near = [1.0, 2.4, 0.3, 1.9, 1.2]
    (single,) = concluded(comparison(near))
    assert single.differs
    c, *_ = concluded(comparison(near), *(comparison(NOISE, arm=f"arm {i}") for i in range(3)))
    assert c.p_two_sided < LEVEL < c.p_holm and not c.differs
    assert f"uncorrected: {stats.format_p(c.p_two_sided)}" in c.verdict
    shown, missed, untested = concluded(comparison(GAIN), comparison(NOISE, arm="b"), comparison([0.0] * 5, arm="c"))
    assert shown.p_holm == pytest.approx(3 * shown.p_two_sided)  # a comparison without a test counts
    assert shown.detectable is None and untested.detectable is None
    assert missed.detectable == pytest.approx(detectable(missed.sd, 5, LEVEL / 2))  # one of three is shown


@pytest.mark.parametrize(
    ("gain", "start", "stop", "is_stopping"),
    [(GAIN, NOISE, STOPS, True),
     (GAIN, NOISE, [2.0] * 5, True),  # the same on every seed, so without a t test
     (GAIN, GAIN, STOPS, False),  # the beginnings are better too
     (GAIN, NOISE, NOISE, False),
     ([-d for d in GAIN], NOISE, STOPS, False)],
)  # fmt: skip
def test_gain_in_stopping_is_noted(gain, start, stop, is_stopping):
    other_arm = comparison(STOPS, "stop_rate", "other")
    c, *others = concluded(comparison(gain), comparison(start, "startswith"), comparison(stop, "stop_rate"), other_arm)
    assert ("gain in stopping" in c.verdict) == is_stopping
    assert not any("gain in stopping" in other.verdict for other in others)
