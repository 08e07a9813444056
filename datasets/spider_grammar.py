"""The pairs of the project's Spider set: questions and SQL queries drawn together from one synchronous grammar.

A rule has one query and several wordings, and its slots stand in both; the words for a database's slots are its
specification's. Every pair, drawn or written by hand, is run: one whose answer does not depend on each of its parts is
refused.
"""

import datetime
import random
import re
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from string import Formatter
from typing import Any, NamedTuple, TypeVar

from spider_spec import Database, Filter, Thing, pick

T = TypeVar("T")


class Pair(NamedTuple):
    """A question and the query that answers it."""

    question: str
    query: str


class Rule(NamedTuple):
    """A query and its wordings, which share the slots."""

    query: str
    wordings: tuple[str, ...]


# The slots are of one `Thing` of the database: its nouns `one` and `many`, its `label`, conditions `f` and `g` (in the
# words relative clauses; `{f:T1}` is f in SQL with the alias T1), a measure `m` or, where it may be no date, `number`
# (with `most`, `least`, `agg` …), a column `c` to group by, any other column `x`. With an s they are plurals.
ONE_TABLE = """
How many {many} are there {f}?
Count the {many} {f}.
What is the number of {many} {f}?
Tell me how many {many} there are {f}.
    SELECT COUNT(*) FROM {table} WHERE {f}

How many {many} are there {f} and {g}?
Of the {many} {f}, how many are there {g}?
Count those {many} {f} and {g}.
    SELECT COUNT(*) FROM {table} WHERE {f} AND {g}

What are the {labels} of the {many} {f}?
List the {labels} of all {many} {f}.
Show me the {labels} of {many} {f}.
I need the {labels} of the {many} {f}.
    SELECT {label} FROM {table} WHERE {f}

Show the {labels} and {xs} of the {many} {f}.
For the {many} {f}, list the {label} and the {x}.
What are the {label} and the {x} of each of the {many} {f}?
    SELECT {label}, {x} FROM {table} WHERE {f}

What are the {labels} of the {many} {f} and {g}?
Find the {labels} of {many} {f} and {g}.
Of the {many} {f}, list the {labels} of those {g}.
    SELECT {label} FROM {table} WHERE {f} AND {g}

List the {labels} of {many} {f} or {g}.
Which {many} are there {f} or {g}? Give their {labels}.
What are the {labels} of all {many} {f} or {g}?
    SELECT {label} FROM {table} WHERE {f} OR {g}

List the {labels} of the {many} whose {label} begins with “{initial}”.
Which {many} have a {label} that begins with “{initial}”?
    SELECT {label} FROM {table} WHERE {label} LIKE '{initial}%'

How many {many} are there {f} and whose {label} ends in “{final}”?
Of the {many} {f}, count those whose {label} ends in “{final}”.
    SELECT COUNT(*) FROM {table} WHERE {f} AND {label} LIKE '%{final}'

What is the {agg} {m} of the {many} {f}?
Find the {agg} {m} of all {many} {f}.
Taking only {many} {f}, what is the {agg} {m}?
    SELECT {agg}({m}) FROM {table} WHERE {f}

What are the minimum, maximum and average {number} of the {many} {f}?
Give the lowest, the highest and the average {number} of {many} {f}.
For the {many} {f}, show the smallest, the largest and the mean {number}.
    SELECT MIN({number}), MAX({number}), AVG({number}) FROM {table} WHERE {f}

What are the {label} and the {m} of the {most}?
Find the {most}: give the {label} and the {m}.
    SELECT {label}, {m} FROM {table} ORDER BY {m} DESC LIMIT 1

What is the {label} of the {least}?
Of all {many}, which is the {least}? Give the {label}.
    SELECT {label} FROM {table} ORDER BY {m} LIMIT 1

Considering only {many} {f}, what is the {label} of the {least}?
Among the {many} {f}, find the {label} of the {least}.
    SELECT {label} FROM {table} WHERE {f} ORDER BY {m} LIMIT 1

Considering only {many} {f}, what is the {label} of the {most}?
Among the {many} {f}, find the {label} of the {most}.
    SELECT {label} FROM {table} WHERE {f} ORDER BY {m} DESC LIMIT 1

What are the {labels} of the {n} {mosts}, the {highest} {m} first?
List the {labels} of the {n} {mosts}, ordered from the {highest} {m} down.
Which are the {n} {mosts}? Give their {labels}, the {highest} {m} first.
    SELECT {label} FROM {table} ORDER BY {m} DESC LIMIT {n}

List the {labels} and {ms} of the {many} {f}, the {highest} {m} first.
Show the {label} and the {m} of all {many} {f}, in descending order of {m}.
For the {many} {f}, what are the {label} and the {m}? Put the {highest} {m} on top.
    SELECT {label}, {m} FROM {table} WHERE {f} ORDER BY {m} DESC

List the {labels} of the {many} {f}, the {lowest} {m} first.
Which {many} are there {f}? Sort their {labels} by {m}, ascending.
What are the {labels} of the {many} {f}, in ascending order of {m}?
    SELECT {label} FROM {table} WHERE {f} ORDER BY {m}

What are the different {cs} of the {many} {f}?
List the {cs} of the {many} {f}, each only once.
Which distinct {cs} occur among the {many} {f}?
    SELECT DISTINCT {c} FROM {table} WHERE {f}

How many different {cs} are there among the {many} {f}?
Count the distinct {cs} of the {many} {f}.
    SELECT COUNT(DISTINCT {c}) FROM {table} WHERE {f}

Show each {c} with its number of {many}.
How many {many} are there for each {c}? Show the {c} and the number.
Count the {many} by {c}, listing the {c} and the count.
    SELECT {c}, COUNT(*) FROM {table} GROUP BY {c}

Group the {many} {f} by {c} and show each {c} with the number of them.
Taking only {many} {f}, show each {c} and the number of {many}.
Count the {many} {f} separately for each {c}. Show the {c} and the count.
    SELECT {c}, COUNT(*) FROM {table} WHERE {f} GROUP BY {c}

For each {c} of the {many}, give the {c} and the {agg} {m}.
Show every {c} together with the {agg} {m} of its {many}.
What is the {agg} {m} of the {many} of each {c}? List the {c} too, in front.
    SELECT {c}, {agg}({m}) FROM {table} GROUP BY {c}

Which {cs} are shared by at least {n} {many}?
List every {c} that has {n} or more {many}.
What are the {cs} with no fewer than {n} {many}?
    SELECT {c} FROM {table} GROUP BY {c} HAVING COUNT(*) >= {n}

Which {cs} have more than {n} {many} {f}?
Find each {c} for which there are more than {n} {many} {f}.
    SELECT {c} FROM {table} WHERE {f} GROUP BY {c} HAVING COUNT(*) > {n}

For which {cs} is the average {number} of the {many} above the average over all {many}?
List the {cs} whose {many} have a higher average {number} than {many} have overall.
    SELECT {c} FROM {table} GROUP BY {c} HAVING AVG({number}) > (SELECT AVG({number}) FROM {table})

Which {c} is the most common one among the {many}?
What is the most frequent {c} of the {many}?
Which {c} has the largest number of {many}?
    SELECT {c} FROM {table} GROUP BY {c} ORDER BY COUNT(*) DESC LIMIT 1

List the {labels} of the {many} whose {number} is above the average of all {many}.
Give the {labels} of {many} with a {number} higher than average.
Which {many} exceed the average {number} of all {many}? Show their {labels}.
    SELECT {label} FROM {table} WHERE {number} > (SELECT AVG({number}) FROM {table})

How many {many} have a {number} greater than that of every one of the {many} {f}?
Count the {many} whose {number} exceeds the maximum {number} of the {many} {f}.
    SELECT COUNT(*) FROM {table} WHERE {number} > (SELECT MAX({number}) FROM {table} WHERE {f})

Which {cs} occur among the {many} {f} but not among the {many} {g}?
Find the {cs} that have {many} {f} but no {many} {g}.
    SELECT {c} FROM {table} WHERE {f} EXCEPT SELECT {c} FROM {table} WHERE {g}

Which {cs} occur both among the {many} {f} and among the {many} {g}?
Find the {cs} that have {many} {f} as well as {many} {g}.
    SELECT {c} FROM {table} WHERE {f} INTERSECT SELECT {c} FROM {table} WHERE {g}
"""

# The slots of a `Link`'s two things begin with child_ and parent_; `named` is one of the parents by name.
LINKED = """
List the {child_labels} of the {children} {by} {parents} {parent_f}.
What are the {child_labels} of {children} {by} {parents} {parent_f}?
Show me the {child_labels} of all {children} {by} {parents} {parent_f}.
    SELECT T1.{child_label} FROM {child_join} WHERE {parent_f:T2}

What are the {child_labels} of the {children} {by} {named}?
Find the {child_labels} of all {children} {by} {named}.
List the {child_labels} of {children} {by} {named}.
    SELECT T1.{child_label} FROM {child_join} WHERE T2.{parent_label} = {named}

How many {children} are there {by} {named}?
Count all {children} {by} {named}.
What is the number of {children} {by} {named}?
    SELECT COUNT(*) FROM {child_join} WHERE T2.{parent_label} = {named}

What is the {child_agg} {child_m} of the {children} {by} {named}?
Find the {child_agg} {child_m} of all {children} {by} {named}.
    SELECT {child_agg}(T1.{child_m}) FROM {child_join} WHERE T2.{parent_label} = {named}

Of the {children} {by} {named}, which is the {child_most}? Give its {child_label} and its {child_m}.
What are the {child_label} and the {child_m} of the {child_most} among those {by} {named}?
    SELECT T1.{child_label}, T1.{child_m} FROM {child_join} WHERE T2.{parent_label} = {named}
    ORDER BY T1.{child_m} DESC LIMIT 1

How many {children} are there {by} {named} and {child_f}?
Of the {children} {by} {named}, count those {child_f}.
    SELECT COUNT(*) FROM {child_join} WHERE T2.{parent_label} = {named} AND {child_f:T1}

How many {children} are there {by} {parents} {parent_f}?
Count the {children} {by} {parents} {parent_f}.
What is the number of {children} {by} {parents} {parent_f}?
    SELECT COUNT(*) FROM {child} WHERE {fk} IN (SELECT {key} FROM {parent} WHERE {parent_f})

List the {child_labels} of {children} {child_f} and {by} {parents} {parent_f}.
Of the {children} {child_f}, give the {child_labels} of those {by} {parents} {parent_f}.
    SELECT {child_label} FROM {child} WHERE {child_f} AND {fk} IN (SELECT {key} FROM {parent} WHERE {parent_f})

Of the {children} {child_f}, list the {child_labels} of all but those {by} {parents} {parent_f}.
List the {child_labels} of the {children} {child_f}, leaving out those {by} {parents} {parent_f}.
    SELECT {child_label} FROM {child} WHERE {child_f} AND {fk} NOT IN (SELECT {key} FROM {parent} WHERE {parent_f})

What is the {child_agg} {child_m} of the {children} {by} {parents} {parent_f}?
Find the {child_agg} {child_m} of {children} {by} {parents} {parent_f}.
    SELECT {child_agg}(T1.{child_m}) FROM {child_join} WHERE {parent_f:T2}

List the {child_labels} of the {children} {child_f}, each with the {parent_label} of {child_its} {parent}.
For each of the {children} {child_f}, show the {child_label} and the {parent}'s {parent_label}.
    SELECT T1.{child_label}, T2.{parent_label} FROM {child_join} WHERE {child_f:T1}

What are the {parent_labels} of the {parents} {who} {have} {children} {child_f}?
Show, each only once, the {parent_labels} of {parents} {who} {have} any {children} {child_f}.
Which {parents} {have} {children} {child_f}? List each {parent_label} once.
    SELECT DISTINCT T1.{parent_label} FROM {parent_join} WHERE {child_f:T2}

Of the {parents} {parent_f}, list the {parent_labels} of those {who} {have} any {children} {child_f}.
Find the {parent_labels} of {parents} {parent_f} and {who} {have} {children} {child_f}.
    SELECT T1.{parent_label} FROM {parent} AS T1 WHERE {parent_f:T1}
    AND EXISTS (SELECT * FROM {child} AS T2 WHERE T2.{fk} = T1.{key} AND {child_f:T2})

How many {parents} {have} any {children} {child_f}?
Count the {parents} {who} {have} any {children} {child_f}.
    SELECT COUNT(*) FROM {parent} AS T1
    WHERE EXISTS (SELECT * FROM {child} AS T2 WHERE T2.{fk} = T1.{key} AND {child_f:T2})

Show the {parent_label} of each {parent} {who} {has} any {children}, and the number of them.
For each {parent} with any {children}, give the {parent_label} and the number of {children}.
    SELECT T2.{parent_label}, COUNT(*) FROM {child_join} GROUP BY T2.{key}

For every {parent}, show the {parent_label} and the number of {children}, be it zero.
List the {parent_labels} of all {parents} with their numbers of {children}, including those with none.
    SELECT T1.{parent_label}, COUNT(T2.{fk}) FROM {parent} AS T1
    LEFT JOIN {child} AS T2 ON T1.{key} = T2.{fk} GROUP BY T1.{key}

Which {parents} {have} at least {n} {children}? List the {parent_labels}.
Find the {parent_labels} of the {parents} {who} {have} {n} or more {children}.
    SELECT T2.{parent_label} FROM {child_join} GROUP BY T2.{key} HAVING COUNT(*) >= {n}

Which {parents} {have} more than {n} {children} {child_f}? Show the {parent_labels}.
List the {parent_labels} of {parents} {who} {have} more than {n} {children} {child_f}.
    SELECT T2.{parent_label} FROM {child_join} WHERE {child_f:T1} GROUP BY T2.{key} HAVING COUNT(*) > {n}

What are the {parent_labels} of the {parents} {who} {have} no {children}?
List the {parent_labels} of all {parents} without any {children}.
    SELECT {parent_label} FROM {parent} WHERE {key} NOT IN (SELECT {fk} FROM {child})

What are the {parent_labels} of the {parents} {who} {have} no {children} {child_f}?
Which {parents} {have} no {children} {child_f}? Give the {parent_labels}.
    SELECT T1.{parent_label} FROM {parent} AS T1
    WHERE NOT EXISTS (SELECT * FROM {child} AS T2 WHERE T2.{fk} = T1.{key} AND {child_f:T2})

Which {parent} {has} the most {children}? Give the {parent_label}.
What is the {parent_label} of the {parent} {who} {has} the largest number of {children}?
    SELECT T2.{parent_label} FROM {child_join} GROUP BY T2.{key} ORDER BY COUNT(*) DESC LIMIT 1

Which {parent} {has} the most {children} {child_f}, and how many? Give the {parent_label} and the number.
Counting only {children} {child_f}, which {parent} {has} the most? Show the {parent_label} and the count.
    SELECT T2.{parent_label}, COUNT(*) FROM {child_join} WHERE {child_f:T1} GROUP BY T2.{key}
    ORDER BY COUNT(*) DESC LIMIT 1

Show each {parent}'s {parent_label} and the {child_agg} {child_m} of {its} {children}.
For each {parent} with any {children}, give the {parent_label} and the {child_agg} {child_m} of these.
    SELECT T2.{parent_label}, {child_agg}(T1.{child_m}) FROM {child_join} GROUP BY T2.{key}

Which {parent} {has} the {child_most}? Show the {parent_label}.
What is the {parent_label} of the {parent} {who} {has} the {child_most}?
    SELECT T2.{parent_label} FROM {child_join} ORDER BY T1.{child_m} DESC LIMIT 1

Which {parents} {have} both {children} {child_f} and {children} {child_g}? List the {parent_labels}.
Find the {parent_labels} of {parents} {who} {have} {children} {child_f} as well as {children} {child_g}.
    SELECT T1.{parent_label} FROM {parent_join} WHERE {child_f:T2}
    INTERSECT SELECT T1.{parent_label} FROM {parent_join} WHERE {child_g:T2}

What are the {parent_labels} of the {parents} {who} {have} {children} {child_f} but none {child_g}?
Which {parents} {have} {children} {child_f} but no {children} {child_g}? Show the {parent_labels}.
    SELECT T1.{parent_label} FROM {parent_join} WHERE {child_f:T2}
    EXCEPT SELECT T1.{parent_label} FROM {parent_join} WHERE {child_g:T2}

List the {parent_labels} of the {parents} {parent_f} or {who} {have} {children} {child_f}.
Which {parents} are there {parent_f}, or {who} {have} any {children} {child_f}? Give the {parent_labels}.
    SELECT {parent_label} FROM {parent} WHERE {parent_f}
    UNION SELECT T1.{parent_label} FROM {parent_join} WHERE {child_f:T2}

Count the {children} by the {parent_c} of the {parent}; show the {parent_c} and the number.
For each {parent_c} of the {parents}, how many {children} are there? List the {parent_c} and the number.
    SELECT T2.{parent_c}, COUNT(*) FROM {child_join} GROUP BY T2.{parent_c}

For which {parents} is the average {child_number} of their {children} above that of all {children}?
Which {parents} have {children} whose average {child_number} is above the overall average?
    SELECT T2.{parent_label} FROM {child_join} GROUP BY T2.{key}
    HAVING AVG(T1.{child_number}) > (SELECT AVG({child_number}) FROM {child})

Which {children} have a greater {child_number} than all {children} {by} {parents} {parent_f}? List the {child_labels}.
Give the {child_labels} of the {children} whose {child_number} exceeds that of all {children} {by} {parents} {parent_f}.
    SELECT {child_label} FROM {child}
    WHERE {child_number} > (SELECT MAX(T1.{child_number}) FROM {child_join} WHERE {parent_f:T2})
"""

ROUNDS, TRIES = 20, 60  # through all rules, and for each of them
AGGREGATES = (("AVG", "average"), ("MAX", "maximum"), ("MIN", "minimum"), ("SUM", "total"))


# ---- words ----


def plural(words: str) -> str:
    """The plural of a column's words: "number of pages" → "numbers of pages", "city" → "cities"."""
    head, space, tail = re.fullmatch(r"(.*?)(?:( )((?:of|in|on|per|at|from) .*))?", words).groups(default="")
    if head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    elif head.endswith(("s", "x", "ch", "sh")):
        head += "es"
    else:
        head += "s"
    return head + space + tail


def spoken(value: Any) -> str:
    """A value as a question says it: dates as "7 March 2021", all else as it is."""
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        day = datetime.date.fromisoformat(value)
        return f"{day.day} {MONTHS[day.month - 1]} {day.year}"
    return str(value)


MONTHS = "January February March April May June July August September October November December".split()


def quoted(value: Any) -> str:
    """A value as SQL writes it."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


# ---- the answers ----


def answer(connection: sqlite3.Connection, query: str) -> list[tuple]:
    """The rows of a query's result; numbers rounded, as sums of floats differ between versions of SQLite."""
    rows = connection.execute(query).fetchall()
    return [tuple(round(x, 6) if isinstance(x, float) else x for x in row) for row in rows]


def unordered(rows: Iterable[tuple]) -> tuple[str, ...]:
    """A result without its order."""
    return tuple(sorted(map(repr, rows)))


LITERAL = r"(?:-?\d+(?:\.\d+)?|'(?:[^']|'')*')"
OPERAND = r"(?:\w+\((?:DISTINCT )?[\w.*]+\)|[\w.]+)"
CONDITION = re.compile(
    rf"{OPERAND} (?:(?:=|<|>|<=|>=|<>|LIKE|NOT LIKE) {LITERAL}|BETWEEN {LITERAL} AND {LITERAL}|IS NULL|IS NOT NULL)"
)


def weaker(query: str) -> Iterator[tuple[str, str]]:
    """(part, the query without it) for each condition on a value, each DISTINCT, LEFT and LIMIT of a query."""
    for match in CONDITION.finditer(query):
        for neutral in ("1 = 1", "1 = 0"):  # beside AND, beside OR
            yield match[0], query[: match.start()] + neutral + query[match.end() :]
    for match in re.finditer(r"DISTINCT |LEFT | LIMIT \d+", query):
        yield match[0].strip(), query[: match.start()] + query[match.end() :]


def tied(connection: sqlite3.Connection, query: str) -> bool:
    """Whether the order that a query asks for leaves a choice: of the rows below its LIMIT, or of their order."""
    match = re.fullmatch(r"SELECT (DISTINCT )?(.*) ORDER BY (.+?)(?: LIMIT (\d+))?", query)
    if not match or match[3].count("(") != match[3].count(")"):  # no order, or only inside of a nested query
        return False
    distinct, rest, keys, limit = match.groups()
    columns = ", ".join(re.sub(r" (?:ASC|DESC)\b", "", key) for key in keys.split(", "))
    width = columns.count(", ") + 1
    rows = answer(connection, f"SELECT {distinct or ''}{columns}, {rest} ORDER BY {keys}")
    rows = rows[: int(limit) + 1 if limit else None]
    return any(a[:width] == b[:width] and a != b for a, b in zip(rows, rows[1:], strict=False))


def fault(connection: sqlite3.Connection, query: str, others: set[tuple[str, ...]]) -> str | None:
    """What is wrong with a query, or None: it fails, has no answer, an answer of `others`, or a part without effect."""
    try:
        rows = answer(connection, query)
    except sqlite3.Error as error:
        return f"fails: {error}"
    if all(x is None or x == 0 for row in rows for x in row):
        return "has an empty answer"
    if unordered(rows) in others:
        return "has the answer of another query"
    if tied(connection, query):
        return "has ties in its order"
    if len(rows) == 1 and " ORDER BY " in query and " LIMIT " not in query:
        return "has one row to order"
    for part, without in weaker(query):
        if unordered(answer(connection, without)) == unordered(rows):
            return f"has the same answer without {part}"
    return None


# ---- drawing ----


class Condition(NamedTuple):
    """A condition in SQL with `{}` for its values; its format spec is the alias that stands in front of its columns."""

    sql: str
    columns: tuple[str, ...]
    values: tuple[str, ...]

    def __format__(self, alias: str) -> str:
        text_or_column = re.compile(rf"'[^']*'|\b(?:{'|'.join(self.columns)})\b")
        prefix = f"{alias}." if alias else ""
        sql = text_or_column.sub(lambda m: m[0] if m[0].startswith("'") else prefix + m[0], self.sql)
        return sql.format(*self.values)


class Slots:
    """Fills the slots of rules for one database. What was drawn least often so far comes first, so that all is used."""

    def __init__(self, db: Database, connection: sqlite3.Connection, rng: random.Random):
        self.db, self.connection, self.rng = db, connection, rng
        self.things = {thing.table: thing for thing in db.things}
        self.used: Counter[Any] = Counter()

    def draw(self, items: Iterable[T]) -> T:
        """One of the items drawn least often. Raises IndexError where there is none."""
        counted = [(self.used[repr(item)], item) for item in items]  # not every item has a hash
        least = min((count for count, _ in counted), default=0)
        item = pick(self.rng, [item for count, item in counted if count == least])
        self.used[repr(item)] += 1
        return item

    def pair(self, rule: Rule) -> Pair:
        """A pair of the rule. Raises IndexError where the database has nothing for one of its slots."""
        wording = self.draw(rule.wordings)
        names = {name for text in (rule.query, wording) for _, name, _, _ in Formatter().parse(text) if name}
        over_two = any(name.startswith("child") for name in names)
        words, sql = self.linked(names) if over_two else self.one(self.draw(self.db.things), names)
        words["n"] = sql["n"] = self.draw(range(2, 7))
        return Pair(wording.format(**words), rule.query.format(**sql))

    def one(self, thing: Thing, names: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The slots of one table, in words and in SQL."""
        label = next(iter(thing.columns))
        words = {"one": thing.one, "many": thing.many, "who": thing.who, "label": thing.columns[label]}
        words["its"] = "their" if thing.who == "who" else "its"
        sql = {"table": thing.table, "label": label}
        if names & {"m", "number", "most", "least", "mosts"}:
            measure = self.draw([m for m in thing.measures if not (m.date and names & {"number", "agg"})])
            words["m"] = words["number"] = thing.columns[measure.column]
            sql["m"] = sql["number"] = measure.column
            words["most"], words["mosts"] = (measure.most.format(noun) for noun in (thing.one, thing.many))
            words["least"] = measure.least.format(thing.one)
            words["highest"], words["lowest"] = ("latest", "earliest") if measure.date else ("highest", "lowest")
            sql["agg"], words["agg"] = self.draw(AGGREGATES if measure.total else AGGREGATES[:-1])
        for slot, columns in (("x", list(thing.columns)[1:]), ("c", thing.groups)):
            if slot in names:
                sql[slot] = self.draw(columns)
                words[slot] = thing.columns[sql[slot]]
        for slot, place in (("initial", 0), ("final", -1)):
            if slot in names:
                labels = [name for (name,) in self.rows(f"SELECT {label} FROM {thing.table}") if isinstance(name, str)]
                words[slot] = sql[slot] = self.draw(sorted({name[place] for name in labels if name[place].isalpha()}))
        asked = {sql[slot] for slot in ("m", "x", "c") if slot in sql}
        filters = [f for f in thing.filters if not asked & set(re.findall(r"\w+", f.sql))]
        for slot in sorted(names & {"f", "g"}):
            chosen = self.draw(filters)
            filters.remove(chosen)
            words[slot], sql[slot] = self.condition(thing, chosen)
        return words | {f"{slot}s": plural(words[slot]) for slot in ("label", "m", "x", "c") if slot in words}, sql

    def linked(self, names: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The slots of two tables, of which the child holds the key of the parent."""
        link = self.draw(self.db.links)
        words, sql = link._asdict(), link._asdict()
        for side in ("child", "parent"):
            thing = self.things[getattr(link, side)]
            own = {name.removeprefix(f"{side}_") for name in names if name.startswith(f"{side}_")}
            for slots, drawn in zip((words, sql), self.one(thing, own), strict=True):
                slots |= {f"{side}_{slot}": text for slot, text in drawn.items()}
            words[side] = thing.one
        words |= {"children": words["child_many"], "parents": words["parent_many"]}
        words |= {"who": words["parent_who"], "its": words["parent_its"]}
        sql["fk"] = link.column
        ((sql["key"],),) = self.rows(
            f"""SELECT "to" FROM pragma_foreign_key_list('{link.child}') WHERE "from" = '{link.column}'"""
        )
        sql["child_join"] = "{child} AS T1 JOIN {parent} AS T2 ON T1.{fk} = T2.{key}".format(**sql)
        sql["parent_join"] = "{parent} AS T1 JOIN {child} AS T2 ON T1.{key} = T2.{fk}".format(**sql)
        if "named" in names:
            (name,) = self.draw(self.rows(f"SELECT {sql['parent_label']} FROM {link.parent}"))
            words["named"], sql["named"] = self.things[link.parent].named.format(name), quoted(name)
        return words, sql

    def condition(self, thing: Thing, chosen: Filter) -> tuple[str, Condition]:
        """A filter of the thing with one of its values, in words and in SQL."""
        values = self.draw(chosen.values) if chosen.values else ()
        values = values if isinstance(values, tuple) else (values,)
        columns = tuple(name for _, name, *_ in self.rows(f"PRAGMA table_info({thing.table})"))
        sql = Condition(chosen.sql, columns, tuple(map(quoted, values)))
        return chosen.words.format(*map(spoken, values)), sql

    def rows(self, query: str) -> list[tuple]:
        """The rows of a query's result."""
        return self.connection.execute(query).fetchall()


def rules(text: str) -> list[Rule]:
    """The rules of a text, blocks with blank lines between: each wording on a line, the query on indented ones."""
    made = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        query = " ".join(line.strip() for line in lines if line.startswith(" "))
        made.append(Rule(query, tuple(line for line in lines if not line.startswith(" "))))
    return made


def pairs(db: Database, connection: sqlite3.Connection, count: int) -> list[Pair]:
    """The database's hand-written pairs, and behind them as many drawn ones as make `count`, the same every time.

    Raises ValueError where a hand-written pair is at fault or the specification has not enough for `count`.
    """
    made: dict[str, Pair] = {}  # by question
    answers: set[tuple[str, ...]] = set()
    for query, (question,) in rules(db.hard):
        pair = Pair(question, query)
        reason = "has its question twice" if pair.question in made else fault(connection, pair.query, answers)
        if reason:
            raise ValueError(f"{db.db_id}: {reason}: {pair.question} {pair.query}")
        made[pair.question] = pair
        answers.add(unordered(answer(connection, pair.query)))
    rng = random.Random(zlib.crc32(db.db_id.encode()))
    slots = Slots(db, connection, rng)
    for _ in range(ROUNDS):
        for rule in shuffled(rng, rules(ONE_TABLE + LINKED)):
            for _ in range(TRIES):
                if len(made) == count:
                    return list(made.values())
                try:
                    pair = slots.pair(rule)
                except IndexError:
                    continue
                if pair.question not in made and not fault(connection, pair.query, answers):
                    made[pair.question] = pair
                    answers.add(unordered(answer(connection, pair.query)))
                    break
    raise ValueError(f"{db.db_id}: only {len(made)} of {count} pairs")


def shuffled(rng: random.Random, items: Iterable[T]) -> list[T]:
    """The items in a random order."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda drawn: drawn[0])]
