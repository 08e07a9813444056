"""Published datasets → examples: one function per dataset, listed in DATASETS.

Published splits, orders and seeds are kept. Subsets are drawn by `draw`.
"""

from __future__ import annotations

import heapq
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import synth_grammar
from sources import Row, hub, json_rows, lines, spider_folder

from llm_jepa.data.examples import Example, ExampleError, Problems, parse_messages, split_examples

ROOT = Path(__file__).resolve().parents[1]
SEED = 42  # of `draw`, and of random splits, as published
DRAWN = {"": (8000, 2000)}  # examples of train and test, if they are drawn from more; also the sizes of deep-regex


def chat(system: str | None, user: Any, assistant: Any) -> dict[str, Any]:
    """An example in the project's file format."""
    turns = [("system", system), ("user", user), ("assistant", assistant)]
    return {"messages": [{"role": role, "content": text} for role, text in turns if text is not None]}


def to_json(example: Example) -> dict[str, Any]:
    """The JSON object that an example is read from."""
    optional = {
        "messages": example.messages or None,
        "pair": None if example.pair else False,
        "text": example.text and [{"role": "user", "content": example.text}],
        "code": example.code and [{"role": "assistant", "content": example.code}],
        "answers": example.answers,
        "group": example.group,
        "tests": example.tests,
    }
    return {name: value for name, value in optional.items() if value is not None}


def to_examples(rows: Iterable[Row], convert: Callable[[Any], dict[str, Any]], problems: Problems) -> list[Example]:
    """Converts and checks each row. Rows of another form than `convert` expects are added to `problems`."""
    examples = []
    for place, number, row in rows:
        try:
            examples.append(parse_messages(convert(row), place, number))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            problems.add(place, f"not a row of this dataset ({type(error).__name__}: {error})")
        except ValueError as error:
            problems.add(place, str(error))
    return examples


def draw(rows: Iterable[Row], count: int) -> list[Row]:
    """`count` rows in random order, the same for every Python version.

    One pass, in the memory of `count` rows: a random number is drawn per row, and the rows with the smallest are kept.
    """
    rng = random.Random(SEED)
    return [row for _, _, row in heapq.nsmallest(count, ((rng.random(), i, row) for i, row in enumerate(rows)))]


Parts = tuple[list[Example], list[Example] | None]  # train and test; None: the dataset has no test part


def hub_parts(
    address: str, convert: Callable, problems: Problems, parts: tuple[str, str] = ("train", "test"), drawn: bool = False
) -> Parts:
    """The two parts of a hub dataset, or DRAWN examples of each; `address` has {} for the part."""
    rows = [hub(address.format(part)) for part in parts]
    rows = [draw(part, count) for part, count in zip(rows, DRAWN[""], strict=True)] if drawn else rows
    train, test = (to_examples(part, convert, problems) for part in rows)
    return train, test


REGEX_SYSTEM = "Convert natural language to regular expression."
DEEP_REGEX = "nicholaslocascio/deep-regex"
DEEP_REGEX_FILES = f"folder with src.txt and targ.txt, from https://github.com/{DEEP_REGEX}"
# The last commit that changed the files.
DEEP_REGEX_RAW = f"https://raw.githubusercontent.com/{DEEP_REGEX}/a48ac3b994e9b9f769abf100db84ba85ca8d4956"


def deep_regex(folder: str, source: Path | None, problems: Problems) -> Parts:
    """NL-RX-Synth or NL-RX-Turk: line i of targ.txt is the regular expression of line i of src.txt."""
    names = (f"{DEEP_REGEX_RAW}/datasets/{folder}/{file}.txt" for file in ("src", "targ"))
    descriptions, regexes = (lines(name, source) for name in names)
    if len(descriptions) != len(regexes):
        raise ExampleError(f"{descriptions[-1][0]} and {regexes[-1][0]} are the last lines; the numbers must be equal")
    pairs = [(place, i, (d, r)) for (place, i, d), (_, _, r) in zip(descriptions, regexes, strict=True)]
    examples = to_examples(pairs, lambda pair: chat(REGEX_SYSTEM, *pair), problems)
    return split_examples(examples, 0.2, SEED)


def synth(source: Path | None, problems: Problems) -> Parts:
    """The project's own SYNTH examples; with --source NL-RX-Synth of arXiv 1608.03000."""
    if source is not None:
        return deep_regex("NL-RX-Synth", source, problems)
    rows = ([("synth_grammar.py", i, pair) for i, pair in enumerate(p, start=1)] for p in synth_grammar.draw_pairs())
    train, test = (to_examples(part, lambda pair: chat(REGEX_SYSTEM, *pair), problems) for part in rows)
    return train, test


def turk(source: Path | None, problems: Problems) -> Parts:
    """NL-RX-Turk of arXiv 1608.03000: SYNTH's regular expressions, described by people."""
    return deep_regex("NL-RX-Turk", source, problems)


GSM8K = "openai/gsm8k:main:{}@740312add88f781978c0658806c59bc2815b9866"


def gsm8k(source: Path | None, problems: Problems) -> Parts:
    """GSM8K of arXiv 2110.14168: questions and answers in steps that end with `#### N`."""

    def convert(row: Any) -> dict[str, Any]:
        if not re.search(r"#### .+\Z", row["answer"]):
            raise ValueError("the answer does not end with '#### N'")
        return chat("Answer the math question, show steps.", row["question"], row["answer"])

    return hub_parts(GSM8K, convert, problems)


SPIDER = "xlangai/spider:spider:{}@0c350918f3f29ec754f1181c65cdce76cd6c133c"
SPIDER_ZIP = ROOT / "spider_data.zip"
SPIDER_FILES = "spider_data.zip or the unpacked folder, from https://yale-lily.github.io/spider"
SPIDER_COUNTS = {"by_database": (7000, 1034), "random": (6587, 1447)}


def spider(source: Path | None, problems: Problems, split: str = "by_database") -> Parts:
    """Spider of arXiv 1809.08887, from spider_data.zip in the repository's root unless --source is given.

    `by_database` is the official split into train_spider.json and dev.json, which must not share a database (else
    ExampleError). `random` is the split of the published scores, which mixes the two files.
    """

    def convert(row: Any) -> dict[str, Any]:
        db_id, question, query = (row.get(name) for name in ("db_id", "question", "query"))
        if not all(isinstance(value, str) and value.strip() for value in (db_id, question, query)):
            raise ValueError("db_id, question and query must be non-empty strings")
        return chat("Convert natural language to SQL.", f"For db_id:[{db_id}]\n\n{question}", query)

    path = source or (SPIDER_ZIP if SPIDER_ZIP.exists() else None)
    if path is None:
        train, dev = hub_parts(SPIDER, convert, problems, ("train", "validation"))
    else:
        files = (spider_folder(path) / name for name in ("train_spider.json", "dev.json"))
        train, dev = (to_examples(json_rows(file), convert, problems) for file in files)
    if split == "random":
        return split_examples(train + dev, 0.18, SEED)
    first, second = ({example.user.partition("\n")[0] for example in part} for part in (train, dev))
    if both := [line.removeprefix("For db_id:") for line in sorted(first & second)]:
        raise ExampleError(
            f"{path or SPIDER}: train_spider.json and dev.json share {len(both)} databases ({', '.join(both[:3])}), so "
            "the test databases would not be unseen; use --split random"
        )
    return train, dev


PARAPHRASE = "cestwc/paraphrase:coco@main"  # no stable commit is published


def paraphrase(source: Path | None, problems: Problems) -> Parts:
    """cestwc/paraphrase, sets of five captions: sentences i and i + 1 of a set are a pair, as in arXiv 2509.14252.

    An example keeps the id of its set as "group", which evaluate.py --t_sne_type paraphrase uses.
    """
    sets: dict[Any, list[Row]] = {}
    for row in hub(PARAPHRASE):
        sets.setdefault(row[2]["paraphrase_set_id"], []).append(row)
    pairs = [
        (place, number, (first["text"], second["text"], group))
        for group, rows in sets.items()
        for (place, number, first), (_, _, second) in zip(rows, rows[1:], strict=False)
    ]
    return to_examples(pairs, lambda pair: chat(None, *pair[:2]) | {"group": str(pair[2])}, problems), None


SENTIMENT_SYSTEM = "Determine whether the comment is positive or negative"
ROTTEN_TOMATOES = "cornell-movie-review-data/rotten_tomatoes:{}@aa13bc287fa6fcab6daf52f0dfb9994269ffea28"
POLARITY = {"pos": "Good", "neg": "Bad"}


def sentiment(answers: dict[str, str]) -> Callable[[Any], dict[str, Any]]:
    """A function that converts a text with a label; `answers` by label."""
    return lambda row: chat(SENTIMENT_SYSTEM, row["text"], answers[row["label"]])


def rotten_tomatoes(source: Path | None, problems: Problems) -> Parts:
    """Sentences of Pang and Lee's polarity dataset, with the hub's train and test parts."""
    return hub_parts(ROTTEN_TOMATOES, sentiment(POLARITY), problems)


YELP = "Yelp/yelp_review_full:yelp_review_full:{}@c1f9ee939b7d05667af864ee1cb066393154bf85"
# "2 star" is the hub's spelling.
STARS = {"1 star": "Very Bad", "2 star": "Bad", "3 stars": "Mediocre", "4 stars": "Good", "5 stars": "Very Good"}


def yelp(source: Path | None, problems: Problems) -> Parts:
    """Yelp Review Full of arXiv 1509.01626: reviews with their stars in words."""
    return hub_parts(YELP, sentiment(STARS), problems, drawn=True)


NQ_OPEN = "google-research-datasets/nq_open:nq_open:train@5dd9790a83002ad084ddeb7c420dc716852c6f28"
# The test part of EfficientQA is not on the hub.
NQ_OPEN_TEST = (
    "https://raw.githubusercontent.com/google-research-datasets/natural-questions/"
    "be01ce2dfdf4784010b00d1e0d28d8d789dd9c06/nq_open/NQ-open.efficientqa.test.1.1.jsonl"
)


def nq_open(source: Path | None, problems: Problems) -> Parts:
    """NQ-Open of arXiv 1906.00300: train from its own training part, test from EfficientQA's, as published."""

    def convert(row: Any) -> dict[str, Any]:
        answers = row["answer"]
        return chat("Answer the question below.", row["question"], "; ".join(answers)) | {"answers": answers}

    train = to_examples(draw(hub(NQ_OPEN), DRAWN[""][0]), convert, problems)
    return train, to_examples(lines(NQ_OPEN_TEST), lambda line: convert(json.loads(line)), problems)


HELLASWAG = "Rowan/hellaswag:{}@218ec52e09a7e7462a5400043bb9a69a41d06b76"
HELLASWAG_SYSTEM = "Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D."


def hellaswag(source: Path | None, problems: Problems) -> Parts:
    """HellaSwag of arXiv 1905.07830: a context and four endings → the letter; the views are the context and the ending.

    Test examples are drawn from the validation part, because the test part has no labels.
    """

    def convert(row: Any) -> dict[str, Any]:
        context, endings, answer = row["ctx"], row["endings"], int(row["label"])
        choices = "".join(f"\n{letter}) {ending}" for letter, ending in zip("ABCD", endings, strict=True))
        return chat(HELLASWAG_SYSTEM, f"{context}{choices}", "ABCD"[answer]) | {
            "text": [{"role": "user", "content": context}],
            "code": [{"role": "assistant", "content": endings[answer]}],
        }

    return hub_parts(HELLASWAG, convert, problems, ("train", "validation"), drawn=True)


MBPP = "google-research-datasets/mbpp:full:{}@4bb6404fdc6cacfda99d4ac4205087b89d32030c"
# The paper's prompt (section 3).
MBPP_PROMPT = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}"


def mbpp(source: Path | None, problems: Problems) -> Parts:
    """MBPP of arXiv 2108.07732: task and tests → Python program; the Text view is the task without the tests."""

    def convert(row: Any) -> dict[str, Any]:
        tests = [test.replace("\r\n", "\n").strip() for test in (row["test_setup_code"], *row["test_list"])]
        tests = [test for test in tests if test]
        prompt = MBPP_PROMPT.format(row["text"], "\n".join(row["test_list"]))
        return chat(None, prompt, row["code"].replace("\r\n", "\n").strip()) | {
            "text": [{"role": "user", "content": row["text"]}],
            "tests": tests,
        }

    return hub_parts(MBPP, convert, problems)


@dataclass(frozen=True)
class Dataset:
    """An entry of DATASETS.

    `source` is the help text of --source, None for datasets that are only on the hub. `counts` are the published
    numbers of train and test examples, by --split (or "").
    """

    convert: Callable[..., Parts]
    license: str
    source: str | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)


DATASETS = {
    "synth": Dataset(synth, "MIT", DEEP_REGEX_FILES, DRAWN),
    "turk": Dataset(turk, "MIT", DEEP_REGEX_FILES, DRAWN),
    "gsm8k": Dataset(gsm8k, "MIT", None, {"": (7473, 1319)}),
    "spider": Dataset(spider, "CC BY-SA 4.0", SPIDER_FILES, SPIDER_COUNTS),
    "paraphrase": Dataset(paraphrase, "unknown"),
    "rotten_tomatoes": Dataset(rotten_tomatoes, "unknown", None, {"": (8530, 1066)}),
    "yelp": Dataset(yelp, "other (the Yelp dataset's agreement)", None, DRAWN),
    "nq_open": Dataset(nq_open, "CC BY-SA 3.0", None, {"": (8000, 1769)}),
    "mbpp": Dataset(mbpp, "CC BY 4.0", None, {"": (374, 500)}),
    "hellaswag": Dataset(hellaswag, "MIT", None, DRAWN),
}
