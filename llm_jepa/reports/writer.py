"""Write report.md, report.json and report.html from compared arms; the HTML page contains its figures."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from llm_jepa.files import write_json, write_text
from llm_jepa.reports.comparison import Table
from llm_jepa.reports.plots import Drawn, draw
from llm_jepa.reports.stats import (
    LEVEL,
    RESAMPLES,
    Comparison,
    format_interval,
    format_p,
    format_points,
    mean_sd,
    stopping_note,
)
from llm_jepa.settings import read_settings

# Columns of the table of what the terms have learned: keys of run.json's `learned`, and of the evaluation's retrieval.
TRAINING = {"cosine": "cosine", "shuffled": "cosine_shuffled", "retrieval": "retrieval",
            "effective rank": "effective_rank", "gradient ratio": "grad_ratio"}  # fmt: skip
TEST = {"Text → Code R@1": "text_to_code.r1", "Code → Text R@1": "code_to_text.r1", "chance": "chance.r1"}


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
    shown |= {f.__name__: f for f in (arm_rows, comparison_rows, learning_rows, run_rows)}
    files = ("report.md", "report.html")
    texts = {name: environment.get_template(f"{name}.jinja").render(shown) for name in files}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", record)
    for name, text in texts.items():
        write_text(folder / name, text)
    return damaged


def headline(tables: list[Table]) -> str:
    """The result, one sentence per dataset: which arm helps, by how much, and in how many runs its term has learned."""
    sentences = [f"{t.dataset}, {t.first.scores[0]}: {outcome(t)}{learned(t)}." for t in tables if t.comparisons]
    return " ".join(sentences) or "No arms were compared."


def outcome(table: Table) -> str:
    """The verdict on the primary score; for several arms those that differ, or else the largest difference."""
    primary = [c for c in table.comparisons if c.score == table.first.scores[0]]
    if len(primary) == 1:
        return primary[0].verdict

    def points(c: Comparison) -> str:
        note = " (a gain in stopping)" if stopping_note(c, table.comparisons) else ""
        return f"{c.arm} {format_points(c.mean)} points{f' {format_interval(c)}' if c.interval else ''}{note}"

    shown = [points(c) for c in primary if c.differs]
    text = f"{len(shown)} of {len(primary)} arms differ significantly from {table.reference}: {'; '.join(shown)}"
    if not shown:
        largest = points(max(primary, key=lambda c: c.mean))
        text = f"no arm differs significantly from {table.reference} (largest: {largest})"
    stuck = "; ".join(f"{c.arm} ({c.same:g} %)" for c in primary if c.same is not None)
    return text + (f"; every run has the same score, so nothing can show: {stuck}" if stuck else "")


def learned(table: Table) -> str:
    """The part of the headline about what the terms have learned: arms by the share of their runs that have."""
    terms: dict[str, list[str]] = {}
    rows = learning_rows(table)[1:]
    arms = [row[0] for row in rows]
    for arm, term, share, *_ in rows:
        if term != "–":
            count, _, total = share.partition(" of ")
            runs = {total: "learned in all runs", "0": "learned in no run"}.get(count, f"learned in {share} runs")
            terms.setdefault(runs if total else share, []).append(arm if arms.count(arm) == 1 else f"{term} of {arm}")
    return "".join(f"; {runs}: {' and '.join(names)}" for runs, names in terms.items())


def learning_rows(table: Table) -> list[list[str]]:
    """What the terms have learned, means over the runs of an arm, header first; empty if no arm has a term."""

    def mean(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{statistics.fmean(known):.4g}" if known else "–"

    rows = [["arm", "term", "learned", *TRAINING, *TEST]]
    for label, arm in table.arms.items():
        s = read_settings(arm[0].settings)
        for term in ["jepa"] * s.jepa + ["nitp"] * s.has_nitp or [""]:
            judged = [r.learned[term] for r in arm if term in r.learned]
            share = f"{sum(not x['collapsed'] for x in judged)} of {len(judged)}" if judged else "not measured"
            values = [mean(x.get(key) for x in judged) for key in TRAINING.values()]
            values += [mean(r.retrieval.get(key) for r in arm) for key in TEST.values()]
            rows.append([label, term.upper() or "–", share if term else "–", *values])
    return rows if any(row[1] != "–" for row in rows[1:]) else []


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
        "placebos": [dataclasses.asdict(c) for c in table.placebos],
        "not_compared": table.refused,
        "allowed": table.allowed,
        "missing_figures": drawn.missing,
        "arms": {
            label: [
                {"run": str(r.run), "seed": r.seed, "scores": r.columns, "failures": r.failures}
                | {"learned": r.learned, "retrieval": r.retrieval, "made_with": r.settings | r.environment}
                for r in arm
            ]
            for label, arm in table.arms.items()
        },
    }
