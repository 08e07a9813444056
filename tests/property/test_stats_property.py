"""Properties of the statistics for any scores, and their error rates in simulations."""

import numpy as np
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa.reports.stats import LEVEL, Comparison, compare, conclude, holm

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def simulate(rng: np.random.Generator, gain: float = 0.0) -> list[Comparison]:
    """Three arms and one reference on five seeds: the first arm gains, the others equal the reference."""
    seeds = rng.normal(85, 8, 5)  # seeds differ far more than arms do
    reference = dict(enumerate(seeds + rng.normal(0, 0.5, 5)))
    arms = [dict(enumerate(seeds + rng.normal(0, 0.5, 5) + gain * (i == 0))) for i in range(3)]
    comparisons = [compare(f"arm {i}", "regular", "exact", arm, reference) for i, arm in enumerate(arms)]
    conclude(comparisons, "exact")
    return comparisons


def test_false_positive_rates():
    rng, n = np.random.default_rng(0), 300
    tables = [simulate(rng) for _ in range(n)]
    low, high = scipy.stats.binom.ppf([0.001, 0.999], n, LEVEL)
    for i in range(3):  # one comparison of each table, so that the draws are independent
        assert low <= sum(comparisons[i].p_two_sided <= LEVEL for comparisons in tables) <= high
    uncorrected = sum(any(c.p_two_sided <= LEVEL for c in comparisons) for comparisons in tables)
    familywise = sum(any(c.differs for c in comparisons) for comparisons in tables)
    assert 0 < familywise <= high < uncorrected


def test_planted_effect_is_found():
    rng = np.random.default_rng(1)
    firsts = [simulate(rng, gain=4.0)[0] for _ in range(100)]
    assert sum(first.differs and first.mean > 0 for first in firsts) >= 95


@given(P_VALUES, st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_is_the_step_down_procedure(ps, level):
    rejected, order = set(), sorted(range(len(ps)), key=ps.__getitem__)
    for step, at in enumerate(order):
        if ps[at] * (len(ps) - step) > level:
            break
        rejected.add(at)
    corrected = holm(ps)
    assert {i for i, p in enumerate(corrected) if p <= level} == rejected
    assert all(p <= c <= 1 for p, c in zip(ps, corrected, strict=True))
