"""Picks the best cell of a grid by its task score on held-out training examples, for `run.sh sweep`.

A cell is a set of runs that differ only in their seed; its score is their mean. Of equal cells, the one with the
smallest learning rate, then k, then λ is picked.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_jepa.files import read_json, write_json

SIGNS = {"learning_rate": "lr", "predictors": "k", "lbd": "λ"}  # the settings of a grid, in the order of preference


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The scores in an evaluation folder RUN/eval/DATASET, and the settings of the run."""
    run, metrics = folder.parent.parent, read_json(folder / "metrics.json")
    settings = read_json(run / "args.json")
    regular = settings["regular"]
    held_out = {name: settings[name] for name in ("data_file", "eval_split", "split_seed")}
    return {
        "arm": "regular" if regular else "jepa",
        "key": tuple(settings[name] for name in SIGNS if name == "learning_rate" or not regular),
        "held_out": held_out | {"sha256": metrics["data_sha256"], "n": metrics["n"]},
        "score": metrics["score"],
        "seed": settings["finetune_seed"],
        "run": str(run),
        "scores": {name: metrics[name] for name in ("exact", "startswith", "stop_rate", *metrics["scores"])},
    }


def rank_cells(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """An arm's cells in the order of preference, the index of the picked one, and the indices of those equal to it."""
    cells = []
    for key, group in itertools.groupby(sorted(runs, key=lambda run: run["key"]), lambda run: run["key"]):
        members = list(group)
        by_seed = {run["seed"]: run["scores"][run["score"]] for run in members}
        mean = round(statistics.fmean(by_seed.values()), 12)  # equal means stay equal in floating point
        cells.append(
            dict(zip(SIGNS, key, strict=False))
            | {"score": mean, "by_seed": by_seed, "n_seeds": len(by_seed)}
            | {"others": [run["scores"] for run in members], "runs": [run["run"] for run in members]}
        )
    best = max(cell["score"] for cell in cells)
    picked, *equal = (i for i, cell in enumerate(cells) if cell["score"] == best)
    return {"picked": picked, "equal": equal, "cells": cells}


def pick(arm: str, evaluations: Iterable[Path], output_file: Path) -> str:
    """Writes the cells of both arms to a JSON file, prints this arm's and returns the first run folder of its best."""
    runs = [read_evaluation(folder) for folder in evaluations]
    names = dict.fromkeys(run["arm"] for run in runs)
    arms = {name: rank_cells(run for run in runs if run["arm"] == name) for name in names}
    score, held_out = runs[0]["score"], runs[0]["held_out"]
    output_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(output_file, {"score": score, "held_out": held_out, "arms": arms})
    print(f"{arm}, {score} on {held_out['n']} held-out examples of {held_out['data_file']}", file=sys.stderr)
    for i, cell in enumerate(arms[arm]["cells"]):
        label = " ".join(f"{sign}={cell[key]:g}" for key, sign in SIGNS.items() if key in cell)
        note = "  picked" if i == arms[arm]["picked"] else "  equal score" if i in arms[arm]["equal"] else ""
        print(f"  {label:26}{100 * cell['score']:7.2f} %{note}", file=sys.stderr)
    return arms[arm]["cells"][arms[arm]["picked"]]["runs"][0]
