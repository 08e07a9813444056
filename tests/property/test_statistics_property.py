"""What must hold of the statistics for any scores, and how often they are wrong where nothing is there to be found."""

import numpy as np
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.reports.stats import LEVEL, Comparison, compare, conclude, holm

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)
SCORES = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=8)


def table(rng: np.random.Generator, gain: float = 0.0) -> list[Comparison]:
    """Three arms against one reference over five seeds, concluded: the first arm gains, the others are like it."""
    seeds = rng.normal(85, 8, 5)  # seeds differ far more than arms do
    reference = dict(enumerate(seeds + rng.normal(0, 0.5, 5)))
    arms = [dict(enumerate(seeds + rng.normal(0, 0.5, 5) + gain * (i == 0))) for i in range(3)]
    comparisons = [compare(f"arm {i}", "regular", "exact", arm, reference) for i, arm in enumerate(arms)]
    conclude(comparisons)
    return comparisons


def test_false_verdicts_are_as_rare_as_promised():
    rng, sets = np.random.default_rng(0), 500
    tables = [table(rng) for _ in range(sets)]
    low, high = scipy.stats.binom.ppf([0.001, 0.999], sets, LEVEL)
    for i in range(3):  # one comparison of each set, so that the draws are independent
        assert low <= sum(comparisons[i].p_two_sided <= LEVEL for comparisons in tables) <= high
    uncorrected = sum(any(c.p_two_sided <= LEVEL for c in comparisons) for comparisons in tables)
    familywise = sum(any(c.differs for c in comparisons) for comparisons in tables)
    assert familywise <= high < uncorrected, "the correction is needed, and does its work"
    assert familywise > 0, "and is no ban"
    assert all(c.differs != c.verdict.startswith("no difference shown") for cs in tables for c in cs)


def test_a_planted_effect_is_found_and_nothing_else():
    rng = np.random.default_rng(1)
    tables = [table(rng, gain=4.0) for _ in range(200)]
    found = sum(first.verdict.startswith("arm 0 scores higher than regular: +") for first, *_ in tables)
    assert found >= 190
    false = sum(any(c.differs for c in others) for _, *others in tables)
    assert false <= scipy.stats.binom.ppf(0.999, 200, LEVEL)


@given(P_VALUES)
def test_holm_never_lowers_a_p_value_and_keeps_their_order(ps):
    corrected = holm(ps)
    assert all(p <= c <= 1 for p, c in zip(ps, corrected, strict=True))
    pairs = sorted(zip(ps, corrected, strict=True))
    assert [c for _, c in pairs] == sorted(c for _, c in pairs)


@given(P_VALUES, st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_is_the_step_down_procedure(ps, level):
    rejected, order = set(), sorted(range(len(ps)), key=ps.__getitem__)
    for step, at in enumerate(order):
        if ps[at] * (len(ps) - step) > level:
            break
        rejected.add(at)
    assert {i for i, p in enumerate(holm(ps)) if p <= level} == rejected


@settings(deadline=None, max_examples=40)
@given(SCORES)
def test_exchanging_the_arms_turns_the_sign_alone(pairs):
    a, b = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
    one, other = compare("a", "b", "exact", a, b), compare("b", "a", "exact", b, a)
    assert np.isclose(one.mean, -other.mean) and np.isclose(one.p_sign_flip, other.p_sign_flip)
    assert (one.p_two_sided is None) == (other.p_two_sided is None)
    if one.p_two_sided is not None:
        assert np.isclose(one.p_two_sided, other.p_two_sided) and np.isclose(one.interval[0], -other.interval[1])
        assert np.isclose(one.p_one_sided, 1 - other.p_one_sided)
        backwards = dict(reversed(a.items()))
        assert np.isclose(compare("a", "b", "exact", backwards, b).p_two_sided, one.p_two_sided)
