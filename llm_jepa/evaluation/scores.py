"""Scores of single predictions, and their summary with confidence intervals."""

from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llm_jepa.data.examples import Example
from llm_jepa.evaluation.generation import Generation
from llm_jepa.evaluation.predictions import Predictions
from llm_jepa.run_folder import ROOT
from llm_jepa.scoring.programs import example_tests
from llm_jepa.scoring.sql import example_database, spider_databases
from llm_jepa.scoring.tasks import Scorer, find_task, interval, score_text


def databases_of(task: str, spider_path: str) -> Path | None:
    """The folder of Spider's databases, None for a task without. Raises UsageError if there are none."""
    if not find_task(task).needs_databases:
        return None
    path = Path(spider_path)
    return spider_databases(path if path.exists() else ROOT / path, ROOT / "datasets" / "spider_databases")


def scorer(
    name: str, spider_path: str, examples: list[Example], allow_code_execution: bool = False
) -> AbstractContextManager[Scorer]:
    """The task's scorer. Raises ExampleError if an example names a database that does not exist, or has no tests."""
    task, databases = find_task(name), databases_of(name, spider_path)
    for example in examples:
        if task.needs_databases:
            example_database(databases, example)
        if task.runs_programs:
            example_tests(example)
    return task.start(allow_code_execution if task.runs_programs else databases)


def scored_row(example: Example, generation: Generation, score: Scorer) -> dict[str, Any]:
    """One line of predictions.jsonl; `id` is the example's line number in the input file, counted from 1."""
    row = {"id": example.id, "prediction": generation.text, "stop_reason": generation.stop_reason}
    if generation.log_likelihoods:
        row["log_likelihoods"] = generation.log_likelihoods
    return row | score_text(generation.text, example.assistant) | score(generation.text, example)


def verdicts(row: dict[str, Any], task: str) -> str:
    """The scores of one line of predictions.jsonl in words, the primary one first."""
    names = (*find_task(task).scores, "exact", "startswith")
    said = [f"{name} {row[name] if isinstance(row[name], float) else ('no', 'yes')[row[name]]}" for name in names]
    if row["stop_reason"] == "length":
        said.append("cut at the maximum length")
    return ", ".join(said + ([f"no result: {row['failure']}"] if "failure" in row else []))


def summarize(rows: Predictions, task: str, startswith: bool = False) -> dict[str, Any]:
    """The mean of each score, with its 95 % interval under `ci95`; `failures` counted by reason.

    `cut_at_limit`: the number of responses that ended at the maximum length, None if it is not known of each.
    """
    own, n = find_task(task).scores, len(rows)
    names = [*own, "exact", "startswith"]
    values = {name: [row[name] for row in rows] for name in names}
    if all(row["stop_reason"] is not None for row in rows):
        values["stop_rate"] = [row["stop_reason"] == "stop" for row in rows]
    return {
        "task": Path(task).stem,
        "n": n,
        "score": "startswith" if startswith else names[0],
        **{name: sum(values[name]) / n if name in values else None for name in (*names, "stop_rate")},
        "cut_at_limit": n - sum(values["stop_rate"]) if "stop_rate" in values else None,
        "scores": list(own),
        "ci95": {name: interval(found) for name, found in values.items()},
        "failures": dict(Counter(row["failure"] for row in rows if "failure" in row).most_common()),
    }


def score_table(metrics: dict[str, Any]) -> str:
    """Each score in percent with its interval, the headline score first."""
    names = [metrics["score"], *metrics["scores"], "exact", "startswith", "stop_rate"]
    lines = [f"{metrics['task']}, n = {metrics['n']}", f"{'':18}{'%':>7}  95 % interval"]
    for name in dict.fromkeys(names):
        if metrics[name] is not None:
            low, high = (100 * x for x in metrics["ci95"][name])
            lines.append(f"{name:18}{100 * metrics[name]:7.2f}  [{low:.2f}, {high:.2f}]")
    if metrics["cut_at_limit"]:
        lines.append(f"cut at the maximum length (--max_new_tokens): {metrics['cut_at_limit']} of {metrics['n']}")
    if metrics["failures"]:
        lines.append("without a result: " + ", ".join(f"{n} {reason}" for reason, n in metrics["failures"].items()))
    return "\n".join(lines)


def retrieval_table(found: dict[str, Any]) -> str:
    """The results of `embeddings.retrieval` in percent, with their chance level."""
    lines = [f"retrieval, n = {found['n']}", f"{'':18}{'R@1 %':>7}{'R@10 %':>8}{'MRR %':>8}"]
    for name, key in (("text to code", "text_to_code"), ("code to text", "code_to_text"), ("chance", "chance")):
        r1, r10, mrr = (100 * value for value in found[key].values())
        lines.append(f"{name:18}{r1:7.2f}{r10:8.2f}{mrr:8.2f}")
    if found["cosine_shuffled"] is not None:
        lines.append(f"mean cosine: {found['cosine']:.4f} of pairs, {found['cosine_shuffled']:.4f} of shuffled pairs")
    return "\n".join(lines)
