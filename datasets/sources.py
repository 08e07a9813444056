"""Where the rows of a dataset come from: a local copy, the hub at a pinned commit, or the authors' site."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from examples import HUB, ExampleError, Problems, Rows, is_hub, read_rows
from runs import UsageError, read_json, sha256

MAX_BYTES = 256 * 2**20  # of a file of Spider: ten times the largest, and what its rows take in memory is a few GiB
BLOCK = 4096  # bytes read at once: each can grow to some 80 MB when unpacked, whatever size the archive states
Row = tuple[str, int, Any]  # place, for messages; number, counted from 1; the row as the file has it


def commit_of(name: str, revision: str) -> str:
    """The commit of a hub dataset's revision. Raises ExampleError where the hub cannot be asked.

    A commit is asked for as well: load_dataset retries for half a minute before it says that there is no network.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode() and re.fullmatch("[0-9a-f]{40}", revision):
        return revision  # may stand in the hub's cache
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:  # the hub's client lets exceptions of its HTTP library through
        raise ExampleError(f"{name}@{revision}: the hub does not answer ({_first_line(error)})") from None


def pinned(address: str) -> tuple[str, dict[str, str]]:
    """A hub address with its revision as a commit, and that as an entry of the manifest. Raises ExampleError."""
    place = HUB.fullmatch(address)
    commit = commit_of(place["name"], place["revision"] or "main")
    entry = {"hub": place["name"], "config": place["config"], "split": place["split"], "revision": commit}
    return address.partition("@")[0] + f"@{commit}", {k: v for k, v in entry.items() if v}


def file_entry(path: Path) -> dict[str, str]:
    """A file as an entry of the manifest: never its folder, which is this machine's own."""
    return {"file": path.name, "sha256": sha256(path)}


def refuse_other_encodings(path: Path) -> None:
    """Raises ExampleError with the line for a CSV file that is not UTF-8; other kinds of files tell that themselves."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                utf16 = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                what = "UTF-16, not UTF-8" if utf16 else f"not UTF-8 (byte {error.start + 1} of the line)"
                raise ExampleError(f"{path}:{number}: {what}; save it as UTF-8") from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest.json, empty where there is none. Raises UsageError where it is damaged or no object."""
    path = folder / "manifest.json"
    manifest = read_json(path) if path.exists() else {}
    if not isinstance(manifest, dict):
        raise UsageError(f"{path}: not a JSON object of entries by dataset; mend it or move it away")
    return manifest


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Source:
    """Where one dataset's rows come from: the file or folder of --source, or without it the hub or the authors' site.

    `entries` says for the manifest what was read.
    """

    def __init__(self, path: Path | None, takes: str, problems: Problems):
        """`takes`: what --source has to be and where that is found, for messages."""
        self.path, self.takes, self.problems = path, takes, problems
        self.entries: list[dict[str, str]] = []

    def missing(self, why: str) -> ExampleError:
        """The error of rows that are not to be had."""
        return ExampleError(f"{why}; give as --source {self.takes}")

    def find(self, *names: str, alone: bool = False) -> Path | None:
        """The first of `names` that --source holds; with `alone` also --source itself; None without --source.

        Raises ExampleError where none is there.
        """
        if self.path is None:
            return None
        if alone and self.path.is_file():
            return self.path
        paths = [self.path / name for name in names]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            raise self.missing(f"--source {self.path} holds no {' and no '.join(names)}")
        return found

    def rows(self, remote: str, *names: str, alone: bool = False) -> Iterator[Row]:
        """The rows of the file that `find` finds, or of `remote`: a hub address or a URL of a JSONL file.

        A row that cannot be read goes to `problems`. Raises ExampleError where there are none to read.
        """
        path = self.find(*names, alone=alone)
        if path is not None:
            refuse_other_encodings(path)
            self.entries.append(file_entry(path))
            yield from self._checked(str(path), read_rows(str(path)))
        elif is_hub(remote):
            try:
                address, entry = pinned(remote)
                rows = read_rows(address)
                first = list(itertools.islice(rows, 1))  # loads them
            except ExampleError as error:
                raise self.missing(str(error)) from None
            self.entries.append(entry)
            yield from self._checked(address, itertools.chain(first, rows))
        else:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, "rows.jsonl")
                copy.write_bytes(self._fetch(remote))
                rows = read_rows(str(copy))
                named = ((place.replace(str(copy), remote), *rest) for place, *rest in rows)
                yield from self._checked(remote, named)

    def _checked(self, name: str, rows: Rows) -> Iterator[Row]:
        empty = True
        for place, number, row in rows:
            try:
                value = row()
            except ValueError as error:
                self.problems.add(place, str(error))
                continue
            empty = False
            yield place, number, value
        if empty:
            raise self.no_rows(name)

    def no_rows(self, name: str) -> ExampleError:
        """The error of a file or part without a row that can be used."""
        skipped = self.problems.report()
        return ExampleError(f"no rows in {name}" + (f" ({skipped})" if skipped else ""))

    def lines(self, remote: str | None, *names: str, otherwise: str | None = None) -> list[Row]:
        """The lines of the text file that `find` finds, or of the URL `remote`, without the white space at their ends.

        They are UTF-8, or for a file that is not in the encoding `otherwise`, which has to know every byte. Raises
        ExampleError where the file is not there, empty or not in that encoding.
        """
        path = self.find(*names)
        if path is None and remote is None:
            raise self.missing("the hub has no copy of these rows")
        if path is not None:
            self.entries.append(file_entry(path))
        content = self._fetch(remote) if path is None else path.read_bytes()
        content = content.removeprefix(codecs.BOM_UTF8)  # no part of the first line
        place = path or remote
        if not content.strip():
            raise self.no_rows(str(place))
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            if otherwise is None:
                line = content[: error.start].count(b"\n") + 1
                raise ExampleError(f"{place}:{line}: not UTF-8") from None
            text = content.decode(otherwise)
        lines = text.removesuffix("\n").split("\n")
        return [(f"{place}:{number}", number, line.strip()) for number, line in enumerate(lines, start=1)]

    def _fetch(self, url: str) -> bytes:
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                content = reply.read()
        except OSError as error:
            raise self.missing(f"{url} does not answer ({_first_line(error)})") from None
        self.entries.append({"url": url, "sha256": hashlib.sha256(content).hexdigest()})
        return content


class SpiderFiles:
    """The files of Spider's official layout, in a zip file or unpacked, there alone or in one folder."""

    def __init__(self, source: Source, path: Path):
        """Raises ExampleError where `path` holds no train_spider.json."""
        self.source, self.path = source, path
        try:
            if path.is_dir():
                names = [p.relative_to(path).as_posix() for p in sorted(path.glob("**/train_spider.json"))]
            else:
                with zipfile.ZipFile(path) as archive:
                    names = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise source.missing(f"{path}: not a zip file that can be read ({_first_line(error)})") from None
        names = [name for name in names if re.fullmatch(r"([^/]+/)?train_spider\.json", name)]
        if not names:
            raise source.missing(f"{path} holds no train_spider.json, neither alone nor in a folder")
        self.folder = min(names, key=len).removesuffix("train_spider.json")

    def entries(self, *names: str) -> list[dict[str, str]]:
        """What was read, as entries of the manifest."""
        return (
            [file_entry(self.path / self.folder / n) for n in names] if self.path.is_dir() else [file_entry(self.path)]
        )

    def read(self, name: str) -> bytes:
        """A file's content. Raises ExampleError where it cannot be read or has more than MAX_BYTES."""
        try:
            if self.path.is_dir():
                with open(self.path / self.folder / name, "rb") as file:
                    return self._read_bounded(file, name)
            with zipfile.ZipFile(self.path) as archive, archive.open(self.folder + name) as file:
                return self._read_bounded(file, name)
        # RuntimeError: encrypted, or a compression that Python does not know; EOFError: cut short
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
            raise ExampleError(f"{self.place(name)}: cannot be read ({_first_line(error)})") from None

    def _read_bounded(self, file: IO[bytes], name: str) -> bytes:
        content = bytearray()
        while block := file.read(BLOCK):
            content += block
            if len(content) > MAX_BYTES:
                raise ExampleError(f"{self.place(name)}: more than {MAX_BYTES >> 20} MiB unpacked, so not read")
        return bytes(content)

    def place(self, name: str) -> str:
        """A file's name for messages."""
        return f"{self.path}/{self.folder}{name}"

    def rows(self, name: str) -> list[Row]:
        """The entries of a JSON list. Raises ExampleError where it cannot be read or is empty."""
        content = self.read(name)
        try:
            entries = json.loads(content)
        except json.JSONDecodeError as error:
            raise ExampleError(f"{self.place(name)}:{error.lineno}: not JSON ({error.msg})") from None
        except (UnicodeDecodeError, RecursionError, MemoryError) as error:
            raise ExampleError(f"{self.place(name)}: not JSON that can be read ({_first_line(error)})") from None
        if not isinstance(entries, list):
            raise ExampleError(f"{self.place(name)}: not a JSON list")
        if not entries:
            raise self.source.no_rows(self.place(name))
        return [(f"{self.place(name)}: entry {i}", i, entry) for i, entry in enumerate(entries, start=1)]

    def licence(self) -> str | None:
        """The licence that a README.txt beside the rows states, as that of the project's own set does."""
        try:
            stated = re.search(rb"^Licen[cs]e: ([\w.-]*\w)", self.read("README.txt"), re.MULTILINE)
        except ExampleError:
            return None
        return stated and stated[1].decode()
