"""Run folders as finetune.py and evaluate.py write them, with made-up scores."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

REGULAR = {"model_name": "models/tiny", "learning_rate": 1e-3, "regular": True, "lbd": 0.1, "predictors": 0}
JEPA = REGULAR | {"regular": False, "lbd": 1.0, "predictors": 1}
FEW = {82: 90.0, 23: 80.0}  # seed → exact match in percent
METRICS = "eval/synth/metrics.json"
ENVIRONMENT = {
    "git_commit": "df01d15302ad41e7a9a4b4abdfa05be1820da814",
    "git_dirty": False,
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "device": "x86_64",
    "threads": 2,
    "processes": 1,
    "skipped_examples": 0,
    "steps": 2000,
}


def synthetic_run(
    folder: Path, settings: dict, seed: int, scores: dict[str, float], dataset: str = "synth", **changes: object
) -> Path:
    """A finished run evaluated on `dataset`: `scores` in percent, `changes` replace keys of run.json."""
    evaluation = folder / "eval" / dataset
    evaluation.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(settings | {"finetune_seed": seed, "output_dir": str(folder)}))
    record = ENVIRONMENT | {"status": "finished", "wall_seconds": 120.0 + seed % 7 + 20 * (not settings["regular"])}
    record |= {"data_sha256": {"datasets/synth_train.jsonl": "b0a8"}} | changes
    (folder / "run.json").write_text(json.dumps(record))
    fractions = {name: value / 100 for name, value in ({"startswith": 90.0, "stop_rate": 100.0} | scores).items()}
    own = [name for name in fractions if name not in ("exact", "startswith", "stop_rate")]
    metrics = ENVIRONMENT | {"task": dataset, "n": 2000, "score": (*own, "exact")[0], "scores": own, "failures": {}}
    metrics |= {"data_sha256": "5c44", "settings": {"model_name": str(folder), "max_new_tokens": 128}}
    (evaluation / "metrics.json").write_text(json.dumps(metrics | fractions))
    return folder


def one_arm(root: Path, name: str, settings: dict, exact: dict[int, float], **changes: object) -> list[str]:
    """A run for each seed of `exact`, which maps it to the score in percent."""
    return [str(synthetic_run(root / f"{name}-s{s}", settings, s, {"exact": e}, **changes)) for s, e in exact.items()]


def pretrained_run(root: Path, name: str, pretraining: dict, seed: int, exact: float) -> str:
    """A regular run whose base model is that of the run folder paraphrase-NAME-sSEED."""
    base = root / f"paraphrase-{name}-s{seed}"
    base.mkdir()
    (base / "args.json").write_text(json.dumps(pretraining | {"finetune_seed": seed}))
    (base / "run.json").write_text(json.dumps({"data_sha256": {"paraphrase_train.jsonl": "aa"}}))
    return str(synthetic_run(root / f"tuned-{base.name}", REGULAR | {"model_name": str(base)}, seed, {"exact": exact}))


def two_arms(root: Path, exact: dict = FEW, better: dict | None = None, **changes: object) -> list[str]:
    """Run folders of a regular and a JEPA arm, which scores 1 point more; `changes` replace settings of the latter."""
    better = better or {seed: value + 1 for seed, value in exact.items()}
    return one_arm(root, "regular", REGULAR, exact) + one_arm(root, "jepa", JEPA | changes, better)


def change(run: Path | str, file: str, **changes: object) -> None:
    """Replaces keys of one of the run's JSON files; keys whose new value is ... are removed."""
    path = Path(run) / file
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def add_learning(run: Path | str, cosine: float, r1: float, term: str = "jepa", **figures: float) -> None:
    """What the run's terms have learned: a training cosine (shuffled: 0.1), and the retrieval of the test pairs."""
    found = {"collapsed": cosine < 0.2, "cosine": cosine, "cosine_shuffled": 0.1, "grad_ratio": 0.25}
    found |= {"retrieval": cosine, "retrieval_chance": 0.125, "effective_rank": 5.0} if term == "jepa" else {}
    change(run, "run.json", learned={term: found | figures})
    at = {name: {"r1": value, "r10": value, "mrr": value} for name, value in (("chance", 0.0005), ("text_to_code", r1))}
    change(run, METRICS, retrieval=at | {"n": 2000, "code_to_text": {"r1": r1 / 2, "r10": r1, "mrr": r1}})


def log_steps(run: Path | str, steps: int = 400, flops: bool = True, seed: int = 0) -> None:
    """Writes metrics.jsonl: decreasing losses, collapsing views."""
    rng = np.random.default_rng(seed)
    jepa = not json.loads((Path(run) / "args.json").read_text())["regular"]
    rows = []
    for step in range(1, steps + 1):
        loss = 0.05 + 6 * np.exp(-step / 60) * rng.uniform(0.8, 1.2)
        row = {"step": step, "lm_loss": loss, "label_tokens": 99, "epoch": step / steps}
        if jepa:
            loss = 1e-3 + np.exp(-step / 40) * rng.uniform(0.8, 1.2)
            row |= {"jepa_loss": loss, "cosine": 1 - loss, "cosine_shuffled": 1 - 4 * loss / 3}
            row |= {"retrieval": 0.125 + loss / 2, "effective_rank": 1 + 6 * loss}
        rows.append(row | ({"flops": step * 1e12 * (1 + jepa)} if flops else {}))
    rows.append({"step": steps, "train_runtime": 123.0, "epoch": 1.0})
    (Path(run) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def export_views(run: Path | str, pairs: int = 40, dims: int = 16, seed: int = 0, noise: float = 0.3, **how) -> Path:
    """Writes the embeddings of the run's views where the report looks for them; equal vectors for `dims` = 0."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(pairs, dims or 1)).astype(np.float32) if dims else np.ones((pairs, 4), np.float32)
    code = (text + noise * rng.normal(size=text.shape)).astype(np.float32) if dims else text
    path = Path(run) / "eval" / "synth" / "embeddings.safetensors"
    metadata = {"model": str(run), "layer": "-1", "pooling": "last", "data_sha256": "5c44"} | how
    save_file({"text": text, "code": code, "ids": np.arange(1, pairs + 1)}, path, metadata)
    return path
