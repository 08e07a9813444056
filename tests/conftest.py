"""Fixtures shared by all tests: golden models, small data files, the scripts run in-process."""

import contextlib
import gc
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

# Each of the two test processes has one core, and so has what it starts.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
)
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODELS = ("llama3", "chatml", "google_gemma")
MODEL = GOLDEN / "models" / "llama3"
JEPA = ("--predictors", 2, "--lbd", 1)
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are too small for a second thread to gain anything

import finetune  # noqa: E402, F401
from llm_jepa.files import read_json, write_json  # noqa: E402
from llm_jepa.run_folder import complete_checkpoints  # noqa: E402

# Each run of a script collects garbage; without the freeze most of a short run's time goes to the libraries' objects.
gc.collect()
gc.freeze()

# `pytest -m fast`: all tests in these folders or files, except in slow ones.
FAST = ("unit", "parity", "property")
SLOW = ("test_preflight", "test_prepare", "test_plots", "test_programs", "test_report_in_browser",
        "test_language_up_to_a_length")  # fmt: skip
# Reasons for which CI accepts a skipped test.
ALLOWED_SKIPS = ("GPU", "vLLM", "bitsandbytes", "network namespaces", "cannot be mounted", "bubblewrap", "Chromium")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {item.path.name, item.path.parent.name} & set(FAST) and not any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.fast)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """In CI, a test that is skipped for a reason that is not in ALLOWED_SKIPS fails."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2]
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            report.outcome, report.longrepr = "failed", f"{item.nodeid}: CI does not accept the skip: {reason}"
    return report


def message_row(user: str, assistant: str, system: str | None = "Write the regular expression.") -> dict:
    """One line of data."""
    turns = [("system", system), ("user", user), ("assistant", assistant)]
    return {"messages": [{"role": r, "content": c} for r, c in turns if c is not None]}


# Answers of different length, so that a mean of means differs from a mean over tokens.
EXAMPLES = [message_row(f"the number {i} and word {i * i}", f"({i}){'.*' * (i % 4)}[{i * i}]") for i in range(24)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """The contents of all files in a folder, by their path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def random_model(kind: str, std: float = 0.0, **config: object) -> torch.nn.Module:
    """A random model of an architecture, by its model_type. With `std` = 0.2 each layer changes its input a lot."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    for parameter in model.parameters():
        if std and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def make_model(folder: Path, kind: str, tokenizer: str = "chatml", **config: object) -> Path:
    """A folder with a random model and the tokenizer of a golden model."""
    random_model(kind, **config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GOLDEN / "models" / tokenizer).save_pretrained(folder)
    return folder


def changed_copy(source: Path, target: Path, **changes: dict) -> Path:
    """A copy of a folder without its evaluations, with changes to JSON files, by their names without ending."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("eval"))
    for name, values in changes.items():
        write_json(target / f"{name}.json", read_json(target / f"{name}.json") | values)
    return target


def half_token(responses: list[list[int]], *others: int) -> int:
    """A token, not one of `others`, that about half of the responses contain."""
    counts = {t: sum(t in tokens for tokens in responses) for tokens in responses for t in tokens if t not in others}
    return min(counts, key=lambda t: (abs(2 * counts[t] - len(responses)), t))


def call(script: str, *argv: object, code: int | None = None) -> SimpleNamespace:
    """Runs the main function of a script in this process: its exit code, which must be `code`, stdout and stderr."""
    module = importlib.import_module(script)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            got = module.main([str(a) for a in argv])
        except SystemExit as exit_:
            got = exit_.code
    assert code is None or got == code, err.getvalue()
    return SimpleNamespace(code=got, out=out.getvalue(), err=err.getvalue())


def dry_run(*argv: object) -> dict:
    """The JSON object of `finetune.py --dry_run`."""
    return json.loads(call("finetune", *argv, code=0).out)


def start(
    data: Path, out: Path, *flags: object, model: str | Path = "llama3", code: int | None = None
) -> SimpleNamespace:
    """Runs finetune.py on a golden model (or a model folder), as `call` does."""
    size = () if "--tokens_per_batch" in flags else ("--batch_size", 4)
    return call("finetune", "--train_file", data, "--model_name", GOLDEN / "models" / model, "--output_dir", out,
                *size, "--grad_accum", 2, "--learning_rate", "1e-3", *flags, code=code)  # fmt: skip


def train(data: Path, out: Path, *flags: object, model: str | Path = "llama3", code: int = 0) -> Path:
    """The same; returns the run folder."""
    start(data, out, *flags, model=model, code=code)
    return out


def predictions(model: Path, data: Path, out: Path, *flags: object) -> list[str]:
    """The predictions of evaluate.py in at most 8 tokens."""
    call("evaluate", "--model_name", model, "--input_file", data, "--task", "text", "--max_new_tokens", 8,
         "--output_file", out / "predictions.jsonl", *flags, code=0)  # fmt: skip
    return [row["prediction"] for row in read_lines(out / "predictions.jsonl")]


def is_running(pid: int | str) -> bool:
    """Whether a process exists and is no zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def skip_without_isolation() -> None:
    """Skips the test if bubblewrap does not work here."""
    command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    if not shutil.which("bwrap") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("bubblewrap does not work")


def metrics(run: Path, key: str = "loss") -> list[dict]:
    """The lines of metrics.jsonl that have a key."""
    return [x for x in read_lines(run / "metrics.jsonl") if key in x]


def column(run: Path, key: str) -> list[float]:
    """The values of a key in metrics.jsonl."""
    return [line[key] for line in metrics(run, key)]


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """The saved parameters of a model or adapter folder."""
    return load_file(Path(folder) / name)


def same_weights(a: Path, b: Path, **tolerance: float) -> None:
    """Asserts that two folders hold the same parameters, bit for bit unless a tolerance is given."""
    adapter = (Path(a) / "adapter_model.safetensors").exists()
    first, second = (weights(f, "adapter_model.safetensors" if adapter else "model.safetensors") for f in (a, b))
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=key)


def interrupted(run: Path, step: int, folder: Path) -> Path:
    """A copy of a finished run as a kill after the checkpoint of `step` leaves it."""
    shutil.copytree(run, folder)
    for checkpoint in complete_checkpoints(folder):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    write_json(folder / "run.json", read_json(folder / "run.json") | {"status": "running"})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """EXAMPLES as a file, which a test must not change."""
    return write_rows(tmp_path_factory.mktemp("data") / "words_train.jsonl", EXAMPLES)


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """The first eight of EXAMPLES."""
    return write_rows(tmp_path_factory.mktemp("eight") / "rows.jsonl", EXAMPLES[:8])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Callable[..., Path]:
    """A function from flags to a run folder, which a test must not change. Each set of flags is trained once."""

    @cache
    def run(*flags: object, model: str | Path = "llama3") -> Path:
        return train(data, tmp_path_factory.mktemp("trained") / "run", *flags, model=model)

    return run


@pytest.fixture(scope="module")
def ranks(request):
    """Jobs of several processes of the test module's SCRIPT."""
    from ranks import Ranks

    with contextlib.closing(Ranks(request.module.SCRIPT)) as started:
        yield started


@pytest.fixture(autouse=True)
def _restore_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
