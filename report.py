"""What runs scored, read from their folders alone.

    python report.py runs/synth-tiny-jepa-*          one table an arm: a line a run, then mean ± sd
    python report.py --line runs/RUN                 the one line of one run

Runs that differ in anything but their seed are different arms and are never averaged together. A run that is missing,
unfinished, not evaluated or damaged is named on stderr with the reason and left out; the exit code is then 1.
"""

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import VOLATILE, UsageError, read_json

NO_SETTING = {"finetune_seed"} | VOLATILE  # what runs of one arm may differ in
NO_EVALUATION = {"model_name", "input_file", "output_file", "batch_size", "tokens_per_batch"}  # and their evaluations


@dataclass(frozen=True)
class Result:
    """One run's scores on one dataset; `columns` maps a heading to its value: scores in percent, time in seconds."""

    run: Path
    seed: int
    settings: dict[str, Any]
    made: dict[str, Any]  # checksums of the data and the settings of the evaluation
    dataset: str
    task: str
    n: int  # examples
    columns: dict[str, float]
    failures: dict[str, int]  # answers without a result to score, by reason

    def arm(self) -> str:
        """Equal for results that may be averaged: same settings, same data, same evaluation and scores."""
        return json.dumps(
            [self.settings, self.made, self.dataset, self.task, self.n, list(self.columns)], sort_keys=True
        )


def field(record: Any, name: str, kind: type | tuple[type, ...], path: Path) -> Any:
    """A value of a JSON object. Raises UsageError naming file and key where it is missing or of another type."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{path}: no valid {name}")
    return value


def percent(metrics: Any, name: str, path: Path) -> float:
    """A score in percent. Raises UsageError where it is no fraction in [0, 1]."""
    value = field(metrics, name, (int, float), path)
    if not 0 <= value <= 1:
        raise UsageError(f"{path}: {name} is {value}, no fraction in [0, 1]")
    return 100 * value


def pretraining(model_name: str) -> dict[str, Any] | None:
    """Settings of the run that a run's model was trained by, seed aside; None where the model is no run folder.

    Each seed of such an arm starts from a model of its own, which is not another arm.
    """
    path = Path(model_name) / "args.json"
    if not path.is_file():
        return None
    rows = read_json(path.with_name("run.json")).get("data_sha256", {})
    settings = {name: value for name, value in read_json(path).items() if name not in NO_SETTING}
    return settings | {"data_sha256": sorted(rows.values())}


def read_run(run: Path) -> list[Result]:
    """The run's results, one for each dataset it was evaluated on. Raises UsageError where there is none."""
    if not run.is_dir():
        raise UsageError(f"{run}: no such run")
    record, settings = read_json(run / "run.json"), read_json(run / "args.json")
    status = field(record, "status", str, run / "run.json")
    if status != "finished":
        raise UsageError(f"{run}: {status}, not finished")
    seconds = float(field(record, "wall_seconds", (int, float), run / "run.json"))
    seed = field(settings, "finetune_seed", int, run / "args.json")
    settings = {name: value for name, value in settings.items() if name not in NO_SETTING}
    trained_on = field(record, "data_sha256", dict, run / "run.json")
    before = pretraining(field(settings, "model_name", str, run / "args.json"))
    if before:
        settings["model_name"] = re.sub(r"-s\d+(?=-|$)", "", Path(settings["model_name"]).name)
    results = []
    for path in sorted(run.glob("eval/*/metrics.json")):
        metrics = read_json(path)
        names = ["exact", "startswith", *field(metrics, "scores", list, path), "stop_rate"]
        if metrics.get("stop_rate", 0) is None:  # answers were chosen, not generated
            names.remove("stop_rate")
        columns = {f"{name} %": percent(metrics, name, path) for name in dict.fromkeys(names)} | {"train s": seconds}
        task, n = field(metrics, "task", str, path), field(metrics, "n", int, path)
        evaluation = field(metrics, "settings", dict, path)
        made = {
            "pretraining": before,
            "train data": sorted(trained_on.values()),
            "test data": field(metrics, "data_sha256", str, path),
            "databases": metrics.get("databases_sha256"),
            "evaluation": {name: value for name, value in evaluation.items() if name not in NO_EVALUATION},
        }
        failures = field(metrics, "failures", dict, path) if "failures" in metrics else {}
        results.append(Result(run, seed, settings, made, path.parent.name, task, n, columns, failures))
    if not results:
        raise UsageError(f"{run}: not evaluated (it has no eval/*/metrics.json)")
    return results


def read_runs(runs: list[Path]) -> tuple[list[Result], list[str]]:
    """All results in the order given, and why runs or results were left out."""
    results: list[Result] = []
    problems: list[str] = []
    for run in runs:
        try:
            found = read_run(run)
        except UsageError as error:
            problems.append(str(error))
            continue
        for result in found:
            twin = next((r for r in results if r.arm() == result.arm() and r.seed == result.seed), None)
            if twin:
                problems.append(f"{run}: seed {result.seed} of this arm is there already ({twin.run})")
            else:
                results.append(result)
    return results, problems


def line(result: Result) -> str:
    """One run on one line."""
    scores = (f"{h.split()[0]} {value:.2f} {h.split()[1]}" for h, value in result.columns.items())
    return "  ".join([result.dataset, f"seed {result.seed}", *scores, *without_a_result(result)])


def without_a_result(result: Result) -> list[str]:
    """One text on how many answers gave nothing that could be scored, and why; none where all did."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in result.failures.items())
    return [f"without a result: {reasons}"] if reasons else []


def mean_sd(values: list[float]) -> str:
    """`mean ± sd` with the sample standard deviation (n − 1); of a single value the value alone."""
    return f"{statistics.fmean(values):7.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def title(arm: list[Result], arms: list[list[Result]]) -> str:
    """What an arm is: dataset, model, method, and every other setting in which the arms differ."""
    settings, others = arm[0].settings, [other[0].settings for other in arms]
    method = "regular" if settings.get("regular") else "jepa"
    differing = [
        f"{name} {value}"
        for name, value in settings.items()
        if name not in ("model_name", "regular") and any(other.get(name) != value for other in others)
    ]
    return ", ".join([f"{arm[0].dataset} ({arm[0].n} examples)", str(settings.get("model_name")), method, *differing])


def table(arm: list[Result]) -> str:
    """A line a run, then mean ± sd over the runs."""
    rows = [["seed", *(f"{name:>7}" for name in arm[0].columns)]]
    rows += [[str(r.seed), *(f"{value:7.2f}" for value in r.columns.values())] for r in arm]
    foot = f"mean ± sd (n = {len(arm)})" if len(arm) > 1 else "mean (n = 1)"
    rows.append([foot, *(mean_sd([r.columns[name] for r in arm]) for name in arm[0].columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"seed {r.seed} {text}" for r in arm for text in without_a_result(r)])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all runs reported, 1 some left out, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--line", action="store_true", help="one line, of one run")
    options = parser.parse_args(argv)
    if options.line and len(options.runs) > 1:
        parser.error(f"--line takes one run, not {len(options.runs)}")
    results, problems = read_runs(options.runs)
    arms = [[r for r in results if r.arm() == arm] for arm in dict.fromkeys(r.arm() for r in results)]
    blocks = map(line, results) if options.line else (f"{title(arm, arms)}\n{table(arm)}\n" for arm in arms)
    for block in blocks:
        print(block)
    for problem in problems:
        print(f"report.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
