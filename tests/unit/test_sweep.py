"""sweep.py: which cell is picked, what decides between equals, what is refused, what sweep.json holds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import call
from synthetic_runs import JEPA, REGULAR, change, synthetic_run

from llm_jepa.cli import UsageError
from llm_jepa.reports import sweep

SPLIT = {"data_file": "datasets/synth_train.jsonl", "eval_split": 0.2, "split_seed": 42}
HELD_OUT = SPLIT | {"sha256": "5c44", "n": 2000}


@pytest.fixture
def cell(tmp_path):
    """Makes a run scored on held-out rows: settings as keywords, `score` the task's in percent."""
    numbers = itertools.count()

    def make(score: float = 50.0, seed: int = 42, arm: str = "jepa", **settings: object) -> Path:
        settings = (JEPA if arm == "jepa" else REGULAR) | SPLIT | settings
        scores = {"dfa_equal": score, "exact": 100 - score}  # the score that must not decide says the opposite
        run = synthetic_run(tmp_path / f"run-{next(numbers)}", settings, seed, scores)
        evaluation = run / "eval/synth/metrics.json"
        how = json.loads(evaluation.read_text())["settings"] | {"process_split": "test"}
        change(run, "eval/synth/metrics.json", settings=how)
        return run

    return make


def found(*runs: Path) -> dict:
    return sweep.summary([sweep.read_cell(run) for run in runs])


def picked(*runs: Path, arm: str = "jepa") -> dict:
    arms = found(*runs)["arms"][arm]
    return arms["cells"][arms["picked"]]


# ---------------------------------------------------------------------------------------------------- reading a run


def test_a_cell_is_its_settings_what_it_was_scored_on_and_its_scores(cell):
    run = cell(75.0, seed=7, learning_rate=2e-3, predictors=3, lbd=0.5)
    assert sweep.read_cell(run) == {
        "arm": "jepa",
        "key": (2e-3, 3, 0.5),
        "held_out": HELD_OUT,
        "score": "dfa_equal",
        "seed": 7,
        "run": str(run),
        "scores": {"exact": 0.25, "startswith": 0.9, "stop_rate": 1.0, "dfa_equal": 0.75},
    }


def test_a_regular_cell_is_its_learning_rate_alone(cell):
    read = sweep.read_cell(cell(arm="regular", learning_rate=4e-3, predictors=9, lbd=9.0))
    assert (read["arm"], read["key"]) == ("regular", (4e-3,))


@pytest.mark.parametrize("status", ["running", "failed", "interrupted", None])
def test_a_run_that_is_not_finished_is_refused(cell, status):
    run = cell()
    change(run, "run.json", status=status)
    with pytest.raises(UsageError, match=f"{run.name}: not finished and evaluated once"):
        sweep.read_cell(run)


def test_a_run_that_is_not_evaluated_or_evaluated_twice_is_refused(cell):
    run = cell()
    other = run / "eval" / "turk"
    other.mkdir()
    (other / "metrics.json").write_bytes((run / "eval/synth/metrics.json").read_bytes())
    with pytest.raises(UsageError, match=f"{run.name}: not finished and evaluated once"):
        sweep.read_cell(run)
    for path in run.glob("eval/*/metrics.json"):
        path.unlink()
    with pytest.raises(UsageError, match=f"{run.name}: not finished and evaluated once"):
        sweep.read_cell(run)


@pytest.mark.parametrize("split", ["train", None])
def test_a_run_scored_on_rows_it_was_trained_on_or_on_a_test_file_is_refused(cell, split):
    run = cell()
    change(run, "eval/synth/metrics.json", settings={"process_split": split})
    with pytest.raises(UsageError, match=f"{run.name}: not scored on rows held out"):
        sweep.read_cell(run)
    with pytest.raises(UsageError, match="not scored on rows held out"):
        sweep.read_cell(cell(data_file=None))


@pytest.mark.parametrize("file", ["args.json", "run.json", "eval/synth/metrics.json"])
def test_a_damaged_file_is_named(cell, file):
    run = cell()
    (run / file).write_text('{"status": ')
    with pytest.raises(UsageError, match=file):
        sweep.read_cell(run)


# --------------------------------------------------------------------------------------------------------- picking


def test_the_mean_over_seeds_decides_and_not_the_best_seed(cell):
    luck = [cell(score, seed, lbd=1.0) for seed, score in ((1, 99.0), (2, 10.0), (3, 20.0))]
    steady = [cell(score, seed, lbd=2.0) for seed, score in ((1, 50.0), (2, 52.0), (3, 48.0))]
    best = picked(*luck, *steady)
    assert (best["lbd"], best["n_seeds"], best["by_seed"]) == (2.0, 3, {1: 0.5, 2: 0.52, 3: 0.48})
    assert best["score"] == pytest.approx(0.5)
    assert best["runs"] == [str(run) for run in steady]


def test_the_headline_score_decides_and_not_exact(cell):
    assert picked(cell(30.0, lbd=1.0), cell(60.0, lbd=2.0), cell(40.0, lbd=4.0))["lbd"] == 2.0


EQUALS = [
    ("learning_rate", {"learning_rate": 1e-3, "predictors": 4, "lbd": 4.0}, {"learning_rate": 2e-3, "predictors": 0,
                                                                            "lbd": 0.5}),
    ("k", {"learning_rate": 1e-3, "predictors": 1, "lbd": 4.0}, {"learning_rate": 1e-3, "predictors": 2, "lbd": 0.5}),
    ("λ", {"learning_rate": 1e-3, "predictors": 2, "lbd": 0.5}, {"learning_rate": 1e-3, "predictors": 2, "lbd": 1.0}),
    # As text 1e-3 would stand behind 2e-05, and 10 in front of 2.
    ("numbers", {"learning_rate": 2e-5, "predictors": 2, "lbd": 2.0}, {"learning_rate": 1e-3, "predictors": 10,
                                                                       "lbd": 10.0}),
]  # fmt: skip


@pytest.mark.parametrize(("by", "first", "second"), EQUALS, ids=[e[0] for e in EQUALS])
@pytest.mark.parametrize("order", [1, -1])
def test_between_equals_learning_rate_then_k_then_lambda_decides_in_whatever_order_they_come(
    cell, by, first, second, order
):
    runs = [cell(60.0, **first), cell(60.0, **second), cell(59.9, learning_rate=1e-9, predictors=0, lbd=0.1)][::order]
    arms = found(*runs)["arms"]["jepa"]
    best = arms["cells"][arms["picked"]]
    assert {name: best[name] for name in first} == first
    (equal,) = (arms["cells"][i] for i in arms["equal"])
    assert {name: equal[name] for name in second} == second


def test_a_cell_that_is_better_wins_over_the_first_of_the_grid(cell):
    arms = found(*(cell(score, lbd=lbd) for lbd, score in ((0.5, 50.0), (1.0, 50.05), (2.0, 50.0))))["arms"]["jepa"]
    assert (arms["picked"], arms["equal"]) == (1, [])


def test_means_that_rounding_alone_tells_apart_are_equal(cell):
    first = [cell(15.0, seed, lbd=0.5) for seed in (1, 2)]
    second = [cell(score, seed, lbd=1.0) for seed, score in ((1, 10.0), (2, 20.0))]
    assert 0.1 + 0.2 > 0.15 + 0.15
    arms = found(*first, *second)["arms"]["jepa"]
    assert (arms["picked"], arms["equal"]) == (0, [1])


def test_arms_are_picked_apart(cell):
    runs = [cell(90.0, arm="regular", learning_rate=2e-3), cell(80.0, arm="regular", learning_rate=1e-3)]
    runs += [cell(10.0, learning_rate=1e-3), cell(20.0, learning_rate=2e-3)]
    assert picked(*runs, arm="regular")["score"] == pytest.approx(0.9)
    assert picked(*runs)["score"] == pytest.approx(0.2)
    assert list(found(*runs)["arms"]) == ["regular", "jepa"]
    assert set(picked(*runs, arm="regular")) == {
        "learning_rate", "score", "by_seed", "n_seeds", "others", "runs",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- refusals

OTHER_ROWS = [
    ("args.json", {"data_file": "datasets/turk_train.jsonl"}, "turk_train.jsonl"),
    ("args.json", {"eval_split": 0.1}, "'eval_split': 0.1"),
    ("args.json", {"split_seed": 43}, "'split_seed': 43"),
    ("eval/synth/metrics.json", {"data_sha256": "ffff"}, "ffff"),
    ("eval/synth/metrics.json", {"n": 1999}, "1999"),
]


@pytest.mark.parametrize(("file", "changes", "named"), OTHER_ROWS, ids=[next(iter(c)) for _, c, _ in OTHER_ROWS])
def test_runs_scored_on_different_held_out_rows_are_refused(cell, file, changes, named):
    first, second, third = (cell(lbd=lbd) for lbd in (0.5, 1.0, 2.0))
    change(third, file, **changes)
    with pytest.raises(UsageError, match="held_out") as error:
        found(first, second, third)
    assert named in str(error.value) and third.name in str(error.value) and first.name in str(error.value)


def test_runs_scored_by_different_scores_are_refused(cell):
    runs = [cell(), cell(lbd=2.0)]
    change(runs[1], "eval/synth/metrics.json", score="startswith")
    with pytest.raises(UsageError, match=f"{runs[1].name}: score is startswith, of .*{runs[0].name} dfa_equal"):
        found(*runs)


def test_the_arms_too_must_have_been_scored_on_the_same_rows(cell):
    with pytest.raises(UsageError, match="held_out"):
        found(cell(arm="regular"), cell(eval_split=0.3))


def test_cells_of_unequal_numbers_of_seeds_are_refused(cell):
    with pytest.raises(UsageError, match="same number of seeds"):
        found(cell(seed=1), cell(seed=2), cell(seed=1, lbd=2.0))
    found(cell(seed=1, arm="regular"), cell(seed=1), cell(seed=2))  # arms may differ in it: they are picked apart


# ------------------------------------------------------------------------------------------------- text and main


def test_describe_names_the_cells_the_pick_and_what_it_is_equal_to(cell):
    runs = [cell(score, predictors=k, lbd=lbd) for k, lbd, score in ((1, 0.5, 60), (1, 2.0, 60), (0, 1.0, 12.345))]
    assert sweep.describe("jepa", found(*runs)).splitlines() == [
        "jepa, dfa_equal on 2000 held-out rows of datasets/synth_train.jsonl",
        "  lr=0.001 k=0 λ=1            12.35 %",
        "  lr=0.001 k=1 λ=0.5          60.00 %",
        "  lr=0.001 k=1 λ=2            60.00 %",
        "  picked: lr=0.001 k=1 λ=0.5, the first by learning rate, k and λ of what is equal to lr=0.001 k=1 λ=2",
    ]
    alone = sweep.describe("regular", found(cell(arm="regular")))
    assert alone.splitlines()[-1] == "  picked: lr=0.001"


def test_main_prints_the_run_folder_and_writes_every_cell(cell, tmp_path):
    regular = [cell(score, arm="regular", learning_rate=lr) for lr, score in ((1e-3, 70.0), (2e-3, 75.0))]
    jepa = [cell(score, seed, lbd=lbd) for lbd, score in ((0.5, 80.0), (1.0, 85.0)) for seed in (7, 9)]
    file = tmp_path / "reports" / "new" / "sweep.json"
    done = call("llm_jepa.sweep", "--pick", "regular", "--output_file", file, *regular)
    assert (done.code, done.out) == (0, f"{regular[1]}\n")
    assert list(json.loads(file.read_text())["arms"]) == ["regular"]
    done = call("llm_jepa.sweep", "--pick", "jepa", "--output_file", file, *regular, *jepa)
    assert (done.code, done.out) == (0, f"{jepa[2]}\n"), "the first seed's run stands for the cell"
    assert "picked: lr=0.001 k=1 λ=1" in done.err
    written = json.loads(file.read_text())
    assert (written["score"], written["held_out"]) == ("dfa_equal", HELD_OUT)
    assert [c["learning_rate"] for c in written["arms"]["regular"]["cells"]] == [1e-3, 2e-3]
    best = written["arms"]["jepa"]
    assert (best["picked"], best["equal"], [c["lbd"] for c in best["cells"]]) == (1, [], [0.5, 1.0])
    assert best["cells"][0] == {
        "learning_rate": 1e-3, "predictors": 1, "lbd": 0.5, "score": 0.8, "by_seed": {"7": 0.8, "9": 0.8},
        "n_seeds": 2, "runs": [str(run) for run in jepa[:2]],
        "others": [sweep.read_cell(run)["scores"] for run in jepa[:2]],
    }  # fmt: skip


def test_main_names_what_is_wrong_and_writes_nothing(cell, tmp_path):
    file = tmp_path / "sweep.json"
    regular, broken = cell(arm="regular"), cell()
    done = call("llm_jepa.sweep", "--pick", "jepa", "--output_file", file, regular)
    assert done.code == 2 and done.err == "sweep.py: error: none of the runs is of arm jepa\n"
    change(broken, "run.json", status="running")
    done = call("llm_jepa.sweep", "--pick", "jepa", "--output_file", file, regular, broken)
    assert done.code == 2 and str(broken) in done.err and done.out == "" and not file.exists()
    (tmp_path / "taken").write_text("")
    done = call("llm_jepa.sweep", "--pick", "regular", "--output_file", tmp_path / "taken" / "sweep.json", regular)
    assert done.code == 2 and "taken" in done.err and done.out == ""
