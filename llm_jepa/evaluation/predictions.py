"""Predictions files: JSON objects, one a line, each with an `id`; written as they come, continued after a kill.

While predictions.jsonl grows, predictions.jsonl.settings.json beside it says what is making it; when it is whole,
metrics.json takes that file's place. Where torchrun starts several processes, the main one writes predictions.jsonl and
process n predictions.jsonl.rankn, whose rows the main process takes over in the end, or at the next start.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import ExampleError
from llm_jepa.files import read_json, write_json


def read_rows(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """The rows of a predictions file; with `repair` a last line that a kill cut short is dropped.

    Raises UsageError naming file and line for a row without `id` and `prediction`, or an id given twice.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    rows, seen = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            good = type(row["id"]) is int and row.get("stop_reason") in (None, "stop", "length")
            row["prediction"].encode("utf-8")  # fails at half a surrogate pair, which could not be written
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if repair and number == len(lines):
                break
            good = False
        if not good:
            what = "an integer id, a string prediction and, if any, a stop_reason of stop or length"
            raise UsageError(f"{path}:{number}: not a JSON object with {what}")
        if row["id"] in seen:
            raise UsageError(f"{path}:{number}: id {row['id']} stands there a second time")
        seen.add(row["id"])
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a predictions file whole or not at all, in the order of ids."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in sorted(rows, key=lambda r: r["id"]))
    os.replace(temporary, path)


def owner(metrics: Path) -> str | None:
    """Name of the predictions file that a metrics.json belongs to, None where there is no metrics.json."""
    try:
        return Path(read_json(metrics)["settings"]["output_file"]).name if metrics.exists() else None
    except (KeyError, TypeError):
        return "something else"


def check_free(path: Path, overwrite: bool) -> None:
    """Raises UsageError where a finished evaluation stands in a predictions file's place."""
    metrics = path.with_name("metrics.json")
    if owner(metrics) not in (None, path.name):
        raise UsageError(f"{metrics} belongs to {owner(metrics)}; give an --output_file in another folder")
    if metrics.exists() and not overwrite:
        rows = read_json(metrics)["settings"].get("input_file")
        how = "give --output_file FOLDER/predictions.jsonl, or --overwrite to replace it"
        raise UsageError(f"{metrics} exists, from a finished evaluation of {rows}; {how}")


def part_of(path: Path, process: int) -> Path:
    """The file that a process writes its rows to, the main process to the predictions file itself."""
    return path.with_name(f"{path.name}.rank{process}") if process else path


def parts(path: Path) -> list[Path]:
    """The files of processes other than the main one that are there."""
    return sorted(path.parent.glob(glob.escape(path.name) + ".rank*"))


def merge(path: Path) -> list[dict[str, Any]]:
    """Takes the rows of all processes' files into the predictions file; returns them in the order of ids.

    A last line that a kill cut short is dropped. Raises UsageError for damaged files.
    """
    others, rows = parts(path), {}
    for part in (path, *others):
        # A kill between the two steps below leaves rows in both files.
        rows |= {row["id"]: row for row in read_rows(part, repair=True)} if part.exists() else {}
    write_rows(path, list(rows.values()))
    for part in others:
        part.unlink()
    return [rows[id_] for id_ in sorted(rows)]


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Names what two evaluations differ in, settings with both values."""
    a, b = before.get("settings", {}), now["settings"]
    flags = [f"--{name} {a.get(name)}, now {b.get(name)}" for name in sorted(a | b) if a.get(name) != b.get(name)]
    return ", ".join(flags + [name for name in sorted(now) if name != "settings" and before.get(name) != now[name]])


def begin_output(path: Path, identity: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """Prepares the output files; returns the rows that an interrupted evaluation of the same kind left.

    Raises UsageError where other results stand in their place, unless they are to be overwritten.
    """
    metrics, mark = path.with_name("metrics.json"), path.with_name(path.name + ".settings.json")
    check_free(path, overwrite)
    if overwrite:
        for old in (*parts(path), path, mark, metrics):
            old.unlink(missing_ok=True)
    if path.exists() or parts(path):
        before, now = read_json(mark) if mark.exists() else None, json.loads(json.dumps(identity))
        if before != now:
            how = f" ({differing(before, now)})" if before else ""
            raise UsageError(f"{path} exists and was made otherwise{how}; give --overwrite, or another --output_file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(mark, identity)
    return merge(path)


# ------------------------------------------------------------------------------------------------------ processes


@contextlib.contextmanager
def processes() -> Iterator[PartialState]:
    """This process's place among those that torchrun started; makes its GPU, if any, the one that "cuda" means."""
    # gloo for GPUs too: rows go through files, NCCL gives up on a process that waits for a slow one, and it wants a
    # GPU of its own for each process.
    group = {"backend": "gloo", "timeout": timedelta(days=7)} if "LOCAL_RANK" in os.environ else {}
    state = PartialState(cpu=not torch.cuda.is_available(), **group)
    state.wait_for_everyone()  # a process that leaves at once would be missed by one that still looks for it
    try:
        yield state
    finally:
        # A thread of the group that still has work to let go of when the interpreter ends would abort it.
        gc.collect()
        state.destroy_process_group()


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """All processes leave the block together, and a mistake that one of them finds in it is raised in each."""
    mistake = None
    try:
        yield
    except (UsageError, ExampleError, OSError) as error:
        mistake = error
    found = [error for error in gather_object([mistake]) if error]
    if found:
        raise found[0]


def collect(
    path: Path, identity: dict[str, Any], overwrite: bool, total: int,
    answer: Callable[[set[int], tuple[int, int]], Iterator[list[dict[str, Any]]]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Writes rows as they come and returns all `total` of them in the order of ids, in the main process alone.

    `answer` gives rows a batch at a time, leaving out the ids of its first argument, those of an interrupted
    evaluation; the second, (n, N), says that it is process n of N. Raises UsageError as `begin_output`, or where the
    processes do not write to the same folder.
    """
    state, n = PartialState(), PartialState().num_processes
    with agreed():
        rows = begin_output(path, identity, overwrite) if state.is_main_process else []
    done = broadcast_object_list([{row["id"] for row in rows}])[0]
    shown = {"disable": not state.is_main_process, "desc": f"{n} processes, judged by the first" if n > 1 else None}
    with (
        open(part_of(path, state.process_index), "a", encoding="utf-8") as file,
        tqdm(total=total, initial=len(done), unit="row", **shown) as bar,
    ):
        for batch in answer(done, (state.process_index, n)):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch)
            file.flush()
            bar.update(min(n * len(batch), total - bar.n))
        gather_object([None])  # every process has written its rows
        bar.update(total - bar.n)
    if not state.is_main_process:
        return []
    rows = merge(path)
    if len(rows) < total:
        raise UsageError(f"{path} lacks rows of other processes: all of them have to write to the same folder")
    return rows
