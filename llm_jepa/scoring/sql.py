"""Execution match for Spider: does a predicted query give the result of the gold one on the example's database?

    with ExecutionMatch(spider_databases(Path("spider_data.zip"), Path("cache"))) as match:
        match("SELECT name FROM singer", example)  # {"execution": True, "execution_ordered": True}

Queries are untrusted text. `execute` runs them, in a child process of sandbox.py, through Python's sqlite3 module and
never the `sqlite3` program; everything else here runs in the parent and touches results only.

A query gives no result for one of these reasons: `empty` (nothing but white space and comments), `several_statements`,
`refused` (it wants more than to read), `error` (SQLite's own), `too_large` (the query, a value or the result),
`no_database` (not a file that SQLite can read), and the sandbox's `timeout`, `memory` and `crash`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import sqlite3
import stat
import tempfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jepa.scoring.sandbox import MEGABYTE, Failure, Sandbox

if TYPE_CHECKING:  # the child imports this module, so it imports little
    from llm_jepa.data.examples import Example

MAX_QUERY = 100_000  # characters
MAX_RESULT = 16 * MEGABYTE  # bytes of one result, which bounds its rows too; the largest of Spider's golds has 0.6 MB
CELL = 16  # bytes that a value counts for beside its text, about what it takes in memory and as JSON
LIMITS = {"LENGTH": MAX_RESULT, "SQL_LENGTH": 4 * MAX_QUERY, "EXPR_DEPTH": 200, "COMPOUND_SELECT": 100,
          "LIKE_PATTERN_LENGTH": 1000, "ATTACHED": 0, "TRIGGER_DEPTH": 1, "WORKER_THREADS": 0}  # fmt: skip
# In-memory temporaries: spilled ones would be files.
PRAGMAS = ("temp_store = MEMORY", "trusted_schema = OFF", f"hard_heap_limit = {256 * MEGABYTE}")
# A query may read and call functions, nothing else.
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zipfile", "zipfile_cds",
                    "lsmode", "sqlite_log"}  # fmt: skip
REASONS = {sqlite3.SQLITE_TOOBIG: "too_large", sqlite3.SQLITE_CANTOPEN: "no_database",
           sqlite3.SQLITE_NOTADB: "no_database", sqlite3.SQLITE_CORRUPT: "no_database"}  # fmt: skip

# Comments, string literals and quoted names. A doubled quote ends one and begins the next, which blanks both. To SQLite
# a comment may lack its end, but `/*` as the very last of a text is a slash and a star.
QUOTED = re.compile(r"""(--[^\n]*|/\*(?=.).*?(?:\*/|\Z))|'[^']*'?|"[^"]*"?|`[^`]*`?|\[[^\]]*\]?""", re.DOTALL)
DB_ID = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}"  # a plain name: no separators, no dots


def blanked(query: str) -> str:
    """The query with comments as spaces and string literals and quoted names as `x`, every character in its place."""
    return QUOTED.sub(lambda match: (" " if match[1] else "x") * len(match[0]), query)


# -------------------------------------------------------------------------------------------------- in the child


def execute(database: str, query: str) -> list[list[Any]]:
    """The rows that one reading statement gives on a SQLite file, which is opened read-only and without locks.

    Values are int, float, str, None, and for blobs {"blob": hexadecimal}; text that is not UTF-8 loses the bytes that
    are not, as in the official evaluator. Raises Failure with a reason of the module's list.
    """
    for sign in "<>!":  # "> =", as the official evaluator does
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
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: half a surrogate pair
        reason = REASONS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "error")
        raise Failure("refused" if denied else reason) from None


def _one_statement(query: str) -> str:
    """The query up to its end: sqlite3 takes a second semicolon for a second statement."""
    if len(query) > MAX_QUERY:
        raise Failure("too_large")
    bare = blanked(query)
    statements = [part for part in bare.split(";") if part.strip()]
    if len(statements) != 1:
        raise Failure("several_statements" if statements else "empty")
    return query[: len(bare.rstrip("; \t\n\f\r"))]


def _fetch(cursor: sqlite3.Cursor) -> list[list[Any]]:
    if cursor.description is None:  # a REINDEX that finds nothing to do has no columns, which is no empty result
        raise Failure("refused")
    rows, size = [], 0
    for row in cursor:
        size += sum(CELL + (len(value) if isinstance(value, (str, bytes)) else 0) for value in row)
        if size > MAX_RESULT:
            raise Failure("too_large")
        rows.append([{"blob": value.hex()} if isinstance(value, bytes) else value for value in row])
    return rows


# ------------------------------------------------------------------------------------------------------ matching

Rows = list[tuple]


def is_ordered(gold: str) -> bool:
    """Whether the gold query has an ORDER BY anywhere, also in a subquery, outside literals, quoted names and comments.

    The official evaluator looks for "order by" with one space in the lower-cased text, literals and comments included.
    """
    return re.search(r"\border\s+by\b", blanked(gold), re.IGNORECASE) is not None


def results_match(gold: Rows, predicted: Rows, ordered: bool) -> bool:
    """Whether two results are equal up to one permutation of the columns, and unless `ordered` one of the rows.

    This is the official test-suite evaluator's comparison on one database (arXiv 2010.02840): rows count as often as
    they occur, two results without rows are equal, and values compare as Python's (1 == 1.0, but 1 != '1').
    The queries run as they are: DISTINCT is kept, as with the official --keep_distinct; its default removes it.
    """
    if len(gold) != len(predicted) or (gold and len(gold[0]) != len(predicted[0])):
        return False
    if not gold:
        return True
    if ordered:
        return Counter(zip(*gold, strict=True)) == Counter(zip(*predicted, strict=True))
    return Counter(gold) == Counter(predicted) or _permuted_match(gold, predicted)


def _permuted_match(gold: Rows, predicted: Rows) -> bool:
    """Whether some permutation of the columns makes the rows the same multiset, by colour refinement.

    Rows and columns of both results get colours: a row's tells how often it occurs and what values it has in columns of
    which colour, a column's what values it has in rows of which colour, and so on until no more can be told apart.
    Equal results have the same colours. Where different columns still share one, one of gold's is marked and paired
    with each of the predicted that look the same when marked. The question is graph isomorphism: only a result made
    for it leads into many wrong pairs.
    """
    colours: dict[tuple, int] = {}  # the same for both results
    tables = [(list(rows), list(zip(*rows, strict=True))) for rows in (Counter(gold), Counter(predicted))]

    def recoloured(old: list, lines: list[tuple], across: list) -> list[int]:
        counts = (frozenset(Counter(zip(across, line, strict=True)).items()) for line in lines)
        return [colours.setdefault(key, len(colours)) for key in zip(old, counts, strict=True)]

    def refined(side: int, of_rows: list, of_columns: list) -> tuple[tuple, list, list]:
        """(what is seen of the result, the rows' colours, the columns' colours)"""
        (rows, columns), seen = tables[side], 0
        while (now := len(set(of_rows)) + len(set(of_columns))) > seen:
            seen = now
            of_columns = recoloured(of_columns, columns, of_rows)
            of_rows = recoloured(of_rows, rows, of_columns)
        return (tuple(sorted(of_rows)), tuple(sorted(of_columns))), of_rows, of_columns

    def marked(side: int, of_rows: list, of_columns: list, colour: int) -> list[tuple]:
        """The result refined with one column of the colour marked, for each of them; equal columns count once."""
        shades = {column: i for i, column in enumerate(tables[side][1]) if of_columns[i] == colour}
        return [refined(side, of_rows, [*of_columns[:i], "marked", *of_columns[i + 1 :]]) for i in shades.values()]

    def match(ours: tuple[tuple, list, list], theirs: tuple[tuple, list, list]) -> bool:
        """For two results that look the same."""
        shades = Counter(colour for colour, _ in set(zip(ours[2], tables[0][1], strict=True)))
        colour, several = min(((c, n) for c, n in shades.items() if n > 1), key=lambda cn: cn[1], default=(0, 1))
        if several == 1:
            return True  # columns of a colour are equal, so rows of a colour are
        our_choices, their_choices = marked(0, *ours[1:], colour), marked(1, *theirs[1:], colour)
        seen = Counter(choice[0] for choice in our_choices)
        if seen != Counter(choice[0] for choice in their_choices):
            return False
        rarest = min(our_choices, key=lambda choice: seen[choice[0]])
        return any(match(rarest, choice) for choice in their_choices if choice[0] == rarest[0])

    ours, theirs = (
        refined(side, [("times", n) for n in Counter(rows).values()], ["column"] * len(rows[0]))
        for side, rows in enumerate((gold, predicted))
    )
    return ours[0] == theirs[0] and match(ours, theirs)


class ExecutionMatch:
    """Scores predicted queries by their results on a folder of databases, `<db_id>/<db_id>.sqlite`."""

    def __init__(self, databases: Path, seconds: float = 10.0):
        """`seconds` bounds each query."""
        self.databases = databases
        self._sandbox = Sandbox("llm_jepa.scoring.sql:execute", seconds)
        # A result can take 100 MB, six times what it counts for; a query that comes again comes soon.
        self._rows = functools.lru_cache(maxsize=4)(self._run)
        self._failures: dict[bytes, Failure] = {}

    def __enter__(self) -> ExecutionMatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child process."""
        self._sandbox.close()

    def database(self, example: Example) -> Path:
        """The example's database, named in front of its question: `For db_id:[concert_singer]` and a blank line.

        Raises ExampleError where no plain name stands there, or it is no database's.
        """
        from llm_jepa.data.examples import ExampleError

        header = re.match(r"For db_id:\[([^\]\n]*)\]\r?\n\r?\n", example.user)
        if header is None:
            raise ExampleError(f'{example.source}: the user turn does not begin with "For db_id:[…]" and a blank line')
        if not re.fullmatch(DB_ID, db_id := header[1]):
            raise ExampleError(f"{example.source}: db_id {db_id[:100]!r} is no plain name")
        path = self.databases / db_id / f"{db_id}.sqlite"
        if not path.is_file():
            raise ExampleError(f"{example.source}: db_id {db_id!r}: there is no {path} (--spider_path)")
        log = path.with_name(f"{path.name}-wal")
        if log.is_file() and log.stat().st_size:  # a connection that writes nothing would not see it
            raise ExampleError(f"{log} has changes that are not in its database yet; open and close it with sqlite3")
        return path

    def __call__(self, prediction: str, example: Example) -> dict[str, bool | str]:
        """{"execution", "execution_ordered"}, and where a query gave no result its reason as "failure".

        `execution` is results_match. `execution_ordered`, the stricter form behind published figures, asks for the same
        rows and columns, both in the same order. The gold query's reason begins with `gold_`; a query that gives no
        result equals none. Raises ExampleError for a bad or unknown db_id.
        """
        database = str(self.database(example))
        results = []
        for prefix, query in (("gold_", example.assistant), ("", prediction)):
            result = self._result(database, query)
            if isinstance(result, Failure):
                return {"execution": False, "execution_ordered": False, "failure": prefix + result.reason}
            results.append(result)
        match = results_match(*results, is_ordered(example.assistant))
        return {"execution": match, "execution_ordered": results[0] == results[1]}

    def _result(self, database: str, query: str) -> list[tuple] | Failure:
        """A query's rows, or why there are none, which is kept: some take all the time there is to fail."""
        key = hashlib.sha256(f"{database}\n{query}".encode("utf-8", "surrogatepass")).digest()
        if key not in self._failures:
            try:
                return self._rows(database, query)
            except Failure as failure:
                if failure.reason == "crash":  # which may have come from outside
                    return failure
                self._failures[key] = failure
        return self._failures[key]

    def _run(self, database: str, query: str) -> list[tuple]:
        rows = self._sandbox.call(database, query)
        return [tuple(bytes.fromhex(v["blob"]) if isinstance(v, dict) else v for v in row) for row in rows]


# ----------------------------------------------------------------------------------------------------- databases

MAX_UNPACKED = 8 << 30  # bytes; the official spider_data.zip unpacks to about 2 GB


def spider_databases(path: Path, cache: Path) -> Path:
    """The folder of databases of `path`: a folder (spider_data or its database) or a zip file like the official one.

    A zip's databases are unpacked once, into `cache`/<first 16 digits of its SHA-256>; any number of processes may do
    so at a time. Raises UsageError naming the path where there are none or the zip is damaged or not to be trusted.
    """
    from llm_jepa.cli import UsageError
    from llm_jepa.files import sha256

    if path.is_dir():
        for folder in (path / "database", path / "spider_data" / "database", path):
            if any(file.stem == file.parent.name for file in folder.glob("*/*.sqlite")):
                return folder
        raise UsageError(f"{path}: no database/<db_id>/<db_id>.sqlite in it")
    if not path.exists():
        raise UsageError(f"{path}: no such folder or zip file")
    try:
        target = cache / sha256(path)[:16]
        if not target.is_dir():
            with zipfile.ZipFile(path) as archive:
                _unpack(archive, _databases(archive), target)
    # RuntimeError: encrypted, or a compression that Python does not know; EOFError: cut short
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise UsageError(f"{path}: cannot be unpacked ({error})") from None
    return target


def _databases(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """db_id → member. Raises BadZipFile naming a member that leaves the folder, is no file, or makes it too large."""
    databases: dict[str, zipfile.ZipInfo] = {}
    size = 0
    for member in archive.infolist():
        name = member.filename
        size += member.file_size
        if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
            raise zipfile.BadZipFile(f"member {name!r} leaves the folder")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise zipfile.BadZipFile(f"member {name!r} is neither a file nor a folder")
        if size > MAX_UNPACKED:
            raise zipfile.BadZipFile(f"member {name!r} brings it to more than {MAX_UNPACKED} bytes")
        database = re.fullmatch(rf"(?:(?!__MACOSX/)[^/]+/)?database/({DB_ID})/\1\.sqlite", name)
        if database and databases.setdefault(database[1], member) is not member:
            raise zipfile.BadZipFile(f"member {name!r} is a database that it has twice")
    if not databases:
        raise zipfile.BadZipFile("no database/<db_id>/<db_id>.sqlite in it")
    return databases


def _unpack(archive: zipfile.ZipFile, databases: dict[str, zipfile.ZipInfo], target: Path) -> None:
    """Writes the databases to `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target.parent) as temporary:
        folder = Path(temporary) / "database"
        for db_id, member in databases.items():
            (folder / db_id).mkdir(parents=True)
            with archive.open(member) as source, open(folder / db_id / f"{db_id}.sqlite", "wb") as file:
                shutil.copyfileobj(source, file, MEGABYTE)
                file.flush()
                os.fsync(file.fileno())
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
