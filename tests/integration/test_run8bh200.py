"""run8bh200.sh and run8bh200.sbatch: a node's variables, the preflight, and what each node runs."""

import os
import subprocess

import pytest
from conftest import ROOT
from driver_project import VARIABLES, Project, flag, resolved, templates

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
TWO = {"SEEDS": "4", "NPROC": "8", "NNODES": "2", "MASTER_ADDR": "node0"}
SLURM = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "c[3-4]"}


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node whose nvidia-smi lists four GPUs, with the programs of SLURM."""
    tools = {
        "nvidia-smi": 'for i in 0 1 2 3; do echo "GPU $i: NVIDIA H200"; done',
        "scontrol": '[ "$*" = "show hostnames c[3-4]" ] && printf "c3\\nc4\\n"',
        "srun": 'while [ "$1" != bash ]; do shift; done; for node in 1 0; do SLURM_NODEID=$node "$@"; done',
    }
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    templates.cache_clear()
    return Project(tmp_path, monkeypatch, "run8bh200.sh")


def only(done, script: str) -> list[str]:
    """The flags of the only call of a script."""
    (argv,) = (argv for name, argv in done.steps if name == script and "--score_gold" not in argv)
    return argv


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, {"MODEL": LLAMA, "ARMS": "regular jepa", "PREDICTORS": "0", "NPROC": "4", "NODE_RANK": "0"}),
     ({"CUDA_VISIBLE_DEVICES": "2,3,5"}, {"NPROC": "3"}),
     ({"CUDA_VISIBLE_DEVICES": ""}, {"NPROC": "8"}),
     (SLURM, {"NNODES": "2", "NODE_RANK": "1", "--master_addr": "c3", "--master_port": "23456"}),
     (SLURM | {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "c9"},
      {"NNODES": "3", "NODE_RANK": "2", "--master_addr": "c9"}),
     (TWO | {"NODE_RANK": "1", "DEVICE": "cpu", "JOIN_LIMIT": "5"}, {"--device": "cpu", "--join_limit": "5"})],
)  # fmt: skip
def test_variables_of_a_node(node, variables, expected):
    lines, values = templates("run8bh200.sh", tuple(sorted(variables.items())))
    (preflight,) = (line.split() for line in lines if line.startswith("preflight="))
    assert {name: values.get(name) or flag(preflight, name) for name in expected} == expected


def test_without_arguments_it_compares_after_one_preflight(node):
    done = node.run("compare")
    names = ("regular-lr2e-5-e4-s{}-p4", "jepa-lr2e-5-lbd2-k0-e4-s{}-p4")
    runs = [f"runs/synth-Llama-3.1-8B-Instruct-{name.format(s)}" for s in (82, 23, 37, 84, 4) for name in names]
    assert (done.code, done.runs) == (0, runs)
    assert [flag(argv, "--model_name") for argv in done.evaluated] == runs
    assert [name for name, _ in done.steps].index("llm_jepa.preflight") == 0
    check = only(done, "llm_jepa.preflight")
    assert [flag(check, name) for name in ("--runs", "--nproc_per_node", "--model_name")] == ["10", "4", LLAMA]
    assert flag(check, "--data_files") == "datasets/synth_train.jsonl,datasets/synth_test.jsonl"
    assert {name for name, _ in node.run("compare").steps} == {"llm_jepa.report"}


def test_the_preflight_gets_the_flags_of_each_arm(node):
    flags = "-- --lora --max_length 900 -- --stp geodesic"
    done = node.run("compare", *flags.split(), ARMS="clip nitp:.5 regular", SEEDS="4")
    trainings = " ".join(only(done, "llm_jepa.preflight")).split(" -- ")[1:]
    plans = [resolved(["--train_file", "x", "--model_name", "x", *words.split()]) for words in trainings]
    assert done.code == 0 and len(plans) == len(done.trained) == 3
    for plan, training in zip(plans, map(resolved, done.trained), strict=True):
        names = ("regular", "nitp", "nitp_lbd", "lbd", "jepa_loss", "predictors", "stp", "lora", "max_length")
        assert [plan[name] for name in names] == [training[name] for name in names]
    assert [(plan["jepa_loss"], plan["nitp_lbd"], plan["stp"]) for plan in plans] == [
        ("clip", 0.8, "geodesic"), ("cosine", 0.5, "geodesic"), ("cosine", 0.8, None)
    ]  # fmt: skip
    assert all(script != "finetune" for script, _ in done.steps), "TRAINER is the script of all arms"


def test_the_preflight_gets_the_folder_and_number_of_all_runs(node):
    check = only(node.run("run_jepa", *"-----", "82", "-", "synth,yelp", "far/away"), "llm_jepa.preflight")
    assert flag(check, "--output_dir") == "far/away" and flag(check, "--runs") == "2"


@pytest.mark.parametrize(("preflight", "code"), [("yes", 1), ("no", 0)])
def test_nothing_runs_after_a_failed_preflight(node, preflight, code):
    done = node.run("run_jepa", trouble=lambda name, _: name == "llm_jepa.preflight", PREFLIGHT=preflight, SEEDS="4")
    assert done.code == code and len(done.runs) == 1 - code


@pytest.mark.parametrize("rank", ["1", "0"])
def test_every_node_trains_and_the_first_one_evaluates(node, rank):
    done = node.run("run_jepa", NODE_RANK=rank, EVAL_FLAGS="--allow_code_execution", **TWO)
    assert (done.code, len(done.trained), done.runs[0][-4:]) == (0, 1, "-p16")
    assert len(done.evaluated) == len(done.checked) == (rank == "0") and bool(done.out) == (rank == "0")
    assert all("--allow_code_execution" in argv for argv in done.evaluated + done.checked)


@pytest.mark.parametrize(
    ("variables", "mentioned"),
    [({"JOBS": "2"}, "JOBS"),
     ({"NNODES": "two"}, "NNODES"),
     (TWO | {"NODE_RANK": "2"}, "NODE_RANK"),
     (TWO, "NODE_RANK"),
     ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
     ({"TRAINER": "other.py"}, "other.py"),
     ({"DEVICE": "tpu"}, "tpu")],
)  # fmt: skip
def test_wrong_variables_are_refused(node, variables, mentioned):
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables
    done = subprocess.run(["bash", ROOT / "run8bh200.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and mentioned in done.stderr and done.stderr.count("\n") == 1


def test_sweep_is_refused(node):
    done = node.run("sweep")
    assert (done.code, done.steps) == (2, []) and "sweep" in done.err


def test_the_sbatch_file_runs_the_script_on_each_node(node):
    node.copy_scripts()
    variables = {"SLURM_SUBMIT_DIR": str(node.folder), "PYTHON_BIN": "true"} | SLURM
    command = ["bash", "run8bh200.sbatch", "run_jepa", "--help"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.stdout.count("usage: bash run8bh200.sh") == 2
