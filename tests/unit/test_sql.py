"""Execution match: which results are equal, what a query may do, where the databases are."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.files import sha256
from llm_jepa.scoring import sql
from llm_jepa.scoring.sandbox import Failure, Sandbox
from llm_jepa.scoring.sql import ExecutionMatch, execute, is_ordered, results_match, spider_databases

SCRIPT = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER);
INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bo', 20), (3, 'Cy', 30);
"""


def make_database(path: Path, script: str = SCRIPT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    return path


def example(gold: str, db_id: str = "music", question: str = "Which?") -> Example:
    return Example(None, f"For db_id:[{db_id}]\n\n{question}", gold, "rows.jsonl:7", 7)


@pytest.fixture
def database(tmp_path) -> Path:
    return make_database(tmp_path / "database" / "music" / "music.sqlite")


@pytest.fixture
def match(database):
    with ExecutionMatch(database.parents[1], seconds=5) as match:
        yield match


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder, with its time of change and its checksum."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, sha256(p)) for p in files}


# ------------------------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    "gold, predicted, unordered, ordered",
    [
        ([], [], True, True),
        ([(1,)], [], False, False),
        ([], [(None,)], False, False),
        ([(1,)], [(1,)], True, True),
        ([(1,)], [(1.0,)], True, True),
        ([(1,)], [("1",)], False, False),
        ([(b"a",)], [("a",)], False, False),
        ([(None,)], [(None,)], True, True),
        ([(None,)], [(0,)], False, False),
        ([(None,)], [("",)], False, False),
        ([("a",)], [("A",)], False, False),
        ([(2**53 + 1,)], [(2.0**53,)], False, False),
        ([(float("inf"),)], [(float("inf"),)], True, True),
        ([(1,), (2,)], [(2,), (1,)], True, False),
        ([(1,), (1,)], [(1,)], False, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([(1, "a"), (2, "b")], [("a", 1), ("b", 2)], True, True),
        ([(1, "a"), (2, "b")], [("b", 2), ("a", 1)], True, False),
        ([(1, "a"), (2, "b")], [("a", 2), ("b", 1)], False, False),
        ([(1, 1)], [(1,)], False, False),
        ([(1, 2)], [(1, 2, 3)], False, False),
        # One permutation for the whole result: no row may have its own.
        ([(1, 2), (3, 4)], [(2, 1), (3, 4)], False, False),
        ([(1, 2), (2, 1)], [(2, 1), (1, 2)], True, True),
        # A column may be used once only.
        ([(1, 1, 2)], [(1, 2, 2)], False, False),
        ([(1, 1.0, "1")], [("1", 1, 1)], True, True),
        # The same columns, each one a permutation of the others.
        ([(1, 2, 3), (2, 3, 1), (3, 1, 2)], [(1, 3, 2), (2, 1, 3), (3, 2, 1)], True, True),
        ([(1, 2, 3), (2, 3, 1), (3, 1, 2)], [(1, 2, 3), (2, 1, 3), (3, 3, 1)], False, False),
        ([(1, 1, 2), (2, 2, 1)], [(2, 1, 1), (1, 2, 2)], True, True),
        ([(1, 1, 2), (2, 2, 1)], [(1, 2, 2), (2, 1, 1)], True, False),
        ([(0, 0, 1), (0, 1, 0), (1, 0, 0)], [(1, 1, 0), (0, 0, 1), (0, 0, 0)], False, False),
    ],
)
def test_results_match(gold, predicted, unordered, ordered):
    assert results_match(gold, predicted, False) is unordered
    assert results_match(predicted, gold, False) is unordered
    assert results_match(gold, predicted, True) is ordered
    assert results_match(predicted, gold, True) is ordered


def edges(*cycles: list[int], n: int) -> list[tuple[int, ...]]:
    """A row for each edge of the cycles, a column for each of n vertices: 1 where the vertex is on the edge."""
    pairs = [(c[i], c[i - 1]) for c in cycles for i in range(len(c))]
    return [tuple(int(v in pair) for v in range(n)) for pair in pairs]


def shuffled(rows: list[tuple], seed: int) -> list[tuple]:
    """The rows and their columns in another order."""
    generator = random.Random(seed)
    order = list(range(len(rows[0])))
    generator.shuffle(order)
    rows = [tuple(row[i] for i in order) for row in rows]
    generator.shuffle(rows)
    return rows


def cyclic(n: int) -> list[tuple[int, ...]]:
    """A Latin square: all columns and all rows hold the same values."""
    return [tuple((r + c) % n for c in range(n)) for r in range(n)]


ALIKE = {  # (rows, a result that agrees with them in every column's values but is another)
    "one value": ([(7,) * 12] * 50, [(7,) * 12] * 49 + [(7,) * 11 + (8,)]),
    "Latin square": (cyclic(12), [*cyclic(12)[:11], (*cyclic(12)[11][:10], *cyclic(12)[11][:9:-1])]),
    "one mark a row": (
        [tuple(int(r == c) for c in range(12)) for r in range(12)],
        [tuple(int(r == c) for c in range(10)) + (int(r == 10),) * 2 for r in range(12)],
    ),
    "one cycle or two": (edges(list(range(12)), n=12), edges(list(range(6)), list(range(6, 12)), n=12)),
    "a cycle among triangles": (
        edges([0, 1, 2], [3, 4, 5], list(range(6, 12)), n=12),
        edges([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], n=12),
    ),
    "twelve duplicated columns": (
        [(r % 5,) * 6 + (r % 7,) * 6 for r in range(500)],
        [(r % 5,) * 6 + (r % 7,) * 5 + ((r + 1) % 7,) for r in range(500)],
    ),
    "many duplicated rows": (
        [tuple((r >> c) & 1 for c in range(12)) for r in range(64)] * 100,
        [tuple((r >> c) & 1 for c in range(12)) for r in range(63)] * 100 + [(1,) * 11 + (0,)] * 100,
    ),
    "a hundred columns": (
        [tuple(int(r * c % 101 < 50) for c in range(100)) for r in range(100)],
        [tuple(int(r * c % 101 < 50) for c in range(100)) for r in range(99)]
        + [tuple(int(99 * c % 101 >= 50) for c in range(100))],
    ),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_columns_that_look_alike_take_no_factorial_time(kind):
    rows, other = ALIKE[kind]
    started = time.monotonic()
    for seed in range(3):
        assert results_match(rows, shuffled(rows, seed), False) is True
        assert results_match(rows, shuffled(other, seed), False) is False
    assert time.monotonic() - started < 10  # 12! permutations would take days


@pytest.mark.parametrize(
    "query, ordered",
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n\tby a", True),
        ("select a from t order /* so */ by a", True),
        ("select a from t where b in (select b from t order by c limit 1)", True),
        ("select a from t", False),
        ("select a from t where b = 'order by'", False),
        ("select a from t where b = 'it''s order by'", False),
        ('select a as "order by" from t', False),
        ("select a as `order by` from t", False),
        ("select a as [order by] from t", False),
        ("select a from t -- order by a", False),
        ("select a from t -- order by\norder by a", True),
        ("select a /* order by */ from t", False),
        ("select '-- ' from t order by a", True),
        ("select '/*' from t order by a", True),
        ("select a from reorder bygone", False),
        ("select border, by1 from t", False),
        ("select 'unended order by", False),
        ("select a from t /* unended order by", False),
    ],
)
def test_is_ordered(query, ordered):
    assert is_ordered(query) is ordered


# ----------------------------------------------------------------------------------------------------- execution


def reason(database: Path, query: str) -> str:
    with pytest.raises(Failure) as caught:
        execute(str(database), query)
    return caught.value.reason


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count(*) FROM singer",
        "SELECT count(*) FROM singer;",
        "SELECT count(*) FROM singer ; ;\n; -- that; is all;",
        "; SELECT count(*) FROM singer",
        "SELECT count(*) FROM singer /* ; */ ;",
        "-- how many;\nSELECT count(*) FROM singer",
        "SELECT count(*) FROM singer WHERE name != ';'",
        "SELECT count(*) FROM singer WHERE name != 'a;''b;';",
        'SELECT count(*) AS "a;b" FROM singer',
        "SELECT count(*) AS [a;b] FROM singer",
        "SELECT count(*) AS `a;b` FROM singer",
        "WITH s AS (SELECT * FROM singer) SELECT count(*) FROM s",
    ],
)
def test_one_statement_with_what_stands_around_it(query, database):
    assert execute(str(database), query) == [[3]]


@pytest.mark.parametrize(
    "query, expected",
    [
        ("", "empty"),
        (" \n\t", "empty"),
        (";", "empty"),
        ("-- nothing", "empty"),
        ("/* nothing", "empty"),
        ("/* a */ ; -- b\n;", "empty"),
        ("SELECT 1; SELECT 2", "several_statements"),
        ("SELECT 1; ; DROP TABLE singer;", "several_statements"),
        ("SELECT 1 /* ; */; -- x\n SELECT 2", "several_statements"),
        ("SELEC 1", "error"),
        ("SELECT nothing FROM singer", "error"),
        ("SELECT * FROM nowhere", "error"),
        ("SELECT ?", "error"),
        ("SELECT :a", "error"),
        ("SELECT 1\0", "error"),
        ("SELECT '\ud800'", "error"),
        ("SELECT 'unended", "error"),
        ("SELECT " + " " * sql.MAX_QUERY + "1", "too_large"),
        ("SELECT zeroblob(1000000000)", "too_large"),
        ("SELECT hex(zeroblob(9000000)) FROM singer", "too_large"),
        ("SELECT zeroblob(9000000) FROM singer", "too_large"),
        ("DELETE FROM singer", "refused"),
        ("REINDEX", "refused"),
        ("SELECT load_extension('x')", "refused"),
        ("SELECT LOAD_EXTENSION('x')", "refused"),
    ],
)
def test_reasons_why_a_query_gives_no_result(query, expected, database):
    assert reason(database, query) == expected


def test_result_is_bounded_in_rows(database, monkeypatch):
    monkeypatch.setattr(sql, "MAX_RESULT", 1000 * sql.CELL)
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) SELECT i FROM n"
    assert len(execute(str(database), many.format(1000))) == 1000
    assert reason(database, many.format(1001)) == "too_large"


@pytest.mark.parametrize("content", [b"not a database, but long enough to look like one" * 100, None])
def test_no_database(content, tmp_path):
    path = tmp_path / "x.sqlite"
    if content is not None:
        path.write_bytes(content)
    assert reason(path, "SELECT * FROM sqlite_master") == "no_database"
    assert path.exists() is (content is not None)  # nothing is made where there is nothing


def test_damaged_database_is_none(database):
    with sqlite3.connect(database) as connection:
        connection.executescript(
            "INSERT INTO singer (name) SELECT hex(randomblob(500)) FROM singer a, singer b, singer c"
        )
    connection.close()
    damaged = bytearray(database.read_bytes())
    damaged[4096:] = b"\xff" * len(damaged[4096:])
    database.write_bytes(damaged)
    assert reason(database, "SELECT * FROM singer") == "no_database"


def test_memory_is_bounded(database):
    query = (
        "SELECT hex(zeroblob(4000000)) || a.id || b.id || c.id || d.id AS x FROM singer a, singer b, singer c, singer d"
    )
    with Sandbox("llm_jepa.scoring.sql:execute", 20) as sandbox, pytest.raises(Failure, match="memory"):
        sandbox.call(str(database), f"{query} ORDER BY x")


VALUES = {
    "1": 1, "1.0": 1.0, "'1'": "1", "x'31'": b"1", "NULL": None, "0": 0, "0.0": 0.0, "''": "", "x''": b"",
    "9223372036854775807": 2**63 - 1, "-9223372036854775808": -(2**63), "9223372036854775808": 2.0**63,
    "9007199254740993": 2**53 + 1, "1e999": float("inf"), "-1e999": float("-inf"), "0.1 + 0.2": 0.1 + 0.2,
    "5e-324": 5e-324, "1e999 - 1e999": None, "'it''s'": "it's", "'☃ \U0001f600'": "☃ \U0001f600",
    "'a' || char(0) || 'b'": "a\0b", "'\u2028\x7f\x01'": "\u2028\x7f\x01", "x'00ff0a'": b"\x00\xff\n",
    "'{\"blob\": \"00\"}'": '{"blob": "00"}', "cast(x'61ff62c3' as text)": "ab",
}  # fmt: skip


def test_values_come_back_as_they_are(match, database):
    rows = match._result(str(database), "SELECT " + ", ".join(VALUES))
    assert [(type(v), v) for v in rows[0]] == [(type(v), v) for v in VALUES.values()]


@pytest.mark.parametrize("name", ["a b", "what?", "100%25", "hash#tag", "é☃", "file:x", "q?mode=rwc&x"])
def test_any_path_can_be_opened(name, tmp_path):
    path = make_database(tmp_path / name / "x.sqlite")
    assert execute(str(path), "SELECT count(*) FROM singer") == [[3]]


def test_database_is_read_without_locks_and_without_files_beside_it(tmp_path):
    path = make_database(tmp_path / "x.sqlite", "PRAGMA journal_mode = wal;" + SCRIPT)
    before = listing(tmp_path)
    assert list(before) == ["x.sqlite"]
    os.chmod(tmp_path, 0o755)
    assert execute(str(path), "SELECT count(*) FROM singer") == [[3]]
    seen_by_child = "SELECT name FROM singer WHERE id = 2"
    with Sandbox("llm_jepa.scoring.sql:execute", 5) as sandbox:
        assert sandbox.call(str(path), seen_by_child) == [["Bo"]]
    assert listing(tmp_path) == before


def test_database_that_another_process_has_locked_can_be_read(database):
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    assert execute(str(database), "SELECT count(*) FROM singer") == [[3]]
    connection.close()


def test_child_imports_nothing_heavy():
    code = "import sys, llm_jepa.scoring.sql; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "scipy", "numpy", "transformers", "jinja2", "llm_jepa.run_folder"} & set(done.stdout.split())


# ------------------------------------------------------------------------------------------------ ExecutionMatch


@pytest.mark.parametrize(
    "gold, prediction, execution, execution_ordered",
    [
        ("SELECT name FROM singer", "SELECT name FROM singer", True, True),
        ("SELECT name FROM singer", "select Name from Singer ;", True, True),
        ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY name DESC", True, False),
        ("SELECT name FROM singer ORDER BY name", "SELECT name FROM singer ORDER BY name DESC", False, False),
        ("SELECT name FROM singer ORDER BY id", "SELECT name FROM singer", True, True),
        ("SELECT name, age FROM singer", "SELECT age, name FROM singer", True, False),
        ("SELECT name, age FROM singer ORDER BY id", "SELECT age, name FROM singer ORDER BY id", True, False),
        ("SELECT name, age FROM singer ORDER BY id", "SELECT age, name FROM singer ORDER BY id DESC", False, False),
        ("SELECT age FROM singer", "SELECT DISTINCT age FROM singer", False, False),
        ("SELECT DISTINCT age FROM singer", "SELECT age FROM singer GROUP BY age", True, False),
        ("SELECT age FROM singer", "SELECT age * 1.0 FROM singer", True, True),
        ("SELECT age FROM singer", "SELECT CAST(age AS TEXT) FROM singer", False, False),
        ("SELECT name FROM singer WHERE id > 9", "SELECT id, age FROM singer WHERE id < 0", True, True),
        ("SELECT name FROM singer WHERE id > 9", "SELECT name FROM singer", False, False),
        ("SELECT x'31', id FROM singer", "SELECT id, x'31' FROM singer", True, False),
        ("SELECT x'31' FROM singer", "SELECT '1' FROM singer", False, False),
    ],
)
def test_execution_match(gold, prediction, execution, execution_ordered, match):
    assert match(prediction, example(gold)) == {"execution": execution, "execution_ordered": execution_ordered}


@pytest.mark.parametrize(
    "gold, prediction, failure",
    [
        ("SELECT 1", "SELECT", "error"),
        ("SELECT 1", "", "empty"),
        ("SELECT 1", "DROP TABLE singer", "refused"),
        ("SELECT 1", "SELECT 1; SELECT 1", "several_statements"),
        ("SELECT nothing", "SELECT 1", "gold_error"),
        ("SELECT nothing", "SELECT nothing", "gold_error"),
        ("DROP TABLE singer", "DROP TABLE singer", "gold_refused"),
        ("SELECT name FROM singer WHERE id > 9", "REINDEX", "refused"),
    ],
)
def test_failing_query_equals_none_and_says_why(gold, prediction, failure, match):
    assert match(prediction, example(gold)) == {"execution": False, "execution_ordered": False, "failure": failure}


def test_timeout_is_a_failure_and_the_next_query_scores(database):
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    with ExecutionMatch(database.parents[1], seconds=0.5) as match:
        started = time.monotonic()
        assert match(endless, example("SELECT 1"))["failure"] == "timeout"
        assert 0.4 < time.monotonic() - started < 4
        started = time.monotonic()
        assert match(endless, example("SELECT 1"))["failure"] == "timeout"
        assert time.monotonic() - started < 0.4  # remembered
        assert match("SELECT 1", example(endless))["failure"] == "gold_timeout"
        assert match("SELECT 1", example("SELECT 1"))["execution"] is True


def test_results_are_told_apart_by_database_and_query(match, database):
    make_database(match.databases / "other" / "other.sqlite", SCRIPT + "DELETE FROM singer WHERE id = 1;")
    query = "SELECT count(*) FROM singer"
    for db_id, count in (("music", 3), ("other", 2), ("music", 3)):
        assert match(f"SELECT {count}", example(query, db_id)) == {"execution": True, "execution_ordered": True}


def test_results_are_remembered_in_bounds(match, database, monkeypatch):
    calls = []
    call = match._sandbox.call
    monkeypatch.setattr(match._sandbox, "call", lambda *arguments: calls.append(arguments[1]) or call(*arguments))
    for _ in range(3):
        match("SELECT 2", example("SELECT 1"))
    assert calls == ["SELECT 1", "SELECT 2"]
    for i in range(1000):
        match("SELECT 2", example(f"SELECT {i}"))
    info = match._rows.cache_info()
    assert info.currsize == info.maxsize < 100


@pytest.mark.parametrize(
    "user, message",
    [
        ("For db_id:[nowhere]\n\nQ", "there is no .*nowhere.sqlite"),
        ("For db_id:[../music]\n\nQ", "no plain name"),
        ("For db_id:[..]\n\nQ", "no plain name"),
        ("For db_id:[.]\n\nQ", "no plain name"),
        ("For db_id:[]\n\nQ", "no plain name"),
        ("For db_id:[a/b]\n\nQ", "no plain name"),
        ("For db_id:[a\\b]\n\nQ", "no plain name"),
        ("For db_id:[/etc/passwd]\n\nQ", "no plain name"),
        ("For db_id:[music\0]\n\nQ", "no plain name"),
        (f"For db_id:[{'a' * 300}]\n\nQ", "no plain name"),
        ("For db_id:[music]\nQ", "does not begin with"),
        ("For db_id: music\n\nQ", "does not begin with"),
        ("Which singers?", "does not begin with"),
        ("Q\n\nFor db_id:[music]\n\nQ", "does not begin with"),
        ("For db_id:[mu\nsic]\n\nQ", "does not begin with"),
    ],
)
def test_bad_db_id_is_named_by_file_and_line(user, message, match):
    with pytest.raises(ExampleError, match=rf"^rows\.jsonl:7: .*{message}"):
        match("SELECT 1", Example(None, user, "SELECT 1", "rows.jsonl:7", 7))


def test_changes_that_a_database_does_not_have_yet_are_refused(match, database):
    log = database.with_name("music.sqlite-wal")
    log.touch()
    assert match("SELECT 1", example("SELECT 1"))["execution"]
    log.write_bytes(b"changes")
    with pytest.raises(ExampleError, match="music.sqlite-wal has changes that are not in its database yet"):
        match("SELECT 1", example("SELECT 1"))


def test_a_sign_that_was_torn_apart_is_put_together_as_the_official_evaluator_does(match):
    gold = example("SELECT name FROM singer WHERE id >= 2 AND id != 9")
    assert match("SELECT name FROM singer WHERE id > = 2 AND id ! = 9", gold)["execution"]


def test_database_folder_that_a_db_id_must_not_leave(match, tmp_path):
    make_database(tmp_path / "outside" / "outside.sqlite")
    (match.databases / "..sqlite").write_bytes(b"")
    with pytest.raises(ExampleError):
        match("SELECT 1", example("SELECT 1", "../outside"))


# ----------------------------------------------------------------------------------------------------- databases


def make_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def official(database: Path, top: str = "spider_data/") -> dict[str, bytes]:
    """The members of a zip laid out like the official one."""
    content = database.read_bytes()
    return {
        f"{top}README.txt": b"Spider",
        f"{top}tables.json": b"[]",
        f"{top}train_spider.json": b"[]",
        f"{top}dev.json": b"[]",
        f"{top}database/": b"",
        f"{top}database/music/": b"",
        f"{top}database/music/schema.sql": b"CREATE",
        f"{top}database/music/music.sqlite": content,
        f"{top}database/two/two.sqlite": content,
        f"{top}database/two/other.sqlite": b"another file",
        f"{top}test_database/hidden/hidden.sqlite": content,
        f"__MACOSX/{top}database/music/._music.sqlite": b"clutter",
        "__MACOSX/database/mac/mac.sqlite": b"clutter",
        "__MACOSX/._spider_data": b"clutter",
    }


@pytest.mark.parametrize("top", ["spider_data/", ""])
def test_zip_is_unpacked_once(top, database, tmp_path):
    path, cache = make_zip(tmp_path / "spider_data.zip", official(database, top)), tmp_path / "deep" / "cache"
    folder = spider_databases(path, cache)
    assert folder == cache / sha256(path)[:16]
    assert set(listing(folder)) == {"music/music.sqlite", "two/two.sqlite"}
    assert (folder / "music" / "music.sqlite").read_bytes() == database.read_bytes()
    assert [p.name for p in cache.iterdir()] == [folder.name]
    before = listing(folder)
    assert spider_databases(path, cache) == folder and listing(folder) == before
    with ExecutionMatch(folder) as match:
        assert match("SELECT 3", example("SELECT count(*) FROM singer"))["execution"] is True


def test_other_zip_gets_another_folder(database, tmp_path):
    first = spider_databases(make_zip(tmp_path / "a.zip", official(database)), tmp_path / "cache")
    second = spider_databases(make_zip(tmp_path / "a.zip", {**official(database), "x": b"1"}), tmp_path / "cache")
    assert first != second and listing(first).keys() == listing(second).keys()


@pytest.mark.parametrize("given", ["", "spider_data", "spider_data/database"])
def test_folder_is_taken_as_it_is(given, tmp_path):
    make_database(tmp_path / "spider_data" / "database" / "music" / "music.sqlite")
    before = listing(tmp_path)
    assert spider_databases(tmp_path / given, tmp_path / "cache") == tmp_path / "spider_data" / "database"
    assert listing(tmp_path) == before and not (tmp_path / "cache").exists()


LINK = zipfile.ZipInfo("spider_data/database/link/link.sqlite")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16
DEVICE = zipfile.ZipInfo("spider_data/pipe")
DEVICE.external_attr = (stat.S_IFIFO | 0o666) << 16


@pytest.mark.parametrize(
    "member",
    ["../evil.sqlite", "spider_data/../../evil", "database/../../x/x.sqlite", "/etc/evil", "C:/evil", "c:evil",
     "..\\evil", "\\evil", "spider_data\\..\\..\\evil", LINK, DEVICE],
    ids=str,
)  # fmt: skip
def test_zip_with_a_member_that_is_not_to_be_trusted_is_refused(member, database, tmp_path):
    path = make_zip(tmp_path / "bad.zip", official(database))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "/etc/passwd")
    name = getattr(member, "filename", member)
    before = listing(tmp_path)
    with pytest.raises(UsageError) as caught:
        spider_databases(path, tmp_path / "cache")
    assert str(path) in str(caught.value) and repr(name) in str(caught.value)
    assert listing(tmp_path) == before and not (tmp_path / "cache").exists()


def test_zip_that_unpacks_to_too_much_is_refused(database, tmp_path, monkeypatch):
    path = make_zip(tmp_path / "big.zip", {**official(database), "database/big/big.sqlite": bytes(5_000_000)})
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(sql, "MAX_UNPACKED", 1_000_000)
    with pytest.raises(
        UsageError, match=r"big\.zip: .*'database/big/big\.sqlite' brings it to more than 1000000 bytes"
    ):
        spider_databases(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_member_that_lies_about_its_size_is_refused(database, tmp_path):
    path = make_zip(tmp_path / "lie.zip", {"database/big/big.sqlite": bytes(5_000_000)})
    content = path.read_bytes()
    assert content.count((5_000_000).to_bytes(4, "little")) == 2  # in the local header and in the directory
    path.write_bytes(content.replace((5_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(UsageError, match="lie.zip: cannot be unpacked"):
        spider_databases(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_zip_leaves_nothing_behind(database, tmp_path):
    path = make_zip(tmp_path / "bad.zip", official(database), zipfile.ZIP_STORED)
    content = path.read_bytes()
    position = content.index(b"SQLite format 3") + 2000
    path.write_bytes(content[:position] + b"\xff\xff" + content[position + 2 :])
    with pytest.raises(UsageError, match="bad.zip: cannot be unpacked"):
        spider_databases(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_zip_that_holds_a_database_twice_is_refused(database, tmp_path):
    members = official(database) | official(database, "old/")
    with pytest.raises(UsageError, match="'old/database/music/music.sqlite' is a database that it has twice"):
        spider_databases(make_zip(tmp_path / "a.zip", members), tmp_path / "cache")


def test_without_databases_the_message_says_what_is_missing(database, tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "stray").mkdir()
    shutil.copy(database, tmp_path / "empty" / "stray" / "other.sqlite")
    make_zip(tmp_path / "none.zip", {"spider_data/tables.json": b"[]", "spider_data/test_database/a/a.sqlite": b""})
    wanted = r"no database/<db_id>/<db_id>\.sqlite in it"
    for name, message in (
        ("nowhere", "no such folder or zip file"),
        ("text.zip", "cannot be unpacked .*not a zip file"),
        ("empty", wanted),
        ("none.zip", wanted),
    ):
        with pytest.raises(UsageError, match=f"^{tmp_path / name}: .*{message}"):
            spider_databases(tmp_path / name, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_two_processes_unpack_at_once(database, tmp_path):
    members = official(database) | {f"spider_data/database/d{i}/d{i}.sqlite": os.urandom(200_000) for i in range(30)}
    path = make_zip(tmp_path / "a.zip", members)
    code = "import sys, pathlib, llm_jepa.scoring.sql as s; print(s.spider_databases(*map(pathlib.Path, sys.argv[1:])))"
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate(timeout=60)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    folder = tmp_path / "cache" / sha256(path)[:16]
    assert printed == {str(folder)}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert len(listing(folder)) == 32


def test_process_that_comes_second_keeps_the_first_ones_folder(database, tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", official(database))
    unpack = sql._unpack

    def overtaken(archive, databases, target):
        (target / "first").mkdir(parents=True)
        unpack(archive, databases, target)

    monkeypatch.setattr(sql, "_unpack", overtaken)
    folder = spider_databases(path, tmp_path / "cache")
    assert [p.name for p in folder.iterdir()] == ["first"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]
