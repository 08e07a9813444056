"""Checks a dataset before training: repeated examples, leaks between train and test, long chats, changed files."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, Problems, read_examples
from llm_jepa.data.rendering import Renderer
from llm_jepa.files import read_json, sha256

SHOWN = 5  # line numbers per finding
LOOSE = "ignoring case, spaces and Unicode form"
DATABASE = re.compile(r"For db_id:\[([^]]*)\]\n\n")


@dataclass(frozen=True)
class Finding:
    """The lines of one part that have a property. A leak is something of the train part that test also has."""

    what: str
    lines: list[int]  # of the test file if the finding compares both parts
    total: int  # number of examples checked
    leak: bool = False

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.lines[:SHOWN])) + (" …" if len(self.lines) > SHOWN else "")
        mark = "LEAK" if self.leak and self.lines else ""
        return f"  {mark:4} {len(self.lines):>6} of {self.total:<6} {self.what}" + (f": lines {shown}" if shown else "")


def find_parts(target: str, data_dir: Path) -> dict[str, Path]:
    """The files NAME_train.jsonl and NAME_test.jsonl of `target`, a path that ends in NAME or a NAME in `data_dir`.

    Raises UsageError if there are none.
    """
    for prefix in (Path(target), data_dir / target):
        paths = {part: prefix.with_name(f"{prefix.name}_{part}.jsonl") for part in ("train", "test")}
        found = {part: path for part, path in paths.items() if path.is_file()}
        if found:
            return found
    raise UsageError(f"{target}: no such file, and no {target}_train.jsonl or {target}_test.jsonl")


def prompt_of(example: Example) -> tuple[str | None, str]:
    """What a model reads."""
    return example.system, example.user


def pair_of(example: Example) -> tuple[str | None, str, str]:
    """What a model reads and what it should answer."""
    return example.system, example.user, example.assistant


def database_of(example: Example) -> str | None:
    """The database of a Spider example, case-folded as SQLite file names may be; None for other examples."""
    match = DATABASE.match(example.user)
    return match and match[1].strip().casefold()


def query_of(example: Example) -> tuple[str, str] | None:
    """The database and SQL of a Spider example; None for other examples."""
    database = database_of(example)
    return None if database is None else (database, example.assistant)


def normalized(text: str | None) -> str | None:
    """A text in NFKC, case-folded, with each run of white space replaced by one space."""
    if text is None:
        return None
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())  # again, because folding can undo the form


def repeats(examples: list[Example], key: Callable[[Example], Hashable]) -> list[int]:
    """The lines whose key an earlier line has."""
    seen: set[Hashable] = set()
    return [e.id for e in examples if key(e) in seen or seen.add(key(e))]


def several_answers(examples: list[Example]) -> list[int]:
    """The lines whose prompt also occurs with another answer."""
    answers = defaultdict(set)
    for example in examples:
        answers[prompt_of(example)].add(example.assistant)
    return [e.id for e in examples if len(answers[prompt_of(e)]) > 1]


def answer_in_prompt(example: Example) -> bool:
    """Whether the answer, or one of several, occurs in the user's text as separate words, in any case."""
    patterns = (rf"(?<!\w){re.escape(answer.strip())}(?!\w)" for answer in example.answers or (example.assistant,))
    return any(re.search(pattern, example.user, re.IGNORECASE) for pattern in patterns)


def too_long(examples: list[Example], tokenizer_name: str, max_tokens: int) -> list[int]:
    """The lines whose rendered chat has more than `max_tokens` tokens. Raises UsageError for an unusable tokenizer."""
    from llm_jepa.model import load_tokenizer

    try:
        tokenizer = load_tokenizer(tokenizer_name, predictors=False)
        renderer = Renderer(tokenizer)
    except UsageError as error:
        raise UsageError(str(error).replace("--model_name", "--tokenizer")) from None
    texts = [renderer.chat(example).text for example in examples]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [e.id for e, length in zip(examples, lengths, strict=True) if length > max_tokens]


def check_part(part: str, examples: list[Example]) -> list[Finding]:
    """Findings within one part. None of them is a leak."""
    lines = {
        f"{part}: repeated prompt and answer": repeats(examples, pair_of),
        f"{part}: prompt with several answers": several_answers(examples),
        f"{part}: answer in its own prompt": [e.id for e in examples if answer_in_prompt(e)],
    }
    return [Finding(what, found, len(examples)) for what, found in lines.items()]


def check_both(train: list[Example], test: list[Example]) -> list[Finding]:
    """What the test part shares with train. Each is a leak, as are Spider databases that should be unseen in test."""

    def shared(key: Callable[[Example], Hashable]) -> list[int]:
        known = {key(example) for example in train} - {None}
        return [example.id for example in test if key(example) in known]

    def nearly(key: Callable[[Example], tuple[str | None, ...]]) -> list[int]:
        identical = set(shared(key))
        return [line for line in shared(lambda e: tuple(map(normalized, key(e)))) if line not in identical]

    found = {"test: prompt in train": shared(prompt_of), "test: prompt and answer in train": shared(pair_of)}
    found[f"test: prompt in train, {LOOSE}"] = nearly(prompt_of)
    found[f"test: prompt and answer in train, {LOOSE}"] = nearly(pair_of)
    if any(database_of(example) is not None for example in (*train, *test)):
        found["test: database and SQL in train"] = shared(query_of)
        found["test: database in train"] = shared(database_of)
    return [Finding(what, lines, len(test), leak=True) for what, lines in found.items()]


def count_databases(train: list[Example], test: list[Example]) -> list[str]:
    """A line on the databases of Spider examples; no line for other examples."""
    names = [Counter(filter(None, map(database_of, part))) for part in (train, test)]
    if not any(names):
        return []
    return [f"{len(names[0])} databases in train, {len(names[1])} in test, {len(names[0] & names[1])} in both"]


def manifest_mismatches(paths: Iterable[Path]) -> list[str]:
    """A line for each file whose checksum differs from that in the manifest.json beside it.

    A process killed between two writes leaves train and test files of different versions.
    """
    lines = []
    for path in paths:
        manifest = path.parent / "manifest.json"
        entries = read_json(manifest).values() if manifest.exists() else ()
        recorded = [file for entry in entries if (file := entry.get("files", {}).get(path.name))]
        if any(file["sha256"] != sha256(path) for file in recorded):
            lines.append(f"{path}: checksum differs from manifest.json; prepare it again")
    return lines


def check(paths: dict[str, Path], max_tokens: int, tokenizer: str | None) -> tuple[list[str], bool]:
    """(lines of the report, whether there is a leak) for the files by part. Raises ExampleError, UsageError."""
    parts = {part: read_examples(str(path), Problems()) for part, path in paths.items()}
    findings = [finding for part, examples in parts.items() for finding in check_part(part, examples)]
    if tokenizer:
        findings += [
            Finding(f"{part}: chat over {max_tokens} tokens", too_long(examples, tokenizer, max_tokens), len(examples))
            for part, examples in parts.items()
        ]
    report = [f"{paths[part]}: {len(examples)} examples" for part, examples in parts.items()]
    if len(parts) == 2:
        findings += check_both(parts["train"], parts["test"])
        report += count_databases(parts["train"], parts["test"])
    report += map(str, findings)
    if not tokenizer:
        report.append("tokens were not counted; use --tokenizer FOLDER")
    return report, any(finding.leak and finding.lines for finding in findings)
