"""Two gloo processes train to what one process trains to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, message_row, same_weights, write_rows
from ranks import Ranks

from llm_jepa.files import read_json

# 13 rows in steps of 8: the second step has 5, so that one process gets a short micro-batch with --batch_size 4, and
# with --batch_size 1 --grad_accum 4 some get none at all.
ROWS = [message_row(f"lines with the number {i}", f"({i}).*" * (1 + i % 3)) for i in range(13)]


def launch(out: Path, data: Path, *flags: object) -> subprocess.Popen:
    """Two processes of finetune.py under torchrun."""
    command = [
        sys.executable,
        "-m",
        "llm_jepa.large.launch",
        "--standalone",
        "--nproc_per_node",
        2,
        ROOT / "finetune.py",
    ]
    command += ["--train_file", data, "--output_dir", out, "--model_name", GOLDEN / "models" / "llama3"]
    command += ["--learning_rate", "1e-3", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def ranks():
    started = Ranks("finetune")
    yield started
    started.close()


def metrics(run: Path, key: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


JEPA = ("--predictors", 1, "--lbd", 1)


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (("--regular",), ((1, 4),)),
        ((*JEPA, "--jepa_ratio", 0.5), ((4, 1), (1, 4))),
        ((*JEPA, "--stp", "geodesic", "--stp_lbd", 1, "--stp_spans", 2, "--stp_layer", 1), ((4, 1),)),
    ],
    ids=["regular", "jepa-ld", "jepa-stp"],
)
def test_two_processes_equal_one(ranks, tmp_path, flags, sizes):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = (*flags, "--eval_file", data, "--eval_generate", 1)  # one of two processes has no row to generate for

    def train(processes: int, batch: int, accum: int) -> Path:
        out = tmp_path / f"{processes}-{batch}"
        where = ("--train_file", data, "--output_dir", out, "--model_name", GOLDEN / "models" / "llama3")
        size = ("--batch_size", batch, "--grad_accum", accum, "--learning_rate", 1e-3, "--num_epochs", 2)
        codes, errors = ranks(processes, *where, *size, *flags)
        assert codes == [0] * processes, errors
        return out

    one = train(1, 8, 1)
    for batch, accum in sizes:
        two = train(2, batch, accum)
        same_weights(one, two, rtol=1e-3, atol=2e-4)
        for key in ("total", "lm_loss", "stp_loss", "eval_loss"):
            assert metrics(two, key) == pytest.approx(metrics(one, key), rel=1e-5)
        assert metrics(two, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-4)
        for key in ("tokens", "label_tokens", "pairs", "spans"):
            assert metrics(two, key) == metrics(one, key)
        assert read_json(two / "run.json")["processes"] == 2


@pytest.mark.parametrize("bad", [1, 6, 7])
def test_a_bad_row_in_the_stream_of_any_process_is_named(ranks, tmp_path, bad):
    rows = [*ROWS, *[{"messages": []}] * 2]
    rows[bad], rows[13] = rows[13], rows[bad]
    data, run = write_rows(tmp_path / "rows.jsonl", rows[:14]), tmp_path / "run"
    where = ("--train_file", data, "--output_dir", run, "--model_name", GOLDEN / "models" / "llama3", *JEPA)
    flags = ("--streaming", "--max_steps", 9, "--batch_size", 1, "--grad_accum", 3)
    codes, errors = ranks(2, *where, *flags)
    reason = f'{data}:{bad + 1}: no "messages" list (rows of another kind: --text_field, --code_field)'
    assert (codes, "Traceback" in errors, errors.count(f"error: {reason}")) == ([2, 2], False, 1), errors
    if bad == 1:  # among the first rows, which are looked at before the run folder is made
        assert not run.exists()
    else:
        assert read_json(run / "run.json")["error"] == reason
    codes, errors = ranks(2, *where, *flags, "--overwrite", "--skip_bad_examples")
    assert codes == [0, 0] and f"skipped 1 bad examples: {reason}" in errors
    assert read_json(run / "run.json")["skipped_examples"] == 1


def test_a_mistake_ends_all_processes(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    one = tmp_path / "one"
    one.mkdir()
    (one / "mine.txt").write_text("mine")
    job = launch(one, data, "--regular")
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 2, "the exit code of finetune.py"
    assert errors.count("exists; give --resume") == 1 and "Traceback" not in errors, "said by the main process alone"
    assert [p.name for p in one.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_torchrun_ends_all_without_a_traceback(tmp_path, sent, code):
    data, run = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "run"
    job = launch(run, data, "--regular", "--max_steps", 100000, "--save_strategy", "no")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(sent)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code and "Traceback" not in errors, errors
    assert read_json(run / "run.json")["status"] == "interrupted"


def test_no_thread_of_the_process_group_outlives_training(ranks, tmp_path):
    """Such a thread, caught at work by the end of the interpreter, aborts the process (torch #179291)."""
    watch = (
        "import glob\n"
        "threads = [open(name).read().strip() for name in glob.glob('/proc/self/task/*/comm')]\n"
        "assert not [t for t in threads if 'gloo' in t], threads\n"
    )
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    where = ("--train_file", data, "--output_dir", tmp_path / "run", "--model_name", GOLDEN / "models" / "llama3")
    codes, errors = ranks(2, *where, "--regular", "--num_epochs", 1, after=watch)
    assert codes == [0, 0], errors
