"""Write report.md, report.json and report.html from compared arms; the HTML page contains its figures."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from llm_jepa.cli import UsageError
from llm_jepa.files import write_json, write_text
from llm_jepa.reports.comparison import Table, attributes
from llm_jepa.reports.plots import Drawn, draw
from llm_jepa.reports.stats import LEVEL, RESAMPLES, format_interval, format_p, format_points, mean_sd

METHODS = (
    "Scores are in percent, differences in percentage points: arm minus reference, seed by seed.",
    "mean ± sd is over an arm's runs, sd with n − 1. The 95 % interval is Student's on the paired differences, not "
    "corrected.",
    "p: two-sided paired t test. p, higher: one-sided, against the null hypothesis that the arm scores no higher. p, "
    "Holm: the two-sided test corrected over all comparisons of the table; a comparison without a test counts as one "
    f"of p = 1. The verdict uses p, Holm at {LEVEL}.",
    "p, sign flip: two-sided permutation test that gives each difference either sign, exact up to 16 pairs "
    f"({RESAMPLES} random samples above). In brackets: the smallest p that is possible with this number of pairs.",
    "The difference that would be missed: the t test detects a true difference of this size with 80 % power "
    "(noncentral t), given the sd of these few differences and the level that Holm's correction leaves.",
)


def write_files(folder: Path, tables: list[Table], problems: list[str]) -> list[str]:
    """Writes the three files atomically; files of an earlier report are replaced, other files are kept.

    Returns the data files that the figures had to skip because they are damaged. Raises UsageError if the folder cannot
    be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be created ({error})") from None
    datasets = [(table, draw(table)) for table in tables]
    damaged = list(dict.fromkeys(line for _, drawn in datasets for line in drawn.damaged))
    record = {"left_out": problems + damaged, "datasets": [dataset_json(*pair) for pair in datasets]}
    texts = {name: render(name, tables, datasets, record["left_out"]) for name in ("report.md", "report.html")}
    write_json(folder / "report.json", record)
    for name, text in texts.items():
        write_text(folder / name, text)
    return damaged


def render(name: str, tables: list[Table], datasets: list[tuple[Table, Drawn]], left_out: list[str]) -> str:
    """The text of a file from its template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(f"{name}.jinja").render(
        headline=headline(tables), left_out=left_out, datasets=datasets, methods=METHODS,
        arm_rows=arm_rows, comparison_rows=comparison_rows, run_rows=run_rows,
    )  # fmt: skip


def headline(tables: list[Table]) -> str:
    """The result in one sentence: the verdict on the primary score, or how many of several show a difference."""
    primary = [(t, c) for t in tables for c in t.comparisons if c.score == t.first.primary]
    if not primary:
        return "No arms were compared."
    if len(primary) == 1:
        ((table, c),) = primary
        return f"{table.dataset}, {c.score}: {c.verdict}."
    shown = [f"{c.arm} on {t.dataset} ({format_points(c.mean)} points)" for t, c in primary if c.differs]
    names = f": {'; '.join(shown)}" if shown else ""
    return f"{len(shown)} of {len(primary)} arms differ from their reference in the primary score{names}."


def arm_rows(table: Table) -> list[list[str]]:
    """Mean ± sd of every arm, header first."""
    names = dict.fromkeys(name for arm in table.arms.values() for name in arm[0].scores())
    headings = [*(f"{name} %" for name in names), "train s"]
    rows = [["arm", "n", *headings]]
    for label, arm in table.arms.items():
        cells = [mean_sd([r.columns[h] for r in arm]) if h in arm[0].columns else "–" for h in headings]
        rows.append([label, str(len(arm)), *cells])
    return rows


def comparison_rows(table: Table) -> list[list[str]]:
    """The figures of every comparison, header first."""
    rows = [["arm", "score", "n", "difference", "95 % interval", "p", "p, higher", "p, sign flip", "p, Holm"]]
    for c in table.comparisons:
        least = "" if c.p_sign_flip is None else f" (≥ {format_p(c.p_sign_flip_least)})"
        tests = [format_p(c.p_two_sided), format_p(c.p_one_sided), format_p(c.p_sign_flip) + least, format_p(c.p_holm)]
        rows.append([c.arm, c.score, str(c.n), format_points(c.mean), format_interval(c), *tests])
    return rows


def run_rows(table: Table) -> list[list[str]]:
    """The figures of every run, header first."""
    names = dict.fromkeys(name for arm in table.arms.values() for name in arm[0].columns)
    rows = [["arm", "seed", *names, "commit", "run"]]
    for label, arm in table.arms.items():
        for r in arm:
            values = [f"{r.columns[name]:.2f}" if name in r.columns else "–" for name in names]
            commit = str(r.environment["git_commit"] or "unknown")[:8] + ("+" if r.environment["git_dirty"] else "")
            rows.append([label, str(r.seed), *values, commit, str(r.run)])
    return rows


def dataset_json(table: Table, drawn: Drawn) -> dict[str, Any]:
    """All figures of a data set, and everything that the runs were made with."""

    def run_json(r: Any) -> dict[str, Any]:
        scores = {"run": str(r.run), "seed": r.seed, "scores": r.columns, "failures": r.failures}
        return scores | {"made_with": attributes(r)}

    return {
        "dataset": table.dataset,
        "reference": table.reference,
        "comparisons": [dataclasses.asdict(c) | {"n": c.n} for c in table.comparisons],
        "not_compared": table.refused,
        "allowed": table.allowed,
        "missing_figures": drawn.missing,
        "arms": {label: [run_json(r) for r in arm] for label, arm in table.arms.items()},
    }
