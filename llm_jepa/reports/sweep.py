"""Picks the best cell of a grid by its task score on held-out training examples; `run.sh sweep` uses it.

    python -m llm_jepa.sweep --pick jepa --output_file sweep.json RUN…     prints the run folder of the best cell

A cell is a set of runs that differ only in their seed; its score is their mean. Of equal cells, the one with the
smallest learning rate, then k, then λ is picked. The file lists the cells of both arms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError, run_command
from llm_jepa.files import read_json, write_json

KEY = ("learning_rate", "predictors", "lbd")  # the settings of a grid; this order decides between equal cells
SPLIT = ("data_file", "eval_split", "split_seed")
SIGNS = {"learning_rate": "lr", "predictors": "k", "lbd": "λ"}


def read_run(run: Path) -> dict[str, Any]:
    """A run's settings, evaluation data and scores. Raises UsageError if it has no score on held-out examples."""
    settings, record = read_json(run / "args.json"), read_json(run / "run.json")
    found = sorted(run.glob("eval/*/metrics.json"))
    if record.get("status") != "finished" or len(found) != 1:
        raise UsageError(f"{run}: must be finished and evaluated once")
    metrics = read_json(found[0])
    if not settings["data_file"] or metrics["settings"]["process_split"] != "test":
        raise UsageError(f"{run}: was not evaluated on examples held out of its train file")
    names = ("exact", "startswith", "stop_rate", *metrics["scores"])
    return {
        "arm": "regular" if settings["regular"] else "jepa",
        "key": tuple(settings[name] for name in KEY[: 1 if settings["regular"] else 3]),
        "held_out": {name: settings[name] for name in SPLIT} | {"sha256": metrics["data_sha256"], "n": metrics["n"]},
        "score": metrics["score"],
        "seed": settings["finetune_seed"],
        "run": str(run),
        "scores": {name: metrics[name] for name in names},
    }


def rank_cells(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's cells in the order of KEY, the index of the picked one, and the indices of the cells equal to it."""
    cells = []
    for key in sorted({run["key"] for run in runs}):
        members = [run for run in runs if run["key"] == key]
        by_seed = {run["seed"]: run["scores"][run["score"]] for run in members}
        mean = round(statistics.fmean(by_seed.values()), 12)  # equal means stay equal in floating point
        cells.append(
            dict(zip(KEY, key, strict=False))
            | {"score": mean, "by_seed": by_seed, "n_seeds": len(by_seed)}
            | {"others": [run["scores"] for run in members], "runs": [run["run"] for run in members]}
        )
    best = max(cell["score"] for cell in cells)
    equal = [i for i, cell in enumerate(cells) if cell["score"] == best]
    return {"picked": equal[0], "equal": equal[1:], "cells": cells}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of sweep.json. Raises UsageError if the runs cannot be compared."""
    for name in ("held_out", "score"):
        for run in runs:
            if run[name] != runs[0][name]:
                raise UsageError(f"{run['run']}: {name} is {run[name]}, of {runs[0]['run']} {runs[0][name]}")
    names = dict.fromkeys(run["arm"] for run in runs)
    arms = {name: rank_cells([run for run in runs if run["arm"] == name]) for name in names}
    if any(len({cell["n_seeds"] for cell in arm["cells"]}) > 1 for arm in arms.values()):
        raise UsageError("the cells have different numbers of seeds")
    return {"score": runs[0]["score"], "held_out": runs[0]["held_out"], "arms": arms}


def describe(arm: str, found: dict[str, Any]) -> str:
    """The cells of an arm, one per line, and the picked one."""
    held_out, ranked = found["held_out"], found["arms"][arm]
    cells = ranked["cells"]
    labels = [" ".join(f"{sign}={cell[key]:g}" for key, sign in SIGNS.items() if key in cell) for cell in cells]
    lines = [f"{arm}, {found['score']} on {held_out['n']} held-out examples of {held_out['data_file']}"]
    lines += [f"  {label:26}{100 * cell['score']:7.2f} %" for label, cell in zip(labels, cells, strict=True)]
    equal = ", ".join(labels[i] for i in ranked["equal"])
    rule = f" (equal score: {equal}; the smallest learning rate, k and λ is used)" if equal else ""
    return "\n".join([*lines, f"  picked: {labels[ranked['picked']]}{rule}"])


def pick(arm: str, runs: Sequence[str | Path], output_file: Path) -> str:
    """Writes sweep.json, prints the arm's cells to stderr and returns the first run folder of its best cell."""
    found = summarize([read_run(Path(run)) for run in runs])
    if arm not in found["arms"]:
        raise UsageError(f"none of the runs is of arm {arm}")
    output_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(output_file, found)
    print(describe(arm, found), file=sys.stderr)
    ranked = found["arms"][arm]
    return ranked["cells"][ranked["picked"]]["runs"][0]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 picked, 2 wrong usage or runs."""
    parser = argparse.ArgumentParser(
        "python -m llm_jepa.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--pick", required=True, choices=["regular", "jepa"], help="arm whose best cell is printed")
    parser.add_argument("--output_file", required=True, type=Path, help="JSON file for all cells")
    options = parser.parse_args(argv)
    return run_command("sweep", lambda: print(pick(options.pick, options.runs, options.output_file)))
