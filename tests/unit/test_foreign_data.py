"""Data in other formats: two fields of JSONL, CSV, Parquet or hub data."""

from __future__ import annotations

import csv
import json

import datasets
import pytest
from conftest import message_row, write_rows

from llm_jepa.data.examples import (
    Example,
    ExampleError,
    Fields,
    Problems,
    data_sha256,
    dataset_name,
    is_hub,
    read_examples,
)

# Commas, quotes, a line break in a cell, text beyond ASCII, a line separator, and a cell over csv's own limit.
PAIRS = [("q, 1", "a1"), ('say "q2"', "a\n2"), ("Frage süß", "答え\u2028x"), ("q" * 200_000, "a4")]
FIELDS = Fields("question", "code")


def write(path, pairs):
    """Writes the fields question and code, and another one, in the format of the file's ending."""
    columns = {"other": ["1"] * len(pairs), "question": [q for q, _ in pairs], "code": [c for _, c in pairs]}
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    else:
        write_rows(path, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    return path


def read(path, fields: Fields | None = FIELDS, problems: Problems | None = None) -> list[Example]:
    return read_examples(str(path), problems or Problems(), fields)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.txt", "mine.csv", "mine.parquet"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_fields_become_views(name, system, tmp_path):
    path = write(tmp_path / name, PAIRS)
    examples = read(path, Fields("question", "code", system))
    assert [(e.system, e.user, e.assistant, e.id) for e in examples] == [
        (system, q, c, i) for i, (q, c) in enumerate(PAIRS, start=1)
    ]
    with pytest.raises(ExampleError, match=f"{name}.*'answer'.*'code'"):
        read(path, Fields("question", "answer"))


@pytest.mark.parametrize(("name", "place"), [("mine.jsonl", ":2"), ("mine.csv", ":3"), ("mine.parquet", ": row 2")])
def test_empty_value_is_reported_by_place_or_skipped(name, place, tmp_path):
    path = write(tmp_path / name, [PAIRS[0], ("q", " "), PAIRS[2]])
    with pytest.raises(ExampleError, match=f"{name}{place}: .*'code'"):
        read(path)
    problems = Problems(skip=True)
    assert [e.id for e in read(path, problems=problems)] == [1, 3]
    assert len(problems.messages) == 1


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("mine.csv", b"question,code\na\n", ":2"),
        ("mine.csv", b"question,code\na,b,c\n", ":2"),
        ("mine.csv", b'question,code\n"a,b\n', ""),
        ("mine.csv", b"question,code\na,b\nc,\xff\n", ""),
        ("mine.csv", b"question,code\n", ""),
        ("mine.csv", b"", ""),
        ("mine.parquet", b"PAR1 not really", ""),
        ("mine.jsonl", json.dumps({"question": "q", "code": 7}).encode(), ":1: .*'code'"),
    ],
)
def test_damaged_file_is_reported_by_place(name, content, place, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ExampleError, match=f"{name}{place}"):
        read(tmp_path / name)


def test_parquet_can_contain_the_projects_own_format(tmp_path):
    path = tmp_path / "own.parquet"
    datasets.Dataset.from_list([message_row("u", "a", "s"), message_row("v", "b", "s")]).to_parquet(path)
    assert [(e.system, e.user, e.assistant) for e in read(path, None)] == [("s", "u", "a"), ("s", "v", "b")]


@pytest.fixture
def hub(monkeypatch):
    """A hub with one dataset; returns the calls to it."""
    calls = []
    label = datasets.ClassLabel(names=["Bad", "Good"])
    features = datasets.Features({"comment": datasets.Value("string"), "label": label})
    rows = datasets.Dataset.from_dict({"comment": ["fine", "dull"], "label": [1, 0]}, features=features)

    def load_dataset(name, config, *, split, revision, streaming):
        calls.append((name, config, split, revision))
        if name != "owner/films":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return rows if split != "odd" else rows.select([0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("owner/films:test", ("owner/films", None, "test", None)),
        ("owner/films:plain_text:train", ("owner/films", "plain_text", "train", None)),
        ("owner/films:main:train@0a1b2c", ("owner/films", "main", "train", "0a1b2c")),
        ("owner/films:train[:100]@0a1b2c", ("owner/films", None, "train[:100]", "0a1b2c")),
    ],
)
def test_hub_dataset_is_given_by_name_config_split_and_revision(path, call, hub):
    examples = read(path, Fields("comment", "label"))
    assert hub == [call]
    assert [(e.user, e.assistant) for e in examples] == [("fine", "Good"), ("dull", "Bad")]  # names of the classes
    assert examples[1].source == f"{path}: row 2"
    assert dataset_name(path) == "films"


def test_missing_hub_dataset_is_an_error_and_checksum_depends_on_content(hub):
    with pytest.raises(ExampleError, match="owner/none:test"):
        read("owner/none:test")
    first = data_sha256("owner/films:test")
    assert first == data_sha256("owner/films:train") and len(first) == 64
    assert data_sha256("owner/films:odd") != first


def test_file_takes_precedence_over_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not any(map(is_hub, ("data/rows.jsonl", "rows.jsonl", str(tmp_path / "rows.jsonl"), "./a/b.csv")))
    assert is_hub("owner/name:test")
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name:test", PAIRS)
    assert not is_hub("owner/name:test") and len(read("owner/name:test")) == len(PAIRS)


@pytest.mark.parametrize(
    ("text", "place"),
    [("ask,sql,note\nq1,SELECT a\nFROM b,n3\n", ":2"), ("ask,sql,ask\nq1,SELECT a,q2\n", ":1")],
    ids=["unquoted newline", "field twice"],
)
def test_csv_rows_that_are_not_complete_are_errors(tmp_path, text, place):
    file = tmp_path / "pairs.csv"
    file.write_text(text)
    with pytest.raises(ExampleError, match=f"{file}{place}"):
        read_examples(str(file), Problems(), Fields("ask", "sql"))
