"""Training runs must give the stored numbers: a change that should do nothing must leave them equal.

values.json stores some steps of 20-step runs on a small model. The relative tolerance is 1e-6, because kernels differ
between CPUs. `LLM_JEPA_EXACT=1` requires equality bit for bit, for comparisons on one machine. To store new values
after an intended change of the numbers:

    LLM_JEPA_WRITE=1 python -m pytest -n 0 tests/regression
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, MODEL, ROOT, call

VALUES = Path(__file__).with_name("values.json")
EXACT, WRITE = (os.environ.get(f"LLM_JEPA_{name}") == "1" for name in ("EXACT", "WRITE"))
EXAMPLES = 22  # not a multiple of the batch size: the last step of an epoch is short
KEPT_STEPS = (1, 5, 10, 15, 20)
TIMING = ("runtime", "per_second")
BOUNDED = ("cosine", "shuffled", "_sd", "rank")  # their rounding error is that of the views, whatever their size

JEPA = "--predictors 1 --lbd 1"
RUNS = {
    "regular": "--regular",
    "pretrain": "--regular --pretrain",
    "train_all": "--regular --train_all",
    "packed": JEPA,
    "additive": f"{JEPA} --layout additive",
    "separate": f"{JEPA} --layout separate",
    "in_chat": f"{JEPA} --text_view in_chat",
    "cosine": "--predictors 0 --lbd 2 --gamma 0.5",
    "l2": f"{JEPA} --jepa_l2",
    "mse": f"{JEPA} --jepa_mse",
    "infonce": f"{JEPA} --infonce",
    "reverse": f"{JEPA} --reverse_pred",
    "geodesic": "--regular --stp geodesic --stp_lbd 1 --stp_spans 2",
    "patch": f"{JEPA} --stp patch --stp_lbd 1 --stp_warmup 10",
    "lora": f"{JEPA} --lora",
    "plain": f"{JEPA} --plain",
    "reference_labels": f"{JEPA} --lm_labels reference --last_token -1",
    "accumulation": f"{JEPA} --batch_size 2 --grad_accum 2",
    "reference_grad_scale": f"{JEPA} --batch_size 2 --grad_accum 2 --reference_grad_scale",
    "jepa_ratio": f"{JEPA} --jepa_ratio 0.5",
    "tokens_per_batch": f"{JEPA} --tokens_per_batch 300",
    "streaming": f"{JEPA} --streaming",
    "two_processes": f"{JEPA} --batch_size 1 --grad_accum 2",
}
DEFAULTS = "--batch_size 4 --grad_accum 1 --learning_rate 3e-5 --max_steps 20 --save_strategy no"  # replaced by a run's


def train(name: str, folder: Path) -> dict[str, list[float]]:
    """Runs finetune.py with the flags of a case: the values of each log key at the kept steps."""
    data, run = folder / "examples.jsonl", folder / "run"
    data.write_text("".join((GOLDEN / "regex_rows.jsonl").read_text().splitlines(keepends=True)[:EXAMPLES]))
    argv = [*DEFAULTS.split(), *RUNS[name].split(), "--train_file", data, "--model_name", MODEL, "--output_dir", run]
    argv += [] if name == "streaming" else ["--eval_file", GOLDEN / "tricky_rows.jsonl", "--eval_strategy", "epoch"]
    if name == "two_processes":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, ROOT / "finetune.py", *map(str, argv)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        call("finetune", *argv, code=0)
    columns: dict[str, list[float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for key, value in line.items():
            if line["step"] in KEPT_STEPS and key != "step" and not key.endswith(TIMING):
                columns.setdefault(key, []).append(value)
    return columns


@pytest.mark.parametrize("name", RUNS)
def test_training_gives_stored_numbers(name, tmp_path):
    """Compares the values of a case with the stored ones, or stores them with LLM_JEPA_WRITE=1."""
    measured, stored = train(name, tmp_path), json.loads(VALUES.read_text()) if VALUES.exists() else {}
    assert len(measured["loss"]) == len(KEPT_STEPS) and all(map(math.isfinite, measured["loss"]))
    if WRITE:
        kept = {case: stored[case] for case in RUNS if case in stored} | {name: measured}
        lines = {c: ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kept[c].items()) for c in kept}
        VALUES.write_text("{\n" + ",\n".join(f' "{c}": {{\n{text}\n }}' for c, text in lines.items()) + "\n}\n")
        return
    assert measured.keys() == stored[name].keys()
    for key, values in stored[name].items():
        near = pytest.approx(values, rel=1e-6, abs=1e-5 if key.endswith(BOUNDED) else 0)
        assert measured[key] == (values if EXACT else near), key
