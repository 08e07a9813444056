"""Run the experiments of experiments/plans/.

    python experiments/terms.py nitp combine terms --jobs 2

Each finished run adds a line to experiments/results/EXPERIMENT.jsonl. Runs that have a line are skipped, so the same
command resumes, in any clone. `python experiments/tables.py` prints the tables of these files.

    pick      λ and layer of NITP, on training examples that the other runs do not use
    nitp      plans/nitp.md: NITP from random weights, with its controls
    combine   plans/combine.md: clip + NITP and Semantic Tube Prediction; compared with runs of nitp
    terms     plans/terms.md: which losses learn the pairs, and at what price
    jobs      plans/jobs.md: generation and retrieval with one model
    datasets  plans/datasets.md: NITP on the other datasets
    smollm    plans/smollm.md: a pretrained model on SYNTH and the datasets that it learns

`pick_jobs`, `pick_datasets` and `pick_smollm` pick the settings of plans/jobs.md, plans/datasets.md and plans/smollm.md
on held-out training examples.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # one thread per run
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the repository's own modules

import fresh  # noqa: E402
import peft  # noqa: E402, F401  loaded once, not in each run
import subset  # noqa: E402

import evaluate  # noqa: E402
import finetune  # noqa: E402
from llm_jepa.cli import UsageError, run_command  # noqa: E402
from llm_jepa.files import read_json  # noqa: E402
from llm_jepa.scoring.tasks import TASKS  # noqa: E402

NITP = "--nitp --nitp_lbd 1.6 --nitp_layer 0"  # as picked, see plans/nitp.md
COMMON = "--batch_size 8 --grad_accum 1 --warmup_steps 0.05 --save_strategy no --overwrite"
TINY = "--model_name models/tiny --pretrain --adam_beta2 0.98"
SMOLLM = "--model_name runs/smollm2 --dtype float32"  # the folder of SmolLM2-135M-Instruct
ARMS = {
    "regular": "--regular",
    "longer": "--regular",
    "all_labels": "--regular --lm_labels all",
    "nitp": f"--regular {NITP}",
    "random": f"--regular {NITP} --nitp_targets random",
    "shuffled": f"--regular {NITP} --nitp_targets shuffled",
    "clip_nitp": f"--predictors 1 --lbd 0.1 --jepa_loss clip {NITP}",
    "stp": "--regular --stp geodesic --stp_lbd 0.02",
}
PAIRS = {  # losses of pairs: the name of an arm is NAME:λ
    "stop_gradient": "--stop_gradient code",
    "center": "--center",
    "sigreg": "--sigreg 0.05",
    "placebo": "--jepa_loss clip --shuffle_pairs",
}
DATASETS = [("turk", 8000, 2000)]  # picked in plans/datasets.md: name, training examples, test examples
SMOLLM_ARMS = "regular cosine:1 clip:0.1 nitp:0.8:0".split()
SMOLLM_RATES = (1e-4, 2e-4, 4e-4)
MEASURED = "regular cosine:1 clip:0.1 placebo:0.1".split()  # arms of `terms` with the geometry of their views


def flags(arm: str) -> list[str]:
    """The flags of an arm."""
    name, *values = arm.split(":")
    if name == "nitp" and values:  # nitp:λ:layer
        return f"--regular --nitp --nitp_lbd {values[0]} --nitp_layer {values[1]}".split()
    if len(values) > 1:  # both:λ:queue:τ, or contrast:λ:queue:τ without the LM loss
        lbd, queue, temperature = values
        contrast = f"--predictors 1 --jepa_loss clip --lbd {lbd} --negatives_queue {queue} --temperature {temperature}"
        return [*contrast.split(), "--gamma", str(int(name == "both"))]
    if values:
        return f"--predictors 1 --lbd {values[0]} {PAIRS.get(name, f'--jepa_loss {name}')}".split()
    return ARMS[name].split()


@dataclass(frozen=True)
class Run:
    """A training and its evaluation."""

    experiment: str
    arm: str
    examples: int  # the first ones of the training examples
    seed: int
    epochs: int
    test: str = "fresh"  # or held_out, or test: the test part of the dataset
    data: str = "synth"
    tested: int = 2000  # the first ones of the test part
    learning_rate: float = 1e-3

    @property
    def name(self) -> str:
        """What identifies the run in its experiment."""
        data = "" if self.data == "synth" else f"{self.data}-"
        rate = f"-lr{self.learning_rate:g}" if "smollm" in self.experiment else ""
        return f"{data}{self.arm.replace(':', '-')}-{self.examples}-s{self.seed}{rate}"

    @property
    def model(self) -> list[str]:
        """The model's flags."""
        tiny = TINY if self.data == "synth" else f"{TINY} --max_length 1024 --skip_bad_examples"
        return (SMOLLM if "smollm" in self.experiment else tiny).split()


def pick() -> Iterator[Run]:
    """Two seeds of NITP with three weights and two layers."""
    for seed in (42, 43):
        for arm in ("regular", *(f"nitp:{lbd}:{layer}" for lbd in (0.4, 0.8, 1.6) for layer in (0, 1))):
            yield Run("pick", arm, 1000, seed, 8, test="held_out")


def nitp() -> Iterator[Run]:
    """Four sizes, then the controls."""
    for seed in range(11, 21):
        for examples, epochs in ((1000, 8), (8000, 1), (2000, 4), (500, 16)):
            for arm in ("regular", "nitp"):
                yield Run("nitp", arm, examples, seed, epochs)
    for seed in range(11, 21):
        for arm, epochs in (("all_labels", 8), ("random", 8), ("shuffled", 8), ("longer", 10)):
            yield Run("nitp", arm, 1000, seed, epochs)


def combine() -> Iterator[Run]:
    """The arms that `nitp` does not have."""
    for seed in range(11, 21):
        for arm in ("clip:0.1", "clip_nitp", "stp"):
            yield Run("combine", arm, 1000, seed, 8)


def terms() -> Iterator[Run]:
    """Losses of pairs."""
    arms = ("regular cosine:1 clip:0.1 placebo:0.1 infonce:0.1 clip:1 l2:1 mse:1 vicreg:0.1 vicreg:1 stop_gradient:1 "
            "center:1 sigreg:1")  # fmt: skip
    for seed in range(31, 36):
        for arm in arms.split():
            yield Run("terms", arm, 1000, seed, 8)


def pick_jobs() -> Iterator[Run]:
    """Settings of the contrastive loss."""
    arms = ("regular both:0.1:0:0.1 both:0.1:256:0.1 both:0.1:1024:0.1 both:0.1:256:0.05 both:0.3:256:0.1 "
            "both:0.3:1024:0.05 contrast:1:256:0.1 contrast:1:1024:0.05 both:0.05:0:0.1 both:0.1:0:0.05 "
            "both:0.05:0:0.05 contrast:1:0:0.1 contrast:1:0:0.05")  # fmt: skip
    for arm in arms.split():
        yield Run("pick_jobs", arm, 6000, 42, 1, test="held_out")


def jobs() -> Iterator[Run]:
    """The picked settings; `nitp` has the regular runs."""
    for seed in range(11, 21):
        yield Run("jobs", "both:0.05:0:0.1", 8000, seed, 1)
        if seed < 16:
            yield Run("jobs", "contrast:1:0:0.1", 8000, seed, 1)


def pick_smollm() -> Iterator[Run]:
    """The learning rate of each arm with a pretrained model, on SYNTH, and which other datasets it learns."""
    for rate in SMOLLM_RATES:
        for arm in SMOLLM_ARMS:
            yield Run("pick_smollm", arm, 500, 42, 1, "held_out", tested=300, learning_rate=rate)
    for data in ("turk", "spider"):
        yield Run("pick_smollm", "regular", 500, 42, 1, "held_out", data, 300, 2e-4)


def smollm() -> Iterator[Run]:
    """Each arm with its picked learning rate: that of the best primary score, of equal ones the smallest.

    On SYNTH, and on the other datasets of which a regular run has learned at least 10 %.
    """
    picks = ROOT / "experiments/results/pick_smollm.jsonl"
    tried = [json.loads(line) for line in picks.read_text().splitlines()] if picks.exists() else []
    if len(tried) != len([*pick_smollm()]):
        raise UsageError("runs of pick_smollm are missing; run that first")
    rates = {}
    for arm in SMOLLM_ARMS:
        own = [line for line in tried if (line["arm"], line["data"]) == (arm, "synth")]
        best = max(own, key=lambda line: (line[TASKS["synth"].primary], -line["learning_rate"]))
        rates[arm] = best["learning_rate"]
    learned = [line["data"] for line in tried if line["data"] != "synth" and line[TASKS[line["data"]].primary] >= 0.1]
    for data, test in (("synth", "fresh"), *((data, "test") for data in learned)):
        for seed in range(51, 56):
            for arm, rate in rates.items():
                yield Run("smollm", arm, 500, seed, 1, test, data, 300, rate)


def pick_datasets() -> Iterator[Run]:
    """Whether models/tiny learns a dataset at all."""
    for data, tested in (("turk", 500), ("spider", 458), ("gsm8k", 500)):
        yield Run("pick_datasets", "regular", 6000, 42, 2, "held_out", data, tested)


def datasets() -> Iterator[Run]:
    """The datasets that models/tiny learns, as pick_datasets has found."""
    for data, examples, tested in DATASETS:
        for seed in range(11, 21):
            for arm in ("regular", "nitp"):
                yield Run("datasets", arm, examples, seed, 2, "test", data, tested)


EXPERIMENTS: dict[str, Callable[[], Iterator[Run]]] = {
    e.__name__: e for e in (pick, nitp, combine, terms, pick_jobs, jobs, pick_datasets, datasets, pick_smollm, smollm)
}


def write_part(target: Path, data: str, part: str, selection: list[str]) -> str:
    """Writes a part of a dataset unless it exists. Returns its path."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        subset.work([str(ROOT / f"datasets/{data}_{part}.jsonl"), str(target), *selection])
    return str(target)


def write_parts(run: Run, out: Path) -> tuple[str, str]:
    """Writes the training and the test examples of a run. Returns their paths."""
    parts = out / "parts" / run.data
    target = parts / f"{run.test}{run.tested}.jsonl"
    train = write_part(parts / f"{run.examples}.jsonl", run.data, "train", ["--first", str(run.examples)])
    if run.test == "fresh" and not target.exists():
        fresh.work([str(target), "--count", str(run.tested)])
    elif run.test == "held_out":
        write_part(target, run.data, "train", ["--skip", "6000", "--first", str(run.tested)])
    elif run.test == "test":
        write_part(target, run.data, "test", ["--first", str(run.tested)])
    return train, str(target)


def in_child(log: Path, main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Calls a script's `main` in a fork of this process, which has loaded its modules. Raises UsageError on failure."""

    def child() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.exit(main(argv))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise UsageError(f"a run has failed, see {log}")


def perform(run: Run, out: Path) -> dict:
    """Trains and evaluates unless that is finished. Returns the run's line in the results."""
    folder, (train, test) = out / run.experiment / run.name, write_parts(run, out)
    log, score = folder.with_name(f"{run.name}.log"), TASKS[run.data].primary
    log.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "run.json").exists() or read_json(folder / "run.json")["status"] != "finished":
        method = [*flags(run.arm), "--learning_rate", str(run.learning_rate), "--num_epochs", str(run.epochs)]
        common = [*COMMON.split(), "--finetune_seed", str(run.seed), "--output_dir", str(folder)]
        in_child(log, finetune.main, ["--train_file", train, *run.model, *method, *common])
    evaluation = ["--model_name", str(folder), "--input_file", test, "--overwrite", "--output_file"]
    in_child(log, evaluate.main, [*evaluation, str(folder / "predictions.jsonl"), "--task", run.data])
    record, metrics = read_json(folder / "run.json"), read_json(folder / "metrics.json")
    line = {"run": run.name} | asdict(run)
    line |= {name: metrics[name] for name in (score, "exact", "startswith", "stop_rate", "retrieval")}
    if run.experiment == "terms" and run.arm in MEASURED:
        in_child(log, evaluate.main, [*evaluation, str(folder / "similarity.json"), "--similarity"])
        geometry = read_json(folder / "similarity.json")
        line["geometry"] = {k: v for k, v in geometry.items() if re.match("least_squares|singular_value_", k)}
    line |= {"learned": record.get("learned"), "train_seconds": record["wall_seconds"]}
    return line | {"started": record["attempts"][-1]["started"], "commit": record["git_commit"][:7]}


def work(argv: list[str] | None) -> None:
    """Parses the flags, writes the parts of the dataset and runs the experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default 2)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (default runs)")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    for experiment in options.experiments:
        results = ROOT / "experiments/results" / f"{experiment}.jsonl"
        results.parent.mkdir(exist_ok=True)
        results.touch()
        done = {json.loads(line)["run"] for line in results.read_text().splitlines()}
        todo = [run for run in EXPERIMENTS[experiment]() if run.name not in done]
        for run in todo:  # here, so that two runs do not write the same file
            write_parts(run, options.out)
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
            futures = [pool.submit(perform, run, options.out) for run in todo]
            for count, future in enumerate(as_completed(futures), len(done) + 1):
                if future.exception():
                    pool.shutdown(cancel_futures=True)
                with results.open("a") as file:
                    file.write(json.dumps(future.result()) + "\n")
                print(f"{experiment}: {count} of {len(done) + len(todo)}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command("terms.py", lambda: work(None)))
