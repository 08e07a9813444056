"""Data with field names of its own, from the command line of finetune.py and evaluate.py."""

from __future__ import annotations

import csv
import gzip
import json
import resource
from pathlib import Path

import datasets
import pytest
from conftest import GOLDEN, call, dry_run, message_row, predictions, same_weights, start, train, write_rows

from llm_jepa.files import read_json, sha256

PAIRS = [(f"the number {i}, and its square", f"({i})|[{i * i}]") for i in range(12)]
SYSTEM = "Write the regular expression."
FIELDS = ("--text_field", "question", "--code_field", "query")
OWN = (*FIELDS, "--system", SYSTEM)
FLAGS = ("--predictors", 1, "--lbd", 1, "--num_epochs", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The same examples as chats and in other formats."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"question": q, "query": c} for q, c in PAIRS]
    found = {name: folder / f"own_train.{name}" for name in ("jsonl", "csv", "parquet", "json.gz")}
    write_rows(found["jsonl"], rows)
    found["json.gz"].write_bytes(gzip.compress(json.dumps(rows, indent=2).encode()))
    with open(found["csv"], "w", newline="") as file:
        csv.writer(file).writerows([["query", "question"], *((c, q) for q, c in PAIRS)])
    datasets.Dataset.from_list(rows).to_parquet(found["parquet"])
    return found | {"chats": write_rows(folder / "chats_train.jsonl", [message_row(q, c, SYSTEM) for q, c in PAIRS])}


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    flags = {"chats": (), "csv": OWN, "bare": FIELDS}
    return {n: train(files.get(n, files["csv"]), folder / n, *FLAGS, *f) for n, f in flags.items()}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json.gz", "hub"])
def test_own_fields_train_to_the_same_weights_as_chats(kind, files, runs, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"question": q, "query": c} for q, c in PAIRS])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    name = str(files.get(kind, "owner/pairs:main:train@refs/pr/1"))
    run = train(name, tmp_path / "run", *FLAGS, *OWN)
    same_weights(runs["chats"], run)
    checksums = read_json(run / "run.json")["data_sha256"]
    assert list(checksums) == [name] and (kind == "hub" or checksums[name] == sha256(name))


def test_without_system_flag_there_is_no_system_turn(files):
    flags = ("--train_file", files["csv"], "--model_name", GOLDEN / "models" / "llama3", "--dry_run", 2)
    own, bare = (dry_run(*flags, *more)["first_row"] for more in (OWN, FIELDS))
    assert SYSTEM in own["chat"] and SYSTEM not in bare["chat"] and own["text_view"] == bare["text_view"]


def test_predictions_for_own_fields_are_those_for_chats(files, runs, tmp_path):
    kinds = {"chats": (), "csv": OWN, "jsonl": OWN}
    chats, *others = (predictions(runs["chats"], files[k], tmp_path / k, *flags) for k, flags in kinds.items())
    assert others == [chats] * 2 and len(chats) == len(PAIRS)


def test_system_turn_other_than_in_training_is_refused_or_noted(files, runs, tmp_path):
    for run, flags in (("csv", FIELDS), ("bare", OWN)):
        done = call("evaluate", "--model_name", runs[run], "--input_file", files["csv"], "--task", "text", *flags)
        assert done.code == 2 and "--system" in done.err
    other = write_rows(tmp_path / "other.jsonl", [message_row("a", "b", None)])
    for name, file, flags, expected in (
        ("same", files["chats"], (), "trained on"),
        ("fields", files["csv"], OWN, None),
        ("other", other, (), "system turn"),
        ("without", files["csv"], FIELDS, "system turn"),
    ):
        predictions(runs["chats"], file, tmp_path / name, *flags)
        notes = json.loads((tmp_path / name / "metrics.json").read_text())["notes"]
        assert [expected in note for note in notes] == ([True] if expected else []), name


def test_missing_field_is_reported_with_file_and_line(files, tmp_path):
    done = start(files["csv"], tmp_path / "run", "--text_field", "question", "--code_field", "answer")
    assert done.code == 2 and f"{files['csv']}:2: " in done.err and "'answer'" in done.err
    assert not (tmp_path / "run").exists()


def test_evaluation_names_the_file_that_cannot_be_written(files, runs, tmp_path):
    flags = ("--task", "text", "--max_new_tokens", 4, "--output_file", tmp_path / "out" / "p.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        done = call("evaluate", "--model_name", runs["chats"], "--input_file", files["chats"], *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 1 and "Traceback" not in done.err and str(tmp_path) in done.err.splitlines()[-1], done.err
