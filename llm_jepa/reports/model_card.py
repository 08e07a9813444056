"""Writes a run's model card, RUN/README.md, from its own files alone, and uploads the run where asked to.

    python -m llm_jepa.model_card runs/RUN                                      the card: what was trained how, and its scores
    python -m llm_jepa.model_card runs/RUN --push_to_hub OWNER/NAME --private   also the model, the settings and the figures

hub.py says what is uploaded, and what never is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llm_jepa.reports import hub
from llm_jepa.data.examples import HUB
from llm_jepa.reports.model_card_text import MARK, body, hub_id, jepa, rows_of, score_names
from llm_jepa.reports.results import field, percent
from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, write_text

NUMBER = (int, float)
RECORD = {"steps": int, "tokens": int, "wall_seconds": NUMBER, "data_sha256": dict, "versions": dict, "device": str}
SETTINGS = {"model_name": str, "regular": bool, "pretrain": bool, "lora": bool, "plain": bool, "lm_labels": str,
            "lbd": NUMBER, "jepa_ratio": NUMBER, "gamma": NUMBER, "predictors": int, "finetune_seed": int}  # fmt: skip
METRICS = {"task": str, "n": int, "score": str, "scores": list, "ci95": dict, "settings": dict, "data_sha256": str}


def read(run: Path) -> tuple[dict, dict, dict[str, dict]]:
    """(settings, record, metrics by dataset) of a run. Raises UsageError where it is unfinished or damaged."""
    record, settings = read_json(run / "run.json"), read_json(run / "args.json")
    if field(record, "status", str, run / "run.json") != "finished":
        raise UsageError(f"{run}: the run is {record['status']}, not finished")
    evaluations = {path: read_json(path) for path in sorted(run.glob("eval/*/metrics.json"))}
    known = [(record, RECORD, run / "run.json"), (settings, SETTINGS, run / "args.json")]
    for values, kinds, path in known + [(metrics, METRICS, path) for path, metrics in evaluations.items()]:
        for name, kind in kinds.items():
            field(values, name, kind, path)
    for path, metrics in evaluations.items():
        field(metrics["settings"], "input_file", str, path)
        for name in score_names(metrics):
            interval = field(metrics["ci95"], name, list, path)
            points = sorted(percent({name: x}, name, path) for x in (*interval, metrics.get(name)))
            if len(interval) != 2 or abs(points[1] - 100 * metrics[name]) > 1e-6:
                raise UsageError(f"{path}: {name} is {metrics[name]}, its interval {interval}")
    return settings, record, {path.parent.name: metrics for path, metrics in evaluations.items()}


def metadata(run: Path, s: dict, record: dict, evaluations: dict[str, dict], licence: str | None) -> ModelCardData:
    """The card's front matter; scores are fractions, as in metrics.json."""
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=name, dataset_name=f"{name}, {rows_of(m)}",
            dataset_split=m["settings"].get("process_split"), dataset_args={"sha256": m["data_sha256"], "n": m["n"]},
            metric_type=score, metric_name=score, metric_value=m[score], metric_args={"ci95": m["ci95"][score]},
        )
        for name, m in evaluations.items() for score in score_names(m)
    ]  # fmt: skip
    tags = [*(["llm-jepa"] if jepa(s) else []), *(["lora"] if s["lora"] else [])]
    tags += ["semantic-tube-prediction"] if s.get("stp") and s.get("stp_lbd") else []
    return ModelCardData(
        base_model=None if s["pretrain"] else hub_id(s["model_name"]),
        datasets=sorted({m["name"] for m in map(HUB.fullmatch, record["data_sha256"]) if m}) or None,
        library_name="peft" if s["lora"] else "transformers", license=licence, pipeline_tag="text-generation",
        tags=tags or None, model_name=run.resolve().name, eval_results=results or None,
    )  # fmt: skip


def write_card(run: Path, overwrite: bool, licence: str | None = None, repo: str | None = None) -> Path:
    """Writes the run's card. Raises UsageError where the run is unfinished or damaged, or another's card is there."""
    path, parts = run / "README.md", read(run)
    if path.exists() and not overwrite and not replaceable(path.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(f"{path} exists and was not written by model_card.py; give --overwrite to replace it")
    front = metadata(run, *parts, licence).to_yaml()
    write_text(path, str(ModelCard(f"---\n{front}\n---\n\n{body(run, *parts, repo)}")))
    return path


def replaceable(text: str) -> bool:
    """Whether a card was written here, or is the blank form that PEFT leaves with every adapter."""
    blank = ModelCard.from_template(ModelCardData()).text.strip()
    return MARK in text or text.split("\n---\n", 1)[-1].partition("### Framework versions")[0].strip() == blank


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 1 the hub failed, 2 wrong usage or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that is not model_card.py's")
    parser.add_argument("--license", metavar="ID", help="licence of the model as the hub names it (apache-2.0 …)")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="also upload the run to this model repository")
    parser.add_argument("--private", action="store_true", help="--push_to_hub: the repository must not be public")
    o = parser.parse_args(argv)
    try:
        if o.private and not o.push_to_hub:
            raise UsageError("--private: only with --push_to_hub")
        if o.push_to_hub:
            hub.check(o.run, o.push_to_hub)
        print(write_card(o.run, o.overwrite, o.license, o.push_to_hub))
        if o.push_to_hub:
            print(hub.push(o.run, o.push_to_hub, o.private))
    except (UsageError, OSError, hub.PushError) as error:
        print(f"model_card.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0
