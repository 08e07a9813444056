"""What a database of the project's Spider set is specified by: its schema, its rows, and the words for them.

A specification is data: make_spider.py makes the SQLite file from it, spider_grammar.py the pairs.
"""

import datetime
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Row = tuple[Any, ...]
Tables = dict[str, list[Row]]


class Filter(NamedTuple):
    """A condition in words, a relative clause behind a plural noun, and in SQL; `{}` in both is one of `values`.

    A value that is a tuple has a `{}` for each of its parts.
    """

    words: str
    sql: str
    values: tuple[Any, ...] = ()


class Measure(NamedTuple):
    """A column that orders a table's rows; `most` and `least` hold the noun as `{}`, as in "longest {}".

    `total` is whether a sum of the column means something; a date's average and extremes are never asked for.
    """

    column: str
    most: str
    least: str
    total: bool = False
    date: bool = False


class Thing(NamedTuple):
    """The words for a table's rows. The first of `columns` names a row; `named` is how a sentence does that.

    `columns` are the ones worth asking for, with their words in the singular; `groups` the ones worth grouping by.
    """

    table: str
    one: str
    many: str
    who: str
    columns: dict[str, str]
    filters: tuple[Filter, ...]
    measures: tuple[Measure, ...] = ()
    groups: tuple[str, ...] = ()
    named: str = "{}"


class Link(NamedTuple):
    """A foreign key that is never NULL, from `child` to `parent`, and the verb between them.

    "authors who have written books" (`have`), "the author who has written it" (`has`), "books that were written by
    authors" (`by`).
    """

    child: str
    column: str
    parent: str
    have: str
    has: str
    by: str


class Database(NamedTuple):
    """A database and its words. `hard` holds pairs written by hand: a question on a line, its query indented below."""

    db_id: str
    schema: str
    rows: dict[str, Callable[[random.Random, Tables], list[Row]]]
    things: tuple[Thing, ...]
    links: tuple[Link, ...]
    hard: str


# ---- rows: what is not listed is drawn by random.Random.random and integers alone, the same everywhere ----

Draw = Callable[[random.Random, Tables, Row], Any]


def below(rng: random.Random, n: int) -> int:
    """A number from 0 to n − 1."""
    return int(rng.random() * n)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`."""
    return items[below(rng, len(items))]


def one_of(*values: Any) -> Draw:
    """One of `values`; the more often a value is given, the more often it is drawn."""
    return lambda rng, tables, row: pick(rng, values)


def either(*draws: Draw) -> Draw:
    """What one of `draws` gives."""
    return lambda rng, tables, row: pick(rng, draws)(rng, tables, row)


def number(low: int, high: int, step: int = 1, per: int = 1) -> Draw:
    """A number from `low` to `high` in steps, divided by `per`: number(15, 99, 5, per=10) is 1.5, 2.0 … 9.5."""

    def draw(rng: random.Random, tables: Tables, row: Row) -> int | float:
        drawn = low + step * below(rng, (high - low) // step + 1)
        return drawn / per if per > 1 else drawn

    return draw


def date(first: str, last: str) -> Draw:
    """A day from `first` to `last`, as YYYY-MM-DD."""
    start, end = (datetime.date.fromisoformat(day) for day in (first, last))
    return lambda rng, tables, row: str(start + datetime.timedelta(days=below(rng, (end - start).days + 1)))


def later(column: int, low: int, high: int) -> Draw:
    """A day `low` to `high` days behind the one in the row's column `column`, counted from 0."""
    return lambda rng, tables, row: str(
        datetime.date.fromisoformat(row[column]) + datetime.timedelta(days=low + below(rng, high - low + 1))
    )


def after_year(column: int, first: str, last: str) -> Draw:
    """A day from `first` to `last`, but not before the year behind the one in the row's column `column`."""
    return lambda rng, tables, row: date(max(first, f"{row[column] + 1}-01-01"), last)(rng, tables, row)


def ref(table: str, but: Sequence[int] = (), unlike: int | None = None, having: tuple[int, Any] | None = None) -> Draw:
    """The key of a row of `table`: none of those in `but`, nor the one in the row's own column `unlike`.

    `having` is a column of `table` and the value that has to stand in it.
    """

    def draw(rng: random.Random, tables: Tables, row: Row) -> int:
        barred = {*but, row[unlike] if unlike is not None else None}
        return pick(
            rng, [r[0] for r in tables[table] if r[0] not in barred and (not having or r[having[0]] == having[1])]
        )

    return draw


def share_of(table: str, key: int, column: int, *percents: int) -> Draw:
    """One of `percents` of the column `column` of the row of `table` whose key stands in the row's own column `key`."""
    return lambda rng, tables, row: tables[table][row[key] - 1][column] * pick(rng, percents) // 100


def maybe(percent: int, draw: Draw) -> Draw:
    """NULL in `percent` of 100 cases, else what `draw` gives."""
    return lambda rng, tables, row: None if below(rng, 100) < percent else draw(rng, tables, row)


def value(text: str) -> Any:
    """A field of a listed row: nothing is NULL, a number a number, anything else text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def rows(listed: str | int, *draws: Draw) -> Callable[[random.Random, Tables], list[Row]]:
    """Rows with keys from 1: the fields of the lines of `listed`, or that many empty rows, and behind them `draws`."""
    lines = [""] * listed if isinstance(listed, int) else listed.strip().splitlines()

    def make(rng: random.Random, tables: Tables) -> list[Row]:
        made = []
        for key, line in enumerate(lines, start=1):
            row: Row = (key, *(value(field.strip()) for field in line.split("|"))) if line else (key,)
            for draw in draws:
                row += (draw(rng, tables, row),)
            made.append(row)
        return made

    return make
