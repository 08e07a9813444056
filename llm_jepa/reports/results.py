"""Read run folders: one Result per run and dataset that it was evaluated on."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json
from llm_jepa.losses import CHAT_LOSSES, JEPA_LOSSES
from llm_jepa.run_folder import origin_of_model
from llm_jepa.settings import CHAT_FLAGS, VOLATILE, Settings, chosen_losses, read_settings

# Settings that may differ between the runs of one arm, and between their evaluations.
ARM_IGNORES = {"finetune_seed"} | VOLATILE
EVALUATION_IGNORES = set(
    "model_name input_file output_file spider_path batch_size tokens_per_batch tensor_parallel_size "
    "unmask_assistant_special_tokens".split()
)
ENVIRONMENT = ("git_commit", "git_dirty", "code_sha256", "versions", "device", "threads", "processes", "computation",
               "skipped_examples", "steps")  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Scores of one run on one dataset; `columns` maps a heading to scores in percent and to time in seconds."""

    run: Path
    seed: int
    model: str  # the base model
    dataset: str
    settings: dict[str, Any]  # by dotted name: training, base model's training, data and evaluation; equal in an arm
    environment: dict[str, Any]  # by dotted name: code, versions and machine; may differ in an arm
    scores: list[str]  # names of the scores, the task's primary one first
    columns: dict[str, float]
    failures: dict[str, int]  # number of generations that could not be scored, by reason
    notes: list[str]  # of evaluate.py
    learned: dict[str, Any]  # by term, jepa or nitp: what run.json says
    retrieval: dict[str, float]  # of the evaluation's pairs, by dotted name

    def arm(self) -> str:
        """A key that is equal for results that may be averaged: same base model, settings, data and evaluation."""
        return json.dumps([self.model, self.dataset, self.settings], sort_keys=True)

    def line(self) -> str:
        """The scores in one line."""
        scores = (f"{h.split()[0]} {value:.2f} {h.split()[1]}" for h, value in self.columns.items())
        return "  ".join([self.dataset, method_name(self.settings), f"seed {self.seed}", *scores, *self.remarks()])

    def remarks(self) -> list[str]:
        """The number of generations that could not be scored, by reason, and the notes of evaluate.py."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.failures.items())
        return ([f"without a result: {reasons}"] if reasons else []) + self.notes


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted name."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def score_names(metrics: dict[str, Any]) -> list[str]:
    """The scores of an evaluation, the primary one first; without stop_rate for multiple choice, which has none."""
    names = dict.fromkeys([metrics["score"], *metrics["scores"], "exact", "startswith", "stop_rate"])
    return [name for name in names if metrics[name] is not None]


def method_name(settings: dict[str, Any]) -> str:
    """The auxiliary losses with their weights λ, and the number k of predictor tokens; or regular."""
    own, terms = settings, []
    if not own["regular"]:
        loss = own["jepa_loss"] if own["jepa_loss"] != "cosine" else ""
        name = " ".join(filter(None, ("JEPA", loss, "(shuffled pairs)" if own["shuffle_pairs"] else "")))
        terms.append(f"{name} λ={own['lbd']:g}, k={own['predictors']}")
    for name in chosen_losses(own):
        variant = f" {own[name]}" if isinstance(own.get(name), str) else ""
        terms.append(f"{name.upper()}{variant} λ={own[f'{name}_lbd']:g}")
    return " + ".join(terms) or "regular"


def describe_method(s: Settings) -> str:
    """The method, its main settings and the formulas of its losses."""
    text = "regular fine-tuning, without the JEPA term"
    if s.jepa:
        text = f"LLM-JEPA with λ = {s.lbd:g}, γ = {s.gamma:g}, k = {s.predictors} predictor tokens"
        text += f", {s.jepa_loss} loss ({JEPA_LOSSES[s.jepa_loss].formula})"
        temperature = s.temperature or JEPA_LOSSES[s.jepa_loss].temperature
        text += f", τ = {temperature:g}" if temperature else ""
        text += ", of centered views" if s.center else ""
        text += f", without a gradient into the {s.stop_gradient.title()} view" if s.stop_gradient else ""
        text += f", with {s.negatives_queue} earlier pairs as negatives" if s.negatives_queue else ""
        text += f", on a fraction {s.jepa_ratio:g} of the examples" if s.jepa_ratio < 1 else ""
        text += ", on shuffled pairs (a placebo)" if s.shuffle_pairs else ""
        text += f", on projected views: {1 - s.sigreg:g} λ for this loss, {s.sigreg:g} λ for SIGReg" if s.sigreg else ""
    for name in s.chat_losses:
        title, formula = CHAT_LOSSES[name]
        formula = formula if isinstance(formula, str) else formula[getattr(s, name)]
        text += f"; {title} ({formula}) with weight {getattr(s, f'{name}_lbd'):g}"
        text += f", layer {getattr(s, f'{name}_layer')}" if f"{name}_layer" in CHAT_FLAGS[name] else ""
    text += f", {s.nitp_targets} targets (a control)" if "nitp" in s.chat_losses and s.nitp_targets != "states" else ""
    return text


def describe_learning(term: str, found: dict[str, Any]) -> str:
    """Whether a term has learned, with its figures; `found` is what run.json says of it."""
    what = {"jepa": "pairs", "nitp": "targets"}[term]
    text = f"the {term.upper()} term has {'not ' if found['collapsed'] else ''}learned its {what}: "
    text += f"cosine {found['cosine']:.4f}, shuffled {found['cosine_shuffled']:.4f}"
    if term == "jepa":
        text += f" ± {found['cosine_shuffled_sd']:.4f}"
        text += f"; retrieval {found['retrieval']:.3f}, chance {found['retrieval_chance']:.3f}"
    return text


def arm_settings(settings: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What is equal in an arm, from args.json and run.json: settings, data, and those of the run it starts from.

    Files are identified by their checksums, so only whether they were given is kept of their names.
    """
    if "base" not in record:  # an older run: its model must be where its name says
        record = record | origin_of_model(settings["model_name"]) | {"model": settings["model_name"]}
    settings = settings | dataclasses.asdict(read_settings(settings))
    own = {k: v for k, v in settings.items() if k not in ARM_IGNORES} | {"model_name": record["model"]}
    own |= {k: True for k in ("train_file", "data_file", "eval_file") if own.get(k)}
    held_out, checksums = settings.get("eval_file"), record["data_sha256"]
    own |= {"train_data": [checksum for path, checksum in checksums.items() if path != held_out]}
    own |= {"eval_data": checksums.get(held_out), "pretrained": record["base"] is not None}
    if base := record["base"]:  # the models of an arm may be pretrained with different seeds
        del own["model_name"]
        own["pretraining"] = arm_settings(base["settings"], base | {"model": base["settings"].get("model_name")})
    return own


def read_run(run: Path) -> list[Result]:
    """The results of a run, one per dataset.

    Raises UsageError if the run is missing, unfinished or not evaluated, KeyError if one of its files lacks a key.
    """
    record, given = read_json(run / "run.json"), read_json(run / "args.json")
    if record["status"] != "finished":
        raise UsageError(f"{run}: {record['status']}, not finished")
    settings = arm_settings(given, record)
    base = Path(re.sub(r"/(merged|checkpoint-\d+)/?$", "", given["model_name"])).name
    results = []
    for path in sorted(run.glob("eval/*/metrics.json")):
        metrics = read_json(path)
        scores = score_names(metrics)
        evaluation = {"engine": "transformers"} | metrics["settings"]  # runs without `engine` used transformers
        evaluated = {
            "test_data": metrics["data_sha256"],
            "databases": metrics.get("databases_sha256"),
            "scorer": metrics.get("task_sha256"),
            "evaluation": {name: value for name, value in evaluation.items() if name not in EVALUATION_IGNORES},
            "task": metrics["task"],
            "n": metrics["n"],
            "scores": scores,
        }
        environment = {name: record.get(name) for name in ENVIRONMENT}
        environment |= {f"evaluation.{name}": metrics.get(name) for name in ENVIRONMENT}
        columns = {f"{name} %": 100 * metrics[name] for name in dict.fromkeys(["exact", "startswith", *scores])}
        result = Result(
            run=run,
            seed=given["finetune_seed"],
            model=settings.get("model_name") or re.sub(r"-s\d+(?=-|$)", "", base),
            dataset=path.parent.name,
            settings=flatten(settings | evaluated),
            environment=flatten(environment),
            scores=scores,
            columns=columns | {"train s": float(record["wall_seconds"])},
            failures=metrics["failures"],
            notes=metrics.get("notes", []),
            learned=record.get("learned", {}),
            retrieval=flatten(metrics.get("retrieval") or {}),
        )
        results.append(result)
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
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(f"{run}: damaged ({type(error).__name__}: {error})")
            continue
        for result in found:
            first = results.setdefault((result.arm(), result.seed), result)
            if first is not result:
                problems.append(f"{run}: duplicate of {first.run}: the same arm and seed {result.seed}")
    return list(results.values()), problems
