"""Picks the best cell of a grid and writes all cells to a JSON file: python -m llm_jepa.sweep --help.

    python -m llm_jepa.sweep --pick jepa --output_file sweep.json RUN…          prints the run folder of the best cell

`bash run.sh sweep` trains the cells and picks by itself; this command picks among runs that exist.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llm_jepa.cli import FlagParser, UsageError, run_command
from llm_jepa.reports.sweep import pick


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 picked, 2 wrong usage or runs."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder with one evaluation")
    parser.add_argument("--pick", required=True, choices=["regular", "jepa"], help="arm whose best cell is printed")
    parser.add_argument("--output_file", required=True, type=Path, help="JSON file for all cells")

    def work() -> None:
        options, evaluations = parser.parse_args(argv), []
        for run in options.runs:
            found = [path.parent for path in run.glob("eval/*/metrics.json")]
            if len(found) != 1:
                raise UsageError(f"{run}: {len(found)} evaluations instead of one")
            evaluations += found
        print(pick(options.pick, evaluations, options.output_file))

    return run_command("sweep", work)


if __name__ == "__main__":
    sys.exit(main())
