"""report.py reads run folders alone, and averages only what may be averaged."""

import json
import re
from pathlib import Path

import pytest

from llm_jepa.reports.results import main, mean_sd

JEPA = {"model_name": "models/tiny", "regular": False, "lbd": 1.0, "predictors": 1, "learning_rate": 1e-3}
REGULAR = JEPA | {"regular": True, "lbd": 0.0, "predictors": 0}


def make_run(
    folder: Path, seed: int, exact: float, settings: dict | None = None, trained_on: str = "a1", **changes
) -> str:
    """A finished, evaluated run; `changes` replace keys of its metrics."""
    evaluation = folder / "eval" / "synth"
    evaluation.mkdir(parents=True)
    args = (settings or JEPA) | {
        "finetune_seed": seed,
        "output_dir": str(folder),
        "resume": seed == 37,
        "overwrite": False,
    }
    metrics = {"task": "synth", "n": 200, "exact": exact, "startswith": 0.9, "stop_rate": 1.0, "scores": [], "ci95": {}}
    metrics |= {"data_sha256": "b2", "settings": {"model_name": str(folder), "max_new_tokens": 128}}
    (folder / "args.json").write_text(json.dumps(args))
    record = {"status": "finished", "wall_seconds": 10.0 + seed, "data_sha256": {"train.jsonl": trained_on}}
    (folder / "run.json").write_text(json.dumps(record))
    (evaluation / "metrics.json").write_text(json.dumps(metrics | changes))
    return str(folder)


def rows(text: str) -> list[list[str]]:
    """The cells of printed lines, parted by two blanks or more."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip()]


def test_mean_and_sample_sd_against_hand_numbers(tmp_path, capsys):
    # 50, 60, 70: mean 60, sd √((100 + 0 + 100) / 2) = 10; 82, 23, 37 s on top of 10: mean 57.33, sd 30.83
    runs = [make_run(tmp_path / str(s), s, e) for s, e in ((82, 0.5), (23, 0.6), (37, 0.7))]
    assert main(runs) == 0
    out = rows(capsys.readouterr().out)
    assert out[0] == ["synth (200 examples), models/tiny, jepa"]
    assert out[1] == ["seed", "exact %", "startswith %", "stop_rate %", "train s"]
    assert out[2] == ["82", "50.00", "90.00", "100.00", "92.00"]
    assert [row[0] for row in out[2:5]] == ["82", "23", "37"], "in the order given"
    assert out[5] == ["mean ± sd (n = 3)", "60.00 ± 10.00", "90.00 ± 0.00", "100.00 ± 0.00", "57.33 ± 30.83"]
    assert len(out) == 6


def test_sd_divides_by_n_minus_one():
    assert mean_sd([1.0, 3.0]).strip() == "2.00 ± 1.41"


def test_one_run_has_no_sd(tmp_path, capsys):
    assert main([make_run(tmp_path / "a", 82, 0.5)]) == 0
    out = rows(capsys.readouterr().out)
    assert out[-1] == ["mean (n = 1)", "50.00", "90.00", "100.00", "92.00"]


def test_task_score_has_a_column(tmp_path, capsys):
    runs = [make_run(tmp_path / str(s), s, 0.5, scores=["dfa_equal"], dfa_equal=s / 100) for s in (20, 40)]
    assert main(runs) == 0
    out = rows(capsys.readouterr().out)
    assert out[1] == ["seed", "exact %", "startswith %", "dfa_equal %", "stop_rate %", "train s"]
    assert out[-1][3] == "30.00 ± 14.14"


def test_arms_are_never_averaged_together(tmp_path, capsys):
    runs = []
    for seed in (82, 23):
        runs.append(make_run(tmp_path / f"j{seed}", seed, 0.8))
        runs.append(make_run(tmp_path / f"r{seed}", seed, 0.4, REGULAR))
        runs.append(make_run(tmp_path / f"l{seed}", seed, 0.6, JEPA | {"lbd": 2.0}))
    assert main(runs) == 0
    blocks = [rows(block) for block in capsys.readouterr().out.strip().split("\n\n")]
    assert [block[0][0] for block in blocks] == [
        "synth (200 examples), models/tiny, jepa, lbd 1.0, predictors 1",
        "synth (200 examples), models/tiny, regular",
        "synth (200 examples), models/tiny, jepa, lbd 2.0, predictors 1",
    ]
    assert [block[-1][:2] for block in blocks] == [["mean ± sd (n = 2)", f"{mean}.00 ± 0.00"] for mean in (80, 40, 60)]


def test_runs_scored_on_other_examples_are_never_averaged_together(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", 82, 0.8), make_run(tmp_path / "b", 23, 0.4, n=20)]
    assert main(runs) == 0
    out = capsys.readouterr().out
    assert out.count("mean (n = 1)") == 2 and "± " not in out


def test_runs_with_other_scores_are_never_averaged_together(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", 82, 0.8), make_run(tmp_path / "b", 23, 0.4, scores=["dfa_equal"], dfa_equal=0.5)]
    assert main(runs) == 0
    assert [len(row) for row in rows(capsys.readouterr().out) if row[0] == "mean (n = 1)"] == [5, 6]


def test_a_run_evaluated_twice_has_a_block_a_dataset(tmp_path, capsys):
    run = Path(make_run(tmp_path / "a", 82, 0.8))
    other = run / "eval" / "turk"
    other.mkdir()
    metrics = json.loads((run / "eval/synth/metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(metrics | {"task": "turk", "exact": 0.3}))
    assert main([str(run)]) == 0
    blocks = [rows(block) for block in capsys.readouterr().out.strip().split("\n\n")]
    assert [(block[0][0].split()[0], block[-1][1]) for block in blocks] == [("synth", "80.00"), ("turk", "30.00")]


def without(path: str, name: str):
    def change(run: Path) -> None:
        record = json.loads((run / path).read_text())
        del record[name]
        (run / path).write_text(json.dumps(record))

    return change


def with_text(path: str, text: str):
    return lambda run: (run / path).write_text(text)


METRICS = "eval/synth/metrics.json"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / METRICS).unlink(), "not evaluated"),
        (with_text(METRICS, '{"task": "synth", "n": 2'), f"{METRICS}: cannot be read"),
        (with_text(METRICS, "[]"), f"{METRICS}: no valid scores"),
        (without(METRICS, "stop_rate"), f"{METRICS}: no valid stop_rate"),
        (with_text("run.json", '{"status": "running"}'), "running, not finished"),
        (with_text("run.json", '{"status": "failed"}'), "failed, not finished"),
        (with_text("run.json", ""), "run.json: cannot be read"),
        (without("run.json", "wall_seconds"), "run.json: no valid wall_seconds"),
        (lambda run: (run / "args.json").unlink(), "args.json: cannot be read"),
        (without("args.json", "finetune_seed"), "args.json: no valid finetune_seed"),
    ],
)
def test_bad_run_is_named_and_left_out(tmp_path, capsys, damage, reason):
    runs = [make_run(tmp_path / str(s), s, e) for s, e in ((82, 0.5), (23, 0.6), (37, 0.7))]
    damage(Path(runs[1]))
    assert main(runs) == 1
    out, err = capsys.readouterr()
    assert err.startswith("report.py: ") and err.count("\n") == 1
    assert runs[1] in err and reason in err
    assert rows(out)[-1][:2] == ["mean ± sd (n = 2)", "60.00 ± 14.14"]


@pytest.mark.parametrize("value", [57.29, -0.1, float("nan"), None, "0.5", True])
def test_a_score_that_is_no_fraction_is_refused(tmp_path, capsys, value):
    assert main([make_run(tmp_path / "a", 82, value)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "exact" in err


def test_missing_run_is_named(tmp_path, capsys):
    assert main([make_run(tmp_path / "a", 82, 0.5), str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'nowhere'}: no such run" in err and "n = 1" in out


def test_a_seed_counts_once(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", 82, 0.5), make_run(tmp_path / "copy", 82, 0.9), make_run(tmp_path / "b", 23, 0.5)]
    assert main(runs) == 1
    out, err = capsys.readouterr()
    assert str(tmp_path / "copy") in err and "seed 82" in err
    assert rows(out)[-1][:2] == ["mean ± sd (n = 2)", "50.00 ± 0.00"]


def test_line_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "a", 82, 0.57294)
    assert main(["--line", run]) == 0
    assert capsys.readouterr().out == (
        "synth  jepa  seed 82  exact 57.29 %  startswith 90.00 %  stop_rate 100.00 %  train 92.00 s\n"
    )
    with pytest.raises(SystemExit) as stopped:
        main(["--line", run, run])
    assert stopped.value.code == 2
    (Path(run) / METRICS).unlink()
    assert main(["--line", run]) == 1 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "changes",
    [{"trained_on": "a2"}, {"data_sha256": "b3"}, {"settings": {"model_name": "x", "max_new_tokens": 1}}],
    ids=["train data", "test data", "evaluation"],
)
def test_runs_on_other_data_or_evaluated_otherwise_are_never_averaged(tmp_path, capsys, changes):
    assert main([make_run(tmp_path / "a", 82, 0.2), make_run(tmp_path / "b", 23, 0.6, **changes)]) == 0
    assert capsys.readouterr().out.count("mean (n = 1)") == 2


def test_runs_evaluated_in_other_batches_are_averaged(tmp_path, capsys):
    batches = {82: {"batch_size": 64}, 23: {"batch_size": 8, "tokens_per_batch": 0}, 37: {"tokens_per_batch": 4096}}
    runs = []
    for seed, sizes in batches.items():
        run = Path(make_run(tmp_path / str(seed), seed, 0.5))
        metrics = json.loads((run / METRICS).read_text())
        metrics["settings"] |= sizes
        (run / METRICS).write_text(json.dumps(metrics))
        runs.append(str(run))
    assert main(runs) == 0
    assert "mean ± sd (n = 3)" in capsys.readouterr().out


def test_runs_from_models_pretrained_by_their_own_seeds_are_one_arm(tmp_path, capsys):
    def pretrained(seed: int, lbd: float, rows: str = "abc") -> str:
        folder = tmp_path / f"paraphrase-tiny-lbd{lbd}-s{seed}"
        folder.mkdir(exist_ok=True)
        (folder / "args.json").write_text(json.dumps(JEPA | {"lbd": lbd, "finetune_seed": seed}))
        (folder / "run.json").write_text(json.dumps({"data_sha256": {"paraphrase_train.jsonl": rows}}))
        return str(folder)

    runs = [
        make_run(tmp_path / f"{seed}-{lbd}", seed, exact, REGULAR | {"model_name": pretrained(seed, lbd)})
        for lbd, seed, exact in ((0.5, 82, 0.5), (0.5, 23, 0.6), (2.0, 82, 0.7), (2.0, 23, 0.8))
    ]
    assert main(runs) == 0
    out = rows(capsys.readouterr().out)
    assert [row[0] for row in out if len(row) == 1] == [
        f"synth (200 examples), paraphrase-tiny-lbd{lbd}, regular" for lbd in ("0.5", "2.0")
    ]
    assert [row[1] for row in out if row[0].startswith("mean")] == ["55.00 ± 7.07", "75.00 ± 7.07"]
    pretrained(23, 0.5, rows="other")
    assert main(runs[:2]) == 0
    assert "±" not in capsys.readouterr().out, "models pretrained on other rows are no one arm"


def test_answers_without_a_result_are_shown(tmp_path, capsys):
    run = make_run(tmp_path / "a", 82, 0.5, failures={"timeout": 3, "states": 1})
    assert main([run]) == 0
    assert "seed 82 without a result: 3 timeout, 1 states" in capsys.readouterr().out
    assert main(["--line", run]) == 0
    assert capsys.readouterr().out.rstrip().endswith("without a result: 3 timeout, 1 states")
    assert main([make_run(tmp_path / "b", 82, 0.5)]) == 0
    assert "without" not in capsys.readouterr().out


def test_what_evaluation_notes_of_the_rows_is_shown(tmp_path, capsys):
    assert main([make_run(tmp_path / "a", 82, 0.5, notes=["x.jsonl has the rows that the run was trained on"])]) == 0
    assert "seed 82 x.jsonl has the rows that the run was trained on" in capsys.readouterr().out


def test_answers_that_were_chosen_have_no_stop_rate(tmp_path, capsys):
    assert main([make_run(tmp_path / "a", 82, 0.5, stop_rate=None, scores=["choice"], choice=0.5)]) == 0
    assert rows(capsys.readouterr().out)[1] == ["seed", "exact %", "startswith %", "choice %", "train s"]
