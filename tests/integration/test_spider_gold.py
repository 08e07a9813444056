"""spider_data.zip is consistent, and every gold query of it equals itself."""

import json
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT
from databases import sql_example

from llm_jepa.scoring.sql import execution_match


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spider")
    with zipfile.ZipFile(ROOT / "spider_data.zip") as archive:
        archive.extractall(folder)
    return folder / "spider_data"


def gold(root: Path) -> list[list[str]]:
    """[query, db_id] of every example."""
    files = [root / f"{name}_gold.sql" for name in ("train", "dev")]
    return [line.split("\t") for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def run(root: Path, db_id: str, query: str) -> list[tuple]:
    with closing(sqlite3.connect(root / "database" / db_id / f"{db_id}.sqlite")) as connection:
        return connection.execute(query).fetchall()


def test_parts_have_the_queries_of_the_gold_files_on_ten_and_three_databases(root):
    parts = [json.loads((root / f"{name}.json").read_text("utf-8")) for name in ("train_spider", "dev")]
    assert list(map(len, parts)) == [500, 150]
    assert [[x["query"], x["db_id"]] for part in parts for x in part] == gold(root)
    train, dev = ({example["db_id"] for example in part} for part in parts)
    assert (len(train), len(dev), len(train | dev)) == (10, 3, 13)
    tables = {entry["db_id"] for entry in json.loads((root / "tables.json").read_text("utf-8"))}
    assert train | dev == tables == {path.name for path in (root / "database").iterdir()}


def test_every_gold_query_has_rows_and_equals_itself(root):
    equal = {"execution": True, "execution_ordered": True}
    with execution_match(root / "database") as match:
        wrong = [query for query, db_id in gold(root) if match(query, sql_example(query, db_id)) != equal]
    assert not wrong and all(run(root, db_id, query) for query, db_id in gold(root))
