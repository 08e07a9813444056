"""Times how the cost of one thing grows with its size, next to the growth of the work that it needs.

    python benchmarks/bench_growth.py --png growth.png --json growth.json

Arms, each with four sizes:

rows        examples that are read and tokenized
tokens      tokens per example: a packed step whose segments are repeated
width       hidden size of the model: a packed step
pairs       pairs in a micro-batch: a packed step with --jepa_loss clip
processes   finetune.py with clip, one thread per process and gloo: seconds per 1000 tokens of one process
embedded    entries of a corpus that llm_jepa.search embeds
searched    entries of a corpus whose embeddings are stored

`× time` and `× work` are relative to the smallest size. The work is the number of rows or entries, the FLOPs of the
steps as torch counts them, and the number of processes per core. `time/work` above 1: the time grows faster than the
work. The sizes of an arm take turns, except those of `processes`, whose runs follow each other.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from bench_commands import TINY
from bench_step import SHAPES, Arm, arm_of, head, settings_of, step_parser, write_shape
from matplotlib.figure import Figure
from timing import ROOT, interleave, percentiles, report
from transformers import AutoModelForCausalLM, LlamaConfig

import finetune
from llm_jepa.data.segments import Segment
from llm_jepa.distributed import cores
from llm_jepa.files import read_jsonl
from llm_jepa.search import search

FACTORS = (1, 2, 4, 8)
WARM_UP = 2  # steps of a run that are not timed
Sizes = dict[int, tuple[list[float], float]]  # size → (seconds of each repeat, work)


def timed(args: argparse.Namespace, actions: dict[int, Callable[[], Any]], work: dict[int, float]) -> Sizes:
    """The sizes, timed in turns."""
    seconds = interleave({str(size): action for size, action in actions.items()}, args.repeats)
    return {size: (seconds[str(size)], work[size]) for size in actions}


def timed_steps(args: argparse.Namespace, arms: dict[int, Arm]) -> Sizes:
    """The sizes of a training step."""
    return timed(args, arms, {size: arm.flops() for size, arm in arms.items()})


def heads(args: argparse.Namespace, folder: str) -> Iterator[tuple[int, str]]:
    """(n, file with the first n examples), up to --rows."""
    for factor in FACTORS:
        n = args.rows * factor // max(FACTORS)
        yield n, head(args.input_file, n, folder)


def rows(args: argparse.Namespace, folder: str) -> Sizes:
    """Reading and tokenizing, in as many processes as finetune.py uses for that number of rows."""
    s, state = settings_of("packed", args, folder), PartialState()
    encoder = finetune.prepare(s, state).encoder
    files = heads(args, folder)
    gc.freeze()  # as finetune.py does
    actions = {n: partial(finetune.load_data, replace(s, train_file=file), encoder, state) for n, file in files}
    return timed(args, actions, {n: n for n in actions})


def longer(item: tuple[Segment, ...], times: int) -> tuple[Segment, ...]:
    """The item with each of its segments repeated, in place of a longer text."""
    return tuple(
        replace(
            x, ids=np.tile(x.ids, times), labels=np.tile(x.labels, times),
            view=None if x.view is None else x.view + len(x.ids) * (times - 1),
        )
        for x in item
    )  # fmt: skip


def tokens(args: argparse.Namespace, folder: str) -> Sizes:
    """A step of --batch_size examples."""
    shared: dict[str, Any] = {}
    arms = [arm_of("packed", args, folder, shared, partial(longer, times=factor)) for factor in FACTORS]
    return timed_steps(args, {arm.useful // arm.examples: arm for arm in arms})


def width(args: argparse.Namespace, folder: str) -> Sizes:
    """A step with half to four times the width of the shape, in the same number of layers and heads of equal size."""
    shape, arms = SHAPES[args.shape], {}
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for factor in FACTORS:
        changes = {name: max(1, shape[name] * factor // 2) for name in names}
        write_shape(args, folder, **changes)
        arms[changes["hidden_size"]] = arm_of("packed", args, folder, {})
    write_shape(args, folder)
    return timed_steps(args, arms)


def pairs(args: argparse.Namespace, folder: str) -> Sizes:
    """A step with --batch_size to eight times as many examples."""
    shared: dict[str, Any] = {}
    flags = [argparse.Namespace(**vars(args) | {"batch_size": args.batch_size * factor}) for factor in FACTORS]
    return timed_steps(args, {more.batch_size: arm_of("clip", more, folder, shared) for more in flags})


def processes(args: argparse.Namespace, folder: str) -> Sizes:
    """Complete trainings of the tiny model with the same micro-batch in every process."""
    found = {}
    for n in FACTORS:
        run, steps = Path(folder) / f"run-{n}", WARM_UP + 4 * args.repeats
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *TINY]
        command += ["--predictors", "1", "--jepa_loss", "clip", "--max_steps", str(steps), "--output_dir", str(run)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        lines = [line for _, line in read_jsonl(run / "metrics.jsonl") if "tokens_per_second" in line]
        seconds = [1000 * n / line["tokens_per_second"] for line in lines if line["step"] > WARM_UP]
        found[n] = (seconds, max(1, n / cores()))
    return found


def corpora(args: argparse.Namespace, folder: str, stored: bool) -> Sizes:
    """One question to corpora of the first examples, with their embeddings stored or not."""
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)

    def ask(n: int, corpus: str) -> None:
        index = Path(folder) / f"index-{n}"
        if not stored:
            index.unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            search(folder, corpus, "lines that start with a number", "code", 10, index)

    actions = {n: partial(ask, n, corpus) for n, corpus in heads(args, folder)}
    return timed(args, actions, {n: n for n in actions})


ARMS: dict[str, tuple[str, Callable[[argparse.Namespace, str], Sizes]]] = {  # name → (label of its sizes, measurement)
    "rows": ("rows read and tokenized", rows),
    "tokens": ("tokens per example", tokens),
    "width": ("model width", width),
    "pairs": ("pairs per micro-batch, clip", pairs),
    "processes": ("processes, gloo", processes),
    "embedded": ("entries embedded", partial(corpora, stored=False)),
    "searched": ("entries searched", partial(corpora, stored=True)),
}


def table(name: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """One row of the table per size."""
    first: dict[str, float] = {}
    for size, (seconds, work) in sizes.items():
        times = percentiles(seconds)
        first = first or {"seconds": times["p50"], "work": work}
        relative = {"× time": times["p50"] / first["seconds"], "× work": work / first["work"]}
        yield {"arm": name, "size": size, **relative, "time/work": relative["× time"] / relative["× work"], **times}


def plot(results: list[dict[str, Any]], path: str) -> None:
    """Small multiples: relative time and relative work over the size, on logarithmic axes."""
    names = list(dict.fromkeys(row["arm"] for row in results))
    figure = Figure(figsize=(11, 5), layout="constrained")
    cells = figure.subplots(2, 4).flat
    for name, axes in zip(names, cells, strict=False):
        own = [row for row in results if row["arm"] == name]
        sizes = [row["size"] for row in own]
        axes.loglog(sizes, [row["× time"] for row in own], color="#0072B2", marker="o", label="time")
        axes.loglog(sizes, [row["× work"] for row in own], color="grey", ls=":", label="work")
        axes.set(xlabel=ARMS[name][0], ylabel="× smallest")
        axes.set_xticks(sizes, map(str, sizes))
        most = max(max(row["× time"], row["× work"]) for row in own)
        axes.set_yticks(ticks := [2**n for n in range(8) if 2**n <= most], map(str, ticks))
        axes.minorticks_off()
    for axes in list(figure.axes)[len(names) :]:
        axes.axis("off")
    figure.axes[-1].legend(*figure.axes[0].get_legend_handles_labels(), frameon=False, loc="center")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the table, draws the figure and writes the JSON."""
    parser = step_parser(__doc__)
    parser.add_argument("--rows", type=int, default=8000, help="largest data set and corpus (default 8000)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--png", help="file for the figure")
    args = parser.parse_args()
    args.steps, results = 1, []
    with tempfile.TemporaryDirectory() as folder:
        write_shape(args, folder)
        for name in args.arms:
            results += table(name, ARMS[name][1](args, folder))
    report(args, args.input_file, results)
    if args.png:
        plot(results, args.png)


if __name__ == "__main__":
    main()
