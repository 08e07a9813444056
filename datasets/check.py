"""Checks a dataset before training: repeated examples, leaks between train and test, long chats, changed files."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, Problems, read_examples
from llm_jepa.data.rendering import Renderer
from llm_jepa.files import read_json, sha256

SHOWN = 5  # line numbers per finding
LOOSE = "ignoring case, spaces and Unicode form"
DATABASE = re.compile(r"For db_id:\[([^]]*)\]\n\n")


prompt_of = attrgetter("system", "user")
pair_of = attrgetter("system", "user", "assistant")


@dataclass(frozen=True)
class Finding:
    """The lines of one part that have a property. A leak is in the train part too."""

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


def database_of(example: Example) -> str | None:
    """The database of a Spider example, case-folded as SQLite file names may be; None for other examples."""
    match = DATABASE.match(example.user)
    return match and match[1].strip().casefold()


def normalized(texts: tuple[str | None, ...]) -> tuple[str, ...]:
    """Texts in NFKC, case-folded, with each run of white space replaced by one space."""
    folded = (unicodedata.normalize("NFKC", text or "").casefold() for text in texts)
    return tuple(" ".join(unicodedata.normalize("NFKC", text).split()) for text in folded)  # folding can undo the form


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
        renderer = Renderer(load_tokenizer(tokenizer_name, predictors=False))
    except UsageError as error:
        raise UsageError(str(error).replace("--model_name", "--tokenizer")) from None
    texts = [renderer.chat(example).text for example in examples]
    lengths = map(len, renderer.tokenizer(texts, add_special_tokens=False)["input_ids"])
    return [e.id for e, length in zip(examples, lengths, strict=True) if length > max_tokens]


def check_part(part: str, examples: list[Example], max_tokens: int, tokenizer: str | None) -> list[Finding]:
    """Findings within one part. None of them is a leak."""
    lines = {
        "repeated prompt and answer": repeats(examples, pair_of),
        "prompt with several answers": several_answers(examples),
        "answer in its own prompt": [e.id for e in examples if answer_in_prompt(e)],
    }
    if tokenizer:
        lines[f"chat over {max_tokens} tokens"] = too_long(examples, tokenizer, max_tokens)
    return [Finding(f"{part}: {what}", found, len(examples)) for what, found in lines.items()]


def check_both(train: list[Example], test: list[Example]) -> list[Finding]:
    """What the test part shares with train. Each is a leak, as are Spider databases that should be unseen in test."""

    def shared(key: Callable[[Example], Hashable]) -> list[int]:
        known = {key(example) for example in train} - {None}
        return [example.id for example in test if key(example) in known]

    def nearly(key: Callable[[Example], tuple[str | None, ...]]) -> list[int]:
        identical = set(shared(key))
        return [line for line in shared(lambda e: normalized(key(e))) if line not in identical]

    found = {
        "prompt in train": shared(prompt_of),
        "prompt and answer in train": shared(pair_of),
        f"prompt in train, {LOOSE}": nearly(prompt_of),
        f"prompt and answer in train, {LOOSE}": nearly(pair_of),
    }
    if any(map(database_of, (*train, *test))):
        found["database and SQL in train"] = shared(lambda e: database_of(e) and (database_of(e), e.assistant))
        found["database in train"] = shared(database_of)
    return [Finding(f"test: {what}", lines, len(test), leak=True) for what, lines in found.items()]


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
    report = [f"{paths[part]}: {len(examples)} examples" for part, examples in parts.items()]
    findings = [f for part, examples in parts.items() for f in check_part(part, examples, max_tokens, tokenizer)]
    if len(parts) == 2:
        findings += check_both(**parts)
    report += map(str, findings)
    if not tokenizer:
        report.append("tokens were not counted; use --tokenizer FOLDER")
    return report, any(finding.leak and finding.lines for finding in findings)
