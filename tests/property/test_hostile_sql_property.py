"""Any text as a prediction gives a verdict or a reason, changes nothing, and is right only if SQLite agrees."""

from __future__ import annotations

import contextlib
import itertools
import re
import sqlite3
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.data.examples import Example
from llm_jepa.files import sha256
from llm_jepa.scoring.sql import ExecutionMatch

GOLD = "SELECT name FROM singer"
REASONS = {"empty", "several_statements", "refused", "error", "too_large", "memory", "timeout"}  # not "crash"
# Parts of queries, from characters to statements. None takes long, however often it is repeated.
FRAGMENTS = st.sampled_from(
    ["SELECT", "name", "singer", "*", "FROM singer", "WHERE", "age > 20", "ORDER BY name", "UNION", "1", "(", ")", ",",
     ";", "--", "/*", "*/", "'", '"', "`", "[", "]", "\n", "\0", "\ud800", "☃", "?", "$a(", ".quit", "LIMIT 3",
     "EXPLAIN", GOLD, "SELECT 1", "DROP TABLE singer", "DELETE FROM singer", "PRAGMA user_version = 7",
     "ATTACH 'evil' AS evil", "VACUUM INTO 'evil'", "BEGIN", "load_extension('x')", "pragma_table_info('singer')",
     "CREATE TABLE evil (a)", "INSERT INTO singer DEFAULT VALUES", "RETURNING name",
     "WITH singer AS (SELECT 1 AS name)", "randomblob(9)"]
)  # fmt: skip
# Mostly one query or statement with something around it, since fragments in random order are rarely a query.
AROUND = st.lists(
    st.sampled_from([";", " ", "\n", "\0", "-- ;\n", "/* ; */", "--", "/*", "'", "ORDER BY age", "\ufeff"]), max_size=3
)
MIXES = st.one_of(
    st.lists(FRAGMENTS, max_size=8),
    *(
        st.tuples(AROUND, core, AROUND).map(lambda parts: [*parts[0], parts[1], *parts[2]])
        for core in (FRAGMENTS, st.just(GOLD))
    ),
).map(" ".join)
TEXTS = st.one_of(st.text(max_size=60), st.binary(max_size=60).map(lambda data: data.decode("latin-1")), MIXES, MIXES)
bounded = settings(max_examples=900, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def match(tmp_path_factory):
    path = tmp_path_factory.mktemp("database") / "music" / "music.sqlite"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER);"
            "INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bo', 20), (3, 'Cy', 30);"
        )
    before = sha256(path)
    with ExecutionMatch(path.parents[1], seconds=5) as match:
        yield match
    assert sha256(path) == before and [p.name for p in path.parent.iterdir()] == [path.name]


def example(gold: str) -> Example:
    return Example(None, "For db_id:[music]\n\nWhich?", gold, "data.jsonl:1", 1)


def gives_gold_rows(match: ExecutionMatch, text: str) -> bool:
    """Whether the text between two semicolons is a query with the gold's rows, by Python's sqlite3 without limits."""
    # Characters that SQLite cannot read are allowed in a comment after the query, which `execute` cuts off.
    text = re.sub(r"(--|/\*).*", lambda comment: re.sub("[\0\ud800-\udfff]", "?", comment[0]), text, flags=re.DOTALL)
    parts = text.split(";")
    path = match.database(example(GOLD))
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        rows = Counter(connection.execute(GOLD).fetchall())
        for start, end in itertools.combinations(range(len(parts) + 1), 2):
            with contextlib.suppress(sqlite3.Error, sqlite3.Warning, UnicodeEncodeError):
                if Counter(connection.execute(";".join(parts[start:end])).fetchall()) == rows:
                    return True
    return False


def test_any_text_is_right_only_if_it_gives_the_gold_rows(match):
    seen = Counter()

    @bounded
    @given(TEXTS, TEXTS)
    def check(text, other):
        scores = match(text, example(GOLD))
        failure = scores.get("failure")
        seen[failure or scores["execution"]] += 1
        assert failure is None or (failure in REASONS and not scores["execution"] and not scores["execution_ordered"])
        assert not scores["execution"] or gives_gold_rows(match, text)
        if failure:  # a query that fails matches nothing, neither as the gold query nor as the prediction
            assert match(text, example(text)) == scores | {"failure": f"gold_{failure}"}
            assert match(other, example(text)) == scores | {"failure": f"gold_{failure}"}

    check()
    assert seen.keys() >= {True, False, "error", "empty", "several_statements", "refused"}
