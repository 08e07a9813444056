"""The files of a report, report.md, report.json and report.html, from compared arms; the HTML needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jepa.reports.plots import Picture, draw
from llm_jepa.reports.results import facts, mean_sd, remarks, scores
from llm_jepa.cli import UsageError
from llm_jepa.files import write_json, write_text
from llm_jepa.reports.stats import LEVEL, RESAMPLES, Comparison, interval_text, p_text, points

if TYPE_CHECKING:
    from llm_jepa.reports.results import Table

METHODS = (
    "Scores are in percent, differences in percentage points: the arm's less the reference's, seed by seed.",
    "mean ± sd is over an arm's runs, sd with n − 1. The 95 % interval is Student's on the paired differences, of each "
    "comparison alone.",
    "p: two-sided paired t test; p, higher: one-sided, against the arm scoring no higher; p, Holm: the two-sided one "
    "corrected over all comparisons of its table, one without a test counting as one of p = 1. The verdict is by p, "
    f"Holm, at {LEVEL}.",
    "p, sign flip: two-sided permutation test that gives each difference either sign, exact up to 16 pairs "
    f"({RESAMPLES} draws beyond), and in brackets the least that it can be with so many pairs.",
    "What would have been missed: the true difference that the t test shows at 80 % power, by the noncentral t, at the "
    "spread of these few differences and the level that Holm's correction held it against.",
)
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:.87rem}"
    "th,td{border-bottom:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}"
    "td{font-variant-numeric:tabular-nums}.wide{overflow-x:auto}"
    "img{max-width:100%;height:auto}figure{margin:1.5rem 0}figcaption{color:#555;font-size:.87rem}"
)
# A report is a list of blocks: (kind, content) with kind title, heading, text, list, table (header first) or picture.
Block = tuple[str, Any]


def write_files(folder: Path, tables: list[Table], problems: list[str]) -> list[str]:
    """Writes the three files, each whole or not at all, replacing those of an earlier report and nothing else.

    Returns what the pictures had to leave out because it is damaged. Raises UsageError where the folder cannot be made.
    """
    drawn = [draw(table) for table in tables]
    damaged = list(dict.fromkeys(line for d in drawn for line in d.damaged))
    blocks: list[Block] = [("title", "Runs compared"), *left_out(problems + damaged)]
    for table, found in zip(tables, drawn, strict=True):
        blocks += dataset_blocks(table)
        blocks += [("picture", picture) for picture in found.pictures]
        blocks += [("list", found.missing)] if found.missing else []
        blocks += run_blocks(table)
    blocks += [("heading", "How to read this"), ("list", METHODS)]
    record = {
        "left_out": problems + damaged,
        "datasets": [as_json(t, d.missing) for t, d in zip(tables, drawn, strict=True)],
    }
    markdown, page = as_markdown(blocks), as_html(blocks)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be made ({error})") from None
    write_json(folder / "report.json", record)
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", page)
    return damaged


def left_out(lines: list[str]) -> list[Block]:
    """What is wrong, first of all; nothing where all is well."""
    return [("text", "Left out of this report:"), ("list", lines)] if lines else []


def dataset_blocks(table: Table) -> list[Block]:
    """A dataset's verdicts, arms and comparisons."""
    first = next(iter(table.arms.values()))[0]
    blocks: list[Block] = [("heading", f"{table.dataset}: {first.n} examples, {first.settings.get('model_name')}")]
    if table.reference is None:
        blocks.append(("text", "One arm alone: there is nothing to compare it with."))
    elif table.comparisons:
        for arm in dict.fromkeys(c.arm for c in table.comparisons):
            blocks.append(("text", f"{arm} against {table.reference}, by seed:"))
            blocks.append(("list", [f"{c.score}: {c.verdict}." for c in table.comparisons if c.arm == arm]))
    blocks += [("text", f"{arm} is not compared: {why}.") for arm, why in table.refused.items()]
    for arm, through in table.allowed.items():
        blocks.append(
            ("text", f"{arm} is compared though it differs in more than the method (--allow): {'; '.join(through)}.")
        )
    for c in table.comparisons:
        alone = [f"seed {seed} in {label} alone" for label, seeds in
                 ((c.arm, c.arm_alone), (c.reference, c.reference_alone)) for seed in seeds]  # fmt: skip
        if alone and c.score == first.headline:
            blocks.append(("text", f"Not in the pairs of {c.arm} and {c.reference}: {', '.join(alone)}."))
    return (
        blocks
        + [("table", arm_rows(table))]
        + ([("table", comparison_rows(table.comparisons))] if table.comparisons else [])
    )


def arm_rows(table: Table) -> list[list[str]]:
    """Mean ± sd of every arm."""
    names = list(dict.fromkeys(name for arm in table.arms.values() for name in scores(arm[0])))
    headings = [*(f"{name} %" for name in names), "train s"]
    rows = [["arm", "n", *headings]]
    for label, arm in table.arms.items():
        cells = [mean_sd([r.columns[h] for r in arm]).strip() if h in arm[0].columns else "–" for h in headings]
        rows.append([label, str(len(arm)), *cells])
    return rows


def comparison_rows(comparisons: list[Comparison]) -> list[list[str]]:
    """The figures of every comparison."""
    rows = [["arm", "score", "n", "difference", "95 % interval", "p", "p, higher", "p, sign flip", "p, Holm"]]
    for c in comparisons:
        least = "" if c.p_sign_flip is None else f" (≥ {p_text(c.p_sign_flip_least)})"
        tests = [p_text(c.p_two_sided), p_text(c.p_one_sided), p_text(c.p_sign_flip) + least, p_text(c.p_holm)]
        rows.append([c.arm, c.score, str(c.n), points(c.mean), interval_text(c), *tests])
    return rows


def run_blocks(table: Table) -> list[Block]:
    """Every run's own figures."""
    names = list(dict.fromkeys(name for arm in table.arms.values() for name in arm[0].columns))
    rows = [["arm", "seed", *names, "commit", "run"]]
    for label, arm in table.arms.items():
        for r in arm:
            values = [f"{r.columns[name]:.2f}" if name in r.columns else "–" for name in names]
            commit = str(r.origin["git_commit"] or "unknown")[:8] + ("+" if r.origin["git_dirty"] else "")
            rows.append([label, str(r.seed), *values, commit, str(r.run)])
    results = [(label, r) for label, arm in table.arms.items() for r in arm]
    failures = [f"{label}, seed {r.seed}, {text}" for label, r in results for text in remarks(r)]
    return [
        ("text", "Every run (+: with uncommitted changes):"),
        ("table", rows),
        *([("list", failures)] if failures else []),
    ]


def as_json(table: Table, missing: list[str]) -> dict[str, Any]:
    """All figures of a dataset and all that the runs were made with."""
    arms = {
        label: [
            {"run": str(r.run), "seed": r.seed, "scores": r.columns, "failures": r.failures, "made_with": facts(r)}
            for r in arm
        ]
        for label, arm in table.arms.items()
    }
    return {
        "dataset": table.dataset,
        "reference": table.reference,
        "comparisons": [dataclasses.asdict(c) | {"n": c.n} for c in table.comparisons],
        "not_compared": table.refused,
        "allowed": table.allowed,
        "missing_pictures": missing,
        "arms": arms,
    }


def as_markdown(blocks: list[Block]) -> str:
    """The report as Markdown; pictures are named, since they are in the HTML file alone."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    parts = []
    for kind, content in blocks:
        if kind in ("title", "heading", "text"):
            parts.append({"title": "# ", "heading": "## ", "text": ""}[kind] + content)
        elif kind == "list":
            parts.append("\n".join(f"- {line}" for line in content))
        elif kind == "table":
            header, *rows = (f"| {' | '.join(map(cell, row))} |" for row in content)
            parts.append("\n".join([header, "|" + "---|" * len(content[0]), *rows]))
        else:
            parts.append(f"Picture in report.html: {content.caption}.")
    return "\n\n".join(parts) + "\n"


def as_html(blocks: list[Block]) -> str:
    """The report as one HTML page that asks for nothing from elsewhere: pictures are part of it."""
    parts = []
    for kind, content in blocks:
        if kind in ("title", "heading", "text"):
            tag = {"title": "h1", "heading": "h2", "text": "p"}[kind]
            parts.append(f"<{tag}>{html.escape(content)}</{tag}>")
        elif kind == "list":
            parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in content) + "</ul>")
        elif kind == "table":
            rows = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                    for tag, row in zip(["th"] + ["td"] * len(content), content, strict=False)]  # fmt: skip
            parts.append('<div class="wide"><table>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>")
        else:
            parts.append(figure(content))
    head = f'<meta charset="utf-8"><title>{html.escape(blocks[0][1])}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def figure(picture: Picture) -> str:
    """A picture with its caption. As an image of its own, its element ids do not meet those of the other pictures."""
    data, caption = base64.b64encode(picture.svg).decode(), html.escape(picture.caption)
    image = f'<img id="{picture.name}" alt="{caption}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
