"""Write report.md, report.json and report.html from compared arms; the HTML page contains its figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from llm_jepa.files import write_json, write_text
from llm_jepa.reports.comparison import Table
from llm_jepa.reports.plots import Drawn, draw
from llm_jepa.reports.stats import LEVEL, RESAMPLES, format_interval, format_p, format_points, mean_sd


def write_files(folder: Path, tables: list[Table], problems: list[str]) -> list[str]:
    """Writes the three files; files of an earlier report are replaced, other files are kept.

    Returns the data files that the figures had to skip because they are damaged.
    """
    datasets = [(table, draw(table)) for table in tables]
    damaged = list(dict.fromkeys(line for _, drawn in datasets for line in drawn.damaged))
    record = {"left_out": problems + damaged, "datasets": [dataset_json(*pair) for pair in datasets]}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {"headline": headline(tables), "left_out": record["left_out"], "datasets": datasets}
    shown |= {"level": LEVEL, "resamples": RESAMPLES}
    rows = {"arm_rows": arm_rows, "comparison_rows": comparison_rows, "run_rows": run_rows}
    files = ("report.md", "report.html")
    texts = {name: environment.get_template(f"{name}.jinja").render(shown | rows) for name in files}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", record)
    for name, text in texts.items():
        write_text(folder / name, text)
    return damaged


def headline(tables: list[Table]) -> str:
    """The result in one sentence: the verdict on the primary score, or how many of several show a difference."""
    primary = [(t, c) for t in tables for c in t.comparisons if c.score == t.first.scores[0]]
    if not primary:
        return "No arms were compared."
    if len(primary) == 1:
        ((table, c),) = primary
        return f"{table.dataset}, {c.score}: {c.verdict}."
    shown = [f"{c.arm} on {t.dataset} ({format_points(c.mean)} points)" for t, c in primary if c.differs]
    names = f": {'; '.join(shown)}" if shown else ""
    stuck = [f"{c.arm} on {t.dataset} ({c.same:g} %)" for t, c in primary if c.same is not None]
    names += f"; every run has the same score, so nothing can show: {'; '.join(stuck)}" if stuck else ""
    return f"{len(shown)} of {len(primary)} arms differ from their reference in the primary score{names}."


def arm_rows(table: Table) -> list[list[str]]:
    """Mean ± sd of every arm, header first."""
    names = dict.fromkeys(name for arm in table.arms.values() for name in arm[0].scores)
    headings = [*(f"{name} %" for name in names), "train s"]
    rows = [["arm", "n", *headings]]
    for label, arm in table.arms.items():
        cells = [mean_sd([r.columns[h] for r in arm]) if h in arm[0].columns else "–" for h in headings]
        rows.append([label, str(len(arm)), *cells])
    return rows


def comparison_rows(table: Table) -> list[list[str]]:
    """Difference, interval and tests of every comparison, header first."""
    rows = [["arm", "score", "n", "difference", "95 % interval", "p", "p, higher", "p, sign flip", "p, Holm"]]
    for c in table.comparisons:
        least = "" if c.p_sign_flip is None else f" (≥ {format_p(c.p_sign_flip_least)})"
        tests = [format_p(c.p_two_sided), format_p(c.p_one_sided), format_p(c.p_sign_flip) + least, format_p(c.p_holm)]
        rows.append([c.arm, c.score, str(c.n), format_points(c.mean), format_interval(c), *tests])
    return rows


def run_rows(table: Table) -> list[list[str]]:
    """Scores, commit and remarks of every run, header first."""
    names = dict.fromkeys(name for arm in table.arms.values() for name in arm[0].columns)
    rows = [["arm", "seed", *names, "commit", "run", "remarks"]]
    for label, r in ((label, r) for label, arm in table.arms.items() for r in arm):
        values = [f"{r.columns[name]:.2f}" if name in r.columns else "–" for name in names]
        commit = str(r.environment["git_commit"] or "unknown")[:8] + ("+" if r.environment["git_dirty"] else "")
        rows.append([label, str(r.seed), *values, commit, str(r.run), "; ".join(r.remarks())])
    return rows


def dataset_json(table: Table, drawn: Drawn) -> dict[str, Any]:
    """All numbers of a dataset, and all settings and versions of the runs."""
    return {
        "dataset": table.dataset,
        "reference": table.reference,
        "comparisons": [dataclasses.asdict(c) for c in table.comparisons],
        "not_compared": table.refused,
        "allowed": table.allowed,
        "missing_figures": drawn.missing,
        "arms": {
            label: [
                {"run": str(r.run), "seed": r.seed, "scores": r.columns, "failures": r.failures}
                | {"made_with": r.settings | r.environment}
                for r in arm
            ]
            for label, arm in table.arms.items()
        },
    }
