"""The project's own Spider set: the committed zip is what the generator makes, and its pairs are what they claim."""

import hashlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATASETS, COMMITTED = ROOT / "datasets", ROOT / "spider_data.zip"
OFFICIAL = ROOT.parent / "shared" / "data" / "spider_data"

sys.path.insert(0, str(DATASETS))
import make_spider  # noqa: E402
import spider_grammar as grammar  # noqa: E402

TRAIN, DEV = ([db.db_id for db in dbs] for dbs in (make_spider.TRAIN, make_spider.DEV))
SPECS = {db.db_id: db for db in make_spider.TRAIN + make_spider.DEV}


@pytest.fixture(scope="module")
def made() -> bytes:
    """The set as made in this process."""
    return make_spider.zipped(make_spider.make())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder spider_data of the committed zip, unpacked."""
    folder = tmp_path_factory.mktemp("spider")
    with zipfile.ZipFile(COMMITTED) as archive:
        archive.extractall(folder)
    return folder / "spider_data"


def read(data: Path, *names: str) -> list[dict]:
    return [entry for name in names for entry in json.loads((data / name).read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def pairs(data) -> list[dict]:
    return read(data, "train_spider.json", "dev.json")


@pytest.fixture(scope="module")
def databases(data):
    """db_id → a connection to the database, for reading."""
    opened = {path.stem: sqlite3.connect(f"file:{path}?mode=ro", uri=True) for path in data.glob("database/*/*.sqlite")}
    yield opened
    for connection in opened.values():
        connection.close()


def answer(databases, pair: dict) -> list[tuple]:
    return databases[pair["db_id"]].execute(pair["query"]).fetchall()


# ---- the file ----


def test_the_same_bytes_everywhere(tmp_path, made):
    target = tmp_path / "other.zip"
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, DATASETS / "make_spider.py", "--output", target]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    digests = {hashlib.sha256(content).hexdigest() for content in (target.read_bytes(), made, COMMITTED.read_bytes())}
    assert len(digests) == 1, "spider_data.zip is not what datasets/make_spider.py makes"
    assert os.listdir(tmp_path) == ["other.zip"]
    assert "500 pairs on 10 databases" in done.stdout and "150 pairs on 3 databases" in done.stdout


def test_members_carry_no_trace_of_the_machine():
    with zipfile.ZipFile(COMMITTED) as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert (info.create_system, info.external_attr >> 16) == (3, 0o100644)
            assert not info.extra and not info.flag_bits
    assert COMMITTED.stat().st_size <= 1_500_000


def test_layout_is_the_official_one():
    with zipfile.ZipFile(COMMITTED) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    expected = {"README.txt", "tables.json", "train_spider.json", "train_gold.sql", "dev.json", "dev_gold.sql"}
    for db_id in TRAIN + DEV:
        expected |= {f"database/{db_id}/{db_id}.sqlite", f"database/{db_id}/schema.sql"}
    assert set(names) == {f"spider_data/{name}" for name in expected}


def test_databases_hold_nothing_that_tells_their_maker(data):
    for path in data.glob("database/*/*.sqlite"):
        content = path.read_bytes()
        field = {offset: int.from_bytes(content[offset : offset + 4], "big") for offset in (24, 28, 36, 40, 92, 96)}
        assert content[:16] == b"SQLite format 3\0" and int.from_bytes(content[16:18], "big") == 4096
        assert content[18:21] == bytes((1, 1, 0))  # no write-ahead log, no bytes kept free in each page
        assert field[28] * 4096 == len(content) and field[36] == 0  # no free page, which could hold old rows
        assert (field[24], field[40], field[92], field[96]) == (1, 1, 1, 3_000_000)


def test_every_version_of_sqlite_gives_the_same_file(monkeypatch):
    """The fields that differ between versions are overwritten whatever the library has written there."""
    real = Path.read_bytes

    def other_version(path: Path) -> bytes:
        content = bytearray(real(path))
        for offset in (24, 40, 92, 96):
            content[offset : offset + 4] = os.urandom(4)
        return bytes(content)

    expected = make_spider.sqlite_file(make_spider.DEV[0])
    monkeypatch.setattr(Path, "read_bytes", other_version)
    assert make_spider.sqlite_file(make_spider.DEV[0]) == expected


# ---- the command line ----


def test_another_file_is_replaced_only_when_asked(tmp_path, made, capsys):
    target = tmp_path / "spider_data.zip"
    target.write_bytes(b"the official one")
    with pytest.raises(SystemExit) as refused:
        make_spider.main(["--output", str(target)])
    assert refused.value.code == 2
    assert str(target) in capsys.readouterr().err
    assert target.read_bytes() == b"the official one"
    assert make_spider.main(["--output", str(target), "--overwrite"]) == 0
    assert target.read_bytes() == made
    assert make_spider.main(["--output", str(target)]) == 0  # it is there already
    assert os.listdir(tmp_path) == ["spider_data.zip"]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_target_that_cannot_be_written_is_named(tmp_path, capsys, overwrite):
    for target in (tmp_path / "missing" / "spider_data.zip", tmp_path):
        with pytest.raises(SystemExit) as refused:
            make_spider.main(["--output", str(target), *overwrite])
        assert refused.value.code == 2
        assert f"--output {target}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# ---- the databases ----


def test_train_and_dev_share_no_database(data):
    parts = [{pair["db_id"] for pair in read(data, name)} for name in ("train_spider.json", "dev.json")]
    assert parts == [set(TRAIN), set(DEV)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) >= 12


def test_databases_are_sound_and_keys_hold(databases):
    for db_id, connection in databases.items():
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], db_id
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == [], db_id


def columns(connection, table: str) -> dict[str, str]:
    return {name: kind for _, name, kind, *_ in connection.execute(f"PRAGMA table_info({table})")}


def test_every_database_has_nulls_dates_and_foreign_letters(databases):
    for db_id, connection in databases.items():
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables}
        values = [value for table in tables for row in rows[table] for value in row]
        assert None in values, db_id
        assert any(isinstance(value, str) and not value.isascii() for value in values), db_id
        assert 20 <= max(map(len, rows.values())) <= 80 and min(map(len, rows.values())) >= 5, db_id
        dates = [
            value
            for table in tables
            for row in rows[table]
            for value, kind in zip(row, columns(connection, table).values(), strict=True)
            if kind == "DATE" and value is not None
        ]
        assert len(dates) >= 20 and all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates), db_id


def test_values_have_the_type_of_their_column(databases):
    python = {"INTEGER": int, "REAL": float, "TEXT": str, "DATE": str}
    for db_id, connection in databases.items():
        for (table,) in connection.execute("SELECT name FROM sqlite_master").fetchall():
            for row in connection.execute(f"SELECT * FROM {table}"):
                for value, (name, kind) in zip(row, columns(connection, table).items(), strict=True):
                    assert value is None or type(value) is python[kind], (db_id, table, name, value)
                    assert not isinstance(value, str) or value == value.strip() != "", (db_id, table, name, value)


def test_tables_json_describes_the_databases(data, databases):
    entries = read(data, "tables.json")
    assert sorted(entry["db_id"] for entry in entries) == sorted(databases)
    kinds = {"INTEGER": "number", "REAL": "number", "TEXT": "text", "DATE": "time"}
    for entry in entries:
        connection, tables = databases[entry["db_id"]], entry["table_names_original"]
        created = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")
        assert [(name,) for name in tables] == created.fetchall()
        expected = [[-1, "*"]] + [[i, name] for i, table in enumerate(tables) for name in columns(connection, table)]
        assert entry["column_names_original"] == expected
        assert entry["column_types"] == ["text"] + [
            kinds[kind] for table in tables for kind in columns(connection, table).values()
        ]
        named = [(tables[i], name) if i >= 0 else None for i, name in expected]
        keys = {(t, name) for t in tables for _, name, *_, pk in connection.execute(f"PRAGMA table_info({t})") if pk}
        assert {named[i] for i in entry["primary_keys"]} == keys and len(entry["primary_keys"]) == len(tables)
        links = {
            ((table, fk), (parent, key))
            for table in tables
            for _, _, parent, fk, key, *_ in connection.execute(f"PRAGMA foreign_key_list({table})")
        }
        assert {(named[fk], named[key]) for fk, key in entry["foreign_keys"]} == links and links
        assert len(entry["foreign_keys"]) == len(links)
        for words, original in (("column_names", "column_names_original"), ("table_names", "table_names_original")):
            plain = [text if isinstance(text, str) else text[1] for text in entry[words]]
            assert plain == [
                (text if isinstance(text, str) else text[1]).replace("_", " ").lower() for text in entry[original]
            ]


def test_schema_sql_is_the_schema(data, databases):
    for db_id, connection in databases.items():
        copy = sqlite3.connect(":memory:")
        copy.executescript((data / "database" / db_id / "schema.sql").read_text(encoding="utf-8"))
        question = "SELECT name, sql FROM sqlite_master"
        assert copy.execute(question).fetchall() == connection.execute(question).fetchall()


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"no official Spider in {OFFICIAL}")
def test_nothing_is_from_spider(data, pairs):
    official = read(OFFICIAL, "tables.json")
    assert {entry["db_id"] for entry in official}.isdisjoint(SPECS)
    golds = "".join((OFFICIAL / name).read_text(encoding="utf-8") for name in ("dev_gold.sql", "train_gold.sql"))
    queries = {" ".join(line.split("\t")[0].lower().split()) for line in golds.splitlines()}
    assert [p["query"] for p in pairs if " ".join(p["query"].lower().split()) in queries] == []
    questions = {" ".join(entry["question"].lower().split()) for entry in read(OFFICIAL, "dev.json")}
    assert [p["question"] for p in pairs if p["question"].lower() in questions] == []


# ---- the pairs ----


def test_counts(data):
    train, dev = read(data, "train_spider.json"), read(data, "dev.json")
    assert (len(train), len(dev)) == (500, 150)
    assert set(Counter(pair["db_id"] for pair in train + dev).values()) == {50}
    for part in (train, dev):  # the first rows are of every database
        assert {pair["db_id"] for pair in part[:50]} == {pair["db_id"] for pair in part}
    for db in SPECS.values():
        assert len(grammar.rules(db.hard)) >= 10


def test_no_query_and_no_question_stands_twice(pairs):
    for key in ("query", "question"):
        seen = Counter((pair["db_id"], " ".join(pair[key].lower().split())) for pair in pairs)
        assert [text for text, count in seen.items() if count > 1] == []


def test_gold_files_follow_the_pairs(data):
    for name, gold in (("train_spider.json", "train_gold.sql"), ("dev.json", "dev_gold.sql")):
        lines = (data / gold).read_text(encoding="utf-8").splitlines()
        assert [line.split("\t") for line in lines] == [[p["query"], p["db_id"]] for p in read(data, name)]


def test_tokens_are_the_text_without_its_spaces(pairs):
    for pair in pairs:
        assert list(pair) == ["db_id", "query", "query_toks", "question", "question_toks"]
        for key in ("query", "question"):
            assert "".join(pair[f"{key}_toks"]).replace(" ", "") == pair[key].replace(" ", "")
            assert all(len(token.split()) == 1 or token[0] == "'" for token in pair[f"{key}_toks"])
    assert make_spider.pair_entry("x", grammar.Pair("Is Zoë's é > 1.5?", "SELECT a FROM b WHERE c <> 'd e'")) == {
        "db_id": "x",
        "query": "SELECT a FROM b WHERE c <> 'd e'",
        "query_toks": ["SELECT", "a", "FROM", "b", "WHERE", "c", "<>", "'d e'"],
        "question": "Is Zoë's é > 1.5?",
        "question_toks": ["Is", "Zoë's", "é", ">", "1.5", "?"],
    }


CONSTRUCTS = {
    r"\bJOIN\b": 250,
    r"\bJOIN\b.*\bJOIN\b": 50,
    r"\bLEFT JOIN\b": 10,
    r"\bGROUP BY\b": 150,
    r"\bHAVING\b": 50,
    r"\(SELECT\b": 120,
    r" IN \(SELECT\b": 35,
    r"\bNOT IN \(": 20,
    r"[=<>] \(SELECT\b": 50,
    r"(?<!NOT )\bEXISTS\b": 15,
    r"\bNOT EXISTS\b": 10,
    r"\bUNION\b": 10,
    r"\bINTERSECT\b": 25,
    r"\bEXCEPT\b": 20,
    r"\bIS NULL\b": 35,
    r"\bIS NOT NULL\b": 15,
    r"'\d{4}-\d\d-\d\d'": 80,
    r"\bstrftime\(|\bjulianday\(": 15,
    r"\bORDER BY\b": 100,
    r"\bLIMIT\b": 75,
    r"\bDISTINCT\b": 35,
    r"\bCOUNT\(": 180,
    r"\bAVG\(": 50,
    r"\bSUM\(": 25,
    r"\bMAX\(": 35,
    r"\bMIN\(": 15,
    r"\bLIKE\b": 20,
    r"\bBETWEEN\b": 20,
    r"\bOR\b": 6,
    r"[^\x00-\x7f]": 30,
}


@pytest.mark.parametrize("construct, least", CONSTRUCTS.items())
def test_construct_is_there(pairs, construct, least):
    assert sum(bool(re.search(construct, pair["query"])) for pair in pairs) >= least


def test_questions_have_foreign_letters(pairs):
    assert sum(not pair["question"].isascii() for pair in pairs) >= 40


def test_every_query_has_an_answer(databases, pairs):
    empty = 0
    for pair in pairs:
        rows = answer(databases, pair)
        assert rows, pair
        empty += all(value is None or value == 0 for row in rows for value in row)
    assert empty == 0


def test_null_is_answered_only_where_it_is_asked_for(databases, pairs):
    with_null = [p["question"] for p in pairs if any(None in row for row in answer(databases, p))]
    assert 1 <= len(with_null) <= 5
    assert all(re.search(r"unknown|without|none", question) for question in with_null)


def test_answers_tell_queries_apart(databases, pairs):
    by_answer = defaultdict(list)
    for pair in pairs:
        by_answer[pair["db_id"], grammar.unordered(answer(databases, pair))].append(pair["query"])
    assert [queries for queries in by_answer.values() if len(queries) > 1] == []


def test_every_part_of_a_query_matters(databases, pairs):
    """Without a condition on a value, a DISTINCT, a LEFT, a HAVING, a LIMIT or a WHERE the answer is another one."""
    count = 0
    for pair in pairs:
        connection, query = databases[pair["db_id"]], pair["query"]
        variants = [without for _, without in grammar.weaker(query)]
        if "GROUP BY" in query and " EXCEPT " not in query and "(SELECT" not in query:
            variants.append(re.sub(r" HAVING .*?(?= ORDER BY|$)", "", query))
        if not re.search(r"\(SELECT|EXCEPT|INTERSECT|UNION", query):
            variants.append(re.sub(r" WHERE .*?(?= GROUP BY| ORDER BY|$)", "", query))
            variants.append(re.sub(r" LIMIT \d+$", "", query))
        rows = grammar.unordered(grammar.answer(connection, query))
        for variant in set(variants) - {query}:
            count += 1
            assert grammar.unordered(grammar.answer(connection, variant)) != rows, (pair["question"], query, variant)
    assert count > 600


def test_no_condition_stands_twice_in_a_query(pairs):
    for pair in pairs:
        if not re.search(r"UNION|EXCEPT|INTERSECT|\(SELECT", pair["query"]):
            conditions = [match[0] for match in grammar.CONDITION.finditer(pair["query"])]
            assert len(conditions) == len(set(conditions)), pair


def test_an_order_leaves_no_choice(databases, pairs):
    """Scanning the tables backwards gives the same rows, and in the same order where the query asks for one."""
    for pair in pairs:
        connection = databases[pair["db_id"]]
        forwards = grammar.answer(connection, pair["query"])
        connection.execute("PRAGMA reverse_unordered_selects = ON")
        backwards = grammar.answer(connection, pair["query"])
        connection.execute("PRAGMA reverse_unordered_selects = OFF")
        assert grammar.unordered(forwards) == grammar.unordered(backwards), pair
        assert forwards == backwards or not re.search(r"ORDER BY[^()]*(\([^()]*\)[^()]*)*$", pair["query"]), pair
        assert not grammar.tied(connection, pair["query"]), pair


def test_a_query_says_only_what_the_question_says(pairs):
    """Texts, dates and numbers of a query stand in its question, apart from a few that are said in other words."""
    said_otherwise = {"yes", "no", "feeding", "watering", "pruning", "repotting", "'", "!"}
    numbers = "zero one two three four five six".split()
    for pair in pairs:
        question, query = pair["question"].lower(), pair["query"]
        for literal in re.findall(r"'((?:[^']|'')*)'", query):
            text = literal.strip("%").replace("''", "'").lower()
            if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
                year = int(text[:4])
                said = grammar.spoken(text).lower() in question or re.search(rf"\b({year}|{year + 1})\b", question)
            else:
                said = text.rstrip("-") in question or text in said_otherwise or literal.startswith("%Y")
            assert said, (literal, pair)
        for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", re.sub(r"'[^']*'", "", query)):
            if number not in {"0", "1", "10", "1.0", "60.0", "100.0"}:
                assert number in question or (len(number) == 1 and numbers[int(number)] in question), (number, pair)


def test_questions_are_sentences(pairs):
    for pair in pairs:
        assert re.fullmatch(r"[A-Z].*[.?]", pair["question"]), pair
        assert not re.search(r"[{}_]|\s\s|\bs\b|NULL", pair["question"].replace("'s", "")), pair
        assert len(pair["question"]) <= 180, pair
        assert "  " not in pair["query"] and pair["query"] == pair["query"].strip().rstrip(";"), pair
    starts = Counter(" ".join(pair["question"].split()[:2]) for pair in pairs)
    assert len(starts) >= 60 and max(starts.values()) <= len(pairs) / 10


# ---- the specifications and the grammar ----


def test_every_filter_keeps_some_rows_and_drops_some(databases):
    for db_id, db in SPECS.items():
        for thing in db.things:
            (total,) = databases[db_id].execute(f"SELECT COUNT(*) FROM {thing.table}").fetchone()
            for chosen in thing.filters:
                for value in chosen.values or [()]:
                    values = value if isinstance(value, tuple) else (value,)
                    condition = grammar.Condition(chosen.sql, (), tuple(map(grammar.quoted, values)))
                    (kept,) = (
                        databases[db_id].execute(f"SELECT COUNT(*) FROM {thing.table} WHERE {condition}").fetchone()
                    )
                    assert 0 < kept < total, (db_id, f"{condition}", kept, total)
                    assert re.match(r"(that|who|whose) ", chosen.words), (db_id, chosen)


def test_a_link_is_never_null_and_its_parents_have_names_of_their_own(databases):
    for db_id, db in SPECS.items():
        labels = {thing.table: next(iter(thing.columns)) for thing in db.things}
        for link in db.links:
            query = f"SELECT COUNT(*) FROM {link.child} WHERE {link.column} IS NULL"
            assert databases[db_id].execute(query).fetchone() == (0,), (db_id, link)
            names = databases[db_id].execute(f"SELECT {labels[link.parent]} FROM {link.parent}").fetchall()
            assert len(names) == len(set(names)) and (None,) not in names, (db_id, link)


@pytest.fixture
def shop():
    connection = sqlite3.connect(":memory:")
    connection.executescript("""
        CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price INTEGER, kind TEXT);
        INSERT INTO item VALUES (1, 'pen', 2, 'a'), (2, 'ink', 5, 'a'), (3, 'pad', 5, 'b'), (4, 'cap', NULL, 'b');
    """)
    yield connection
    connection.close()


@pytest.mark.parametrize(
    "query, reason",
    [
        ("SELECT name FROM items", "fails: no such table"),
        ("SELECT name FROM item WHERE price > 9", "has an empty answer"),
        ("SELECT COUNT(*) FROM item WHERE price > 9", "has an empty answer"),
        ("SELECT name FROM item WHERE id < 2", "has the answer of another query"),
        ("SELECT name FROM item ORDER BY price DESC LIMIT 1", "has ties in its order"),
        ("SELECT name, price FROM item ORDER BY price", "has ties in its order"),
        ("SELECT kind FROM item GROUP BY kind ORDER BY COUNT(*) LIMIT 1", "has ties in its order"),
        ("SELECT name FROM item WHERE price < 9 AND kind = 'a'", "has the same answer without price < 9"),
        ("SELECT name FROM item WHERE kind = 'a' OR price = 5 OR id = 2", "has the same answer without id = 2"),
        ("SELECT kind FROM item WHERE price < 5 ORDER BY price", "has one row to order"),
        ("SELECT kind FROM item WHERE price < 5 ORDER BY price LIMIT 1", "has the same answer without LIMIT 1"),
        ("SELECT DISTINCT name FROM item", "has the same answer without DISTINCT"),
        ("SELECT T1.id FROM item AS T1 LEFT JOIN item AS T2 ON T1.id = T2.id", "has the same answer without LEFT"),
        ("SELECT kind FROM item GROUP BY kind HAVING COUNT(*) > 1", "has the same answer without COUNT(*) > 1"),
        ("SELECT name FROM item WHERE price IS NOT NULL AND kind = 'a'", "without price IS NOT NULL"),
    ],
)
def test_a_query_at_fault_is_refused(shop, query, reason):
    others = {grammar.unordered([("pen",)])}
    assert reason in (grammar.fault(shop, query, others) or "")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name FROM item WHERE price = 5",
        "SELECT name FROM item WHERE price IS NULL",
        "SELECT price FROM item WHERE price IS NOT NULL ORDER BY price LIMIT 1",
        "SELECT kind FROM item WHERE price = 5 OR id = 1 ORDER BY kind",  # equal rows have no order
        "SELECT name FROM item WHERE price = 5 ORDER BY price, name",
        "SELECT DISTINCT kind FROM item",
        "SELECT name FROM item WHERE id IN (SELECT id FROM item ORDER BY price DESC LIMIT 2)",  # only at the top
    ],
)
def test_a_sound_query_is_taken(shop, query):
    assert grammar.fault(shop, query, set()) is None


def test_a_specification_at_fault_names_its_database(monkeypatch):
    monkeypatch.setattr(grammar, "ROUNDS", 1)
    db = make_spider.DEV[0]
    connection = sqlite3.connect(":memory:")
    make_spider.build(db, connection)
    for hard, reason in (
        ("Which?\n    SELECT name FROM telescopes", "no such table"),
        ("Which?\n    SELECT name FROM target\n\nWhich?\n    SELECT kind FROM target", "has its question twice"),
    ):
        with pytest.raises(ValueError, match=rf"{db.db_id}: .*{reason}.*Which\?"):
            grammar.pairs(db._replace(hard=hard), connection, 10)
    with pytest.raises(ValueError, match=rf"{db.db_id}: only \d+ of 500 pairs"):
        grammar.pairs(db, connection, 500)


def test_every_rule_finds_pairs():
    """A rule with a slot that nothing fills would be passed over in silence."""
    rules = grammar.rules(grammar.ONE_TABLE + grammar.LINKED)
    assert len(rules) >= 55 and len({rule.query for rule in rules}) == len(rules)
    found = Counter()
    for db in SPECS.values():
        connection = sqlite3.connect(":memory:")
        make_spider.build(db, connection)
        slots = grammar.Slots(db, connection, random.Random(1))
        for rule in rules:
            for _ in range(8):
                try:
                    pair = slots.pair(rule)
                except IndexError:
                    continue
                connection.execute(pair.query)
                found[rule.query] += grammar.fault(connection, pair.query, set()) is None
    assert min(found[rule.query] for rule in rules) >= 3


def test_a_condition_takes_an_alias_in_front_of_its_columns_alone():
    condition = grammar.Condition("name LIKE '%name%' AND day > {}", ("name", "day"), ("'a day'",))
    assert f"{condition}" == "name LIKE '%name%' AND day > 'a day'"
    assert f"{condition:T2}" == "T2.name LIKE '%name%' AND T2.day > 'a day'"


def test_words():
    for one, many in (
        ("number of pages", "numbers of pages"),
        ("city", "cities"),
        ("day", "days"),
        ("price per tonne", "prices per tonne"),
        ("status", "statuses"),
        ("date of birth", "dates of birth"),
    ):
        assert grammar.plural(one) == many
    assert grammar.spoken("2021-03-07") == "7 March 2021" and grammar.spoken(2.5) == "2.5"
    assert grammar.quoted("O'Dowd") == "'O''Dowd'" and grammar.quoted(3) == "3"
