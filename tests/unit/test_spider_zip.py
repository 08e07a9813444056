"""spider_data.zip: every gold query runs, and tables.json, the gold files and the splits match the databases."""

from __future__ import annotations

import json
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

SPIDER_ZIP = Path(__file__).resolve().parents[2] / "spider_data.zip"


def test_archive_is_consistent(tmp_path):
    with zipfile.ZipFile(SPIDER_ZIP) as archive:
        archive.extractall(tmp_path)
    root = tmp_path / "spider_data"
    parts = {name: json.loads((root / f"{name}.json").read_text("utf-8")) for name in ("train_spider", "dev")}
    tables = {entry["db_id"]: entry for entry in json.loads((root / "tables.json").read_text("utf-8"))}
    assert {name: len(part) for name, part in parts.items()} == {"train_spider": 500, "dev": 150}
    used = {name: {example["db_id"] for example in part} for name, part in parts.items()}
    assert not used["train_spider"] & used["dev"]
    assert used["train_spider"] | used["dev"] == tables.keys() == {p.name for p in (root / "database").iterdir()}
    for name, part in parts.items():
        gold = (root / f"{name.removesuffix('_spider')}_gold.sql").read_text("utf-8")
        assert gold == "".join(f"{example['query']}\t{example['db_id']}\n" for example in part)

    for db_id, schema in tables.items():
        with closing(sqlite3.connect(root / "database" / db_id / f"{db_id}.sqlite")) as connection:
            names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            columns = [
                [i, column] for i, name in enumerate(names) for (column,) in
                connection.execute("SELECT name FROM pragma_table_info(?)", (name,))
            ]  # fmt: skip
            assert schema["table_names_original"] == names
            assert schema["column_names_original"] == [[-1, "*"], *columns]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            for example in (*parts["train_spider"], *parts["dev"]):
                if example["db_id"] == db_id:
                    assert connection.execute(example["query"]).fetchall(), example
