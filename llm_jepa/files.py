"""Files: atomic writes, JSON, checksums."""

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llm_jepa.cli import UsageError, first_line

READ_ERRORS = (OSError, EOFError, zlib.error)  # the last two: of compressed files


@contextlib.contextmanager
def names_file(path: str | Path) -> Iterator[None]:
    """Adds the path to an OSError that names no file, as that of a write to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically: after an interruption or an error it is complete or as before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with names_file(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UsageError naming the file if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({read_error(error)})") from None


def read_error(error: Exception) -> str:
    """Why a file cannot be read, without its name."""
    return getattr(error, "strerror", None) or first_line(error)


def open_data(path: str | Path) -> IO[bytes]:
    """Opens a file for reading; one whose name ends in .gz is decompressed."""
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")


def jsonl_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line of a JSONL file that is not blank, counted from 1. A byte order mark is dropped.

    Lines end at newlines only: text mode would also split at a U+2028 inside a JSON string.
    """
    with open_data(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def parse_json(data: bytes, hint: str = "") -> Any:
    """The value of a line or file of JSON. Raises ValueError with the reason, a line other than the first, and hint."""
    try:
        return json.loads(data.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        number, byte = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise ValueError(f"not UTF-8 (byte {byte} of {f'line {number}' if number > 1 else 'the line'}){hint}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON ({error.msg} at {place}column {error.colno}){hint}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a JSONL file. Raises UsageError naming the file and the line."""
    try:
        for number, line in jsonl_lines(path):
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise UsageError(f"{path}:{number}: {error}") from None
    except READ_ERRORS as error:
        raise UsageError(f"{path}: cannot be read ({read_error(error)})") from None


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """Hexadecimal SHA-256 of the names and contents of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    return hashlib.sha256(named.encode()).hexdigest()
