"""Report the scores of runs from their folders.

    python -m llm_jepa.report runs/synth-tiny-jepa-*          one table per arm: its runs, then mean ± sd
    python -m llm_jepa.report runs/* --output_dir report      also report.md, report.json and report.html in report/

Runs that differ in anything but their seed are different arms and are never averaged together. Runs that are missing,
unfinished, not evaluated or damaged are reported on stderr and skipped (exit code 1).

The files compare the arms of each dataset with a reference arm, by seed: the regular arm, or the one given by
--against. Arms that differ in more than the method are not compared; the differences are listed (exit code 1).
"""

import argparse
import sys
from pathlib import Path

from llm_jepa.cli import FlagParser, UsageError, run_command
from llm_jepa.reports.results import Result, read_runs

# What needs numpy and scipy is imported where it is used: after the flags are accepted.


def print_arm(dataset: str, label: str, arm: list[Result]) -> None:
    """Prints the table of an arm: title, one line per run, their mean ± sd, remarks."""
    from llm_jepa.reports.stats import mean_sd

    rows = [["seed", *arm[0].columns]]
    rows += [[str(r.seed), *(f"{value:.2f}" for value in r.columns.values())] for r in arm]
    last = f"mean ± sd (n = {len(arm)})" if len(arm) > 1 else "mean (n = 1)"
    rows.append([last, *(mean_sd([r.columns[name] for r in arm]) for name in arm[0].columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"{dataset} ({arm[0].settings['n']} examples), {arm[0].model}, {label}")
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    print(*(f"seed {r.seed} {text}\n" for r in arm for text in r.remarks()), sep="")


def report(runs: list[Path], output_dir: Path | None, against: str | None, allow: list[str]) -> int:
    """Prints the tables of the arms; with `output_dir` compares the arms and writes the three files.

    Returns 1 if some runs were skipped. Raises UsageError if the arms cannot be compared, or if `output_dir` is a run
    folder or a file.
    """
    from llm_jepa.reports.comparison import arms_by_dataset, compare_arms

    if output_dir and ((output_dir / "args.json").exists() or output_dir.is_file()):
        raise UsageError(f"--output_dir {output_dir} is a run folder or a file")
    results, problems = read_runs(runs)
    for dataset, arms in arms_by_dataset(results).items():
        for label, arm in arms.items():
            print_arm(dataset, label, arm)
    try:
        if output_dir and results:
            from llm_jepa.reports.writer import headline, write_files

            tables, left_out = compare_arms(results, against, set(allow))
            problems += left_out
            problems += write_files(output_dir, tables, problems)
            print(headline(tables))
            print(f"written: {', '.join(str(output_dir / f'report.{end}') for end in ('md', 'json', 'html'))}")
        elif output_dir:
            problems.append("no run is left to compare; nothing is written")
    finally:
        for problem in problems:
            print(f"report.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all runs reported, 1 some skipped, 2 wrong usage."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="folder for report.md, .json and .html")
    parser.add_argument("--against", metavar="ARM", help="reference arm: one of its run folders, or a part of its name")
    parser.add_argument(
        "--allow", nargs="+", action="extend", default=[], metavar="NAME",
        help="also compare arms that differ in this: a setting, git_commit, versions …, evaluation.NAME",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if (options.against or options.allow) and not options.output_dir:
        parser.error("--against and --allow: only with --output_dir")
    return run_command("report.py", lambda: report(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
