"""Draws the README's figure: scores of the experiment `stopping` of findings.sh, by label scope and arm.

python experiments/plot.py runs/other7500-tiny-stops-* --output_file experiments/labels.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from llm_jepa.cli import UsageError
from llm_jepa.reports.results import read_runs

SCORES = {"exact %": "exact match, %", "startswith %": "startswith, %", "stop_rate %": "stop rate, %"}
SCOPES = {"reference": "published labels", "answer": "corrected labels"}
ARMS = {True: ("regular", "#0072B2", "o"), False: ("JEPA, k = 1, λ = 1", "#D55E00", "^")}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 2 missing or unreadable runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--output_file", required=True, type=Path, help="PNG")
    options = parser.parse_args(argv)
    results, problems = read_runs(options.runs)
    by = {(r.settings["lm_labels"], r.settings["regular"], r.seed): r.columns for r in results}
    seeds = sorted({seed for _, _, seed in by})
    try:
        missing = [key for scope in SCOPES for arm in ARMS for s in seeds if (key := (scope, arm, s)) not in by]
        if problems or missing or not seeds:
            raise UsageError("; ".join(problems) or f"no run of (labels, regular, seed) {missing[:1]}")
    except UsageError as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        return 2
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3), layout="constrained", sharey=True)
    for axis, (column, heading) in zip(axes, SCORES.items(), strict=True):
        for position, scope in enumerate(SCOPES):
            for seed in seeds:
                pair = [by[scope, arm, seed][column] for arm in ARMS]
                axis.plot((position - 0.15, position + 0.15), pair, color="#bbbbbb", linewidth=0.8, zorder=0)
            for shift, (arm, (label, color, marker)) in zip((-0.15, 0.15), ARMS.items(), strict=True):
                values = [by[scope, arm, seed][column] for seed in seeds]
                name = label if not position else None
                axis.scatter([position + shift] * len(seeds), values, c=color, marker=marker, s=28, label=name)
        axis.set_title(heading, fontsize=10)
        axis.set_xticks(range(len(SCOPES)), SCOPES.values())
        axis.set_xlim(-0.5, 1.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 104)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(options.output_file, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
