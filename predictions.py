"""Predictions files: JSON objects, one a line, each with an `id`; written as they come, continued after a kill.

While predictions.jsonl grows, predictions.jsonl.settings.json beside it says what is making it; when it is whole,
metrics.json takes that file's place.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from runs import UsageError, read_json, write_json


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
        raise UsageError(f"{metrics} exists, an evaluation was finished here; give --overwrite or another folder")


def begin_output(path: Path, identity: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """Prepares the output files; returns the rows that an interrupted evaluation of the same kind left.

    Raises UsageError where other results stand in their place, unless they are to be overwritten.
    """
    metrics, mark = path.with_name("metrics.json"), path.with_name(path.name + ".settings.json")
    check_free(path, overwrite)
    if overwrite:
        for old in (path, mark, metrics):
            old.unlink(missing_ok=True)
    if path.exists():
        before = read_json(mark) if mark.exists() else None
        if before != json.loads(json.dumps(identity)):
            raise UsageError(f"--output_file {path} exists and was made otherwise; give --overwrite or another one")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(mark, identity)
    rows = read_rows(path, repair=True) if path.exists() else []
    write_rows(path, rows)
    return rows
