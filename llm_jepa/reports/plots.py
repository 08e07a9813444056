"""Figures: those of a report, drawn as SVG without a display, and the t-SNE plots of evaluate.py.

`draw` returns a dataset's figures and one line for each figure without data, with the command that creates the data.
Arms and groups differ in color and in marker. matplotlib and scikit-learn are imported when something is drawn.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas

from llm_jepa.cli import UsageError
from llm_jepa.files import read_jsonl
from llm_jepa.reports.comparison import Table
from llm_jepa.reports.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (color, marker): Okabe and Ito's palette without yellow, which is hard to see on white, then Paul Tol's.
PALETTE = (
    ("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#E69F00", "D"), ("#CC79A7", "v"),
    ("#56B4E9", "P"), ("#000000", "X"), ("#332288", "*"), ("#882255", "<"), ("#999933", ">"),
)  # fmt: skip
DASHES = ("-", "--", "-.", ":")
CURVES = {
    "lm_loss": "lm_loss, nats per token",
    "jepa_loss": "jepa_loss per pair",
    "cosine": "cosine of a pair",
    "cosine_shuffled": "cosine of a shuffled pair",
    "retrieval": "retrieval in the micro-batch",
    "effective_rank": "effective rank of the views",
}
CURVE_POINTS = 150  # each is the mean of a block of steps
EMBEDDINGS = "embeddings.safetensors"  # in RUN/eval/<dataset>/
T_SNE_MIN_POINTS = 10  # with fewer there are no neighborhoods to preserve
T_SNE_PAIRS = 250  # at most, in a report
SVG = {"svg.hashsalt": "report", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass
class Drawn:
    """The figures of a table and what could not be drawn."""

    figures: list[dict[str, str]] = field(default_factory=list)  # name, caption and svg, which is in base64
    missing: list[str] = field(default_factory=list)  # one line each, with the command that creates the data
    damaged: list[str] = field(default_factory=list)  # files that exist and cannot be used

    def add(self, fig: Figure, name: str, caption: str) -> None:
        """Stores a figure as SVG; the same data gives the same bytes."""
        file = io.BytesIO()
        fig.savefig(file, format="svg", metadata={"Date": None})
        svg = base64.b64encode(file.getvalue()).decode()
        self.figures.append({"name": name, "caption": caption, "svg": svg})


def draw(table: Table) -> Drawn:
    """All figures of a dataset."""
    import matplotlib

    drawn = Drawn()
    with matplotlib.rc_context(SVG):
        for plot in (plot_scores, plot_training, plot_costs, plot_grid, plot_embeddings):
            plot(table, drawn)
    return drawn


def subplots(
    rows: int, columns: int, width: float = 8.0, height: float = 3.0, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of axes, each `height` inches high."""
    from matplotlib.figure import Figure  # without pyplot, which needs a display

    fig = Figure(figsize=(width, rows * height + 0.5), layout="constrained")
    return fig, list(fig.subplots(rows, columns, squeeze=False, sharey=sharey).flat)


def arm_styles(table: Table, key: str) -> dict[str, dict[str, str]]:
    """Color of each arm with its `key`, marker or linestyle: the same in every figure, and no two arms share both."""
    styles = {}
    for i, arm in enumerate(table.arms):
        cycle, color = divmod(i, len(PALETTE))  # arms beyond the palette repeat its colors with another marker and dash
        style = {"marker": PALETTE[(color + cycle) % len(PALETTE)][1], "linestyle": DASHES[cycle % len(DASHES)]}
        styles[arm] = {"label": escape(arm), "color": PALETTE[color][0], key: style[key]}
    return styles


def escape(text: str) -> str:
    """Text that matplotlib does not parse as a formula."""
    return text.replace("$", r"\$")


def add_legend(fig: Figure) -> None:
    """A legend of all labels below all axes."""
    entries = {name: handle for a in fig.axes for handle, name in zip(*a.get_legend_handles_labels(), strict=True)}
    columns = max(1, min(4, 110 // (8 + max(map(len, entries)))))
    fig.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False)


# --------------------------------------------------------------------------------------------------------- scores


def plot_scores(table: Table, drawn: Drawn) -> None:
    """Each score: one dot per run, dots of a seed connected, a short bar at each arm's mean."""
    names, arms, styles = table.first.scores, table.arms.values(), arm_styles(table, "marker").values()
    fig, panels = subplots(1, len(names), width=2 + 2 * len(names), height=0.5 + 0.4 * len(arms), sharey=True)
    for name, axes in zip(names, panels, strict=True):
        by_arm = [{r.seed: r.columns.get(f"{name} %", math.nan) for r in arm} for arm in arms]
        axes.plot(pandas.DataFrame(by_arm).sort_index(axis=1), range(len(arms)), color="0.7", linewidth=1, zorder=1)
        for y, (by_seed, style) in enumerate(zip(by_arm, styles, strict=True)):
            values = list(by_seed.values())
            axes.scatter(values, [y] * len(values), s=28, zorder=2, **style)
            axes.vlines(np.mean(values), y - 0.2, y + 0.2, color="black", linewidth=1.5, zorder=3)
        axes.set_xlabel(f"{name}, %")
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(range(len(arms)), [escape(textwrap.fill(arm, 40)) for arm in table.arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)  # the reference is at the top
    drawn.add(fig, "scores", "Scores: one dot per run, dots of the same seed connected, a bar at each arm's mean")


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
        fig, (axes,) = subplots(1, 1, width=3 + 0.9 * run.shape[1], height=1 + 0.6 * run.shape[0])
        image = axes.imshow(means, cmap="cividis", aspect="auto", origin="lower")
        for i, j in np.argwhere(run):
            text = f"{means.iat[i, j]:.1f}\nn = {len(cells[means.index[i], means.columns[j]])}"
            color = "black" if image.norm(means.iat[i, j]) > 0.5 else "white"
            axes.text(j, i, text, ha="center", va="center", color=color)
        axes.set(xlabel="predictor tokens k", ylabel="weight λ of the JEPA loss", facecolor="0.9")
        axes.set_xticks(range(run.shape[1]), [f"{k:g}" for k in means.columns])
        axes.set_yticks(range(run.shape[0]), [f"{lbd:g}" for lbd in means.index])
        axes.spines[:].set_visible(False)
        fig.colorbar(image, label=f"{score}, %")
        caption = f"{score} over k and λ, mean over the seeds; gray: not run"
        if table.reference and table.first.settings["regular"]:
            caption += f"; {table.reference}: {mean_score(table.arms[table.reference], score):.1f} %"
        drawn.add(fig, "grid", caption)
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
        try:  # evaluations and the summary at the end have no lm_loss
            rows = [row for _, row in read_jsonl(path) if "lm_loss" in row]
            steps = pandas.DataFrame(rows, columns=["step", *CURVES, "flops"]).astype(float)
        except (UsageError, TypeError, ValueError) as error:
            damaged.append(str(error) if isinstance(error, UsageError) else f"{path}: damaged ({error})")
            continue
        yield arm, result, steps.drop_duplicates("step", keep="last").sort_values("step")


def plot_training(table: Table, drawn: Drawn) -> None:
    """Losses and what shows whether pairs are told apart over the steps, smoothed, one thin line per seed."""
    styles, (fig, panels) = arm_styles(table, "linestyle"), subplots(3, 2)
    for arm, _, steps in training_steps(table, drawn.damaged):
        for name, axes in zip(CURVES, panels, strict=True):
            curve = steps[["step", name]].dropna()
            if len(curve):
                block = np.arange(len(curve)) // math.ceil(len(curve) / CURVE_POINTS)  # the last one may be shorter
                axes.plot(*curve.groupby(block).mean().T.to_numpy(), linewidth=0.8, alpha=0.8, **styles[arm])
    for label, axes in zip(CURVES.values(), panels, strict=True):
        if not axes.lines:
            axes.remove()
            continue
        axes.set(xlabel="optimizer steps", ylabel=label)
        values = np.concatenate([line.get_ydata() for line in axes.lines])
        if 0 < 30 * values.min() < values.max():
            axes.set_yscale("log")
    if not fig.axes:
        drawn.missing.append(
            "no training curves: the runs have no metrics.jsonl, which python finetune.py --output_dir RUN writes"
        )
        return
    add_legend(fig)
    drawn.add(fig, "training", f"Training: one line per seed, the means of at most {CURVE_POINTS} blocks of steps")


def plot_costs(table: Table, drawn: Drawn) -> None:
    """The primary score against the cost of training: wall time, and FLOPs if they were counted."""
    costs = {"training time, seconds": {r.run: r.columns["train s"] for _, r in table.runs}}
    counted = ((r.run, steps["flops"].max()) for _, r, steps in training_steps(table, damaged=[]))  # reported before
    flops = {run: value for run, value in counted if value > 0}
    what, styles, score = "wall time", arm_styles(table, "marker"), table.first.scores[0]
    if flops:
        costs = {"training FLOPs": flops} | costs
        what = f"FLOPs (counted in {len(flops)} of {len(table.runs)} runs) and wall time"
    else:
        drawn.missing.append("no figure of scores against training FLOPs, which python finetune.py --track_flop counts")
    fig, panels = subplots(1, len(costs), width=8 if flops else 5)
    for axes, (label, cost) in zip(panels, costs.items(), strict=True):
        for arm, style in styles.items():
            runs = [r for r in table.arms[arm] if r.run in cost and f"{score} %" in r.columns]
            axes.scatter([cost[r.run] for r in runs], [r.columns[f"{score} %"] for r in runs], s=28, **style)
        axes.set(xlabel=label, ylabel=f"{score}, %")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(axis="x", nbins=6)
    add_legend(fig)
    drawn.add(fig, "costs", f"{score} against {what} of training, one point per run")


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
    fig, (axes,) = subplots(1, 1, width=7, height=5.5)
    size = float(np.clip(20000 / sum(map(len, groups.values())), 6, 40))
    scatter_groups(axes, {f"{name} ({len(xy)})": xy for name, xy in groups.items()}, size)
    axes.set_title(title, parse_math=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, markerscale=(60 / size) ** 0.5)
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=150)
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
    styles, views, first = arm_styles(table, "linestyle"), {}, ""
    fig, (axes,) = subplots(1, 1, width=6)
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
        axes.plot(np.arange(1, len(top) + 1), shown, linewidth=0.8, **styles[arm])
        views.setdefault(arm, (result.seed, text, code))  # of the smallest seed
    if not views:
        drawn.missing.append(
            "no singular values and no t-SNE of the views: python evaluate.py --model_name RUN --input_file "
            f"datasets/{table.dataset}_test.jsonl --export_embeddings RUN/eval/{table.dataset}/{EMBEDDINGS}"
        )
        return
    axes.set(xlabel="rank", ylabel="singular value", yscale="log")
    add_legend(fig)
    drawn.add(fig, "singular_values", f"Largest 100 singular values of Enc(Text) − Enc(Code), a line per run; {first}")
    points = sum(map(len, next(iter(views.values()))[1:]))
    if points < T_SNE_MIN_POINTS:
        drawn.missing.append(f"no t-SNE of the views: {points} points are too few")
        return
    plot_t_sne(views, drawn)


def plot_t_sne(views: dict[str, tuple[int, np.ndarray, np.ndarray]], drawn: Drawn) -> None:
    """A t-SNE plane for each arm, of both views of its first pairs; `views`: arm → seed, Text, Code."""
    fig, panels = subplots(math.ceil(len(views) / 3), min(3, len(views)), width=1 + 2.8 * min(3, len(views)))
    for unused in panels[len(views) :]:
        unused.remove()
    for axes, (arm, (seed, *pair)) in zip(panels, views.items(), strict=False):
        plane, _ = t_sne(np.concatenate([view[:T_SNE_PAIRS] for view in pair]).astype(np.float32), seed=0)
        scatter_groups(axes, dict(zip(("Text", "Code"), np.split(plane, 2), strict=True)), size=8)
        axes.set_title(escape(textwrap.fill(f"{arm}, seed {seed}", 34)), fontsize=9)
    add_legend(fig)
    what = f"t-SNE of the views of at most {T_SNE_PAIRS} pairs, one seed per arm"
    drawn.add(fig, "t_sne", f"{what}; distances are not comparable between planes")
