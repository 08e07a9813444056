"""Write a run's model card, RUN/README.md, from the files of the run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import HUB
from llm_jepa.files import read_json, write_text
from llm_jepa.losses import CHAT_LOSSES
from llm_jepa.reports.results import describe_learning, describe_method, score_names
from llm_jepa.settings import CHAT_FLAGS, JEPA_FLAGS, LORA_FLAGS, VOLATILE, Settings, read_settings

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
MARK = "<!-- written by model_card.py from the files of the run -->"
# Settings that the table of settings omits: they affect no number, or another part of the card has them.
OMITTED = VOLATILE | set(
    "layout additive_mask tokens_per_row train_file data_file eval_file model_name revision pretrain regular lm_labels "
    "finetune_seed eval_strategy eval_steps eval_generate save_strategy save_steps track_flop merge "
    "eval_on_start task spider_path".split()
)


def hub_id(name: str) -> str | None:
    """A model's name on the hub; None for a local folder, such as models/tiny, which looks like one."""
    local = any((root / name).exists() for root in (Path(), ROOT))
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not local else None


def data_name(path: str) -> str:
    """The base name of a data file, because its folder is private; the full name of a hub dataset."""
    return path if HUB.fullmatch(path) else Path(path).name


def examples_name(metrics: dict) -> str:
    """The data file of an evaluation and which part of it was used."""
    part = metrics["settings"].get("process_split")
    return data_name(metrics["settings"]["input_file"]) + (f", part {part}" if part else "")


def effective_settings(s: Settings) -> list[tuple[str, Any]]:
    """The settings that affected the numbers and that no other part of the card has."""
    file, fraction = s.data_file, s.val_fraction
    applies = dict.fromkeys((*LORA_FLAGS, "lora_dropout"), s.lora) | {
        "eval_split": file,
        "val_fraction": fraction,
        "split_seed": file or fraction,
    }
    applies |= {"max_steps": s.max_steps > 0} | dict.fromkeys(JEPA_FLAGS, s.jepa)
    applies |= {flag: name in s.chat_losses for name, flags in CHAT_FLAGS.items() for flag in flags}
    applies |= dict.fromkeys(OMITTED)
    values = sorted(dataclasses.asdict(s).items())
    return [(k, v) for k, v in values if applies.get(k, True) and v is not None and v is not False]


def evaluation_results(evaluations: dict[str, dict]) -> list[EvalResult]:
    """Every score of every evaluation as a fraction, the primary one of an evaluation first."""
    return [
        EvalResult(
            task_type="text-generation", dataset_type=name, dataset_name=f"{name}, {examples_name(m)}",
            dataset_split=m["settings"].get("process_split"), dataset_args={"sha256": m["data_sha256"], "n": m["n"]},
            metric_type=score, metric_name=score, metric_value=m[score], metric_args={"ci95": m["ci95"][score]},
        )
        for name, m in evaluations.items() for score in score_names(m)
    ]  # fmt: skip


def write_card(run: Path, overwrite: bool, license: str | None = None, repo: str | None = None) -> Path:
    """Writes the card. Raises UsageError if the run is unfinished, or if there is a card that was not written here."""
    path, record, s = run / "README.md", read_json(run / "run.json"), read_settings(read_json(run / "args.json"))
    status = record.get("status") if isinstance(record, dict) else None
    if status != "finished":
        raise UsageError(f"{run}: {status or 'damaged run.json'}, not finished")
    evaluations = {path.parent.name: read_json(path) for path in sorted(run.glob("eval/*/metrics.json"))}
    if path.exists() and not overwrite:
        text, blank = path.read_text(encoding="utf-8", errors="replace"), ModelCard.from_template(ModelCardData()).text
        is_blank = text.split("\n---\n", 1)[-1].partition("### Framework versions")[0].strip() == blank.strip()
        if not (MARK in text or is_blank):  # PEFT saves a blank card with every adapter
            raise UsageError(f"{path} exists and was not written by model_card.py; give --overwrite to replace it")
    name, base, results = run.resolve().name, hub_id(s.model_name), evaluation_results(evaluations)
    tags = {"llm-jepa": s.jepa, "lora": s.lora}
    tags |= {CHAT_LOSSES[name][0].lower().replace(" ", "-"): True for name in s.chat_losses}
    metadata = ModelCardData(
        base_model=None if s.pretrain else base,
        datasets=sorted({m["name"] for m in map(HUB.fullmatch, record["data_sha256"]) if m}) or None,
        library_name="peft" if s.lora else "transformers", license=license, pipeline_tag="text-generation",
        tags=[tag for tag, applies in tags.items() if applies] or None, model_name=name, eval_results=results or None,
    )  # fmt: skip
    held_out, fraction = s.eval_file, s.eval_split if s.data_file else None
    used = "trained on" + ("" if fraction is None else f", except a held-out fraction {fraction}")
    trained_on = {checksum for path, checksum in record["data_sha256"].items() if path != held_out}
    splits = s.data_file or s.val_fraction
    turn = {"system": record["system_turn"]} if "system_turn" in record else {}  # else there are several
    if turn.get("system") is not None:  # a Python literal that does not end the code block around it
        turn["system"] = repr(turn["system"]).replace("```", r"\x60\x60\x60")
    card = ModelCard.from_template(
        metadata, TEMPLATE, mark=MARK, name=name, repo=repo or name, s=s, record=record, method=describe_method(s),
        base=base or f"{Path(s.model_name).name} (a local folder, not on the hub)",
        learned=[describe_learning(*item) for item in record.get("learned", {}).items()],
        retrieval={name: m["retrieval"] for name, m in evaluations.items() if m.get("retrieval")},
        data=[(data_name(f), "held out" if f == held_out else used, c) for f, c in record["data_sha256"].items()],
        settings=[(f"`--{flag}`", value) for flag, value in effective_settings(s)], scores=results, **turn,
        leaked=[
            dataset for dataset, m in evaluations.items()
            if m["data_sha256"] in trained_on and not (splits and m["settings"].get("process_split") == "test")
        ],
    )  # fmt: skip
    write_text(path, f"{card}\n")
    return path
