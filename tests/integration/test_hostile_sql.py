r"""Hostile generations: each is one query that failed, whatever it tries. Nothing on disk changes, the next one scores.

`{t}` and `{c}` in a generation stand for a table and a column of it, `{dir}` for a folder that is watched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, call, message_row, write_rows

from llm_jepa.data.examples import Example
from llm_jepa.scoring.sandbox import MEGABYTE, Failure, Sandbox
from llm_jepa.scoring.sql import MAX_QUERY, MAX_RESULT, ExecutionMatch, execute, spider_databases

SECONDS = 1.0  # for one query
MARGIN = 3.0  # beyond it: the child's start and the way to it and back, on a loaded machine
REMEMBERED = 640 * MEGABYTE  # of results in this process
RIGHT, WRONG = ({"execution": value, "execution_ordered": value} for value in (True, False))

SCRIPT = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER);
CREATE TABLE concert (id INTEGER PRIMARY KEY AUTOINCREMENT, singer INTEGER REFERENCES singer (id));
CREATE INDEX by_age ON singer (age);
CREATE VIEW old AS SELECT * FROM singer WHERE age > 20;
INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bo', 20), (3, 'Cy', 30);
INSERT INTO concert (singer) VALUES (1), (2);
"""

# --------------------------------------------------------------------------------------------------- generations

N = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "  # never ends
UP_TO = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) "
CROSS = "FROM " + ", ".join(f"{{t}} t{i}" for i in range(40))  # at least 3^40 rows
DOUBLED = "WITH c0 AS (SELECT 1 AS x)" + "".join(
    f", c{i} AS (SELECT a.x FROM c{i - 1} a, c{i - 1} b)" for i in range(1, 40)
)
STARS = "hex(zeroblob(400)) LIKE '" + "%0" * 200 + "%1'"

READS = {None}  # it may run: it only reads, and what it gives is not the gold's result
EMPTY, ERROR, REFUSED, SEVERAL, LARGE = ({r} for r in ("empty", "error", "refused", "several_statements", "too_large"))
SLOW = {"timeout"}
EXHAUSTING = {"timeout", "memory", "too_large"}  # which bound is met first depends on the machine's speed

GENERATIONS: dict[str, tuple[set[str | None], list[str]]] = {
    "writes": (REFUSED, [
        "INSERT INTO {t} SELECT * FROM {t}", "INSERT INTO {t} DEFAULT VALUES",
        "INSERT OR REPLACE INTO {t} SELECT * FROM {t}", "INSERT INTO {t} DEFAULT VALUES RETURNING {c}",
        "REPLACE INTO {t} SELECT * FROM {t}", "INSERT INTO {t} SELECT * FROM {t} WHERE true ON CONFLICT DO NOTHING",
        "UPDATE {t} SET {c} = NULL", "UPDATE OR IGNORE {t} SET {c} = 'x' WHERE false",
        "UPDATE {t} SET {c} = {c} RETURNING {c}", "DELETE FROM {t}", "DELETE FROM {t} WHERE false",
        "DELETE FROM {t} RETURNING {c}", "WITH x AS (SELECT * FROM {t}) INSERT INTO {t} SELECT * FROM x",
        "WITH x AS (SELECT 1) UPDATE {t} SET {c} = 1", "WITH x AS (SELECT 1) DELETE FROM {t} WHERE rowid IN x",
        "EXPLAIN DELETE FROM {t}", "EXPLAIN QUERY PLAN UPDATE {t} SET {c} = 1",
    ]),
    "writes to the schema's table": (REFUSED | ERROR, [
        "DELETE FROM sqlite_master", "UPDATE sqlite_master SET sql = ''", "INSERT INTO sqlite_master DEFAULT VALUES",
        "INSERT INTO sqlite_sequence VALUES ('x', 1)", "DROP TABLE sqlite_master",
    ]),
    "schema": (REFUSED, [
        "DROP TABLE {t}", "DROP TABLE IF EXISTS nowhere", "DROP VIEW IF EXISTS nowhere", "DROP INDEX IF EXISTS nowhere",
        "DROP TRIGGER IF EXISTS nowhere", "CREATE TABLE evil (a)", "CREATE TABLE IF NOT EXISTS {t} (a)",
        "CREATE TABLE evil AS SELECT * FROM {t}", "CREATE VIEW evil AS SELECT 1", "CREATE INDEX evil ON {t} ({c})",
        "CREATE UNIQUE INDEX evil ON {t} ({c})", "CREATE TEMP TABLE evil (a)",
        "CREATE TEMPORARY TABLE evil AS SELECT 1", "CREATE TABLE temp.evil (a)", "CREATE TEMP VIEW evil AS SELECT 1",
        "ALTER TABLE {t} RENAME TO evil", "ALTER TABLE {t} RENAME COLUMN {c} TO evil",
        "ALTER TABLE {t} ADD COLUMN evil", "ALTER TABLE {t} DROP COLUMN {c}", "CREATE VIRTUAL TABLE evil USING fts5(a)",
        "CREATE VIRTUAL TABLE evil USING fts4(a)", "CREATE VIRTUAL TABLE evil USING rtree(a, b, c)",
        "CREATE VIRTUAL TABLE temp.evil USING dbstat(main)", "VACUUM", "VACUUM main", "VACUUM INTO '{dir}/evil.sqlite'",
        "REINDEX", "REINDEX {t}", "ANALYZE", "ANALYZE {t}", "ANALYZE sqlite_master",
    ]),
    "triggers": (SEVERAL, [  # their bodies have semicolons
        "CREATE TRIGGER evil AFTER INSERT ON {t} BEGIN DELETE FROM {t}; END",
        "CREATE TEMP TRIGGER evil BEFORE DELETE ON {t} BEGIN SELECT load_extension('x'); END;",
    ]),
    "transactions": (REFUSED, [
        "BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE TRANSACTION", "COMMIT", "END", "ROLLBACK", "SAVEPOINT a",
        "RELEASE a", "ROLLBACK TO a",
    ]),
    "other files": (REFUSED, [
        "ATTACH '{dir}/evil.sqlite' AS evil", "ATTACH DATABASE ':memory:' AS evil", "ATTACH '' AS evil",
        "ATTACH 'x' AS main", "ATTACH 'file:{dir}/evil.sqlite?mode=rwc' AS evil KEY 'x'",
        "ATTACH '{dir}/' || 'evil.sqlite' AS evil", "DETACH main", "DETACH DATABASE temp",
    ]),
    "pragmas": (REFUSED, [
        "PRAGMA table_info({t})", "PRAGMA database_list", "PRAGMA writable_schema = ON", "PRAGMA journal_mode = WAL",
        "PRAGMA user_version = 7", "PRAGMA main.user_version", "PRAGMA hard_heap_limit = 0", "PRAGMA integrity_check",
        "PRAGMA temp_store_directory = '{dir}'", "PRAGMA temp_store = FILE", "PRAGMA trusted_schema = ON",
        "PRAGMA nonsense", "EXPLAIN PRAGMA table_info({t})", "SELECT * FROM pragma_table_info('{t}')",
        "SELECT * FROM pragma_database_list", "SELECT * FROM pragma_function_list",
        "SELECT file FROM (SELECT * FROM pragma_database_list) LIMIT 1",
        "SELECT p.name FROM sqlite_master m, pragma_table_info(m.name) p", "SELECT * FROM pragma_user_version(7)",
        "SELECT * FROM {t} WHERE {c} IN (SELECT name FROM pragma_compile_options)",
    ]),
    "denied functions": (REFUSED, [
        "SELECT load_extension('x')", "SELECT load_extension('{dir}/x.so', 'entry')", "SELECT LOAD_extension('x')",
        "SELECT \"load_extension\"('x')", "SELECT [load_extension]('x')",
        "SELECT {c} FROM {t} WHERE {c} = 'nobody' AND load_extension({c})",
        "SELECT CASE WHEN 0 THEN load_extension('x') END", "SELECT 1 ORDER BY load_extension('x')",
        "SELECT (SELECT load_extension('x') FROM {t})", "SELECT fts3_tokenizer('simple')",
        "SELECT fts3_tokenizer('simple', x'4141414141414141')", "SELECT hex(fts3_tokenizer('porter'))",
        "SELECT sqlite_log(1, 'x')", "SELECT rtreecheck('main', '{t}')",
    ]),
    "functions that are not there": (REFUSED | ERROR, [  # refused where SQLite was built with them
        "SELECT readfile('/etc/passwd')", "SELECT writefile('{dir}/evil', 'x')", "SELECT edit('x', 'sh -c id')",
        "SELECT system('id')", "SELECT shell('touch {dir}/evil')", "SELECT eval('DROP TABLE {t}')",
        "SELECT load_file('/etc/passwd')", "SELECT * FROM fsdir('/')", "SELECT * FROM zipfile('{dir}/x.zip')",
        "SELECT * FROM csv('{dir}/bait.csv')", "SELECT * FROM generate_series(1, 9223372036854775807)",
        "SELECT count(*) FROM generate_series(1, 1e18) a, generate_series(1, 1e18) b", "SELECT 'aaaa!' REGEXP '(a+)+$'",
        "SELECT regexp('(a+)+$', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!')", "SELECT regexp_replace('a', 'a', 'b')",
        "SELECT 'a' MATCH 'b'", "SELECT * FROM sqlite_dbpage", "SELECT * FROM bytecode('SELECT 1')",
        "SELECT pg_sleep(99)", "SELECT sleep(99)", "SELECT benchmark(1e9, md5(1))",
        "SELECT * FROM {t} INTO OUTFILE '{dir}/evil'", "COPY {t} TO PROGRAM 'touch {dir}/evil'", "SHUTDOWN",
        "EXEC xp_cmdshell 'id'", "GRANT ALL ON {t} TO evil", "TRUNCATE TABLE {t}", "SHOW TABLES", "USE {t}",
        "SET x = 1", "WITH x AS (DELETE FROM {t} RETURNING *) SELECT * FROM x",
        "SELECT * FROM (DELETE FROM {t} RETURNING *)",
    ]),
    "functions given nonsense": (ERROR, [
        "SELECT json(replace(hex(zeroblob(100000)), '0', '['))", "SELECT json_extract('{}', '$[')",
        "SELECT json_patch('{', '}')", "SELECT json_tree('[1]')", "SELECT abs(-9223372036854775808)",
        "SELECT sum(9223372036854775807) FROM {t}", "SELECT snippet({t}) FROM {t}", "SELECT matchinfo({c}) FROM {t}",
        "SELECT offsets(x'00')", "SELECT optimize(x'00')", "SELECT highlight({t}, 0, '', '') FROM {t}",
        "SELECT 'a' LIKE 'b' ESCAPE 'cd'", "SELECT {c} FROM {t} ORDER BY {c} COLLATE nowhere",
        "SELECT nth_value(1, 0) OVER () FROM {t}", "SELECT ntile(-1) OVER () FROM {t}", "SELECT likelihood(1, 2)",
        "SELECT coalesce(" + ", ".join(["NULL"] * 200) + ")", "SELECT ?", "SELECT :a, @b, $c", "SELECT ?250000",
        "SELECT ?999999999", "SELECT $a(') ; DROP TABLE {t} ; --'",
    ]),
    "never ends": (SLOW, [
        N + "SELECT count(*) FROM n", N + "SELECT i FROM n LIMIT 1 OFFSET 1000000000000",
        UP_TO.format(10**12) + "SELECT max(i) FROM n", N + "SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM n WHERE i < 0)",
        "SELECT count(*) " + CROSS, "SELECT count(*) " + CROSS + " WHERE t0.rowid + t39.rowid < 0",
        "SELECT (SELECT count(*) " + CROSS + ") FROM {t}",
        "SELECT instr(hex(zeroblob(8000000)), hex(zeroblob(4000000)) || '1')",
    ]),
    "grows": (EXHAUSTING, [
        N + "SELECT i FROM n", N + "SELECT i FROM n ORDER BY i DESC", N + "SELECT DISTINCT i % 3 FROM n",
        N.replace("ALL ", "") + "SELECT count(*) FROM n", N + "SELECT group_concat(hex(zeroblob(1000))) FROM n",
        N + "SELECT json_group_array(i) FROM n", N + "SELECT sum(i) OVER (ORDER BY i DESC) FROM n",
        N + "SELECT count(DISTINCT hex(zeroblob(i % 9999) || i)) FROM n",
        "WITH RECURSIVE s(x) AS (SELECT 'ab' UNION ALL SELECT x || x FROM s) SELECT length(x) FROM s",
        "WITH RECURSIVE s(x) AS (SELECT 1 UNION ALL SELECT x FROM s UNION ALL SELECT x FROM s) SELECT count(*) FROM s",
        "SELECT * " + CROSS, "SELECT t0.{c} " + CROSS + " ORDER BY random()", "SELECT DISTINCT random() " + CROSS,
        "SELECT group_concat(t0.{c}) OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) " + CROSS,
        "SELECT hex(zeroblob(1000000)) || random() AS x " + CROSS + " ORDER BY x",
        "SELECT " + ", ".join(["zeroblob(16000000)"] * 200), "SELECT " + ", ".join(["randomblob(8000000)"] * 200),
        "SELECT replace(hex(zeroblob(8000000)), '0', char(1))",  # 16 MB that are 96 MB as JSON
        UP_TO.format(100_000) + "SELECT sum(i) OVER (ORDER BY i ROWS BETWEEN UNBOUNDED PRECEDING AND "
        "UNBOUNDED FOLLOWING EXCLUDE CURRENT ROW) FROM n",
    ]),
    "names of names": (EXHAUSTING | ERROR, [
        DOUBLED + " SELECT count(*) FROM c39",
    ]),
    "giant values": (LARGE, [
        "SELECT zeroblob(1000000000)", f"SELECT zeroblob({MAX_RESULT + 1})", "SELECT randomblob(2147483647)",
        f"SELECT zeroblob({MAX_RESULT})", "SELECT hex(zeroblob(16000000))", "SELECT quote(zeroblob(9000000))",
        "SELECT length(replace(hex(zeroblob(10000)), '0', hex(zeroblob(1000))))", "SELECT length(zeroblob(9e18))",
        "SELECT group_concat(hex(zeroblob(1000000))) FROM {t} a, {t} b, {t} c",
        UP_TO.format(2000) + "SELECT hex(zeroblob(5000)), i FROM n",
    ]),
    "giant formats": (READS | EXHAUSTING, [  # some give NULL
        "SELECT printf('%.*c', 2000000000, 'x')", "SELECT format('%2000000000d', 1)",
        "SELECT printf('%.999999999f', 1)",
    ]),
    "giant text": (LARGE, [
        "a" * 10_000_000, "(" * 10_000_000, "'" * 10_000_000, ";" * 10_000_000, "\0" * 10_000_000, "/*" * 5_000_000,
        "\U0001f600" * 2_500_000, "SELECT " + "(" * 5_000_000 + "1" + ")" * 5_000_000, "SELECT 1" + " " * 10_000_000,
        "SELECT " + "1, " * 3_000_000 + "1", "SELECT 1" + " UNION SELECT 1" * 700_000, "SELECT 1 -- " + "x" * MAX_QUERY,
    ]),
    "long text": (ERROR, [
        "(" * MAX_QUERY, "SELECT " + "(" * 40_000 + "1" + ")" * 40_000, "SELECT " + "~" * 90_000 + "1",
        "SELECT " + "NOT " * 20_000 + "1", "SELECT 1" + " + 1" * 20_000, "SELECT 1" + " AND 1" * 15_000,
        "SELECT ''" + "||''" * 20_000, "SELECT " + "(SELECT " * 2_000 + "1" + ")" * 2_000,
        "SELECT " + "abs(" * 2_000 + "1" + ")" * 2_000, "SELECT " + "CASE WHEN 1 THEN " * 2_000 + "1" + " END" * 2_000,
        "SELECT 1" + " UNION ALL SELECT 1" * 5_000, "SELECT 1" + " EXCEPT SELECT 2" * 5_000,
        "SELECT " + "1, " * 30_000 + "1", "SELECT * FROM " + "{t}, " * 5_000 + "{t}",
        "SELECT 1 FROM {t}" + " JOIN {t} USING ({c})" * 500, "SELECT * FROM {t} WHERE {c} LIKE '" + "%a" * 5_000 + "'",
        "SELECT {c} GLOB '" + "[a-z]*" * 5_000 + "' FROM {t}", "a" * MAX_QUERY, "'" * 99_999, "[" * MAX_QUERY,
        "\\" * MAX_QUERY, "/*" * (MAX_QUERY // 2), "SELECT " * 14_000,
        "SELECT 1 FROM " + "(SELECT 1 FROM " * 3_000 + "{t}" + ")" * 3_000,
    ]),
    "dot commands": (ERROR, [
        ".shell touch {dir}/evil", ".system touch {dir}/evil", ".import '|cat /etc/passwd' {t}",
        ".import {dir}/bait.csv {t}", ".read {dir}/bait.csv", ".output {dir}/evil", ".once |touch {dir}/evil",
        ".backup {dir}/evil", ".save {dir}/evil", ".open {dir}/evil", ".load x", ".quit", ".exit", "\n.quit\n",
        "SELECT 1\n.shell id", "! touch {dir}/evil", "\\! id",
    ]),
    "characters": (ERROR, [
        "\0", "SELECT 1\0", "SELECT\0 1", "SELECT '\0'", "\0SELECT {c} FROM {t}",
        "SELECT {c} FROM {t} -- \0\nDROP TABLE {t}", "SELECT '\ud800'", "SELECT \udfff", "\udc80SELECT 1",
        "SELECT 1 -- \ud83d\n+ 1", "SELECT {c} FROM {t}\ud800", "SELECT\u00a01", "SELECT\u2003{c}\u2003FROM\u2003{t}",
        "\u200bSELECT {c} FROM {t}", "ＳＥＬＥＣＴ 1", "SELECT 1；", "SELECT 1 \u037e DROP TABLE {t}", "SELECT 1\u2028",
        "SELECT {c} FROM {t}\x1f", "SELECT\x0b{c} FROM {t}", "☃", "\x7f\x01\x1b[2J", "SELECT {c} FROM {t};\u00a0",
        "SELECT ’x’", "SELECT {c} FROM “{t}”",
    ]),
    "not ended": (ERROR, [
        "SELECT 'a", "SELECT \"a", "SELECT `a", "SELECT [a", "SELECT '; DROP TABLE {t}; --", "SELECT (1", "SELECT x'0",
        "SELECT x'0g'", "/*", "SELECT {c} FROM {t} /*", "SELECT", "SELECT FROM", "SELECT 1 +", "WITH", "EXPLAIN",
        "SELECT 1 /", "SELECT CASE", "WITH x AS (SELECT 1)",
    ]),
    "nothing": (EMPTY, [
        "", " ", " \t\r\n\f", ";", " ; ;\n; ", ";" * MAX_QUERY, " " * MAX_QUERY, "-- SELECT 1", "-- a\n-- b\n",
        "/* SELECT 1 */", "/* ", "/* ; */ ; -- ;", "/*" + "*" * 90_000, "-" * MAX_QUERY, "\u00a0\u2003\u3000", "/**/",
    ]),
    "several": (SEVERAL, [
        "SELECT 1; DROP TABLE {t}", "SELECT 1;SELECT 2;", "SELECT 1; -- a\nDROP TABLE {t}",
        "SELECT 1;/* a */DELETE FROM {t}", "SELECT 1;;;DROP TABLE {t}", "SELECT ';'; DROP TABLE {t}",
        "SELECT 'a\\'; DROP TABLE {t}; --'", "SELECT '''; ' ; DROP TABLE {t}", "SELECT \"a\"; DROP TABLE {t} --\"",
        "SELECT [a]; DROP TABLE {t} --]", "SELECT 1 /* /* */ ; DROP TABLE {t} /* */ */",
        "SELECT 1 -- /*\n; DROP TABLE {t} -- */", "/*/ ; */ SELECT 1; DROP TABLE {t}", "BEGIN; DROP TABLE {t}; COMMIT",
        "ATTACH '{dir}/evil.sqlite' AS e; CREATE TABLE e.x (a)", "SELECT {c} FROM {t}; SELECT {c} FROM {t}",
        "SELECT {c} FROM {t};\n\nThis query lists them.", "SELECT 1;\n.shell id", "SELECT 1; \0",
        "PRAGMA writable_schema = 1; SELECT 1", "SELECT $a(;) FROM {t}", "SELECT 1;\u200b",
        "SELECT 1" + "; SELECT 1" * 9_000, "SELECT 1;" + "x",
    ]),
    "one statement in disguise": (READS, [
        "SELECT ';'", "SELECT '; DROP TABLE {t}; --'", "SELECT 1 AS \";\"", "SELECT 1 AS [a; DROP TABLE {t}]",
        "SELECT 1 AS `;`", "SELECT 1 -- ; DROP TABLE {t}", "SELECT 1 /* ; DROP TABLE {t}; */", "SELECT 'it''s; '",
        "SELECT 1 /* ; ", "; SELECT 1", "SELECT 1" + ";" * 90_000, "-- ;\nSELECT 1 ; -- ;", "\ufeffSELECT 1",
        "/*/ ; */ SELECT 1", "SELECT 1 -- \ud83d",
    ]),
    "text in double quotes": (READS | ERROR, [  # a string to some builds of SQLite, a column to others
        "SELECT \"a;b\"\"; DROP TABLE {t}; --\"", "SELECT \"; DROP TABLE {t}; --\"",
    ]),
    "virtual tables": (REFUSED | ERROR, [
        "SELECT * FROM dbstat", "SELECT * FROM sqlite_stmt", "SELECT * FROM json_each('[1, 2]')",
        "SELECT * FROM json_tree('{\"a\": [1]}')", "SELECT * FROM {t}, json_each({c})",
        "SELECT * FROM fts5vocab('a', 'b')", "SELECT * FROM fts3tokenize('simple', 'a b')", "SELECT * FROM fts4aux",
        "SELECT * FROM rtree",
    ]),
    "reading": (READS, [
        "SELECT * FROM sqlite_master", "SELECT name FROM sqlite_schema", "SELECT * FROM sqlite_temp_master",
        "EXPLAIN SELECT {c} FROM {t}", "EXPLAIN QUERY PLAN SELECT {c} FROM {t}", "SELECT sqlite_version()",
        "VALUES (1), (2)", "SELECT sqlite_compileoption_get(1)", "SELECT 1e999, -1e999, 1 / 0",
        "SELECT random() FROM {t}", "SELECT char(0), x'00'", "VALUES (1)" + ", (1)" * 15_000,
        "SELECT 1 WHERE 1 IN (" + "1, " * 30_000 + "1)", N + "SELECT i FROM n LIMIT 4", "SELECT " + STARS,
        "SELECT " + STARS.replace("LIKE", "GLOB").replace("%", "*"), "SELECT 1 COLLATE nowhere",
        "SELECT {c} FROM {t} WHERE 0 AND load_extension('x')",  # gone before it is looked at
        "SELECT rtreedepth(x'ffffffffffff')", "SELECT cast(x'fffe00' AS TEXT)", "SELECT zeroblob(-1), randomblob(-1)",
        # The sort is larger than SQLite's cache. As a temporary file it would fail, since the child writes none.
        UP_TO.format(20_000) + "SELECT max(x) FROM (SELECT i || hex(zeroblob(90)) AS x FROM n ORDER BY x LIMIT 19000)",
    ]),
    "prose": (ERROR, [
        "```sql\nSELECT {c} FROM {t}\n```", "```\nSELECT {c} FROM {t}\n```\nThis lists them.",
        "Sure! Here it is:\n\nSELECT {c} FROM {t}", "SELECT {c} FROM {t}\n\nThis query lists them.",
        "SQL: SELECT {c} FROM {t}", "\"SELECT {c} FROM {t}\"", "'SELECT {c} FROM {t}'", "SELECT {c} FROM {t}<|eot_id|>",
        "<|im_start|>assistant\nSELECT {c} FROM {t}", "{\"sql\": \"SELECT {c} FROM {t}\"}",
        "sqlite3 {dir}/evil.sqlite 'CREATE TABLE x (a)'", "$(touch {dir}/evil)", "`touch {dir}/evil`",
        "| touch {dir}/evil", "__import__('os').system('touch {dir}/evil')", "SELECT {c} FROM {t}</s>",
        "I am sorry, but I cannot help with that.", "SELECT * FROM {t} WHERE {c} = \"x\" OR 1=1) --", "1 OR 1=1",
        "SELECT {c} FROM nowhere", "SELECT nothing_here FROM {t}",
    ]),
}  # fmt: skip
ENDLESS = N + "SELECT count(*) FROM n"


class Hostile(NamedTuple):
    """A generation and the reasons why it may fail, None where it may run."""

    text: str
    reasons: set[str | None]

    def shown(self) -> str:
        return repr(self.text[:70]) + (f" ({len(self.text)} characters)" if len(self.text) > 70 else "")


class Place(NamedTuple):
    """A copied database in a folder that is watched as a whole."""

    folder: Path
    db_id: str
    table: str
    column: str

    @property
    def gold(self) -> str:
        return f"SELECT {self.column} FROM {self.table}"

    @property
    def databases(self) -> Path:
        return self.folder / "database"

    @property
    def file(self) -> Path:
        return self.databases / self.db_id / f"{self.db_id}.sqlite"

    def user(self) -> str:
        return f"For db_id:[{self.db_id}]\n\nWhich?"

    def example(self, gold: str | None = None) -> Example:
        return Example(None, self.user(), self.gold if gold is None else gold, "rows.jsonl:1", 1)

    def generations(self, *groups: str) -> list[Hostile]:
        names = {"{t}": self.table, "{c}": self.column, "{dir}": str(self.folder / "outside")}
        found = []
        for group in groups or GENERATIONS:
            reasons, texts = GENERATIONS[group]
            for text in texts:
                for name, value in names.items():
                    text = text.replace(name, value)
                found.append(Hostile(text, reasons))
        return found


def not_right(scores: dict) -> bool:
    return scores["execution"] is False and scores["execution_ordered"] is False


def encodable(text: str) -> bool:
    """Whether the text is without half a surrogate pair, which no predictions file holds."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def listing(folder: Path) -> dict[str, tuple[int, str] | None]:
    """Everything below a folder; files with their time of change and their SHA-256."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        if p.is_file()
        else None
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def spider(tmp_path_factory) -> Path:
    """A database of the repository's Spider data."""
    folder = spider_databases(ROOT / "spider_data.zip", tmp_path_factory.mktemp("spider"))
    return folder / "larch_farm" / "larch_farm.sqlite"


@pytest.fixture
def place(request, tmp_path, monkeypatch) -> Place:
    """The small database, or of Spider's the one asked for; the working and the temporary folder lie beside it."""
    here = Place(tmp_path, "music", "singer", "name")
    if getattr(request, "param", "small") == "spider":
        here = Place(tmp_path, "larch_farm", "crop", "name")
    here.file.parent.mkdir(parents=True)
    if here.db_id == "music":
        with contextlib.closing(sqlite3.connect(here.file)) as connection:
            connection.executescript(SCRIPT)
    else:
        shutil.copy(request.getfixturevalue("spider"), here.file)
    for name in ("outside", "working", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "bait.csv").write_text("1,bait,1\n")
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return here


# -------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("place", ["small", "spider"], indirect=True)
def test_hostile_generations(place):
    # What only grows takes a second each and is the same on any database.
    groups = [group for group in GENERATIONS if group != "grows" or place.db_id == "music"]
    hostiles, before, wrong = place.generations(*groups), listing(place.folder), {}
    open_files = len(os.listdir("/proc/self/fd"))
    with ExecutionMatch(place.databases, SECONDS) as match:
        for i, hostile in enumerate(hostiles):
            started = time.monotonic()
            scores = match(hostile.text, place.example())
            elapsed = time.monotonic() - started
            good = not_right(scores) and scores.get("failure") in hostile.reasons and elapsed < SECONDS + MARGIN
            sound = match(f"{place.gold} -- {i}", place.example())  # another text each time: results are remembered
            if not good or sound != RIGHT:
                wrong[hostile.shown()] = (scores, f"{elapsed:.2f} s", sound)
        child, remembered = match._sandbox._child, match._rows.cache_info().maxsize
    assert not wrong
    assert len(hostiles) > 380 and listing(place.folder) == before
    assert child.returncode == -signal.SIGKILL and len(os.listdir("/proc/self/fd")) == open_files
    assert remembered * 6 * MAX_RESULT < REMEMBERED  # rows take up to six times what they count for


def test_two_that_fail_are_never_equal(place):
    """Not for the same text either, as the gold query and as the prediction."""
    fast = [h for h in place.generations() if not h.reasons & (READS | SLOW) and len(h.text) <= MAX_QUERY]
    with ExecutionMatch(place.databases, SECONDS) as match:
        for hostile, other in zip(fast, fast[1:] + fast[:1], strict=True):
            for prediction in (hostile, other):
                scores = match(prediction.text, place.example(hostile.text))
                assert not_right(scores) and scores["failure"].removeprefix("gold_") in hostile.reasons, hostile.shown()
                assert scores["failure"].startswith("gold_")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_child_killed_in_the_middle_of_a_query(number, place):
    with ExecutionMatch(place.databases, seconds=20) as match:
        assert match(place.gold, place.example()) == RIGHT
        children = [match._sandbox._child]

        def kill_two() -> None:  # the first and the one that tries again
            for _ in range(2):
                time.sleep(0.3)
                os.kill(children[-1].pid, number)
                while (child := match._sandbox._child) in (None, children[-1]) and len(children) < 2:
                    time.sleep(0.01)
                children.append(child)

        killer = threading.Thread(target=kill_two)
        killer.start()
        started = time.monotonic()
        assert match(ENDLESS, place.example()) == WRONG | {"failure": "crash"}
        assert 0.2 < time.monotonic() - started < 5  # at once
        killer.join()
        assert match(place.gold + " -- 2", place.example()) == RIGHT
        assert children[0].returncode == -number and match._sandbox._child.pid != children[0].pid


@pytest.mark.parametrize("query", ["gold", "a" * 10_000_000], ids=["waiting", "being sent"])
def test_a_query_whose_child_is_killed_once_is_tried_again(place, query):
    with ExecutionMatch(place.databases, seconds=20) as match:
        assert match(place.gold, place.example()) == RIGHT
        pid = match._sandbox._child.pid
        os.kill(pid, signal.SIGSTOP)  # or it would read on
        killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
        killer.start()
        expected = RIGHT if query == "gold" else WRONG | {"failure": "too_large"}
        assert match(place.gold + " -- 2" if query == "gold" else query, place.example()) == expected
        killer.join()
        assert match(place.gold + " -- 3", place.example()) == RIGHT


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_child_that_is_brought_down_while_it_starts_is_started_again(place, sent, monkeypatch):
    started, popen = [], subprocess.Popen

    def interfere(*arguments, **options):
        started.append(popen(*arguments, **options))
        if len(started) == 1:
            os.kill(started[0].pid, sent)
        return started[-1]

    monkeypatch.setattr("sandbox.subprocess.Popen", interfere)
    monkeypatch.setattr("sandbox.START_SECONDS", 2.0)
    with ExecutionMatch(place.databases, SECONDS) as match:
        assert match(place.gold, place.example()) == RIGHT
    assert len(started) == 2 and started[0].returncode == -signal.SIGKILL


def test_a_crash_is_not_remembered_and_other_failures_are(place, monkeypatch):
    with ExecutionMatch(place.databases, SECONDS) as match:
        call, replies, asked = match._sandbox.call, [Failure("crash"), Failure("timeout")], []

        def fail_first(database, query):
            asked.append(query)
            if query == place.gold or not replies:
                return call(database, query)
            raise replies.pop(0)

        monkeypatch.setattr(match._sandbox, "call", fail_first)
        query = place.gold + " -- 2"
        assert [match(query, place.example()).get("failure") for _ in range(3)] == ["crash", "timeout", "timeout"]
        assert asked.count(query) == 2


def test_child_killed_between_two_queries_is_neithers_failure(place):
    with ExecutionMatch(place.databases, SECONDS) as match:
        assert match(place.gold, place.example()) == RIGHT
        pid = match._sandbox._child.pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert match(place.gold + " -- 2", place.example()) == RIGHT


def test_child_that_no_alarm_can_end(place):
    """A stopped process gets no signals: its parent must not wait for it."""
    with ExecutionMatch(place.databases, seconds=0.5) as match:
        assert match(place.gold, place.example()) == RIGHT
        killer = threading.Timer(0.2, os.kill, (match._sandbox._child.pid, signal.SIGSTOP))
        killer.start()
        started = time.monotonic()
        assert match(ENDLESS, place.example()) == WRONG | {"failure": "timeout"}
        assert 0.5 + 4 < time.monotonic() - started < 0.5 + 5 + MARGIN  # 5: what the parent allows the child beyond
        killer.join()
        assert match(place.gold + " -- 2", place.example()) == RIGHT


# ---------------------------------------------------------------------------------------------------- second walls


def test_without_the_authorizer_a_database_is_still_read_only(place):
    """Were a kind of statement ever overlooked: the file is opened read-only, and no other file can be."""
    groups = ("writes", "writes to the schema's table", "schema", "transactions", "other files", "pragmas")
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
    before = listing(place.folder)
    texts = json.dumps([hostile.text for hostile in place.generations(*groups)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(place.file)], input=texts, env=environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert json.loads(done.stdout)["error"] > 30  # SQLite's own refusals: the authorizer was off
    assert listing(place.folder) == before


def test_database_that_is_not_there_is_not_made(place):
    before = listing(place.folder)
    with pytest.raises(Failure, match="no_database"):
        execute(str(place.folder / "outside" / "evil.sqlite"), "SELECT * FROM sqlite_master")
    assert listing(place.folder) == before


def test_child_cannot_write_to_a_file(place):
    bait, evil = place.folder / "outside" / "bait.csv", place.folder / "outside" / "evil"
    with Sandbox("shutil:copyfile", SECONDS) as sandbox, pytest.raises(Failure, match="crash"):
        sandbox.call(str(bait), str(evil))
    assert bait.read_bytes() and evil.read_bytes() == b""


# --------------------------------------------------------------------------------------------------- command line


def test_evaluation_of_hostile_predictions_ends_well(place):
    """Each hostile prediction is followed by a right one. A slow one takes ten seconds here, so there is only one."""
    hostiles = [h for h in place.generations() if not h.reasons & SLOW and encodable(h.text)]
    huge = [h for h in hostiles if len(h.text) > MAX_QUERY + 100]
    hostiles = [h for h in hostiles if h not in huge[2:]] + [Hostile(ENDLESS, SLOW)]
    n = 2 * len(hostiles)
    data = write_rows(place.folder / "rows.jsonl", [message_row(place.user(), place.gold)] * n)
    texts = [text for h in hostiles for text in (h.text, f"SELECT {place.column} FROM {place.table} ;")]
    rows = [{"id": i, "prediction": text, "stop_reason": "stop"} for i, text in enumerate(texts, start=1)]
    given, out = write_rows(place.folder / "predictions.jsonl", rows), place.folder / "out"
    out.mkdir()
    before = listing(place.folder)
    done = call("evaluate", "--score_only", given, "--input_file", data, "--task", "spider", "--spider_path",
                place.databases, "--output_file", out / "scored.jsonl")  # fmt: skip
    assert done.code == 0, done.err
    metrics = json.loads((out / "metrics.json").read_text())
    scored = [json.loads(line) for line in (out / "scored.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["id"], row["prediction"]) for row in scored] == [(row["id"], row["prediction"]) for row in rows]
    for hostile, row, right in zip(hostiles, scored[::2], scored[1::2], strict=True):
        assert not_right(row) and row.get("failure") in hostile.reasons, hostile.shown()
        assert right["execution"] and right["execution_ordered"] and "failure" not in right
    assert (metrics["n"], metrics["execution"], metrics["execution_ordered"]) == (n, 0.5, 0.5)
    failures = Counter(row["failure"] for row in scored if "failure" in row)
    assert metrics["failures"] == failures
    assert failures.keys() >= {"refused", "error", "empty", "several_statements", "too_large"}
    assert failures["timeout"] == 1
    assert f"{failures['error']} error" in done.out
    for file in out.iterdir():
        file.unlink()
    assert listing(place.folder) == before
