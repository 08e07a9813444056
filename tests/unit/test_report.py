"""python -m llm_jepa.report: which runs are averaged, which are skipped, and what is printed."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_runs import FEW, JEPA, METRICS, change, one_arm, pretrained_run, synthetic_run

from llm_jepa import run_folder
from llm_jepa.report import main
from llm_jepa.reports.results import read_run


@pytest.fixture
def tables(capsys):
    """The tables that a report of the runs prints, as rows of cells; each starts with its title."""

    def report(runs: list) -> list[list[list[str]]]:
        assert main([str(run) for run in runs]) == 0
        blocks = capsys.readouterr().out.strip().split("\n\n")
        return [[re.split(r" {2,}", line) for line in block.splitlines()] for block in blocks]

    return report


def test_table_has_mean_and_sample_sd(tmp_path, tables):
    # 50, 60, 70: mean 60, sd √((100 + 0 + 100) / 2) = 10; 145, 142, 142 s: mean 143, sd √((4 + 1 + 1) / 2) = 1.73
    ((title, *rows),) = tables(one_arm(tmp_path, "jepa", JEPA, {82: 50.0, 23: 60.0, 37: 70.0}))
    assert title == ["synth (2000 examples), models/tiny, JEPA λ=1, k=1"]
    assert rows == [
        ["seed", "exact %", "startswith %", "stop_rate %", "train s"],
        ["82", "50.00", "90.00", "100.00", "145.00"],
        ["23", "60.00", "90.00", "100.00", "142.00"],
        ["37", "70.00", "90.00", "100.00", "142.00"],
        ["mean ± sd (n = 3)", "60.00 ± 10.00", "90.00 ± 0.00", "100.00 ± 0.00", "143.00 ± 1.73"],
    ]


def test_single_run_has_no_sd_and_multiple_choice_no_stop_rate(tmp_path, tables):
    run = synthetic_run(tmp_path / "a", JEPA, 82, {"exact": 50.0, "choice": 30.0})
    change(run, METRICS, stop_rate=None)
    (table,) = tables([run])
    assert table[1] == ["seed", "exact %", "startswith %", "choice %", "train s"]
    assert table[-1] == ["mean (n = 1)", "50.00", "90.00", "30.00", "145.00"]


OTHER_INPUTS = {
    "train data": ("run.json", {"data_sha256": {"train.jsonl": "a2"}}),
    "test data": (METRICS, {"data_sha256": "b3"}),
    "databases": (METRICS, {"databases_sha256": "b3"}),
    "evaluation": (METRICS, {"settings": {"model_name": "x", "max_new_tokens": 1}}),
    "scores": (METRICS, {"scores": ["dfa_equal"], "dfa_equal": 0.5}),
}


@pytest.mark.parametrize(("file", "changes"), OTHER_INPUTS.values(), ids=OTHER_INPUTS)
def test_runs_with_other_inputs_are_not_averaged(tmp_path, tables, file, changes):
    runs = one_arm(tmp_path, "jepa", JEPA, FEW)
    change(runs[1], file, **changes)
    assert [table[-1][0] for table in tables(runs)] == ["mean (n = 1)"] * 2


def test_run_with_two_evaluations_is_in_two_tables(tmp_path, tables):
    run = synthetic_run(tmp_path / "a", JEPA, 82, {"exact": 80.0})
    (run / "eval" / "turk").mkdir()
    (run / "eval/turk/metrics.json").write_text(json.dumps(json.loads((run / METRICS).read_text()) | {"exact": 0.3}))
    found = [(table[0][0].split()[0], table[-1][1]) for table in tables([run])]
    assert found == [("synth", "80.00"), ("turk", "30.00")]


def test_runs_from_models_pretrained_with_different_seeds_are_one_arm(tmp_path, tables):
    runs = []
    for lbd, seed, exact in ((0.5, 82, 50.0), (0.5, 23, 60.0), (2.0, 82, 70.0), (2.0, 23, 80.0)):
        runs.append(pretrained_run(tmp_path, f"lbd{lbd}", JEPA | {"lbd": lbd}, seed, exact))
    assert [table[-1][1] for table in tables(runs)] == ["55.00 ± 7.07", "75.00 ± 7.07"]
    change(tmp_path / "paraphrase-lbd0.5-s23", "run.json", data_sha256={"paraphrase_train.jsonl": "other"})
    assert [table[-1][0] for table in tables(runs[:2])] == ["mean (n = 1)"] * 2
    for run in map(Path, runs[2:]):  # runs record their base, so its folder may be gone
        model = json.loads((run / "args.json").read_text())["model_name"]
        change(run, "run.json", **run_folder.origin_of_model(model))
        shutil.rmtree(model)
    (table,) = tables(runs[2:])
    assert table[-1][1] == "75.00 ± 7.07" and "paraphrase-lbd2.0" in table[0][0]


def test_runs_with_other_batches_and_paths_are_averaged(tmp_path, tables):
    runs = one_arm(tmp_path, "jepa", JEPA, FEW)
    for run, path in zip(runs, ("datasets/a.jsonl", "/home/me/datasets/a.jsonl"), strict=True):
        change(run, "args.json", train_file=path, model_name=path, resume=run == runs[0])
        change(run, "run.json", data_sha256={path: "b0a8"}, model="models/tiny", base=None)
        change(run, METRICS, settings={"model_name": path, "max_new_tokens": 128, "batch_size": len(path)})
    (table,) = tables(runs)
    assert table[0][0].split(", ")[1] == "models/tiny" and len(table) == 5


def test_checksum_of_the_code_tells_equal_changes_from_others(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    script, module = tmp_path / "finetune.py", tmp_path / "llm_jepa" / "loss.py"
    module.parent.mkdir()

    def git(*command: str) -> None:
        subprocess.run(["git", "-C", tmp_path, *command], check=True, capture_output=True)

    def checksum(text: str, dirty: bool | None) -> str | None:
        script.write_text(text)
        found = run_folder.code_version()
        assert found["git_dirty"] is dirty and (found["git_commit"] is None) == (dirty is None)
        return found["code_sha256"]

    first = checksum("a", None)  # without a repository
    assert first != checksum("b", None) and first == checksum("a", None) is not None
    git("init", "-q"), git("add", "finetune.py")
    git("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "x")
    assert checksum("a", False) is None
    one = checksum("one", True)
    assert one != checksum("two", True) and one == checksum("one", True)
    (tmp_path / "notes.txt").write_text("no code")
    assert checksum("one", True) == one
    module.write_text("unknown to git")
    assert checksum("one", True) != one and checksum("a", False) is not None


DAMAGE = {
    "run.json": lambda run: run.rename(run.with_name("moved")),
    "running": lambda run: change(run, "run.json", status="running"),
    "not evaluated": lambda run: (run / METRICS).unlink(),
    "metrics.json": lambda run: (run / METRICS).write_text('{"task": "synth", "n": 2'),
    "'stop_rate'": lambda run: change(run, METRICS, stop_rate=...),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_damaged_run_is_reported_and_skipped(tmp_path, capsys, reason):
    runs = one_arm(tmp_path, "jepa", JEPA, {82: 50.0, 23: 60.0, 37: 70.0})
    DAMAGE[reason](Path(runs[1]))
    assert main(runs) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and runs[1] in err and reason in err
    assert "mean ± sd (n = 2)  60.00 ± 14.14" in out
    assert main([runs[1], "--output_dir", str(tmp_path / "out")]) == 1 and capsys.readouterr().err.count("\n") == 2


def test_each_seed_counts_once(tmp_path, capsys):
    runs = one_arm(tmp_path, "jepa", JEPA, FEW) + one_arm(tmp_path, "copy", JEPA, {82: 10.0})
    assert main(runs) == 1
    out, err = capsys.readouterr()
    assert runs[2] in err and runs[0] in err and "mean ± sd (n = 2)  85.00 ± 7.07" in out


def test_line_and_table_have_scores_failures_and_notes(tmp_path, capsys):
    (run,) = one_arm(tmp_path, "jepa", JEPA | {"shuffle_pairs": True}, {82: 57.294})
    change(run, METRICS, failures={"timeout": 3, "states": 1}, notes=["a note of evaluate.py"])
    (result,) = read_run(Path(run))
    scores = "exact 57.29 %  startswith 90.00 %  stop_rate 100.00 %  train 145.00 s"
    assert result.line().startswith(f"synth  JEPA (shuffled pairs) λ=1, k=1  seed 82  {scores}  ")
    assert main([run]) == 0
    for text in (result.line(), capsys.readouterr().out):
        assert "3 timeout, 1 states" in text and "a note of evaluate.py" in text


@pytest.mark.parametrize("flags", [["--against", "x"], ["--allow", "n"]], ids=str)
def test_flags_without_effect_are_refused(tmp_path, flags):
    with pytest.raises(SystemExit) as stopped:
        main([*one_arm(tmp_path, "a", JEPA, {82: 50.0}), *flags])
    assert stopped.value.code == 2
