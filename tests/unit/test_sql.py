"""Execution match: which results are equal, which queries give none, and where the databases are."""

from __future__ import annotations

import sqlite3
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.files import sha256
from llm_jepa.scoring.sandbox import Failure, Sandbox
from llm_jepa.scoring.sql import execute, execution_match, is_ordered, results_match, spider_databases

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


def example(gold: str, db_id: str = "music") -> Example:
    return Example(None, f"For db_id:[{db_id}]\n\nWhich?", gold, "data.jsonl:7", 7)


@pytest.fixture
def database(tmp_path) -> Path:
    return make_database(tmp_path / "database" / "music" / "music.sqlite")


@pytest.fixture
def match(database):
    with execution_match(database.parents[1], seconds=5) as match:
        yield match


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file in a folder, with its modification time and checksum."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, sha256(p)) for p in files}


# ------------------------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    "gold, predicted, unordered, ordered",
    [
        ([], [], True, True),
        ([(1,)], [(1.0,)], True, True),
        ([(1,)], [("1",)], False, False),
        ([(None,)], [(0,)], False, False),
        ([(2**53 + 1,)], [(2.0**53,)], False, False),
        ([(1,), (2,)], [(2,), (1,)], True, False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),
        ([(1, "a"), (2, "b")], [("a", 1), ("b", 2)], True, True),
        # One permutation for all rows.
        ([(1, 2), (3, 4)], [(2, 1), (3, 4)], False, False),
        ([(1, 2), (2, 1)], [(2, 1), (1, 2)], True, True),
        # A column counts once.
        ([(1, 1, 2)], [(1, 2, 2)], False, False),
        # The columns are permutations of each other.
        ([(1, 2, 3), (2, 3, 1), (3, 1, 2)], [(1, 3, 2), (2, 1, 3), (3, 2, 1)], True, True),
        ([(1, 2, 3), (2, 3, 1), (3, 1, 2)], [(1, 2, 3), (2, 1, 3), (3, 3, 1)], False, False),
    ],
)
def test_results_match(gold, predicted, unordered, ordered):
    for a, b in ((gold, predicted), (predicted, gold)):
        assert results_match(a, b, False) is unordered
        assert results_match(a, b, True) is ordered


def test_similar_columns_need_no_search_of_all_permutations():
    """Rows are the edges of a cycle through 12 columns, in two orders of columns, or of two cycles through 6."""
    rows = [tuple(int(c in (r, (r + 1) % 12)) for c in range(12)) for r in range(12)]
    shuffled = [tuple(row[5 * c % 12] for c in range(12)) for row in rows]
    assert results_match(rows, shuffled, ordered=False)  # 12! permutations would take days
    two = [tuple(int(c in (r, (r + 1) % 6 + 6 * (r // 6))) for c in range(12)) for r in range(12)]
    assert not results_match(rows, two, ordered=False)


ORDERED = [
    "SELECT a FROM t ORDER BY a", "select a from t order\n\tby a", "select a from t order /* so */ by a",
    "select a from t where b in (select b from t order by c limit 1)", "select a from t -- order by\norder by a",
    "select '-- ' from t order by a", "select '/*' from t order by a",
]  # fmt: skip
NOT_ORDERED = [
    "select a from t where b = 'it''s order by'", 'select a as "order by" from t', "select a as `order by` from t",
    "select a as [order by] from t", "select a from t -- order by a", "select a /* order by */ from t",
    "select border, by1 from reorder bygone", "select 'not ended order by", "select a from t /* not ended order by",
]  # fmt: skip


@pytest.mark.parametrize("query", ORDERED + NOT_ORDERED)
def test_is_ordered(query):
    assert is_ordered(query) is (query in ORDERED)


# ----------------------------------------------------------------------------------------------------- execution


def reason(database: Path, query: str) -> str:
    with pytest.raises(Failure) as caught:
        execute(str(database), query)
    return caught.value.reason


@pytest.mark.parametrize(
    "query",
    [
        "; SELECT count(*) FROM singer ; ;\n; -- that; is all;",
        "-- how many;\nSELECT count(*) FROM singer WHERE name != 'a;''b;';",
        "SELECT count(*) AS [a;b] FROM singer",
        "WITH s AS (SELECT * FROM singer) SELECT count(*) FROM s",
        "SELECT count(*) FROM singer WHERE id > = 1 AND id ! = 9",  # as the official evaluator reads it
    ],
)
def test_one_statement_is_executed(query, database):
    assert execute(str(database), query) == [[3]]


@pytest.mark.parametrize("content", [b"not a database, but long enough to look like one" * 100, None])
def test_file_that_is_not_a_database(content, tmp_path):
    path = tmp_path / "x.sqlite"
    if content is not None:
        path.write_bytes(content)
    assert reason(path, "SELECT * FROM sqlite_master") == "no_database"
    assert path.exists() is (content is not None)  # SQLite creates no file


VALUES = {
    "1": 1, "1.0": 1.0, "'1'": "1", "x'31'": b"1", "NULL": None, "''": "", "x''": b"",
    "9223372036854775807": 2**63 - 1, "9223372036854775808": 2.0**63, "9007199254740993": 2**53 + 1,
    "1e999": float("inf"), "0.1 + 0.2": 0.1 + 0.2, "5e-324": 5e-324, "1e999 - 1e999": None,
    "'☃ \U0001f600'": "☃ \U0001f600", "'a' || char(0) || 'b'": "a\0b", "'\u2028\x7f\x01'": "\u2028\x7f\x01",
    "x'00ff0a'": b"\x00\xff\n", "'{\"blob\": \"00\"}'": '{"blob": "00"}', "cast(x'61ff62c3' as text)": "ab",
}  # fmt: skip


def test_values_keep_their_types(database):
    with Sandbox("llm_jepa.scoring.sql:execute", 5) as sandbox:
        (row,) = sandbox.call(str(database), "SELECT " + ", ".join(VALUES))
    expected = [{"blob": v.hex()} if isinstance(v, bytes) else v for v in VALUES.values()]
    assert [(type(v), v) for v in row] == [(type(v), v) for v in expected]


@pytest.mark.parametrize("name", ["a b", "100%25", "hash#tag", "é☃", "q?mode=rwc&x"])
def test_database_is_read_from_any_path_without_locks_or_new_files(name, tmp_path):
    path = make_database(tmp_path / name / "x.sqlite", "PRAGMA journal_mode = wal;" + SCRIPT)
    before = listing(tmp_path)
    assert execute(str(path), "SELECT count(*) FROM singer") == [[3]]
    assert listing(tmp_path) == before
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = delete")
    connection.execute("BEGIN EXCLUSIVE")
    assert execute(str(path), "SELECT count(*) FROM singer") == [[3]]
    connection.close()


# ---------------------------------------------------------------------------------------------- execution_match


SCORES = [  # (gold query, prediction, execution, execution_ordered, failure)
    ("SELECT name FROM singer", "select Name from Singer ;", True, True, None),
    ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY name DESC", True, False, None),
    ("SELECT name FROM singer ORDER BY name", "SELECT name FROM singer ORDER BY name DESC", False, False, None),
    ("SELECT name, age FROM singer", "SELECT age, name FROM singer", True, False, None),
    ("SELECT name, age FROM singer ORDER BY id", "SELECT age, name FROM singer ORDER BY id", True, False, None),
    ("SELECT name FROM singer WHERE id > 9", "SELECT id, age FROM singer WHERE id < 0", True, True, None),
    ("SELECT 1", "SELECT", False, False, "error"),
    ("SELECT 1", "DROP TABLE singer", False, False, "refused"),
    ("SELECT nothing", "SELECT nothing", False, False, "gold_error"),
    ("DROP TABLE singer", "DROP TABLE singer", False, False, "gold_refused"),
]


def test_execution_match(match):
    for gold, prediction, execution, ordered, failure in SCORES:
        scores = {"execution": execution, "execution_ordered": ordered} | ({"failure": failure} if failure else {})
        assert match(prediction, example(gold)) == scores, (gold, prediction)


# Parts of queries, from characters to statements. None takes long, however often it is repeated.
FRAGMENTS = st.sampled_from(
    ["SELECT", "name", "singer", "*", "FROM singer", "WHERE", "ORDER BY name", "UNION", "1", "(", ")", ",", ";", "--",
     "/*", "*/", "'", '"', "`", "[", "]", "\n", "\0", "\ud800", "☃", "?", "$a(", ".quit", "LIMIT 3", "EXPLAIN",
     "DROP TABLE singer", "DELETE FROM singer", "PRAGMA user_version = 7", "ATTACH 'evil' AS evil",
     "VACUUM INTO 'evil'", "BEGIN", "load_extension('x')", "CREATE TABLE evil (a)",
     "INSERT INTO singer DEFAULT VALUES", "RETURNING name", "WITH singer AS (SELECT 1 AS name)"]
)  # fmt: skip
REASONS = {"empty", "several_statements", "refused", "error", "too_large", "memory", "timeout"}  # not "crash"


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.text(max_size=60), st.lists(FRAGMENTS, max_size=8).map(" ".join)))
def test_any_query_gives_a_verdict_or_a_reason_and_changes_no_file(match, database, query):
    before = listing(database.parent)
    scores = match(query, example("SELECT name FROM singer"))
    if failure := scores.get("failure"):
        assert failure in REASONS and not scores["execution"] and not scores["execution_ordered"]
    assert listing(database.parent) == before


def test_bad_db_id_is_reported_with_file_and_line(match):
    names = ("nowhere", "../music", "", "a\\b", "/etc", "music\0", "mu\nsic")
    others = ("For db_id:[music]\nQ", "For db_id: music\n\nQ", "Q\n\nFor db_id:[music]\n\nQ")
    for user in (*(f"For db_id:[{name}]\n\nQ" for name in names), *others):
        with pytest.raises(ExampleError, match=r"^data\.jsonl:7: .*db_id"):
            match("SELECT 1", Example(None, user, "SELECT 1", "data.jsonl:7", 7))


# ----------------------------------------------------------------------------------------------------- databases


def make_zip(path: Path, database: Path, top: str = "spider_data/", **more: bytes) -> Path:
    """A zip file with the layout of the official one."""
    content = database.read_bytes()
    members = {
        f"{top}database/music/schema.sql": b"CREATE",
        f"{top}database/music/music.sqlite": content,
        f"{top}database/two/two.sqlite": content,
        f"{top}database/two/other.sqlite": b"another file",
        f"{top}database/../../evil/evil.sqlite": content,
        f"{top}test_database/hidden/hidden.sqlite": content,
        "__MACOSX/database/mac/mac.sqlite": b"metadata",
        **more,
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("top", ["spider_data/", ""])
def test_zip_is_unpacked_once_per_content(top, database, tmp_path):
    path, cache = make_zip(tmp_path / "spider_data.zip", database, top), tmp_path / "deep" / "cache"
    folder = spider_databases(path, cache)
    assert folder == cache / sha256(path)[:16]
    assert set(listing(tmp_path / "deep")) == {
        f"cache/{folder.name}/{file}" for file in ("music/music.sqlite", "two/two.sqlite")
    }
    assert (folder / "music" / "music.sqlite").read_bytes() == database.read_bytes()
    before = listing(folder)
    assert spider_databases(path, cache) == folder and listing(folder) == before
    assert spider_databases(make_zip(path, database, top, x=b"1"), cache) != folder


@pytest.mark.parametrize("given", ["", "spider_data", "spider_data/database"])
def test_folder_is_used_in_place(given, tmp_path):
    make_database(tmp_path / "spider_data" / "database" / "music" / "music.sqlite")
    assert spider_databases(tmp_path / given, tmp_path / "cache") == tmp_path / "spider_data" / "database"
    assert not (tmp_path / "cache").exists()


def test_path_without_databases_is_an_error_with_the_path(database, tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("spider_data/test_database/a/a.sqlite", b"")
    damaged = bytearray(make_zip(tmp_path / "damaged.zip", database).read_bytes())
    damaged[damaged.index(b"SQLite format 3") + 2000] ^= 255
    (tmp_path / "damaged.zip").write_bytes(damaged)
    for name in ("nowhere", "text.zip", "empty", "none.zip", "damaged.zip"):
        with pytest.raises(UsageError, match=f"^{tmp_path / name}: "):
            spider_databases(tmp_path / name, tmp_path / "cache")
        assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())
