"""Fixtures shared by all tests: golden models, small data files, the scripts run in-process."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Each of the two test processes has a core; what it starts, too.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
)
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODELS = ("llama3", "chatml", "google_gemma")
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are too small for a second thread to gain anything

import finetune  # noqa: E402, F401

# Each run of a script collects garbage, and most of a short one's time would go into a walk through the libraries.
gc.collect()
gc.freeze()


def message_row(user: str, assistant: str, system: str | None = "Write the regular expression.") -> dict:
    """One line of data."""
    turns = [("system", system), ("user", user), ("assistant", assistant)]
    return {"messages": [{"role": r, "content": c} for r, c in turns if c is not None]}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def call(script: str, *argv: object) -> SimpleNamespace:
    """Runs finetune.main or evaluate.main in this process: its exit code, stdout and stderr."""
    module = importlib.import_module(script)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = module.main([str(a) for a in argv])
        except SystemExit as exit_:
            code = exit_.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def dry_run(*argv: object) -> dict:
    """The JSON object of `finetune.py --dry_run`."""
    done = call("finetune", *argv)
    assert done.code == 0, done.err
    return json.loads(done.out)


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """The saved weights of a model or adapter folder."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / name)


def same_weights(a: Path, b: Path, **tolerance: float) -> None:
    """Asserts that two folders hold the same weights, bit for bit unless a tolerance is given."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=key)


@pytest.fixture
def regex_rows() -> Path:
    return GOLDEN / "regex_rows.jsonl"


@pytest.fixture(autouse=True)
def _restore_signal_handlers():
    import signal

    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
