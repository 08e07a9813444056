"""Read run folders: one Result per run and data set that it was evaluated on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json
from llm_jepa.run_folder import VOLATILE

# Settings that may differ between the runs of one arm, and between their evaluations.
ARM_IGNORES = {"finetune_seed"} | VOLATILE
EVALUATION_IGNORES = set("model_name input_file output_file batch_size tokens_per_batch tensor_parallel_size".split())
ENVIRONMENT = ("git_commit", "git_dirty", "versions", "device", "threads", "processes", "skipped_examples", "steps")


@dataclass(frozen=True)
class Result:
    """Scores of one run on one data set; `columns` maps a heading to scores in percent and to time in seconds."""

    run: Path
    seed: int
    settings: dict[str, Any]
    inputs: dict[str, Any]  # checksums of the data, settings of the evaluation and of the base model's training
    dataset: str
    task: str
    n: int  # examples
    columns: dict[str, float]
    failures: dict[str, int]  # number of generations that could not be scored, by reason
    primary: str  # name of the task's primary score
    environment: dict[str, Any]  # code, versions and machine; does not distinguish arms
    notes: list[str]  # of evaluate.py

    def arm(self) -> str:
        """A key that is equal for results that may be averaged: same settings, data, evaluation and scores."""
        key = [self.settings, self.inputs, self.dataset, self.task, self.n, list(self.columns)]
        return json.dumps(key, sort_keys=True)

    def scores(self) -> list[str]:
        """Names of the scores: the primary one, the task's other ones, exact, startswith, stop_rate."""
        names = [heading.removesuffix(" %") for heading in self.columns if heading.endswith(" %")]
        own = [name for name in names if name not in ("exact", "startswith", "stop_rate")]
        return list(dict.fromkeys([self.primary, *own, *names]))

    def remarks(self) -> list[str]:
        """The number of generations that could not be scored, by reason, and the notes of evaluate.py."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.failures.items())
        return ([f"without a result: {reasons}"] if reasons else []) + self.notes


def base_training(model_name: str) -> dict[str, Any] | None:
    """Settings and data of the run that trained the base model, without its seed; None if it is not a run folder.

    Without the seed, because runs of one arm may start from models that were pretrained with different seeds.
    """
    path = Path(model_name) / "args.json"
    if not path.is_file():
        return None
    data = read_json(path.with_name("run.json")).get("data_sha256", {})
    settings = {name: value for name, value in read_json(path).items() if name not in ARM_IGNORES}
    return settings | {"data_sha256": sorted(data.values())}


def read_run(run: Path) -> list[Result]:
    """The results of a run, one per data set.

    Raises UsageError if the run is missing, unfinished or not evaluated, KeyError if one of its files lacks a key.
    """
    if not run.is_dir():
        raise UsageError(f"{run}: no such run")
    record, settings = read_json(run / "run.json"), read_json(run / "args.json")
    if record["status"] != "finished":
        raise UsageError(f"{run}: {record['status']}, not finished")
    seed, base = settings["finetune_seed"], base_training(settings["model_name"])
    settings = {name: value for name, value in settings.items() if name not in ARM_IGNORES}
    if base:
        settings["model_name"] = re.sub(r"-s\d+(?=-|$)", "", Path(settings["model_name"]).name)
    results = []
    for path in sorted(run.glob("eval/*/metrics.json")):
        metrics = read_json(path)
        names = ["exact", "startswith", *metrics["scores"], "stop_rate"]
        if metrics["stop_rate"] is None:  # multiple choice: nothing was generated
            names.remove("stop_rate")
        evaluation = {"engine": "transformers"} | metrics["settings"]  # runs without `engine` used transformers
        inputs = {
            "pretraining": base,
            "train_data": sorted(record["data_sha256"].values()),
            "test_data": metrics["data_sha256"],
            "databases": metrics.get("databases_sha256"),
            "evaluation": {name: value for name, value in evaluation.items() if name not in EVALUATION_IGNORES},
        }
        columns = {f"{name} %": 100 * metrics[name] for name in names} | {"train s": float(record["wall_seconds"])}
        environment = {name: record.get(name) for name in ENVIRONMENT}
        environment |= {f"evaluation.{name}": metrics.get(name) for name in ENVIRONMENT}
        failures, notes, primary = metrics.get("failures", {}), metrics.get("notes", []), metrics.get("score", names[0])
        dataset, task, n = path.parent.name, metrics["task"], metrics["n"]
        results.append(
            Result(run, seed, settings, inputs, dataset, task, n, columns, failures, primary, environment, notes)
        )
    if not results:
        raise UsageError(f"{run}: not evaluated (it has no eval/*/metrics.json)")
    return results


def read_runs(runs: list[Path]) -> tuple[list[Result], list[str]]:
    """All results in the given order, and why runs or results were skipped."""
    results: dict[tuple[str, int], Result] = {}
    problems: list[str] = []
    for run in runs:
        try:
            found = read_run(run)
        except UsageError as error:
            problems.append(str(error))
            continue
        except KeyError as error:
            problems.append(f"{run}: damaged, its files have no {error}")
            continue
        for result in found:
            first = results.setdefault((result.arm(), result.seed), result)
            if first is not result:
                problems.append(f"{run}: duplicate of {first.run}: the same arm and seed {result.seed}")
    return list(results.values()), problems
