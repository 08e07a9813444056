"""Datasets as their authors or the Hugging Face hub publish them → examples: a function for each in DATASETS.

Where a published split, order or seed is known, the function keeps to it; what it draws itself is drawn by `draw`.
"""

from __future__ import annotations

import csv
import heapq
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import synth_grammar
from sources import Row, Source, SpiderFiles, file_entry, refuse_other_encodings

from llm_jepa.data.examples import Example, ExampleError, parse_messages, split_examples

ROOT = Path(__file__).resolve().parents[1]
SEED = 42  # of `draw`, and of the published splits of the regex sets and of Spider
DRAWN_TRAIN, DRAWN_TEST = 8000, 2000  # rows drawn from a set with more


# ------------------------------------------------------------------------------------------------------------ rows


def chat(system: str | None, user: Any, assistant: Any) -> dict[str, Any]:
    """A row in the project's format."""
    turns = [("system", system), ("user", user), ("assistant", assistant)]
    return {"messages": [{"role": role, "content": text} for role, text in turns if text is not None]}


def as_row(example: Example) -> dict[str, Any]:
    """An example as the row that it is read from."""
    row = chat(example.system, example.user, example.assistant)
    if example.text is not None:
        row["text"] = [{"role": "user", "content": example.text}]
    if example.code is not None:
        row["code"] = [{"role": "assistant", "content": example.code}]
    if example.answers is not None:
        row["answers"] = list(example.answers)
    if example.group is not None:
        row["group"] = example.group
    return row


def to_examples(source: Source, rows: Iterable[Row], convert: Callable[[Any], dict[str, Any]]) -> list[Example]:
    """Each row converted to the project's format and checked; a bad one goes to the source's problems.

    Raises ExampleError where there are rows of which none can be used.
    """
    examples, place = [], None
    for place, number, row in rows:
        try:
            examples.append(parse_messages(convert(row), place, number))
        except ValueError as error:
            source.problems.add(place, str(error))
    if place is not None and not examples:
        raise source.no_rows(place.rpartition(":")[0] or place)  # the file of the last row
    return examples


def get(row: Any, name: str) -> Any:
    """A row's field. Raises ValueError where there is none."""
    if not isinstance(row, dict) or name not in row:
        raise ValueError(f"no field {name!r}")
    return row[name]


def label(row: Any, texts: dict[Any, str]) -> str:
    """The text of a row's label. Raises ValueError for one that is not known."""
    value = get(row, "label")
    try:
        return texts[value]
    except (KeyError, TypeError):
        raise ValueError(f"label {value!r} is not known") from None


def draw(rows: Iterable[Row], count: int) -> list[Row]:
    """`count` of the rows in random order, the same for the same rows in any Python; all in order for 0.

    One pass in the memory of `count` rows: those with the smallest of random numbers drawn one a row.
    """
    if count == 0:
        return list(rows)
    rng = random.Random(SEED)
    return [row for _, _, row in heapq.nsmallest(count, ((rng.random(), i, row) for i, row in enumerate(rows)))]


@dataclass
class Parts:
    """A dataset's train and test examples, how they were told apart or drawn, and a licence other than the table's.

    `published_split` is said instead of `split` where the rows are as many as published and none was left out.
    `other_set`: the rows are known not to be the published ones, so the published counts say nothing of them.
    """

    train: list[Example]
    test: list[Example]
    split: str
    licence: str | None = None
    published_split: str | None = None
    other_set: bool = False


# ---------------------------------------------------------------------------------------------------- the datasets

REGEX_SYSTEM = "Convert natural language to regular expression."
DEEP_REGEX = "https://github.com/nicholaslocascio/deep-regex"
# The newest commit that changed the files of NL-RX-Turk.
DEEP_REGEX_RAW = (
    "https://raw.githubusercontent.com/nicholaslocascio/deep-regex/a48ac3b994e9b9f769abf100db84ba85ca8d4956"
)


def deep_regex(source: Source, folder: str, remote: bool) -> Parts:
    """NL-RX-Synth or NL-RX-Turk: line i of targ.txt is the regex of line i of src.txt."""

    def lines(name: str) -> list[Row]:
        url = f"{DEEP_REGEX_RAW}/datasets/{folder}/{name}" if remote else None
        return source.lines(url, name, f"{folder}/{name}", f"datasets/{folder}/{name}")

    descriptions, regexes = lines("src.txt"), lines("targ.txt")
    if len(descriptions) != len(regexes):
        raise ExampleError(
            f"{descriptions[-1][0]} is the last line of the descriptions, {regexes[-1][0]} that of their regexes"
        )
    pairs = [(place, i, (d, r)) for (place, i, d), (_, _, r) in zip(descriptions, regexes, strict=True)]
    examples = to_examples(source, pairs, lambda pair: chat(REGEX_SYSTEM, *pair))
    train, test = split_examples(examples, 0.2, SEED)
    split = f"one in five at random, seed {SEED}"
    return Parts(train, test, split, published_split=f"{split}: the published split")


def synth(source: Source) -> Parts:
    """The project's own SYNTH rows; with --source NL-RX-Synth of arXiv 1608.03000."""
    if source.path is not None:
        return deep_regex(source, "NL-RX-Synth", remote=False)
    source.entries.append({"generator": "synth_grammar.py"})
    train, test = (
        to_examples(
            source,
            [("synth_grammar.py", i, pair) for i, pair in enumerate(pairs, start=1)],
            lambda pair: chat(REGEX_SYSTEM, *pair),
        )
        for pairs in synth_grammar.draw_pairs()
    )
    return Parts(train, test, "every fifth pair is a test pair", "Apache-2.0")


def turk(source: Source) -> Parts:
    """NL-RX-Turk of arXiv 1608.03000: SYNTH's regexes in people's words."""
    return deep_regex(source, "NL-RX-Turk", remote=True)


GSM8K = "openai/gsm8k:main:{}@740312add88f781978c0658806c59bc2815b9866"


def gsm8k(source: Source) -> Parts:
    """GSM8K of arXiv 2110.14168: questions and answers in steps that end with `#### N`."""

    def convert(row: Any) -> dict[str, Any]:
        answer = get(row, "answer")
        if not isinstance(answer, str) or not re.search(r"#### .+\Z", answer):
            raise ValueError("the answer does not end with '#### N'")
        return chat("Answer the math question, show steps.", get(row, "question"), answer)

    def part(name: str) -> list[Example]:
        names = (f"{name}.jsonl", f"main/{name}-00000-of-00001.parquet")
        return to_examples(source, source.rows(GSM8K.format(name), *names), convert)

    return Parts(part("train"), part("test"), "the source's own", published_split="the authors' own")


SPIDER = "xlangai/spider:spider:{}@0c350918f3f29ec754f1181c65cdce76cd6c133c"
SPIDER_ZIP = ROOT / "spider_data.zip"


def spider(source: Source, split: str = "by_database") -> Parts:
    """Spider of arXiv 1809.08887, from spider_data.zip in the repository's root where there is no --source.

    `by_database` is the official train_spider.json and dev.json, which share no database (else ExampleError); `random`
    the split of the published figures, which mixes the two.
    """

    def convert(row: Any) -> dict[str, Any]:
        db_id, question, query = (get(row, name) for name in ("db_id", "question", "query"))
        if not all(isinstance(value, str) and value.strip() for value in (db_id, question, query)):
            raise ValueError("db_id, question and query have to be texts")
        return chat("Convert natural language to SQL.", f"For db_id:[{db_id}]\n\n{question}", query)

    def database(example: Example) -> str:
        return example.user.partition("\n")[0].removeprefix("For db_id:")

    path, licence = source.path or (SPIDER_ZIP if SPIDER_ZIP.exists() else None), None
    if path is None:
        rows = [source.rows(SPIDER.format("train")), source.rows(SPIDER.format("validation"))]
    else:
        files, names = SpiderFiles(source, path), ("train_spider.json", "dev.json")
        rows, licence = [files.rows(name) for name in names], files.licence()
        source.entries += files.entries(*names)
    other_set = licence is not None  # the official files state none; the project's own set does
    train, dev = (to_examples(source, part, convert) for part in rows)
    if split == "random":
        train, dev = split_examples(train + dev, 0.18, SEED)
        shares = f"18 % of train_spider.json and dev.json at random, seed {SEED}"
        return Parts(train, dev, shares, licence, f"{shares}: the published split", other_set)
    both = sorted({database(e) for e in train} & {database(e) for e in dev})
    if both:
        raise ExampleError(
            f"{path or 'xlangai/spider'}: {len(both)} databases stand in train_spider.json and in dev.json too "
            f"({', '.join(both[:3])}), so the test rows would not be of unseen ones; give --split random"
        )
    shares = "by database: {} train_spider.json and dev.json"
    return Parts(train, dev, shares.format("the source's"), licence, shares.format("the authors'"), other_set)


PARAPHRASE = "cestwc/paraphrase:coco@main"  # the newest commit's hash is not published anywhere but on the hub


def paraphrase(source: Source, train_rows: int = 0) -> Parts:
    """cestwc/paraphrase, sets of five captions: sentence i and i + 1 of a set are a pair, as in arXiv 2509.14252.

    A row keeps its set's id as "group", which evaluate.py --t_sne_type paraphrase tells apart.
    """
    names = ("coco-00000-of-00001.parquet", "data/coco-00000-of-00001.parquet")
    sets: dict[Any, list[tuple[str, int, str]]] = {}
    for place, number, row in source.rows(PARAPHRASE, *names, alone=True):
        try:
            sets.setdefault(get(row, "paraphrase_set_id"), []).append((place, number, get(row, "text")))
        except (ValueError, TypeError) as error:
            source.problems.add(place, str(error))
    pairs = [
        (place, number, (text, following, group))
        for group, sentences in sets.items()
        for (place, number, text), (_, _, following) in zip(sentences, sentences[1:], strict=False)
    ]
    if not pairs:
        where = "".join(entry.get("file") or entry["hub"] for entry in source.entries)
        raise source.no_rows(f"{where}: no set has two sentences")
    drawn = draw(pairs, train_rows)
    train = to_examples(source, drawn, lambda pair: chat(None, *pair[:2]) | {"group": str(pair[2])})
    return Parts(train, [], f"{_drawn([(train_rows, drawn)], 'the pairs')}; all for training")


SENTIMENT_SYSTEM = "Determine whether the comment is positive or negative"
ROTTEN_TOMATOES = "cornell-movie-review-data/rotten_tomatoes:{}@aa13bc287fa6fcab6daf52f0dfb9994269ffea28"
POLARITY = {"pos": "Good", 1: "Good", "neg": "Bad", 0: "Bad"}


def rotten_tomatoes(source: Source) -> Parts:
    """Sentences of Pang and Lee's polarity dataset; the hub cut 80/10/10 from each of its two files."""

    def convert(row: Any) -> dict[str, Any]:
        return chat(SENTIMENT_SYSTEM, get(row, "text"), label(row, POLARITY))

    if source.path is not None and not (source.path / "train.parquet").exists():
        train: list[Example] = []
        test: list[Example] = []
        for kind in ("pos", "neg"):
            names = (f"rt-polarity.{kind}", f"rt-polaritydata/rt-polarity.{kind}")
            lines = source.lines(None, *names, otherwise="latin-1")  # the authors' encoding
            rows = [(place, i, {"text": line, "label": kind}) for place, i, line in lines]
            train += to_examples(source, rows[: int(len(rows) * 0.8 + 0.5)], convert)
            test += to_examples(source, rows[int(len(rows) * 0.9 + 0.5) :], convert)
        shares = "the first 80 % and the last 10 % of each file"
        return Parts(train, test, shares, published_split=f"{shares}, as on the hub")
    train, test = (
        to_examples(source, source.rows(ROTTEN_TOMATOES.format(part), f"{part}.parquet"), convert)
        for part in ("train", "test")
    )
    return Parts(train, test, "the source's own", published_split="the hub's own")


YELP = "Yelp/yelp_review_full:yelp_review_full:{}@c1f9ee939b7d05667af864ee1cb066393154bf85"
# Stars as the hub names and numbers them, and as the authors' CSV files do.
STARS = {
    key: text
    for i, text in enumerate(("Very Bad", "Bad", "Mediocre", "Good", "Very Good"))
    for key in (i, f"{i + 1} star", f"{i + 1} stars", str(i + 1))
}


def yelp(source: Source, train_rows: int = DRAWN_TRAIN, test_rows: int = DRAWN_TEST) -> Parts:
    """Yelp Review Full of arXiv 1509.01626: reviews and their stars in words; the text is left as it is there."""

    def rows(part: str) -> Iterator[Row]:
        if source.path is not None and (source.path / f"{part}.csv").is_file():
            return _headless_csv(source, f"{part}.csv", ("label", "text"))
        return source.rows(YELP.format(part), f"yelp_review_full/{part}-00000-of-00001.parquet", f"{part}.csv")

    def convert(row: Any) -> dict[str, Any]:
        return chat(SENTIMENT_SYSTEM, get(row, "text"), label(row, STARS))

    sizes = (("train", train_rows), ("test", test_rows))
    drawn = [(count, draw(rows(part), count)) for part, count in sizes]
    train, test = (to_examples(source, part, convert) for _, part in drawn)
    return Parts(train, test, _drawn(drawn, "the authors' parts"))


def _drawn(parts: Sequence[tuple[int, Sequence[Row]]], of: str) -> str:
    """What was drawn `of` them, by part: the number asked for, 0 for all, and the rows that were there for it."""
    sizes = []
    for asked, rows in parts:
        fewer = f" {len(rows)}, fewer than {asked}," if len(rows) < asked else ""
        sizes.append(str(asked) if asked and not fewer else f"all{fewer}")
    if any(asked and len(rows) >= asked for asked, rows in parts):
        order = f"drawn with seed {SEED}"
    else:
        order = f"in an order drawn with seed {SEED}" if any(asked for asked, _ in parts) else "in order"
    return f"{' and '.join(sizes)} of {of}, {order}"


def _headless_csv(source: Source, name: str, fields: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a CSV file without a line of names. Raises ExampleError where it is not CSV or has none."""
    path = source.find(name)
    refuse_other_encodings(path)
    source.entries.append(file_entry(path))
    csv.field_size_limit(max(csv.field_size_limit(), path.stat().st_size))
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        empty = True
        try:
            for number, cells in enumerate(reader, start=1):
                if len(cells) != len(fields):
                    source.problems.add(f"{path}:{reader.line_num}", f"{len(cells)} cells, not {len(fields)}")
                    continue
                empty = False
                yield f"{path}:{reader.line_num}", number, dict(zip(fields, cells, strict=True))
        except csv.Error as error:
            raise ExampleError(f"{path}: not CSV behind line {reader.line_num} ({error})") from None
    if empty:
        raise source.no_rows(str(path))


NQ_OPEN = "google-research-datasets/nq_open:nq_open:train@5dd9790a83002ad084ddeb7c420dc716852c6f28"
# EfficientQA's test part is not on the hub.
NQ_OPEN_TEST = (
    "https://raw.githubusercontent.com/google-research-datasets/natural-questions/"
    "be01ce2dfdf4784010b00d1e0d28d8d789dd9c06/nq_open/NQ-open.efficientqa.test.1.1.jsonl"
)


def nq_open(source: Source, train_rows: int = DRAWN_TRAIN) -> Parts:
    """NQ-Open of arXiv 1906.00300: train from its own training part, test from EfficientQA's, as published."""

    def convert(row: Any) -> dict[str, Any]:
        answers = get(row, "answer")
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError("field 'answer' is not a list of texts")
        return chat("Answer the question below.", get(row, "question"), "; ".join(answers)) | {"answers": answers}

    names = ("NQ-open.train.jsonl", "nq_open/train-00000-of-00001.parquet")
    drawn = draw(source.rows(NQ_OPEN, *names), train_rows)
    train = to_examples(source, drawn, convert)
    tests = list(source.rows(NQ_OPEN_TEST, "NQ-open.efficientqa.test.1.1.jsonl"))
    test = to_examples(source, tests, convert)
    split = _drawn([(train_rows, drawn), (0, tests)], "NQ-Open's training part and EfficientQA's test part")
    return Parts(train, test, split)


HELLASWAG = "Rowan/hellaswag:{}@218ec52e09a7e7462a5400043bb9a69a41d06b76"
HELLASWAG_SYSTEM = "Which one of A), B), C), or D) is the best ending for the context? Answer A, B, C, or D."


def hellaswag(source: Source, train_rows: int = DRAWN_TRAIN, test_rows: int = DRAWN_TEST) -> Parts:
    """HellaSwag of arXiv 1905.07830: a context and four endings → the letter; its views are the context and the ending.

    Test rows are drawn from the validation part: the test part has no labels.
    """

    def convert(row: Any) -> dict[str, Any]:
        context, endings, right = (get(row, name) for name in ("ctx", "endings", "label"))
        if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(text, str) for text in endings):
            raise ValueError("field 'endings' is not a list of four texts")
        if str(right) not in ("0", "1", "2", "3"):
            raise ValueError(f"label {right!r} is none of 0, 1, 2 and 3")
        choices = "".join(f"\n{letter}) {ending}" for letter, ending in zip("ABCD", endings, strict=True))
        return chat(HELLASWAG_SYSTEM, f"{context}{choices}", "ABCD"[int(right)]) | {
            "text": [{"role": "user", "content": context}],
            "code": [{"role": "assistant", "content": endings[int(right)]}],
        }

    def part(name: str, short: str, count: int) -> tuple[int, list[Row]]:
        names = (f"hellaswag_{short}.jsonl", f"data/hellaswag_{short}.jsonl", f"data/{name}-00000-of-00001.parquet")
        return count, draw(source.rows(HELLASWAG.format(name), *names), count)

    drawn = [part("train", "train", train_rows), part("validation", "val", test_rows)]
    train, test = (to_examples(source, rows, convert) for _, rows in drawn)
    return Parts(train, test, _drawn(drawn, "the training and the validation part"))


# ------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset: `takes` says what --source has to be, `rows` how many there are as published.

    `parts` are those that it has; each has to have rows.
    """

    convert: Callable[..., Parts]
    licence: str
    takes: str
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)  # by `split`, else under ""
    flags: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("train", "test")


DATASETS = {
    "synth": Dataset(
        synth,
        "MIT",
        f"a folder with NL-RX-Synth's src.txt and targ.txt, from {DEEP_REGEX}",
        {"": (8000, 2000)},
    ),
    "turk": Dataset(
        turk,
        "MIT",
        f"a folder with NL-RX-Turk's src.txt and targ.txt, from {DEEP_REGEX}",
        {"": (8000, 2000)},
    ),
    "gsm8k": Dataset(
        gsm8k,
        "MIT",
        "a folder with train.jsonl and test.jsonl, from https://github.com/openai/grade-school-math, "
        "or a copy of the hub's openai/gsm8k",
        {"": (7473, 1319)},
    ),
    "spider": Dataset(
        spider,
        "CC BY-SA 4.0",
        "spider_data.zip or that unpacked, from https://yale-lily.github.io/spider",
        {"by_database": (7000, 1034), "random": (6587, 1447)},
        ("split",),
    ),
    "paraphrase": Dataset(
        paraphrase,
        "unknown",
        "coco-00000-of-00001.parquet of the hub's cestwc/paraphrase, or other rows with paraphrase_set_id and text",
        {},
        ("train_rows",),
        ("train",),
    ),
    "rotten_tomatoes": Dataset(
        rotten_tomatoes,
        "unknown",
        "a folder with rt-polarity.pos and rt-polarity.neg, from "
        "https://www.cs.cornell.edu/people/pabo/movie-review-data, "
        "or a copy of the hub's cornell-movie-review-data/rotten_tomatoes",
        {"": (8530, 1066)},
    ),
    "yelp": Dataset(
        yelp,
        "other (the Yelp dataset's agreement)",
        "a folder with train.csv and test.csv (stars, text; no line of names), as published with arXiv 1509.01626, "
        "or a copy of the hub's Yelp/yelp_review_full",
        {"": (DRAWN_TRAIN, DRAWN_TEST)},
        ("train_rows", "test_rows"),
    ),
    "nq_open": Dataset(
        nq_open,
        "CC BY-SA 3.0",
        "a folder with NQ-open.train.jsonl and NQ-open.efficientqa.test.1.1.jsonl, from "
        "https://github.com/google-research-datasets/natural-questions (nq_open)",
        {"": (DRAWN_TRAIN, 1769)},
        ("train_rows",),
    ),
    "hellaswag": Dataset(
        hellaswag,
        "MIT",
        "a folder with hellaswag_train.jsonl and hellaswag_val.jsonl, from https://github.com/rowanz/hellaswag, "
        "or a copy of the hub's Rowan/hellaswag",
        {"": (DRAWN_TRAIN, DRAWN_TEST)},
        ("train_rows", "test_rows"),
    ),
}
