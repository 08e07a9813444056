"""The statistics of paired arms, against scipy's own, against hand-worked cases and by simulation."""

import itertools

import numpy as np
import pytest
import scipy.stats

from llm_jepa.reports.stats import (
    LEVEL,
    Comparison,
    compare,
    conclude,
    detectable,
    holm,
    in_stopping,
    p_text,
    points,
    power,
    sign_flip,
)

SEEDS = (82, 23, 37, 84, 4)
REGULAR = dict(zip(SEEDS, (92.15, 79.45, 92.90, 95.00, 78.90), strict=True))  # RESULTS.md, exact match
JEPA = dict(zip(SEEDS, (95.50, 79.90, 91.90, 95.95, 78.90), strict=True))


def made(differences: list[float], score: str = "exact", arm: str = "JEPA") -> Comparison:
    """A comparison with these differences."""
    base = {seed: 50.0 for seed in range(len(differences))}
    return compare(arm, "regular", score, {s: 50 + d for s, d in enumerate(differences)}, base)


def concluded(*comparisons: Comparison) -> list[Comparison]:
    conclude(list(comparisons))
    return list(comparisons)


def test_the_figures_of_a_comparison_that_was_published():
    c = compare("JEPA", "regular", "exact", JEPA, REGULAR)
    assert (c.n, round(c.mean, 2)) == (5, 0.75)
    assert [round(x, 2) for x in c.interval] == [-1.26, 2.76] and round(c.p_two_sided, 2) == 0.36


def test_three_differences_by_hand():
    # 1, 2, 3: mean 2, sd 1, t = 2√3 = 3.4641 with 2 degrees of freedom, whose two-sided p is 1 − t/√(2 + t²) = 0.0742
    c = made([1.0, 2.0, 3.0])
    assert (c.mean, c.sd) == (2.0, 1.0)
    assert c.p_two_sided == pytest.approx(1 - np.sqrt(12 / 14)) and c.p_one_sided == pytest.approx(c.p_two_sided / 2)
    half = 4.302653 / np.sqrt(3)
    assert c.interval == pytest.approx((2 - half, 2 + half))
    assert c.p_sign_flip == pytest.approx(0.25), "2 of 8 signs are as extreme"


@pytest.mark.parametrize("n", [2, 5, 12])
def test_t_tests_and_interval_are_scipys(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(60, 8, n), rng.normal(59, 8, n)
    c = compare("JEPA", "regular", "exact", dict(enumerate(a)), dict(enumerate(b)))
    two, one = scipy.stats.ttest_rel(a, b), scipy.stats.ttest_rel(a, b, alternative="greater")
    assert c.p_two_sided == pytest.approx(two.pvalue) and c.p_one_sided == pytest.approx(one.pvalue)
    assert c.interval == pytest.approx(tuple(two.confidence_interval(0.95)))
    assert c.sd == pytest.approx(np.std(a - b, ddof=1))


def test_pairs_are_made_by_seed_and_the_others_named():
    ours = {4: 1.0, 82: 5.0, 23: 7.0}
    theirs = {23: 6.0, 37: 9.0, 4: 3.0, 84: 9.0}
    c = compare("JEPA", "regular", "exact", ours, theirs)
    assert dict(zip(c.seeds, c.differences, strict=True)) == {4: -2.0, 23: 1.0}
    assert (c.arm_alone, c.reference_alone) == ([82], [37, 84])
    with pytest.raises(ValueError, match="no seed is in both"):
        compare("JEPA", "regular", "exact", {1: 1.0}, {2: 1.0})


@pytest.mark.parametrize("differences", [[0.5, 1.5, -0.25, 2.0, 0.75], [1, 2, 3], [3.35, 0.45, -1.0, 0.95, 0.0]])
def test_sign_flip_counts_all_signs(differences):
    values = np.array(differences)
    means = [abs((values * signs).mean()) for signs in itertools.product((1, -1), repeat=len(values))]
    by_hand = np.mean([mean >= abs(values.mean()) - 1e-12 for mean in means])
    assert sign_flip(values)[0] == pytest.approx(by_hand)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_least_p_of_sign_flips_is_reached_where_all_have_one_sign(n):
    p, least = sign_flip(np.arange(1.0, n + 1))
    assert p == pytest.approx(least) == pytest.approx(2 / 2**n)


def test_sign_flips_beyond_sixteen_pairs_are_drawn():
    p, least = sign_flip(np.random.default_rng(0).normal(0.3, 1, 30))
    t = scipy.stats.ttest_1samp(np.random.default_rng(0).normal(0.3, 1, 30), 0).pvalue
    assert p == pytest.approx(t, abs=0.02) and least == pytest.approx(2 / (2**16 + 1))
    assert sign_flip(np.ones(30))[0] == pytest.approx(least)


@pytest.mark.parametrize(
    ("ps", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # ×3; ×1 = 0.04 but not below the third's; ×2; ×4
        ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),
        ([0.5, 0.4], [0.8, 0.8]),
        ([0.9, 0.6, 0.7], [1.0, 1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.03], [0.03]),
        ([], []),
    ],
)
def test_holm_by_hand(ps, corrected):
    assert holm(ps) == pytest.approx(corrected)


def test_power_of_a_known_case():
    # The textbook value of a paired t test with an effect of one sd and ten pairs: 0.803 (two-sided, 0.05).
    assert power(1, 1, 10, 0.05) == pytest.approx(0.803, abs=5e-4)
    assert detectable(1, 10) == pytest.approx(0.997, abs=5e-3)


@pytest.mark.parametrize(("n", "level"), [(5, 0.05), (5, 0.05 / 4), (2, 0.05), (8, 0.05 / 36)])
def test_the_detectable_difference_is_found_four_times_in_five(n, level):
    true, trials = detectable(2.0, n, level), 20_000
    draws = np.random.default_rng(0).normal(true, 2.0, (trials, n))
    found = scipy.stats.ttest_1samp(draws, 0, axis=1)
    share = np.mean((found.pvalue <= level) & (found.statistic > 0))
    assert share == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / trials))


def test_one_pair_has_no_interval_and_no_test():
    (c,) = concluded(made([2.0]))
    assert (c.sd, c.interval, c.p_two_sided, c.p_one_sided, c.p_sign_flip, c.p_holm) == (None,) * 6
    assert c.verdict == "nothing shown: +2.00 points on the one seed of both arms, which gives no interval, no test"


@pytest.mark.parametrize("bound", [0.0, 100.0])
def test_arms_at_a_bound_are_said_to_be_there(bound):
    scores = dict.fromkeys(range(5), bound)
    (c,) = concluded(compare("jepa", "regular", "exact", scores, dict(scores)))
    assert c.verdict == (
        f"no difference: 0.00 points on each of the 5 seeds; every run has {bound:g} %, where no difference can show"
    )


def test_what_could_have_been_detected_is_at_most_all_there_is():
    (c,) = concluded(made([-5.0, 9.0]))
    assert c.detectable > 100 and "2 seeds that differ so much can hardly show any difference" in c.verdict


def test_differences_without_spread_have_no_t_test():
    same, shifted = concluded(made([0.0] * 5), made([0.5] * 5, "startswith"))
    for c in (same, shifted):
        assert (c.sd, c.interval, c.p_two_sided, c.p_holm) == (0.0, None, None, None) and not c.differs
    assert same.verdict == "no difference: 0.00 points on each of the 5 seeds"
    assert shifted.verdict == "+0.50 points on each of the 5 seeds: without spread there is no interval and no t test"
    assert shifted.p_sign_flip == pytest.approx(0.0625)


def test_rounding_is_no_spread():
    ours, theirs = {0: 95.5, 1: 80.3, 2: 0.3}, {0: 95.3, 1: 80.1, 2: 0.1}
    assert len({ours[s] - theirs[s] for s in ours}) > 1, "float64 tells them apart"
    assert compare("JEPA", "regular", "exact", ours, theirs).p_two_sided is None


def test_correction_counts_comparisons_without_a_test():
    tested, *_ = concluded(made([1.0, 2.0, 3.0, 2.0, 1.5]), made([0.0] * 5, "startswith"), made([1.0], "stop_rate"))
    assert tested.p_holm == pytest.approx(3 * tested.p_two_sided) and tested.family == 3


def test_verdict_of_a_gain_and_of_a_loss():
    gain, loss = concluded(made([2.0, 2.2, 1.9, 2.1, 2.3]), made([-2.0, -2.2, -1.9, -2.1, -2.4], arm="JEPA k=2"))
    p = p_text(2 * gain.p_two_sided)
    assert gain.verdict == (
        f"JEPA scores higher than regular: +2.10 points [1.90, 2.30], n = 5, p {p} after Holm's correction over 2 "
        "comparisons"
    )
    assert loss.verdict.startswith("JEPA k=2 scores lower than regular: −2.12 points [−2.36, −1.88], n = 5, p ")


def test_verdict_of_no_difference_says_what_would_have_been_missed():
    (c,) = concluded(compare("JEPA", "regular", "exact", JEPA, REGULAR))
    assert c.verdict == (
        "no difference shown: +0.75 points [−1.26, 2.76], n = 5, p = 0.36 after Holm's correction over 1 comparison; "
        f"a true difference below {detectable(c.sd, 5):.2f} points would have been missed more than one time in five"
    )
    assert power(c.detectable, c.sd, 5, LEVEL) == pytest.approx(0.8, abs=1e-3)


def test_what_is_significant_alone_but_not_in_the_table_is_no_difference():
    near = [1.0, 2.4, 0.3, 1.9, 1.2]
    (alone,) = concluded(made(near))
    assert alone.differs
    one, *_ = concluded(made(near), *(made([0.1, -0.1, 0.2, -0.3, 0.1], f"score{i}") for i in range(3)))
    assert one.p_two_sided < LEVEL < one.p_holm and not one.differs
    assert (
        one.verdict.startswith("no difference shown")
        and f"(this comparison alone: {p_text(one.p_two_sided)})" in one.verdict
    )


def test_what_would_have_been_missed_is_by_the_level_of_the_correction():
    noise = [0.6, -0.5, 0.2, -0.3, 0.1]
    shown, missed, _ = concluded(
        made([2.0, 2.2, 1.9, 2.1, 2.3]), made(noise, "startswith"), made([0.0] * 5, "stop_rate")
    )
    assert shown.differs and shown.detectable is None
    assert missed.detectable == pytest.approx(detectable(missed.sd, 5, LEVEL / 2)), "one of three is shown"


GAIN, NOISE = [2.0, 2.2, 1.9, 2.1, 2.3], [0.1, -0.1, 0.2, -0.2, 0.05]


@pytest.mark.parametrize(
    ("begins", "stops", "is_stopping"),
    [
        (NOISE, [2.1, 2.0, 1.8, 2.2, 2.5], True),
        (NOISE, [2.0] * 5, True),  # alike on every seed, which has no t test
        ([0.0] * 5, [2.1, 2.0, 1.8, 2.2, 2.5], True),
        ([-2.0, -2.2, -1.9, -2.1, -2.3], [2.1, 2.0, 1.8, 2.2, 2.5], True),
        (GAIN, [2.1, 2.0, 1.8, 2.2, 2.5], False),  # the answers' beginnings are better too
        (NOISE, [0.0] * 5, False),
        (NOISE, NOISE, False),
        (NOISE, [-2.1, -2.0, -1.8, -2.2, -2.5], False),
    ],
)
def test_a_gain_in_stopping_is_said_to_be_one(begins, stops, is_stopping):
    found = concluded(made(GAIN), made(begins, "startswith"), made(stops, "stop_rate"))
    assert ("This is a gain in stopping" in found[0].verdict) == is_stopping
    assert not any("gain in stopping" in c.verdict for c in found[1:])


def test_only_an_arms_own_stopping_explains_its_gain():
    found = concluded(
        made(GAIN), made(NOISE, "startswith"), made(NOISE, "stop_rate"), made([2.0] * 5, "stop_rate", "other")
    )
    assert in_stopping(found[0], found) == ""
    loss = concluded(made([-d for d in GAIN]), made(NOISE, "startswith"), made([2.0] * 5, "stop_rate"))
    assert "stopping" not in loss[0].verdict


@pytest.mark.parametrize(("value", "text"), [(0.001, "0.00"), (-0.001, "0.00"), (-1.256, "−1.26"), (0.754, "+0.75")])
def test_points(value, text):
    assert points(value) == text


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (0.36, "0.36"), (0.00123, "0.0012"), (1e-6, "< 0.0001"), (1, "1")]
)
def test_p_text(p, text):
    assert p_text(p) == text
