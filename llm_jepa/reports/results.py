"""What runs scored, read from their folders alone.

    python -m llm_jepa.report runs/synth-tiny-jepa-*          one table an arm: a line a run, then mean ± sd
    python -m llm_jepa.report --line runs/RUN                 the one line of one run
    python -m llm_jepa.report runs/* --output_dir report      also report.md, report.json and report.html, in the folder report

Runs that differ in anything but their seed are different arms and are never averaged together. A run that is missing,
unfinished, not evaluated or damaged is named on stderr with the reason and left out; the exit code is then 1.

The files compare each dataset's arms with a reference arm, by seed: the regular one, or the one that --against names.
Arms that differ in anything but the method are not compared; what differs is named, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json
from llm_jepa.run_folder import VOLATILE

if TYPE_CHECKING:  # scipy and matplotlib are for --output_dir alone: run.sh asks for a line after every seed
    from llm_jepa.reports.stats import Comparison

NO_SETTING = {"finetune_seed"} | VOLATILE  # what runs of one arm may differ in
# … and their evaluations
NO_EVALUATION = {"model_name", "input_file", "output_file", "batch_size", "tokens_per_batch", "tensor_parallel_size"}
VIEWS = {"lbd", "predictors", "last_token", "jepa_l2", "jepa_mse", "infonce", "front_pred", "reverse_pred", "text_view",
         "jepa_ratio", "same_flop"}  # fmt: skip
TUBE = {"stp", "stp_lbd", "stp_spans", "stp_part", "stp_max_length", "stp_warmup", "stp_min_lbd",
        "stp_layer"}  # fmt: skip
METHOD = VIEWS | TUBE | {"regular", "layout", "additive_mask"}  # what arms that are compared may differ in
ORIGIN = ("git_commit", "git_dirty", "versions", "device", "threads", "processes", "skipped_examples", "steps")
UNKNOWN_CODE = {"git_commit": None, "git_dirty": True}  # never shown to be the same code, equal or not


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
    headline: str  # the score that stands for the others
    origin: dict[str, Any]  # code, versions and machine; tells no arms apart
    notes: list[str]  # of evaluate.py

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
        # Before there was a choice of engines, all was generated by transformers.
        evaluation = {"engine": "transformers"} | field(metrics, "settings", dict, path)
        made = {
            "pretraining": before,
            "train data": sorted(trained_on.values()),
            "test data": field(metrics, "data_sha256", str, path),
            "databases": metrics.get("databases_sha256"),
            "evaluation": {name: value for name, value in evaluation.items() if name not in NO_EVALUATION},
        }
        failures = field(metrics, "failures", dict, path) if "failures" in metrics else {}
        notes = field(metrics, "notes", list, path) if "notes" in metrics else []
        origin = {name: record.get(name) for name in ORIGIN}
        origin |= {f"evaluation.{name}": metrics.get(name) for name in ORIGIN}
        headline = metrics.get("score") if metrics.get("score") in names else names[0]
        results.append(
            Result(run, seed, settings, made, path.parent.name, task, n, columns, failures, headline, origin, notes)
        )
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
    method = "regular" if result.settings.get("regular") else "jepa"
    return "  ".join([result.dataset, method, f"seed {result.seed}", *scores, *remarks(result)])


def remarks(result: Result) -> list[str]:
    """How many answers gave nothing that could be scored, and why; and what else evaluate.py has to say of the rows."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in result.failures.items())
    return ([f"without a result: {reasons}"] if reasons else []) + result.notes


def mean_sd(values: list[float]) -> str:
    """`mean ± sd` with the sample standard deviation (n − 1); of a single value the value alone."""
    return f"{statistics.fmean(values):7.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def title(arm: list[Result], arms: list[list[Result]]) -> str:
    """What an arm is: dataset, model, method, and every other setting in which the arms differ."""
    settings, others = arm[0].settings, [other[0].settings for other in arms]
    method = "regular" if settings.get("regular") else "jepa"
    hidden = {"model_name", "regular"} | (VIEWS if settings.get("regular") else set())
    differing = [
        f"{name} {value}"
        for name, value in settings.items()
        if name not in hidden and any(other.get(name) != value for other in others)
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
    return "\n".join(lines + [f"seed {r.seed} {text}" for r in arm for text in remarks(r)])


# -------------------------------------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Table:
    """A dataset's arms, the reference first where there is one, and what was compared with it."""

    dataset: str
    arms: dict[str, list[Result]]  # by label
    reference: str | None
    comparisons: list[Comparison]
    refused: dict[str, str]  # arms that were not compared, and why
    allowed: dict[str, list[str]]  # differences that --allow let through, by arm


def flat(prefix: str, value: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, part in value.items() for name, leaf in flat(f"{prefix}.{key}", part).items()}


def facts(result: Result, origin: bool = True) -> dict[str, Any]:
    """All that two results could differ in, by name: settings, data, evaluation; with `origin` code and machine too."""
    made, settings = result.made, result.settings
    before = made["pretraining"]  # says all of the model, whose name is its run folder's
    parts = {name: value for name, value in settings.items() if not (before and name == "model_name")}
    parts["pretrained"] = bool(before)
    parts |= {name.replace(" ", "_"): value for name, value in made.items() if name != "pretraining" or before}
    parts |= {"task": result.task, "n": result.n, "scores": list(scores(result))}
    parts |= result.origin if origin else {}
    return {name: leaf for key, part in parts.items() for name, leaf in flat(key, part).items()}


def scores(result: Result) -> list[str]:
    """Names of the result's scores, each once: the headline, the task's own, exact, startswith, stop_rate."""
    names = [heading.removesuffix(" %") for heading in result.columns if heading.endswith(" %")]
    own = [name for name in names if name not in ("exact", "startswith", "stop_rate")]
    return [name for name in dict.fromkeys([result.headline, *own, *names]) if name in names]


def labels(arms: list[list[Result]]) -> list[str]:
    """A short name of each of a dataset's arms: its method, λ and k, and whatever else tells the arms apart."""
    described, names = [facts(arm[0], origin=False) for arm in arms], []
    for own in described:
        regular, shown = own.get("regular"), []
        for sign, name in () if regular else (("λ", "lbd"), ("k", "predictors")):
            if isinstance(own.get(name), (int, float)):
                shown.append(f"{sign}={own[name]:g}")
        hidden = {"regular", "lbd", "predictors", "additive_mask", "scores", "stp"} | (VIEWS if regular else set())
        for name, value in sorted(own.items()):
            alike = sum(other.get(name, value) == value for other in described)
            if name not in hidden and alike <= len(described) / 2:  # what most arms have goes without saying
                text = " ".join(str(value).strip("[']").split())[: 8 if "data" in name else 40]
                shown += [name] if value is True else [] if value is None or value is False else [f"{name} {text}"]
        methods = [] if regular else ["JEPA"]
        methods += [f"STP {own['stp']}"] if own.get("stp") else []
        names.append(f"{' + '.join(methods) or 'regular'} {', '.join(shown)}".strip())
    runs = [arm[0].run.name for arm in arms]
    return [n if names.count(n) == 1 else f"{n} ({run})" for n, run in zip(names, runs, strict=True)]


def differing(reference: list[Result], arm: list[Result]) -> dict[str, str]:
    """By name, what the results differ in apart from the method, with both values and their runs.

    Commits that are unknown, or that were changed when the run was made, count as differing: nothing shows the code.
    """
    first, found = reference[0], {}
    expected = facts(first)
    for result in [*reference, *arm]:
        own = facts(result)
        for name in (expected | own).keys():
            if name.startswith("pretraining.") and own["pretrained"] != expected["pretrained"]:
                continue  # said by `pretrained`
            ours, theirs, last = own.get(name), expected.get(name), name.rsplit(".", 1)[-1]
            unknown = last in UNKNOWN_CODE and ours == UNKNOWN_CODE[last]
            is_method = name.removeprefix("pretraining.") in METHOD
            is_method |= name == "steps" and bool(own.get("same_flop") or expected.get("same_flop"))
            if name not in found and not is_method and (unknown or ours != theirs):
                found[name] = f"{name} {theirs!r} in {first.run} and {ours!r} in {result.run}"
    return found


def reference_of(dataset: str, arms: dict[str, list[Result]], against: str | None) -> str | None:
    """Label of the arm the others are compared with; None where a dataset has one arm alone.

    Raises UsageError where that is no single arm.
    """

    def is_regular(arm: list[Result]) -> bool:
        parts = (part for part in (arm[0].settings, arm[0].made["pretraining"]) if part)
        return all(part.get("regular") and not part.get("stp") for part in parts)

    if len(arms) == 1 and not against:
        return None
    named = [label for label, arm in arms.items() if against and any(r.run == Path(against) for r in arm)]
    if not named and against:
        named = [label for label, arm in arms.items() if against in label or any(against in r.run.name for r in arm)]
    if not against:
        named = [label for label, arm in arms.items() if is_regular(arm)]
    if len(named) != 1:
        what = f"--against {against} names" if against else "the regular arm is the reference, and there are"
        raise UsageError(
            f"{dataset}: {what} {len(named)} of its arms ({'; '.join(named or arms)}); "
            "name one by --against, by its run folder or a part of its name"
        )
    return named[0]


def compare_arms(results: list[Result], against: str | None, allow: set[str]) -> tuple[list[Table], list[str]]:
    """A table for each dataset, and why others, whose reference arm is not known, have none.

    Raises UsageError where no dataset has one or a name in `allow` is not known.
    """
    from llm_jepa.reports.stats import compare, conclude

    known = {name for result in results for name in facts(result)}
    known |= {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    if allow - known:
        raise UsageError(f"--allow {' '.join(sorted(allow - known))}: nothing of this name is recorded of these runs")
    tables, unnamed = [], []
    for dataset in dict.fromkeys(r.dataset for r in results):
        here = [arm for arm in grouped(results) if arm[0].dataset == dataset]
        arms = dict(zip(labels(here), here, strict=True))
        try:
            reference = reference_of(dataset, arms, against)
        except UsageError as error:
            unnamed.append(str(error))
            continue
        if reference:
            arms = {reference: arms.pop(reference)} | arms
        made = Table(dataset, arms, reference, [], {}, {})
        for label, arm in list(arms.items())[1:]:
            theirs, ours = ({r.seed: r for r in runs} for runs in (arms[reference], arm))
            seeds = [seed for seed in ours if seed in theirs]
            if not seeds:
                made.refused[label] = f"no seed is in both {label} and {reference}"
                continue
            found = differing([theirs[s] for s in seeds], [ours[s] for s in seeds])
            through = {name for name in found if any(f"{name}.".startswith(f"{a}.") for a in allow)}
            if found.keys() - through:
                made.refused[label] = "; ".join(text for name, text in found.items() if name not in through)
                continue
            if through:
                made.allowed[label] = [found[name] for name in through]
            for score in scores(theirs[seeds[0]]):
                if all(f"{score} %" in r.columns for r in (arm[0], arms[reference][0])):
                    values = ({seed: r.columns[f"{score} %"] for seed, r in side.items()} for side in (ours, theirs))
                    made.comparisons.append(compare(label, reference, score, *values))
        conclude(made.comparisons)
        tables.append(made)
    if not tables:
        raise UsageError("\n".join(unnamed))
    return tables, unnamed


def grouped(results: list[Result]) -> list[list[Result]]:
    """The arms, in the order of their first results."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.arm(), []).append(result)
    return list(arms.values())


def write_report(results: list[Result], problems: list[str], options: argparse.Namespace) -> list[str]:
    """Compares the arms and writes the three files. Returns what is left out of them, and why.

    Raises UsageError where the arms cannot be compared or the folder is a run's or cannot be written.
    """
    from llm_jepa.reports.writer import write_files

    folder = options.output_dir
    if (folder / "args.json").exists() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--output_dir {folder} is {'a run folder' if folder.is_dir() else 'no folder'}")
    if not results:
        return ["no run is left to report; nothing is written"]
    tables, refused = compare_arms(results, options.against, set(options.allow))
    refused += [f"{t.dataset}: {label} is not compared: {why}" for t in tables for label, why in t.refused.items()]
    refused += write_files(folder, tables, problems + refused)
    print(f"written: {', '.join(str(folder / f'report.{end}') for end in ('md', 'json', 'html'))}")
    return refused


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all runs reported, 1 some left out, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--line", action="store_true", help="one line, of one run")
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="write report.md, report.json and report.html into this folder"
    )
    parser.add_argument("--against", metavar="ARM", help="reference arm: one of its run folders, or a part of its name")
    parser.add_argument(
        "--allow", nargs="+", action="extend", default=[], metavar="NAME",
        help="compare arms that differ in this too: a setting, git_commit, versions …, evaluation.NAME",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.line and len(options.runs) > 1:
        parser.error(f"--line takes one run, not {len(options.runs)}")
    if options.line and options.output_dir:
        parser.error("--line: not with --output_dir")
    if (options.against or options.allow) and not options.output_dir:
        parser.error("--against and --allow: only with --output_dir")
    results, problems = read_runs(options.runs)
    arms = grouped(results)
    blocks = map(line, results) if options.line else (f"{title(arm, arms)}\n{table(arm)}\n" for arm in arms)
    for block in blocks:
        print(block)
    wrong = []
    if options.output_dir:
        try:
            problems += write_report(results, problems, options)
        except (UsageError, OSError) as error:
            wrong = [f"error: {error}"]
    for problem in problems + wrong:
        print(f"report.py: {problem}", file=sys.stderr)
    return 2 if wrong else 1 if problems else 0
