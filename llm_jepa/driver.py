"""Runs the commands of run.sh and run8bh200.sh for all seeds and datasets, several at a time if JOBS is larger than 1.

The shell scripts pass their command lines as templates, for instance `finetune.py --train_file {train_file} {flags}`:
`fill` replaces the names. A template `arm_NAME:λ` has the flags of an arm and its default λ, or the name of the arm
whose λ it has. Finished runs are skipped, unfinished ones resumed. The name of a run folder contains its settings.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from tqdm import tqdm

from llm_jepa import sweep
from llm_jepa.cli import UsageError, build_parser, parse_flags, run_command, strict_parser
from llm_jepa.distributed import cores
from llm_jepa.evaluation.settings import EvaluationSettings
from llm_jepa.files import read_json, sha256
from llm_jepa.reports.results import EVALUATION_IGNORES, read_runs
from llm_jepa.settings import Settings as TrainingSettings
from llm_jepa.settings import check_settings
from llm_jepa.variables import misspelled

TINY = "models/tiny"  # has no weights: trained from random initialization
ALL_SEEDS = "82 23 37 84 4"  # the paper's
# Two runs of one thread each are faster than one run of two threads after the other.
TINY_DEFAULTS = {"learning_rate": "1e-3", "epochs": "1", "jobs": "2", "learning_rates": "5e-4 1e-3 2e-3 4e-3"}
TINY_FLAGS = {"--batch_size": "8", "--grad_accum": "1", "--warmup_steps": "0.05", "--adam_beta2": "0.98"}
PAPER_FLAGS = {
    "--lm_labels": "reference", "--max_length": "512", "--batch_size": "4", "--grad_accum": "4",
    "--lr_scheduler_type": "linear", "--warmup_steps": "0", "--weight_decay": "0", "--adam_beta2": "0.999",
    "--max_grad_norm": "1", "--dtype": "auto",
}  # fmt: skip
SHELL_VARIABLES = ("PYTHON_BIN", "TRAINER", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "NODE_TIMEOUT", "PREFLIGHT",
                   "JOIN_LIMIT", "DEVICE")  # of the shell scripts themselves  # fmt: skip
MAX_LENGTH = {"yelp": "2048", "gsm8k": "1024", "mbpp": "2048"}  # datasets with examples of more than 512 tokens
# The evaluation needs these flags too.
FIELD_FLAGS = ("text_field", "code_field", "view_text_field", "view_code_field", "system", "skip_bad_examples")
REFUSED_FLAGS = ("--train_file", "--data_file", "--model_name", "--learning_rate", "--num_epochs", "--last_token",
                 "--predictors", "--lbd", "--finetune_seed", "--regular", "--output_dir", "--dry_run",
                 "--config")  # fmt: skip
SCORING_FLAGS = ("spider_path", "allow_code_execution")  # of EVAL_FLAGS that the check of the data needs
# Flags of the evaluation that its templates set.
SET_FLAGS = {*FIELD_FLAGS, *"model_name input_file output_file task plain startswith process_split test_size "
             "split_seed score_only score_gold config".split()}  # fmt: skip
NUMBER, WHOLE, COUNT = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", r"(?:0|[1-9]\d*)", r"[1-9]\d*"
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


def several(pattern: str) -> str:
    """The pattern of a list with commas or spaces."""
    return rf"[, ]*{pattern}(?:[, ]+{pattern})*[, ]*"


def items(text: str) -> list[str]:
    """The items of a list with commas or spaces, without duplicates."""
    return list(dict.fromkeys(text.replace(",", " ").split()))


def evaluation_flags(text: str) -> dict[str, Any]:
    """The flags of evaluate.py in EVAL_FLAGS by name. Raises UsageError if they cannot be parsed."""
    try:
        return vars(strict_parser(EvaluationSettings).parse_args(shlex.split(text)))
    except ValueError as error:  # also of a quote that is not closed
        raise UsageError(f"EVAL_FLAGS cannot be '{text}' ({error})") from None


def variable(names: str, pattern: str, default: str = "") -> Any:
    """A setting that the environment variables `names` set."""
    return dataclasses.field(default=default, metadata={"variables": names.split(), "pattern": pattern})


@dataclass(frozen=True)
class Settings:
    """Arguments and variables as the user wrote them: folder names contain this text. The first nine are positional."""

    model: str = variable("MODEL", "[^-].*", TINY)
    learning_rate: str = variable("LR LEARNING_RATE", NUMBER, "2e-5")
    epochs: str = variable("EPOCHS", NUMBER, "4")
    last_token: str = variable("LAST_TOKEN", r"(?:-?\d+)?")
    predictors: str = variable("PREDICTORS", WHOLE, "1")
    seeds: str = variable("SEEDS", f"{several(WHOLE)}|all", "all")
    lbd: str = variable("LBD", f"(?:{NUMBER})?")  # default: that of the arm
    datasets: str = variable("DATASET", several(NAME), "synth")
    runs_dir: str = variable("RUNS_DIR", ".+", "runs")
    reports_dir: str = variable("REPORTS_DIR", ".+", "reports")
    arms: str = variable("ARMS", f"(?:{several(NAME + f'(?::{NUMBER})?')})?")  # default: all
    protocol: str = variable("PROTOCOL", "(?:paper)?")
    task: str = variable("TASK", ".*")
    allow: str = variable("ALLOW", ".*")
    nproc: str = variable("NPROC", COUNT, "1")
    nnodes: str = variable("NNODES", COUNT, "1")
    node_rank: str = variable("NODE_RANK", WHOLE, "0")
    jobs: str = variable("JOBS", COUNT, "1")
    pretrain_arm: str = variable("ARM", "jepa|regular", "jepa")
    pretrain_dataset: str = variable("PRETRAIN_DATASET", NAME, "paraphrase")
    finetune_lr: str = variable("FINETUNE_LR", f"(?:{NUMBER})?")
    finetune_epochs: str = variable("FINETUNE_EPOCHS", f"(?:{NUMBER})?")
    sweep_arm: str = variable("SWEEP_ARM", NAME, "jepa")
    grid_k: str = variable("GRID_K", several(WHOLE), "0 1 2 3 4")
    grid_lbd: str = variable("GRID_LBD", several(NUMBER), ".5 1 2 4")
    learning_rates: str = variable("LEARNING_RATES", several(NUMBER), "1e-5 2e-5 4e-5 8e-5")
    sweep_seeds: str = variable("SWEEP_SEED", several(WHOLE), "42")
    eval_split: str = variable("EVAL_SPLIT", r"0?\.\d+", "0.2")
    split_seed: str = variable("SPLIT_SEED", WHOLE, "42")
    eval_flags: str = variable("EVAL_FLAGS", ".*")

    @classmethod
    def read(cls, command: str, given: list[str], environment: Mapping[str, str]) -> Self:
        """Arguments win over variables, those over defaults; '' and '-' are not given. Raises UsageError."""
        defaults = {"epochs": "4", "arms": "regular jepa"} if environment.get("PROTOCOL") else {}
        if environment.get("NPROC", "1") != "1":
            defaults["jobs"] = "1"
        if command == "run_pretrain":
            defaults["datasets"] = "rotten_tomatoes,yelp"
        found: dict[str, str] = {}
        for field, argument in itertools.zip_longest(dataclasses.fields(cls), given, fillvalue=""):
            names, default = field.metadata["variables"], defaults.get(field.name, field.default)
            values = [argument, *(environment.get(name, "") for name in names), default]
            value = next((v for v in values if v not in ("", "-")), "").removesuffix("/")
            if not re.fullmatch(field.metadata["pattern"], value):
                raise UsageError(f"{names[0]} cannot be '{value}' (see --help)")
            if field.name == "model" and value == TINY:
                defaults = TINY_DEFAULTS | defaults
            found[field.name] = value
        found["seeds"] = ALL_SEEDS if found["seeds"] == "all" else found["seeds"]
        return cls(**found)

    def folder_name(self, dataset: str, details: str, flags: Iterable[str], end: str = "") -> str:
        """Different settings never share a folder: extra flags are part of the name as a hash."""
        steps = re.search(r" --max_steps[= ](\S+) ", f" {' '.join(flags)} ")
        name = f"{dataset}-{Path(self.model).name}-{details}-" + (f"{steps[1]}steps" if steps else f"e{self.epochs}")
        name += (f"-{self.protocol}" if self.protocol else "") + end
        processes = int(self.nproc) * int(self.nnodes)
        name += f"-p{processes}" if processes > 1 else ""
        mark = hashlib.sha256("".join(f"{flag}\n" for flag in flags).encode()).hexdigest()[:8]
        return name + (f"-x{mark}" if flags else "")


VARIABLES = [*SHELL_VARIABLES, *(name for f in dataclasses.fields(Settings) for name in f.metadata["variables"])]


class Arm(NamedTuple):
    """A line of the table of arms in run.sh."""

    name: str
    lbd: str  # λ, in the table also the name of the arm whose λ it is; "" for an arm without one
    flags: str  # a template

    @property
    def has_views(self) -> bool:
        """Whether the arm has a JEPA loss."""
        return "--regular" not in self.flags


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    settings: Settings
    arm: Arm
    dataset: str
    seed: str
    flags: tuple[str, ...] = ()  # of the user, for finetune.py
    kind: str = ""  # cell: of a sweep, on held-out examples; pretrain and plain: the two steps of run_pretrain
    tiny: bool = False  # whether the tiny model's flags are the default, also after its pretraining

    @property
    def train_file(self) -> str:
        return f"datasets/{self.dataset}_train.jsonl"

    @property
    def test_file(self) -> str:
        return self.train_file if self.kind == "cell" else f"datasets/{self.dataset}_test.jsonl"

    @property
    def name(self) -> str:
        s = self.settings
        details = f"{self.arm.name}-lr{s.learning_rate}" + (f"-lbd{self.arm.lbd}" if self.arm.lbd else "")
        if self.arm.has_views:
            details += f"-k{s.predictors}" + (f"-t{s.last_token}" if s.last_token else "")
        details += f"-{self.kind}" if self.kind in ("pretrain", "plain") else ""
        split = f"-val{s.eval_split}-{s.split_seed}" if self.kind == "cell" else ""
        return s.folder_name(self.dataset, details, self.flags, f"{split}-s{self.seed}")

    @property
    def folder(self) -> Path:
        return Path(self.settings.runs_dir, self.name)

    @cached_property
    def given(self) -> dict[str, Any]:
        """The user's flags by name."""
        return vars(build_parser(TrainingSettings, "").parse_known_args(self.flags)[0])

    def default_flags(self) -> list[str]:
        """Flags of the model, the protocol and the dataset that the user's flags do not replace."""
        defaults = dict(PAPER_FLAGS if self.settings.protocol else TINY_FLAGS if self.tiny else {})
        if self.dataset in MAX_LENGTH:
            defaults["--max_length"] = MAX_LENGTH[self.dataset]
        if "tokens_per_batch" in self.given:
            defaults.pop("--batch_size", None)
        words = [word for flag, value in defaults.items() if flag[2:] not in self.given for word in (flag, value)]
        if self.settings.model == TINY:
            words.append("--pretrain")
        # Without accumulation --reference_grad_scale has no effect and is refused.
        if self.settings.protocol and self.arm.has_views and self.given.get("grad_accum") != 1:
            words.append("--reference_grad_scale")
        return words

    def values(self) -> dict[str, Any]:
        """The values for a template."""
        evaluation = evaluation_flags(self.settings.eval_flags)
        lists = {"defaults": self.default_flags(), "flags": list(self.flags)}
        for name, given, flags in (("fields", self.given, FIELD_FLAGS), ("scoring", evaluation, SCORING_FLAGS)):
            values = {flag: given[flag] for flag in flags if given.get(flag) not in (None, False)}
            lists[name] = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in values.items()]
        lists["arm"] = fill(self.arm.flags, vars(self.settings) | {"lbd": self.arm.lbd})
        lists["eval_flags"] = shlex.split(self.settings.eval_flags)
        lists |= {"resume": ["--resume"] * self.folder.exists(), "plain": ["--plain"] * ("plain" in self.given)}
        own = {name: str(getattr(self, name)) for name in ("seed", "train_file", "test_file", "name")}
        epochs = {"epochs": ""} if "max_steps" in self.given else {}
        return vars(self.settings) | own | lists | {"run": str(self.folder)} | epochs

    def is_trained(self) -> bool:
        """Whether the folder has this finished run. Raises UsageError if it belongs to another model or other data."""
        if not is_finished(self.folder):
            return False
        settings, record = (read_json(self.folder / name) for name in ("args.json", "run.json"))
        model, trained_on = self.settings.model, record["data_sha256"].values()
        if settings["model_name"] != model or sha256(self.train_file) not in trained_on:
            raise UsageError(f"{self.folder} is a run of another model or {self.train_file}; choose another RUNS_DIR")
        return True

    def is_done(self) -> bool:
        """Whether the folder has a finished training and the evaluation, if there is one."""
        evaluated = (self.folder / "eval" / self.dataset / "metrics.json").exists()
        return is_finished(self.folder) and (evaluated or self.kind == "pretrain")

    def is_evaluated(self) -> bool:
        """Whether the folder has this evaluation. Raises UsageError if it has another one of the dataset."""
        path = self.folder / "eval" / self.dataset / "metrics.json"
        if not path.exists():
            return False
        metrics, task = read_json(path), self.settings.task
        given, recorded = evaluation_flags(self.settings.eval_flags), metrics["settings"]
        wanted = vars(EvaluationSettings(**given))
        names = recorded.keys() - SET_FLAGS - EVALUATION_IGNORES - ({"max_new_tokens"} - given.keys())
        complete = metrics["data_sha256"] == sha256(self.test_file) and all(recorded[n] == wanted.get(n) for n in names)
        if not complete or Path(task).stem not in ("", metrics["task"]):
            what = f"TASK '{task}' and EVAL_FLAGS '{self.settings.eval_flags}'"
            raise UsageError(f"{path} is not of {what} on {self.test_file}; remove {path.parent}")
        return True


def is_finished(folder: Path) -> bool:
    """Whether a run folder's training is finished."""
    path = folder / "run.json"
    return path.exists() and read_json(path).get("status") == "finished"


def fill(template: str, values: Mapping[str, Any]) -> list[str]:
    """The words of a template with its names replaced by their values; a flag whose value is empty is left out."""
    words: list[str] = []
    for word in template.split():
        value = values[word[1:-1]] if re.fullmatch(r"\{\w+\}", word) else word.format_map(values)
        if isinstance(value, list):
            words += value
        elif value:
            words.append(value)
        else:
            words.pop()
    return words


def partition(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after the first `--`."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


class CommandFailed(Exception):
    """A command failed or a signal arrived: (message, exit code of the driver)."""


class Driver:
    """The runs of one call of the script. Raises UsageError if an argument, a variable or a flag is wrong."""

    def __init__(self, script: str, templates: Mapping[str, str], arguments: list[str]):
        self.script, self.templates = script, templates
        self.step = ""  # of a sweep, for the progress
        self.command, *words = arguments or [""]
        named = [(name[4:].partition(":"), flags) for name, flags in templates.items() if name.startswith("arm_")]
        self.table = {name: Arm(name, lbd, flags) for (name, _, lbd), flags in named}
        needs = {"compare": "train", "run_pretrain": "train_plain", "sweep": "train_cell"}
        commands = [f"run_{name}" for name in self.table]
        commands += [name for name, template in needs.items() if template in templates]
        if self.command not in commands:
            raise UsageError(f"unknown function '{self.command}', expected one of {', '.join(commands)} (see --help)")
        given, rest = partition(words)
        self.flags, self.later = map(tuple, partition(rest))
        self.rest = self.flags + (("--", *self.later) if self.later else ())  # as on the command line
        self.compares = self.command in ("compare", "sweep")
        limit = 2 if self.compares else 9
        if len(given) > limit:
            hint = "; flags follow ' -- '" if given[limit].startswith("-") else ""
            raise UsageError(f"too many arguments: {self.command} accepts {limit}, the next is '{given[limit]}'{hint}")
        if "--" in rest and self.command.removeprefix("run_") in self.table:
            raise UsageError("a second -- is only for run_pretrain, compare and sweep")
        if wrong := misspelled(script, VARIABLES, os.environ):
            raise UsageError(wrong)
        if self.compares:
            dataset, model = (*given, "", "")[:2]
            given = [model, *[""] * 6, dataset]
        self.settings = Settings.read(self.command, given, os.environ)
        # Without logs the output of each run is shown.
        self.has_logs = self.settings.jobs != "1" or (self.compares and not sys.stderr.isatty())
        self.arms = self.choose_arms()
        refused = {flag for arm in self.arms for flag in re.findall(r"--\w+", arm.flags)}.union(REFUSED_FLAGS)
        for flag in (word.partition("=")[0] for word in self.flags + self.later):
            if flag in refused or (self.compares and flag == "--tokens_per_batch"):
                raise UsageError(f"{flag} cannot follow -- in {script} {self.command} (see --help)")
        if wrong := evaluation_flags(self.settings.eval_flags).keys() & SET_FLAGS:
            raise UsageError(f"--{min(wrong)} cannot be in EVAL_FLAGS (see --help)")
        if self.compares and len(items(self.settings.datasets)) > 1:
            raise UsageError(f"{self.command} accepts one dataset, not '{self.settings.datasets}'")
        runs = list(itertools.chain(*self.chains()))
        for run in runs:
            for file in [run.train_file] + [run.test_file] * (run.kind != "pretrain"):
                if not Path(file).exists():
                    how = f"prepare.py {run.dataset}, or prepare.py own --name {run.dataset} for your own"
                    raise UsageError(f"{file} does not exist; see datasets/README.md (python datasets/{how})")
        self.check_flags({run.arm: run for run in runs} if self.compares else {})
        self.starting, self.stopping = threading.Lock(), False

    # ---------------------------------------------------------------------------------------------- which runs

    def choose_arms(self) -> list[Arm]:
        """The arms to train. Raises UsageError if the variables select others than the table has."""
        s, own = self.settings, self.command.removeprefix("run_")
        words = {"compare": items(s.arms) or [*self.table], "sweep": ["regular", s.sweep_arm],
                 "run_pretrain": [s.pretrain_arm]}.get(self.command, [own])  # fmt: skip
        own = own if own in self.table else "jepa"
        if s.lbd and self.table[own].lbd:
            self.table[own] = self.table[own]._replace(lbd=s.lbd)
        given = dict(word.partition(":")[::2] for word in words)  # name → λ, "" if it is not given
        arms = []
        for word in words:
            name, _, lbd = word.partition(":")
            if name not in self.table or (lbd and not self.table[name].lbd):
                raise UsageError(f"unknown arm '{word}', expected some of {' '.join(self.table)} (see --help)")
            arm, lbd = self.table[name], lbd or self.table[name].lbd
            arms.append(arm._replace(lbd=(given.get(lbd) or self.table[lbd].lbd) if lbd in self.table else lbd))
        if self.compares and (self.table["regular"] not in arms or len(set(arms)) < 2):
            raise UsageError(f"{self.command} needs regular and another arm, not only {' '.join(words)} (see --help)")
        return list(dict.fromkeys(arms))

    def check_flags(self, runs: Mapping[Arm, Run]) -> None:
        """Raises UsageError if finetune.py would refuse the flags of an arm, also of one that runs late."""
        wrong = []
        for arm, run in runs.items():
            script, *flags = self.words("train", run)
            try:
                if script == "finetune.py":  # without a launcher: torchrun changes which flags are refused
                    check_settings(*parse_flags(TrainingSettings, "", flags))
            except UsageError as error:
                wrong += [f"{arm.name}: {line}" for line in str(error).splitlines()]
        if wrong:
            raise UsageError("\n".join(wrong) + " (the variable ARMS selects arms, see --help)")

    def make_run(self, arm: Arm, seed: str, dataset: str, settings: Settings, kind: str = "") -> Run:
        """A run with the user's flags for its arm."""
        flags = self.flags + (self.later if arm.name != "regular" else ())
        return Run(settings, arm, dataset, seed, flags, kind, settings.model == TINY)

    def chains(self) -> list[list[Run]]:
        """The runs in the order in which they start; each chain runs in sequence."""
        s, names = self.settings, items(self.settings.datasets)
        if self.command != "run_pretrain":
            return [[self.make_run(a, seed, name, s)] for seed in items(s.seeds) for a in self.arms for name in names]
        chains, (arm,) = [], self.arms
        for seed in items(s.seeds):
            base = Run(s, arm, s.pretrain_dataset, seed, self.flags, "pretrain", s.model == TINY)
            after = replace(s, model=str(base.folder), learning_rate=s.finetune_lr or s.learning_rate,
                            epochs=s.finetune_epochs or s.epochs)  # fmt: skip
            runs = [Run(after, self.table["regular"], name, seed, self.later, "plain", base.tiny) for name in names]
            chains.append([base, *runs])
        return chains

    def report_folder(self) -> Path:
        """The folder of the report of all arms."""
        s = self.settings
        details = f"lr{s.learning_rate}-lbd{self.table['jepa'].lbd}-k{s.predictors}"
        if self.command == "sweep":
            details = f"val{s.eval_split}-{s.split_seed}" + f"-{s.sweep_arm}" * (s.sweep_arm != "jepa")
        elif s.arms:
            details += "-" + "-".join(items(s.arms)).replace(":", "")
        return Path(s.reports_dir, s.folder_name(items(s.datasets)[0], f"{self.command}-{details}", self.rest))

    def pick(self) -> None:
        """Sets the learning rate, k and λ to those of the best cells on held-out examples."""
        s, file = self.settings, self.report_folder() / "sweep.json"
        done: list[Run] = []

        def best(grid: list[tuple[Arm, Settings]], step: str) -> Run:
            self.step = step
            cells = [self.make_run(arm, seed, dataset, cell, "cell") for arm, cell in grid for seed in seeds]
            self.run_all([[cell] for cell in cells])
            done.extend(cells)
            picked = sweep.pick(cells[0].arm.name, [run.folder / "eval" / run.dataset for run in done], file)
            return next(run for run in cells if str(run.folder) == picked)

        seeds, (dataset,), (regular, arm) = items(s.sweep_seeds), items(s.datasets), self.arms
        s = replace(s, runs_dir=str(file.parent / "cells"))
        rates = [(regular, replace(s, learning_rate=rate)) for rate in items(s.learning_rates)]
        s = best(rates, ", step 1 of 3").settings
        ks, lbds = items(s.grid_k) if arm.has_views else [s.predictors], items(s.grid_lbd)
        grid = [(arm._replace(lbd=lbd), replace(s, predictors=k)) for k in ks for lbd in lbds]
        picked, self.step = best(grid, ", step 2 of 3"), ", step 3 of 3"
        self.arms, self.settings = [regular, picked.arm], replace(picked.settings, runs_dir=self.settings.runs_dir)

    # ------------------------------------------------------------------------------------------ running commands

    def work(self) -> int:
        """Runs everything that is not done; the exit code."""
        if "preflight" in self.templates:
            self.preflight()
        if self.command == "sweep":
            self.pick()
        runs = self.run_all(self.chains())
        if self.settings.node_rank != "0":
            return 0
        words = ["-m", "llm_jepa.report", *(str(run.folder) for run in runs)]
        if self.compares:
            words += ["--output_dir", str(self.report_folder())]
            words += ["--against", next(str(run.folder) for run in runs if run.arm.name == "regular")]
            allow = self.settings.allow.split() + ["reference_grad_scale"] * bool(self.settings.protocol)
            words += ["--allow", *allow] if allow else []
        code = self.call(words)
        if self.compares and not code and sys.stderr.isatty():
            print(f"next, to confirm it: {self.next_command()}", file=sys.stderr)
        return code

    def next_command(self) -> str:
        """The same comparison on other seeds; after a sweep, that of its last step."""
        s, picked = self.settings, self.command == "sweep"
        own = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
        own["SEEDS"] = " ".join(str(int(seed) + 100) for seed in items(s.seeds))
        if picked:
            own |= {"LR": s.learning_rate, "PREDICTORS": s.predictors}
            own["ARMS"] = " ".join(f"{arm.name}:{arm.lbd}" if arm.lbd else arm.name for arm in self.arms)
        variables = [f"{name}={shlex.quote(value)}" for name, value in own.items() if not (picked and name == "LBD")]
        flags = ["--", *self.rest] if self.rest else []
        return " ".join([*variables, shlex.join(["bash", self.script, "compare", s.datasets, s.model, *flags])])

    def preflight(self) -> None:
        """Checks the node, the model and the disk, unless all runs are finished."""
        s, runs = self.settings, [run for (run,) in self.chains()]
        longest = {run.arm: run for run in sorted(runs, key=lambda run: int(MAX_LENGTH.get(run.dataset, 0)))}
        trainings = [fill("-- {arm} {defaults} {flags}", run.values()) for run in longest.values()]
        files = ",".join(dict.fromkeys(file for run in runs for file in (run.train_file, run.test_file)))
        left = sum(not is_finished(run.folder) for run in runs)
        values = vars(s) | {"data_files": files, "left": str(left), "trainings": sum(trainings, [])}
        if left and (code := self.call(fill(self.templates["preflight"], values))):
            raise CommandFailed("not ready (see above)", code)

    def run_all(self, chains: list[list[Run]]) -> list[Run]:
        """Runs the chains, JOBS at a time; the first failure ends the others. Returns the runs that were evaluated.

        A terminal shows how many runs are done and the time left: in a bar, or in a line above the output of each run.
        """
        everything = list(itertools.chain(*chains))
        runs = [run for run in everything if run.kind != "pretrain"]
        if self.settings.node_rank == "0":
            for run in {r.test_file: r for r in runs if not is_finished(r.folder)}.values():
                if code := self.call(self.words("check", run), stdout=subprocess.DEVNULL):
                    raise CommandFailed(f"{run.test_file} cannot be scored; TASK=text is for data of your own", code)
        place = "{n_fmt} of {total_fmt} runs" if self.has_logs else "{desc}"
        bar = tqdm(
            total=len(everything), initial=sum(run.is_done() for run in everything), smoothing=0,
            bar_format=f"{self.command}{self.step}: {place}, {{percentage:.0f}} %, {{remaining}} left",
            delay=0 if self.has_logs else math.inf, disable=None,
        )  # fmt: skip
        with ThreadPoolExecutor(int(self.settings.jobs)) as pool, bar:
            futures = [pool.submit(self.run_chain, chain, bar) for chain in chains]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        return runs

    def run_chain(self, chain: list[Run], bar: tqdm) -> None:
        """Does what is not done of each run and prints its line, until anything has failed."""
        try:
            for run in chain:
                if self.stopping:
                    return
                trained, is_done = run.is_trained(), run.is_done()
                if not (is_done or self.has_logs or bar.disable):
                    bar.set_description_str(self.place(run, bar), refresh=False)
                    print(bar, file=sys.stderr)
                done = ["training"] if trained else self.execute("train", run)
                if run.kind != "pretrain" and self.settings.node_rank == "0":
                    done += ["evaluation"] if run.is_evaluated() else self.execute("evaluate", run)
                    results, problems = read_runs([run.folder])
                    lines = [result.line() for result in results if result.dataset == run.dataset]
                    if not lines:
                        raise CommandFailed("; ".join(problems) or f"{run.folder} has no evaluation", 1)
                    write = tqdm.write if self.has_logs else print  # tqdm.write also shows the bar
                    write(lines[0] + (f"  (done before: {', '.join(done)})" if done else ""))
                    sys.stdout.flush()
                bar.update(not is_done)
        except BaseException:
            if not self.stopping:  # else a consequence of another failure
                self.stopping = True  # at once, so that no other chain starts
                raise

    def place(self, run: Run, bar: tqdm) -> str:
        """Which one of the runs it is."""
        if self.command != "compare":
            return f"run {bar.n + 1} of {bar.total}"
        seeds = items(self.settings.seeds)
        arm, seed = self.arms.index(run.arm) + 1, seeds.index(run.seed) + 1
        return f"arm {arm} of {len(self.arms)}, seed {seed} of {len(seeds)}"

    def words(self, step: str, run: Run) -> list[str]:
        """A command line of a run; cells of a sweep read the two parts of the train file."""
        text = self.templates[f"{step}_{run.kind}" if run.kind in ("pretrain", "plain") and step != "check" else step]
        if run.kind == "cell":
            text = text.replace("--train_file {train_file}", self.templates["train_cell"])
            text = text.replace("--input_file {test_file}", self.templates["evaluate_cell"])
        return fill(f"{self.templates.get(f'launch_{step}', '')} {text}", run.values())

    def execute(self, step: str, run: Run) -> list[str]:
        """Trains or evaluates. Raises CommandFailed with the end of the log if there is one."""
        log = None
        if self.has_logs:
            node = f"-node{self.settings.node_rank}" if self.settings.node_rank != "0" else ""
            log = run.folder.parent / ".logs" / f"{run.name}{node}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
        code = self.call(self.words(step, run), subprocess.DEVNULL if step == "evaluate" else None, log)
        for _ in range(60 if self.settings.nnodes != "1" else 0):  # a shared file system may show files with a delay
            if code or is_finished(run.folder):
                break
            time.sleep(1)
        if not code and is_finished(run.folder):
            return []
        message = f"{step} of seed {run.seed} ended with exit code {code}, unfinished: {run.folder}"
        if log:
            lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
            message = "\n".join([f"{message}, log {log}", *lines[-5:]])
        raise CommandFailed(message, code or 1)

    def call(self, words: list[str], stdout: int | None = None, log: Path | None = None) -> int:
        """Runs Python with these arguments; its exit code, as a shell reports it."""
        variables = dict(os.environ)
        processes = int(self.settings.jobs)
        if "llm_jepa.large.launch" in words:
            processes *= int(self.settings.nproc)
        if processes > 1:
            variables.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
        with self.starting, open(log, "ab") if log else contextlib.nullcontext() as output:
            if self.stopping:
                raise CommandFailed("stopped", 1)
            process = subprocess.Popen(
                [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=stdout or output, stderr=output,
                env=variables, process_group=0,
            )  # fmt: skip
        code = process.wait()
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Ends all processes that were started, also those of torchrun."""
        import psutil

        with self.starting:
            self.stopping = True
        processes = psutil.Process().children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, timeout=5)[1]:
            process.kill()


def main(argv: list[str] | None = None) -> int:
    """Arguments: name of the script, NAME=TEMPLATE …, --, arguments of the script. Exit code: as run_command's."""
    script, *rest = sys.argv[1:] if argv is None else argv
    templates, arguments = partition(rest)

    def work() -> int:
        driver = Driver(script, dict(word.split("=", 1) for word in templates), arguments)

        def on_signal(number: int, frame: object) -> None:
            if not driver.stopping:
                raise CommandFailed("stopped; the same command resumes", 128 + number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, on_signal)
        try:
            return driver.work()
        except CommandFailed as error:
            driver.stop()
            message, code = error.args
            print(f"{script}: {message}", file=sys.stderr)
            return code

    return run_command(script, work)


if __name__ == "__main__":
    sys.exit(main())
