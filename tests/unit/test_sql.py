"""Execution match: which results are equal, which queries give none, and where the databases are."""

import dataclasses
import itertools
import sqlite3
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from databases import listing, make_database, sql_example
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import ExampleError
from llm_jepa.files import sha256
from llm_jepa.scoring.sandbox import Failure, Sandbox
from llm_jepa.scoring.sql import execute, execution_match, is_ordered, results_match, spider_databases


@pytest.fixture
def database(tmp_path) -> Path:
    return make_database(tmp_path / "database" / "music" / "music.sqlite")


@pytest.fixture
def match(database):
    with execution_match(database.parents[1], seconds=5) as match:
        yield match


# ------------------------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    ("gold", "predicted", "equal"),
    [([], [], True), ([(1,)], [(1.0,)], True), ([(1,)], [("1",)], False), ([(None,)], [(0,)], False),
     ([(2**53 + 1,)], [(2.0**53,)], False), ([(1,)], [(1, 1)], False)],
)  # fmt: skip
def test_results_match(gold, predicted, equal):
    for ordered in (False, True):
        assert results_match(gold, predicted, ordered) is results_match(predicted, gold, ordered) is equal


@given(st.integers(1, 4), st.lists(st.integers(0, 1), min_size=1, max_size=16), st.randoms(use_true_random=False))
def test_results_match_as_the_definition_says(width, values, random):
    """The official test-suite evaluator's definition (arXiv 2010.02840), by trying every permutation of the columns."""
    rows = list(zip(*[iter(values * width)] * width, strict=True))
    other = [
        tuple(random.sample(row, width)) if random.random() < 0.2 else row for row in random.sample(rows, len(rows))
    ]
    order = random.sample(range(width), width)
    other = [tuple(row[i] for i in order) for row in other]
    for ordered, arranged in ((False, Counter), (True, list)):
        orders = itertools.permutations(range(width))
        expected = any(arranged(tuple(row[i] for i in o) for row in other) == arranged(rows) for o in orders)
        assert results_match(rows, other, ordered) is expected


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


def test_is_ordered():
    assert [query for query in ORDERED + NOT_ORDERED if is_ordered(query)] == ORDERED


# ----------------------------------------------------------------------------------------------------- execution


def test_one_statement_is_executed(database):
    for query in (
        "; SELECT count(*) FROM singer ; ;\n; -- that; is all;",
        "-- how many;\nSELECT count(*) FROM singer WHERE name != 'a;''b;';",
        "SELECT count(*) AS [a;b] FROM singer",
        "WITH s AS (SELECT * FROM singer) SELECT count(*) FROM s",
        "SELECT count(*) FROM singer WHERE id > = 1 AND id ! = 9",  # as the official evaluator reads it
    ):
        assert execute(str(database), query) == [[3]], query


@pytest.mark.parametrize("content", [b"not a database, but long enough to look like one" * 100, None])
def test_file_that_is_not_a_database(content, tmp_path):
    path = tmp_path / "x.sqlite"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Failure, match="no_database"):
        execute(str(path), "SELECT * FROM sqlite_master")
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
    path = make_database(tmp_path / name / "x.sqlite", "PRAGMA journal_mode = wal;")
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
        assert match(prediction, sql_example(gold)) == scores, (gold, prediction)


def test_bad_db_id_is_reported_with_file_and_line(match):
    names = ("nowhere", "../music", "", "a\\b", "/etc", "music\0", "mu\nsic")
    others = ("For db_id:[music]\nQ", "For db_id: music\n\nQ", "Q\n\nFor db_id:[music]\n\nQ")
    for user in (*(f"For db_id:[{name}]\n\nQ" for name in names), *others):
        with pytest.raises(ExampleError, match=r"^data\.jsonl:7: .*db_id"):
            match("SELECT 1", dataclasses.replace(sql_example("SELECT 1"), user=user))


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
    files = {str(path.relative_to(folder)) for path in (tmp_path / "deep").rglob("*") if path.is_file()}
    assert files == {"music/music.sqlite", "two/two.sqlite"}
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
