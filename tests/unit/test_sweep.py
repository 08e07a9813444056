"""llm_jepa/reports/sweep.py: which cell is picked, and which runs cannot be compared."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import call
from synthetic_runs import JEPA, REGULAR, change, synthetic_run

from llm_jepa.reports import sweep

SPLIT = {"data_file": "datasets/synth_train.jsonl", "eval_split": 0.2, "split_seed": 42}
METRICS = "eval/synth/metrics.json"


@pytest.fixture
def cell(tmp_path):
    """Makes a run that was evaluated on held-out examples; `score` in percent."""
    numbers = itertools.count()

    def make(score: float = 50.0, seed: int = 42, arm: str = "jepa", **settings: object) -> Path:
        settings = (JEPA if arm == "jepa" else REGULAR) | SPLIT | settings
        scores = {"dfa_equal": score, "exact": 100 - score}  # exact, which does not decide, has the opposite order
        run = synthetic_run(tmp_path / f"run-{next(numbers)}", settings, seed, scores)
        change(run, METRICS, settings={"process_split": "test"})
        return run

    return make


def ranked(*runs: Path, arm: str = "jepa") -> dict:
    return sweep.summarize([sweep.read_run(run) for run in runs])["arms"][arm]


def test_the_mean_over_seeds_decides(cell):
    luck = [cell(score, seed, lbd=1.0) for seed, score in ((1, 99.0), (2, 10.0), (3, 20.0))]
    steady = [cell(score, seed, lbd=2.0) for seed, score in ((1, 50.0), (2, 52.0), (3, 48.0))]
    arm = ranked(*luck, *steady)
    best = arm["cells"][arm["picked"]]
    assert (best["lbd"], best["score"], best["n_seeds"], arm["equal"]) == (2.0, pytest.approx(0.5), 3, [])
    assert best["runs"] == [str(run) for run in steady]


EQUAL = [  # learning rate, k, λ of the cell that is picked and of an equal one
    ((1e-3, 4, 4.0), (2e-3, 0, 0.5)),
    ((1e-3, 1, 4.0), (1e-3, 2, 0.5)),
    ((1e-3, 2, 0.5), (1e-3, 2, 1.0)),
    ((2e-5, 2, 2.0), (1e-3, 10, 10.0)),  # compared as numbers, not as text
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
@pytest.mark.parametrize("order", [1, -1])
def test_of_equal_cells_the_smallest_learning_rate_k_and_lambda_is_picked(cell, first, second, order):
    pairs = [(cell(15.0, s, **dict(zip(sweep.KEY, first, strict=True))), s) for s in (1, 2)]
    # The same mean, apart from rounding.
    pairs += [(cell(score, s, **dict(zip(sweep.KEY, second, strict=True))), s) for s, score in ((1, 10.0), (2, 20.0))]
    arm = ranked(*(run for run, _ in pairs[::order]))
    keys = [tuple(arm["cells"][i][name] for name in sweep.KEY) for i in (arm["picked"], *arm["equal"])]
    assert keys == [first, second]


REFUSED = [
    ("run.json", {"status": "running"}),
    (METRICS, {"settings": {"process_split": "train"}}),
    (METRICS, {"data_sha256": "ffff"}),
    (METRICS, {"score": "startswith"}),
    ("args.json", {"data_file": None}),
    ("args.json", {"eval_split": 0.1}),
    ("args.json", {"finetune_seed": 7}),
]


@pytest.mark.parametrize(("file", "changes"), REFUSED)
def test_runs_that_cannot_be_compared_are_refused(cell, tmp_path, file, changes):
    runs = [cell(), cell(lbd=2.0)] + ([cell()] if "finetune_seed" in changes else [])
    change(runs[-1], file, **changes)
    done = call("llm_jepa.sweep", "--pick", "jepa", "--output_file", tmp_path / "sweep.json", *runs)
    assert (done.code, done.out) == (2, "") and not (tmp_path / "sweep.json").exists()
    assert runs[-1].name in done.err or "seeds" in done.err


def test_main_prints_the_run_folder_and_writes_both_arms(cell, tmp_path):
    regular = [cell(score, arm="regular", learning_rate=lr) for lr, score in ((1e-3, 70.0), (2e-3, 75.0))]
    jepa = [cell(score, seed, lbd=lbd) for lbd, score in ((0.5, 80.0), (1.0, 85.0)) for seed in (7, 9)]
    file = tmp_path / "reports" / "new" / "sweep.json"
    done = call("llm_jepa.sweep", "--pick", "regular", "--output_file", file, *regular)
    assert (done.code, done.out) == (0, f"{regular[1]}\n") and list(json.loads(file.read_text())["arms"]) == ["regular"]
    done = call("llm_jepa.sweep", "--pick", "jepa", "--output_file", file, *regular, *jepa)
    assert (done.code, done.out) == (0, f"{jepa[2]}\n") and "lr=0.001 k=1 λ=1" in done.err
    written = json.loads(file.read_text())
    assert (written["score"], written["held_out"]) == ("dfa_equal", SPLIT | {"sha256": "5c44", "n": 2000})
    first, best = written["arms"]["jepa"]["cells"]
    assert (best["by_seed"], best["runs"]) == ({"7": 0.85, "9": 0.85}, [str(run) for run in jepa[2:]])
    assert first["others"][0] == {"exact": 0.2, "startswith": 0.9, "stop_rate": 1.0, "dfa_equal": 0.8}
    assert set(written["arms"]["regular"]["cells"][0]) == {"learning_rate", *set(first) - set(sweep.KEY)}
