"""Where a dataset is read from: the hub at a pinned commit, a URL, a local folder, or Spider's archive."""

from __future__ import annotations

import hashlib
import re
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_jepa.data.examples import HUB, ExampleError, read_rows
from llm_jepa.files import read_json, sha256

Row = tuple[str, int, Any]  # place (for messages), number counted from 1, value


def pinned(address: str) -> tuple[str, dict[str, str]]:
    """A hub address with its revision resolved to a commit, and the manifest entry for it.

    Raises ExampleError if the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    place = HUB.fullmatch(address)
    name, commit = place["name"], place["revision"] or "main"
    if not re.fullmatch("[0-9a-f]{40}", commit):
        try:
            commit = HfApi().dataset_info(name, revision=commit).sha
        except Exception as error:  # the client also raises the exceptions of its HTTP library
            reason = str(error).partition("\n")[0]
            raise ExampleError(f"{name}@{commit}: cannot be found on the hub ({reason})") from None
    entry = {"hub": name, "config": place["config"], "split": place["split"], "revision": commit}
    return address.partition("@")[0] + f"@{commit}", {k: v for k, v in entry.items() if v}


def file_entry(path: Path) -> dict[str, str]:
    """The manifest entry of a local file. Its folder is left out, because it differs between machines."""
    return {"file": path.name, "sha256": sha256(path)}


@dataclass
class Source:
    """The raw data of one dataset: local files in `path` (--source), or without it the hub or a URL.

    `entries` lists for the manifest what was read.
    """

    path: Path | None = None
    entries: list[dict[str, str]] = field(default_factory=list)

    def hub(self, address: str) -> Iterator[Row]:
        """The rows of a hub dataset. Raises ExampleError if it cannot be loaded."""
        address, entry = pinned(address)
        self.entries.append(entry)
        yield from ((place, number, row()) for place, number, row in read_rows(address))

    def lines(self, url: str) -> list[Row]:
        """The stripped lines of `url`, or with --source of the file with the last one, two or three parts of its path.

        Raises ExampleError if there is no such file, or if `url` cannot be downloaded.
        """
        if self.path is None:
            place = url
            try:
                with urllib.request.urlopen(url, timeout=60) as reply:
                    content = reply.read()
            except OSError as error:
                raise ExampleError(f"{url}: cannot be downloaded ({error})") from None
            self.entries.append({"url": url, "sha256": hashlib.sha256(content).hexdigest()})
        else:
            parts = url.split("/")
            names = ["/".join(parts[-depth:]) for depth in (1, 2, 3)]
            place = next((self.path / name for name in names if (self.path / name).is_file()), None)
            if place is None:
                raise ExampleError(f"--source {self.path} has no {' and no '.join(names)}")
            self.entries.append(file_entry(place))
            content = place.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ExampleError(f"{place}: not UTF-8 ({error})") from None
        lines = text.removesuffix("\n").split("\n")
        return [(f"{place}:{number}", number, line.strip()) for number, line in enumerate(lines, start=1)]


def spider_folder(path: Path) -> Path | zipfile.Path:
    """The folder with train_spider.json in a zip archive or folder: its top, or one level down.

    Raises ExampleError if there is none.
    """
    try:
        top = path if path.is_dir() else zipfile.Path(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ExampleError(f"{path}: not a folder or zip archive ({error})") from None
    for folder in (top, *(folder for folder in top.iterdir() if folder.is_dir())):
        if (folder / "train_spider.json").is_file():
            return folder
    raise ExampleError(f"{path} has no train_spider.json, at its top or one level down")


def json_rows(path: Path | zipfile.Path) -> list[Row]:
    """The entries of a JSON list. Raises UsageError if it cannot be read or is not a list."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ExampleError(f"{path}: not a JSON list")
    return [(f"{path}: entry {i}", i, entry) for i, entry in enumerate(entries, start=1)]


def stated_license(readme: Path | zipfile.Path) -> str | None:
    """The license in a README, which the project's own Spider set has and the official set does not."""
    stated = readme.is_file() and re.search(r"^License: ([\w.-]*\w)", readme.read_text(encoding="utf-8"), re.MULTILINE)
    return stated[1] if stated else None
