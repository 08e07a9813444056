"""Figures: those of a report, drawn as SVG without a display, and the t-SNE plots of evaluate.py.

`draw` returns a dataset's figures and one line for each figure without data, with the command that creates the data. A
figure has panels, which the page arranges by its width, each as large as a phone's screen shows it. Arms and groups
differ in color and in marker. matplotlib and scikit-learn are imported when something is drawn.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas

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
T_SNE_MIN_POINTS = 10  # with fewer there are no neighborhoods to preserve
T_SNE_PAIRS = 150  # at most, in a report
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
        for plot in (plot_differences, plot_training, plot_costs, plot_grid, plot_embeddings):
            plot(table, drawn)
    return drawn


def new_axes(width: float = 3.4, height: float = 2.6) -> Axes:
    """The axes of a figure of its own, in inches."""
    from matplotlib.figure import Figure  # without pyplot, which needs a display

    return Figure(figsize=(width, height), layout="constrained").subplots()


def arm_styles(table: Table) -> dict[str, dict[str, str]]:
    """Label, color and marker of each arm: the same in every figure, and no two arms share both."""
    n = len(PALETTE)  # arms beyond the palette repeat its colors with another marker
    return {
        arm: {"label": escape(arm), "color": PALETTE[i % n][0], "marker": PALETTE[(i + i // n) % n][1]}
        for i, arm in enumerate(table.arms)
    }


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


def plot_grid(table: Table, drawn: Drawn) -> None:
    """The primary score over k and λ: a heat map for each set of JEPA arms that differ in nothing else."""
    grids: dict[str, dict[tuple[float, float], list[Result]]] = {}
    for arm in table.arms.values():
        settings = {name: value for name, value in arm[0].settings.items() if name not in ("predictors", "lbd")}
        if not settings["regular"]:
            cell = arm[0].settings["lbd"], arm[0].settings["predictors"]
            grids.setdefault(json.dumps([arm[0].model, settings], sort_keys=True), {})[cell] = arm
    found = len(drawn.figures)
    for cells in grids.values():
        score = next(iter(cells.values()))[0].scores[0]
        means = pandas.Series({cell: mean_score(arm, score) for cell, arm in cells.items()}).unstack()  # (λ, k)
        run = means.notna().to_numpy().astype(int)
        if np.triu(run @ run.T, 1).max() < 2:  # no two values of λ were run with the same two values of k
            continue
        axes = new_axes(2 + 0.7 * run.shape[1], 1.2 + 0.6 * run.shape[0])
        image = axes.imshow(means, cmap="cividis", aspect="auto", origin="lower")
        for i, j in np.argwhere(run):
            text = f"{means.iat[i, j]:.1f}\nn = {len(cells[means.index[i], means.columns[j]])}"
            color = "black" if image.norm(means.iat[i, j]) > 0.5 else "white"
            axes.text(j, i, text, ha="center", va="center", color=color)
        axes.set(xlabel="predictor tokens k", ylabel="weight λ of the JEPA loss", facecolor="0.9")
        axes.set_xticks(range(run.shape[1]), [f"{k:g}" for k in means.columns])
        axes.set_yticks(range(run.shape[0]), [f"{lbd:g}" for lbd in means.index])
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, label=f"{score}, %")
        caption = f"{score} over k and λ, mean over the seeds; gray: not run"
        if table.reference and table.first.settings["regular"]:
            caption += f"; {table.reference}: {mean_score(table.arms[table.reference], score):.1f} %"
        drawn.add("grid", caption, {caption: axes})
    if len(drawn.figures) == found:
        drawn.missing.append(
            "no map over k and λ, which needs two values of each: bash run.sh run_jepa MODEL LEARNING_RATE EPOCHS - "
            "PREDICTORS all LBD DATASET"
        )


def mean_score(arm: list[Result], score: str) -> float:
    """The mean of a score over an arm's runs, in percent."""
    return float(np.mean([r.columns[f"{score} %"] for r in arm]))


# ------------------------------------------------------------------------------------------------------- training


def training_steps(table: Table, damaged: list[str]) -> Iterator[tuple[str, Result, pandas.DataFrame]]:
    """(arm, result, training steps) of every run that has metrics.jsonl; damaged files are added to the list.

    The steps have the columns of CURVES and flops. If a step was repeated after a resume, only its last row is kept.
    """
    for arm, result in table.runs:
        path = result.run / "metrics.jsonl"
        if not path.exists():
            continue
        try:  # evaluations and the summary at the end have no label_tokens
            rows = [row for _, row in read_jsonl(path) if "label_tokens" in row]
            steps = pandas.DataFrame(rows, columns=["step", *CURVES, "flops"]).astype(float)
        except (UsageError, TypeError, ValueError) as error:
            damaged.append(str(error) if isinstance(error, UsageError) else f"{path}: damaged ({error})")
            continue
        yield arm, result, steps.drop_duplicates("step", keep="last").sort_values("step")


def plot_training(table: Table, drawn: Drawn) -> None:
    """Losses and what shows whether pairs are told apart over the steps, smoothed, one thin line per seed."""
    styles, panels = arm_styles(table), {name: new_axes() for name in CURVES}
    last: dict[str, dict[str, list[float]]] = {name: {} for name in CURVES}
    for arm, _, steps in training_steps(table, drawn.damaged):
        for name, axes in panels.items():
            curve = steps[["step", name]].dropna()
            if len(curve):
                block = np.arange(len(curve)) // math.ceil(len(curve) / CURVE_POINTS)  # the last one may be shorter
                x, y = curve.groupby(block).mean().T.to_numpy()
                plot_line(axes, x, y, styles[arm], list(styles).index(arm))
                last[name].setdefault(arm, []).append(y[-1])
    drawn_panels = {}
    for name, axes in panels.items():
        if not axes.lines:
            continue
        axes.set(xlabel="optimizer steps", ylabel=CURVES[name])
        values = np.concatenate([line.get_ydata() for line in axes.lines])
        if 0 < 30 * values.min() < values.max():
            axes.set_yscale("log")
        ends = "; ".join(f"{arm} {np.mean(y):.3g}" for arm, y in last[name].items())
        drawn_panels[f"{CURVES[name]}, over the steps. At the end: {ends}"] = axes
    if not drawn_panels:
        drawn.missing.append(
            "no training curves: the runs have no metrics.jsonl, which python finetune.py --output_dir RUN writes"
        )
        return
    caption = f"Training: one line per seed, the means of at most {CURVE_POINTS} blocks of steps"
    drawn.add("training", caption, legend(drawn_panels.values()) | drawn_panels)


def plot_costs(table: Table, drawn: Drawn) -> None:
    """The primary score against the cost of training: wall time, and FLOPs if they were counted."""
    costs = {"training time, seconds": {r.run: r.columns["train s"] for _, r in table.runs}}
    counted = ((r.run, steps["flops"].max()) for _, r, steps in training_steps(table, damaged=[]))  # reported before
    flops = {run: value for run, value in counted if value > 0}
    what, styles, score = "wall time", arm_styles(table), table.first.scores[0]
    if flops:
        costs |= {"training FLOPs": flops}
        what += f" and FLOPs (counted in {len(flops)} of {len(table.runs)} runs)"
    else:
        drawn.missing.append("no figure of scores against training FLOPs, which python finetune.py --track_flop counts")
    panels = {}
    for label, cost in costs.items():
        panels[f"{score} against {label}"] = axes = new_axes()
        for arm, style in styles.items():
            runs = [r for r in table.arms[arm] if r.run in cost and f"{score} %" in r.columns]
            axes.scatter([cost[r.run] for r in runs], [r.columns[f"{score} %"] for r in runs], s=28, **style)
        axes.set(xlabel=label, ylabel=f"{score}, %")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(axis="x", nbins=6)
    caption = f"{score} against {what} of training, one point per run"
    drawn.add("costs", caption, legend(panels.values()) | panels)


# ----------------------------------------------------------------------------------------------------- embeddings


def t_sne(points: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """t-SNE of points (N, D) in two dimensions: ((N, 2), perplexity), the same for the same seed."""
    from sklearn.manifold import TSNE

    # scikit-learn divides by the variance along the first principal component, which is 0 for collapsed embeddings.
    init = "pca" if np.ptp(points, axis=0).any() else "random"
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(points), perplexity


def scatter_groups(axes: Axes, groups: dict[str, np.ndarray], size: float) -> None:
    """Draws each group's points (·, 2) in its own color and marker; `size` in square points."""
    for (name, xy), (color, marker) in zip(groups.items(), itertools.cycle(PALETTE), strict=False):
        axes.scatter(*xy.T, s=size, color=color, marker=marker, alpha=0.6, linewidths=0, label=name)
    axes.set(xticks=[], yticks=[])


def t_sne_png(groups: dict[str, np.ndarray], title: str) -> bytes:
    """A PNG of each group's points (·, 2) in a t-SNE plane, with a legend."""
    axes = new_axes(7, 6)
    size = float(np.clip(20000 / sum(map(len, groups.values())), 6, 40))
    scatter_groups(axes, {f"{name} ({len(xy)})": xy for name, xy in groups.items()}, size)
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
    """Singular values of Enc(Text) − Enc(Code), one line per run, and t-SNE of one seed of each arm."""
    styles, views, first = arm_styles(table), {}, ""
    axes = new_axes()
    for arm, result in sorted(table.runs, key=lambda run: run[1].seed):
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
        views.setdefault(arm, (result.seed, text, code))  # of the smallest seed
    if not views:
        drawn.missing.append(
            "no singular values and no t-SNE of the views: python evaluate.py --model_name RUN --input_file "
            f"datasets/{table.dataset}_test.jsonl --export_embeddings RUN/eval/{table.dataset}/{EMBEDDINGS}"
        )
        return
    axes.set(xlabel="rank of the singular value", ylabel="singular value, units of the views", yscale="log")
    caption = f"Largest 100 singular values of Enc(Text) − Enc(Code), a line per run; {first}"
    drawn.add("singular_values", caption, legend([axes]) | {caption: axes})
    panels = {}
    for arm, (seed, *pair) in views.items():
        panels[f"t-SNE of {arm}, seed {seed}"] = axes = new_axes()
        plane, _ = t_sne(np.concatenate([view[:T_SNE_PAIRS] for view in pair]).astype(np.float32), seed=0)
        scatter_groups(axes, dict(zip(("Text", "Code"), np.split(plane, 2), strict=True)), size=12)
        axes.set_title(escape(textwrap.fill(f"{arm}, seed {seed}", 45)), fontsize=9)
    what = f"t-SNE of the views of at most {T_SNE_PAIRS} pairs, one seed per arm"
    caption = f"{what}; the axes have no unit, and distances are not comparable between planes"
    drawn.add("t_sne", caption, legend(panels.values()) | panels)
