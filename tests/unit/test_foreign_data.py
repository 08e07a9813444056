"""Rows in formats that are not the project's own: fields of JSONL, CSV, Parquet and hub data, views, answers."""

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
    split_examples,
)

# Commas, quotes, a line break inside a cell, text beyond ASCII, and the line separator that splitlines would break at.
PAIRS = [("q, 1", "a1"), ('say "q2"', "a\n2"), ("Frage süß", "答え\u2028x"), ("q4", "a4")]
FIELDS = Fields("question", "code")


def as_jsonl(path, pairs):
    return write_rows(path, [{"question": q, "code": c, "other": 1} for q, c in pairs])


def as_csv(path, pairs):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["other", "question", "code"], *(["1", q, c] for q, c in pairs)])
    return path


def as_parquet(path, pairs):
    rows = {"question": [q for q, _ in pairs], "code": [c for _, c in pairs], "other": [1] * len(pairs)}
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return path


WRITERS = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}


def read(path, fields=FIELDS, skip=False):
    problems = Problems(skip)
    return read_examples(str(path), problems, fields), problems


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_fields_of_any_file_are_the_views(kind, system, tmp_path):
    path = WRITERS[kind](tmp_path / f"mine.{kind}", PAIRS)
    examples, _ = read(path, Fields("question", "code", system))
    assert [(e.system, e.user, e.assistant, e.id) for e in examples] == [
        (system, q, c, i) for i, (q, c) in enumerate(PAIRS, start=1)
    ]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_field_that_is_not_there_is_named_with_those_that_are(kind, tmp_path):
    path = WRITERS[kind](tmp_path / f"mine.{kind}", PAIRS)
    with pytest.raises(ExampleError, match=r"mine\..*: no field 'answer' \(there are .*'code'"):
        read(path, Fields("question", "answer"))


@pytest.mark.parametrize(
    ("kind", "place"), [("jsonl", "mine.jsonl:2"), ("csv", "mine.csv:3"), ("parquet", "mine.parquet: row 2")]
)
def test_an_empty_value_is_named_by_its_place_or_skipped(kind, place, tmp_path):
    path = WRITERS[kind](tmp_path / f"mine.{kind}", [PAIRS[0], ("q", " "), PAIRS[3]])
    with pytest.raises(ExampleError, match=f"{place}: field 'code' is empty"):
        read(path)
    examples, problems = read(path, skip=True)
    assert [e.id for e in examples] == [1, 3]
    assert len(problems.messages) == 1


def test_a_value_that_is_no_text_is_refused(tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", [{"question": "q", "code": 7}])
    with pytest.raises(ExampleError, match=r"mine.jsonl:1: field 'code' is int, not a string"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,code\na\n", r"mine.csv:2: the row has more or fewer cells"),
        (b"question,code\na,b,c\n", r"mine.csv:2: the row has more or fewer cells"),
        (b'question,code\n"a,b\n', r"mine.csv: not CSV behind line 1 "),
        (b"question,code\na,b\nc,\xff\n", r"mine.csv: not CSV behind line"),
        (b"question,code\n", r"mine.csv: no examples"),
        (b"", r"mine.csv: no examples"),
    ],
)
def test_a_damaged_csv_is_named(content, message, tmp_path):
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(ExampleError, match=message):
        read(tmp_path / "mine.csv")


def test_a_cell_may_be_longer_than_the_csv_module_s_own_limit(tmp_path):
    path = as_csv(tmp_path / "mine.csv", [("q" * 200_000, "a")])
    assert len(read(path)[0][0].user) == 200_000


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "mine.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ExampleError, match=r"mine.parquet: not Parquet"):
        read(tmp_path / "mine.parquet")


def test_parquet_may_hold_the_project_s_own_format(tmp_path):
    datasets.Dataset.from_list([message_row("u", "a", "s"), message_row("v", "b", "s")]).to_parquet(
        tmp_path / "own.parquet"
    )
    examples, _ = read(tmp_path / "own.parquet", fields=None)
    assert [(e.system, e.user, e.assistant) for e in examples] == [("s", "u", "a"), ("s", "v", "b")]


@pytest.fixture
def hub(monkeypatch):
    """A hub with one dataset; its calls are kept."""
    calls = []
    features = datasets.Features(
        {"comment": datasets.Value("string"), "label": datasets.ClassLabel(names=["Bad", "Good"])}
    )
    rows = datasets.Dataset.from_dict({"comment": ["fine", "dull"], "label": [1, 0]}, features=features)

    def load_dataset(name, config, *, split, revision):
        calls.append((name, config, split, revision))
        if name != "owner/films":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return rows

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
def test_a_hub_dataset_is_named_by_owner_config_split_and_revision(path, call, hub):
    examples, _ = read(path, Fields("comment", "label"))
    assert hub == [call]
    assert [(e.user, e.assistant) for e in examples] == [("fine", "Good"), ("dull", "Bad")]  # classes by their names
    assert examples[1].source == f"{path}: row 2"
    assert dataset_name(path) == "films"


def test_a_hub_dataset_that_is_not_there_is_named(hub):
    with pytest.raises(ExampleError, match=r"owner/none:test: cannot be loaded from the hub \(.*doesn't exist"):
        read("owner/none:test")


def test_checksum_of_hub_rows_is_of_their_content(hub, monkeypatch):
    first = data_sha256("owner/films:test")
    assert first == data_sha256("owner/films:train") and len(first) == 64
    other = datasets.Dataset.from_dict({"comment": ["fine", "odd"], "label": [1, 0]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: other)
    assert data_sha256("owner/films:test") != first


def test_a_file_is_never_taken_for_a_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("data/rows.jsonl", "rows.jsonl", str(tmp_path / "rows.jsonl"), "./a/b.csv"):
        assert not is_hub(path)
    (tmp_path / "owner").mkdir()
    as_jsonl(tmp_path / "owner" / "name:test", PAIRS)
    assert not is_hub("owner/name:test")
    assert len(read("owner/name:test")[0]) == len(PAIRS)


def test_views_and_answers_beside_the_messages(tmp_path):
    row = message_row("Which? A) x B) y", "A", "Choose.") | {
        "text": [{"role": "user", "content": "the context"}],
        "code": [{"role": "assistant", "content": "the ending"}],
        "answers": ["A", "the first"],
    }
    (example,), _ = read(write_rows(tmp_path / "rows.jsonl", [row]), fields=None)
    assert example == Example("Choose.", "Which? A) x B) y", "A", f"{tmp_path}/rows.jsonl:1", 1,
                              "the context", "the ending", ("A", "the first"))  # fmt: skip


def test_a_text_that_is_no_list_is_something_else(tmp_path):
    (example,), _ = read(write_rows(tmp_path / "rows.jsonl", [message_row("u", "a") | {"text": "<s>u a"}]), fields=None)
    assert example.text is None


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"text": [{"role": "assistant", "content": "x"}]}, '"text" is not a list of one user message'),
        ({"text": []}, '"text" is not a list of one user message'),
        ({"code": [{"role": "assistant", "content": " "}]}, 'content of the view "code" is empty'),
        ({"answers": []}, '"answers" is not a list of texts'),
        ({"answers": "A"}, '"answers" is not a list of texts'),
        ({"answers": ["A", 1]}, '"answers" is int, not a string'),
    ],
)
def test_a_bad_view_or_answer_is_named(extra, reason, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [message_row("u", "a") | extra])
    with pytest.raises(ExampleError) as error:
        read(path, fields=None)
    assert str(error.value) == f"{path}:1: {reason}"


def test_rows_are_json_lines_whatever_the_ending(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text(json.dumps({"question": "q", "code": "c"}) + "\n")
    assert read(path)[0][0].user == "q"


def test_a_field_that_a_csv_names_twice_is_refused(tmp_path):
    (tmp_path / "mine.csv").write_text("question,code,code\na,b,z\n")
    with pytest.raises(ExampleError, match="mine.csv:1: the field 'code' stands there twice"):
        read(tmp_path / "mine.csv")


def test_no_examples_cannot_be_split():
    with pytest.raises(ExampleError, match="a share of 0.2 cannot be held out of 0 examples"):
        split_examples([], 0.2, 42)
