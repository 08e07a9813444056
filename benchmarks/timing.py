"""What the benchmarks share: arms timed in turn within one run, percentiles, a table, a JSON file with provenance."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llm_jepa.files import write_json
from llm_jepa.run_folder import provenance  # noqa: E402


def interleave(arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each arm. The arms take turns, so that a slow spell of the machine meets them all.

    Each is run once before the clock starts; the order is turned by one from round to round.
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
    """FLOP/s of a large matrix product, the best of several."""
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
    if len(seconds) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), seconds[0])
    fifths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20": fifths[1], "p50": fifths[4], "p80": fifths[7]}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as an aligned text table."""
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[c]) for line in cells) for c in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write(path: str | None, data: dict[str, str], **results: Any) -> None:
    """Writes the results with where they come from; `data`: checksums by path."""
    if path:
        write_json(Path(path), provenance(data) | results)
