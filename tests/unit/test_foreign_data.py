"""Data in other formats: two fields of JSONL, CSV, Parquet or hub data."""

import dataclasses
import gzip
import json
import zlib

import datasets
import pandas
import pyarrow as pa
import pytest
from conftest import message_row
from huggingface_hub.errors import HTTPError
from pyarrow import parquet

from llm_jepa.data.examples import ExampleError, Fields, Problems, data_sha256, dataset_name, is_hub, read_examples

# Commas, quotes, a line break in a cell, text beyond ASCII, a line separator, and a cell over csv's own limit.
PAIRS = [("q, 1", "a1"), ('say "q2"', "a\n2"), ("Frage süß", "答え\u2028x"), ("q" * 200_000, "a4")]
FIELDS = Fields("question", "code")


def write(path, pairs):
    """Writes the fields question and code, and another one, in the format of the file's ending."""
    frame = pandas.DataFrame(pairs, columns=["question", "code"]).assign(other="1")
    kind = "".join(path.suffixes[:1])
    if kind == ".parquet":
        frame.to_parquet(path)
    elif kind in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if kind == ".csv" else "\t")
    else:
        frame.to_json(path, orient="records", lines=kind != ".json", force_ascii=False)
    return path


def read(path, fields: Fields | None = FIELDS) -> list:
    return read_examples(str(path), Problems(), fields)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.txt", "mine.csv", "mine.parquet", "mine.json", "mine.tsv",
                                  "mine_test.jsonl.gz", "mine.json.gz", "mine.csv.gz"])  # fmt: skip
def test_fields_become_turns_and_views(name, tmp_path):
    path = write(tmp_path / name, PAIRS)
    examples = read(path, Fields("question", "code", "Be brief."))
    expected = [("Be brief.", q, c, i) for i, (q, c) in enumerate(PAIRS, start=1)]
    assert [(e.system, e.user, e.assistant, e.id) for e in examples] == expected
    own = read(path, dataclasses.replace(FIELDS, view_text="other", view_code="question"))
    assert [(e.system, e.user, e.assistant, e.text, e.code) for e in own] == [(None, q, c, "1", q) for q, c in PAIRS]
    assert dataset_name(str(path)) == "mine"
    with pytest.raises(ExampleError, match=f"{name}.*'answer'.*'code'"):
        read(path, Fields("question", "answer"))


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [("mine.csv", b"question,code\na\n", ":2"),
     ("mine.csv", b'question,code\n"a,b\n', ""),
     ("mine.parquet", b"PAR1 not really", ""),
     ("mine.jsonl", json.dumps({"question": "q", "code": 7}).encode(), ":1: .*'code'"),
     ("mine.csv", b'question,code\n"a\nb"," "\n', ":3: .*'code'"),
     ("mine.json", b'[{"question": "q", "code": "c"}, {"question": "q", "code": ""}]', ": entry 2: .*'code'"),
     ("mine.csv", 'question,code\na,b\n"c\nd",é\n'.encode("latin-1"), ":4: .*UTF-8"),
     ("mine.csv", "question,code\na,b\n".encode("utf-16"), ": .*UTF-8"),
     ("mine.json", '[\n{"question": "é"}]'.encode("latin-1"), ": .*UTF-8.*line 2"),
     ("mine.json", b'[\n{"question": "a"},\n{"code": }]', ": .*line 3"),
     ("mine.json", b'{\n"rows": []}', ":1: .*array"),
     ("mine.xlsx", b"PK\3\4\xff\xff", ":1: .*csv"),
     ("mine.json.gz", gzip.compress(b"[1, 2]" * 99, mtime=0)[:20], ""),
     ("mine.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + zlib.compress(b"x") + b"12345678", ""),
     ("mine.csv", b"question,code,note\nq1,SELECT a\nFROM b,n3\n", ":2"),
     ("mine.csv", b"question,code,question\nq1,SELECT a,q2\n", ":1")],
)  # fmt: skip
def test_damaged_file_is_reported_by_place(name, content, place, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ExampleError, match=f"{name}{place}"):
        read(tmp_path / name)


def test_columns_that_are_not_used_are_not_read(tmp_path):
    path, table = tmp_path / "wide.parquet", pa.table({"question": ["a", "b"], "code": ["c", "d"]})
    unusable = {
        "far": pa.array([2**55, None], pa.timestamp("ms")),
        "bytes": pa.array([b"\xff", b"\xfe"], pa.binary()).view(pa.string()),
    }
    for name, column in unusable.items():
        table = table.append_column(name, column)
    parquet.write_table(table, path)
    assert [(e.user, e.assistant) for e in read(path)] == [("a", "c"), ("b", "d")]
    for name in unusable:
        with pytest.raises(ExampleError, match=path.name):
            read(path, Fields("question", name))
    with pytest.raises(ExampleError, match="'messages'.*'question'.*--text_field"):
        read(path, None)
    own = pa.Table.from_pylist([message_row("u", "a")]).append_column("far", pa.array([2**55], pa.timestamp("ms")))
    parquet.write_table(own, path)
    assert [e.user for e in read(path, None)] == ["u"]
    parquet.write_table(table.append_column("code", table["code"]), path)
    with pytest.raises(ExampleError, match=f"{path.name}.*code"):
        read(path)


@pytest.fixture
def hub(monkeypatch):
    """A hub with one dataset; returns the calls to it."""
    calls = []
    label = datasets.ClassLabel(names=["Bad", "Good"])
    features = datasets.Features({"comment": datasets.Value("string"), "label": label})
    rows = datasets.Dataset.from_dict({"comment": ["fine", "dull"], "label": [1, 0]}, features=features)
    far = pa.array([2**55, 1], pa.timestamp("ms"))  # cannot be converted
    rows = datasets.concatenate_datasets([rows, datasets.Dataset(pa.table({"when": far}))], axis=1)

    def load_dataset(name, config, *, split, revision, streaming):
        calls.append((name, config, split, revision))
        if name != "owner/films":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return rows if split != "odd" else rows.select([0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("path", "call"),
    [("owner/films:test", ("owner/films", None, "test", None)),
     ("owner/films:main:train@0a1b2c", ("owner/films", "main", "train", "0a1b2c")),
     ("owner/films:train@refs/pr/3", ("owner/films", None, "train", "refs/pr/3")),
     ("owner/films:main:train[:9]+test[5:]@user/a@b", ("owner/films", "main", "train[:9]+test[5:]", "user/a@b"))],
)  # fmt: skip
def test_hub_dataset_is_given_by_name_config_split_and_revision(path, call, hub):
    examples = read(path, Fields("comment", "label"))
    assert hub == [call]
    assert [(e.user, e.assistant) for e in examples] == [("fine", "Good"), ("dull", "Bad")]  # names of the classes
    assert examples[1].source == f"{path}: row 2"
    assert dataset_name(path) == "films"


def test_missing_hub_dataset_is_an_error_and_checksum_depends_on_content(hub, monkeypatch):
    with pytest.raises(ExampleError, match="owner/none:test"):
        read("owner/none:test")
    fields = Fields("comment", "label")
    first = data_sha256("owner/films:test", fields)
    assert first == data_sha256("owner/films:train@refs/pr/3", fields) and len(first) == 64
    assert data_sha256("owner/films:odd", fields) != first

    def unreachable(*args, **kwargs):
        raise HTTPError("[Errno 111] Connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(ExampleError, match="owner/films:test.*refused"):
        data_sha256("owner/films:test", fields, streaming=True)


def test_glob_reads_the_files_in_order_with_one_numbering(tmp_path):
    for name, pairs in (("a.jsonl", PAIRS[:1]), ("b.csv", PAIRS[1:3]), ("c.jsonl.gz", PAIRS[3:])):
        write(tmp_path / name, pairs)
    path = str(tmp_path / "[a-c].*")
    assert [(e.user, e.id) for e in read(path)] == [(q, i) for i, (q, _) in enumerate(PAIRS, start=1)]
    assert read(path)[2].source.startswith(str(tmp_path / "b.csv"))
    assert dataset_name(str(tmp_path / "mine_*.c*")) == "mine_*" and dataset_name(path) == tmp_path.name
    first = data_sha256(path, FIELDS)
    write(tmp_path / "b.csv", PAIRS[:2])
    assert data_sha256(path, FIELDS) != first
    with pytest.raises(ExampleError, match="none"):
        read(tmp_path / "none*.jsonl")


def test_paths_of_files_are_no_hub_datasets(tmp_path):
    assert not any(map(is_hub, ("data/rows.jsonl", "rows.jsonl", str(tmp_path / "rows.jsonl"), "./a/b.csv",
                                  "data/run:1/rows.jsonl")))  # fmt: skip
    assert is_hub("owner/name:test")
