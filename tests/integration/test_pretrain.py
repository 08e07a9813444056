"""run.sh run_pretrain on a few rows, for real: pretraining, then fine-tuning and evaluation."""

from __future__ import annotations

import json
import shutil
import subprocess

from conftest import ROOT, message_row, write_rows
from test_compare import STUB, server  # noqa: F401
from test_drivers import environment, make_stub


def test_pretrained_weights_are_fine_tuned_and_evaluated(tmp_path, server):  # noqa: F811
    shutil.copy(ROOT / "run.sh", tmp_path)
    shutil.copytree(ROOT / "llm_jepa", tmp_path / "llm_jepa")
    shutil.copytree(ROOT / "models" / "tiny", tmp_path / "models" / "tiny")
    (tmp_path / "datasets").mkdir()
    words = ["lake", "ring", "truck", "dog", "wood", "stone", "sand", "moss"]
    write_rows(
        tmp_path / "datasets" / "paraphrase_train.jsonl",
        [message_row(f"the {a} is near the {b}", f"the {b} has the {a} near it", None) for a in words for b in words],
    )
    rows = [message_row(f"a {word} film, {c.lower()}", c, "Rate it.") for word in words for c in ("Good", "Bad")]
    write_rows(tmp_path / "datasets" / "rotten_tomatoes_train.jsonl", rows)
    write_rows(tmp_path / "datasets" / "rotten_tomatoes_test.jsonl", rows[:9])
    stub = make_stub(tmp_path / "stub", STUB)
    variables = environment(PYTHON_BIN=str(stub), SERVER=server, OMP_NUM_THREADS="1", FINETUNE_EPOCHS="12")
    command = ["bash", "run.sh", "run_pretrain", "models/tiny", "2e-3", "4", "-", "1", "82", "0.5", "rotten_tomatoes"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    settings = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("runs/*/args.json")}
    (first, before), (_, after) = sorted(settings.items())
    assert before["train_all"] and before["lm_labels"] == "all" and before["pretrain"] and before["lbd"] == 0.5
    assert after["model_name"] == f"runs/{first}" and after["regular"] and after["plain"] and not after["pretrain"]
    (metrics,) = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/eval/*/metrics.json")]
    assert (metrics["task"], metrics["n"], metrics["score"]) == ("rotten_tomatoes", 9, "startswith")
    # The class stands in the text: a model that trained on these very rows tells it.
    assert metrics["startswith"] > 0.8 and metrics["class_match"] <= metrics["startswith"], metrics
    assert done.stdout.count("seed 82") == 1
