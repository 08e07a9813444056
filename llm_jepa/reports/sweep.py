"""Picks the best cell of a grid by its task score on rows held out of the train file; run.sh sweep calls it.

    python -m llm_jepa.sweep --pick jepa --output_file sweep.json CELL…     prints the run folder of the cell that is picked

A cell is what runs share that differ in their seed alone; its score is their mean. Among equal cells the one with the
smallest learning rate, then k, then λ is picked. The file has the cells of both arms, as far as they are given.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, write_json

KEY = ("learning_rate", "predictors", "lbd")  # what the cells of an arm may differ in; the order decides between equals
SPLIT = ("data_file", "eval_split", "split_seed")


def read_cell(run: Path) -> dict[str, Any]:
    """A run's settings, what it was scored on, and its scores. Raises UsageError where it has none."""
    settings, record = read_json(run / "args.json"), read_json(run / "run.json")
    found = sorted(run.glob("eval/*/metrics.json"))
    if record.get("status") != "finished" or len(found) != 1:
        raise UsageError(f"{run}: not finished and evaluated once")
    metrics = read_json(found[0])
    if not settings["data_file"] or metrics["settings"]["process_split"] != "test":
        raise UsageError(f"{run}: not scored on rows held out of its train file")
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


def arm_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's cells in the order of preference between equals, which of them is picked, and which are equal to it."""
    cells = []
    for key in sorted({run["key"] for run in runs}):
        mine = [run for run in runs if run["key"] == key]  # the first of them stands for the cell
        values = {run["seed"]: run["scores"][run["score"]] for run in mine}
        mean = round(statistics.fmean(values.values()), 12)  # .1 + .2 is .15 + .15, whatever floats make of it
        cells.append(
            dict(zip(KEY, key, strict=False))
            | {"score": mean, "by_seed": values, "n_seeds": len(values)}
            | {"others": [run["scores"] for run in mine], "runs": [run["run"] for run in mine]}
        )
    best = max(cell["score"] for cell in cells)
    equal = [i for i, cell in enumerate(cells) if cell["score"] == best]
    return {"picked": equal[0], "equal": equal[1:], "cells": cells}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What sweep.json holds. Raises UsageError where the runs were not scored on the same rows by the same score."""
    for name in ("held_out", "score"):
        if any(run[name] != runs[0][name] for run in runs):
            other = next(run for run in runs if run[name] != runs[0][name])
            raise UsageError(f"{other['run']}: {name} is {other[name]}, of {runs[0]['run']} {runs[0][name]}")
    arms = dict.fromkeys(run["arm"] for run in runs)
    arms = {arm: arm_of([run for run in runs if run["arm"] == arm]) for arm in arms}
    if any(cell["n_seeds"] != arms[name]["cells"][0]["n_seeds"] for name in arms for cell in arms[name]["cells"]):
        raise UsageError("the cells have not all been run with the same number of seeds")
    return {"score": runs[0]["score"], "held_out": runs[0]["held_out"], "arms": arms}


def name(cell: dict[str, Any]) -> str:
    """A cell in a few characters."""
    signs = {"learning_rate": "lr", "predictors": "k", "lbd": "λ"}
    return " ".join(f"{sign}={cell[key]:g}" for key, sign in signs.items() if key in cell)


def describe(arm: str, found: dict[str, Any]) -> str:
    """The cells of an arm, a line each, and what is picked."""
    arms, score, n = found["arms"][arm], found["score"], found["held_out"]["n"]
    cells = arms["cells"]
    lines = [f"{arm}, {score} on {n} held-out rows of {found['held_out']['data_file']}"]
    lines += [f"  {name(cell):26}{100 * cell['score']:7.2f} %" for cell in cells]
    equal = ", ".join(name(cells[i]) for i in arms["equal"])
    rule = f", the first by learning rate, k and λ of what is equal to {equal}" if equal else ""
    return "\n".join([*lines, f"  picked: {name(cells[arms['picked']])}{rule}"])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 picked, 2 wrong usage or runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="CELL", help="run folder")
    parser.add_argument("--pick", required=True, choices=["regular", "jepa"], help="arm whose best cell is printed")
    parser.add_argument("--output_file", required=True, type=Path, help="JSON file for all cells")
    options = parser.parse_args(argv)
    try:
        found = summary([read_cell(run) for run in options.runs])
        if options.pick not in found["arms"]:
            raise UsageError(f"none of the runs is of arm {options.pick}")
        options.output_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output_file, found)
    except (UsageError, OSError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    print(describe(options.pick, found), file=sys.stderr)
    arm = found["arms"][options.pick]
    print(arm["cells"][arm["picked"]]["runs"][0])
    return 0
