"""The tasks and their scores: functions of a prediction and the example that it answers.

To add a task, add an entry to TASKS; `--task`, the scores of evaluate.py and the report follow from it. A user's task
is a file with a function `score` (docs/extending.md).
"""

from __future__ import annotations

import functools
import importlib.util
import re
import statistics
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.examples import Example
from llm_jepa.losses import CHAT_LOSSES
from llm_jepa.scoring.programs import passes_tests
from llm_jepa.scoring.sandbox import Failure, Sandbox
from llm_jepa.scoring.sql import execution_match

# score → right or wrong, or a number from 0 to 1; "failure" → one word, if the task could not compare the two
Scores = dict[str, bool | float | str]
Scorer = Callable[[str, Example], Scores]

# Automata of the datasets' own answers have up to 2,409 states and take 0.1 s.
REGEX_STATES, REGEX_SECONDS = 10_000, 5.0
LETTERS = ("A", "B", "C", "D")
SENTIMENTS = ("Good", "Bad")
STARS = ("Very Good", "Good", "Mediocre", "Bad", "Very Bad")


def interval(values: list[bool | float]) -> list[float]:
    """A 95 % interval of the mean of scores in 0 to 1: Wilson's if all are 0 or 1, else mean ± 1.96 standard errors."""
    n = len(values)
    if n < 2 or set(values) <= {0, 1}:
        from scipy.stats import binomtest

        return list(binomtest(round(sum(values)), n).proportion_ci(method="wilson"))
    mean, margin = statistics.fmean(values), 1.959964 * statistics.stdev(values) / n**0.5
    return [max(0.0, mean - margin), min(1.0, mean + margin)]


# ------------------------------------------------------------------------------------------------------------- text


def score_text(prediction: str, answer: str) -> dict[str, bool]:
    """`exact` and `startswith`, both without white space at the ends.

    `startswith` also counts a prediction that continues after the answer. If it is far above `exact`, the model knows
    the answer but has not learned to stop.
    """
    prediction, answer = prediction.strip(), answer.strip()
    return {"exact": prediction == answer, "startswith": prediction.startswith(answer)}


# ---------------------------------------------------------------------------------------------------------- numbers

# Everything that a reader would take for one number, so that 1/2 and 1.2.3 are not read as 1. A minus after a word
# character or a bracket is a subtraction.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$-?)?\.?[0-9](?:[\w.,/:]*\w)?")
MARKED = re.compile(rf"####[ \t]*({NUMBER.pattern})")
WELL_FORMED = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?")
# Separators of thousands besides the comma: in LaTeX, typographic spaces and apostrophes, and Python's underscore.
SEPARATOR = r"(?:(?:,|\{\\?,\})(?:\\!)?|\\(?:[,;: ]|thinspace )|~|[\u00a0\u2009\u202f'’_])"
GROUPED = re.compile(rf"(?<![\w.,])[0-9]{{1,3}}(?:{SEPARATOR}[0-9]{{3}})+(?![0-9])")


def _number(word: str) -> Decimal | None:
    """The exact value of a number such as -$1,000.50, or None."""
    plain = word.replace("$", "", 1)
    return Decimal(plain.replace(",", "")) if WELL_FORMED.fullmatch(plain) else None


def _usual(text: str) -> str:
    """The text with a hyphen for each minus sign and commas between thousands."""
    return GROUPED.sub(lambda found: re.sub(SEPARATOR, ",", found[0]), text.translate({0x2212: "-", 0x2011: "-"}))


def marked_number(text: str) -> Decimal | None:
    """The number directly after the first `####` with one, as in GSM8K's answers (arXiv 2110.14168), or None."""
    return next((n for word in MARKED.findall(_usual(text)) if (n := _number(word)) is not None), None)


def last_number(text: str) -> Decimal | None:
    """The number after `####` if there is one, else the last number of the text, or None."""
    if (marked := marked_number(text)) is not None:
        return marked
    words = NUMBER.findall(_usual(text))
    return _number(words[-1]) if words else None


def score_number(prediction: str, example: Example) -> Scores:
    """`number`: the number after `####` equals the answer's. `last_number`: the mark may be missing.

    Values are compared exactly: 1,000 equals $1000.0, and 50% equals 50. Words after the number are ignored: 18 eggs
    equals 18.
    """
    gold = marked_number(example.assistant)
    if gold is None:
        return {"number": False, "last_number": False, "failure": "gold_syntax"}
    return {"number": marked_number(prediction) == gold, "last_number": last_number(prediction) == gold}


# ---------------------------------------------------------------------------------------------- answers and classes

ARTICLES, PUNCTUATION = re.compile(r"\b(?:a|an|the)\b"), str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case without ASCII punctuation, articles and extra white space, as in SQuAD (arXiv 1606.05250)."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def score_answers(prediction: str, example: Example) -> Scores:
    """`answer_match`: the normalized prediction equals a normalized answer that is not empty.

    The answers are those to an NQ-Open question, and all of them joined, which is how models are trained to write them.
    """
    answers = (example.assistant, *(example.answers or example.assistant.split("; ")))
    right = {normalize(answer) for answer in answers} - {""}
    return {"answer_match": normalize(prediction) in right} | ({} if right else {"failure": "gold_empty"})


def score_choice(prediction: str, example: Example) -> Scores:
    """`choice`: the prediction is the answer's letter, except for white space at the ends."""
    answer = example.assistant.strip()
    failure = {} if answer in LETTERS else {"failure": "gold_class"}
    return {"choice": prediction.strip() == answer in LETTERS} | failure


def score_class(prediction: str, example: Example, classes: tuple[str, ...]) -> Scores:
    """`class_match`: the prediction is the answer's class, except for case and punctuation at the end."""
    guess, answer, *known = (
        text.strip().rstrip(string.punctuation + string.whitespace).lower()
        for text in (prediction, example.assistant, *classes)
    )
    failure = {} if answer in known else {"failure": "gold_class"}
    return {"class_match": guess == answer in known} | failure


# ---------------------------------------------------------------------------------------------------------- regexes


@contextmanager
def start_regexes(databases: Path | None) -> Iterator[Scorer]:
    """Opens the scorer `dfa_equal`: the same text or, by regexes.dfa_equal, the same language (arXiv 1608.03000)."""
    with Sandbox("llm_jepa.scoring.regexes:dfa_equal", REGEX_SECONDS) as sandbox:

        @functools.cache
        def compare(prediction: str, answer: str) -> bool | Failure:
            try:
                return sandbox.call(prediction, answer, REGEX_STATES)
            except Failure as failure:
                return failure

        def score(prediction: str, example: Example) -> Scores:
            prediction, answer = prediction.strip(), example.assistant.strip()
            equal = prediction == answer or compare(prediction, answer)
            if not isinstance(equal, Failure):
                return {"dfa_equal": equal}
            gold = compare(answer, answer)  # is the answer the cause?
            return {"dfa_equal": False, "failure": f"gold_{gold}" if isinstance(gold, Failure) else equal.reason}

        yield score


# ------------------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Task:
    """How predictions are scored. Every task also has the scores `exact` and `startswith`."""

    scores: tuple[str, ...]  # names of the task's own scores, the primary one first; if empty, `exact` is primary
    # Opens the scorer. The argument: Spider's databases, or whether programs may run without isolation.
    start: Callable[[Any], AbstractContextManager[Scorer]]
    choices: tuple[str, ...] = ()  # if given, the prediction is the likeliest of these, and nothing is generated
    needs_databases: bool = False
    runs_programs: bool = False

    @property
    def primary(self) -> str:
        """The name of the primary score."""
        return (*self.scores, "exact")[0]


def pure(score: Scorer) -> Callable[[Any], AbstractContextManager[Scorer]]:
    """The `start` of a task whose scorer opens nothing."""
    return lambda _: nullcontext(score)


REGEXES = Task(("dfa_equal",), start_regexes)
TASKS: dict[str, Task] = {
    "synth": REGEXES,
    "turk": REGEXES,
    "gsm8k": Task(("number", "last_number"), pure(score_number)),
    "spider": Task(("execution", "execution_ordered"), execution_match, needs_databases=True),
    "mbpp": Task(("pass_at_1",), passes_tests, runs_programs=True),
    "nq_open": Task(("answer_match",), pure(score_answers)),
    "hellaswag": Task(("choice",), pure(score_choice), LETTERS),
    "rotten_tomatoes": Task(("class_match",), pure(functools.partial(score_class, classes=SENTIMENTS))),
    "yelp": Task(("class_match",), pure(functools.partial(score_class, classes=STARS))),
    "text": Task((), pure(lambda prediction, example: {})),
}
TASK_NAMES = ", ".join(TASKS) + " (compares the texts), or a Python file with a function `score`"

# -------------------------------------------------------------------------------------------------- a user's own task

# Keys of predictions.jsonl, generations.jsonl, metrics.json and metrics.jsonl, which a score would replace.
RESERVED = {f"{name}_loss" for name in CHAT_LOSSES}.union(
    """id prediction prompt answer step failure failures exact startswith stop_rate stop_reason score scores
    task n notes ci95 cut_at_limit log_likelihoods settings model data_sha256 retrieval cosine loss lm_loss jepa_loss
    sigreg_loss runtime argv git_commit git_dirty code_sha256 versions device threads processes
    skipped_examples""".split()
)


def is_task_file(name: str | None) -> bool:
    """Whether --task names a file."""
    return (name or "").endswith(".py")


def find_task(name: str) -> Task:
    """The task of --task: a key of TASKS, or the task of a file. Raises UsageError if there is none."""
    if is_task_file(name):
        return file_task(name)
    if name not in TASKS:
        raise UsageError(f"--task {name} is not known; give one of {TASK_NAMES}")
    return TASKS[name]


@functools.cache
def file_task(file: str) -> Task:
    """The task of a file with a function score(generation: str, example: Example) → bool, or a number from 0 to 1.

    The score has the name of the file. Raises UsageError if the file cannot be used, and when scoring for an exception
    or another value, with the example.
    """
    path = Path(file)
    if path.stem in RESERVED | TASKS.keys():
        raise UsageError(f"--task {file}: the file gives its name to the score, and {path.stem} is taken; rename it")
    try:
        spec = importlib.util.spec_from_file_location(f"task_file_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(module)
        score = module.score
    except (Exception, SystemExit) as error:  # of any kind, from the user's code
        raise UsageError(f"--task {file}: {type(error).__name__}: {first_line(error)}") from None

    def checked(prediction: str, example: Example) -> Scores:
        try:
            value = score(prediction, example)
            value = value if isinstance(value, bool) else float(value)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"--task {file}: {example.source}: score fails with {reason}") from None
        if not 0 <= value <= 1:
            raise UsageError(f"--task {file}: {example.source}: score returns {value}, which is not in 0 to 1")
        return {path.stem: value}

    return Task((path.stem,), pure(checked))
