"""Figures: those of a report, drawn as SVG without a display, and the t-SNE plots that evaluate.py shares.

`draw` returns a data set's figures and one line for each that could not be drawn: if data is missing, with the command
that makes it; if a file is damaged, with its name. Arms and groups differ in color and in marker. matplotlib,
pandas and scikit-learn are imported when something is drawn.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llm_jepa.cli import UsageError
from llm_jepa.reports.comparison import Table
from llm_jepa.reports.results import Result

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

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
    "spread": "spread, 1 − cosine",
}
CURVE_POINTS = 150  # each is the mean of a block of steps
EMBEDDINGS = "embeddings.safetensors"  # in RUN/eval/<dataset>/
T_SNE_MIN_POINTS = 10  # with fewer there are no neighborhoods to preserve
T_SNE_PAIRS, T_SNE_ARMS = 250, 6  # at most, in a report
SVG = {"svg.hashsalt": "report", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Figure:
    """A figure; `caption` says what it shows."""

    name: str
    caption: str
    svg: bytes = field(repr=False)


@dataclass
class Drawn:
    """The figures of a table and what could not be drawn."""

    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # one line each, with the command that makes the data
    damaged: list[str] = field(default_factory=list)  # files that exist and cannot be used


def draw(table: Table) -> Drawn:
    """All figures of a data set."""
    import matplotlib

    drawn = Drawn()
    with matplotlib.rc_context(SVG):
        for plot in (plot_scores, plot_training, plot_costs, plot_grid, plot_embeddings):
            plot(table, drawn)
    return drawn


def save(fig: MatplotlibFigure, name: str, caption: str) -> Figure:
    """The figure as SVG; the same data gives the same bytes."""
    file = io.BytesIO()
    fig.savefig(file, format="svg", metadata={"Date": None})
    return Figure(name, caption, file.getvalue())


def subplots(
    rows: int, columns: int, n: int, width: float = 8.0, height: float = 3.0
) -> tuple[MatplotlibFigure, list[Axes]]:
    """A figure with n axes in a grid of rows × columns, each `height` inches high."""
    from matplotlib.figure import Figure as MatplotlibFigure  # without pyplot, which needs a display

    fig = MatplotlibFigure(figsize=(width, rows * height + 0.5), layout="constrained")
    panels = list(fig.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[n:]:
        unused.remove()
    return fig, panels[:n]


def arm_styles(table: Table, key: str) -> dict[str, dict[str, str]]:
    """Color of each arm with its `key`, marker or linestyle: the same in every figure, and no two arms share both."""
    styles = {}
    for i, arm in enumerate(table.arms):
        cycle, color = divmod(i, len(PALETTE))  # arms beyond the palette repeat its colors with another marker and dash
        style = {"marker": PALETTE[(color + cycle) % len(PALETTE)][1], "linestyle": DASHES[cycle % len(DASHES)]}
        styles[arm] = {"color": PALETTE[color][0], key: style[key]}
    return styles


def escape(text: str) -> str:
    """Text that matplotlib does not parse as a formula."""
    return text.replace("$", r"\$")


def add_legend(fig: MatplotlibFigure, styles: dict[str, dict[str, str]], arms: Collection[str]) -> None:
    """A legend of these arms below all axes."""
    from matplotlib.lines import Line2D

    shown = {arm: style for arm, style in styles.items() if arm in arms}
    handles = [Line2D([], [], label=escape(arm), **{"linestyle": "none"} | style) for arm, style in shown.items()]
    columns = max(1, min(4, 110 // (8 + max(map(len, shown)))))
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


# --------------------------------------------------------------------------------------------------------- scores


def plot_scores(table: Table, drawn: Drawn) -> None:
    """Each score: one dot per run, dots of a seed connected, a short bar at each arm's mean."""
    names, wide = table.first.scores(), len(table.arms) > 3
    columns = 1 if wide else 2
    fig, panels = subplots(math.ceil(len(names) / columns), columns, len(names))
    styles, seeds = arm_styles(table, "marker"), sorted({r.seed for arm in table.arms.values() for r in arm})
    for name, axes in zip(names, panels, strict=True):
        by_arm = [{r.seed: r.columns.get(f"{name} %", math.nan) for r in arm} for arm in table.arms.values()]
        for seed in seeds:
            axes.plot([values.get(seed, math.nan) for values in by_arm], color="0.7", linewidth=1, zorder=1)
        for x, (arm, by_seed) in enumerate(zip(table.arms, by_arm, strict=True)):
            values = list(by_seed.values())
            axes.scatter([x] * len(values), values, s=28, zorder=2, **styles[arm])
            axes.hlines(np.mean(values), x - 0.2, x + 0.2, color="black", linewidth=1.5, zorder=3)
        rotated = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(by_arm) > 6 else {}
        labels = [escape(textwrap.fill(arm, 80 if rotated else 60 // len(by_arm))) for arm in table.arms]
        if wide and name != names[-1]:  # panels in one column share the lowest one's labels
            labels = [""] * len(by_arm)
        axes.set_xticks(range(len(by_arm)), labels, **rotated)
        axes.set_xlim(-0.5, len(by_arm) - 0.5)
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, 100 + 0.03 * (100 - low)))
        axes.set_ylabel(f"{name}, %")
        axes.ticklabel_format(axis="y", useOffset=False)
    caption = "Scores: one dot per run, dots of the same seed connected, a bar at each arm's mean"
    drawn.figures.append(save(fig, "scores", caption))


def plot_grid(table: Table, drawn: Drawn) -> None:
    """The primary score over k and λ: a heat map for each set of JEPA arms that differ in nothing else."""
    grids: dict[str, dict[tuple[float, float], list[Result]]] = {}
    for arm in table.arms.values():
        settings = dict(arm[0].settings)
        cell = settings.pop("predictors", None), settings.pop("lbd", None)
        if not settings.get("regular") and None not in cell:
            grids.setdefault(json.dumps([settings, arm[0].inputs], sort_keys=True), {})[cell] = arm
    found = len(drawn.figures)
    for cells in grids.values():
        ks, lambdas = (sorted(set(values)) for values in zip(*cells, strict=True))
        blocks = itertools.product(itertools.combinations(ks, 2), itertools.combinations(lambdas, 2))
        if any(set(itertools.product(*block)) <= cells.keys() for block in blocks):
            drawn.figures.append(heat_map(table, cells, ks, lambdas))
    if len(drawn.figures) == found:
        drawn.missing.append(
            "no map over k and λ, which needs two values of each: bash run.sh run_jepa MODEL LEARNING_RATE EPOCHS - "
            "PREDICTORS all LBD DATASET"
        )


def heat_map(table: Table, cells: dict[tuple, list[Result]], ks: list[float], lambdas: list[float]) -> Figure:
    """The map: mean and n of each cell; cells without runs are gray."""
    score = next(iter(cells.values()))[0].primary
    means = np.full((len(lambdas), len(ks)), np.nan)
    fig, (axes,) = subplots(1, 1, 1, width=3 + 0.9 * len(ks), height=1 + 0.6 * len(lambdas))
    for (k, lbd), arm in cells.items():
        means[lambdas.index(lbd), ks.index(k)] = np.mean([r.columns[f"{score} %"] for r in arm])
    image = axes.imshow(means, cmap="cividis", aspect="auto", origin="lower")
    for (i, lbd), (j, k) in itertools.product(enumerate(lambdas), enumerate(ks)):
        text, color = "not run", "0.3"
        if (k, lbd) in cells:
            text = f"{means[i, j]:.1f}\nn = {len(cells[k, lbd])}"
            color = "black" if image.norm(means[i, j]) > 0.5 else "white"
        axes.text(j, i, text, ha="center", va="center", color=color)
    axes.set(xlabel="predictor tokens k", ylabel="weight λ of the JEPA loss", facecolor="0.9")
    axes.set_xticks(range(len(ks)), [f"{k:g}" for k in ks])
    axes.set_yticks(range(len(lambdas)), [f"{lbd:g}" for lbd in lambdas])
    axes.spines[:].set_visible(False)
    fig.colorbar(image, label=f"{score}, %")
    regular = ""
    if table.reference and table.first.settings.get("regular"):
        mean = np.mean([r.columns[f"{score} %"] for r in table.arms[table.reference]])
        regular = f" ({table.reference}: {mean:.1f} %)"
    return save(fig, "grid", f"{score} over k and λ, mean over the seeds{regular}")


# ------------------------------------------------------------------------------------------------------- training


def training_steps(table: Table, damaged: list[str]) -> Iterator[tuple[str, Result, pandas.DataFrame]]:
    """(arm, result, training steps) of every run that has metrics.jsonl; damaged files are added to the list.

    The steps have the columns of CURVES and flops. One that was repeated after a resume counts once, the last time.
    """
    import pandas

    for arm, result in ((arm, result) for arm, results in table.arms.items() for result in results):
        path = result.run / "metrics.jsonl"
        try:
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged.append(f"{path}: damaged ({error})")
            continue
        rows = [record for record in records if "lm_loss" in record]  # no evaluations and no summary at the end
        steps = pandas.DataFrame(rows, columns=["step", *CURVES, "flops"]).astype(float)
        yield arm, result, steps.drop_duplicates("step", keep="last").sort_values("step")


def block_means(curve: pandas.DataFrame) -> pandas.DataFrame:
    """A curve's at most CURVE_POINTS points: means over blocks of steps; the last block may be shorter."""
    return curve.groupby(np.arange(len(curve)) // math.ceil(len(curve) / CURVE_POINTS)).mean()


def plot_training(table: Table, drawn: Drawn) -> None:
    """Losses, cosine and spread over the steps, smoothed, one thin line per seed."""
    styles, (fig, panels) = arm_styles(table, "linestyle"), subplots(2, 2, 4)
    arms: list[str] = []
    for arm, _, steps in training_steps(table, drawn.damaged):
        for name, axes in zip(CURVES, panels, strict=True):
            curve = steps[["step", name]][np.isfinite(steps[name])]
            if len(curve):
                axes.plot(*block_means(curve).T.to_numpy(), linewidth=0.8, alpha=0.8, **styles[arm])
                arms.append(arm)
    if not arms:
        drawn.missing.append(
            "no training curves: the runs have no metrics.jsonl, which python finetune.py --output_dir RUN writes"
        )
        return
    for label, axes in zip(CURVES.values(), panels, strict=True):
        axes.set(xlabel="optimizer steps", ylabel=label)
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color="0.4")
            axes.set(xticks=[], yticks=[])
            continue
        values = np.concatenate([line.get_ydata() for line in axes.lines])
        if 0 < 30 * values.min() < values.max():
            axes.set_yscale("log")
    add_legend(fig, styles, arms)
    caption = f"Training: one line per seed, smoothed to the means of at most {CURVE_POINTS} blocks of steps"
    drawn.figures.append(save(fig, "training", caption))


def plot_costs(table: Table, drawn: Drawn) -> None:
    """The primary score against the cost of training: wall time, and FLOPs if they were counted."""
    results = [(arm, r) for arm, results in table.arms.items() for r in results]
    costs = {"training, seconds of wall time": {r.run: r.columns["train s"] for _, r in results}}
    flops = {r.run: steps["flops"].max() for _, r, steps in training_steps(table, damaged=[])}  # reported before
    flops = {run: value for run, value in flops.items() if value > 0}
    what, styles, score = "wall time", arm_styles(table, "marker"), table.first.primary
    if flops:
        exponent = int(math.log10(max(flops.values())))
        scaled = {run: value / 10**exponent for run, value in flops.items()}
        costs = {f"training, $10^{{{exponent}}}$ floating-point operations": scaled} | costs
        what = f"FLOPs (counted in {len(flops)} of {len(results)} runs) and wall time"
    else:
        drawn.missing.append("no figure of scores against training FLOPs, which python finetune.py --track_flop counts")
    fig, panels = subplots(1, len(costs), len(costs), width=8 if flops else 5)
    for axes, (label, cost) in zip(panels, costs.items(), strict=True):
        for arm, style in styles.items():
            runs = [r for name, r in results if name == arm and r.run in cost and f"{score} %" in r.columns]
            axes.scatter([cost[r.run] for r in runs], [r.columns[f"{score} %"] for r in runs], s=28, **style)
        axes.set(xlabel=label, ylabel=f"{score}, %")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(axis="x", nbins=6)
    add_legend(fig, styles, table.arms)
    drawn.figures.append(save(fig, "costs", f"{score} against {what} of training, one point per run"))


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
    fig, (axes,) = subplots(1, 1, 1, width=7, height=5.5)
    size = float(np.clip(20000 / sum(map(len, groups.values())), 6, 40))
    scatter_groups(axes, {f"{name} ({len(xy)})": xy for name, xy in groups.items()}, size)
    axes.set_title(title, parse_math=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, markerscale=(60 / size) ** 0.5)
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=150)
    return file.getvalue()


def read_embeddings(result: Result) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Exported Text and Code views (P, D) in float64, and how they were read: layer, pooling, number of pairs.

    Raises UsageError if the file is damaged or has other examples than the scores, FileNotFoundError if there is none.
    """
    from safetensors import SafetensorError, safe_open

    path = result.run / "eval" / result.dataset / EMBEDDINGS
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            text, code = (file.get_tensor(name).astype(np.float64) for name in ("text", "code"))
    except SafetensorError as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if metadata["data_sha256"] != result.inputs["test_data"]:
        raise UsageError(f"{path}: not of the examples of {path.with_name('metrics.json')}")
    return text, code, {"layer": metadata["layer"], "pooling": metadata["pooling"], "n": str(len(text))}


def plot_embeddings(table: Table, drawn: Drawn) -> None:
    """Singular values of Enc(Text) − Enc(Code), one line per run, and t-SNE of one seed of each arm."""
    styles, views, first = arm_styles(table, "linestyle"), {}, {}
    fig, (axes,) = subplots(1, 1, 1, width=6)
    for arm, results in table.arms.items():
        for result in sorted(results, key=lambda r: r.seed):
            try:
                text, code, source = read_embeddings(result)
            except FileNotFoundError:
                continue
            except UsageError as error:
                drawn.damaged.append(str(error))
                continue
            if source != (first := first or source):
                path = result.run / "eval" / table.dataset / EMBEDDINGS
                drawn.damaged.append(f"{path}: {source}, but the first run has {first}")
                continue
            top = np.linalg.svd(text - code, compute_uv=False)[:100]
            # A logarithmic axis cannot show 0; values below float32's precision mean nothing.
            shown = np.where(top > 1e-7 * top[0], top, np.nan)
            axes.plot(np.arange(1, len(top) + 1), shown, linewidth=0.8, **styles[arm])
            views.setdefault(arm, (result.seed, text, code))
    if not first:
        drawn.missing.append(
            "no singular values and no t-SNE of the views: python evaluate.py --model_name RUN --input_file "
            f"datasets/{table.dataset}_test.jsonl --export_embeddings RUN/eval/{table.dataset}/{EMBEDDINGS}"
        )
        return
    axes.set(xlabel="rank", ylabel="singular value", yscale="log")
    add_legend(fig, styles, views)
    source = f"{first['n']} pairs, layer {first['layer']}, pooling {first['pooling']}"
    caption = f"Largest 100 singular values of Enc(Text) − Enc(Code), one line per run; {source}"
    drawn.figures.append(save(fig, "singular_values", caption))
    points = 2 * int(first["n"])
    if points < T_SNE_MIN_POINTS:
        drawn.missing.append(f"no t-SNE of the views: {points} points are too few")
        return
    drawn.figures.append(t_sne_panels(views))


def t_sne_panels(views: dict[str, tuple[int, np.ndarray, np.ndarray]]) -> Figure:
    """A t-SNE plane for each of the first arms, of both views of its first pairs; `views`: arm → seed, Text, Code."""
    some = f", the first {T_SNE_ARMS} of {len(views)}" if len(views) > T_SNE_ARMS else ""
    views = dict(itertools.islice(views.items(), T_SNE_ARMS))
    columns = min(3, len(views))
    fig, panels = subplots(math.ceil(len(views) / columns), columns, len(views), width=1 + 2.8 * columns)
    for axes, (arm, (seed, *pair)) in zip(panels, views.items(), strict=True):
        points = np.concatenate([view[:T_SNE_PAIRS] for view in pair]).astype(np.float32)
        plane, _ = t_sne(points, seed=0)
        scatter_groups(axes, dict(zip(("Text", "Code"), np.split(plane, 2), strict=True)), size=8)
        axes.set_title(escape(textwrap.fill(f"{arm}, seed {seed}", 34)), fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, markerscale=2)
    what = f"the views of at most {T_SNE_PAIRS} pairs, one seed per arm{some}"
    return save(fig, "t_sne", f"t-SNE of {what}; distances are not comparable between planes")
