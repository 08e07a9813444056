"""Figures: those of a report, drawn as SVG without a display, and the plane of evaluate.py --t_sne.

`draw` returns a dataset's figures and one line for each figure without data, with the command that creates the data. A
figure has panels, which the page arranges by its width, each as large as a phone's screen shows it. Arms and groups
differ in color and in marker. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jepa.cli import UsageError
from llm_jepa.files import read_jsonl
from llm_jepa.reports.comparison import Table
from llm_jepa.reports.results import Result
from llm_jepa.reports.stats import format_interval, format_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# (color, marker): Okabe and Ito's palette without yellow, which is hard to see, and Paul Tol's; contrast first.
PALETTE = (
    ("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#000000", "v"),
    ("#882255", "P"), ("#56B4E9", "X"), ("#E69F00", "*"), ("#332288", "<"), ("#999933", ">"),
)  # fmt: skip
CURVES = {
    "lm_loss": "lm_loss, nats per token",
    "jepa_loss": "jepa_loss per pair",
    "cosine": "cosine of a pair",
    "cosine_shuffled": "cosine of a shuffled pair",
    "retrieval": "retrieval, fraction found",
    "effective_rank": "effective rank, dimensions",
}
CURVE_POINTS = 150  # each is the mean of a block of steps
EMBEDDINGS = "embeddings.safetensors"  # in RUN/eval/<dataset>/
SVG = {"svg.hashsalt": "report", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
       "figure.facecolor": "none", "axes.facecolor": "none"}  # fmt: skip


@dataclass
class Drawn:
    """The figures of a table and what could not be drawn."""

    figures: list[dict[str, Any]] = field(default_factory=list)  # name, caption and panels: text alternative → SVG
    missing: list[str] = field(default_factory=list)  # one line each, with the command that creates the data
    damaged: list[str] = field(default_factory=list)  # files that exist and cannot be used

    def add(self, name: str, caption: str, panels: dict[str, Axes]) -> None:
        """Stores the panels by their text alternatives as SVG in base64; the same data gives the same bytes."""
        stored = {}
        for text, axes in panels.items():
            file = io.BytesIO()
            axes.figure.savefig(file, format="svg", metadata={"Date": None})
            stored[text] = base64.b64encode(file.getvalue()).decode()
        self.figures.append({"name": name, "caption": caption, "panels": stored})


def draw(table: Table) -> Drawn:
    """All figures of a dataset, the one with the result first."""
    import matplotlib

    drawn = Drawn()
    with matplotlib.rc_context(SVG):
        for plot in (plot_differences, plot_training, plot_embeddings):
            plot(table, drawn)
    return drawn


def new_axes(width: float = 3.4, height: float = 2.6) -> Axes:
    """The axes of a figure of its own, in inches."""
    from matplotlib.figure import Figure  # without pyplot, which needs a display

    return Figure(figsize=(width, height), layout="constrained").subplots()


def arm_styles(table: Table) -> dict[str, dict[str, str]]:
    """Label, color and marker of each arm: the same in every figure, and no two arms share both."""
    styles = {}
    for i, arm in enumerate(table.arms):
        cycle, color = divmod(i, len(PALETTE))  # arms beyond the palette repeat its colors with another marker
        marker = PALETTE[(color + cycle) % len(PALETTE)][1]
        styles[arm] = {"label": escape(arm), "color": PALETTE[color][0], "marker": marker}
    return styles


def plot_line(axes: Axes, x: np.ndarray, y: np.ndarray, style: dict[str, str], arm: int) -> None:
    """A thin line with some markers, for each arm at other points: those of lines on top of each other are seen."""
    every = max(1, len(x) // 4)
    marks = (arm * every // 5 % every, every)
    axes.plot(x, y, linewidth=0.8, alpha=0.8, markersize=4, markevery=marks, **style)


def escape(text: str) -> str:
    """Text that matplotlib does not parse as a formula."""
    return text.replace("$", r"\$")


def legend(panels: Iterable[Axes]) -> dict[str, Axes]:
    """A panel with all labels of the panels."""
    entries = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {textwrap.fill(label, 45): handle for handle, label in zip(handles, labels, strict=True)}
    axes = new_axes(height=0.5 + 0.2 * "\n".join(entries).count("\n"))
    axes.axis("off")
    axes.legend(entries.values(), entries, loc="center", frameon=False)
    return {f"Legend: {'; '.join(entries)}".replace(r"\$", "$"): axes}


# --------------------------------------------------------------------------------------------------------- scores


def plot_differences(table: Table, drawn: Drawn) -> None:
    """The result: each arm's difference from the reference in the primary score, with its interval and its seeds."""
    score, styles = table.first.scores[0], arm_styles(table)
    shown = [c for c in table.comparisons if c.score == score]
    if not shown:
        return
    labels = [escape(textwrap.fill(c.arm, 20)) for c in shown]
    axes = new_axes(4.2, 0.8 + max(0.45, *(0.2 * (label.count("\n") + 1) for label in labels)) * len(shown))
    axes.axvline(0, color="0.5", linewidth=1, linestyle="--")
    for y, c in enumerate(shown):
        color, marker = styles[c.arm]["color"], styles[c.arm]["marker"]
        axes.scatter(c.differences, [y + 0.25] * c.n, s=14, color="0.6", marker="|")
        axes.hlines(y, *(c.interval or (c.mean, c.mean)), color=color, linewidth=2)
        axes.scatter(c.mean, y, s=60, marker=marker, edgecolor=color, color=color if c.differs else "white", zorder=3)
    axes.set_xlabel(escape(textwrap.fill(f"{score}: difference from {table.reference}, percentage points", 50)))
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    text = "; ".join(f"{c.arm} {format_points(c.mean)} {format_interval(c)}" for c in shown)
    caption = (
        f"{score}, difference from {table.reference} (dashed): mean over the seeds, filled if it is significant, with "
        "its 95 % interval; below it a tick for each seed"
    )
    drawn.add("differences", caption, {f"{score}, difference from {table.reference} in points: {text}": axes})


# ------------------------------------------------------------------------------------------------------- training


def training_steps(table: Table, damaged: list[str]) -> dict[Path, dict[str, np.ndarray]]:
    """run → column → values (N,) at the training steps of runs with metrics.jsonl; adds damaged files to the list.

    The columns are `step` and those of CURVES, NaN if a value was not logged. If a step was repeated after a resume,
    its last row is used.
    """
    found, names = {}, ["step", *CURVES]
    for _, result in table.runs:
        path = result.run / "metrics.jsonl"
        if not path.exists():
            continue
        try:  # evaluations and the summary at the end have no lm_loss
            rows = {row["step"]: row for _, row in read_jsonl(path) if "lm_loss" in row}
            columns = np.array([[rows[step].get(name) for name in names] for step in sorted(rows)], dtype=float)
        except (UsageError, KeyError, TypeError, ValueError) as error:
            damaged.append(str(error) if isinstance(error, UsageError) else f"{path}: damaged ({error})")
            continue
        found[result.run] = dict(zip(names, columns.reshape(-1, len(names)).T, strict=True))
    return found


def block_means(values: np.ndarray) -> np.ndarray:
    """Means (·, ≤ CURVE_POINTS) of blocks of equal length along the last axis, of which the last may be shorter."""
    starts = np.arange(0, values.shape[-1], math.ceil(values.shape[-1] / CURVE_POINTS))
    return np.add.reduceat(values, starts, axis=-1) / np.diff([*starts, values.shape[-1]])


def plot_training(table: Table, drawn: Drawn) -> None:
    """Losses and what shows whether pairs are told apart over the steps, smoothed, one thin line per seed."""
    styles, panels, steps = arm_styles(table), {}, training_steps(table, drawn.damaged)
    for name, title in CURVES.items():
        axes, ends, values = new_axes(), {}, []
        for arm, result in table.runs:
            x, y = (steps[result.run][key] for key in ("step", name)) if result.run in steps else np.empty((2, 0))
            logged = np.isfinite(y)
            if logged.any():
                x, y = block_means(np.stack([x, y])[:, logged])
                plot_line(axes, x, y, styles[arm], list(styles).index(arm))
                ends.setdefault(arm, []).append(y[-1])
                values += y.tolist()
        if not values:
            continue
        axes.set(xlabel="optimizer steps", ylabel=title)
        if 0 < 30 * min(values) < max(values):
            axes.set_yscale("log")
        last = "; ".join(f"{arm} {np.mean(y):.3g}" for arm, y in ends.items())
        panels[f"{title}, over the steps. At the end: {last}"] = axes
    if not panels:
        drawn.missing.append(
            "no training curves: the runs have no metrics.jsonl, which python finetune.py --output_dir RUN writes"
        )
        return
    caption = f"Training: one line per seed, the means of at most {CURVE_POINTS} blocks of steps"
    drawn.add("training", caption, legend(panels.values()) | panels)


# ----------------------------------------------------------------------------------------------------- embeddings


def plane_png(groups: dict[str, np.ndarray], title: str) -> bytes:
    """A PNG of each group's points (·, 2), with a legend."""
    axes = new_axes(7, 6)
    size = float(np.clip(20000 / sum(map(len, groups.values())), 6, 40))  # square points
    for (name, xy), (color, marker) in zip(groups.items(), itertools.cycle(PALETTE), strict=False):
        style = {"color": color, "marker": marker, "alpha": 0.6, "linewidths": 0}
        axes.scatter(*xy.T, s=size, label=f"{name} ({len(xy)})", **style)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, parse_math=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, markerscale=(60 / size) ** 0.5)
    file = io.BytesIO()
    axes.figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def read_embeddings(result: Result) -> tuple[np.ndarray, np.ndarray, str]:
    """Exported Text and Code views (P, D) in float64, and how they were read: number of pairs, layer, pooling.

    Raises UsageError if the file is damaged or has other examples than the scores, FileNotFoundError if there is none.
    """
    from safetensors import SafetensorError, safe_open

    path = result.run / "eval" / result.dataset / EMBEDDINGS
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            text, code = (file.get_tensor(name).astype(np.float64) for name in ("text", "code"))
    except SafetensorError as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if metadata.get("data_sha256") != result.settings["test_data"]:
        raise UsageError(f"{path}: not of the examples of {path.with_name('metrics.json')}")
    return text, code, f"{len(text)} pairs, layer {metadata['layer']}, pooling {metadata['pooling']}"


def plot_embeddings(table: Table, drawn: Drawn) -> None:
    """Singular values of Enc(Text) − Enc(Code), one line per run."""
    styles, axes, first = arm_styles(table), new_axes(), ""
    for arm, result in table.runs:
        try:
            text, code, source = read_embeddings(result)
            if source != (first := first or source):
                raise UsageError(f"{result.run}: embeddings of {source}, but of the first run {first}")
        except FileNotFoundError:
            continue
        except UsageError as error:
            drawn.damaged.append(str(error))
            continue
        top = np.linalg.svd(text - code, compute_uv=False)[:100]
        # A logarithmic axis cannot show 0; values below float32's precision mean nothing.
        shown = np.where(top > 1e-7 * top[0], top, np.nan)
        plot_line(axes, np.arange(1, len(top) + 1), shown, styles[arm], list(styles).index(arm))
    if not axes.lines:
        drawn.missing.append(
            "no singular values of the views: python evaluate.py --model_name RUN --input_file "
            f"datasets/{table.dataset}_test.jsonl --export_embeddings RUN/eval/{table.dataset}/{EMBEDDINGS}"
        )
        return
    axes.set(xlabel="rank of the singular value", ylabel="singular value, units of the views", yscale="log")
    caption = f"Largest 100 singular values of Enc(Text) − Enc(Code), a line per run; {first}"
    drawn.add("singular_values", caption, legend([axes]) | {caption: axes})
