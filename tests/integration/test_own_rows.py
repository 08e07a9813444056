"""Rows with fields of their own, from the command line of finetune.py and evaluate.py."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import datasets
import pytest
from conftest import GOLDEN, call, dry_run, message_row, same_weights, write_rows

from llm_jepa.files import sha256

PAIRS = [(f"the number {i}, and its square", f"({i})|[{i * i}]") for i in range(12)]
SYSTEM = "Write the regular expression."
FIELDS = ("--text_field", "question", "--code_field", "query")


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    own = write_rows(tmp_path / "own_train.jsonl", [message_row(q, c, SYSTEM) for q, c in PAIRS])
    lines = write_rows(tmp_path / "mine_train.jsonl", [{"question": q, "query": c} for q, c in PAIRS])
    with open(tmp_path / "mine_train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["query", "question"], *((c, q) for q, c in PAIRS)])
    parquet = tmp_path / "mine_train.parquet"
    datasets.Dataset.from_list([{"question": q, "query": c} for q, c in PAIRS]).to_parquet(parquet)
    return {"own": own, "jsonl": lines, "csv": tmp_path / "mine_train.csv", "parquet": parquet}


def train(data: Path, out: Path, *flags: object) -> Path:
    done = call("finetune", "--train_file", data, "--model_name", GOLDEN / "models" / "llama3", "--output_dir", out,
                "--predictors", 1, "--lbd", 1, "--learning_rate", "1e-3", "--num_epochs", 1, *flags)  # fmt: skip
    assert done.code == 0, done.err
    return out


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_named_fields_train_to_the_weights_of_the_same_rows_as_chats(kind, files, tmp_path):
    chats = train(files["own"], tmp_path / "chats", "--val_fraction", 0.25)
    fields = train(files[kind], tmp_path / "fields", *FIELDS, "--system", SYSTEM, "--val_fraction", 0.25)
    same_weights(chats, fields)
    record = json.loads((fields / "run.json").read_text())
    assert record["data_sha256"] == {str(files[kind]): sha256(files[kind])}


def test_an_eval_file_has_the_same_fields(files, tmp_path):
    run = train(files["csv"], tmp_path / "run", *FIELDS, "--eval_file", files["parquet"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_lm_loss" in line for line in lines)


def test_without_system_there_is_no_system_turn(files):
    with_, without = (
        dry_run(
            "--train_file", files["csv"], "--model_name", GOLDEN / "models" / "llama3", "--dry_run", 2, *FIELDS, *more
        )
        for more in (("--system", SYSTEM), ())
    )
    assert SYSTEM in with_["first_row"]["chat"] and SYSTEM not in without["first_row"]["chat"]
    assert with_["first_row"]["text_view"] == without["first_row"]["text_view"]


def test_hub_rows_train(files, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"question": q, "query": c} for q, c in PAIRS])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    hub = train("owner/pairs:main:train@0a1b", tmp_path / "hub", *FIELDS, "--system", SYSTEM)
    same_weights(train(files["own"], tmp_path / "chats"), hub)
    record = json.loads((hub / "run.json").read_text())
    assert list(record["data_sha256"]) == ["owner/pairs:main:train@0a1b"]


def test_evaluation_of_named_fields_is_that_of_the_same_rows_as_chats(files, tmp_path):
    run = train(files["own"], tmp_path / "run")
    common = ("--model_name", run, "--task", "text", "--max_new_tokens", 8)
    answers = []
    for name, flags in (("own", ()), ("csv", (*FIELDS, "--system", SYSTEM)), ("jsonl", (*FIELDS, "--system", SYSTEM))):
        out = tmp_path / name / "predictions.jsonl"
        done = call("evaluate", *common, "--input_file", files[name], "--output_file", out, *flags)
        assert done.code == 0, done.err
        answers.append([json.loads(line)["prediction"] for line in out.read_text().splitlines()])
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == len(PAIRS)


def test_another_system_turn_than_in_training_is_refused(files, tmp_path):
    run = train(files["csv"], tmp_path / "run", *FIELDS, "--system", SYSTEM)
    done = call("evaluate", "--model_name", run, "--input_file", files["csv"], "--task", "text", *FIELDS)
    assert done.code == 2
    assert f"was trained with --system {shlex.quote(SYSTEM)}" in done.err


def test_how_the_rows_stand_to_those_of_training_is_noted(files, tmp_path):
    run = train(files["own"], tmp_path / "run")

    def notes(name: str, file: Path, *flags: object) -> list[str]:
        out = tmp_path / name / "predictions.jsonl"
        where = ("--model_name", run, "--input_file", file, "--output_file", out, "--task", "text")
        done = call("evaluate", *where, "--max_new_tokens", 1, *flags)
        assert done.code == 0, done.err
        found = json.loads(out.with_name("metrics.json").read_text())["notes"]
        assert [f"evaluate.py: note: {note}" for note in found] == [x for x in done.err.splitlines() if "note:" in x]
        return found

    assert notes("same", files["own"]) == [f"{files['own']} has the examples that the run was trained on"]
    assert notes("fields", files["csv"], *FIELDS, "--system", SYSTEM) == []
    other = write_rows(tmp_path / "other.jsonl", [message_row("a", "b", None)])
    note = f"the examples' system turn is not the one that the run was trained with ({SYSTEM!r})"
    assert notes("other", other) == [note]
    assert notes("without", files["csv"], *FIELDS) == [note]
    bare = train(files["csv"], tmp_path / "bare", *FIELDS)
    done = call("evaluate", "--model_name", bare, "--input_file", files["csv"], "--task", "text", *FIELDS,
                "--system", SYSTEM)  # fmt: skip
    assert done.code == 2 and "without a system turn; leave out --system" in done.err


@pytest.mark.parametrize("script", ["finetune", "evaluate"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text_field", "a"), "give --text_field and --code_field together"),
        (("--code_field", "a"), "give --text_field and --code_field together"),
        (("--system", "a"), "--system: only with --text_field and --code_field"),
    ],
)
def test_half_of_the_flags_is_refused(script, flags, message):
    done = call(script, "--model_name", "m", *flags)
    assert done.code == 2
    assert message in done.err


def test_a_wrong_field_is_named_with_the_file_and_nothing_is_written(files, tmp_path):
    done = call("finetune", "--train_file", files["csv"], "--model_name", GOLDEN / "models" / "llama3",
                "--output_dir", tmp_path / "run", "--text_field", "question", "--code_field", "answer")  # fmt: skip
    assert done.code == 2
    assert "mine_train.csv:2: no field 'answer' (there are 'query', 'question')" in done.err
    assert not (tmp_path / "run").exists()
