"""What counts as correct, and the interval around it."""

from __future__ import annotations

import pytest

from scoring import TASKS, score_text, wilson


@pytest.mark.parametrize(
    "prediction, answer, exact, startswith",
    [
        ("[0-9]+", "[0-9]+", True, True),
        ("  [0-9]+\n", "[0-9]+", True, True),
        ("[0-9]+", " [0-9]+ ", True, True),
        ("[0-9]+ and more", "[0-9]+", False, True),
        ("[0-9]+[0-9]+", "[0-9]+", False, True),
        ("[0-9]", "[0-9]+", False, False),
        ("say [0-9]+", "[0-9]+", False, False),
        ("", "[0-9]+", False, False),
        (" \n", "[0-9]+", False, False),
        ("GOOD", "Good", False, False),
        ("a  b", "a b", False, False),
        (".*", "[a-z]", False, False),
        ("naïve ☃", "naïve ☃", True, True),
    ],
)
def test_score_text(prediction, answer, exact, startswith):
    assert score_text(prediction, answer) == {"exact": exact, "startswith": startswith}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_scores_with_truth_values(task):
    scores = TASKS[task]("no answer", "a")
    assert scores and all(isinstance(v, bool) for v in scores.values())


@pytest.mark.parametrize("task", ["synth", "turk", "text"])
def test_string_tasks_need_the_very_string(task):
    assert TASKS[task]("(a)&(b)", "(a)&(b)")["exact"] is True
    assert TASKS[task]("(b)&(a)", "(a)&(b)")["exact"] is False


def test_wilson_by_hand():
    # z = 1.959964, n = 10, p = 0.8: centre (0.8 + 0.192073) / 1.384146 = 0.716740,
    # half width 1.959964 / 1.384146 · sqrt(0.016 + 0.0096036) = 0.226577.
    assert wilson(8, 10) == pytest.approx([0.716740 - 0.226577, 0.716740 + 0.226577], abs=2e-6)


def test_wilson_with_no_hits_and_with_hits_alone():
    z2 = 1.959963985**2
    for n in (1, 10, 2000):
        low, high = wilson(0, n)
        assert low == 0 and high == pytest.approx(z2 / (n + z2))
        low, high = wilson(n, n)
        assert low == pytest.approx(n / (n + z2)) and high == 1


@pytest.mark.parametrize("n", [1, 7, 500])
def test_wilson_is_mirrored_and_narrows_with_n(n):
    for hits in {0, n // 3, n}:
        low, high = wilson(hits, n)
        assert 0 <= low <= hits / n <= high <= 1
        assert [1 - high, 1 - low] == pytest.approx(wilson(n - hits, n))
        wider = high - low
        low, high = wilson(4 * hits, 4 * n)
        assert high - low < wider
