"""Any text as a prediction gets an answer or a reason, changes nothing, and is right only where SQLite says so too."""

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
REASONS = {"empty", "several_statements", "refused", "error", "too_large", "memory", "timeout"}  # no crash

# Parts of queries, from characters to whole statements. None takes long, however often it comes.
FRAGMENTS = st.sampled_from(
    ["SELECT", "name", "singer", "*", "age", "FROM singer", "WHERE", "age > 20", "ORDER BY name", "UNION", "AS", "1",
     "(", ")", ",", ";", "--", "/*", "*/", "'", '"', "`", "[", "]", "\n", "\0", "x", "\ud800", "☃", "?", "$a(", ".quit",
     "LIMIT 3", "EXPLAIN", GOLD, "SELECT 1", "DROP TABLE singer", "DELETE FROM singer", "PRAGMA user_version = 7",
     "ATTACH 'evil' AS evil", "VACUUM INTO 'evil'", "BEGIN", "load_extension('x')", "pragma_table_info('singer')",
     "sqlite_master", "CREATE TABLE evil (a)",
     "INSERT INTO singer DEFAULT VALUES", "RETURNING name", "WITH singer AS (SELECT 1 AS name)", "randomblob(9)"]
)  # fmt: skip
# Mostly a gold query or a statement with something around it, since parts in any order are seldom a query.
AROUND = st.lists(
    st.sampled_from([";", " ", "\n", "\0", "-- ;\n", "/* ; */", "--", "/*", "'", "ORDER BY age", "\ufeff"]), max_size=3
)
MIXES = st.one_of(
    st.lists(FRAGMENTS, max_size=8),
    st.tuples(AROUND, FRAGMENTS, AROUND).map(lambda parts: [*parts[0], parts[1], *parts[2]]),
    st.tuples(AROUND, st.just(GOLD), AROUND).map(lambda parts: [*parts[0], parts[1], *parts[2]]),
).map(" ".join)
LATIN = st.binary(max_size=60).map(lambda data: data.decode("latin-1"))
TEXTS = st.one_of(st.text(max_size=60), LATIN, MIXES)
bounded = settings(max_examples=1000, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def match(tmp_path_factory):
    path = tmp_path_factory.mktemp("database") / "music" / "music.sqlite"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER);"
            "INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bo', 20), (3, 'Cy', 30);"
        )
    with ExecutionMatch(path.parents[1], seconds=5) as match:
        yield match


def example(gold: str) -> Example:
    return Example(None, "For db_id:[music]\n\nWhich?", gold, "rows.jsonl:1", 1)


def scored(match: ExecutionMatch, prediction: str, gold: str = GOLD) -> dict[str, bool | str]:
    """The scores, of the right shape, and the file as it was."""
    path = match.database(example(gold))
    before = sha256(path)
    scores = match(prediction, example(gold))
    assert sha256(path) == before and [p.name for p in path.parent.iterdir()] == [path.name]
    assert scores.keys() - {"failure"} == {"execution", "execution_ordered"}
    assert {type(scores[name]) for name in ("execution", "execution_ordered")} == {bool}
    if "failure" in scores:
        assert scores["failure"].removeprefix("gold_") in REASONS
        assert not scores["execution"] and not scores["execution_ordered"]
    return scores


def gives_golds_rows(match: ExecutionMatch, text: str) -> bool:
    """Whether some of the text between two semicolons is a query with the gold's rows, by Python's sqlite3 alone."""
    # What SQLite cannot be given may stand in a comment behind the query, which it does not get.
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


@pytest.mark.parametrize("texts", [st.text(), LATIN, MIXES], ids=["text", "bytes", "fragments"])
def test_any_text_scores_and_is_right_only_if_it_gives_the_golds_rows(texts, match):
    seen = Counter()

    @bounded
    @given(texts)
    def check(text):
        scores = scored(match, text)
        seen[scores.get("failure", scores["execution"])] += 1
        assert not scores["execution"] or gives_golds_rows(match, text)

    check()
    assert seen["error"]
    assert texts is not MIXES or seen.keys() >= {True, False, "empty", "several_statements", "refused"}


def test_two_that_fail_are_never_equal(match):
    failed = Counter()

    @bounded
    @given(TEXTS, TEXTS)
    def check(a, b):
        fails = [text for text in (a, b) if "failure" in scored(match, text)]
        for gold, prediction in itertools.product((a, b), repeat=2):
            scores = scored(match, prediction, gold)
            if fails and {gold, prediction} & set(fails):
                assert scores["execution"] is False and scores["failure"].startswith("gold_") is (gold in fails)
            failed[len(fails)] += 1

    check()
    assert failed[0] and failed[1] and failed[2]
