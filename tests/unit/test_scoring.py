"""What every task counts as correct, and the interval of a score."""

from decimal import Decimal

import pytest

from llm_jepa.data.examples import Example
from llm_jepa.scoring import tasks
from llm_jepa.scoring.tasks import TASKS, interval, last_number, marked_number, score_text


def example(answer: str, **fields) -> Example:
    return Example(None, "question", answer, "data.jsonl:1", 1, **fields)


def scored(task: str, prediction: str, answer: str, **fields) -> dict:
    with TASKS[task].start(None) as score:
        return score(prediction, example(answer, **fields))


NONSENSE = ["", " \n", "no answer at all", ".", "?!", "the", "####", "\0", "☃", "\ud800"]


@pytest.mark.parametrize(
    ("prediction", "exact", "startswith"),
    [("Good?", True, True), ("  Good?\n", True, True), ("Good? and more", False, True), ("say Good?", False, False),
     (" \n", False, False), ("GOOD?", False, False)],
)  # fmt: skip
def test_score_text(prediction, exact, startswith):
    for answer in ("Good?", " Good? "):
        assert score_text(prediction, answer) == {"exact": exact, "startswith": startswith}


def test_regexes():
    with TASKS["synth"].start(None) as score:
        for prediction, answer, equal, failure in (
            ("(.*[0-9].*)&dog", "(dog)&(.*[0-9].*)", True, None),
            ("a|b", "b|c", False, None),
            ("(dog", "(dog", True, None),  # the same text, although it is not an expression
            ("(dog", "dog", False, "syntax"),
            ("a{99999}", "dog", False, "states"),
            ("dog", "(dog", False, "gold_syntax"),
            ("dog", "a{99999}", False, "gold_states"),
            *((text, "dog", False, "syntax" if text.strip() in ("", "?!") else None) for text in NONSENSE),
        ):
            scores = score(prediction, example(answer))
            assert (scores["dfa_equal"], scores.get("failure")) == (equal, failure), (prediction, answer)


def test_slow_prediction_and_slow_answer_have_different_reasons(monkeypatch):
    monkeypatch.setattr(tasks, "REGEX_SECONDS", 0.2)
    slow = "(a*)*" * 2_000
    with TASKS["synth"].start(None) as score:
        assert score(slow, example("dog")) == {"dfa_equal": False, "failure": "timeout"}
        assert score("dog", example(slow)) == {"dfa_equal": False, "failure": "gold_timeout"}
        assert score("dog", example("(dog)")) == {"dfa_equal": True}


BOTH = [
    "other steps\n#### 1,000", "####1000", "#### 1,000.00.", "#### $1,000", "#### 1000%", "#### 1000 eggs",
    "#### 1000\n#### 7", "#### 01000", "#### Step 1: no\n#### 1000", "#### 2nd step: 7\n####1{,}000", "#### 1\u202f000",
]  # fmt: skip
ONLY_LAST = [
    "### 1000", "The answer is $1,000.00.", "10 * 100 = <<10*100=1000>>1000", "2000-1000", "(2000)-1000", "1000 ####",
    "#### x = 1000", "1000\n####\n1000", r"\boxed{1{,}000}", r"$1{\,}000.", r"1,\!000", r"1\ 000 eggs", "1\xa0000",
]  # fmt: skip
NEITHER = [
    "#### −1000", "#### 1000.0000000000000000000000001", "#### 10000", "#### 100", "#### 1,000,00", "#### 10,00",
    "#### 1000/1", "#### 1000:1", "#### 1000.0.0", "#### 1000x", "#### 1e3", "#### ١٠٠٠", "#### 7\n1000",
    r"\boxed{9{,}000}", r"1{,}00", "the result is -1000", "it is 1000, or 2/1000", "1000 in 3 days", "one thousand",
    "#### 1" + "0" * 20_000, "1." * 20_000, *NONSENSE,
]  # fmt: skip


@pytest.mark.parametrize("predictions, number, last", [(BOTH, 1, 1), (ONLY_LAST, 0, 1), (NEITHER, 0, 0)])
def test_numbers(predictions, number, last):
    for prediction in predictions:
        scores = scored("gsm8k", prediction, "steps of 3 and 4\n#### 1,000")
        assert scores == {"number": bool(number), "last_number": bool(last)}, prediction[:40]


EXACT = {
    "#### -0": "0", "#### .5": "0.5", "#### 0.10": "0.1", "#### -$5": "-5", "#### $-5": "-5", "#### 1.": "1",
    "#### -$1,234,567.89": "-1234567.89", "#### 0.30000000000000004": "0.30000000000000004", "#### \t 7": "7",
    "#### 123456789012345678901234567890": "123456789012345678901234567890",
}  # fmt: skip


def test_numbers_are_exact():
    for text, value in EXACT.items():
        assert marked_number(text) == last_number(text) == Decimal(value), text


RIGHT_AND_WRONG = {  # (task, answer): (right predictions, wrong ones)
    ("nq_open", "6 geese a-laying; maids a-milking"): (
        ["6 geese a-laying", "Maids A-Milking.", "the 6 geese a-laying!", "6 geese a-laying; maids a-milking"],
        ["maids a-milking; 6 geese a-laying", "6 geese", "6 geese a-laying and more", "", ";", "the", "a; an"],
    ),
    ("nq_open", "October 29 2018"): (["October\xa029,\u20032018\n"], ["October 2018", "29 October 2018"]),
    ("nq_open", "j r r tolkien; theatre; ångström"): (
        ["J. R. R. Tolkien", "The  Theatre!", "Ångström"],
        ["atre"],
    ),
    ("nq_open", "x; ; y"): (["x", "y", "x; y"], ["", "/", "the", "!"]),
    ("rotten_tomatoes", "Good"): (["Good", " Good\n"], ["Bad", "Very Good"]),
    ("hellaswag", "C"): (["C", " C\n"], ["c", "C)", "C.", "A", "CC", "ABCD", "Ｃ", ""]),
    ("yelp", "Very Good"): (["Very Good", "very good", " VERY GOOD!\n"], ["Good", "VeryGood", "Very Bad"]),
    ("yelp", "Good"): (
        ["Good.", "Good ..."],
        ["Very Good", "Goodness", "Good Bad", "Good, I think", "Not Good", "'Good'", "Mediocre", "", "."],
    ),
}


@pytest.mark.parametrize("task, answer", RIGHT_AND_WRONG)
def test_right_and_wrong_answers(task, answer):
    right, wrong = RIGHT_AND_WRONG[task, answer]
    for prediction in (*right, *wrong, *NONSENSE):
        assert scored(task, prediction, answer) == {TASKS[task].scores[0]: prediction in right}, prediction


def test_listed_answers_replace_the_parts_of_the_joined_text():
    listed = {"answers": ("one; two", "three")}
    for prediction, right in (("one; two", True), ("three", True), ("one; two; three", True), ("one", False)):
        assert scored("nq_open", prediction, "one; two; three", **listed) == {"answer_match": right}


@pytest.mark.parametrize(
    "task, answer, failure",
    [*(("gsm8k", answer, "gold_syntax") for answer in ("18", "#### eighteen", "", "####")),
     *(("hellaswag", answer, "gold_class") for answer in ("E", "c", "", "C)", "AB")),
     *(("rotten_tomatoes", answer, "gold_class") for answer in ("Mediocre", "Very Good", "")),
     ("nq_open", "/", "gold_empty")],
)  # fmt: skip
def test_answer_that_the_task_cannot_use_is_reported(task, answer, failure):
    assert scored(task, answer, answer) == dict.fromkeys(TASKS[task].scores, False) | {"failure": failure}


def test_wilson_by_hand():
    # z = 1.959964, n = 10, p = 0.8: center (0.8 + 0.192073) / 1.384146 = 0.716740,
    # half width 1.959964 / 1.384146 · sqrt(0.016 + 0.0096036) = 0.226577.
    expected = [0.716740 - 0.226577, 0.716740 + 0.226577]
    assert interval([True] * 8 + [False] * 2) == pytest.approx(expected, abs=2e-6)


def test_interval_of_graded_scores_by_hand():
    # mean 0.5, variance (4 · 0.04 + 0) / 4 = 0.04, standard error sqrt(0.04 / 5) = 0.0894427
    assert interval([0.3, 0.7, 0.5, 0.3, 0.7]) == pytest.approx([0.5 - 0.175305, 0.5 + 0.175305], abs=2e-6)
    assert interval([0.0, 0.9]) == [0, 1]
