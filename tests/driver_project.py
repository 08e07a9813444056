"""A project folder in which llm_jepa/driver.py runs in this process, with real or recorded commands."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT, call

import finetune
from llm_jepa import cli, driver
from llm_jepa.files import sha256

VARIABLES = [name for field in driver.dataclasses.fields(driver.Settings) for name in field.metadata["variables"]]
NODE_VARIABLES = ["MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS", "NODE_TIMEOUT", "JOIN_LIMIT", "PREFLIGHT", "DEVICE",
                  "TRAINER", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NODEID",
                  "SLURM_JOB_NODELIST", "SLURM_SUBMIT_DIR"]  # fmt: skip
FUNCTIONS = {
    "run.sh": "arms; run_arm; run_pretrain; sweep; launchers",
    "run8bh200.sh": "node_variables; arms; run_arm; launchers",
}
MODULES = ("llm_jepa.report", "llm_jepa.preflight")
NODE_DEFAULTS = ("MODEL", "PREDICTORS", "ARMS", "NPROC", "NNODES", "NODE_RANK")
# Defaults of the tiny model that the tests expect, whatever recipe the driver has; real runs use the driver's.
TINY = {"learning_rate": "1e-3", "epochs": "2", "learning_rates": "5e-4 1e-3 2e-3 4e-3"}
TINY_FLAGS = {"--batch_size": "8", "--grad_accum": "1", "--warmup_steps": "0.05", "--adam_beta2": "0.98"}


@cache
def templates(script: str, variables: tuple[tuple[str, str], ...] = ()) -> tuple[list[str], dict[str, str]]:
    """The command lines that a shell script passes to the driver, and the variables that run8bh200.sh sets for it."""
    shown = "".join(f' "${name}"' for name in NODE_DEFAULTS if script == "run8bh200.sh")
    text = f'. ./{script}; {FUNCTIONS[script]}; printf "%s\\0" "${{templates[@]}}" --{shown}'
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES + NODE_VARIABLES} | dict(variables)
    done = subprocess.run(["bash", "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines, values = driver.partition(done.stdout.split("\0")[:-1])
    return lines, dict(zip(NODE_DEFAULTS, values, strict=False))


def resolved(argv: list[str]) -> dict:
    """The settings of a training as args.json would contain them."""
    return driver.dataclasses.asdict(finetune.check_settings(*cli.parse_flags(finetune.Settings, "", argv)))


class Project:
    """Data files, and `run` for one call of the driver."""

    def __init__(self, folder: Path, monkeypatch, script: str = "run.sh"):
        self.folder, self.patch, self.script = folder, monkeypatch, script
        (folder / "datasets").mkdir()
        for name in ("synth", "turk", "paraphrase", "rotten_tomatoes", "yelp"):
            for part, count in (("train", 40), ("test", 4)):
                lines = (ROOT / f"datasets/synth_{part}.jsonl").read_text().splitlines(keepends=True)[:count]
                (folder / f"datasets/{name}_{part}.jsonl").write_text("".join(lines))
        (folder / "models").symlink_to(ROOT / "models")
        monkeypatch.chdir(folder)
        for name in (*VARIABLES, *NODE_VARIABLES):
            monkeypatch.delenv(name, raising=False)

    def run(self, *arguments: str, real: bool = False, trouble=lambda script, flags: 0, score=lambda flags: 0.5,
            terminal: bool = False, **variables: str) -> SimpleNamespace:  # fmt: skip
        """Exit code and output; `steps`: each script that ran with its flags, in order. `terminal`: stderr is one."""
        steps, lock = [], threading.Lock()

        def recorded(_, words, stdout=None, log=None):
            at = next(i for i, word in enumerate(words) if word.endswith(".py") or word in MODULES)
            script, argv = words[at].removesuffix(".py"), words[at + 1 :]
            with lock:
                steps.append((script, argv))
            if code := trouble(script, argv):
                if log:
                    log.write_text("first line\rout of memory\n")
                return code
            if real:
                found = call(script, *argv, code=0)
                print(found.out if stdout is None else "", end="")
                return 0
            return pretend(script, argv, score)

        out, err = io.StringIO(), io.StringIO()
        with self.patch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(driver.Driver, "call", recorded)
            patch.setattr(err, "isatty", lambda: terminal)
            patch.setattr(signal, "signal", lambda *_: None)  # the scripts run in threads
            if real:
                patch.setitem(driver.TINY_DEFAULTS, "jobs", "1")  # the scripts run in this process
            else:
                patch.setattr(driver, "TINY_DEFAULTS", TINY)
                patch.setattr(driver, "TINY_FLAGS", TINY_FLAGS)
            large = self.script == "run8bh200.sh"
            lines, more = templates(self.script, tuple(sorted(variables.items())) if large else ())
            for name, value in (variables | more).items():
                patch.setenv(name, value)
            code = driver.main([self.script, *lines, "--", *arguments])
        trained = [argv for script, argv in steps if script.startswith("finetune")]
        evaluated = [argv for script, argv in steps if script == "evaluate" and "--score_gold" not in argv]
        return SimpleNamespace(
            code=code, out=out.getvalue(), err=err.getvalue(), steps=steps, trained=trained, evaluated=evaluated,
            runs=[flag(argv, "--output_dir") for argv in trained],
            checked=[argv for script, argv in steps if script == "evaluate" and "--score_gold" in argv],
            reports=[argv for script, argv in steps if script == "llm_jepa.report"],
        )  # fmt: skip

    def copy_scripts(self) -> None:
        """Adds the shell scripts and the package, to run them in a process of their own."""
        for name in ("run.sh", "run8bh200.sh", "run8bh200.sbatch", "finetune.py", "evaluate.py", "finetune8bh200.py"):
            shutil.copy(ROOT / name, self.folder)
        (self.folder / "llm_jepa").symlink_to(ROOT / "llm_jepa")


def flag(argv: list[str], name: str) -> str | None:
    """The value of a flag."""
    return argv[argv.index(name) + 1] if name in argv else None


def pretend(script: str, argv: list[str], score) -> int:
    """Writes the files of a training or an evaluation that the driver reads; the exit code."""
    if script.startswith("finetune"):
        run, data = Path(flag(argv, "--output_dir")), flag(argv, "--train_file") or flag(argv, "--data_file")
        run.mkdir(parents=True, exist_ok=True)
        args = {"model_name": flag(argv, "--model_name"), "regular": "--regular" in argv, "nitp": "--nitp" in argv}
        numbers = {"finetune_seed": int, "learning_rate": float, "predictors": int, "lbd": float, "nitp_lbd": float}
        args |= {name: read(flag(argv, f"--{name}") or 0) for name, read in numbers.items()}
        args |= {"data_file": flag(argv, "--data_file"), "eval_split": 0.2, "split_seed": 42}
        (run / "args.json").write_text(json.dumps(args))
        record = {"status": "finished", "data_sha256": {data: sha256(data)}, "wall_seconds": 1.0}
        (run / "run.json").write_text(json.dumps(record))
    elif script == "evaluate" and "--score_gold" not in argv:
        run, data = Path(flag(argv, "--model_name")), flag(argv, "--input_file")
        folder = run / "eval" / Path(data).stem.rpartition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        value = score(SimpleNamespace(**json.loads((run / "args.json").read_text())))
        metrics = {"task": flag(argv, "--task") or "synth", "n": 4, "score": "exact", "scores": [], "exact": value}
        metrics |= {"startswith": 1.0, "stop_rate": 1.0, "data_sha256": sha256(data), "failures": {}}
        metrics["settings"] = {"process_split": flag(argv, "--process_split")}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return 0
