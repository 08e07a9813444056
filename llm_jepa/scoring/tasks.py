"""What counts as correct: pure functions of a prediction and the answer it should be, and the tasks that use them."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from scipy.stats import binomtest

from llm_jepa.data.examples import Example
from llm_jepa.scoring.sandbox import Failure, Sandbox

Scores = dict[str, bool | str]  # score → right or wrong; "failure" → why no result could be had, in one word
Scorer = Callable[[str, Example], Scores]

# Automata of the datasets' own answers have up to 2,409 states and take 0.1 s.
REGEX_STATES, REGEX_SECONDS = 10_000, 5.0
LETTERS = ("A", "B", "C", "D")
SENTIMENTS = ("Good", "Bad")
STARS = ("Very Good", "Good", "Mediocre", "Bad", "Very Bad")


def wilson(hits: int, n: int) -> list[float]:
    """The 95 % Wilson score interval of a share of hits, as [low, high] in 0 to 1."""
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return [interval.low, interval.high]


# ------------------------------------------------------------------------------------------------------------- text


def score_text(prediction: str, answer: str) -> dict[str, bool]:
    """`exact` and `startswith`, both without white space at the ends.

    `startswith` also counts a prediction that goes on behind the answer: where it is far above `exact`, the model knows
    the answer and has not learned to stop.
    """
    prediction, answer = prediction.strip(), answer.strip()
    return {"exact": prediction == answer, "startswith": prediction.startswith(answer)}


# ---------------------------------------------------------------------------------------------------------- numbers

MARK = "####"
# Whatever a reader would take for one number, well written or not: 1/2 and 1.2.3 are no 1. A minus behind a word
# character or a bracket subtracts.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$-?)?\.?[0-9](?:[\w.,/:]*\w)?")
WELL_WRITTEN = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?")


def _number(word: str) -> Decimal | None:
    """The value of a number such as -$1,000.50, exactly; None for what is none."""
    plain = word.replace("$", "", 1)
    return Decimal(plain.replace(",", "")) if WELL_WRITTEN.fullmatch(plain) else None


def marked_number(text: str) -> Decimal | None:
    """The number that follows the first `####` on its line, as in GSM8K's answers (arXiv 2110.14168), or None."""
    behind = text.replace("−", "-").partition(MARK)[2].lstrip(" \t")
    word = NUMBER.match(behind)
    return _number(word[0]) if word else None


def last_number(text: str) -> Decimal | None:
    """The number behind `####` where that stands in the text, else the last number of the text; None without any."""
    if MARK in text:
        return marked_number(text)
    words = NUMBER.findall(text.replace("−", "-"))
    return _number(words[-1]) if words else None


def score_number(prediction: str, answer: str) -> Scores:
    """`number`: what stands behind `####` has the value of the answer's; `last_number`: it may also lack the mark.

    Values are compared exactly: 1,000 is $1000.0, and 50% is 50. Words behind the number do not count, 18 eggs are 18.
    """
    gold = marked_number(answer)
    if gold is None:
        return {"number": False, "last_number": False, "failure": "gold_syntax"}
    return {"number": marked_number(prediction) == gold, "last_number": last_number(prediction) == gold}


# ---------------------------------------------------------------------------------------------------------- answers

ARTICLES, PUNCTUATION = re.compile(r"\b(?:a|an|the)\b"), str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and extra white space: SQuAD's exact match (arXiv 1606.05250)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def score_answers(prediction: str, answers: tuple[str, ...]) -> Scores:
    """`answer_match`: the normalised prediction is one of the normalised answers; one with nothing left never is."""
    right = {normalise(answer) for answer in answers} - {""}
    scores: Scores = {"answer_match": normalise(prediction) in right}
    return scores if right else scores | {"failure": "gold_empty"}


def open_answers(example: Example) -> tuple[str, ...]:
    """What answers an NQ-Open question: any of its answers, or all of them as models are trained to write them."""
    return (example.assistant, *(example.answers or example.assistant.split("; ")))


# ---------------------------------------------------------------------------------------------------------- classes


def score_choice(prediction: str, answer: str, choices: tuple[str, ...]) -> Scores:
    """`choice`: the prediction is the answer's letter and nothing else, white space at the ends aside."""
    scores: Scores = {"choice": prediction.strip() == answer.strip() in choices}
    return scores if answer.strip() in choices else scores | {"failure": "gold_class"}


def score_class(prediction: str, answer: str, classes: tuple[str, ...]) -> Scores:
    """`class_match`: the prediction is the answer's class, whatever its case and the punctuation behind it."""

    def plain(text: str) -> str:
        return text.strip().rstrip(string.punctuation + string.whitespace).lower()

    known = plain(answer) in {plain(name) for name in classes}
    scores: Scores = {"class_match": known and plain(prediction) == plain(answer)}
    return scores if known else scores | {"failure": "gold_class"}


# ------------------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Task:
    """How a dataset's answers are scored. Every task also has `exact` and `startswith`."""

    scores: tuple[str, ...]  # the names of its own scores, the headline first; without any the headline is `exact`
    start: Callable[[Path | None], AbstractContextManager[Scorer]]  # of the folder with Spider's databases
    choices: tuple[str, ...] = ()  # where there are any, the model's answer is the likeliest of them
    needs_databases: bool = False


def pure(score: Scorer) -> Callable[[Path | None], AbstractContextManager[Scorer]]:
    """The start of a task whose scorer needs nothing opened."""

    @contextmanager
    def start(databases: Path | None) -> Iterator[Scorer]:
        yield score

    return start


@contextmanager
def start_regexes(databases: Path | None) -> Iterator[Scorer]:
    """Opens the scorer `dfa_equal`: the same text, or by regexes.dfa_equal the same language (arXiv 1608.03000)."""
    with Sandbox("llm_jepa.scoring.regexes:dfa_equal", REGEX_SECONDS) as sandbox:
        known: dict[tuple[str, str], tuple[bool, str | None]] = {}

        def compare(prediction: str, answer: str) -> tuple[bool, str | None]:
            if (prediction, answer) in known:
                return known[prediction, answer]
            equal, reason = False, None
            try:
                equal = sandbox.call(prediction, answer, REGEX_STATES)
            except Failure as failure:
                reason = failure.reason
            if reason in ("timeout", "memory", "crash") and prediction != answer:  # which of the two was it?
                of_answer = compare(answer, answer)[1]
                reason = f"gold_{of_answer}" if of_answer else reason
            if reason is None or not reason.endswith("crash"):  # which may have come from outside
                known[prediction, answer] = equal, reason
            return equal, reason

        def score(prediction: str, example: Example) -> Scores:
            texts = prediction.strip(), example.assistant.strip()
            equal, failure = (True, None) if texts[0] == texts[1] else compare(*texts)
            return {"dfa_equal": equal} | ({"failure": failure} if failure else {})

        yield score


def start_spider(databases: Path | None) -> AbstractContextManager[Scorer]:
    """Opens the scorer of `execution` and `execution_ordered`: the query gives the gold query's rows."""
    from llm_jepa.scoring.sql import ExecutionMatch

    return ExecutionMatch(databases)


REGEXES = Task(("dfa_equal",), start_regexes)
TASKS: dict[str, Task] = {
    "synth": REGEXES,
    "turk": REGEXES,
    "gsm8k": Task(("number", "last_number"), pure(lambda p, example: score_number(p, example.assistant))),
    "spider": Task(("execution", "execution_ordered"), start_spider, needs_databases=True),
    "nq_open": Task(("answer_match",), pure(lambda p, example: score_answers(p, open_answers(example)))),
    "hellaswag": Task(
        ("choice",), pure(lambda p, example: score_choice(p, example.assistant, LETTERS)), choices=LETTERS
    ),
    "rotten_tomatoes": Task(("class_match",), pure(lambda p, example: score_class(p, example.assistant, SENTIMENTS))),
    "yelp": Task(("class_match",), pure(lambda p, example: score_class(p, example.assistant, STARS))),
    "text": Task((), pure(lambda p, example: {})),
}
