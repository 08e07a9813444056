"""Shared by the benchmarks: interleaved timing, percentiles, a text table, a JSON file with provenance."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llm_jepa.files import write_json  # noqa: E402
from llm_jepa.run_folder import provenance  # noqa: E402


def interleave(arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each arm. The arms take turns, so that a slow period affects all of them.

    Each arm runs once untimed; the order rotates by one from round to round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for name in names:
        arms[name]()
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _synchronise()
            begin = time.perf_counter()
            arms[name]()
            _synchronise()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of ten."""
    n, times = 8192 if device == "cuda" else 2048, []
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} in seconds."""
    return {f"p{p}": float(np.percentile(seconds, p)) for p in (20, 50, 80)}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as an aligned text table."""
    return pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format)


def write(path: str | None, data: dict[str, str], **results: Any) -> None:
    """Writes the results with their provenance; `data`: checksums by path."""
    if path:
        write_json(Path(path), provenance(data) | results)
