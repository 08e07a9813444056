"""What is wrong with a dataset's rows before anything is trained on them: repeats, leaks, long rows."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from sources import read_manifest, refuse_other_encodings

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError, Problems, read_examples
from llm_jepa.data.rendering import Renderer
from llm_jepa.files import sha256

SHOWN = 5  # line numbers in the report
LOOSE = "the same but for case, spaces and Unicode form"
DATABASE = re.compile(r"For db_id:\[([^]]*)\]\n\n")


@dataclass(frozen=True)
class Finding:
    """Rows of one part with something in common; a leak is something of train's that test asks for."""

    what: str
    lines: list[int]  # of test for what concerns both parts
    of: int  # rows that were looked at
    leak: bool = False

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.lines[:SHOWN])) + (" …" if len(self.lines) > SHOWN else "")
        mark = "LEAK" if self.leak and self.lines else ""
        return f"  {mark:4} {len(self.lines):>6} of {self.of:<6} {self.what}" + (f": lines {shown}" if shown else "")


def find_parts(target: str, data_dir: Path) -> dict[str, Path]:
    """The files of a dataset: NAME_train.jsonl and NAME_test.jsonl in `data_dir`, or those of a path that ends in NAME.

    Raises UsageError where there is neither.
    """
    for prefix in (Path(target), data_dir / target):
        paths = {part: prefix.with_name(f"{prefix.name}_{part}.jsonl") for part in ("train", "test")}
        found = {part: path for part, path in paths.items() if path.is_file()}
        if found:
            return found
    raise UsageError(f"{target}: there is no such file, no {target}_train.jsonl and no {target}_test.jsonl")


def prompt_of(example: Example) -> tuple[str | None, str]:
    """What a model is asked."""
    return example.system, example.user


def pair_of(example: Example) -> tuple[str | None, str, str]:
    """What a model is asked and what it should answer."""
    return example.system, example.user, example.assistant


def database_of(example: Example) -> str | None:
    """The database of a Spider row without regard to case, as SQLite's files are found; None for any other row."""
    match = DATABASE.match(example.user)
    return match and match[1].strip().casefold()


def query_of(example: Example) -> tuple[str, str] | None:
    """The database and SQL of a Spider row, None for any other."""
    database = database_of(example)
    return None if database is None else (database, example.assistant)


def loose(text: str | None) -> str | None:
    """A text without what it takes to look new: NFKC, casefolded, each run of white space one space."""
    if text is None:
        return None
    folded = unicodedata.normalize("NFKC", text).casefold()  # which can undo the form
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def repeats(examples: list[Example], key: Callable[[Example], Hashable]) -> list[int]:
    """The lines whose key stands in an earlier one."""
    seen: set[Hashable] = set()
    return [e.id for e in examples if key(e) in seen or seen.add(key(e))]


def several_answers(examples: list[Example]) -> list[int]:
    """The lines whose prompt stands there with another answer too."""
    answers = defaultdict(set)
    for example in examples:
        answers[prompt_of(example)].add(example.assistant)
    return [e.id for e in examples if len(answers[prompt_of(e)]) > 1]


def answer_in_prompt(example: Example) -> bool:
    """Whether the answer, or one of several, stands in the user's text as words of their own, in any case."""
    patterns = (rf"(?<!\w){re.escape(answer.strip())}(?!\w)" for answer in example.answers or (example.assistant,))
    return any(re.search(pattern, example.user, re.IGNORECASE) for pattern in patterns)


def too_long(examples: list[Example], tokenizer_folder: str, max_tokens: int) -> list[int]:
    """The lines whose chat has more than `max_tokens` tokens. Raises UsageError for a tokenizer that cannot be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokenizer {tokenizer_folder}: cannot be loaded ({str(error).splitlines()[0]})") from None
    if not tokenizer.chat_template:
        raise UsageError(f"--tokenizer {tokenizer_folder} has no chat template")
    flags = dict.fromkeys(("plain", "train_all", "front_pred", "reverse_pred", "locates_user"), False)
    renderer = Renderer(tokenizer, SimpleNamespace(model_name=tokenizer_folder, predictors=0, **flags))
    texts = [renderer.chat(example).text for example in examples]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [e.id for e, length in zip(examples, lengths, strict=True) if length > max_tokens]


def check_part(part: str, examples: list[Example]) -> list[Finding]:
    """What concerns one part alone; none of it is a leak."""
    lines = {
        f"{part}: prompt and answer stand there before": repeats(examples, pair_of),
        f"{part}: prompt stands there with another answer": several_answers(examples),
        f"{part}: answer stands in its own prompt": [e.id for e in examples if answer_in_prompt(e)],
    }
    return [Finding(what, found, len(examples)) for what, found in lines.items()]


def check_both(train: list[Example], test: list[Example]) -> list[Finding]:
    """What test shares with train: all of it is a leak, and databases of Spider too, which should be unseen."""

    def shared(key: Callable[[Example], Hashable]) -> list[int]:
        known = {key(example) for example in train} - {None}
        return [example.id for example in test if key(example) in known]

    def nearly(key: Callable[[Example], tuple[str | None, ...]]) -> list[int]:
        same = set(shared(key))
        return [line for line in shared(lambda e: tuple(map(loose, key(e)))) if line not in same]

    found = {"test: prompt in train": shared(prompt_of), "test: prompt and answer in train": shared(pair_of)}
    found[f"test: prompt in train, {LOOSE}"] = nearly(prompt_of)
    found[f"test: prompt and answer in train, {LOOSE}"] = nearly(pair_of)
    if any(database_of(example) is not None for example in (*train, *test)):
        found["test: database and SQL in train"] = shared(query_of)
        found["test: database in train"] = shared(database_of)
    return [Finding(what, lines, len(test), leak=True) for what, lines in found.items()]


def not_the_manifests(paths: Iterable[Path]) -> list[str]:
    """A line for each file that manifest.json beside it names with another checksum.

    A process killed between two renames leaves a train and a test file of different runs. Raises UsageError for a
    damaged manifest.
    """
    lines = []
    for path in paths:
        entries = [entry for entry in read_manifest(path.parent).values() if isinstance(entry, dict)]
        named = [files[path.name] for e in entries if isinstance(files := e.get("files"), dict) and path.name in files]
        if any(not isinstance(file, dict) or file.get("sha256") != sha256(path) for file in named):
            lines.append(f"{path}: not the file that manifest.json names (other checksum); prepare it again")
    return lines


def databases(train: list[Example], test: list[Example]) -> list[str]:
    """Lines on how many databases the rows name and how many rows name none; no line for rows of other kinds alone."""
    rows = {"train": Counter(map(database_of, train)), "test": Counter(map(database_of, test))}
    without = {part: names.pop(None) for part, names in rows.items() if None in names}
    if not any(rows.values()):
        return []
    both = len(rows["train"] & rows["test"])
    lines = [f"{len(rows['train'])} databases in train, {len(rows['test'])} in test, {both} in both"]
    if without:
        lines.append(
            f"{sum(without.values())} rows name no database ({', '.join(f'{n} in {p}' for p, n in without.items())})"
        )
    return lines


def read_part(path: Path) -> list[Example]:
    """A file's rows. Raises ExampleError where one is bad; for rows of another kind it names the command for them."""
    try:
        refuse_other_encodings(path)
        return read_examples(str(path), Problems())
    except ExampleError as error:
        # `check` has no such flags.
        message = str(error).replace("--text_field, --code_field", "`prepare.py own` makes them message rows")
        raise ExampleError(message) from None


def check(paths: dict[str, Path], max_tokens: int, tokenizer: str | None) -> tuple[list[str], bool]:
    """(lines of the report, whether there is a leak) of the files by part. Raises ExampleError, UsageError."""
    parts = {part: read_part(path) for part, path in paths.items()}
    findings = [finding for part, examples in parts.items() for finding in check_part(part, examples)]
    if tokenizer:
        findings += [
            Finding(f"{part}: chat over {max_tokens} tokens", too_long(examples, tokenizer, max_tokens), len(examples))
            for part, examples in parts.items()
        ]
    report = [f"{paths[part]}: {len(examples)} rows" for part, examples in parts.items()]
    if len(parts) == 2:
        findings += check_both(parts["train"], parts["test"])
        report += databases(parts["train"], parts["test"])
    report += map(str, findings)
    if not tokenizer:
        report.append("token counts were left out: give --tokenizer FOLDER")
    return report, any(finding.leak and finding.lines for finding in findings)
