"""Shared by the benchmarks: interleaved timing, percentiles, a text table, a JSON file with provenance.

Importing this module makes the repository's packages importable and transformers quiet.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llm_jepa.files import sha256, write_json  # noqa: E402
from llm_jepa.run_folder import provenance  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def flag_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flag that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the results and their provenance")
    return parser


def interleave(
    arms: dict[str, Callable[[], Any]], repeats: int, after_round: Callable[[dict], Any] | None = None,
    warm: tuple[str, ...] = (),
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each repeat of each arm. The arms take turns, so that a slow period affects all of them.

    Each arm that is not in `warm` runs once untimed. Each round has another random order, because an arm after one that
    needs much memory is slower. `after_round` gets the seconds so far.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)
    for name, arm in arms.items():
        if name not in warm:
            arm()
    for _ in range(repeats):
        for name in order.sample(list(arms), len(arms)):
            seconds[name].append(measure(arms[name]))
        if after_round:
            after_round(seconds)
    return seconds


def measure(action: Callable[..., Any], *args: Any) -> float:
    """Seconds of a call, including its work on the GPU."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    action(*args)
    synchronize()
    return time.perf_counter() - begin


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    n = 8192 if DEVICE == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(measure(torch.matmul, a, b) for _ in range(10))


def percentiles(seconds: list[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} in seconds."""
    return {f"p{p}": float(np.percentile(seconds, p)) for p in (20, 50, 80)}


def report(args: argparse.Namespace, data: str | Path, results: list[dict[str, Any]], **shape: Any) -> None:
    """Prints the results as a table. Writes them to `args.json`, if given, with their provenance; `data`: a file."""
    print(pd.DataFrame(results).to_string(index=False, na_rep="", float_format="{:.4g}".format))
    if args.json:
        write_results(args.json, args, data, results, **shape)
        Path(f"{args.json}.part").unlink(missing_ok=True)


def write_results(
    file: str, args: argparse.Namespace, data: str | Path, results: list[dict[str, Any]], **shape: Any
) -> None:
    """Writes the results with their provenance, atomically."""
    record = provenance({str(data): sha256(data)}) | {"shape": vars(args) | shape, "results": results}
    write_json(Path(file), record)
