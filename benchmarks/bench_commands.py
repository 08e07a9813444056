"""Times complete commands: the start of the scripts, and five seeds of the tiny model.

    python benchmarks/bench_commands.py --json commands.json

Arms: `--help` of both scripts; `first step`, finetune.py until the first optimizer step is in metrics.jsonl; `five
seeds` of run.sh, short trainings and evaluations two at a time, with one thread each on two cores, or one after another
(JOBS=1) with threads that sleep while they wait, as in the first version of run.sh.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from timing import ROOT, flag_parser, interleave, percentiles, report

DATA = ROOT / "datasets" / "synth_train.jsonl"
# run.sh's flags of models/tiny.
TINY = ["finetune.py", "--train_file", str(DATA), "--model_name", "models/tiny", "--pretrain", "--learning_rate",
        "1e-3", "--batch_size", "8", "--grad_accum", "1", "--warmup_steps", "0.05", "--adam_beta2", "0.98",
        "--save_strategy", "no"]  # fmt: skip
run = partial(subprocess.run, cwd=ROOT, check=True, capture_output=True)


def first_step() -> None:
    """Starts a training and ends it after the first step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run" / "metrics.jsonl"
        command = [sys.executable, *TINY, "--regular", "--output_dir", str(file.parent)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (file.exists() and file.stat().st_size):
                time.sleep(0.01)
            process.kill()
        if process.returncode >= 0:  # it ended by itself
            raise SystemExit(f"bench_commands.py: error: exit code {process.returncode}: {' '.join(command)}")


def five_seeds(jobs: int, steps: int) -> None:
    """`bash run.sh run_regular` with its five seeds."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"} if jobs == 1 else {}
        own |= {"JOBS": str(jobs), "RUNS_DIR": folder, "PYTHON_BIN": sys.executable, "EVAL_FLAGS": "--max_examples 200"}
        flags = ["--max_steps", str(steps), "--save_strategy", "no"]
        run(["bash", "run.sh", "run_regular", "--", *flags], env=os.environ | own)


def main() -> None:
    """Prints the table and writes the JSON."""
    arms = {
        "finetune.py --help": lambda: run([sys.executable, "finetune.py", "--help"]),
        "evaluate.py --help": lambda: run([sys.executable, "evaluate.py", "--help"]),
        "first step": first_step,
        "five seeds, one at a time": lambda: five_seeds(1, args.steps),
        "five seeds, two at a time": lambda: five_seeds(2, args.steps),
    }
    parser = flag_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of each of the five seeds (default 200)")
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms), help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="how often each arm is timed (default 5)")
    args = parser.parse_args()
    seconds = interleave({name: arms[name] for name in args.arms}, args.repeats)
    report(args, DATA, [{"arm": name, **percentiles(times)} for name, times in seconds.items()])


if __name__ == "__main__":
    main()
