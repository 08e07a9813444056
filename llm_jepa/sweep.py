"""Picks the best cell of a grid and writes all cells to a JSON file: the last step of `bash run.sh sweep`.

A cell is a set of runs that differ only in their seed; its score is their mean task score on held-out training
examples. Of equal cells, the one with the smallest learning rate, then k, then λ is picked.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, write_json
from llm_jepa.reports.results import arm_settings
from llm_jepa.settings import chosen_losses

SIGNS = {"learning_rate": "lr", "predictors": "k", "lbd": "λ"}  # the settings of a grid, in the order of preference
SPLIT = ("data_file", "eval_split", "split_seed")


def pick(arm: str, evaluations: Iterable[Path], output_file: Path) -> str:
    """The first run folder of an arm's best cell; writes the cells of both arms to a JSON file and prints this arm's.

    `evaluations`: the folders RUN/eval/DATASET. Raises UsageError if they are not of the same held-out examples, or if
    an arm's runs differ in more than their seed and SIGNS. Runs without an auxiliary loss are the arm regular, all
    others the other arm. λ of `--regular --nitp` is nitp_lbd.
    """
    import pandas

    runs, expected, arms = [], [], {}
    for folder in evaluations:
        run, metrics = folder.parent.parent, read_json(folder / "metrics.json")
        record, settings = read_json(run / "run.json"), read_json(run / "args.json")
        split = [metrics[name] for name in ("score", "n", "data_sha256")] + [settings[name] for name in SPLIT]
        split.append(metrics["settings"].get("process_split"))
        if split != (expected := expected or split):
            raise UsageError(f"{run} was scored on other examples, or by another score, than {runs[0]['run']}")
        scores = {name: metrics[name] for name in ("exact", "startswith", "stop_rate", *metrics["scores"])}
        nitp = settings["regular"] and settings.get("nitp")  # older runs do not have the setting nitp
        regular = settings["regular"] and not chosen_losses(settings)
        settings |= {"lbd": settings.pop("nitp_lbd")} if nitp else {}
        grid = {name: settings[name] for name in SIGNS}
        name = "regular" if regular else "jepa" if arm == "regular" else arm
        fixed = {key: value for key, value in arm_settings(settings, record).items() if key not in SIGNS}
        first = arms.setdefault(name, fixed)
        if other := [key for key in first | fixed if first.get(key) != fixed.get(key)]:
            raise UsageError(f"{run} differs from other runs of its arm in {', '.join(other)}")
        one = {"arm": name, "seed": settings["finetune_seed"], "run": str(run), **grid}
        runs.append(one | {"score": metrics[metrics["score"]], "scores": scores})
    cells = pandas.DataFrame(runs).groupby(["arm", *SIGNS]).agg(score=("score", "mean"), run=("run", "first"))
    cells = cells.round({"score": 12})  # equal means stay equal in floating point
    own = cells.loc[[arm]]  # in the order of preference
    picked, name = own.run[own.score.idxmax()], metrics["score"]
    held_out = {name: settings[name] for name in SPLIT} | {"n": metrics["n"]}
    found = {"score": name, "held_out": held_out, "cells": cells.reset_index().to_dict("records"), "runs": runs}
    output_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(output_file, found)
    print(f"{arm}, {name} on {held_out['n']} held-out examples of {held_out['data_file']}", file=sys.stderr)
    for cell in own.reset_index().to_dict("records"):
        label = " ".join(f"{sign}={cell[key]:g}" for key, sign in SIGNS.items())
        note = "  picked" if cell["run"] == picked else "  equal score" if cell["score"] == own.score.max() else ""
        print(f"  {label:26}{100 * cell['score']:7.2f} %{note}", file=sys.stderr)
    return picked
