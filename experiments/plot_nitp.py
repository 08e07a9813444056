"""Draw the figure of the experiment `nitp`: differences from regular fine-tuning by size, and those of the controls.

python experiments/plot_nitp.py experiments/nitp.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llm_jepa.cli import run_command
from llm_jepa.reports import stats
from llm_jepa.reports.plots import PALETTE

SIZES = (500, 1000, 2000, 8000)
CONTROLS = {
    "nitp": "NITP",
    "shuffled": "NITP, targets of\nother tokens",
    "random": "NITP, random\ntargets",
    "all_labels": "all tokens\nare labels",
    "longer": "regular,\n25 % longer",
}


def draw(axes: Axes, x: int, comparison: stats.Comparison, style: tuple[str, str]) -> None:
    """Draws the differences of the seeds, their mean and its interval."""
    color, marker = style
    seeds = len(comparison.differences)
    axes.scatter([x + 0.18] * seeds, comparison.differences, c=color, s=9, alpha=0.45, linewidths=0)
    low, high = comparison.interval
    axes.plot((x, x), (low, high), color=color, linewidth=2)
    axes.scatter([x], [comparison.mean], c=color, marker=marker, s=42, zorder=3)


def main() -> None:
    """Parses the flags, reads the results and draws. Raises UsageError if runs are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_file", type=Path, help="PNG")
    options = parser.parse_args()
    lines = tables.load("nitp")

    def compare(arm: str, n: int) -> stats.Comparison:
        return stats.compare(arm, "regular", "", tables.scores(lines[arm, n]), tables.scores(lines["regular", n]))

    fig = Figure(figsize=(9, 3.4), layout="constrained")
    sizes, controls = fig.subplots(1, 2, sharey=True, width_ratios=(4, 5))
    for x, n in enumerate(SIZES):
        draw(sizes, x, compare("nitp", n), PALETTE[0])
    sizes.set_xticks(range(len(SIZES)), [str(n) for n in SIZES])
    sizes.set_xlabel("training examples")
    sizes.set_ylabel("dfa_equal, points above regular")
    sizes.set_title("NITP", fontsize=10)
    for x, arm in enumerate(CONTROLS):
        draw(controls, x, compare(arm, 1000), PALETTE[min(x, 1)])
    controls.set_xticks(range(len(CONTROLS)), CONTROLS.values(), fontsize=8)
    controls.set_title("NITP and its controls, 1000 examples", fontsize=10)
    for axes in (sizes, controls):
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        axes.set_xlim(-0.5, len(axes.get_xticks()) - 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(options.output_file, dpi=110)


if __name__ == "__main__":
    sys.exit(run_command("plot_nitp.py", main))
