"""Checks a dataset before training: repeated examples, leaks between train and test, long chats, changed files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, Problems, read_examples
from llm_jepa.data.rendering import Renderer
from llm_jepa.files import read_json, sha256

SHOWN = 5  # line numbers per finding
LOOSE = "ignoring case, spaces and Unicode form"
DATABASE = re.compile(r"For db_id:\[([^]]*)\]\n\n")


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


def database_of(example: Example) -> str | None:
    """The database of a Spider example, case-folded as SQLite file names may be; None for other examples."""
    match = DATABASE.match(example.user)
    return match and match[1].strip().casefold()


def normalized(texts: tuple[str | None, ...]) -> tuple[str, ...]:
    """Texts in NFKC, case-folded, with each run of white space replaced by one space."""
    folded = (unicodedata.normalize("NFKC", text or "").casefold() for text in texts)
    return tuple(" ".join(unicodedata.normalize("NFKC", text).split()) for text in folded)  # folding can undo the form


def as_table(examples: list[Example]) -> pandas.DataFrame:
    """What is compared of each example, by its line number."""
    databases = [database_of(e) for e in examples]
    return pandas.DataFrame(
        {
            "prompt": [(e.system, e.user) for e in examples],
            "prompt and answer": [(e.system, e.user, e.assistant) for e in examples],
            "database and SQL": [db and (db, e.assistant) for db, e in zip(databases, examples, strict=True)],
            "database": databases,
        },
        index=[e.id for e in examples],
        dtype=object,
    )


def answer_in_prompt(example: Example) -> bool:
    """Whether the answer, or one of several, occurs in the user's text as separate words, in any case."""
    patterns = (rf"(?<!\w){re.escape(answer.strip())}(?!\w)" for answer in example.answers or (example.assistant,))
    return any(re.search(pattern, example.user, re.IGNORECASE) for pattern in patterns)


def lengths(examples: list[Example], tokenizer_name: str) -> pandas.Series:
    """The number of tokens of each rendered chat. Raises UsageError for an unusable tokenizer."""
    from llm_jepa.model import load_tokenizer

    try:
        renderer = Renderer(load_tokenizer(tokenizer_name, predictors=False))
    except UsageError as error:
        raise UsageError(str(error).replace("--model_name", "--tokenizer")) from None
    texts = [renderer.chat(example).text for example in examples]
    return pandas.Series(map(len, renderer.tokenizer(texts, add_special_tokens=False)["input_ids"]))


def within(examples: list[Example], max_tokens: int, tokenizer: str | None) -> Iterator[tuple[str, Iterable[bool]]]:
    """Findings within one part, as (text, whether each example has it). None of them is a leak."""
    table = as_table(examples)
    yield "repeated prompt and answer", table["prompt and answer"].duplicated()
    yield "prompt with several answers", table.groupby("prompt")["prompt and answer"].transform("nunique") > 1
    yield "answer in its own prompt", map(answer_in_prompt, examples)
    if tokenizer:
        yield f"chat over {max_tokens} tokens", lengths(examples, tokenizer) > max_tokens


def between(train: pandas.DataFrame, test: pandas.DataFrame) -> Iterator[tuple[str, Iterable[bool]]]:
    """What the test part shares with train. Each is a leak, as are Spider databases that should be unseen in test."""
    for name in ("prompt", "prompt and answer"):
        identical = test[name].isin(train[name])
        nearly = test[name].map(normalized).isin(train[name].map(normalized))
        yield f"{name} in train", identical
        yield f"{name} in train, {LOOSE}", nearly & ~identical
    if train["database"].notna().any() or test["database"].notna().any():
        for name in ("database and SQL", "database"):
            yield f"{name} in train", test[name].isin(train[name].dropna())


def manifest_mismatches(paths: Iterable[Path]) -> list[str]:
    """A line for each file whose checksum differs from that in the manifest.json of its folder.

    A process killed between two writes leaves train and test files of different versions.
    """
    lines = []
    for path in paths:
        manifest = path.parent / "manifest.json"
        entries = read_json(manifest).values() if manifest.exists() else ()
        recorded = [entry["files"][path.name]["sha256"] for entry in entries if path.name in entry.get("files", ())]
        if any(checksum != sha256(path) for checksum in recorded):
            lines.append(f"{path}: checksum differs from manifest.json; prepare it again")
    return lines


def check(paths: dict[str, Path], max_tokens: int, tokenizer: str | None) -> tuple[list[str], bool]:
    """(lines of the report, whether there is a leak) for the files by part. Raises UsageError."""
    parts = {part: read_examples(str(path), Problems()) for part, path in paths.items()}
    report, leaks = [f"{paths[part]}: {len(examples)} examples" for part, examples in parts.items()], []

    def add(part: str, what: str, found: Iterable[bool], is_leak: bool) -> None:
        examples = parts[part]
        lines = [str(e.id) for e, has in zip(examples, found, strict=True) if has]
        mark = "LEAK" if lines and is_leak else ""
        leaks.append(mark)
        shown = f": lines {', '.join(lines[:SHOWN])}" + (" …" if len(lines) > SHOWN else "") if lines else ""
        report.append(f"  {mark:4} {len(lines):>6} of {len(examples):<6} {part}: {what}{shown}")

    for part, examples in parts.items():
        for what, found in within(examples, max_tokens, tokenizer):
            add(part, what, found, False)
    if len(parts) == 2:
        for what, found in between(*map(as_table, parts.values())):
            add("test", what, found, True)
    if not tokenizer:
        report.append("tokens were not counted; use --tokenizer FOLDER")
    return report, any(leaks)
