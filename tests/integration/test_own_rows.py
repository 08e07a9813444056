"""Data with field names of its own, from the command line of finetune.py and evaluate.py."""

import csv
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, call, column, dry_run, message_row, predictions, read_lines, same_weights, train, write_rows

from llm_jepa.files import read_json, sha256
from llm_jepa.scoring import tasks

PAIRS = [(f"the number {i}, and its square", f"({i})|[{i * i}]") for i in range(12)]
SYSTEM = "Write the regular expression."
FIELDS = ("--text_field", "question", "--code_field", "query")
OWN = (*FIELDS, "--system", SYSTEM)
FLAGS = ("--predictors", 1, "--lbd", 1, "--num_epochs", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The same examples as chats and with fields of their own."""
    folder = tmp_path_factory.mktemp("files")
    chats = write_rows(folder / "chats_train.jsonl", [message_row(q, c, SYSTEM) for q, c in PAIRS])
    with open(folder / "own_train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["query", "question"], *((c, q) for q, c in PAIRS)])
    return {"chats": chats, "csv": folder / "own_train.csv"}


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    flags = {"chats": (), "csv": OWN, "bare": FIELDS}
    return {n: train(files.get(n, files["csv"]), folder / n, *FLAGS, *f) for n, f in flags.items()}


@pytest.mark.parametrize("kind", ["csv", "hub"])
def test_own_fields_train_to_the_same_weights_as_chats(kind, files, runs, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"question": q, "query": c} for q, c in PAIRS])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    name = str(files.get(kind, "owner/pairs:main:train@refs/pr/1"))
    run = train(name, tmp_path / "run", *FLAGS, *OWN)
    same_weights(runs["chats"], run)
    checksums = read_json(run / "run.json")["data_sha256"]
    assert list(checksums) == [name] and (kind == "hub" or checksums[name] == sha256(name))


def test_own_fields_predict_as_chats_and_check_the_system_turn(files, runs, tmp_path):
    for run, flags in (("csv", FIELDS), ("bare", OWN)):
        fields = ("--input_file", files["csv"], "--task", "text", *flags)
        assert "--system" in call("evaluate", "--model_name", runs[run], *fields, code=2).err
    other, found = write_rows(tmp_path / "other.jsonl", [message_row("a", "b", None)]), {}
    for name, file, flags, expected in (
        ("same", files["chats"], (), "trained on"),
        ("fields", files["csv"], OWN, None),
        ("other", other, (), "system turn"),
        ("without", files["csv"], FIELDS, "system turn"),
    ):
        found[name] = predictions(runs["chats"], file, tmp_path / name, *flags)
        notes = read_json(tmp_path / name / "metrics.json")["notes"]
        assert [expected in note for note in notes] == ([True] if expected else []), name
    assert found["fields"] == found["same"] and len(found["same"]) == len(PAIRS)


def test_file_of_chats_pairs_and_answers_trains_and_is_evaluated(tmp_path):
    pairs = [{"text": "t 1", "code": "c 1"}, {"text": "t 2", "code": "c 2"}]
    replay = {"prompt": "p", "completion": "a", "pair": False}
    rows = [*(message_row(f"q {i}", f"a {i}") for i in range(6)), *pairs, replay]
    data = write_rows(tmp_path / "mixed_train.jsonl", rows)
    sizes = ("--batch_size", 9, "--grad_accum", 1, "--num_epochs", 1, "--eval_file", data, "--eval_generate", 9)
    run = train(data, tmp_path / "run", *FLAGS, *sizes, "--jepa_ratio", 0.5, "--task", "text")
    (pairs_of_step,) = column(run, "pairs")
    assert 0 < pairs_of_step < 8 and column(run, "eval_exact")
    regular = train(data, tmp_path / "regular", "--regular", *sizes)
    assert column(regular, "label_tokens") == column(run, "label_tokens")
    predictions(run, data, tmp_path / "out")
    found = read_json(tmp_path / "out" / "metrics.json")
    assert (found["n"], found["retrieval"]["n"]) == (7, 6)
    flags = ("--model_name", run, "--input_file", data, "--similarity", "--output_file", tmp_path / "similarity.json")
    assert call("evaluate", *flags).code == 0 and read_json(tmp_path / "similarity.json")["n"] == 8
    views = write_rows(tmp_path / "views.jsonl", pairs)
    found = call("llm_jepa.search", run, "--corpus", write_rows(tmp_path / "corpus.jsonl", [replay, *pairs]), "t 1")
    assert sorted(line.split("\t")[1:] for line in found.out.splitlines()) == [["2", "c 1"], ["3", "c 2"]]
    first = write_rows(tmp_path / "first.jsonl", [*pairs, *pairs, *rows])  # views only come first
    assert dry_run("--train_file", first, "--model_name", run, "--regular", "--dry_run", 5)["label_tokens"]
    files = ("--train_file", data, "--eval_file", views, "--output_dir", tmp_path / "x")
    assert "chat" in call("finetune", "--model_name", run, *files, code=2).err and not (tmp_path / "x").exists()


def test_task_file_scores_in_training_and_in_evaluation(files, runs, tmp_path):
    task = ROOT / "examples" / "edit_similarity.py"
    flags = ("--eval_file", files["chats"], "--eval_generate", 12, "--task", task)
    run = train(files["chats"], tmp_path / "run", *FLAGS, *flags)
    call("evaluate", "--model_name", run, "--input_file", files["chats"], "--task", task, code=0)
    found, name = read_json(run / "eval" / "chats" / "metrics.json"), "edit_similarity"
    values = [row[name] for row in read_lines(run / "eval" / "chats" / "predictions.jsonl")]
    assert found["task"] == found["score"] == name and found["scores"] == [name] and len(set(values)) > 2
    assert found[name] == pytest.approx(sum(values) / 12) and found["ci95"][name] == tasks.interval(values)
    assert column(run, f"eval_{name}")[-1] == pytest.approx(found[name])
    shown = call("llm_jepa.report", run).out
    assert name in shown and f"{100 * found[name]:.2f}" in shown
    task = tmp_path / "wrong.py"
    for text, message in (
        ("def score(generation, example):\n    return {}['x']", f"{files['chats']}:1: "), ("", "no attribute"),
        ("def score(generation, example):\n    return 2", f"{files['chats']}:1: "), ("import nowhere", "nowhere"),
        ("raise SystemExit(0)", "SystemExit"),
    ):  # fmt: skip
        task.write_text(text)
        tasks.file_task.cache_clear()
        done = call("evaluate", "--score_gold", "--input_file", files["chats"], "--task", task, code=2)
        assert str(task) in done.err and message in done.err, done.err
    task.write_text("def score(generation, example):\n    return 2")
    tasks.file_task.cache_clear()
    where = ("--train_file", files["chats"], "--model_name", run, "--output_dir", tmp_path / "new")
    assert "returns 2" in call("finetune", *where, *FLAGS, *flags[:4], "--task", task, code=2).err
    assert not (tmp_path / "new").exists()  # found before the first step
    for name in ("score.py", "processes.py"):
        flags = ("--score_gold", "--input_file", files["chats"], "--task", name)
        assert "rename" in call("evaluate", *flags, code=2).err
