"""llm_jepa/sweep.py: which cell is picked, and the contents of sweep.json."""

import itertools
import json
from pathlib import Path

import pytest
from synthetic_runs import JEPA, REGULAR, synthetic_run

from llm_jepa import sweep
from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, write_json

SPLIT = {"data_file": "datasets/synth_train.jsonl", "eval_split": 0.2, "split_seed": 42}


@pytest.fixture
def cell(tmp_path):
    """Makes the evaluation of a run on held-out examples; `score` in percent."""
    numbers = itertools.count()

    def make(score: float, seed: int = 42, arm: dict = JEPA, split: str = "test", **settings: object) -> Path:
        # `exact` does not decide and has the opposite order.
        scores = {"dfa_equal": score, "exact": 100 - score}
        folder = synthetic_run(tmp_path / f"run-{next(numbers)}", arm | SPLIT | settings, seed, scores) / "eval/synth"
        metrics = read_json(folder / "metrics.json")
        metrics["settings"] |= {"process_split": split}
        write_json(folder / "metrics.json", metrics)
        return folder

    return make


EQUAL = [  # learning rate, k, λ of the cell that is picked and of an equal one
    ((1e-3, 4, 4.0), (2e-3, 0, 0.5)),
    ((1e-3, 1, 4.0), (1e-3, 2, 0.5)),
    ((1e-3, 2, 0.5), (1e-3, 2, 1.0)),
    ((2e-5, 2, 2.0), (1e-3, 10, 10.0)),  # compared as numbers, not as text
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_cells_the_smallest_learning_rate_k_and_lambda_is_picked(cell, tmp_path, first, second, order):
    runs = [cell(15.0, seed, **dict(zip(sweep.SIGNS, first, strict=True))) for seed in (1, 2)]
    # The same mean, apart from rounding.
    runs += [cell(10.0 * seed, seed, **dict(zip(sweep.SIGNS, second, strict=True))) for seed in (1, 2)]
    picked = sweep.pick("jepa", runs[::order], tmp_path / "sweep.json")
    assert picked in [str(run.parents[1]) for run in runs[:2]]


def test_the_mean_over_seeds_decides_and_the_file_lists_both_arms(cell, tmp_path, capsys):
    regular = [cell(score, arm=REGULAR, learning_rate=lr) for lr, score in ((1e-3, 70.0), (2e-3, 75.0))]
    lucky = [cell(score, seed, lbd=1.0) for seed, score in ((7, 99.0), (9, 10.0))]
    steady = [cell(score, seed, lbd=2.0) for seed, score in ((7, 84.0), (9, 86.0))]
    file = tmp_path / "reports/new/sweep.json"
    assert sweep.pick("regular", regular, file) == str(regular[1].parents[1])
    assert sweep.pick("jepa", regular + lucky + steady, file) == str(steady[0].parents[1])
    assert "lr=0.001 k=1 λ=2" in capsys.readouterr().err
    written = json.loads(file.read_text())
    assert (written["score"], written["held_out"]) == ("dfa_equal", SPLIT | {"n": 2000})
    cells = [(cell["arm"], cell["lbd"], cell["score"]) for cell in written["cells"]]
    assert cells == [("jepa", 1.0, 0.545), ("jepa", 2.0, 0.85), ("regular", 0.1, 0.7), ("regular", 0.1, 0.75)]
    assert [run["run"] for run in written["runs"]] == [str(folder.parents[1]) for folder in regular + lucky + steady]
    assert written["runs"][-1]["scores"] == {"exact": 0.14, "startswith": 0.9, "stop_rate": 1.0, "dfa_equal": 0.86}


def test_an_auxiliary_loss_without_views_is_no_regular_arm(cell, tmp_path):
    runs = [cell(70.0, arm=REGULAR), cell(80.0, arm=REGULAR | {"stp": "geodesic", "stp_lbd": 0.02})]
    assert sweep.pick("regular", runs, tmp_path / "sweep.json") == str(runs[0].parents[1])
    assert sweep.pick("stp", runs, tmp_path / "sweep.json") == str(runs[1].parents[1])


@pytest.mark.parametrize("other", [{"split": "train"}, {"split_seed": 43}, {"num_epochs": 3}])
def test_cells_of_other_examples_or_settings_are_refused(cell, tmp_path, other):
    with pytest.raises(UsageError, match="run-1"):
        sweep.pick("jepa", [cell(50.0), cell(60.0, lbd=2.0, **other)], tmp_path / "sweep.json")
