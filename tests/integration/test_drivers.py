"""run.sh and llm_jepa/driver.py: run folders, settings, refusals, skipped and resumed steps, exit codes, signals."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, column, is_running, message_row, same_weights, write_rows
from driver_project import VARIABLES, Project, flag, resolved

from llm_jepa import driver
from llm_jepa.distributed import cores
from llm_jepa.files import read_json

ONE = {"SEEDS": "4"}
SWEEP = Path("reports/synth-tiny-sweep-val0.2-42-e2")
ARMS = {  # what each arm's settings differ in from regular fine-tuning
    "regular": {},
    "jepa": {"regular": False, "lbd": 1.0, "predictors": 1},
    "clip": {"regular": False, "lbd": 0.1, "predictors": 1, "jepa_loss": "clip"},
    "nitp": {"nitp": True, "nitp_lbd": 0.8},
    "placebo": {"regular": False, "lbd": 0.1, "predictors": 1, "jepa_loss": "clip", "shuffle_pairs": True},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Project(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------- names, settings, arguments

NAMES = [
    ("run_jepa", {}, "synth-tiny-jepa-lr1e-3-lbd1-k1-e2-s4"),
    ("run_jepa org/Some-1B/ 4e-5 2 -3 4 37 2.5 turk", {}, "turk-Some-1B-jepa-lr4e-5-lbd2.5-k4-t-3-e2-s37"),
    ("run_jepa - -", {"MODEL": "org/M", "LR": "1e-5", "EPOCHS": "1", "LAST_TOKEN": "-2", "PREDICTORS": "0", "LBD": ".5",
                      "DATASET": "turk"}, "turk-M-jepa-lr1e-5-lbd.5-k0-t-2-e1-s4"),
    ("run_jepa", {"NPROC": "2", "USER": "1", "SLURM_NPROCS": "1", "CFLAGS": "1"},  # variables of other programs too
     "synth-tiny-jepa-lr1e-3-lbd1-k1-e2-s4-p2"),
    ("run_jepa", {"PROTOCOL": "paper"}, "synth-tiny-jepa-lr1e-3-lbd1-k1-e4-paper-s4"),
    ("run_jepa -- --lora --lora_rank 64", {}, "synth-tiny-jepa-lr1e-3-lbd1-k1-e2-s4-x33182f5f"),
    ("run_jepa -- --max_steps=7", {}, "synth-tiny-jepa-lr1e-3-lbd1-k1-7steps-s4-x1775805f"),
    ("run_placebo - - - -2 0 4 .2", {}, "synth-tiny-placebo-lr1e-3-lbd.2-k0-t-2-e2-s4"),
    ("run_nitp - - - -2 3", {"LBD": ".5"}, "synth-tiny-nitp-lr1e-3-lbd.5-e2-s4"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "variables", "name"), NAMES)
def test_run_folder_names(project, arguments, variables, name):
    done = project.run(*arguments.split(), **ONE | variables)
    assert (done.code, done.runs) == (0, [f"runs/{name}"])


def test_flags_after_the_second_separator_are_for_the_other_arms(project):
    done = project.run(*"compare -- --weight_decay 0.1 -- --jepa_ratio 0.5".split(), ARMS="regular jepa", **ONE)
    names = ("regular-lr1e-3-e2-s4-xd14d0b09", "jepa-lr1e-3-lbd1-k1-e2-s4-xd25239c1")
    assert done.runs == [f"runs/synth-tiny-{name}" for name in names]
    assert [resolved(argv)["jepa_ratio"] for argv in done.trained] == [1.0, 0.5]


TINY = {"learning_rate": 1e-3, "num_epochs": 2, "batch_size": 8, "grad_accum": 1, "pretrain": True, "adam_beta2": 0.98}
PAPER = {
    "lm_labels": "reference", "max_length": 512, "batch_size": 4, "grad_accum": 4, "lr_scheduler_type": "linear",
    "warmup_steps": 0, "num_epochs": 4, "dtype": "auto", "weight_decay": 0, "adam_beta2": 0.999, "max_grad_norm": 1,
    "reference_grad_scale": True,
}  # fmt: skip
SETTINGS = [
    ("run_jepa", {}, TINY | {"predictors": 1, "lbd": 1.0, "finetune_seed": 4, "regular": False, "max_length": 512}),
    ("run_jepa org/M - - -3", {}, {"learning_rate": 2e-5, "num_epochs": 4, "pretrain": False, "last_token": -3}),
    ("run_regular - - - - - - - yelp", {}, {"max_length": 2048}),
    ("run_regular - - - - - - - yelp -- --max_length 900", {"PROTOCOL": "paper"}, {"max_length": 900}),
    ("run_jepa -- --max_steps 7", {}, {"max_steps": 7, "num_epochs": 4.0}),
    ("run_jepa", {"PROTOCOL": "paper"}, PAPER | {"learning_rate": 1e-3, "pretrain": True}),
    ("run_regular org/M", {"PROTOCOL": "paper", "EPOCHS": "7"},
     PAPER | {"reference_grad_scale": False, "regular": True, "learning_rate": 2e-5, "num_epochs": 7}),
    ("run_jepa -- --tokens_per_batch 4096 --lm_labels=answer", {"PROTOCOL": "paper"},
     PAPER | {"tokens_per_batch": 4096, "lm_labels": "answer"}),
    ("run_jepa -- --grad_accum 1", {"PROTOCOL": "paper"}, PAPER | {"grad_accum": 1, "reference_grad_scale": False}),
    ("run_clip -- --nitp", {}, {"jepa_loss": "clip", "lbd": 0.1, "nitp": True, "nitp_lbd": 0.8}),
    ("run_nitp", {"PROTOCOL": "paper", "LBD": "2"}, PAPER | {"nitp_lbd": 2.0, "reference_grad_scale": False}),
    ("run_placebo", {"PROTOCOL": "paper"}, PAPER | {"jepa_loss": "clip", "shuffle_pairs": True, "lbd": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "variables", "expected"), SETTINGS)
def test_settings_of_the_training(project, arguments, variables, expected):
    found = resolved(project.run(*arguments.split(), **ONE | variables).trained[0])
    assert {name: found[name] for name in expected} == expected


SEEDS = [("5,6,5", "", "5 6"), ("all", "5", driver.ALL_SEEDS), ("-", "6, 5", "6 5"), ("-", "", "82 23 37 84 4")]


@pytest.mark.parametrize(("given", "variable", "seeds"), SEEDS)
def test_seeds_and_datasets_run_in_sequence(project, given, variable, seeds):
    done = project.run("run_jepa", *"-----", given, "-", "synth,turk", SEEDS=variable)
    assert [run.rpartition("-s")[2] for run in done.runs] == [seed for seed in seeds.split() for _ in "12"]
    files = [flag(argv, "--train_file") for argv in done.trained]
    assert files == ["datasets/synth_train.jsonl", "datasets/turk_train.jsonl"] * len(seeds.split())
    assert [flag(argv, "--input_file") for argv in done.evaluated] == [f.replace("train", "test") for f in files]


WRONG = [
    ("run_all", {}, "run_all"),
    ("run_jepa - - - - - - - - - tenth", {}, "tenth"),
    ("run_jepa - - - - 1.5", {}, "1.5"),
    ("run_jepa - - - - - 82,x3", {}, "82,x3"),
    ("run_jepa - - - - - - - nothing", {}, "datasets/nothing_train.jsonl"),
    ("run_jepa - - - - - - - ../synth", {}, "../synth"),
    ("run_jepa", {"EPOCHS": "many"}, "EPOCHS"),
    ("run_pretrain", {"ARM": "both"}, "ARM"),
    ("compare synth,turk", {}, "one dataset"),
    ("compare", {"ARMS": "regular jepa vicreg"}, "regular jepa clip nitp placebo"),
    ("compare", {"ARMS": "regular:2 jepa"}, "regular:2"),
    ("compare", {"ARMS": "jepa clip"}, "regular"),
    ("compare -- -- --nitp_lbd 0.5", {}, "--nitp_lbd"),
    ("compare -- --shuffle_pairs", {"ARMS": "regular clip"}, "regular: --shuffle_pairs"),
    ("sweep", {"SWEEP_ARM": "regular"}, "regular"),
    ("run_placebo -- --jepa_loss=l2", {}, "--jepa_loss"),
    ("sweep", {"GRID_K": "1 x"}, "GRID_K"),
    ("run_jepa -- --output_dir x", {}, "--output_dir"),
    ("run_jepa -- --config runs/mine", {}, "--config"),
    ("run_jepa -- --finetune_seed=5", {}, "--finetune_seed"),
    ("run_jepa -- --lora -- --lora", {}, "second --"),
    ("run_jepa", {"EPOCH": "1"}, "EPOCHS"),
    ("sweep", {"LEARNING_RATS": "1e-3"}, "LEARNING_RATES"),
    ("run_jepa", {"EVAL_FLAGS": "--max_new_token 5"}, "EVAL_FLAGS"),
    ("run_jepa", {"EVAL_FLAGS": "--system 'a"}, "EVAL_FLAGS"),
]


@pytest.mark.parametrize(("arguments", "variables", "mentioned"), WRONG)
def test_wrong_arguments_are_refused_before_anything_runs(project, arguments, variables, mentioned):
    done = project.run(*arguments.split(), **variables)
    assert (done.code, done.steps) == (2, [])
    assert mentioned in done.err and done.err.count("\n") == 1


def test_help_lists_the_arms_the_variables_and_the_protocol(project):
    text = subprocess.run(["bash", ROOT / "run.sh", "run_jepa", "--help"], capture_output=True, text=True).stdout
    shown = [f"{name} {value}" for flags in (driver.PAPER_FLAGS, driver.TINY_FLAGS) for name, value in flags.items()]
    shown += [f"{driver.TINY_DEFAULTS[name]} for models/tiny" for name in ("learning_rate", "epochs")]
    shown += [driver.TINY_DEFAULTS["learning_rates"], *(f"run_{arm}" for arm in ARMS)]
    shown += VARIABLES + [f.default for f in driver.dataclasses.fields(driver.Settings)]
    assert {word for word in shown if word not in text} <= {"NNODES", "NODE_RANK"}  # of run8bh200.sh


# ------------------------------------------------------------------------------------------------ what is done


def test_flags_of_the_evaluation_reach_it(project):
    for command in ("run_jepa", "run_pretrain", "sweep"):
        flags = "--max_new_tokens 9 --allow_code_execution --spider_path folder"
        done = project.run(command, EVAL_FLAGS=flags, **ONE)
        assert {flag(argv, "--max_new_tokens") for argv in done.evaluated} == {"9"}
        assert all("--max_new_tokens" not in argv for argv in done.trained + done.checked)
        for argv in done.evaluated + done.checked:
            assert "--allow_code_execution" in argv and "--spider_path folder" in " ".join(argv).replace("=", " ")
        assert done.checked


def test_finished_steps_are_skipped(project):
    first = project.run("run_jepa", SEEDS="82 23")
    shutil.rmtree(f"{first.runs[1]}/eval")
    again = project.run("run_jepa", SEEDS="82 23")
    assert again.trained == [] and [flag(argv, "--model_name") for argv in again.evaluated] == [first.runs[1]]
    notes = ("  (done before: training, evaluation)", "  (done before: training)")
    assert again.out.splitlines() == [line + note for line, note in zip(first.out.splitlines(), notes, strict=True)]


@pytest.mark.parametrize("changed", ["train", "test", "model", "task", "max_examples"])
def test_a_run_with_other_inputs_is_refused(project, changed):
    (run,) = project.run("run_jepa", "one/M", **ONE).runs
    metrics = Path(run, "eval/synth/metrics.json")
    if changed in ("train", "test"):
        Path(f"datasets/synth_{changed}.jsonl").write_text("another example\n")
    if changed == "max_examples":
        metrics.write_text(json.dumps(read_json(metrics) | {"settings": {"max_examples": 5}}))
    model = "two/M" if changed == "model" else "one/M"
    done = project.run("run_jepa", model, **ONE | ({"TASK": "text"} if changed == "task" else {}))
    assert (done.code, done.trained, done.evaluated) == (2, [], [])
    assert (f"datasets/synth_{changed}.jsonl" if changed in ("train", "test") else run) in done.err


def test_an_interrupted_run_is_resumed(project):
    def interrupt(script: str, argv: list[str]) -> int:
        if script == "finetune":
            Path(flag(argv, "--output_dir")).mkdir(parents=True)
        return 7 * (script == "finetune")

    first = project.run("run_jepa", trouble=interrupt, **ONE)
    assert first.code == 7 and not resolved(first.trained[0])["resume"]
    again = project.run("run_jepa", **ONE)
    assert again.code == 0 and resolved(again.trained[0])["resume"]


@pytest.mark.parametrize(("step", "code"), [("finetune", 7), ("evaluate", 3)])
def test_a_failing_step_ends_the_driver_with_its_exit_code(project, step, code):
    def fail(script: str, argv: list[str]) -> int:
        run = flag(argv, "--output_dir") or flag(argv, "--model_name") or ""
        return code * (script == step and run.endswith("-s23"))

    done = project.run("run_jepa", trouble=fail)
    assert done.code == code and "seed 23" in done.err and f"exit code {code}" in done.err
    assert [run.rpartition("-s")[2] for run in done.runs] == ["82", "23"] and done.out.count("\n") == 1


def test_a_failing_step_with_a_log_shows_its_end(project):
    done = project.run("sweep", trouble=lambda script, _: 7 * (script == "finetune"), **ONE)
    assert done.code == 7 and ".logs/" in done.err and "out of memory" in done.err and done.reports == []


def test_test_data_that_cannot_be_scored_is_refused_before_training(project):
    refuse = lambda script, argv: 2 * ("--score_gold" in argv)  # noqa: E731
    done = project.run("run_pretrain", trouble=refuse, DATASET="synth", **ONE)
    assert done.code == 2 and done.trained == [] and "datasets/synth_test.jsonl" in done.err
    done = project.run("run_jepa", SEEDS="82,23", TASK="text")
    assert [flag(argv, "--task") for argv in done.checked] == ["text"], "once, not for each seed"
    assert project.run("run_jepa", SEEDS="82,23", TASK="text").checked == []


def test_flags_about_examples_reach_the_evaluation(project):
    flags = ["--text_field", "a", "--code_field=b", "--system", "Be brief.\nPlease.", "--skip_bad_examples"]
    flags += ["--view_text_field", "c", "--view_code_field", "d"]
    done = project.run("run_regular", "--", *flags, "--weight_decay", "0.1", "--plain", **ONE)
    (evaluation,), (check,) = done.evaluated, done.checked
    fields = ["--text_field=a", "--code_field=b", "--view_text_field=c", "--view_code_field=d",
              "--system=Be brief.\nPlease.", "--skip_bad_examples"]  # fmt: skip
    for argv in (evaluation, check):
        assert [word for word in argv if word in fields] == fields and "--weight_decay" not in argv
    assert "--plain" in evaluation


# -------------------------------------------------------------------------------- compare, sweep and run_pretrain


def test_compare_trains_five_arms_that_differ_only_in_the_method(project):
    done = project.run("compare", SEEDS="1 2")
    settings = [resolved(argv) for argv in done.trained]
    assert done.code == 0 and [s["finetune_seed"] for s in settings] == [1] * 5 + [2] * 5
    assert [Path(run).name.split("-")[2] for run in done.runs] == [*ARMS] * 2
    for own, name in zip(settings, [*ARMS] * 2, strict=True):
        expected = settings[0] | ARMS[name]
        assert {key for key in own if own[key] != expected[key]} <= {"output_dir", "finetune_seed"}
    (report,) = done.reports
    assert report[:10] == done.runs and flag(report, "--against") == done.runs[0]


@pytest.mark.parametrize(
    ("variables", "arms"),
    [({"ARMS": "clip,regular"}, "clip-lr1e-3-lbd0.1-k1 regular-lr1e-3"),
     ({"ARMS": "regular clip:.3 clip nitp:2 jepa", "LBD": "4"},
      "regular-lr1e-3 clip-lr1e-3-lbd.3-k1 clip-lr1e-3-lbd0.1-k1 nitp-lr1e-3-lbd2 jepa-lr1e-3-lbd4-k1"),
     ({"ARMS": "regular clip clip:0.1 regular", "PREDICTORS": "0"}, "regular-lr1e-3 clip-lr1e-3-lbd0.1-k0"),
     ({"ARMS": "regular clip:.3 placebo:.5"}, "regular-lr1e-3 clip-lr1e-3-lbd.3-k1 placebo-lr1e-3-lbd.5-k1"),
     ({"PROTOCOL": "paper"}, "regular-lr1e-3 jepa-lr1e-3-lbd1-k1")],
)  # fmt: skip
def test_arms_chooses_and_orders_the_arms_and_their_weights(project, variables, arms):
    done = project.run("compare", **ONE | variables)
    epochs = "e4-paper" if "PROTOCOL" in variables else "e2"
    assert done.runs == [f"runs/synth-tiny-{arm}-{epochs}-s4" for arm in arms.split()]
    reference = next(run for run in done.runs if "-regular-" in run)
    assert done.reports[0][: len(done.runs) + 1] == [*done.runs, "--output_dir"]
    assert flag(done.reports[0], "--against") == reference
    other = project.run("compare", **ONE | {"ARMS": "regular placebo"})
    assert flag(other.reports[0], "--output_dir") != flag(done.reports[0], "--output_dir")


def test_compare_skips_what_is_done_and_allows_what_the_protocol_needs(project):
    first, again = (project.run("compare", PROTOCOL="paper", ALLOW="git_dirty", **ONE) for _ in range(2))
    assert {"git_dirty", "reference_grad_scale"} < set(first.reports[0])
    assert again.trained == again.evaluated == [] and again.reports == first.reports


def test_sweep_picks_on_held_out_examples_and_reads_the_test_data_last(project):
    def score(run) -> float:
        k_lbd = 0 if run.regular else 0.3 * (run.predictors == 1) + 0.05 / run.lbd
        return 0.1 + 0.2 * (run.learning_rate == 2e-3) + k_lbd

    grid = {"GRID_K": "0 1 2", "GRID_LBD": ".5 1", "LEARNING_RATES": "1e-3 2e-3 4e-3", "SEEDS": "1 2"}
    done = project.run("sweep", score=score, **grid)
    expected = [f"regular-lr{rate}" for rate in ("1e-3", "2e-3", "4e-3")]
    expected += [f"jepa-lr2e-3-lbd{lbd}-k{k}" for k in (0, 1, 2) for lbd in (".5", "1")]
    cells = [f"{SWEEP}/cells/synth-tiny-{cell}-e2-val0.2-42-s42" for cell in expected]
    final = [f"runs/synth-tiny-{arm}-e2-s{s}" for s in (1, 2) for arm in ("regular-lr2e-3", "jepa-lr2e-3-lbd.5-k1")]
    assert done.runs == cells + final
    assert done.reports == [[*final, "--output_dir", str(SWEEP), "--against", final[0]]]
    for argv in done.evaluated[:9]:
        assert flag(argv, "--input_file") == "datasets/synth_train.jsonl" and flag(argv, "--process_split") == "test"
    first_read = next(i for i, (_, argv) in enumerate(done.steps) if "datasets/synth_test.jsonl" in argv)
    assert not any("cells" in word for _, argv in done.steps[first_read:] for word in argv)
    again = project.run("sweep", score=score, **grid)
    assert again.trained == again.evaluated == [] and again.reports == done.reports


@pytest.mark.parametrize(("arm", "weight", "runs"), [("clip", "lbd", 9), ("nitp", "nitp_lbd", 6)])
def test_sweep_arm_is_the_arm_whose_weight_is_picked(project, arm, weight, runs):
    def score(run) -> float:
        return 0.1 if run.regular and not run.nitp else 0.5 - abs((run.nitp_lbd or run.lbd) - 0.2)

    grid = {"GRID_K": "0 1", "GRID_LBD": ".1 .2 .4", "LEARNING_RATES": "1e-3", "SWEEP_ARM": arm} | ONE
    done = project.run("sweep", score=score, **grid)
    picked = resolved(done.trained[-1])
    assert len(done.runs) == done.out.count("\n") == runs and f"-{arm}-" in done.runs[-1]  # nitp has no k
    assert (picked[weight], picked["predictors"]) == (0.2, 0)
    cells = read_json(Path(flag(done.reports[0], "--output_dir"), "sweep.json"))["cells"]
    assert {(cell["arm"], cell["lbd"]) for cell in cells} >= {(arm, 0.1), (arm, 0.2), (arm, 0.4)}


def test_steps_of_run_pretrain(project):
    arguments = "run_pretrain org/big 8e-5 1 - 2 82,23 0.5".split()
    done = project.run(*arguments, FINETUNE_EPOCHS="3", ARM="jepa")
    assert len(done.trained) == 6
    base, *after = map(resolved, done.trained[:3])
    assert base["pretrain"] and base["plain"] and base["train_all"] and not base["regular"]
    assert (base["train_file"], base["predictors"], base["num_epochs"]) == ("datasets/paraphrase_train.jsonl", 2, 1)
    for settings, name in zip(after, ("rotten_tomatoes", "yelp"), strict=True):
        assert settings["regular"] and settings["plain"] and not settings["pretrain"] and not settings["train_all"]
        assert (settings["model_name"], settings["num_epochs"]) == (done.runs[0], 3)
        assert settings["train_file"] == f"datasets/{name}_train.jsonl"
    assert all({"--plain", "--startswith"} < set(argv) for argv in done.evaluated)
    assert project.run("run_pretrain", "org/big", ARM="regular", **ONE).code == 0


def test_a_terminal_shows_what_is_done_and_the_next_command(project):
    arms = {"ARMS": "regular clip:.3", "SEEDS": "1 2", "JOBS": "1"}
    done = project.run("compare", "synth", "org/M", terminal=True, **arms)
    lines = [line for line in done.err.splitlines() if line]
    places = [f"arm {arm} of 2, seed {seed} of 2" for seed in (1, 2) for arm in (1, 2)]
    assert [line.split(", ")[:2] for line in lines[:4]] == [f"compare: {place}".split(", ") for place in places]
    assert [line.split(", ")[2] for line in lines[:4]] == ["0 %", "25 %", "50 %", "75 %"]
    assert all(line.endswith(" left") for line in lines[:4])
    (follows,) = lines[4:]
    follows = shlex.split(follows.partition(": ")[2])
    assert {"SEEDS=101 102", "ARMS=regular clip:.3", "JOBS=1"} < {*follows}
    assert follows[follows.index("bash") :] == "bash run.sh compare synth org/M".split()
    for jobs, terminal in (("1", False), ("2", False), ("2", True)):
        again = project.run("compare", "synth", "org/M", terminal=terminal, **arms | {"JOBS": jobs})
        assert ("4 of 4 runs, 100 %" in again.err) == terminal and (again.err == "") == (not terminal)


def test_a_sweep_is_followed_by_the_same_comparison_on_other_seeds(project):
    grid = {"GRID_K": "1", "GRID_LBD": "2", "LEARNING_RATES": "1e-3", "SEEDS": "4"}
    done = project.run("sweep", "--", "--weight_decay=0.1", terminal=True, **grid)
    words = shlex.split(done.err.splitlines()[-1])
    assert {"LR=1e-3", "PREDICTORS=1", "ARMS=regular jepa:2", "SEEDS=104"} < {*words}
    assert words[words.index("bash") :] == "bash run.sh compare synth models/tiny -- --weight_decay=0.1".split()
    assert all(f"sweep, step {step} of 3: " in done.err for step in (1, 2, 3))


# ------------------------------------------------------------------------------------------------------- real runs


def test_compare_and_sweep_with_real_runs(project):
    names = ("git_dirty", "git_commit", "code_sha256")  # the tests also run in a checkout with changes
    allow = {"ALLOW": " ".join(names + tuple(f"evaluation.{name}" for name in names)), "EPOCHS": "1"} | ONE
    grid = {"GRID_K": "1", "GRID_LBD": "1", "LEARNING_RATES": "1e-3", "LR": "1e-3"} | allow
    done = project.run("compare", real=True, LR="1e-3", **allow)
    report = Path(flag(done.reports[0], "--output_dir"))
    verdict, written = done.out.splitlines()[-2:]
    assert done.code == 0 and str(report / "report.html") in written
    assert verdict.startswith("synth, dfa_equal: ") and verdict in (report / "report.html").read_text()
    settings = [read_json(Path(run, "args.json")) for run in done.runs]
    regular, jepa = settings[:2]
    assert {k for k in jepa if jepa[k] != regular[k]} == {"regular", "predictors", "lbd", "output_dir"}
    assert len(done.runs) == 5 and len({str(column(Path(run), "label_tokens")) for run in done.runs}) == 1
    done = project.run("sweep", real=True, **grid)
    assert done.code == 0 and len(done.runs) == 2
    assert sum(column(Path(done.runs[0]), "label_tokens")) < sum(column(Path(jepa["output_dir"]), "label_tokens"))
    found = read_json(next(Path("reports").glob("*sweep*")) / "sweep.json")
    assert found["score"] == "dfa_equal" and found["held_out"]["n"] == 8
    assert done.out.count("(done before: training, evaluation)") == 2, "the picked settings are those of compare"


def test_run_regular_from_the_shell_equals_a_run_in_this_process(project):
    project.copy_scripts()
    command = ["bash", "run.sh", "run_regular", "--", "--max_steps", "3"]
    variables = os.environ | {"PYTHON_BIN": sys.executable, "SEEDS": "4", "JOBS": "2"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=project.folder)
    assert done.returncode == 0, done.stderr
    assert "seed 4" in done.stdout and "n = 1" in done.stdout
    (shell,) = Path("runs").glob("synth-*")
    here = project.run("run_regular", "--", "--max_steps", "3", real=True, RUNS_DIR="other", **ONE)
    same_weights(shell, Path(here.runs[0]))


def test_run_pretrain_learns_a_classification(project):
    words = ["lake", "ring", "truck", "dog", "wood", "stone", "sand", "moss"]
    pairs = [(f"the {a} is near the {b}", f"the {b} has the {a} near it") for a in words for b in words]
    write_rows(Path("datasets/paraphrase_train.jsonl"), [message_row(*pair, None) for pair in pairs])
    examples = [message_row(f"a {word} film, {c.lower()}", c, "Rate it.") for word in words for c in ("Good", "Bad")]
    for part, count in (("train", 16), ("test", 9)):
        write_rows(Path(f"datasets/rotten_tomatoes_{part}.jsonl"), examples[:count])
    arguments = ["models/tiny", "2e-3", "4", "-", "1", "82", "0.5", "rotten_tomatoes"]
    done = project.run("run_pretrain", *arguments, real=True, FINETUNE_EPOCHS="12")
    assert done.code == 0, done.err
    metrics = read_json(Path(done.runs[1], "eval/rotten_tomatoes/metrics.json"))
    assert (metrics["n"], metrics["score"]) == (9, "startswith")
    assert metrics["startswith"] > 0.8 and metrics["class_match"] <= metrics["startswith"]


# ----------------------------------------------------------------------------------------- processes and signals

# A training that starts a process of its own, as torchrun does, and then waits.
TRAINER = """
import os, pathlib, signal, subprocess, sys, time
run = sys.argv[1]
if run.endswith(os.environ.get("FAIL", "none")):
    sys.exit(7)
if "STUBBORN" in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
with open("pids", "a") as file:
    file.write(f"{os.getpid()} {child.pid} {os.environ.get('OMP_NUM_THREADS')}\\n")
time.sleep(300)
"""


def start(project: Project, **variables: str) -> subprocess.Popen:
    """The driver with TRAINER, in a process of its own."""
    Path("train.py").write_text(TRAINER)
    lines = ["arm_jepa:1=--lbd {lbd}", "train=train.py {run}", "check=-c pass"]
    command = [sys.executable, "-m", "llm_jepa.driver", "run.sh", *lines, "--", "run_jepa"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def started(count: int) -> list[list[str]]:
    """The process ids and threads of each training, after `count` of them have started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [line.split() for line in Path("pids").read_text().splitlines()] if Path("pids").exists() else []
        if len(found) == count:
            return found
        time.sleep(0.02)
    raise TimeoutError


@pytest.mark.parametrize(
    ("number", "variables"), [(signal.SIGINT, {}), (signal.SIGTERM, {"JOBS": "1"}), (signal.SIGINT, {"STUBBORN": "1"})]
)
def test_a_signal_ends_all_processes(project, number, variables):
    process = start(project, **variables)
    found = started(int(variables.get("JOBS", "2")))
    process.send_signal(number)
    begin = time.monotonic()
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number and "stopped" in err and time.monotonic() - begin < 15
    assert not any(is_running(pid) for line in found for pid in line[:2])
    assert len(started(len(found))) == len(found), "nothing else is started"


def test_a_failing_job_ends_the_others_and_jobs_share_the_cores(project):
    variables = {"FAIL": "-s23", "SEEDS": "82 37 23"}
    project.patch.delenv("OMP_NUM_THREADS")
    process = start(project, **variables)
    first, second = started(2)
    assert first[2] == second[2] == str(max(1, cores() // 2))
    os.kill(int(first[0]), signal.SIGKILL)  # makes room for the third job, or is itself the failure
    err = process.communicate(timeout=30)[1]
    assert process.returncode and "runs/.logs/" in err
    assert not any(is_running(pid) for line in (first, second) for pid in line[:1])
