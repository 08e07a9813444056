"""Checks a dataset before training: repeats, ambiguous or trivial prompts, and leaks between train and test."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from llm_jepa.data.examples import Example, Problems, read_examples

SHOWN = 5  # line numbers per finding
DATABASE = re.compile(r"For db_id:\[([^]]*)\]\n\n")


def normalized(*texts: str | None) -> tuple[str, ...]:
    """Texts in NFKC, case-folded, with each run of white space replaced by one space."""
    folded = (unicodedata.normalize("NFKC", text or "").casefold() for text in texts)
    return tuple(" ".join(unicodedata.normalize("NFKC", text).split()) for text in folded)  # folding can undo the form


def as_chat(example: Example) -> Example:
    """The example itself, or of views only a chat with the Text view's question and the Code view's answer."""
    return example if example.has_chat else replace(example, user=example.text, assistant=example.code)


def keys(example: Example) -> dict[str, tuple | None]:
    """What two examples may share. Spider's databases are files, whose names may differ in case."""
    prompt, found = normalized(example.system, *example.history, example.user), DATABASE.match(example.user)
    database = found and normalized(found[1])
    pair = prompt + normalized(example.assistant)
    return {"prompt": prompt, "prompt and answer": pair, "database": database,
            "database and SQL": found and (database, example.assistant)}  # fmt: skip


def prompt(example: Example) -> tuple[str, ...]:
    """What equal prompts have in common."""
    return keys(as_chat(example))["prompt"]


def answer_in_prompt(example: Example) -> bool:
    """Whether the answer, or one of several, occurs in the user's text as separate words, in any case."""
    patterns = (rf"(?<!\w){re.escape(answer.strip())}(?!\w)" for answer in example.answers or (example.assistant,))
    return any(re.search(pattern, example.user, re.IGNORECASE) for pattern in patterns)


def check(paths: dict[str, Path]) -> tuple[list[str], bool]:
    """(lines of the report, whether there is a leak) for the files by part. Raises UsageError."""
    report, leak, train = [], False, None

    def add(part: str, what: str, found: list[Example], is_leak: bool) -> None:
        mark, numbers = "LEAK" if is_leak and found else "", [str(example.id) for example in found]
        shown = f": lines {', '.join(numbers[:SHOWN])}" + (" …" if len(numbers) > SHOWN else "") if numbers else ""
        report.append(f"  {mark:4} {len(found):>6} of {len(examples):<6} {part}: {what}{shown}")

    for part, path in paths.items():
        examples = [as_chat(example) for example in read_examples(str(path), Problems())]
        report.append(f"{path}: {len(examples)} examples")
        rows, repeated, answers = [keys(example) for example in examples], [], defaultdict(set)
        for example, row in zip(examples, rows, strict=True):
            repeated += [example] * (row["prompt and answer"] in answers[row["prompt"]])
            answers[row["prompt"]].add(row["prompt and answer"])
        several = [e for e, row in zip(examples, rows, strict=True) if len(answers[row["prompt"]]) > 1]
        add(part, "repeated prompt and answer", repeated, False)
        add(part, "prompt with several answers", several, False)
        add(part, "answer in its own prompt", list(filter(answer_in_prompt, examples)), False)
        for what in rows[0] if train and rows else ():
            known = {row[what] for row in train} - {None}
            shared = [e for e, row in zip(examples, rows, strict=True) if row[what] in known]
            if known:
                add(part, f"{what} in train", shared, True)
            leak = leak or bool(shared)
        train = rows
    return report, leak
