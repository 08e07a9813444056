"""Measures everything in baselines.json, prints one table and exits with 1 if a value has become worse.

    python benchmarks/check.py --spider spider_train.jsonl      all measures, on cores that nothing else uses
    python benchmarks/check.py --only memory nitp               some of them
    python benchmarks/check.py --update                         the values become the new baselines
    python benchmarks/check.py --quick                          a rehearsal: the smallest sizes, without a verdict

A measure of baselines.json is one figure of one benchmark: `column` of the arm `arm`, divided by that of the best of
the arms `over` if there are any. Arms of one table are timed in turns. `value` is the baseline (null: not measured
yet). A measure fails if it is worse than its baseline by more than the fraction `tolerance`, where `better` is the
direction, or if its benchmark fails. One whose package or data is missing is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_commands import TINY
from timing import ROOT, flag_parser, report

from llm_jepa.files import read_json, write_text

HERE = Path(__file__).resolve().parent
TABLES = {  # name → command of the benchmark, its flags in a rehearsal
    "synth": ("bench_step.py --steps 2 --skip_memory", "--steps 1 --batch_size 2"),
    "compile": ("bench_step.py --steps 2 --skip_memory", "--steps 1 --batch_size 2"),
    "spider": ("bench_step.py --steps 1 --skip_memory --vocabulary 4096 --input_file {spider}", "--batch_size 2"),
    "135m": ("bench_step.py --steps 2 --shape 135m", "--batch_size 2"),
    "eval": (
        "bench_eval.py --rows 1024 --batch_size 128 --input_file datasets/synth_test.jsonl --model_name {run}",
        "--rows 8",
    ),
    "start": ("bench_commands.py", ""),
    "seeds": ("bench_commands.py --repeats 2", "--steps 4"),
    "growth": ("bench_growth.py", "--rows 80 --batch_size 2"),
}


def trained(quick: bool, folder: str) -> str:
    """A new run of the tiny model."""
    command = [sys.executable, *TINY, "--regular", "--output_dir", f"{folder}/run"]
    command += ["--max_steps", "10"] if quick else ["--num_epochs", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return f"{folder}/run"


def run_table(name: str, arms: list[str], args: argparse.Namespace, folder: str) -> dict[str, dict[str, Any]]:
    """The rows of a benchmark by arm, the last of each arm. One without values has a reason, `skipped` or `failed`."""
    command, rehearsal = TABLES[name]
    spider, run = Path(args.spider).resolve(), args.run
    if name == "spider" and not spider.is_file():
        return dict.fromkeys(arms, {"skipped": f"{args.spider} is missing: give --spider"})
    file = Path(folder) / f"{name}.json"
    try:
        if name == "eval":
            run = Path(run).resolve() if run else trained(args.quick, folder)
        flags = [word.format(spider=spider, run=run) for word in command.split()[1:]]
        flags += [*rehearsal.split(), "--repeats", "1"] if args.quick else []
        flags += ["--arms", *arms, "--json", str(file)]
        subprocess.run([sys.executable, HERE / command.split()[0], *flags], cwd=ROOT, check=True)
        return {row["arm"]: row for row in read_json(file)["results"]}
    except subprocess.CalledProcessError as error:
        rows = {row["arm"]: row for row in read_json(file)["results"]} if file.exists() else {}
        if any("failed" in row for row in rows.values()):  # the other arms have values
            return rows
        return dict.fromkeys(arms, {"failed": f"{Path(error.cmd[1]).name} ended with exit code {error.returncode}"})


def value(measure: dict[str, Any], rows: dict[str, dict[str, Any]]) -> float | str:
    """The measured value, or why there is none."""
    arm, others, column = rows[measure["arm"]], [rows[name] for name in measure.get("over", [])], measure["column"]
    there = [row for row in others if row.get(column) is not None]
    if arm.get(column) is None or others and not there:
        row = arm if arm.get(column) is None else others[0]
        reasons = (f"{why}: {row[why]}" for why in ("failed", "skipped") if why in row)
        return next(reasons, f"failed: {column} has no value, as another arm failed")
    return arm[column] / max(row[column] for row in there) if there else arm[column]


def verdict(now: float | str, measure: dict[str, Any]) -> str:
    """`worse` if the value falls out of the baseline's tolerance."""
    if isinstance(now, str):
        return now
    baseline, goal, sign = measure["value"], measure["goal"], 1 if measure["better"] == "higher" else -1
    if baseline is not None and sign * now < sign * baseline * (1 - sign * measure["tolerance"]):
        return "worse"
    reached = goal is not None and sign * now >= sign * goal
    return ("no baseline" if baseline is None else "ok") + (", goal reached" if reached else "")


def measured(measures: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, float | str]:
    """The value of each measure, or why there is none. Each table runs once."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for table in TABLES:
            own = {name: m for name, m in measures.items() if m["table"] == table}
            arms = dict.fromkeys(arm for m in own.values() for arm in (m["arm"], *m.get("over", [])))
            if any(m["column"].endswith("/tokens") for m in own.values()):
                arms["regular packed"] = None  # what these columns are relative to
            rows = run_table(table, list(arms), args, folder) if own else {}
            found |= {name: value(m, rows) for name, m in own.items()}
    return found


def main() -> int:
    """Returns 1 if a measure is worse than its baseline or failed."""
    parser = flag_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measures; default: all")
    parser.add_argument("--spider", default="datasets/spider_train.jsonl", help="training examples of Spider")
    parser.add_argument("--run", help="trained run for the evaluation; default: trains the tiny model")
    parser.add_argument("--baselines", type=Path, default=HERE / "baselines.json", help="file, for another machine")
    parser.add_argument("--results", type=Path, help="compare an earlier --json file instead of measuring")
    parser.add_argument("--update", action="store_true", help="write the values as new baselines")
    parser.add_argument("--quick", action="store_true", help="rehearse with the smallest sizes")
    args = parser.parse_args()
    if args.quick and args.update:
        parser.error("--update: not with --quick, whose values mean nothing")
    measures = read_json(args.baselines)
    if unknown := set(args.only or ()) - set(measures):
        parser.error(f"--only {' '.join(unknown)}: not one of {', '.join(measures)}")
    chosen = {name: measures[name] for name in args.only or measures}
    if args.results:
        earlier = {row["measure"]: row for row in read_json(args.results)["results"]}
        now = {name: row["verdict"] if row["now"] is None else row["now"] for name, row in earlier.items()}
        chosen = {name: m for name, m in chosen.items() if name in now}
    else:
        now = measured(chosen, args)
    results = []
    for name, m in chosen.items():
        goal = "" if m["goal"] is None else f"{'≥' if m['better'] == 'higher' else '≤'} {m['goal']:g}"
        said, number = verdict(now[name], m), None if isinstance(now[name], str) else now[name]
        said = "-" if args.quick and number is not None else said
        results.append({"measure": name, "now": number, "baseline": m["value"], "goal": goal, "verdict": said})
        if args.update and number is not None:
            m["value"] = float(f"{number:.3g}")
    report(args, args.baselines, results)
    if args.update:
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(m)}" for name, m in measures.items())
        write_text(args.baselines, f"{{\n{lines}\n}}\n")
    return int(any(row["verdict"].startswith(("failed", "worse")) for row in results))


if __name__ == "__main__":
    sys.exit(main())
