"""How commands start: flags before slow imports, interrupts, variables of launchers, the model's origin."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, metrics, start, train

from llm_jepa import distributed
from llm_jepa.cli import UsageError
from llm_jepa.files import read_json

LAUNCHED = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
# Sends SIGINT at the first import of a module.
HOOK = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPT_AT"):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
"""


def python(*argv: object, **variables: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, in the project's folder."""
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("command", "module"),
    [("finetune.py --train_file datasets/synth_test.jsonl --model_name models/tiny", "numpy"),
     ("evaluate.py --score_gold --input_file datasets/synth_test.jsonl", "torch"),
     ("finetune8bh200.py --train_file datasets/synth_test.jsonl --model_name models/tiny", "transformers"),
     ("-m llm_jepa.report runs/none", "llm_jepa.reports.comparison")],
)  # fmt: skip
def test_an_interrupt_during_imports_is_one_line(command, module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    done = python(*command.split(), INTERRUPT_AT=module, PYTHONPATH=str(tmp_path))
    lines = done.stderr.splitlines()
    assert done.returncode == 130 and lines[-1].endswith("interrupted") and len(lines) == 1, done.stderr


def test_an_interpreter_without_the_packages_is_told_of_setup():
    for argv in (["finetune.py", "--help"], ["-m", "llm_jepa.report", "x"]):
        done = python("-S", *argv)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "setup.sh" in done.stderr, done.stderr


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables, and no others of launchers; what the code removes comes back after the test."""
    names = (*distributed.TORCHRUN, *distributed.MPI_SIZES, "LOCAL_WORLD_SIZE")
    for name in [n for n in os.environ if n.startswith(distributed.ACCELERATE)] + [*names]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(*variable) for variable in variables.items()]


@pytest.mark.parametrize(
    ("variables", "processes", "main"),
    [({"RANK": "3", "LOCAL_RANK": "1"}, 1, True), ({"PMI_SIZE": "1", "LOCAL_RANK": "2"}, 1, True),
     (LAUNCHED | {"MASTER_PORT": ""}, 1, True),
     (LAUNCHED | {"WORLD_SIZE": "4", "RANK": "2", "PMI_SIZE": "9"}, 4, False)],
)  # fmt: skip
def test_torchruns_variables_count_only_together(environment, variables, processes, main):
    environment(variables)
    distributed.clean_environment("x")
    assert (distributed.processes(), distributed.is_main_process()) == (processes, main)
    left = set() if processes == 1 else {*LAUNCHED}
    assert os.environ.keys() & {*distributed.TORCHRUN, "LOCAL_WORLD_SIZE", "PMI_SIZE"} == left


@pytest.mark.parametrize(
    ("variables", "mentioned"),
    [({"WORLD_SIZE": "4", "RANK": "3"}, "WORLD_SIZE"), ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE"),
     (LAUNCHED | {"RANK": "first"}, "RANK=first"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two")],
)  # fmt: skip
def test_an_incomplete_environment_of_several_processes_is_refused(environment, variables, mentioned):
    environment(variables)
    with pytest.raises(UsageError, match=mentioned):
        distributed.clean_environment("x")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("plain") / "run", "--max_steps", 2, "--dtype", "float32")


def test_variables_of_accelerate_change_nothing(environment, plain, data, tmp_path):
    variables = {"ACCELERATE_MIXED_PRECISION": "bf16", "LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true",
                 "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
                 "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "5"}  # fmt: skip
    environment(variables)
    done = start(data, tmp_path / "run", "--max_steps", 2, "--dtype", "float32")
    assert done.code == 0 and all(f"{n}={v}" in done.err for n, v in variables.items() if n[:4] == "ACCE"), done.err
    own, other = ([(x["lm_loss"], x["jepa_loss"]) for x in metrics(run)] for run in (tmp_path / "run", plain))
    assert own == other
    assert read_json(tmp_path / "run/run.json")["processes"] == 1


def test_a_run_records_where_its_model_comes_from(plain, data, tmp_path):
    record = read_json(plain / "run.json")
    assert (record["model"], record["base"]) == ("tests/golden/models/llama3", None)
    run = train(data, tmp_path / "run", "--max_steps", 1, "--regular", model=plain)
    base = read_json(run / "run.json")["base"]
    assert base["settings"] == read_json(plain / "args.json") and base["data_sha256"] == record["data_sha256"]


def test_forked_processes_leave_an_interrupt_to_the_first_one():
    script = """
import os, signal, time
from llm_jepa.cli import end_at_interrupts, run_command
signal.signal(signal.SIGINT, signal.default_int_handler)
end_at_interrupts("x", lambda: True)
ready, started = os.pipe()
def work():
    if pid := os.fork():
        os.read(ready, 1)
        os.kill(pid, signal.SIGINT)
        assert os.waitpid(pid, 0)[1] == 0
        os.kill(os.getpid(), signal.SIGINT)
    os.write(started, b"1")
    time.sleep(0.5)
    os._exit(0)
code = run_command("x", work)
os.kill(os.getpid(), signal.SIGINT)  # a second one, while the interpreter ends
"""
    done = python("-c", script)
    assert done.returncode == 130 and done.stderr == "x: interrupted\n", done.stderr
