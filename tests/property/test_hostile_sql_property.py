"""Any text as a prediction gives a verdict or a reason, matches nothing if it fails, and changes no file."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.data.examples import Example
from llm_jepa.files import sha256
from llm_jepa.scoring.sql import execution_match

GOLD = "SELECT name FROM singer"
REASONS = {"empty", "several_statements", "refused", "error", "too_large", "memory", "timeout"}  # not "crash"
# Parts of queries, from characters to statements. None takes long, however often it is repeated.
FRAGMENTS = st.sampled_from(
    ["SELECT", "name", "singer", "*", "FROM singer", "WHERE", "ORDER BY name", "UNION", "1", "(", ")", ",", ";", "--",
     "/*", "*/", "'", '"', "`", "[", "]", "\n", "\0", "\ud800", "☃", "?", "$a(", ".quit", "LIMIT 3", "EXPLAIN", GOLD,
     "DROP TABLE singer", "DELETE FROM singer", "PRAGMA user_version = 7", "ATTACH 'evil' AS evil",
     "VACUUM INTO 'evil'", "BEGIN", "load_extension('x')", "CREATE TABLE evil (a)",
     "INSERT INTO singer DEFAULT VALUES", "RETURNING name", "WITH singer AS (SELECT 1 AS name)"]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(FRAGMENTS, max_size=8).map(" ".join))


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    path = tmp_path_factory.mktemp("database") / "music" / "music.sqlite"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE singer (name TEXT); INSERT INTO singer VALUES ('Ann'), ('Bo');")
    before = sha256(path)
    with execution_match(path.parents[1], seconds=5) as score:
        yield score
    assert sha256(path) == before and [p.name for p in path.parent.iterdir()] == [path.name]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS)
def test_any_text_gives_a_verdict_or_a_reason(score, text):
    scores = score(text, Example(None, "For db_id:[music]\n\nWhich?", GOLD, "data.jsonl:1", 1))
    if failure := scores.get("failure"):
        assert failure in REASONS and not scores["execution"] and not scores["execution_ordered"]
