"""Where a dataset is read from: the hub, a URL, a local folder, or Spider's archive."""

from __future__ import annotations

import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jepa.data.examples import ExampleError, read_rows
from llm_jepa.files import read_json

Row = tuple[str, int, Any]  # place (for messages), number counted from 1, value


def hub(address: str) -> Iterator[Row]:
    """The rows of a hub dataset. Raises ExampleError if it cannot be loaded."""
    yield from ((place, number, row()) for place, number, row in read_rows(address))


def lines(url: str, folder: Path | None = None) -> list[Row]:
    """The stripped lines of `url`, or of the file in `folder` with the last one, two or three parts of its path.

    Raises ExampleError if there is no such file, or if `url` cannot be downloaded.
    """
    if folder is None:
        place = url
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                content = reply.read()
        except OSError as error:
            raise ExampleError(f"{url}: cannot be downloaded ({error})") from None
    else:
        parts = url.split("/")
        names = ["/".join(parts[-depth:]) for depth in (1, 2, 3)]
        place = next((folder / name for name in names if (folder / name).is_file()), None)
        if place is None:
            raise ExampleError(f"--source {folder} has no {' and no '.join(names)}")
        content = place.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExampleError(f"{place}: not UTF-8 ({error})") from None
    found = text.removesuffix("\n").split("\n")
    return [(f"{place}:{number}", number, line.strip()) for number, line in enumerate(found, start=1)]


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
