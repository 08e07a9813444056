"""The text of a model card: what a run was trained on and how, its scores, how it is asked, what is not shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_jepa.data.examples import HUB
from llm_jepa.reports.results import VIEWS
from llm_jepa.run_folder import VOLATILE

HERE = Path(__file__).resolve().parents[2]
MARK = "<!-- written by model_card.py from the files of the run -->"
# Settings that decide no number, or that the card says in words.
ELSEWHERE = VOLATILE | set(
    "layout additive_mask tokens_per_row train_file data_file eval_file model_name revision pretrain regular lm_labels "
    "finetune_seed eval_strategy eval_steps eval_generate save_strategy save_steps track_flop merge".split()
)
DISTANCES = {"jepa_l2": "‖a−b‖₂", "jepa_mse": "the mean squared difference", "infonce": "InfoNCE"}


def score_names(metrics: dict) -> list[str]:
    """An evaluation's scores, the headline score first; without the stop rate where answers were chosen."""
    names = [metrics["score"], *metrics["scores"], "exact", "startswith", "stop_rate"]
    return [name for name in dict.fromkeys(names) if name != "stop_rate" or metrics.get("stop_rate") is not None]


def hub_id(name: str) -> str | None:
    """A model's hub name, None for a folder here: models/tiny would look like one."""
    here = any((root / name).exists() for root in (Path(), HERE))
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not here else None


def data_name(path: str) -> str:
    """A data file's base name, since its folder is nobody's business; a hub dataset's whole name."""
    return path if HUB.fullmatch(path) else Path(path).name


def rows_of(metrics: dict) -> str:
    """Which rows were answered."""
    part = metrics["settings"].get("process_split")
    return data_name(metrics["settings"]["input_file"]) + (f", part {part}" if part else "")


def method(s: dict) -> str:
    """What was trained, in words and numbers."""
    text = "regular fine-tuning, without the JEPA term"
    if jepa(s):
        distance = next((shown for name, shown in DISTANCES.items() if s.get(name)), "1 − cosine")
        text = f"LLM-JEPA with λ = {s['lbd']:g}, γ = {s['gamma']:g}, k = {s['predictors']} predictor tokens, {distance}"
        text += f", for a share {s['jepa_ratio']:g} of the examples" if s["jepa_ratio"] < 1 else ""
    if s.get("stp") and s.get("stp_lbd"):
        text += f"; with Semantic Tube Prediction ({s['stp']}), weight {s['stp_lbd']:g}"
    return text


def jepa(s: dict) -> bool:
    """Whether any example had the JEPA term."""
    return not s["regular"] and s["lbd"] > 0 and s["jepa_ratio"] > 0


def applying(s: dict) -> list[tuple[str, Any]]:
    """The settings that had a part in the numbers and that the card says nowhere else."""
    file, share = s.get("data_file"), s.get("val_fraction")
    only = {"lora_rank": s["lora"], "eval_split": file, "val_fraction": share, "split_seed": file or share}
    only["max_steps"] = s.get("max_steps", -1) > 0
    only |= dict.fromkeys(VIEWS, jepa(s)) | {k: s.get("stp") for k in s if k.startswith("stp_")}
    shown = [k for k, v in s.items() if k not in ELSEWHERE and v is not None and v is not False and only.get(k, True)]
    return [(k, s[k]) for k in sorted(shown)]


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(str(x).replace("|", "\\|").replace("\n", " ") for x in row) for row in [header, *rows]]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join(["---"] * len(header)), *lines[1:]])


def body(run: Path, s: dict, record: dict, evaluations: dict[str, dict], repo: str | None) -> str:
    """The card's text."""
    base = hub_id(s["model_name"]) or f"{Path(s['model_name']).name} (a folder, not on the hub)"
    base += f" at {s['revision']}" if s.get("revision") else ""
    commit = record.get("git_commit") or "unknown"
    dirty = {True: ", with uncommitted changes", False: ""}.get(record.get("git_dirty"), ", changes unknown")
    facts = [
        ["base", f"random weights of the shape of {base}" if s["pretrain"] else base],
        ["method", method(s)],
        ["labels", s["lm_labels"]],
        ["seed", s["finetune_seed"]],
        ["steps, tokens", f"{record['steps']}, {record['tokens']}"],
        ["wall time", f"{record['wall_seconds']:.0f} s, {record.get('processes', 1)} × {record['device']}"],
        ["code", commit + dirty],
        ["versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())],
        ["last logged", ", ".join(f"{k} {v:.4g}" for k, v in record.get("final", {}).items()) or "–"],
    ]
    part = f"trained on but for a share {s.get('eval_split')} held out" if s.get("data_file") else "trained on"
    data = [[data_name(path), "held out" if path == s.get("eval_file") else part, checksum]
            for path, checksum in record["data_sha256"].items()]  # fmt: skip
    scored = [
        [name, score, *(f"{100 * x:.2f}" for x in (m[score], *m["ci95"][score])), m["n"], rows_of(m)]
        for name, m in evaluations.items() for score in score_names(m)
    ]  # fmt: skip
    heading = ["dataset", "score", "%", "95 % from", "to", "n", "rows"]
    return "\n\n".join([
        f"{MARK}\n\n# {run.resolve().name}",
        table(["", ""], facts),
        "## Data\n\n" + table(["file", "", "SHA-256"], data),
        "## Settings\n\n" + table(["flag", "value"], [[f"`--{k}`", v] for k, v in applying(s)]),
        "## Evaluation\n\n" + (table(heading, scored) if scored else "Not evaluated."),
        "Intervals are Wilson's, over rows: how far another seed would be from this one they do not say."
        if scored else "",
        f"## Use\n\n{use(s, repo or run.resolve().name)}",
        "## What is not shown\n\n" + "\n".join(f"- {line}" for line in not_shown(s, record, evaluations)),
    ]).replace("\n\n\n\n", "\n\n") + "\n"  # fmt: skip


def use(s: dict, name: str) -> str:
    """How the model is asked: as it was trained."""
    if s["plain"] and s.get("train_all"):
        return "It was pretrained on texts alone and answers nothing; fine-tune it."
    code = [
        *(["from peft import PeftModel"] if s["lora"] else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{s["model_name"] if s["lora"] else name}")',
    ]
    if s["lora"]:  # the adapter holds rows of tokens that its base does not have
        code += ["if len(tokenizer) > model.get_input_embeddings().num_embeddings:",
                 "    model.resize_token_embeddings(len(tokenizer))",
                 f'model = PeftModel.from_pretrained(model, "{name}")']  # fmt: skip
    if s["plain"]:
        how = "It is prompted without a chat template."
        code += ['prompt = tokenizer("…<|perception|>", return_tensors="pt")']
    else:
        how = "It is prompted by its tokenizer's chat template, with the system turn that it was trained with, if any."
        code += ['messages = [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}]',
                 "prompt = tokenizer.apply_chat_template(",
                 "    messages, add_generation_prompt=True, enable_thinking=False, date_string=\"26 Jul 2024\",",
                 '    return_dict=True, return_tensors="pt",', ")"]  # fmt: skip
    code += ["answer = model.generate(**prompt, max_new_tokens=128, do_sample=False)[0]",
             'print(tokenizer.decode(answer[prompt["input_ids"].shape[1]:], skip_special_tokens=True))']  # fmt: skip
    return how + "\n\n```python\n" + "\n".join(code) + "\n```"


def not_shown(s: dict, record: dict, evaluations: dict[str, dict]) -> list[str]:
    """What a reader might take from the card and should not."""
    lines = ["One run of one seed: it compares no methods. That takes several seeds of each (`report.py`)."]
    lines += [] if evaluations else ["How well it answers: it has not been evaluated."]
    trained = {checksum for path, checksum in record["data_sha256"].items() if path != s.get("eval_file")}
    for name, m in evaluations.items():
        seen = m["data_sha256"] in trained and m["settings"].get("process_split") != "test"
        lines += [f"Scores on unseen rows: {name} has rows that were trained on."] if seen else []
    lines += ["Whether rows of the test files are also in the training files (`datasets/prepare.py check` tells)."]
    clean = record.get("git_commit") and record.get("git_dirty") is False
    lines += [] if clean else ["The exact code: its commit is unknown or had uncommitted changes."]
    lines += ["Predictor tokens serve training alone; they are no part of a prompt."] if jepa(s) else []
    return [*lines, "Anything but these scores: neither safety nor bias nor other uses were looked at."]
