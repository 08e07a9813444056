"""Reads and checks examples; messages about bad ones name file and line.

An example is a pair of views with an optional system turn, stored as one JSON object a line:

    {"messages": [{"role": "system", "content": "…"},
                  {"role": "user", "content": "…"},
                  {"role": "assistant", "content": "…"}]}

docs/data.md describes the other formats: multi-turn chats, prompt and completion, ShareGPT, examples that only have
views, and two fields of any JSON, CSV or Parquet file or hub dataset (`Fields`).
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError, first_line
from llm_jepa.files import READ_ERRORS, jsonl_lines, open_data, parse_json, read_error, sha256

# Keys of the project's own format: one of these sets, and the others.
FORMS = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"text", "code"})
OWN = ("messages", "conversations", "prompt", "completion", "text", "code", "pair", "answers", "group", "tests")
SHAREGPT = {"human": "user", "gpt": "assistant"}
HUB = re.compile(  # a revision can have slashes, as refs/pr/1
    r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^:@[/]+))?:(?P<split>[^:@[/]+(\[[^]]*\][^:@[/]*)*)(@(?P<revision>[^:\s]+))?"
)
FORMATS = "; a file is UTF-8 text with one JSON object per line or a JSON array of them, or .csv, .tsv or .parquet"


class ExampleError(UsageError, ValueError):
    """The data cannot be used; the message names the file and, if there is one, the line."""


@dataclass(frozen=True)
class Example:
    """One example. The Text view's content is `text` or else `user`, the Code view's is `code` or else `assistant`.

    The chat is `system`, `history`, `user`, `assistant`. An example of views only has neither of the last two.
    """

    system: str | None
    user: str | None
    assistant: str | None
    source: str  # "path:line", for messages
    id: int  # line number in the file (of a CSV or Parquet file or a hub dataset the row), counted from 1
    text: str | None = None
    code: str | None = None
    answers: tuple[str, ...] | None = None  # if more than one is right; `assistant` contains them all
    group: str | None = None  # its set of paraphrases
    tests: tuple[str, ...] | None = None  # Python statements that raise if a program is wrong
    history: Sequence[str] = ()  # earlier turns of the user and the assistant, in turn
    pair: bool = True  # whether it has views; if not, it only counts for the language-model loss

    @property
    def has_chat(self) -> bool:
        """Whether there is more than views."""
        return self.user is not None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns of the chat, [] without one."""
        turns = [*self.history, self.user, self.assistant] if self.has_chat else []
        chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return [{"role": "system", "content": self.system}] * (self.system is not None) + chat


@dataclass(frozen=True)
class Fields:
    """The fields of data of another format: of the user and the assistant turn, and of views that differ from these.

    `system` is the system turn of every example.
    """

    text: str
    code: str
    system: str | None = None
    view_text: str | None = None
    view_code: str | None = None


@dataclass
class Problems:
    """Bad examples: the first one raises an error, or with `skip` all are collected and reported.

    `skip` is the flag --skip_bad_examples, None where there is no such flag.
    """

    skip: bool | None = None
    found: dict[str, str] = field(default_factory=dict)  # reasons by place, so that an example counts once

    def add(self, source: str, reason: str) -> None:
        """Raises ExampleError unless bad examples are skipped."""
        if not self.skip:
            hint = "" if self.skip is None else " (--skip_bad_examples skips bad examples)"
            raise ExampleError(f"{source}: {reason}{hint}")
        self.found[source] = reason

    def report(self) -> str | None:
        """One line for the console, None if nothing was skipped."""
        if not self.found:
            return None
        first = "; ".join(f"{source}: {reason}" for source, reason in [*self.found.items()][:3])
        more = f" (and {len(self.found) - 3} more)" if len(self.found) > 3 else ""
        return f"skipped {len(self.found)} bad examples: {first}{more}"


def check_text(value: Any, what: str, blank: bool = False) -> str:
    """The value. Raises ValueError if it is not text that a tokenizer accepts, or is blank unless `blank` allows it."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, not a string")
    if not (blank or value.strip()):
        raise ValueError(f"{what} is empty")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in value):  # in a CSV file a byte that cannot be decoded
        raise ValueError(f"{what} is not UTF-8: it contains half a surrogate pair")
    return value


def parse_messages(row: Any, source: str, number: int) -> Example:
    """A row in the project's own format → Example. Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    turns = _turns(row)
    views = {name: _view(row, name, role, turns) for name, role in (("text", "user"), ("code", "assistant"))}
    group = row["group"] if isinstance(row.get("group"), str) else None
    if not isinstance(row.get("pair"), bool | None):
        raise ValueError('"pair" is neither true nor false')
    if not turns and row.get("pair") is False:
        raise ValueError('"pair" is false and there is no chat, so nothing is left')
    if not turns:
        if None in views.values():
            chats = '"messages", "conversations", or "prompt" and "completion"'
            raise ValueError(f'no {chats}, nor "text" and "code" (for other fields: --text_field, --code_field)')
        return Example(None, None, None, source, number, **views, group=group)
    roles = [role for role, _ in turns]
    has_system = roles[0] == "system"
    if len(roles) < 2 or roles[has_system:] != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"roles are {roles}, not system (optional), then user and assistant in turn")
    contents = [check_text(text, f"content of the {role} turn", blank=role == "system") for role, text in turns]
    system = contents.pop(0) if has_system else None
    *history, user, assistant = contents
    return Example(
        system, user, assistant, source, number, **views, answers=_texts(row, "answers"), group=group,
        tests=_texts(row, "tests"), history=tuple(history), pair=row.get("pair") is not False,
    )  # fmt: skip


def _turns(row: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(role, content) of each turn of a row's chat, [] if it has none."""
    found, role, content = row.get("messages"), "role", "content"
    if found is None and row.get("conversations") is not None:
        found, role, content = row["conversations"], "from", "value"
    elif found is None and None not in (row.get("prompt"), row.get("completion")):
        parts = (("user", row["prompt"]), ("assistant", row["completion"]))
        turns = (text if isinstance(text, list) else [{role: name, content: text}] for name, text in parts)
        found = list(itertools.chain.from_iterable(turns))
    if not isinstance(found, list | None) or found == []:
        raise ValueError("the chat has no turns" if found == [] else "the chat is not a list of turns")
    pairs = ((turn.get(role), turn.get(content)) if isinstance(turn, dict) else (None, None) for turn in found or ())
    return [(SHAREGPT.get(str(name), name), text) for name, text in pairs]


def _texts(row: dict[str, Any], name: str) -> tuple[str, ...] | None:
    if (texts := row.get(name)) is None:
        return None
    if not isinstance(texts, list) or not texts:
        raise ValueError(f'"{name}" is not a list of texts')
    return tuple(check_text(text, f'"{name}"') for text in texts)


def _view(row: dict[str, Any], name: str, role: str, turns: list) -> str | None:
    """The content of a view: a list of one message, or without a chat also text. In a chat other values are ignored."""
    value = row.get(name)
    if isinstance(value, str) and not turns:
        return check_text(value, f'the view "{name}"')
    if not isinstance(value, list):
        return None
    if [m.get("role") if isinstance(m, dict) else None for m in value] != [role]:
        raise ValueError(f'"{name}" is not a list of one {role} message')
    return check_text(value[0].get("content"), f'content of the view "{name}"')


def parse_example(source: str, number: int, read: Callable[[], Any], fields: Fields | None) -> Example:
    """One of `Rows` → Example, without `fields` in the project's own format. Raises ValueError with the reason."""
    row = read()
    if fields is None:
        return parse_messages(row, source, number)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for name in columns_of(fields):
        if name not in row:
            raise ValueError(f"no field {name!r} (there are {', '.join(map(repr, row)) or 'none'})")
        check_text(row[name], f"field {name!r}")
    views = (row.get(fields.view_text), row.get(fields.view_code))
    return Example(fields.system, row[fields.text], row[fields.code], source, number, *views)


Rows = Iterator[tuple[str, int, Callable[[], Any]]]  # place, number, and a function that returns the row or raises


def columns_of(fields: Fields | None) -> Sequence[str]:
    """The columns that `parse_example` reads."""
    return [n for n in (fields.text, fields.code, fields.view_text, fields.view_code) if n] if fields else OWN


def _used(path: str, names: list[str], columns: Sequence[str] | None) -> list[str]:
    """Which of the columns there are; all without `columns`. Raises ExampleError if one (of OWN: a form) is missing."""
    if columns is None:
        return names
    if not any(form <= set(names) for form in (FORMS if columns is OWN else [set(columns)])):
        missing, there = next(c for c in columns if c not in names), ", ".join(map(repr, names)) or "none"
        raise ExampleError(f"{path}: no field {missing!r} (there are {there}; see --text_field, --code_field)")
    return [name for name in names if name in columns]


def _json_rows(path: str, columns: Sequence[str] | None) -> Rows:
    for count, (number, line) in enumerate(jsonl_lines(path)):
        if count == 0 and line.lstrip().startswith(b"["):
            with open_data(path) as file:
                rows = enumerate(parse_json(file.read()), start=1)
            yield from ((f"{path}: entry {number}", number, lambda row=row: row) for number, row in rows)
            return
        yield f"{path}:{number}", number, partial(parse_json, line, "" if count else FORMATS)


def _csv_rows(path: str, columns: Sequence[str] | None, delimiter: str = ",") -> Rows:
    with io.TextIOWrapper(open_data(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        csv.field_size_limit(2**31 - 1)  # characters in a cell
        reader = csv.DictReader(file, strict=True, delimiter=delimiter)
        try:
            names = reader.fieldnames or []
            check_text("".join(names), "the first line", blank=True)
            if twice := [name for name in columns or names if names.count(name) > 1]:
                raise ExampleError(f"{path}:1: the field {twice[0]!r} occurs twice in {', '.join(names)}")
            for number, row in enumerate(reader, start=1):
                yield f"{path}:{reader.line_num}", number, lambda row=row: _complete(row)
        except csv.Error as error:
            raise ExampleError(f"{path}: not CSV after line {reader.line_num} ({error})") from None


def _complete(row: dict[str | None, Any]) -> dict[str, Any]:
    if None in row or None in row.values():
        raise ValueError("the row has more or fewer cells than the first line")
    return row


def _parquet_rows(path: str, columns: Sequence[str] | None) -> Rows:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        used = _used(path, file.schema_arrow.names, columns)
        batches = (batch.select(used) for batch in file.iter_batches(columns=used))  # "a" also selects "a.b"
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{path}: row {number}", number, lambda row=row: row


def _hub_rows(path: str, columns: Sequence[str] | None, streaming: bool = False) -> Rows:
    from datasets import ClassLabel, load_dataset
    from datasets.exceptions import DatasetsError

    place = HUB.fullmatch(path)
    try:
        data = load_dataset(
            place["name"], place["config"], split=place["split"], revision=place["revision"], streaming=streaming
        )
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ExampleError(f"{path}: cannot be loaded from the hub ({first_line(error)})") from None
    if data.column_names:  # unknown for some streams
        data = data.select_columns(_used(path, data.column_names, columns))
    labels = {name: kind for name, kind in (data.features or {}).items() if isinstance(kind, ClassLabel)}
    for number, row in enumerate(data, start=1):
        names = {k: kind.int2str(row[k]) for k, kind in labels.items() if row[k] is not None and row[k] >= 0}
        yield f"{path}: row {number}", number, lambda row=row, names=names: row | names


def is_hub(path: str) -> bool:
    """Whether a path is a hub dataset, OWNER/NAME[:CONFIG]:SPLIT[@REVISION], and not a file."""
    return HUB.fullmatch(path) is not None and not Path(path).exists()


def files_of(path: str) -> list[str]:
    """The files that a glob pattern matches, in the order of their names; any other path itself."""
    return [path] if is_hub(path) or Path(path).exists() else sorted(glob.glob(path, recursive=True)) or [path]


def require_files(s: Any) -> None:
    """Raises ExampleError for a data file of the settings that does not exist, without the imports of reading it."""
    for file in (file for path in (s.train_file, s.data_file, s.eval_file) if path for file in files_of(path)):
        if not (is_hub(file) or Path(file).exists()):
            raise ExampleError(f"{file}: there is no such file")


def read_rows(path: str, columns: Sequence[str] | None = None, streaming: bool = False) -> Rows:
    """The rows of JSON, CSV, TSV or Parquet files (by their ending) or a hub dataset, in order.

    Columns that are not in `columns` are read only where the format needs it. Files are read row by row, but a JSON
    array is read at once. A hub dataset is downloaded first, or with `streaming` read row by row. Numbers continue in
    the next file of a glob. Raises ExampleError.
    """
    import pyarrow

    readers = {".csv": _csv_rows, ".tsv": partial(_csv_rows, delimiter="\t"), ".parquet": _parquet_rows}
    before = 0
    for file in files_of(path):
        number = 0
        ending = Path(file.lower().removesuffix(".gz")).suffix
        read = partial(_hub_rows, streaming=streaming) if is_hub(file) else readers.get(ending, _json_rows)
        try:
            for place, number, row in read(file, columns):
                yield place, before + number, row
        except ExampleError:
            raise
        # KeyError: a field that occurs twice in Parquet
        except (*READ_ERRORS, pyarrow.ArrowException, KeyError, ValueError, OverflowError) as error:
            raise ExampleError(f"{file}: cannot be read ({read_error(error)})") from None
        before += number


def read_examples(path: str, problems: Problems, fields: Fields | None = None) -> list[Example]:
    """All examples of a file or hub dataset, in order; blank lines do not count as lines of data.

    Without `fields` rows are in the project's own format. Raises ExampleError for a missing, unreadable or empty file,
    and for a bad row unless `problems` skips those.
    """
    examples = []
    for row in read_rows(path, columns_of(fields)):
        try:
            examples.append(parse_example(*row, fields))
        except ValueError as error:
            problems.add(row[0], str(error))
    if not examples:
        raise ExampleError(f"{path}: no examples in the file" + (f" ({problems.report()})" if problems.found else ""))
    return examples


def data_sha256(path: str, fields: Fields | None = None, streaming: bool = False) -> str:
    """Hexadecimal SHA-256 of data files or of a hub dataset's rows; with `streaming` of its name and commit instead.

    Raises ExampleError if the hub does not report the commit.
    """
    if not is_hub(path):
        first, *others = map(sha256, files_of(path))
        return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first
    if streaming:  # reading all rows would download them all
        from huggingface_hub import HfApi, errors

        place = HUB.fullmatch(path)
        try:
            commit = HfApi().dataset_info(place["name"], revision=place["revision"]).sha
        except (OSError, ValueError, errors.HTTPError) as error:
            raise ExampleError(f"{path}: the hub does not report its commit ({first_line(error)})") from None
        return hashlib.sha256(f"{path.partition('@')[0]}@{commit}".encode()).hexdigest()
    digest = hashlib.sha256()
    for _, _, row in read_rows(path, columns_of(fields)):
        digest.update(json.dumps(row(), sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def split_examples(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out): a random `share`, rounded up, that depends only on the seed and the number of examples.

    Raises ExampleError if either part would be empty.
    """
    from datasets import Dataset

    try:
        parts = Dataset.from_dict({"i": range(len(examples))}).train_test_split(test_size=share, seed=seed)
    except ValueError:
        place = f"{examples[0].source.rpartition(':')[0]}: a share of {share}"
        raise ExampleError(f"{place} cannot be held out of {len(examples)} examples") from None
    return [examples[i] for i in parts["train"]["i"]], [examples[i] for i in parts["test"]["i"]]


def dataset_name(path: str) -> str:
    """A data file's base name without its part, datasets/synth_test.jsonl → synth, or a hub dataset's NAME.

    Of a glob it is the last part of the path that has a name, data/*.jsonl → data.
    """
    stem = HUB.fullmatch(path)["name"].split("/")[1] if is_hub(path) else Path(path.removesuffix(".gz")).stem
    if files_of(path) != [path]:
        names = (re.sub(r"[*?]|\[.*?\]", "", part).strip("._-") for part in (stem, *Path(path).parts[-2::-1]))
        stem = next(filter(None, names), "data")
    return next((stem.removesuffix(p) for p in ("_train", "_test", "_dev", "_val") if stem.endswith(p)), stem)
