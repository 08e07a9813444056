"""Fine-tune a sentence encoder with MultipleNegativesRankingLoss, the baseline of retrieval in plans/jobs.md.

    python experiments/mnrl.py pick jobs --model FOLDER --parts runs/parts

FOLDER has all-MiniLM-L6-v2, and `--parts` the files that `experiments/terms.py` writes. sentence-transformers must be
installed. Each run adds a line to experiments/results/mnrl.jsonl; runs that have a line are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the repository's own modules

import numpy as np  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss  # noqa: E402

from llm_jepa.cli import run_command  # noqa: E402
from llm_jepa.data.examples import Problems, read_examples  # noqa: E402
from llm_jepa.evaluation.embeddings import retrieval  # noqa: E402

RESULTS = ROOT / "experiments/results/mnrl.jsonl"
PICKED = 2e-4
RUNS = {  # (examples, learning rate, seed, test part)
    "pick": [(6000, rate, 42, "held_out") for rate in (5e-5, 1e-4, 2e-4)],
    "jobs": [(8000, PICKED, seed, "fresh") for seed in range(11, 16)],
}


def columns(file: Path) -> dict[str, list[str]]:
    """The two views of a file's examples."""
    examples = read_examples(str(file), Problems())
    return {"text": [e.user for e in examples], "code": [e.assistant for e in examples]}


def perform(model: str, parts: Path, examples: int, rate: float, seed: int, test: str) -> dict:
    """Trains for one epoch in batches of 64 and measures retrieval among the pairs of the test part."""
    encoder = SentenceTransformer(model, device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(parts / "mnrl"),
        num_train_epochs=1,
        per_device_train_batch_size=64,
        learning_rate=rate,
        warmup_steps=0.1,
        seed=seed,
        save_strategy="no",
        report_to="none",
    )
    data = Dataset.from_dict(columns(parts / "synth" / f"{examples}.jsonl"))
    begin = time.perf_counter()
    SentenceTransformerTrainer(encoder, arguments, data, loss=MultipleNegativesRankingLoss(encoder)).train()
    seconds = round(time.perf_counter() - begin, 1)
    views = [
        np.asarray(encoder.encode(texts), np.float64)
        for texts in columns(parts / "synth" / f"{test}2000.jsonl").values()
    ]
    line = {"arm": "mnrl", "examples": examples, "learning_rate": rate, "seed": seed, "test": test}
    return line | {"retrieval": retrieval(*views), "train_seconds": seconds}


def work(argv: list[str] | None) -> None:
    """Parses the flags and performs the runs that have no line yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=RUNS)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--parts", type=Path, required=True, help="folder with the parts of the dataset")
    options = parser.parse_args(argv)
    RESULTS.touch()
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    finished = {(line["examples"], line["learning_rate"], line["seed"], line["test"]) for line in done}
    for run in (run for name in options.experiments for run in RUNS[name] if run not in finished):
        line = perform(options.model, options.parts, *run)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(run_command("mnrl.py", lambda: work(None)))
