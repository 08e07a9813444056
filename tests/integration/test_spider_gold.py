"""spider_data.zip is consistent, and execution match on it: every gold query against itself, and against variants.

An oracle runs both queries with Python's sqlite3 and compares their rows by the definition of the official test-suite
evaluator (arXiv 2010.02840), trying every permutation of the columns.
"""

from __future__ import annotations

import itertools
import json
import random
import sqlite3
import zipfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT

from llm_jepa.data.examples import Example
from llm_jepa.scoring.sql import execution_match

SAMPLE = 50  # queries per variant; those with repeated rows first
MAX_COLUMNS = 5  # of a result, so at most 120 permutations

# Variants of a query q with columns c0, c1, …: d has each distinct row once, n numbers the m rows.
TABLES = """WITH q({columns}) AS ({query}), d AS (SELECT DISTINCT * FROM q),
n AS (SELECT *, row_number() OVER () AS n, count(*) OVER () AS m FROM q) """
EQUAL, REARRANGED, DIFFERENT = (True, True), (True, False), (False, False)  # (execution, execution_ordered)
VARIANTS = {  # name → (query, least number of columns, outcomes that must occur)
    "reversed": ("SELECT {columns} FROM n ORDER BY n DESC", 1, {EQUAL, REARRANGED, DIFFERENT}),
    "distinct": ("SELECT * FROM d", 1, {EQUAL, DIFFERENT}),
    "limit": ("SELECT * FROM q LIMIT 3", 1, {EQUAL, DIFFERENT}),
    "swapped columns": ("SELECT c1, c0{rest} FROM q", 2, {REARRANGED}),
    "column missing": ("SELECT c0{rest} FROM q", 2, {DIFFERENT}),
    "column twice": ("SELECT c0, c0{rest} FROM q", 2, {DIFFERENT}),
    "cells swapped in some rows": (
        "SELECT iif(n % 2, c0, c1), iif(n % 2, c1, c0){rest} FROM n", 2, {EQUAL, DIFFERENT},
    ),
    "column shifted by one row": (
        "SELECT next.c0, n.c1{rest} FROM n JOIN n AS next ON next.n = n.n % n.m + 1", 2, {EQUAL, DIFFERENT},
    ),
    "other row repeated": (
        "SELECT * FROM d UNION ALL SELECT * FROM (SELECT first.* FROM q JOIN (SELECT * FROM d LIMIT 1) AS first "
        "LIMIT (SELECT count(*) FROM q) - (SELECT count(*) FROM d))", 1, {EQUAL, DIFFERENT},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def databases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spider")
    with zipfile.ZipFile(ROOT / "spider_data.zip") as archive:
        archive.extractall(folder)
    return folder / "spider_data" / "database"


@pytest.fixture(scope="module")
def gold(databases) -> list[tuple[str, str, list[tuple]]]:
    """(query, db_id, rows) of every example."""
    files = [databases.parent / f"{name}_gold.sql" for name in ("train", "dev")]
    pairs = [line.split("\t") for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [(query, db_id, run(databases, db_id, query)) for query, db_id in pairs]


def run(databases: Path, db_id: str, query: str) -> list[tuple]:
    with closing(sqlite3.connect(databases / db_id / f"{db_id}.sqlite")) as connection:
        return connection.execute(query).fetchall()


def verdict(gold: list[tuple], predicted: list[tuple], ordered: bool) -> tuple[bool, bool]:
    """(execution, execution_ordered) by definition."""
    arranged = list if ordered else Counter
    equal = len(gold[0]) == len(predicted[0]) and any(
        arranged(tuple(row[i] for i in order) for row in predicted) == arranged(gold)
        for order in itertools.permutations(range(len(gold[0])))
    )
    return equal, gold == predicted


def score(match: execution_match, predicted: str, query: str, db_id: str) -> tuple[bool, bool]:
    scores = match(predicted, Example(None, f"For db_id:[{db_id}]\n\nWhich?", query, "gold.sql:1", 1))
    return scores["execution"], scores["execution_ordered"]


def test_splits_tables_and_gold_files_match_the_databases(databases, gold):
    root = databases.parent
    parts = [json.loads((root / f"{name}.json").read_text("utf-8")) for name in ("train_spider", "dev")]
    tables = {entry["db_id"]: entry for entry in json.loads((root / "tables.json").read_text("utf-8"))}
    assert list(map(len, parts)) == [500, 150]
    assert [(x["query"], x["db_id"]) for part in parts for x in part] == [entry[:2] for entry in gold]
    assert all(rows for _, _, rows in gold)
    train, dev = ({example["db_id"] for example in part} for part in parts)
    assert not train & dev and train | dev == tables.keys() == {path.name for path in databases.iterdir()}
    for db_id, schema in tables.items():
        names = [name for (name,) in run(databases, db_id, "SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [
            [i, column] for i, name in enumerate(names)
            for (column,) in run(databases, db_id, f"SELECT name FROM pragma_table_info('{name}')")
        ]  # fmt: skip
        assert schema["table_names_original"] == names
        assert schema["column_names_original"] == [[-1, "*"], *columns]
        assert run(databases, db_id, "PRAGMA foreign_key_check") == []


def test_every_gold_query_equals_itself(databases, gold):
    with execution_match(databases) as match:
        assert [query for query, db_id, _ in gold if score(match, query, query, db_id) != EQUAL] == []


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_score_as_the_definition_says(name, databases, gold):
    variant, least_columns, wanted = VARIANTS[name]
    fitting = [entry for entry in gold if least_columns <= len(entry[2][0]) <= MAX_COLUMNS]
    random.Random(0).shuffle(fitting)
    fitting.sort(key=lambda entry: len(set(entry[2])) == len(entry[2]))
    outcomes = Counter()
    with execution_match(databases) as match:
        for query, db_id, rows in fitting[:SAMPLE]:
            columns = [f"c{i}" for i in range(len(rows[0]))]
            rest = "".join(f", {'n.' if 'next' in variant else ''}{column}" for column in columns[2:])
            text = (TABLES + variant).format(columns=", ".join(columns), query=query, rest=rest)
            expected = verdict(rows, run(databases, db_id, text), "order by" in query.lower())
            assert score(match, text, query, db_id) == expected, (db_id, query, text)
            outcomes[expected] += 1
    assert wanted <= outcomes.keys(), outcomes
