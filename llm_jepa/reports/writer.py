"""Write report.md, report.json and report.html from compared arms; the HTML page contains its figures."""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
from collections.abc import Iterable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from llm_jepa.files import write_json, write_text
from llm_jepa.reports.comparison import Table
from llm_jepa.reports.plots import Drawn, draw
from llm_jepa.reports.results import describe_method
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

# Lines of text in report.md, which is also read in a terminal: paths are not broken.
wrap = partial(textwrap.fill, width=100, break_long_words=False, break_on_hyphens=False)
Block = tuple[str, Any]
# Columns of the table of what the terms have learned: keys of run.json's `learned`, and of the evaluation's retrieval.
TRAINING = {"cosine": "cosine", "shuffled": "cosine_shuffled", "retrieval": "retrieval", "rank": "effective_rank",
            "gradient": "grad_ratio"}  # fmt: skip
TEST = {"T → C": "text_to_code.r1", "C → T": "code_to_text.r1", "chance": "chance.r1"}
METHODS = (
    "Scores are in percent, differences in percentage points: arm minus reference, seed by seed.",
    "mean ± sd is over an arm's runs, sd with n − 1. The 95 % interval is Student's on the paired differences of at "
    "least three seeds, not corrected; it is left out if it is wider than 100 points.",
    "The first score is the primary one. Only it is tested; the other scores are descriptive.",
    "p: two-sided paired t test. p, higher: one-sided, against the null hypothesis that the arm scores no higher. "
    "p, Holm: the two-sided test corrected over all arms' comparisons of the primary score; a comparison without a "
    f"test counts as one of p = 1. The verdict uses p, Holm at {LEVEL}.",
    "p, sign flip: two-sided permutation test that gives each difference either sign, exact up to 16 pairs "
    f"({RESAMPLES} random samples above). In brackets: the smallest p that is possible with this number of pairs.",
    "Smallest difference that is detected with 80 % power: of the t test (noncentral t), given the sd of these few "
    "differences and the level that Holm's correction leaves.",
    "Did the term learn: cosine and shuffled are mean cosines of pairs and of shuffled pairs (NITP: of predictions and "
    "targets); with retrieval, effective rank of the views and the ratio of the term's gradient to that of the "
    "language-model loss they are of micro-batches at the end of the training (the ratio: of the complete training). "
    "T → C is R@1, the fraction of test pairs whose Code is the nearest to its Text; C → T the reverse; then their "
    "chance level. Means over runs.",
    "A placebo is trained on shuffled pairs. An arm whose term helps because of its pairs scores higher.",
)
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Comparison of runs</title><style>
:root{color-scheme:light dark}
body{font:1rem/1.5 system-ui,sans-serif;max-width:66rem;margin:1.5rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.25rem;border-bottom:1px solid #8888}h3{font-size:1.05rem}
.lead{font-size:1.2rem;font-weight:600;text-wrap:balance}
.wide{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.875rem;overflow-wrap:normal}
th,td{border-bottom:1px solid #8886;padding:.25rem .6rem;text-align:left;vertical-align:top;white-space:nowrap}
td{font-variant-numeric:tabular-nums}td:first-child{white-space:normal;min-width:7rem}
figure{margin:1.5rem 0}figcaption{font-size:.875rem}
.panels{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center}img{max-width:100%;height:auto}
.differences img{width:40rem}details{margin:.75rem 0}summary{cursor:pointer;font-weight:600}
@media(prefers-color-scheme:dark){img{filter:invert(.9) hue-rotate(180deg)}}
</style></head><body>
"""


def write_files(folder: Path, tables: list[Table], problems: list[str]) -> list[str]:
    """Writes the three files; files of an earlier report are replaced, other files are kept.

    Returns the data files that the figures had to skip because they are damaged.
    """
    datasets = [(table, draw(table)) for table in tables]
    damaged = list(dict.fromkeys(line for _, drawn in datasets for line in drawn.damaged))
    record = {"left_out": problems + damaged, "datasets": [dataset_json(*pair) for pair in datasets]}
    shown = list(blocks(datasets, record["left_out"]))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", record)
    write_text(folder / "report.md", "\n\n".join(as_markdown(*block) for block in shown if block[0] != "figure") + "\n")
    write_text(folder / "report.html", HEAD + "\n".join(as_html(*block) for block in shown) + "\n</body></html>\n")
    return damaged


def blocks(datasets: list[tuple[Table, Drawn]], left_out: list[str]) -> Iterator[Block]:
    """The report from top to bottom, as (kind, content).

    h1, h2, h3, lead and p have a text, list has lines, table has rows, details has blocks, the first of which is its
    title. Details are folded in report.html. Figures are only there.
    """
    yield "h1", "Comparison of runs"
    yield "lead", headline([table for table, _ in datasets])
    if left_out:
        yield "details", [("h2", f"Left out of this report: {len(left_out)}"), ("list", left_out)]
    for table, drawn in datasets:
        yield from dataset_blocks(table, drawn)
    yield "details", [("h2", "How to read this report"), ("list", METHODS)]


def dataset_blocks(table: Table, drawn: Drawn) -> Iterator[Block]:
    """A dataset: result, what the terms have learned, cost, details."""

    def figures(*names: str) -> list[Block]:
        return [("figure", figure) for figure in drawn.figures if figure["name"] in names]

    yield "h2", f"{table.dataset}: {table.first.settings['n']} examples, {table.first.model}"
    yield from figures("differences")
    if table.comparisons:
        yield "table", result_rows(table)
    elif table.reference is None:
        yield "p", "Only one arm, so there is no comparison."
    for arm, differences in table.allowed.items():
        listed = "; ".join(differences)
        yield "p", f"{arm} is compared although it differs in more than the method (--allow): {listed}."
    if rows := learning_rows(table):
        yield "h3", "Did the term learn?"
        yield "table", rows
    for c in table.placebos:
        yield "p", f"{c.arm} minus its placebo, {c.reference}: {c.score}: {c.verdict}."
    yield from figures("training", "singular_values", "t_sne")
    yield "h3", "Scores and cost"
    yield "table", arm_rows(table)
    yield from figures("costs", "grid")
    if table.comparisons:
        yield "details", [("h3", "All comparisons and tests"), *comparison_blocks(table)]
    methods = [f"{arm}: {describe_method(read_settings(runs[0].settings))}" for arm, runs in table.arms.items()]
    yield "details", [("h3", "Methods"), ("list", methods)]
    yield "details", [("h3", "Every run (+: with uncommitted changes)"), ("table", run_rows(table))]
    if drawn.missing:
        yield "details", [("h3", "Figures without data"), ("list", drawn.missing)]


def comparison_blocks(table: Table) -> Iterator[Block]:
    """The verdicts on each arm, its unpaired seeds, and all tests."""
    for arm in dict.fromkeys(c.arm for c in table.comparisons):
        own = [c for c in table.comparisons if c.arm == arm]
        yield "p", f"{arm} compared with {table.reference}, by seed:"
        yield "list", [f"{c.score}: {c.verdict}." for c in own]
        unpaired = {arm: own[0].arm_only_seeds, table.reference: own[0].reference_only_seeds}
        if any(unpaired.values()):
            only = (f"only in {name}: {', '.join(map(str, seeds)) or 'none'}" for name, seeds in unpaired.items())
            yield "p", f"Not paired: seeds {'; '.join(only)}."
    yield "table", comparison_rows(table)


def as_markdown(kind: str, content: Any) -> str:
    """A block of report.md: lines of a terminal's width, tables with aligned columns."""
    if kind == "list":
        return "\n".join(wrap(f"- {line}", subsequent_indent="  ") for line in content)
    if kind == "table":
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in content]
        widths = [min(60, max(map(len, column))) for column in zip(*cells, strict=True)]  # remarks may be long
        cells.insert(1, ["-" * width for width in widths])
        return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)
    if kind == "details":
        return "\n\n".join(as_markdown(*block) for block in content)
    return {"h1": "# ", "h2": "## ", "h3": "### "}[kind] + content if kind in ("h1", "h2", "h3") else wrap(content)


def as_html(kind: str, content: Any) -> str:
    """A block of report.html."""
    if kind == "list":
        return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in content) + "</ul>"
    if kind == "table":
        header, *rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in content)
        lines = [header.replace("td>", "th>"), *rows]
        return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"
    if kind == "figure":  # as an image, an SVG shares no element ids with the other figures
        image = '<img alt="{}" src="data:image/svg+xml;base64,{}">'
        panels = "\n".join(image.format(escape(text), svg) for text, svg in content["panels"].items())
        caption = f"<figcaption>{escape(content['caption'])}</figcaption>"
        return f'<figure class="{content["name"]}"><div class="panels">{panels}</div>\n{caption}</figure>'
    if kind == "details":
        (_, title), *rest = content
        inner = "\n".join(as_html(*block) for block in rest)
        return f"<details><summary>{escape(title)}</summary>\n{inner}\n</details>"
    return f'<p class="lead">{escape(content)}</p>' if kind == "lead" else f"<{kind}>{escape(content)}</{kind}>"


def headline(tables: list[Table]) -> str:
    """The result, one sentence per dataset: which arm helps and by how much, and which terms have learned."""
    sentences = []
    for table in tables:
        found = [f"{table.first.scores[0]}: {outcome(table)}"] if table.comparisons else []
        found += [f"auxiliary terms {text}"] if (text := learned(table)) else []
        sentences += [f"{table.dataset}, {'; '.join(found)}."] if found else []
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
    differ = "differs" if len(shown) == 1 else "differ"
    text = f"{len(shown)} of {len(primary)} arms {differ} significantly from {table.reference}: {'; '.join(shown)}"
    if not shown:
        largest = points(max(primary, key=lambda c: c.mean))
        text = f"no arm differs significantly from {table.reference} (largest: {largest})"
    stuck = "; ".join(f"{c.arm} ({c.same:g} %)" for c in primary if c.same is not None)
    return text + (f"; every run has the same score, so nothing can show: {stuck}" if stuck else "")


def learned(table: Table) -> str:
    """What the terms have learned: arms by the share of their runs that have. Empty if there is no term."""
    terms: dict[str, list[str]] = {}
    rows = learning_rows(table)[1:]
    arms = [row[0] for row in rows]
    for arm, term, share, *_ in rows:
        count, _, total = share.partition(" of ")
        runs = {total: "learned in all runs", "0": "learned in no run"}.get(count, f"learned in {share} runs")
        terms.setdefault(runs if total else share, []).append(arm if arms.count(arm) == 1 else f"{term} of {arm}")
    return "; ".join(f"{runs}: {' and '.join(names)}" for runs, names in terms.items())


def learning_rows(table: Table) -> list[list[str]]:
    """What the terms have learned, means over the runs of an arm, header first; empty if no arm has a term."""

    def mean(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{statistics.fmean(known):.4g}" if known else "–"

    rows = [["arm", "term", "learned", *TRAINING, *TEST]]
    for label, arm in table.arms.items():
        s = read_settings(arm[0].settings)
        for term in ["jepa"] * s.jepa + ["nitp"] * ("nitp" in s.chat_losses):
            judged = [r.learned[term] for r in arm if term in r.learned]
            share = f"{sum(not x['collapsed'] for x in judged)} of {len(judged)}" if judged else "not measured"
            values = [mean(x.get(key) for x in judged) for key in TRAINING.values()]
            values += [mean(r.retrieval.get(key) for r in arm) for key in TEST.values()]
            rows.append([label, term.upper(), share, *values])
    return rows if len(rows) > 1 else []


def result_rows(table: Table) -> list[list[str]]:
    """Each arm's primary score, its difference from the reference and what the test of it shows, header first."""
    score = table.first.scores[0]
    rows = [["arm", "result", "difference", "95 % interval", "p, Holm", f"{score} %", "n"]]
    compared = {c.arm: c for c in table.comparisons if c.score == score}
    for label, arm in table.arms.items():
        cells = ["reference" if label == table.reference else "not compared", "–", "–", "–"]
        if c := compared.get(label):
            result = ("lower", "higher")[c.mean > 0] if c.differs else "not significant"
            result = "not tested" if c.p_holm is None else result
            cells = [result, format_points(c.mean), format_interval(c), format_p(c.p_holm)]
        values = [r.columns[f"{score} %"] for r in arm if f"{score} %" in r.columns]
        rows.append([label, *cells, mean_sd(values) if values else "–", str(len(arm))])
    return rows


def arm_rows(table: Table) -> list[list[str]]:
    """Mean ± sd of every arm, header first."""
    names = dict.fromkeys(name for _, r in table.runs for name in r.scores)
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
    names = dict.fromkeys(name for _, r in table.runs for name in r.columns)
    rows = [["arm", "seed", *names, "commit", "run", "remarks"]]
    for label, r in table.runs:
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
