"""Execution match on Spider's own queries: each gold against itself, and mutated ones against an oracle.

Through the sandbox, on the real databases. The oracle runs both queries in this process and compares their rows by the
definition of the official test-suite evaluator (arXiv 2010.02840), with every permutation of the columns tried.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlglot
from sqlglot import exp

from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.scoring.sql import ExecutionMatch

ROOT = Path(__file__).resolve().parents[2]
SPIDER = ROOT.parent / "shared" / "data" / "spider_data"
Rows = list[tuple]
Scores = dict[str, bool]

OUTCOMES = {  # of every line: equal to itself, or why not. Three of Spider's databases are not here.
    "dev": {"equal": 972, "no wta_1": 62},
    "train": {"equal": 8560, "no baseball_1": 82, "no soccer_1": 14, "gold_error": 3},
}
MUTATED = 400  # queries of each kind
LEAST = 15  # of them with each of the outcomes that the kind is to show
COLUMNS = 5  # of a result at most: 120 permutations


def golds(name: str) -> list[tuple[str, str]]:
    """(query, db_id) of each line."""
    if not SPIDER.is_dir():
        pytest.skip("Spider with its databases, shared/data/spider_data, is not here")
    lines = (SPIDER / f"{name}_gold.sql").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines]


def example(query: str, db_id: str, line: int) -> Example:
    return Example(None, f"For db_id:[{db_id}]\n\nWhich?", query, f"gold.sql:{line}", line)


# -------------------------------------------------------------------------------------------------------- oracle


@contextlib.contextmanager
def direct() -> Iterator[Callable[[str, str], Rows]]:
    """Opens a function of (query, db_id) that gives the rows by Python's sqlite3 alone."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def connect(db_id: str) -> sqlite3.Connection:
            uri = (SPIDER / "database" / db_id / f"{db_id}.sqlite").as_uri() + "?mode=ro&immutable=1"
            connection = stack.enter_context(contextlib.closing(sqlite3.connect(uri, uri=True)))
            connection.text_factory = lambda text: text.decode(errors="ignore")  # the official evaluator's
            return connection

        yield lambda query, db_id: connect(db_id).execute(query).fetchall()


def verdict(gold: Rows, predicted: Rows, ordered: bool) -> Scores:
    """The scores by definition."""
    arranged = list if ordered else Counter
    if gold and predicted:
        equal = len(gold[0]) == len(predicted[0]) and any(
            arranged(tuple(row[i] for i in order) for row in predicted) == arranged(gold)
            for order in itertools.permutations(range(len(gold[0])))
        )
    else:
        equal = gold == predicted
    return {"execution": equal, "execution_ordered": gold == predicted}


# ----------------------------------------------------------------------------------------------------- mutations

# Each changes a parsed query and returns None where it cannot, else the new text and which scores follow from the gold
# query's rows alone. These check the oracle.
Known = Callable[[Rows], Scores]
Mutation = tuple[str, Known] | None


def nothing(gold: Rows) -> Scores:
    return {}


def as_text(tree: exp.Query, known: Known = nothing) -> Mutation:
    return tree.sql(dialect="sqlite"), known


def dropped_condition(tree: exp.Query, rng: random.Random) -> Mutation:
    """Without a WHERE, or with one side of its AND or OR."""
    if not (wheres := list(tree.find_all(exp.Where))):
        return None
    where = rng.choice(wheres)
    if isinstance(where.this, exp.Connector):
        where.this.replace(rng.choice([where.this.left, where.this.right]))
    else:
        where.pop()
    return as_text(tree)


def swapped_columns(tree: exp.Query, rng: random.Random) -> Mutation:
    columns = list(tree.selects)
    if len(columns) < 2 or tree.is_star or not isinstance(tree, exp.Select):
        return None
    i, j = rng.sample(range(len(columns)), 2)
    columns[i], columns[j] = columns[j], columns[i]
    tree.set("expressions", columns)
    return as_text(tree, lambda gold: {"execution": True, "execution_ordered": all(row[i] == row[j] for row in gold)})


def other_order(tree: exp.Query, rng: random.Random) -> Mutation:
    """With an ORDER BY where there is none, else without it or reversed."""
    if (order := tree.args.get("order")) is None:
        # Whatever SQLite may choose, LIMIT the rows and GROUP BY the row of a bare column, depends on the order.
        free = not tree.find(exp.Order, exp.Limit, exp.Group)
        column = exp.Literal.number(rng.randint(1, len(tree.selects)))
        tree.order_by(exp.Ordered(this=column, desc=rng.random() < 0.5), copy=False)
        return as_text(tree, lambda gold: {"execution": True} if free else {})
    if rng.random() < 0.5:
        order.pop()
    else:
        for term in order.expressions:
            term.set("desc", not term.args.get("desc"))
    return as_text(tree)


def other_distinct(tree: exp.Query, rng: random.Random) -> Mutation:
    """With DISTINCT where there is none, or without: of any SELECT or COUNT."""
    counts = [count for count in tree.find_all(exp.Count) if not isinstance(count.this, exp.Star)]
    place = rng.choice([*tree.find_all(exp.Select), *counts])
    if isinstance(place, exp.Select):
        place.set("distinct", None if place.args.get("distinct") else exp.Distinct())
    elif isinstance(place.this, exp.Distinct):
        place.set("this", place.this.expressions[0])
    else:
        place.set("this", exp.Distinct(expressions=[place.this]))
    return as_text(tree)


def other_limit(tree: exp.Query, rng: random.Random) -> Mutation:
    """With a LIMIT where there is none, else without it or with another."""
    if (limit := tree.args.get("limit")) is None:
        tree.limit(rng.randint(1, 5), copy=False)
    elif rng.random() < 0.3:
        limit.pop()
    else:
        n = int(limit.expression.this)
        tree.limit(rng.choice([n - 1, n + 1, n + 2] if n > 1 else [2, 3]), copy=False)
    return as_text(tree)


def other_names(tree: exp.Query, rng: random.Random) -> Mutation:
    """Every table and derived table by a new name, throughout, and every column of the result with one."""
    for table in [*tree.find_all(exp.Table), *(query for query in tree.find_all(exp.Subquery) if query.alias)]:
        table.set("alias", exp.TableAlias(this=exp.to_identifier(f"new_{table.alias_or_name.lower()}")))
    for column in tree.find_all(exp.Column):
        if column.table:
            column.set("table", exp.to_identifier(f"new_{column.table.lower()}"))
    if isinstance(tree, exp.Select):
        names = enumerate(tree.selects)
        tree.set("expressions", [old if old.is_star else exp.alias_(old, f"new_{i}") for i, old in names])
    return as_text(tree, lambda gold: {"execution": True, "execution_ordered": True})


# Of the rows q: n has them with their numbers, d has each different one once.
ROWS = """WITH q({names}) AS ({query}), d AS (SELECT DISTINCT * FROM q),
n AS (SELECT *, row_number() OVER () AS n, count(*) OVER () AS m FROM q) """
NEAR_MISSES = [
    "SELECT n.c0, n.c0{rest} FROM n",  # one column in another's place, too
    "SELECT iif(n % 2, n.c0, n.c1), iif(n % 2, n.c1, n.c0){rest} FROM n",  # columns swapped in every second row
    "SELECT next.c0, n.c1{rest} FROM n JOIN n AS next ON next.n = n.n % n.m + 1",  # one column a row further
    # Of all rows only the first more than once, but that as often as to make up for the others.
    "SELECT * FROM d UNION ALL SELECT * FROM (SELECT first.* FROM q JOIN (SELECT * FROM d LIMIT 1) AS first "
    "LIMIT (SELECT count(*) FROM q) - (SELECT count(*) FROM d))",
]


def near_miss(tree: exp.Query, rng: random.Random) -> Mutation:
    """As many rows and columns with nearly the same values."""
    names = [f"c{i}" for i in range(len(tree.selects))]
    one = len(names) == 1
    if tree.is_star or one and (not tree.find(exp.Join) or tree.find(exp.AggFunc, exp.Distinct, exp.Group)):
        return None  # one column says most where a join repeats its values
    text = ROWS + rng.choice(NEAR_MISSES[-1:] if one else NEAR_MISSES)
    rest = "".join(f", n.{name}" for name in names[2:])
    return text.format(names=", ".join(names), query=tree.sql(dialect="sqlite"), rest=rest), nothing


EQUAL, REARRANGED, DIFFERENT = (True, True), (True, False), (False, False)  # execution, execution_ordered
KINDS = {  # kind → the outcomes that it must show
    dropped_condition: [EQUAL, DIFFERENT],
    swapped_columns: [EQUAL, REARRANGED],
    other_order: [EQUAL, REARRANGED, DIFFERENT],
    other_distinct: [EQUAL, DIFFERENT],
    other_limit: [EQUAL, DIFFERENT],
    other_names: [EQUAL],
    near_miss: [EQUAL, DIFFERENT],
}


def mutations(kind: Callable, rows: Callable[[str, str], Rows]) -> Iterator[tuple[str, str, Rows, str, Known]]:
    """(gold query, its db_id, its rows, mutated query, what is known), no two the same, in random order by seed."""
    rng, seen = random.Random(kind.__name__), set()
    queries = list(dict.fromkeys(golds("dev") + golds("train")))
    rng.shuffle(queries)
    for query, db_id in queries:
        try:
            gold = rows(query, db_id)
        except sqlite3.Error:  # no database, or one of the golds that fail
            continue
        mutation = kind(sqlglot.parse_one(query, read="sqlite"), rng)
        if mutation and (mutation[0], db_id) not in seen and not (gold and len(gold[0]) > COLUMNS):
            seen.add((mutation[0], db_id))
            yield query, db_id, gold, *mutation


# --------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", OUTCOMES)
def test_every_gold_that_runs_gives_its_rows_and_equals_itself(name):
    queries, outcomes, wrong = golds(name), Counter(), []
    with ExecutionMatch(SPIDER / "database") as match, direct() as rows:
        for line, (query, db_id) in enumerate(queries, 1):
            gold = example(query, db_id, line)
            try:
                scores = match(query, gold)
            except ExampleError as error:
                assert f"gold.sql:{line}: db_id '{db_id}': there is no " in str(error)
                outcomes[f"no {db_id}"] += 1
                continue
            outcomes[scores.pop("failure", "equal")] += 1
            try:
                expected = rows(query, db_id)
            except sqlite3.Error:
                assert scores == {"execution": False, "execution_ordered": False}
                continue
            # Equal or not, the rows must be the right ones. repr, since 1 is no 1.0 here.
            ran = match._result(str(match.database(gold)), query)
            if repr(ran) != repr(expected) or scores != {"execution": True, "execution_ordered": True}:
                wrong.append((line, query, db_id, scores))
    assert wrong == [], (len(wrong), wrong[:5])
    assert outcomes == OUTCOMES[name]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_mutated_queries_score_as_the_definition_says(kind):
    outcomes, wrong = Counter(), []
    with ExecutionMatch(SPIDER / "database") as match, direct() as rows:
        for query, db_id, gold, mutated, known in itertools.islice(mutations(kind, rows), MUTATED):
            expected = verdict(gold, rows(mutated, db_id), ordered="order by" in query.lower())
            outcomes[tuple(expected.values())] += 1
            scores = match(mutated, example(query, db_id, 1))
            if scores != expected or not known(gold).items() <= expected.items():
                wrong.append((db_id, query, mutated, scores, expected, known(gold)))
    assert wrong == [], (len(wrong), wrong[:5])
    assert outcomes.total() == MUTATED
    assert min(outcomes[outcome] for outcome in KINDS[kind]) >= LEAST, outcomes
