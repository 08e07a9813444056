"""run8bh200.sh and its sbatch file with a stub interpreter: what each node starts, checks and skips."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_drivers import RUN_STUB, SEEDS, Project, environment, make_stub, pairs, running

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
OWN = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "NODE_TIMEOUT", "JOIN_LIMIT", "PREFLIGHT",
       "DEVICE", "TRAINER", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NODEID",
       "SLURM_JOB_NODELIST", "SLURM_SUBMIT_DIR", "PROTOCOL", "JOBS", "REPORTS_DIR", "ALLOW")  # fmt: skip
# The training's stub under another name, and a preflight that fails on request; reports of two arms are only recorded.
STUB = (
    RUN_STUB.replace('if argv[0] == "report.py":', 'if argv[0] == "report.py" and "--output_dir" not in argv:')
    .replace('script == "finetune.py"', 'script == "finetune8bh200.py"')
    .replace('elif "--score_gold"', 'elif script == "preflight.py":\n    sys.exit(trouble == ["not", "ready"])\n'
             'elif script == "report.py":\n    pass\nelif "--score_gold"')
)  # fmt: skip


class Node(Project):
    """A copy of the drivers, with eight GPUs that nvidia-smi lists, and SLURM's programs."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        for name in ("run8bh200.sh", "run8bh200.sbatch", "compare.sh"):
            shutil.copy(ROOT / name, folder)
        (folder / "finetune8bh200.py").touch()
        (folder / "bin").mkdir()
        tools = {
            "nvidia-smi": 'for i in 0 1 2 3 4 5 6 7; do echo "GPU $i: NVIDIA H200"; done',
            "scontrol": '[ "$*" = "show hostnames c[3-4]" ] && printf "c3\\nc4\\n"',
            "srun": 'while [ "$1" != bash ]; do shift; done; for node in 1 0; do SLURM_NODEID=$node "$@"; done',
        }
        for name, text in tools.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        self.stub = make_stub(folder / "stub", STUB)

    def variables(self, **variables: str) -> dict[str, str]:
        own = {k: v for k, v in environment().items() if k not in OWN}
        return own | {"PYTHON_BIN": str(self.stub), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"} | variables

    def run(self, *arguments: str, script: str = "run8bh200.sh", **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(self.folder / script), *arguments], capture_output=True, text=True, timeout=100,
            env=self.variables(**variables), stdin=subprocess.DEVNULL, cwd=self.folder,
        )  # fmt: skip

    def by_script(self) -> dict[str, list[list[str]]]:
        found: dict[str, list[list[str]]] = {}
        for argv in self.calls():
            found.setdefault(next(a for a in argv if a.endswith(".py")), []).append(argv)
        return found


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def launch(argv: list[str]) -> list[str]:
    """What stands in front of the script."""
    return argv[: next(i for i, a in enumerate(argv) if a.endswith(".py"))]


TORCHRUN = ["-m", "llm_jepa.large.launch", "--nproc_per_node", "8"]


def test_alone_it_is_both_arms_on_five_seeds_after_the_preflight(node):
    done = node.run()
    assert done.returncode == 0, done.stderr
    calls = node.calls()
    assert calls[0][0] == "preflight.py" and sum(argv[0] == "preflight.py" for argv in calls) == 1
    assert pairs(calls[0]) | {"--model_name": LLAMA, "--output_dir": "runs", "--runs": "10", "--device": "cuda",
                              "--nproc_per_node": "8", "--nnodes": "1", "--predictors": "0",
                              "--data_files": "datasets/synth_train.jsonl,datasets/synth_test.jsonl",
                              } == pairs(calls[0])  # fmt: skip
    trained = [argv for argv in calls if "finetune8bh200.py" in argv]
    names = ("regular-lr2e-5-e4-s{}-p8", "jepa-lr2e-5-lbd2-k0-e4-s{}-p8")
    runs = [f"runs/synth-Llama-3.1-8B-Instruct-{name}".format(seed) for seed in SEEDS for name in names]
    assert [argv[argv.index("--output_dir") + 1] for argv in trained] == runs
    assert all(launch(argv) == [*TORCHRUN, "--max-restarts", "3", "--standalone"] for argv in trained)
    assert trained[1][trained[1].index("--train_file") :] == [
        "--train_file", "datasets/synth_train.jsonl", "--model_name", LLAMA, "--learning_rate", "2e-5", "--num_epochs",
        "4", "--finetune_seed", "82", "--predictors", "0", "--lbd", "2", "--output_dir", runs[1],
    ]  # fmt: skip
    answered = [argv for argv in calls if "evaluate.py" in argv]
    assert [argv[-4:] for argv in answered] == [
        ["--model_name", run, "--input_file", "datasets/synth_test.jsonl"] for run in runs
    ]
    assert all(launch(argv) == [*TORCHRUN, "--standalone"] for argv in answered)
    reports = [argv for argv in calls if argv[0] == "report.py"]
    report = "reports/synth-Llama-3.1-8B-Instruct-compare-lr2e-5-lbd2-k0-e4-p8"
    assert reports == [["report.py", *runs, "--output_dir", report]]
    assert len(done.stdout.splitlines()) == 10
    again = node.run()
    assert again.returncode == 0 and [argv[0] for argv in node.calls()] == ["report.py"]
    assert again.stdout.count("done before: training, evaluation") == 10


def test_the_preflight_comes_before_an_evaluation_that_is_left(node):
    """Nodes that do not evaluate would wait for it, and the GPUs that it checks would be at work."""
    assert node.run("run_jepa", SEEDS="82").returncode == 0
    for path in node.folder.glob("runs/*/eval"):
        shutil.rmtree(path)
    node.calls()
    assert node.run("run_jepa", SEEDS="82 23").returncode == 0
    scripts = [next(a for a in argv if a.endswith(".py")) for argv in node.calls()]
    assert scripts[:2] == ["preflight.py", "evaluate.py"] and scripts.count("preflight.py") == 1


@pytest.mark.parametrize(("dataset", "flags", "length"), [("synth", (), None), ("yelp", (), "2048"),
                                                          ("yelp", ("--max_length", "900"), "900")])  # fmt: skip
def test_the_preflight_plans_for_the_rows_of_the_training(node, dataset, flags, length):
    for part in ("train", "test"):
        (node.folder / f"datasets/{dataset}_{part}.jsonl").touch()
    done = node.run("run_jepa", "-", "-", "-", "-", "-", "82", "-", dataset, "--", *flags)
    assert done.returncode == 0, done.stderr
    found = node.by_script()
    for (argv,) in (found["preflight.py"], found["finetune8bh200.py"]):
        assert pairs(argv).get("--max_length") == length


def test_nine_arguments(node):
    done = node.run("run_jepa", "org/M-8B", "4e-5", "2", "-3", "1", "37", "2.5", "turk", "far/away")
    assert done.returncode == 0, done.stderr
    found, run = node.by_script(), "far/away/turk-M-8B-jepa-lr4e-5-lbd2.5-k1-t-3-e2-s37-p8"
    (argv,) = found["finetune8bh200.py"]
    assert argv[-8:] == ["--predictors", "1", "--lbd", "2.5", "--last_token", "-3", "--output_dir", run]
    assert pairs(found["preflight.py"][0])["--output_dir"] == "far/away"
    assert pairs(found["evaluate.py"][0])["--model_name"] == run
    assert "seed 37" in done.stdout and "n = 1" in done.stdout
    again = node.run("run_regular", "org/M-8B", "-", "-", "-", "-", "5", "-", "-", "-", RUNS_DIR="here")
    assert again.returncode == 0, again.stderr
    found = node.by_script()
    assert found["finetune8bh200.py"][0][-3:] == [
        "--regular",
        "--output_dir",
        "here/synth-M-8B-regular-lr2e-5-e4-s5-p8",
    ]
    assert "--regular" in found["preflight.py"][0]


def test_adapter_flags_reach_the_training_and_the_preflight(node):
    extra = ["--lora", "--lora_rank", "64", "--load_in_4bit"]
    assert node.run("run_jepa", "--", *extra, SEEDS="4", NPROC="2", MAX_RESTARTS="0").returncode == 0
    found = node.by_script()
    (argv,) = found["finetune8bh200.py"]
    assert argv[-4:] == extra and "-x" in pairs(argv)["--output_dir"]
    assert launch(argv)[-3:] == ["--max-restarts", "0", "--standalone"] and launch(argv)[3] == "2"
    (check,) = found["preflight.py"]
    assert check[check.index("--") :] == ["--", "--predictors", "0", "--lbd", "2", *extra]
    assert pairs(check)["--runs"] == "1" and pairs(check)["--nproc_per_node"] == "2"


def test_what_is_finished_needs_no_room(node):
    assert node.run("run_jepa", "-", "-", "-", "-", "-", "82").returncode == 0
    node.calls()
    assert node.run(SEEDS="82 23").returncode == 0
    assert pairs(node.by_script()["preflight.py"][0])["--runs"] == "3"


@pytest.mark.parametrize(("devices", "processes"), [("2,3,5", "3"), ("GPU-1,GPU-2", "2"), (None, "8"), ("", "8")])
def test_processes_are_the_gpus_that_may_be_used(node, devices, processes):
    variables = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    assert node.run("run_jepa", SEEDS="4", STUB="not ready", **variables).returncode == 1
    assert pairs(node.calls()[0])["--nproc_per_node"] == processes


# ------------------------------------------------------------------------------------------------------- many nodes


def rendezvous(run: str, address: str, host: int, timeout: int = 7200) -> list[str]:
    conf = f"is_host={host},join_timeout={timeout},read_timeout={timeout}"
    return [
        "--nnodes",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        address,
        "--rdzv_id",
        run,
        "--rdzv_conf",
        conf,
    ]


def test_two_nodes_train_and_the_first_one_evaluates(node):
    run = "synth-Llama-3.1-8B-Instruct-jepa-lr2e-5-lbd2-k0-e4-s4-p16"
    given = {"SEEDS": "4", "NNODES": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1234", "NODE_TIMEOUT": "99"}
    for rank in (1, 0):
        shutil.rmtree(node.folder / "runs", ignore_errors=True)
        done = node.run("run_jepa", NODE_RANK=str(rank), **given)
        assert done.returncode == 0, done.stderr
        found = node.by_script()
        (argv,) = found["finetune8bh200.py"]
        expected = [*TORCHRUN, "--max-restarts", "3", *rendezvous(run, "node0:1234", 1 - rank, 99)]
        assert launch(argv) == expected and argv[-1] == f"runs/{run}"
        check = pairs(found["preflight.py"][0])
        assert (check["--nnodes"], check["--node_rank"], check["--master_addr"]) == ("2", str(rank), "node0")
        assert check["--master_port"] == "1234"
        assert len(found.get("evaluate.py", [])) == len(node.checks) == (rank == 0)
        assert ("mean (n = 1)" in done.stdout) == (rank == 0)
    assert node.run("run_jepa", NODE_RANK="1", **given).returncode == 0 and node.calls() == []


def test_nodes_of_a_slurm_job(node):
    given = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "c[3-4]", "SEEDS": "4"}
    done = node.run("run_jepa", SLURM_NODEID="1", STUB="not ready", **given)
    assert done.returncode == 1
    check = pairs(node.calls()[0])
    assert (check["--master_addr"], check["--master_port"], check["--node_rank"]) == ("c3", "23456", "1")
    node.run("run_jepa", SLURM_NODEID="1", STUB="not ready", **given, NNODES="3", NODE_RANK="2", MASTER_ADDR="c9")
    check = pairs(node.calls()[0])
    assert (check["--master_addr"], check["--nnodes"], check["--node_rank"]) == ("c9", "3", "2"), "what is given wins"


def test_the_sbatch_file_runs_it_on_each_node(node):
    given = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "c[3-4]", "SEEDS": "4"}
    done = node.run("run_regular", script="run8bh200.sbatch", SLURM_SUBMIT_DIR=str(node.folder), **given)
    assert done.returncode == 0, done.stderr
    found = node.by_script()
    assert [pairs(argv)["--node_rank"] for argv in found["preflight.py"]] == ["1"], "then the run is finished"
    assert launch(found["finetune8bh200.py"][0])[-1].startswith("is_host=0")
    assert len(found["evaluate.py"]) == 1
    options = (ROOT / "run8bh200.sbatch").read_text()
    for option in ("--ntasks-per-node=1", "--gpus-per-node=8", "--nodes=1", "--requeue"):
        assert f"#SBATCH {option}\n" in options


# ------------------------------------------------------------------------------------------------- what is missing


def test_nothing_is_trained_before_the_preflight_is_content(node):
    done = node.run(STUB="not ready")
    assert done.returncode == 1 and "run8bh200.sh: error: not ready" in done.stderr
    assert [argv[0] for argv in node.calls()] == ["preflight.py"] and node.checks == []
    assert node.run(STUB="not ready", PREFLIGHT="no", SEEDS="4").returncode == 0
    assert "preflight.py" not in node.by_script()


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (("run_all",), {}, "run_all"),
        (("sweep",), {}, "sweep"),
        (("run_jepa", *"---------", "tenth"), {}, "tenth"),
        (("compare", "synth", "m", "third"), {}, "third"),
        (("run_jepa", "-", "fast"), {}, "fast"),
        (("run_jepa", "-", "-", "-", "-", "-", "-", "-", "nothing"), {}, "datasets/nothing_train.jsonl"),
        ((), {"JOBS": "2"}, "JOBS"),
        ((), {"NPROC": "0"}, "NPROC cannot be '0'"),
        ((), {"NNODES": "two"}, "NODES"),
        ((), {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK 2"),
        ((), {"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK, this node's number counted from 0, is missing"),
        ((), {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        ((), {"TRAINER": "other.py"}, "there is no other.py"),
        ((), {"DEVICE": "tpu"}, "tpu"),
        (("run_jepa", "--", "--output_dir", "x"), {}, "--output_dir is not for run8bh200.sh"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(node, arguments, variables, named):
    done = node.run(*arguments, **variables)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("run8bh200.sh: error: ") and node.calls() == []


def test_a_training_that_ends_unfinished_is_an_error(node):
    done = node.run("run_jepa", SEEDS="4", STUB="unfinished")
    assert done.returncode == 1 and "ended unfinished" in done.stderr


def test_help_names_everything(node):
    done = node.run("--help")
    assert done.returncode == 0 and done.stderr == "" and node.calls() == []
    for word in (*OWN[:10], "NPROC", LLAMA, "82 23 37 84 4", "sbatch", "--lora", "run_regular", "RUNS_DIR"):
        assert word in done.stdout, word
    assert max(map(len, done.stdout.splitlines())) <= 130


def test_ctrl_c_ends_everything_at_once(node):
    process = subprocess.Popen(
        ["bash", "run8bh200.sh"], cwd=node.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=node.variables(STUB="hang"), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 30
        while not (node.folder / "hanging").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        pids = [int(pid) for pid in (node.folder / "pids").read_text().split()]
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 130 and time.monotonic() - begin < 10 and "run8bh200.sh: stopped" in stderr
        assert len(pids) == 2 and not any(map(running, pids))
    finally:
        process.kill()
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)
