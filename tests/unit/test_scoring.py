"""What counts as correct, and the interval around it."""

from __future__ import annotations

import contextlib
from collections import Counter
from decimal import Decimal

import pytest

from llm_jepa.data.examples import Example
from llm_jepa.scoring import sandbox, sql, tasks
from llm_jepa.scoring.tasks import (
    LETTERS,
    SENTIMENTS,
    STARS,
    TASKS,
    last_number,
    marked_number,
    normalise,
    score_answers,
    score_choice,
    score_class,
    score_number,
    score_text,
    wilson,
)


def example(answer: str, **fields) -> Example:
    return Example(None, "question", answer, "rows.jsonl:1", 1, **fields)


def scored(task: str, prediction: str, answer: str, **fields) -> dict:
    with TASKS[task].start(None) as score:
        return score(prediction, example(answer, **fields))


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


# ------------------------------------------------------------------------------------------------------------ tasks

ANSWERS = {
    "synth": "(dog)&(.*[0-9].*)",
    "turk": "~((dog.*[0-9].*){3,})",
    "gsm8k": "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18",
    "nq_open": "6 geese a-laying; maids a-milking",
    "hellaswag": "C",
    "rotten_tomatoes": "Good",
    "yelp": "Very Good",
    "text": "any text",
}


def test_tasks():
    assert set(TASKS) == {*ANSWERS, "spider"}
    assert {name: task.scores for name, task in TASKS.items()} == {
        "synth": ("dfa_equal",),
        "turk": ("dfa_equal",),
        "gsm8k": ("number", "last_number"),
        "spider": ("execution", "execution_ordered"),
        "nq_open": ("answer_match",),
        "hellaswag": ("choice",),
        "rotten_tomatoes": ("class_match",),
        "yelp": ("class_match",),
        "text": (),
    }
    assert {name for name, task in TASKS.items() if task.needs_databases} == {"spider"}
    assert {name: task.choices for name, task in TASKS.items() if task.choices} == {"hellaswag": ("A", "B", "C", "D")}


@pytest.mark.parametrize("task", ANSWERS)
def test_the_answer_itself_is_right_and_all_scores_are_truth_values(task):
    assert scored(task, ANSWERS[task], ANSWERS[task]) == dict.fromkeys(TASKS[task].scores, True)
    assert scored(task, f" {ANSWERS[task]}\n", ANSWERS[task]) == dict.fromkeys(TASKS[task].scores, True)


@pytest.mark.parametrize("task", ANSWERS)
@pytest.mark.parametrize("prediction", ["", " \n", "no answer at all", ".", "?!", "the", "####", "\0", "☃", "\ud800"])
def test_nothing_and_nonsense_are_wrong(task, prediction):
    scores = scored(task, prediction, ANSWERS[task])
    assert {name: value for name, value in scores.items() if name != "failure"} == dict.fromkeys(
        TASKS[task].scores, False
    )


def test_spider_opens_the_databases_it_is_given(monkeypatch, tmp_path):
    @contextlib.contextmanager
    def match(databases):
        assert databases == tmp_path
        yield lambda prediction, example: {"execution": prediction == "right", "execution_ordered": False}

    monkeypatch.setattr(sql, "ExecutionMatch", match)
    with TASKS["spider"].start(tmp_path) as score:
        assert score("right", example("SELECT 1")) == {"execution": True, "execution_ordered": False}


# ---------------------------------------------------------------------------------------------------------- regexes


@pytest.mark.parametrize("task", ["synth", "turk"])
def test_another_text_of_the_same_language_is_right(task):
    assert scored(task, "(.*[0-9].*)&dog", "(dog)&(.*[0-9].*)") == {"dfa_equal": True}
    assert scored(task, "a|b", "b|a") == {"dfa_equal": True}
    assert scored(task, "a|b", "b|c") == {"dfa_equal": False}
    assert scored(task, "(dog) and more", "(dog)") == {"dfa_equal": False}


def test_the_same_text_is_right_even_where_it_is_no_expression():
    assert scored("synth", "(dog", "(dog") == {"dfa_equal": True}


@pytest.mark.parametrize(
    "prediction, answer, failure",
    [
        ("(dog", "dog", "syntax"),
        ("", "dog", "syntax"),
        ("a{99999}", "dog", "states"),
        ("dog", "(dog", "gold_syntax"),
        ("dog", "a{99999}", "gold_states"),
    ],
)
def test_regex_failures_are_wrong_and_say_why(prediction, answer, failure):
    assert scored("synth", prediction, answer) == {"dfa_equal": False, "failure": failure}


SLOW = "(a*)*" * 2_000


def test_a_slow_prediction_and_a_slow_answer_are_told_apart(monkeypatch):
    monkeypatch.setattr(tasks, "REGEX_SECONDS", 0.3)
    with TASKS["synth"].start(None) as score:
        assert score(SLOW, example("dog")) == {"dfa_equal": False, "failure": "timeout"}
        assert score("dog", example(SLOW)) == {"dfa_equal": False, "failure": "gold_timeout"}
        assert score("dog", example("(dog)")) == {"dfa_equal": True}


def test_a_pair_is_compared_once(monkeypatch):
    calls, call = Counter(), sandbox.Sandbox.call
    monkeypatch.setattr(sandbox.Sandbox, "call", lambda self, *a: calls.update([a[:2]]) or call(self, *a))
    with TASKS["synth"].start(None) as score:
        for _ in range(3):
            first = score("a|b", example("b|a"))
            score("b|a", example("b|a"))
            score("a|", example("b|a"))
            assert first == {"dfa_equal": True}
            first["failure"] = "spoilt by the caller"
    assert calls == {("a|b", "b|a"): 1, ("a|", "b|a"): 1}


def test_the_child_ends_with_the_scorer(monkeypatch):
    opened = []

    class Recorded(sandbox.Sandbox):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.append(self)

    monkeypatch.setattr(tasks, "Sandbox", Recorded)
    with TASKS["synth"].start(None) as score:
        score("a", example("b"))
        child = opened[0]._child
        assert child.poll() is None
    assert child.poll() is not None and len(opened) == 1


# ---------------------------------------------------------------------------------------------------------- numbers

GOLD = "steps of 3 and 4\n#### 1,000"


@pytest.mark.parametrize(
    "prediction, number, last",
    [
        ("other steps\n#### 1,000", True, True),
        ("#### 1000", True, True),
        ("####1000", True, True),
        ("#### 1000.", True, True),
        ("#### 1000.0", True, True),
        ("#### 1,000.00.", True, True),
        ("#### $1,000", True, True),
        ("#### 1000%", True, True),
        ("#### 1000 eggs", True, True),
        ("#### 1000\n#### 7", True, True),
        ("#### 1000 and 7", True, True),
        ("#### 01000", True, True),
        ("#### -1000", False, False),
        ("#### −1000", False, False),
        ("#### 1000.0000000000000000000000001", False, False),
        ("#### 999.9999999999999999999999999", False, False),
        ("#### 10000", False, False),
        ("#### 100", False, False),
        ("#### 1,00", False, False),
        ("#### 1,000,00", False, False),
        ("#### 10,00", False, False),
        ("#### 1000/1", False, False),
        ("#### 1000:1", False, False),
        ("#### 1000.0.0", False, False),
        ("#### 1000x", False, False),
        ("#### 1e3", False, False),
        ("#### ١٠٠٠", False, False),
        ("#### ten hundred", False, False),
        ("#### x = 1000", False, False),
        ("1000 ####", False, False),
        ("1000\n####\n1000", False, False),
        ("#### no\n#### 1000", False, False),
        ("### 1000", False, True),
        ("The answer is 1000", False, True),
        ("The answer is $1,000.00.", False, True),
        ("10 * 100 = <<10*100=1000>>1000", False, True),
        ("2000-1000", False, True),
        ("(2000)-1000", False, True),
        ("2000 - 1000", False, True),
        ("from 1 to 1,000!", False, True),
        ("the result is -1000", False, False),
        ("it is 1000, or 2/1000", False, False),
        ("1000 in 3 days", False, False),
        ("one thousand", False, False),
        ("", False, False),
    ],
)
def test_score_number(prediction, number, last):
    assert score_number(prediction, GOLD) == {"number": number, "last_number": last}


@pytest.mark.parametrize(
    "text, value",
    [
        ("#### 0", "0"),
        ("#### -0", "0"),
        ("#### .5", "0.5"),
        ("#### 0.10", "0.1"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### -$1,234,567.89", "-1234567.89"),
        ("#### 123456789012345678901234567890", "123456789012345678901234567890"),
        ("#### 1.", "1"),
        ("#### \t 7", "7"),
    ],
)
def test_numbers_are_exact(text, value):
    assert marked_number(text) == last_number(text) == Decimal(value)


def test_decimals_are_not_rounded():
    assert score_number("#### 0.30000000000000004", "#### 0.3") == {"number": False, "last_number": False}
    assert score_number("#### 9007199254740993", "#### 9007199254740992")["number"] is False


def test_a_long_row_of_digits_is_a_number_like_any_other():
    assert score_number("#### 1" + "0" * 20_000, GOLD) == {"number": False, "last_number": False}
    assert score_number("1." * 20_000, GOLD) == {"number": False, "last_number": False}


@pytest.mark.parametrize("answer", ["18", "#### eighteen", "", "####"])
def test_an_answer_without_a_number_is_reported(answer):
    assert score_number("#### 18", answer) == {"number": False, "last_number": False, "failure": "gold_syntax"}


# ---------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Beatles!", "beatles"),
        ("an apple a day", "apple day"),
        ("Theatre", "theatre"),
        ("J. R. R. Tolkien", "j r r tolkien"),
        ("rock 'n' roll", "rock n roll"),
        ("a-laying", "alaying"),
        ("October\xa029,\u20032018\n", "october 29 2018"),
        ("Ångström", "ångström"),
        ("the", ""),
        ("!?", ""),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("6 geese a-laying", True),
        ("maids a-milking", True),
        ("Maids A-Milking.", True),
        ("the 6 geese a-laying!", True),
        ("6 geese a-laying; maids a-milking", True),
        ("6 geese alaying maids amilking", True),
        ("maids a-milking; 6 geese a-laying", False),
        ("6 geese", False),
        ("6 geese a-laying and more", False),
        ("geese a-laying; maids a-milking", False),
        ("", False),
        (" ", False),
        (";", False),
        ("; ", False),
        ("the", False),
        ("a; an", False),
    ],
)
def test_open_answers(prediction, right):
    assert scored("nq_open", prediction, "6 geese a-laying; maids a-milking") == {"answer_match": right}


def test_answers_of_their_own_come_before_the_joined_text():
    answers = {"answers": ("one; two", "three")}
    for prediction, right in (("one; two", True), ("three", True), ("one; two; three", True), ("one", False)):
        assert scored("nq_open", prediction, "one; two; three", **answers) == {"answer_match": right}
    assert scored("nq_open", "one", "one; two; three") == {"answer_match": True}


def test_what_normalises_to_nothing_is_never_right():
    for prediction in ("", "/", "the", "!"):
        assert score_answers(prediction, ("/",)) == {"answer_match": False, "failure": "gold_empty"}
        assert score_answers(prediction, ("/", "a b")) == {"answer_match": False}
        assert scored("nq_open", prediction, "x; ; y") == {"answer_match": False}


# ---------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("C", True),
        (" C\n", True),
        ("c", False),
        ("C)", False),
        ("C.", False),
        ("A", False),
        ("CC", False),
        ("ABCD", False),
        ("Ｃ", False),
        ("", False),
    ],
)
def test_score_choice(prediction, right):
    assert score_choice(prediction, "C", LETTERS) == {"choice": right}


@pytest.mark.parametrize("answer", ["E", "c", "", "C)", "AB"])
def test_an_answer_that_is_no_choice_is_reported(answer):
    assert score_choice(answer, answer, LETTERS) == {"choice": False, "failure": "gold_class"}


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("Very Good", "Very Good", True),
        ("very good", "Very Good", True),
        (" VERY GOOD!\n", "Very Good", True),
        ("Good.", "Good", True),
        ("Good ...", "Good", True),
        ("Very Good", "Good", False),
        ("Good", "Very Good", False),
        ("Very Bad", "Bad", False),
        ("Bad", "Very Bad", False),
        ("Goodness", "Good", False),
        ("Good Bad", "Good", False),
        ("Good, I think", "Good", False),
        ("Not Good", "Good", False),
        ("VeryGood", "Very Good", False),
        ("'Good'", "Good", False),
        ("Mediocre", "Good", False),
        ("", "Good", False),
        (".", "Good", False),
    ],
)
def test_score_class(prediction, answer, right):
    assert score_class(prediction, answer, STARS) == {"class_match": right}


def test_an_answer_of_another_set_of_classes_is_reported():
    assert score_class("Very Good", "Very Good", SENTIMENTS) == {"class_match": False, "failure": "gold_class"}
    assert scored("rotten_tomatoes", "Mediocre", "Mediocre") == {"class_match": False, "failure": "gold_class"}
    assert scored("yelp", "Mediocre", "Mediocre") == {"class_match": True}
    assert score_class("", "", SENTIMENTS) == {"class_match": False, "failure": "gold_class"}


# ---------------------------------------------------------------------------------------------------------- interval


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
