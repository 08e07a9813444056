"""run.sh compare and sweep, JOBS and PROTOCOL=paper: what is trained and scored on what, how it stops and goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, same_weights
from test_drivers import environment, make_stub, pairs, running

import finetune
from llm_jepa.cli import parse_flags
from llm_jepa.files import read_json

NAMES = ("run.sh", "compare.sh")

# Stands for the interpreter in run.sh. FAKE=1: finetune.py and evaluate.py write at once what run.sh reads; else they
# run in a fork of a server that has torch loaded. The report is only recorded: its folders are tested elsewhere.
STUB = r"""
import hashlib, json, os, pathlib, signal, socket, sys, time

argv = sys.argv[1:]
if argv[0] == "-m" and argv[1].startswith("llm_jepa.") and argv[1].count(".") == 1:
    argv = [argv[1].removeprefix("llm_jepa.") + ".py", *argv[2:]]
script, given, trouble = argv[0], set(argv), os.environ.get("STUB", "").split()
value = lambda flag, default=None: argv[argv.index(flag) + 1] if flag in given else default
checksum = lambda path: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
if script == "sweep.py" or (script == "report.py" and "--output_dir" not in given):
    os.execv(sys.executable, [sys.executable, "-m", "llm_jepa." + argv[0].removesuffix(".py"), *argv[1:]])
with open("calls.jsonl", "a") as log:
    log.write(json.dumps({"argv": argv, "threads": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid()}) + "\n")
if script == "finetune.py" and trouble:
    run = value("--output_dir")
    if trouble[0] == "fail" and run.endswith(trouble[1]):
        print("out of memory\rstill out of memory", file=sys.stderr)
        sys.exit(7)
    if trouble[0] == "hang":
        with open("pids", "a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(300)
if script == "report.py":
    sys.exit(0)
if os.environ.get("FAKE") and script == "finetune.py":
    run, data = pathlib.Path(value("--output_dir")), value("--train_file") or value("--data_file")
    run.mkdir(parents=True, exist_ok=True)
    args = {"model_name": value("--model_name"), "regular": "--regular" in given,
            "finetune_seed": int(value("--finetune_seed")),
            "learning_rate": float(value("--learning_rate")), "predictors": int(value("--predictors", 0)),
            "lbd": float(value("--lbd", 0.1)), "data_file": value("--data_file"),
            "eval_split": float(value("--eval_split", 0.2)), "split_seed": int(value("--split_seed", 42))}
    record = {"status": "finished", "wall_seconds": 5.0, "data_sha256": {data: checksum(data)}}
    time.sleep(float(os.environ.get("SLEEP", 0)))
    (run / "args.json").write_text(json.dumps(args, indent=1))
    (run / "run.json").write_text(json.dumps(record, indent=1))
elif os.environ.get("FAKE") and "--score_gold" not in given:
    run = pathlib.Path(value("--model_name"))
    folder = run / "eval/synth"
    folder.mkdir(parents=True)
    args = json.loads((run / "args.json").read_text())
    best = eval(os.environ.get("SCORE", "0.5"), dict(args))
    scores = {"dfa_equal": best, "exact": 1 - best, "startswith": 0.9, "stop_rate": 1.0, "scores": ["dfa_equal"]}
    settings = {"process_split": value("--process_split")}
    metrics = {"task": "synth", "n": 10, "score": "dfa_equal", **scores, "settings": settings, "ci95": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"data_sha256": checksum(value("--input_file"))}))
elif not os.environ.get("FAKE"):
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["SERVER"])
    socket.send_fds(server, [json.dumps([argv, os.getcwd(), os.environ["OMP_WAIT_POLICY"]]).encode()], [1, 2])
    sys.exit(int(server.recv(16)))
"""

SERVER = r"""
import json, os, socket, sys, threading

sys.path.insert(0, os.environ["PROJECT"])
import evaluate, finetune

server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen(16)
while True:
    client, _ = server.accept()
    message, fds, _, _ = socket.recv_fds(client, 65536, 2)
    if os.fork() == 0:
        argv, folder, os.environ["OMP_WAIT_POLICY"] = json.loads(message)
        os.chdir(folder)
        os.dup2(fds[0], 1), os.dup2(fds[1], 2)
        sys.argv = argv
        try:
            code = {"finetune.py": finetune, "evaluate.py": evaluate}[argv[0]].main(argv[1:])
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        client.send(str(code).encode())
        os._exit(0)
    client.close()
    for fd in fds:
        os.close(fd)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "socket"
    variables = environment(PROJECT=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(path)], env=variables)
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    yield str(path)
    process.kill()


class Project:
    """A copy of the drivers with a handful of rows and the stub as interpreter."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in NAMES:
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "llm_jepa", folder / "llm_jepa")
        (folder / "models").symlink_to(ROOT / "models")
        (folder / "datasets").mkdir()
        for part, count in (("train", 40), ("test", 4)):
            lines = (ROOT / f"datasets/synth_{part}.jsonl").read_text().splitlines(keepends=True)
            (folder / f"datasets/synth_{part}.jsonl").write_text("".join(lines[:count]))
        self.stub = make_stub(folder / "stub", STUB)

    def variables(self, **variables: str) -> dict[str, str]:
        own = ("JOBS", "PROTOCOL", "GRID_K", "GRID_LBD", "LEARNING_RATES", "SWEEP_SEED", "EVAL_SPLIT", "SPLIT_SEED",
               "REPORTS_DIR", "ALLOW", "FAKE", "STUB", "SCORE")  # fmt: skip
        usual = {"PYTHON_BIN": str(self.stub), "SEEDS": "1 2", "EPOCHS": "1"}
        return {k: v for k, v in environment().items() if k not in own} | usual | variables

    def run(self, *arguments: str, code: int = 0, **variables: str) -> SimpleNamespace:
        """Calls run.sh; the scripts' command lines it started by script, and what it printed."""
        done = subprocess.run(
            ["bash", "run.sh", *arguments], capture_output=True, text=True, timeout=120, cwd=self.folder,
            env=self.variables(**variables), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        log = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        by = {script: [c["argv"] for c in calls if c["argv"][0] == script] for script in ("finetune.py", "report.py")}
        answered = [c["argv"] for c in calls if c["argv"][0] == "evaluate.py" and "--score_gold" not in c["argv"]]
        return SimpleNamespace(
            out=done.stdout, err=done.stderr, trained=by["finetune.py"], reports=by["report.py"], answered=answered,
            threads={c["threads"] for c in calls}, pids=[c["pid"] for c in calls], calls=[c["argv"] for c in calls],
            runs=[pairs(argv)["--output_dir"] for argv in by["finetune.py"]],
        )  # fmt: skip


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


GRID = {"GRID_K": "0 1", "GRID_LBD": ".5 1", "LEARNING_RATES": "1e-3 2e-3", "FAKE": "1"}
SWEEP = "reports/synth-tiny-sweep-val0.2-42-e1"
BOTH = [f"runs/synth-tiny-{arm}-e1-s{seed}" for seed in (1, 2) for arm in ("regular-lr1e-3", "jepa-lr1e-3-lbd1-k1")]


# ------------------------------------------------------------------------------------------------------- real runs


def test_compare_trains_both_arms_alike_and_jobs_do_not_change_the_weights(project, server):
    one = project.run("compare", SERVER=server, OMP_NUM_THREADS="1")
    assert one.runs == BOTH
    (report,) = one.reports
    assert report == ["report.py", *BOTH, "--output_dir", "reports/synth-tiny-compare-lr1e-3-lbd1-k1-e1"]
    lines = [line.split("  ")[1:3] for line in one.out.splitlines()]
    assert lines == [[arm, f"seed {seed}"] for seed in (1, 2) for arm in ("regular", "jepa")]
    for regular, jepa in zip(BOTH[::2], BOTH[1::2], strict=True):
        differing = {"regular": (True, False), "predictors": (0, 1), "lbd": (0.1, 1.0), "output_dir": (regular, jepa)}
        a, b = (read_json(project.folder / run / "args.json") for run in (regular, jepa))
        assert {k: (a[k], b[k]) for k in a if a[k] != b[k]} == differing
        a, b = (label_tokens(project.folder / run) for run in (regular, jepa))
        assert a == b and len(set(a)) > 1, "the same rows in the same order"
    two = project.run("compare", SERVER=server, OMP_NUM_THREADS="1", JOBS="2", RUNS_DIR="two", SEEDS="1")
    assert sorted(two.runs) == sorted(run.replace("runs/", "two/") for run in BOTH[:2])
    for run in BOTH[:2]:
        same_weights(project.folder / run, project.folder / run.replace("runs/", "two/"))
    again = project.run("compare", SERVER=server, JOBS="2")
    assert again.trained == again.answered == [] and len(again.reports) == 1
    assert again.out.count("(done before: training, evaluation)") == 4


def label_tokens(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["label_tokens"] for line in lines if "label_tokens" in line]


def test_sweep_of_the_embedded_model(project, server):
    done = project.run("sweep", SERVER=server, SEEDS="1", GRID_K="1 0", GRID_LBD="1", LEARNING_RATES="1e-3", JOBS="2")
    found = read_json(project.folder / SWEEP / "sweep.json")
    assert found["score"] == "dfa_equal" and found["held_out"]["n"] == 8
    assert [len(found["arms"][arm]["cells"]) for arm in ("regular", "jepa")] == [1, 2]
    assert "picked: lr=0.001 k=0 λ=1, the first by learning rate, k and λ of what is equal" in done.err
    held_out, test = done.answered[:3], done.answered[3:]
    assert all(pairs(argv)["--input_file"] == "datasets/synth_train.jsonl" for argv in held_out)
    assert sorted(pairs(argv)["--model_name"] for argv in test) == sorted(done.runs[3:]) == [
        "runs/synth-tiny-jepa-lr1e-3-lbd1-k0-e1-s1", "runs/synth-tiny-regular-lr1e-3-e1-s1",
    ]  # fmt: skip
    train = [json.loads(x) for x in (project.folder / "datasets/synth_train.jsonl").read_text().splitlines()]
    cell = project.folder / found["arms"]["regular"]["cells"][0]["runs"][0]
    assert sum(label_tokens(cell)) < sum(label_tokens(project.folder / done.runs[-1])), (
        "cells are trained on fewer rows"
    )
    predictions = map(json.loads, (cell / "eval/synth/predictions.jsonl").read_text().splitlines())
    ids = [row["id"] for row in predictions]
    assert len(set(ids)) == 8 and all(1 <= i <= len(train) for i in ids)


# ------------------------------------------------------------------------------------------------------- the sweep


def test_sweep_picks_each_arm_s_best_cell_on_held_out_rows_and_reads_test_for_it_alone(project):
    score = "0.1 + 0.2 * (learning_rate == 2e-3) + (0 if regular else 0.3 * (predictors == 1) + 0.05 / lbd)"
    grid = GRID | {"GRID_K": "0 1 2", "LEARNING_RATES": "1e-3 2e-3 4e-3"}  # the best is neither the first nor the last
    done = project.run("sweep", SCORE=score, **grid)
    cells = f"{SWEEP}/cells/synth-tiny"
    expected = [f"{cells}-regular-lr{rate}-e1-val0.2-42-s42" for rate in ("1e-3", "2e-3", "4e-3")]
    expected += [f"{cells}-jepa-lr2e-3-lbd{lbd}-k{k}-e1-val0.2-42-s42" for k in (0, 1, 2) for lbd in (".5", "1")]
    final = [f"runs/synth-tiny-{arm}-e1-s{s}" for s in (1, 2) for arm in ("regular-lr2e-3", "jepa-lr2e-3-lbd.5-k1")]
    assert done.runs == expected + final
    train, split = "datasets/synth_train.jsonl", ("0.2", "42")
    for argv in done.trained[:9]:
        flags = pairs(argv)
        assert flags["--data_file"] == train and "--train_file" not in flags
        assert (flags["--eval_split"], flags["--split_seed"]) == split
    for argv in done.answered[:9]:
        flags = pairs(argv)
        assert (flags["--input_file"], flags["--process_split"]) == (train, "test")
        assert (flags["--test_size"], flags["--split_seed"]) == split
    begin = next(i for i, argv in enumerate(done.calls) if final[0] in argv)
    before = [argv for argv in done.calls[:begin] if "datasets/synth_test.jsonl" in argv]
    assert [argv[1] for argv in before] in ([], ["--score_gold"]) and done.calls.index(before[0]) == begin - 1
    for argv in done.trained[9:]:
        assert pairs(argv)["--train_file"] == train and "--data_file" not in pairs(argv)
    assert [pairs(a)["--model_name"] for a in done.answered[9:]] == final
    assert {pairs(a)["--input_file"] for a in done.answered[9:]} == {"datasets/synth_test.jsonl"}
    assert done.reports == [["report.py", *final, "--output_dir", SWEEP]]
    found = read_json(project.folder / SWEEP / "sweep.json")["arms"]
    picked = {arm: found[arm]["cells"][found[arm]["picked"]] for arm in found}
    assert picked["regular"]["runs"] == [expected[1]] and picked["jepa"]["runs"] == [expected[5]]
    assert picked["jepa"]["score"] == pytest.approx(0.7) and "equal to" not in done.err
    again = project.run("sweep", SCORE=score, **grid)
    assert again.trained == again.answered == [] and again.reports == done.reports


def test_the_mean_over_several_sweep_seeds_decides(project):
    score = "0.9 if finetune_seed == 7 and learning_rate == 1e-3 else 0.5 * (learning_rate == 2e-3)"
    done = project.run("sweep", SCORE=score, **GRID | {"SWEEP_SEED": "9 7", "GRID_K": "0", "GRID_LBD": "1"})
    assert done.runs[-1].startswith("runs/synth-tiny-jepa-lr2e-3") and done.runs[4].endswith("-s9")


def test_an_interrupted_sweep_goes_on_and_the_failing_run_is_named(project):
    failing = f"{SWEEP}/cells/synth-tiny-jepa-lr1e-3-lbd.5-k1-e1-val0.2-42-s42"
    done = project.run("sweep", code=7, STUB=f"fail {failing}", **GRID)
    log = f"{SWEEP}/cells/.logs/{Path(failing).name}.log"
    assert log in done.err and "still out of memory" in done.err and done.runs[-1] == failing
    assert "training of seed 42 ended with exit code 7" in (project.folder / log).read_text()
    assert done.reports == [] and len(done.runs) == 5
    again = project.run("sweep", **GRID)
    assert again.runs[0] == failing and len(again.runs) == 2 + 4, "what was finished is not trained again"


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (("sweep", "synth", "m", "third"), {}, "third"),
        (("compare", "synth,turk"), {}, "one dataset"),
        (("compare",), {"DATASET": "synth turk"}, "one dataset"),
        (("sweep", "nothing"), {}, "datasets/nothing_train.jsonl"),
        (("sweep",), {"GRID_K": "1 x"}, "grid_k"),
        (("sweep",), {"GRID_LBD": "-1"}, "grid_lbd"),
        (("sweep",), {"EVAL_SPLIT": "2"}, "eval_split"),
        (("compare",), {"JOBS": "0"}, "jobs"),
        (("run_jepa",), {"PROTOCOL": "mine"}, "protocol"),
        (("compare", "--", "--tokens_per_batch", "4096"), {}, "--tokens_per_batch is not for compare"),
        (("sweep", "--", "--", "--tokens_per_batch=64"), {}, "--tokens_per_batch is not for sweep"),
        (("run_jepa", "--", "--lora", "--", "--lora"), {}, "second -- is for run_pretrain, compare and sweep"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(project, arguments, variables, named):
    done = project.run(*arguments, code=2, **variables)
    assert named in done.err and done.calls == [] and done.err.count("\n") == 1


def test_flags_behind_a_second_separator_are_of_the_jepa_arm_alone(project):
    flags = ("--", "--weight_decay", "0.1", "--", "--jepa_ratio", "0.5")
    done = project.run("compare", *flags, FAKE="1", SEEDS="1")
    regular, jepa = map(resolved, done.trained)
    assert regular["weight_decay"] == jepa["weight_decay"] == 0.1
    assert (regular["regular"], regular["jepa_ratio"], jepa["regular"], jepa["jepa_ratio"]) == (True, 1.0, False, 0.5)
    assert len(set(done.runs)) == 2 and all("-x" in run for run in done.runs)
    other = project.run("compare", *flags[:-1], "0.6", FAKE="1", SEEDS="1")
    assert [resolved(argv)["jepa_ratio"] for argv in other.trained] == [0.6], "the regular arm's run is the same"
    assert other.reports[0][-1] != done.reports[0][-1]

    swept = project.run("sweep", *flags, **GRID | {"SEEDS": "1"})
    settings = [resolved(argv) for argv in swept.trained]
    assert {s["regular"] for s in settings} == {True, False}
    assert all(s["jepa_ratio"] == (1.0 if s["regular"] else 0.5) for s in settings)
    best = read_json(next(project.folder.glob("reports/*sweep*/sweep.json")))["arms"]["jepa"]
    best = best["cells"][best["picked"]]
    assert (settings[-1]["predictors"], settings[-1]["lbd"]) == (best["predictors"], best["lbd"])


def test_a_number_of_steps_stands_instead_of_the_epochs(project):
    done = project.run("compare", "--", "--max_steps=7", FAKE="1", SEEDS="1")
    assert [resolved(argv)["max_steps"] for argv in done.trained] == [7, 7]
    assert all("-7steps-s1-x" in run and "-e1" not in run for run in done.runs)
    assert "--num_epochs" not in " ".join(map(" ".join, done.trained))


# ------------------------------------------------------------------------------------------------------------ jobs


def test_jobs_run_at_a_time_and_share_the_threads(project):
    begin = time.monotonic()
    done = project.run("run_jepa", FAKE="1", SLEEP="1.5", JOBS="4", SEEDS="1 2 3 4")
    assert time.monotonic() - begin < 5, "not one after the other"
    assert done.threads == {None, str(max(1, os.cpu_count() // 4))} - {None}
    assert sorted(line.split("  ")[2] for line in done.out.splitlines()[:4]) == [f"seed {s}" for s in (1, 2, 3, 4)]
    assert "mean ± sd (n = 4)" in done.out


def test_a_failing_job_ends_the_others_with_its_exit_code(project):
    begin = time.monotonic()
    done = project.run("compare", code=7, FAKE="1", SLEEP="60", JOBS="2", STUB=f"fail {BOTH[1]}")
    assert time.monotonic() - begin < 30
    assert "exit code 7" in done.err and "runs/.logs/synth-tiny-" in done.err and "-s1.log" in done.err
    assert done.reports == [] and len(done.runs) <= 3
    assert not any(map(running, done.pids))


@pytest.mark.parametrize("command", ["compare", "run_jepa"])
def test_ctrl_c_ends_all_jobs_at_once(project, command):
    process = subprocess.Popen(
        ["bash", "run.sh", command], cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=project.variables(FAKE="1", STUB="hang", JOBS="2"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 30
        while len(pids) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            path = project.folder / "pids"
            pids = [int(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert len(pids) == 2 and all(map(running, pids))
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130 and "stopped" in err and time.monotonic() - begin < 4
        assert not any(map(running, pids))
    finally:
        process.kill()
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


# -------------------------------------------------------------------------------------------------------- protocol

PUBLISHED = {
    "lm_labels": "reference", "max_length": 512, "batch_size": 4, "grad_accum": 4, "lr_scheduler_type": "linear",
    "warmup_steps": 0, "num_epochs": 4, "dtype": "auto", "weight_decay": 0, "adam_beta2": 0.999, "max_grad_norm": 1,
}  # fmt: skip


def resolved(argv: list[str]) -> dict:
    """What args.json of a command line of finetune.py holds."""
    settings, given = parse_flags(finetune.Settings, "", argv[1:])
    return dataclasses.asdict(finetune.check_settings(settings, given))


@pytest.mark.parametrize("model", ["models/tiny", "org/Some-1B"])
def test_the_published_protocol(project, model):
    done = project.run("compare", "synth", model, FAKE="1", PROTOCOL="paper", EPOCHS="", SEEDS="", ALLOW="git_dirty")
    found = [resolved(argv) for argv in done.trained]
    assert [s["finetune_seed"] for s in found] == [seed for seed in (82, 23, 37, 84, 4) for _ in "ab"]
    assert all(s | PUBLISHED == s for s in found)
    assert [s["reference_grad_scale"] for s in found] == [False, True] * 5
    assert {s["learning_rate"] for s in found} == {1e-3 if model == "models/tiny" else 2e-5}
    assert all("-e4-paper-s" in run for run in done.runs)
    assert done.reports[0][-3:] == ["--allow", "git_dirty", "reference_grad_scale"]
    assert not {"-paper", "--lm_labels"} & set(" ".join(project.run("run_jepa", FAKE="1").trained[0]).split())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--batch_size", "2", "--lm_labels=answer"), {"batch_size": 2, "lm_labels": "answer", "grad_accum": 4}),
        (("--tokens_per_batch", "4096"), {"tokens_per_batch": 4096, "reference_grad_scale": True}),
        (("--grad_accum", "1"), {"grad_accum": 1, "reference_grad_scale": False}),
        (("--grad_accum=16",), {"grad_accum": 16, "reference_grad_scale": True}),
    ],
)
def test_what_the_user_gives_wins_over_the_protocol(project, flags, expected):
    done = project.run("run_jepa", "--", *flags, FAKE="1", PROTOCOL="paper", SEEDS="3", EPOCHS="7")
    (settings,) = map(resolved, done.trained)
    assert settings | expected == settings and settings["num_epochs"] == 7
    assert (settings["warmup_steps"], settings["finetune_seed"]) == (0, 3)


def test_help_names_all_that_the_protocol_sets(project):
    text = project.run("--help").out
    shown = text.split("PROTOCOL=paper")[1].split("\n\n")[0]
    for name, value in PUBLISHED.items():
        assert name == "num_epochs" or f"--{name} {value}" in shown, name
    for word in ("--reference_grad_scale", "4 epochs"):
        assert word in shown
    for word in ("compare", "sweep", "JOBS", "GRID_K", "GRID_LBD", "LEARNING_RATES", "SWEEP_SEED", "REPORTS_DIR"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 130


def test_runs_of_the_protocol_have_folders_of_their_own(project):
    usual, paper = (project.run("run_jepa", FAKE="1", SEEDS="1", PROTOCOL=p).runs for p in ("", "paper"))
    assert usual == [BOTH[1]] and paper == [BOTH[1].replace("-s1", "-paper-s1")]
