"""Two gloo processes train to what one process trains to."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MODEL, ROOT, column, make_model, message_row, metrics, same_weights, write_rows
from ranks import Ranks

from llm_jepa.files import read_json

SCRIPT, JEPA = "finetune", ("--predictors", 1, "--lbd", 1)
# 13 examples in steps of 8: the second step has 5, so one process gets a short micro-batch with --batch_size 4, and
# empty ones with --batch_size 1 --grad_accum 4.
EXAMPLES = [message_row(f"lines with the number {i}", f"({i}).*" * (1 + i % 3)) for i in range(13)]

# A thread of the process group that outlives training would abort the process at its exit (torch #179291).
NO_GLOO_THREAD = """
import glob
threads = [open(name).read().strip() for name in glob.glob("/proc/self/task/*/comm")]
assert not [t for t in threads if "gloo" in t], threads
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", EXAMPLES)


def launch(out: Path, data: Path, *flags: object) -> subprocess.Popen:
    """Two processes of finetune.py under torchrun."""
    torchrun = [sys.executable, "-m", "llm_jepa.large.launch", "--standalone", "--nproc_per_node", 2]
    where = ["--train_file", data, "--output_dir", out, "--model_name", MODEL]
    command = [str(c) for c in (*torchrun, ROOT / "finetune.py", *where, *flags)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def one_and_two(ranks: Ranks, data: Path, folder: Path, flags: tuple, sizes: list, **code: str) -> tuple[Path, Path]:
    """Run folders of one process and of two, trained with JEPA. `sizes`: batch size and accumulation of each."""
    runs = folder / "one", folder / "two"
    for processes, (out, (batch, accum)) in enumerate(zip(runs, sizes, strict=True), 1):
        where = ("--train_file", data, "--output_dir", out, "--model_name", MODEL, "--learning_rate", 1e-3)
        size = ("--batch_size", batch, "--grad_accum", accum)
        codes, errors = ranks(processes, *where, *JEPA, *flags, *size, **{"after": NO_GLOO_THREAD} | code)
        assert codes == [0] * processes, errors
        out.with_suffix(".err").write_text(errors)
    return runs


@pytest.mark.parametrize(
    ("flags", "batch", "accum"),
    [(("--jepa_loss", "mse", "--jepa_ratio", 0.5, "--stp", "patch", "--stp_lbd", 1, "--stp_spans", 2, "--stp_layer", 1),
      1, 4),
     (("--sigreg", 0.3, "--nitp", "--nitp_layer", 1), 1, 4),
     (("--sigreg", 0.3, "--jepa_loss", "clip", "--jepa_ratio", 0.3, "--nitp"), 4, 1)],
    ids=["mse-dropout-stp", "sigreg-nitp", "sigreg-clip-dropout"],
)  # fmt: skip
def test_two_processes_equal_one(ranks, data, tmp_path, flags, batch, accum):
    flags = (*flags, "--num_epochs", 2, "--eval_file", data, "--eval_generate", 1)  # one process generates nothing
    one, two = one_and_two(ranks, data, tmp_path, flags, [(8, 1), (batch, accum)])
    same_weights(one, two, rtol=1e-3, atol=2e-4)
    evaluated = ("eval_nitp_loss",) if "--sigreg" in flags else ("eval_loss",)  # SIGReg: of a micro-batch
    for key in ("loss", "lm_loss", "stp_loss", "sigreg_loss", "nitp_loss", *evaluated):
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-5)
    assert column(two, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-4)
    for key in ("tokens", "label_tokens", "pairs", "spans", "next_tokens"):
        assert column(two, key) == column(one, key)
    assert read_json(two / "run.json")["processes"] == 2


def test_processes_agree_on_generations_the_best_model_and_the_last_step(ranks, data, tmp_path):
    flags = ("--regular", "--eval_file", data, "--eval_generate", 5, "--sample_generations", 3, "--eval_on_start",
             "--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 9, "--learning_rate", 1e-6, "--save_best",
             "--early_stopping_patience", 1, "--keep_checkpoints", "--grad_accum", 1)  # fmt: skip
    runs = [tmp_path / "1", tmp_path / "2"]
    for processes, run in enumerate(runs, 1):
        where = ("--train_file", data, "--output_dir", run, "--model_name", MODEL, "--batch_size", 4 // processes)
        codes, errors = ranks(processes, *where, *flags)
        assert codes == [0] * processes, errors
        # The score stays 0, which stops the training, and the loss falls, so the last evaluation is the best.
        record = read_json(run / "run.json")
        assert record["steps"] == 2 and record["best"] == {"step": 2, "eval_exact": 0}
        same_weights(run, run / "checkpoint-2")
    one, two = runs
    keys = ("eval_exact", "eval_exact_high", "eval_stop_rate")
    assert [column(one, key) for key in keys] == [column(two, key) for key in keys]
    assert len((one / "generations.jsonl").read_text().splitlines()) == 9
    assert (one / "generations.jsonl").read_text() == (two / "generations.jsonl").read_text()


@pytest.mark.parametrize(
    "flags",
    [("clip", "--negatives_queue", 99, "--gradient_stats", 1),
     ("infonce", "--gamma", 0, "--jepa_ratio", 0.3, "--negatives_queue", 99),
     ("vicreg", "--gamma", 0, "--jepa_ratio", 0.5, "--center", "--stop_gradient", "text", "--gradient_checkpointing")],
    ids=["clip-queue-measured", "infonce-queue-dropout", "vicreg-center-dropout"],
)  # fmt: skip
def test_pairs_of_all_processes_are_contrasted_as_those_of_one_micro_batch(ranks, data, tmp_path, flags):
    flags = ("--num_epochs", 3, "--eval_file", data, "--jepa_loss", *flags)
    one, two = one_and_two(ranks, data, tmp_path, flags, [(8, 1), (4, 1)])
    same_weights(one, two, rtol=1e-3, atol=2e-4)
    for key in ("loss", "jepa_loss", "eval_jepa_loss"):
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-4), key
    assert column(two, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-3)
    assert column(two, "pairs") == column(one, "pairs") and min(column(one, "pairs")) < 8
    assert all("effective_rank" in line for line in metrics(two, "retrieval") if "loss" in line)
    assert bool(column(two, "jepa_grad_ratio")) == ("--gamma" not in flags)


SMALL = {"vocab_size": 531, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER_DROP = SMALL | {"num_hidden_layers": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.4, "dropout": 0}
# Each MLP is an expert for a few tokens: a process whose tokens do not reach it does not use its parameters.
EXPERTS = """
import torch
from transformers.models.llama.modeling_llama import LlamaMLP
dense = LlamaMLP.forward
def routed(self, x):
    reached = x[..., 0] > 2.3
    if not reached.any():
        print("not reached", file=sys.stderr)
        return torch.zeros_like(x)
    return torch.zeros_like(x).masked_scatter(reached[..., None], dense(self, x[reached]))
LlamaMLP.forward = routed
"""


@pytest.mark.parametrize(
    ("kind", "config", "before", "flags"),
    [("opt", LAYER_DROP, "", ("--layout", "separate", "--gamma", 0)),
     ("llama", SMALL | {"intermediate_size": 48}, EXPERTS, ("--jepa_ratio", 0.5))],
    ids=["layer-drop", "experts"],
)  # fmt: skip
def test_parameters_that_a_step_does_not_use_change_nothing(ranks, data, tmp_path, kind, config, before, flags):
    model = make_model(tmp_path / "model", kind, "llama3", std=0.2, **config)
    flags = ("--model_name", model, *flags, "--num_epochs", 3, "--optim", "adamw_torch")
    one, two = one_and_two(ranks, data, tmp_path, flags, [(4, 2), (2, 2)], before=before)
    unreached = [run.with_suffix(".err").read_text().count("not reached") for run in (one, two)]
    assert not before or unreached[1] > 2 * unreached[0], unreached
    for key in ("loss", "grad_norm"):
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-3)
    same_weights(one, two, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("bad", [1, 7])
def test_bad_example_in_any_processs_stream_is_reported_once(ranks, tmp_path, bad):
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    write_rows(data, [*EXAMPLES[:bad], {"messages": []}, *EXAMPLES[bad:]])
    where = ("--train_file", data, "--output_dir", run, "--model_name", MODEL, *JEPA)
    flags = ("--streaming", "--max_steps", 9, "--batch_size", 1, "--grad_accum", 3, "--dataloader_num_workers", 1)
    codes, errors = ranks(2, *where, *flags)
    reason = f"{data}:{bad + 1}: "
    assert (codes, "Traceback" in errors, errors.count(f"error: {reason}")) == ([2, 2], False, 1), errors
    if bad == 1:  # among the first examples, which are checked before the run folder is made
        assert not run.exists()
        return
    record = read_json(run / "run.json")
    assert record["status"] == "failed" and record["error"].startswith(reason) and not list(run.glob("*.safetensors"))
    codes, errors = ranks(2, *where, *flags, "--overwrite", "--skip_bad_examples")
    assert codes == [0, 0] and reason in errors
    assert read_json(run / "run.json")["skipped_examples"] == 1


def test_usage_error_ends_all_processes_with_one_message(data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    job = launch(tmp_path, data, "--regular")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2, "the exit code of finetune.py"
    assert errors.count("error: ") == 1 and "--overwrite" in errors and "Traceback" not in errors
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_dry_run_prints_one_object(ranks, data):
    codes, errors = ranks(2, "--train_file", data, "--model_name", MODEL, "--regular", "--dry_run", 2)
    assert codes == [0, 0], errors
    assert json.loads(ranks.out)["lm_loss"] > 0


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_torchrun_ends_all_processes_without_a_traceback(data, tmp_path, sent, code):
    run = tmp_path / "run"
    job = launch(run, data, "--regular", "--max_steps", 100000, "--save_strategy", "no")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(sent)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code and "Traceback" not in errors and f"--resume {run}" in errors, errors
    assert read_json(run / "run.json")["status"] == "interrupted"
