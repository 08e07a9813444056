"""Draw the README's figure: scores of the experiment `stopping` of findings.sh, by label scope and arm.

python experiments/plot_labels.py runs/other7500-tiny-stops-* --output_file experiments/labels.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for llm_jepa

from llm_jepa.cli import UsageError, run_command
from llm_jepa.reports.plots import PALETTE
from llm_jepa.reports.results import read_runs

SCORES = {"exact %": "exact match, %", "startswith %": "startswith, %", "stop_rate %": "stop rate, %"}
SCOPES = {"reference": "published labels", "answer": "corrected labels"}
ARMS = {True: "regular", False: "JEPA, k = 1, λ = 1"}  # by the setting `regular`


def main() -> None:
    """Parses the flags, reads the runs and draws. Raises UsageError if a run of the experiment is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--output_file", required=True, type=Path, help="PNG")
    options = parser.parse_args()
    results, problems = read_runs(options.runs)
    by = {(r.settings["lm_labels"], r.settings["regular"], r.seed): r.columns for r in results}
    seeds = sorted({seed for _, _, seed in by})
    missing = [key for scope in SCOPES for arm in ARMS for s in seeds if (key := (scope, arm, s)) not in by]
    if problems or missing or not seeds:
        raise UsageError("; ".join(problems) or f"no run of (labels, regular, seed) {missing[:1]}")
    fig = Figure(figsize=(9, 3), layout="constrained")
    panels = fig.subplots(1, len(SCORES), sharey=True)
    for axes, (column, heading) in zip(panels, SCORES.items(), strict=True):
        for x, scope in enumerate(SCOPES):
            for seed in seeds:
                pair = [by[scope, arm, seed][column] for arm in ARMS]
                axes.plot((x - 0.15, x + 0.15), pair, color="#bbbbbb", linewidth=0.8, zorder=1)
            for shift, (arm, name), (color, marker) in zip((-0.15, 0.15), ARMS.items(), PALETTE, strict=False):
                values = [by[scope, arm, seed][column] for seed in seeds]
                label = None if x else name
                axes.scatter([x + shift] * len(seeds), values, c=color, marker=marker, s=28, label=label, zorder=2)
        axes.set_title(heading, fontsize=10)
        axes.set_xticks(range(len(SCOPES)), SCOPES.values())
        axes.set_xlim(-0.5, 1.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, 104)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    fig.savefig(options.output_file, dpi=110)


if __name__ == "__main__":
    sys.exit(run_command("plot_labels.py", main))
