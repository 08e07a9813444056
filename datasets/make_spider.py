"""Make the project's own small Spider-format set: databases, and pairs of question and SQL query.

    python datasets/make_spider.py [--output spider_data.zip]

It is laid out like the official Spider, so the official file can take its place, and is the same byte for byte on every
run and machine.
"""

import argparse
import io
import json
import random
import re
import sqlite3
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prepare import write_atomically
from spider_grammar import Pair, pairs, shuffled
from spider_spec import Database, Tables
from spider_specs_dev import DEV
from spider_specs_train import TRAIN

PAIRS = 50  # a database
SEED = 180908887  # of the order of the pairs
ZIP = Path(__file__).resolve().parents[1] / "spider_data.zip"

README = f"""\
A small data set in the format of Spider (arXiv 1809.08887), made by datasets/make_spider.py of the project LLM-JEPA.

  database/<db_id>/<db_id>.sqlite   a database; schema.sql beside it is its schema
  tables.json                       the schemas of all databases
  train_spider.json, dev.json       the pairs: db_id, query, query_toks, question, question_toks
  train_gold.sql, dev_gold.sql      the queries in the same order: a query, a tab, a db_id

{len(TRAIN)} databases are for training and {len(DEV)} others for development, with {PAIRS} pairs each. Schemas, names,
rows, questions and queries are invented. Nothing is from Spider, so figures measured here do not compare with those
published for it.

How a question is meant:
  - The columns of the answer stand in the order in which the question names them.
  - "Which" and "who", without more, ask for names or titles alone.
  - A list has a row for each thing, so a value may stand in it twice unless the question asks for different ones.
  - An unknown value is NULL: no comparison holds for it, and no average or extreme counts it.

Licence: Apache-2.0, as for the project.
"""


# ---- databases ----


def build(db: Database, connection: sqlite3.Connection) -> None:
    """Makes a database's tables and rows in an empty SQLite database."""
    connection.executescript(db.schema)
    rng = random.Random(zlib.crc32(db.db_id.encode()))
    tables: Tables = {}
    for name, make in db.rows.items():
        tables[name] = make(rng, tables)
        marks = ", ".join("?" * len(tables[name][0]))
        connection.executemany(f"INSERT INTO {name} VALUES ({marks})", tables[name])
    connection.commit()


def sqlite_file(db: Database) -> bytes:
    """A database's file, the same for every version of SQLite.

    The header (sqlite.org/fileformat2.html) tells which version wrote the file and counts the changes to it and to its
    schema; no reader needs these fields, so they are set to fixed values. What else differs is a default or history:
    the page size and auto_vacuum are set, and VACUUM lays the pages out anew.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new.sqlite"
        connection = sqlite3.connect(path)
        connection.executescript("PRAGMA page_size = 4096; PRAGMA encoding = 'UTF-8'; PRAGMA auto_vacuum = NONE;")
        build(db, connection)
        connection.execute("VACUUM")
        connection.close()
        content = bytearray(path.read_bytes())
    for offset, value in HEADER.items():
        content[offset : offset + 4] = value.to_bytes(4, "big")
    return bytes(content)


# The two change counters have to agree, else SQLite does not trust the file's size in the header.
HEADER = {24: 1, 40: 1, 92: 1, 96: 3_000_000}


def schema_entry(db_id: str, connection: sqlite3.Connection) -> dict[str, Any]:
    """A database's entry in tables.json, read from the database itself; columns are numbered over all tables from 1."""
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns, types, keys = [(-1, "*")], ["text"], []
    for i, table in enumerate(tables):
        for _, name, kind, _, _, is_key in connection.execute(f"PRAGMA table_info({table})"):
            columns.append((i, name))
            types.append(TYPES[kind])
            keys += [len(columns) - 1] if is_key else []
    links = [
        (columns.index((i, fk)), columns.index((tables.index(parent), key)))
        for i, table in enumerate(tables)
        for _, _, parent, fk, key, *_ in connection.execute(f"PRAGMA foreign_key_list({table})")
    ]
    return {
        "column_names": [(i, name.replace("_", " ").lower()) for i, name in columns],
        "column_names_original": columns,
        "column_types": types,
        "db_id": db_id,
        "foreign_keys": sorted(links),
        "primary_keys": keys,
        "table_names": [name.replace("_", " ").lower() for name in tables],
        "table_names_original": tables,
    }


TYPES = {"INTEGER": "number", "REAL": "number", "TEXT": "text", "DATE": "time"}


# ---- the set ----


def pair_entry(db_id: str, pair: Pair) -> dict[str, Any]:
    """A pair's entry in train_spider.json or dev.json."""
    return {
        "db_id": db_id,
        "query": pair.query,
        "query_toks": re.findall(r"'(?:[^']|'')*'|[\w.]+|[<>]=|<>|\S", pair.query),
        "question": pair.question,
        "question_toks": re.findall(r"\w+(?:[-'.&:/]\w+)*|\S", pair.question),
    }


def json_list(entries: Sequence[dict[str, Any]]) -> bytes:
    """A JSON list with a line for each entry."""
    return ("[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]\n").encode()


def make() -> dict[str, bytes]:
    """The files of the set: name → content. Raises ValueError where a specification is at fault."""
    files: dict[str, bytes] = {"README.txt": README.encode()}
    schemas, databases = [], {}
    rng = random.Random(SEED)
    for name, gold, dbs in (("train_spider.json", "train_gold.sql", TRAIN), ("dev.json", "dev_gold.sql", DEV)):
        entries = []
        for db in dbs:
            connection = sqlite3.connect(":memory:")
            build(db, connection)
            schemas.append(schema_entry(db.db_id, connection))
            entries += [pair_entry(db.db_id, pair) for pair in pairs(db, connection, PAIRS)]
            connection.close()
            databases[f"database/{db.db_id}/{db.db_id}.sqlite"] = sqlite_file(db)
            databases[f"database/{db.db_id}/schema.sql"] = db.schema.encode()
        entries = shuffled(rng, entries)  # so that the first rows are of every database
        files[name] = json_list(entries)
        files[gold] = "".join(f"{e['query']}\t{e['db_id']}\n" for e in entries).encode()
    return files | {"tables.json": json_list(schemas)} | databases


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip file of `files` below spider_data/: stored, as compressors differ, and without times or owners."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(f"spider_data/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, whatever the system: it says how to read the permissions
            info.external_attr = 0o100644 << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the set; exit 2 with one message where that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ZIP, help="zip file to write (default: spider_data.zip)")
    parser.add_argument("--overwrite", action="store_true", help="replace another file, such as the official one")
    args = parser.parse_args(argv)
    files = make()
    content = zipped(files)
    try:
        if args.output.exists() and args.output.read_bytes() != content and not args.overwrite:
            parser.error(f"--output {args.output} exists and is another file; give --overwrite to replace it")
        write_atomically(args.output, content)
    except OSError as error:
        parser.error(f"cannot write --output {args.output}: {error}")
    for name, dbs in (("train_spider.json", TRAIN), ("dev.json", DEV)):
        print(f"{name}: {len(json.loads(files[name]))} pairs on {len(dbs)} databases")
    print(f"{args.output}: {len(content)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
