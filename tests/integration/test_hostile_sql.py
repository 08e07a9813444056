r"""Hostile queries as predictions: each fails for an allowed reason, no file changes, and the next query scores.

`{t}` and `{c}` in a query are a table and a column of it, `{dir}` is a folder that is watched.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from databases import listing, make_database, sql_example

from llm_jepa.scoring.sql import MAX_QUERY, MAX_RESULT, execution_match

SECONDS = 0.4  # limit for one query
MARGIN = 3.0  # for starting the child process on a loaded computer
RIGHT = {"execution": True, "execution_ordered": True}
GOLD = "SELECT name FROM singer"
N = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "  # never ends
UP_TO = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) "
CROSS = "FROM " + ", ".join(f"{{t}} t{i}" for i in range(40))  # at least 3^40 rows
ERROR, REFUSED, EITHER = {"error"}, {"refused"}, {"refused", "error"}  # EITHER: depends on how SQLite was built
EXHAUSTING = {"timeout", "memory", "too_large"}  # depends on the computer's speed
QUERIES: dict[str, tuple[set[str | None], list[str]]] = {  # group: (allowed reasons, None if it may run; queries)
    "writes": (REFUSED, [
        "INSERT INTO {t} SELECT * FROM {t}", "INSERT INTO {t} DEFAULT VALUES RETURNING {c}",
        "UPDATE OR IGNORE {t} SET {c} = 'x' WHERE false", "DELETE FROM {t} WHERE false",
        "WITH x AS (SELECT * FROM {t}) INSERT INTO {t} SELECT * FROM x", "EXPLAIN DELETE FROM {t}",
    ]),
    "writes to the schema": (EITHER, ["DELETE FROM sqlite_master", "DROP TABLE sqlite_master"]),
    "schema": (REFUSED, [
        "DROP TABLE {t}", "CREATE TABLE IF NOT EXISTS {t} (a)", "CREATE TABLE evil AS SELECT * FROM {t}",
        "CREATE VIEW evil AS SELECT 1", "CREATE INDEX evil ON {t} ({c})", "CREATE TEMP TABLE evil (a)",
        "ALTER TABLE {t} DROP COLUMN {c}", "CREATE VIRTUAL TABLE evil USING fts5(a)", "VACUUM",
        "VACUUM INTO '{dir}/evil.sqlite'", "REINDEX {t}", "ANALYZE", "BEGIN EXCLUSIVE TRANSACTION", "SAVEPOINT a",
    ]),
    "other files": (REFUSED, [
        "ATTACH '{dir}/evil.sqlite' AS evil", "ATTACH DATABASE ':memory:' AS evil",
        "ATTACH 'file:{dir}/evil.sqlite?mode=rwc' AS evil KEY 'x'", "DETACH main",
    ]),
    "pragmas": (REFUSED, [
        "PRAGMA table_info({t})", "PRAGMA writable_schema = ON", "PRAGMA journal_mode = WAL",
        "PRAGMA hard_heap_limit = 0", "PRAGMA temp_store_directory = '{dir}'", "EXPLAIN PRAGMA table_info({t})",
        "SELECT file FROM (SELECT * FROM pragma_database_list) LIMIT 1",
        "SELECT * FROM {t} WHERE {c} IN (SELECT name FROM pragma_compile_options)",
    ]),
    "denied functions": (REFUSED, [
        "SELECT load_extension('{dir}/x.so', 'entry')", "SELECT LOAD_extension('x')", "SELECT [load_extension]('x')",
        "SELECT {c} FROM {t} WHERE {c} = 'nobody' AND load_extension({c})",
        "SELECT CASE WHEN 0 THEN load_extension('x') END", "SELECT fts3_tokenizer('simple', x'4141414141414141')",
    ]),
    "functions of the sqlite3 program": (EITHER, [
        "SELECT readfile('/etc/passwd')", "SELECT writefile('{dir}/evil', 'x')", "SELECT edit('x', 'sh -c id')",
        "SELECT * FROM csv('{dir}/bait.csv')", "SELECT * FROM sqlite_dbpage",
    ]),
    "invalid arguments": (ERROR, [
        "SELECT json(replace(hex(zeroblob(100000)), '0', '['))", "SELECT optimize(x'00')", "SELECT :a, @b, $c",
        "SELECT $a(') ; DROP TABLE {t} ; --'", "SELECT nothing FROM {t}",
    ]),
    "never ends": ({"timeout"}, [
        N + "SELECT count(*) FROM n", "SELECT count(*) " + CROSS,
        "SELECT instr(hex(zeroblob(8000000)), hex(zeroblob(4000000)) || '1')",
    ]),
    "grows": (EXHAUSTING, [
        N + "SELECT i FROM n", N + "SELECT i FROM n ORDER BY i DESC", N + "SELECT json_group_array(i) FROM n",
        "WITH RECURSIVE s(x) AS (SELECT 'ab' UNION ALL SELECT x || x FROM s) SELECT length(x) FROM s",
        "SELECT hex(zeroblob(1000000)) || random() AS x " + CROSS + " ORDER BY x",
        "SELECT " + ", ".join(["randomblob(8000000)"] * 200),
        "SELECT replace(hex(zeroblob(8000000)), '0', char(1))",  # 16 MB that are 96 MB as JSON
    ]),
    "large values": ({"too_large"}, [
        f"SELECT zeroblob({MAX_RESULT})", "SELECT randomblob(2147483647)", "SELECT length(zeroblob(9e18))",
        UP_TO.format(2000) + "SELECT hex(zeroblob(5000)), i FROM n",
    ]),
    "long queries": ({"too_large"}, [
        "a" * 1_000_000, "\0" * 1_000_000, "SELECT " + "(" * 500_000 + "1" + ")" * 500_000,
        "SELECT 1 -- " + "x" * MAX_QUERY,
    ]),
    "deep queries": (ERROR, [
        "(" * MAX_QUERY, "SELECT 1" + " AND 1" * 15_000, "SELECT " + "(SELECT " * 2_000 + "1" + ")" * 2_000,
        "SELECT 1" + " UNION ALL SELECT 1" * 5_000, "SELECT " + "1, " * 30_000 + "1",
        "SELECT * FROM {t} WHERE {c} LIKE '" + "%a" * 5_000 + "'", "'" * 99_999,
    ]),
    "text that is not SQL": (ERROR, [
        ".shell touch {dir}/evil", "\n.quit\n", "SELECT 1\n.shell id", "```sql\nSELECT {c} FROM {t}\n```",
        "SELECT {c} FROM {t}<|eot_id|>", "\0", "SELECT '\0'", "SELECT '\ud800'", "SELECT 1 \u037e DROP TABLE {t}",
        "SELECT '; DROP TABLE {t}; --", "/*",
    ]),
    "nothing": ({"empty"}, ["", " \t\r\n\f", " ; ;\n; ", "-- SELECT 1", "/* ; */ ; -- ;", "\u00a0\u2003\u3000"]),
    "several statements": ({"several_statements"}, [
        "SELECT 1; DROP TABLE {t}", "SELECT 1; -- a\nDROP TABLE {t}", "SELECT 'a\\'; DROP TABLE {t}; --'",
        "SELECT '''; ' ; DROP TABLE {t}", "SELECT \"a\"; DROP TABLE {t} --\"", "SELECT [a]; DROP TABLE {t} --]",
        "SELECT 1 /* /* */ ; DROP TABLE {t} /* */ */", "SELECT $a(;) FROM {t}", "SELECT 1;\n.shell id", "SELECT 1; \0",
        "CREATE TRIGGER evil AFTER INSERT ON {t} BEGIN DELETE FROM {t}; END",
    ]),
    "other results": ({None}, [
        "SELECT '; DROP TABLE {t}; --'", "SELECT 1 AS [a; DROP TABLE {t}]", "SELECT 1 /* ; ", "\ufeffSELECT 1",
        "SELECT * FROM sqlite_master", "EXPLAIN SELECT {c} FROM {t}", "SELECT 1e999, -1e999, 1 / 0",
        N + "SELECT i FROM n LIMIT 4",
        # a sort that is larger than SQLite's cache and would need a temporary file
        UP_TO.format(20_000) + "SELECT max(x) FROM (SELECT i || hex(zeroblob(90)) AS x FROM n ORDER BY x LIMIT 19000)",
    ]),
}  # fmt: skip


def queries(folder: Path, *groups: str) -> list[tuple[str, set[str | None]]]:
    """(query, allowed reasons) of all groups or of some."""
    words = {"{t}": "singer", "{c}": "name", "{dir}": str(folder / "outside")}
    chosen = [QUERIES[group] for group in groups or QUERIES]
    return [
        (re.sub("{(t|c|dir)}", lambda m: words[m[0]], text), reasons) for reasons, texts in chosen for text in texts
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A watched folder with the database, the working folder, the temporary folder and a file."""
    make_database(tmp_path / "database" / "music" / "music.sqlite")
    for name in ("outside", "working", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "bait.csv").write_text("1,bait,1\n")
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path


def test_hostile_queries_fail_and_change_nothing(folder):
    before, wrong = listing(folder), {}
    with execution_match(folder / "database", SECONDS) as match:
        for i, (query, reasons) in enumerate(queries(folder)):
            started = time.monotonic()
            scores = match(query, sql_example(GOLD))
            elapsed = time.monotonic() - started
            failed = not scores["execution"] and not scores["execution_ordered"]
            next_scores = match(f"{GOLD} -- {i}", sql_example(GOLD))  # a new text each time, since results are cached
            if not failed or scores.get("failure") not in reasons or elapsed > SECONDS + MARGIN or next_scores != RIGHT:
                wrong[query[:70]] = (scores, f"{elapsed:.2f} s", next_scores)
    assert not wrong
    assert listing(folder) == before


def test_database_is_read_only_without_the_authorizer(folder):
    """A second defense, tested in another process because some pragmas change global settings."""
    code = """
import collections, json, sys
from llm_jepa.scoring import sql
sql.ALLOWED, reasons = set(range(99)), collections.Counter()
for text in json.load(sys.stdin):
    try:
        sql.execute(sys.argv[1], text)
    except sql.Failure as failure:
        reasons[failure.reason] += 1
print(json.dumps(reasons))
"""
    before = listing(folder)
    groups = ("writes", "writes to the schema", "schema", "other files", "pragmas")
    texts = [query for query, _ in queries(folder, *groups)]
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "database" / "music" / "music.sqlite")], input=json.dumps(texts),
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["error"] > 15  # SQLite's own errors
    assert listing(folder) == before
