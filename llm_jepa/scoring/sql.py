"""Execution match for Spider: does a predicted query give the gold query's result on the example's database?

    with execution_match(spider_databases(Path("spider_data.zip"), Path("cache"))) as score:
        score("SELECT name FROM singer", example)  # {"execution": True, "execution_ordered": True}

Queries are untrusted text. `execute` runs them in a child process (sandbox.py) with Python's sqlite3 module, never with
the `sqlite3` program. The other functions run in the parent process and see only results.

A query gives no result for one of these reasons: `empty` (only white space and comments), `several_statements`,
`refused` (it does more than read), `error` (from SQLite), `too_large` (the query, a value or the result),
`no_database` (SQLite cannot read the file), and the sandbox's `timeout`, `memory` and `crash`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.files import sha256
from llm_jepa.scoring.sandbox import MEGABYTE, Failure, Sandbox

if TYPE_CHECKING:  # tasks.py imports this module
    from llm_jepa.scoring.tasks import Scorer, Scores

MAX_QUERY = 100_000  # characters
MAX_RESULT = 16 * MEGABYTE  # bytes of one result; the largest of Spider's gold results has 0.6 MB
VALUE_BYTES = 16  # counted for each value in addition to its text: about its size in memory and as JSON
LIMITS = {"LENGTH": MAX_RESULT, "SQL_LENGTH": 4 * MAX_QUERY, "EXPR_DEPTH": 200, "COMPOUND_SELECT": 100,
          "LIKE_PATTERN_LENGTH": 1000, "ATTACHED": 0, "TRIGGER_DEPTH": 1, "WORKER_THREADS": 0}  # fmt: skip
# Temporary tables stay in memory, because the child process cannot write files.
PRAGMAS = ("temp_store = MEMORY", "trusted_schema = OFF", f"hard_heap_limit = {256 * MEGABYTE}")
# A query may read and call functions, with these exceptions.
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zipfile", "zipfile_cds",
                    "lsmode", "sqlite_log"}  # fmt: skip
REASONS = {sqlite3.SQLITE_TOOBIG: "too_large", sqlite3.SQLITE_CANTOPEN: "no_database",
           sqlite3.SQLITE_NOTADB: "no_database", sqlite3.SQLITE_CORRUPT: "no_database"}  # fmt: skip

# A comment (group 1), string literal or quoted name. Doubled quotes match as two literals, which is blanked the same.
# SQLite accepts a comment without its end, but reads `/*` at the very end of a text as a slash and a star.
QUOTED = re.compile(r"""(--[^\n]*|/\*(?=.).*?(?:\*/|\Z))|'[^']*'?|"[^"]*"?|`[^`]*`?|\[[^\]]*\]?""", re.DOTALL)
DB_ID = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}"  # no separators and dots, so that no path leaves the folder


def blanked(query: str) -> str:
    """The query, of the same length, with spaces for comments and `x` for string literals and quoted names."""
    return QUOTED.sub(lambda match: (" " if match[1] else "x") * len(match[0]), query)


# ------------------------------------------------------------------------------------------- in the child process


def execute(database: str, query: str) -> list[list[Any]]:
    """The rows that one reading statement gives on a SQLite file, which is opened read-only and without locks.

    Values are int, float, str, None and {"blob": hexadecimal}. Text that is not UTF-8 loses its invalid bytes, as in
    the official evaluator. Raises Failure with one of the module's reasons.
    """
    for sign in "<>!":  # "> =" is read as ">=", as in the official evaluator
        query = query.replace(f"{sign} =", f"{sign}=")
    query, denied = _one_statement(query), []

    def authorize(action: int, _first: str | None, second: str | None, *_names: str | None) -> int:
        if action in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second.lower() not in DENIED_FUNCTIONS):
            return sqlite3.SQLITE_OK
        denied.append(action)
        return sqlite3.SQLITE_DENY

    uri = Path(database).absolute().as_uri() + "?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            connection.text_factory = lambda text: text.decode(errors="ignore")
            for pragma in PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            for limit, value in LIMITS.items():
                connection.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{limit}"), value)
            connection.set_authorizer(authorize)
            return _fetch(connection.execute(query))
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: an unpaired surrogate
        reason = REASONS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "error")
        raise Failure("refused" if denied else reason) from None


def _one_statement(query: str) -> str:
    """The query without trailing semicolons, which sqlite3 would take for a second statement."""
    if len(query) > MAX_QUERY:
        raise Failure("too_large")
    bare = blanked(query)
    statements = [part for part in bare.split(";") if part.strip()]
    if len(statements) != 1:
        raise Failure("several_statements" if statements else "empty")
    return query[: len(bare.rstrip("; \t\n\f\r"))]


def _fetch(cursor: sqlite3.Cursor) -> list[list[Any]]:
    if cursor.description is None:  # a statement that is not a query, such as REINDEX
        raise Failure("refused")
    rows, size = [], 0
    for row in cursor:
        size += sum(VALUE_BYTES + (len(value) if isinstance(value, (str, bytes)) else 0) for value in row)
        if size > MAX_RESULT:
            raise Failure("too_large")
        rows.append([{"blob": value.hex()} if isinstance(value, bytes) else value for value in row])
    return rows


# ------------------------------------------------------------------------------------------------------ matching

Rows = list[tuple]


def is_ordered(gold: str) -> bool:
    """Whether the gold query has an ORDER BY, also in a subquery, outside literals, quoted names and comments.

    The official evaluator searches the lower-cased text, literals and comments included, for "order by".
    """
    return re.search(r"\border\s+by\b", blanked(gold), re.IGNORECASE) is not None


def results_match(gold: Rows, predicted: Rows, ordered: bool) -> bool:
    """Whether two results are equal up to a permutation of the columns and, unless `ordered`, one of the rows.

    This is the official test-suite evaluator's comparison on one database (arXiv 2010.02840): duplicate rows count, two
    empty results are equal, and values compare as in Python (1 == 1.0, but 1 != "1"). DISTINCT is kept, as with the
    official --keep_distinct; the official default removes it.
    """
    if len(gold) != len(predicted) or (gold and len(gold[0]) != len(predicted[0])):
        return False
    if not gold:
        return True
    if ordered:
        return Counter(zip(*gold, strict=True)) == Counter(zip(*predicted, strict=True))
    return Counter(gold) == Counter(predicted) or _permuted_match(gold, predicted)


def _permuted_match(gold: Rows, predicted: Rows) -> bool:
    """Whether some permutation of the columns makes the rows the same multiset.

    Assigns a predicted column to each gold column in turn, and continues only if the rows so far are the same multiset.
    """
    if Counter(map(_values, gold)) != Counter(map(_values, predicted)):
        return False
    ours, theirs = (list(zip(*rows, strict=True)) for rows in (gold, predicted))
    values = {column: _values(column) for column in (*ours, *theirs)}

    def multiset(*columns: tuple) -> Counter[tuple]:
        return Counter(zip(*columns, strict=True))

    def search(chosen: list[tuple], left: Counter[tuple]) -> bool:
        if not left:
            return True
        wanted = multiset(*ours[: len(chosen) + 1])
        alike = [column for column in left if values[column] == values[ours[len(chosen)]]]  # equal columns count once
        return any(
            search([*chosen, column], left - Counter([column]))
            for column in alike
            if multiset(*chosen, column) == wanted
        )

    return search([], Counter(theirs))


def _values(line: tuple) -> frozenset:
    """The multiset of the values of a row or column."""
    return frozenset(Counter(line).items())


def example_database(databases: Path, example: Example) -> Path:
    """The example's database; its user turn begins with `For db_id:[concert_singer]` and a blank line.

    Raises ExampleError if the user turn does not begin so, or if the database does not exist.
    """
    header = re.match(rf"For db_id:\[({DB_ID})\]\r?\n\r?\n", example.user)
    if header is None:
        raise ExampleError(f'{example.source}: the user turn does not begin with "For db_id:[name]" and a blank line')
    path = databases / header[1] / f"{header[1]}.sqlite"
    if not path.is_file():
        raise ExampleError(f"{example.source}: db_id {header[1]!r}: there is no {path} (--spider_path)")
    return path


@contextlib.contextmanager
def execution_match(databases: Path, seconds: float = 10.0) -> Iterator[Scorer]:
    """Opens the scorer of queries on a folder of databases, `<db_id>/<db_id>.sqlite`; `seconds` limits each query.

    `execution` is results_match. `execution_ordered`, the stricter score of published tables, requires the same rows
    and columns in the same order. A query without a result matches nothing, and its reason is reported as `failure`,
    the gold query's with the prefix `gold_`. The scorer raises ExampleError for a missing or unknown db_id.
    """
    with Sandbox("llm_jepa.scoring.sql:execute", seconds) as sandbox:
        # A result can take 100 MB, six times its counted size, so only four are kept; equal queries are close together.
        @functools.lru_cache(maxsize=4)
        def run(database: str, query: str) -> Rows | Failure:
            try:
                rows = sandbox.call(database, query)
            except Failure as failure:
                return failure
            return [tuple(bytes.fromhex(v["blob"]) if isinstance(v, dict) else v for v in row) for row in rows]

        def score(prediction: str, example: Example) -> Scores:
            database = str(example_database(databases, example))
            gold, predicted = run(database, example.assistant), run(database, prediction)
            for prefix, result in (("gold_", gold), ("", predicted)):
                if isinstance(result, Failure):
                    return {"execution": False, "execution_ordered": False, "failure": prefix + result.reason}
            match = results_match(gold, predicted, is_ordered(example.assistant))
            return {"execution": match, "execution_ordered": gold == predicted}

        yield score


# ----------------------------------------------------------------------------------------------------- databases


def spider_databases(path: Path, cache: Path) -> Path:
    """The folder of databases of `path`: a folder (spider_data or its database) or a zip file like the official one.

    A zip's databases are unpacked once, into `cache`/<first 16 digits of its SHA-256>; several processes may do so at
    the same time. Raises UsageError if `path` has no databases or cannot be unpacked.
    """
    if path.is_dir():
        for folder in (path / "database", path / "spider_data" / "database", path):
            if any(file.stem == file.parent.name for file in folder.glob("*/*.sqlite")):
                return folder
        raise UsageError(f"{path}: no database/<db_id>/<db_id>.sqlite in it")
    member = re.compile(rf"(?:(?!__MACOSX/)[\w-]+/)?database/({DB_ID})/\1\.sqlite")
    try:
        target = cache / sha256(path)[:16]
        if target.is_dir():
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory(dir=cache) as temporary:
            names = [name for name in archive.namelist() if member.fullmatch(name)]
            if not names:
                raise zipfile.BadZipFile("no database/<db_id>/<db_id>.sqlite in it")
            archive.extractall(temporary, names)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(Path(temporary, names[0]).parents[1], target)
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # RuntimeError: encrypted
        raise UsageError(f"{path}: cannot be unpacked ({error})") from None
    return target
