"""Prediction files: one JSON object with an `id` per line, written batch by batch.

While predictions.jsonl grows, predictions.jsonl.settings.json beside it records what is writing it, so that the same
command resumes after an interruption. metrics.json replaces that file when predictions.jsonl is complete. With
several processes the main one gathers and writes the rows of all.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from llm_jepa.cli import UsageError
from llm_jepa.distributed import agreed
from llm_jepa.files import names_file, read_json, read_jsonl, write_json, write_text

Predictions = list[dict[str, Any]]


def read(path: Path) -> Predictions:
    """The objects of a predictions file.

    Raises UsageError naming file and line if one has no `id` and `prediction`, or the id of another line.
    """
    rows: dict[int, dict[str, Any]] = {}
    for number, row in read_jsonl(path):
        try:
            good = type(row["id"]) is int and row.get("stop_reason") in (None, "stop", "length")
            row["prediction"].encode("utf-8")  # fails on half a surrogate pair, which could not be written
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            what = "an integer id, a string prediction and, if any, a stop_reason of stop or length"
            raise UsageError(f"{path}:{number}: not a JSON object with {what}")
        if row["id"] in rows:
            raise UsageError(f"{path}:{number}: the id {row['id']} appears twice")
        rows[row["id"]] = row
    return list(rows.values())


def json_lines(rows: Predictions) -> str:
    """One line of JSON for each row."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, rows: Predictions) -> Predictions:
    """Writes a predictions file atomically, sorted by id. Returns the sorted rows."""
    rows = sorted(rows, key=lambda row: row["id"])
    write_text(path, json_lines(rows))
    return rows


def check_place(path: Path) -> None:
    """Raises UsageError if a file cannot be written there: before anything is computed."""
    folder = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.exists(parent))
    device = folder == Path("/dev") or Path("/proc") in folder.resolve().parents
    if device or (os.path.lexists(path) and not path.is_file()):
        raise UsageError(f"{path} cannot be written: it is not a regular file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{path} cannot be written: {folder} is not a folder in which files can be made")


def check_free(path: Path, overwrite: bool) -> None:
    """Raises UsageError if it cannot be written, or metrics.json is another file's, or its own without overwrite."""
    metrics = path.with_name("metrics.json")
    for file in (path, metrics):
        check_place(file)
    try:
        owner = Path(read_json(metrics)["settings"]["output_file"]).name if metrics.exists() else None
    except (KeyError, TypeError):
        owner = "another program's file"
    if owner and (owner != path.name or not overwrite):
        how = "give --output_file FOLDER/predictions.jsonl" + (", or --overwrite" if owner == path.name else "")
        raise UsageError(f"{metrics} exists, from a finished evaluation that wrote {owner}; {how}")


def settings_file(path: Path) -> Path:
    """The file that records what is writing a predictions file."""
    return path.with_name(path.name + ".settings.json")


def begin_output(path: Path, identity: dict[str, Any], overwrite: bool) -> Predictions:
    """Prepares the output files. Returns the rows that an interrupted evaluation with the same identity left.

    Raises UsageError as `check_resumable` does.
    """
    check_resumable(path, identity, overwrite)
    record = settings_file(path)
    if overwrite:
        for old in (path, record, path.with_name("metrics.json")):
            old.unlink(missing_ok=True)
    rows: Predictions = []
    if path.exists():
        with open(path, "rb+") as file:  # a kill may have cut the last line short
            file.truncate(file.read().rfind(b"\n") + 1)
        rows = read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, identity)
    return rows


def check_resumable(path: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Raises UsageError if other results are in the way and are not to be overwritten."""
    record = settings_file(path)
    if path.exists() and not overwrite:
        before, now = read_json(record) if record.exists() else {}, json.loads(json.dumps(identity))
        if before != now:
            old, new = before.get("settings", {}), now["settings"]
            changed = [f"--{name} {old[name]}, now {new.get(name)}" for name in old if old[name] != new.get(name)]
            changed += [name for name in now if name != "settings" and now[name] != before.get(name)]
            what = f"{path} exists and was written with other settings, data or weights"
            raise UsageError(f"{what} ({', '.join(changed)}); give --overwrite, or another --output_file")


def collect(
    path: Path, identity: dict[str, Any], overwrite: bool, total: int,
    rows_of: Callable[[set[int], tuple[int, int]], Iterator[Predictions]],
) -> Predictions:  # fmt: skip
    """Writes rows as they come. Returns all `total` of them, sorted by id, in the main process, and [] in the others.

    `rows_of(done, (n, N))` yields the rows of process n of N batch by batch, without the ids in `done`, which an
    interrupted evaluation left. Raises UsageError as `begin_output` does.
    """
    state = PartialState()
    main, n = state.is_main_process, state.num_processes
    with agreed():
        rows = begin_output(path, identity, overwrite) if main else []
    done = broadcast_object_list([{row["id"] for row in rows}])[0]
    batches = rows_of(done, (state.process_index, n))
    with (
        names_file(path),
        open(path, "a", encoding="utf-8") if main else contextlib.nullcontext() as file,
        tqdm(total=total, initial=len(done), unit="example", disable=not main) as bar,
    ):
        while True:  # a process without batches left participates until all have finished
            with agreed():
                batch = next(batches, None)
            gathered = [batch for batch in gather_object([batch]) if batch is not None]
            if not gathered:
                break
            if main:
                new = [row for batch in gathered for row in batch]
                file.write(json_lines(new))
                file.flush()
                rows += new
                bar.update(len(new))
    return write(path, rows) if main else []
