"""A small SQLite database, and helpers for the tests of SQL queries."""

import contextlib
import sqlite3
from pathlib import Path

from llm_jepa.data.examples import Example
from llm_jepa.files import sha256

SCRIPT = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER);
CREATE TABLE concert (id INTEGER PRIMARY KEY AUTOINCREMENT, singer INTEGER REFERENCES singer (id));
CREATE INDEX by_age ON singer (age);
INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bo', 20), (3, 'Cy', 30);
"""


def make_database(path: Path, before: str = "") -> Path:
    """Makes the database; `before` is SQL that runs first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(before + SCRIPT)
    return path


def sql_example(gold: str, db_id: str = "music") -> Example:
    """An example of Spider."""
    return Example(None, f"For db_id:[{db_id}]\n\nWhich?", gold, "data.jsonl:7", 7)


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file and folder in a folder, with its modification time and checksum."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, sha256(p) if p.is_file() else "") for p in paths}
