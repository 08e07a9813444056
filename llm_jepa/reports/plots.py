"""The pictures of a report: a dataset's arms drawn with matplotlib's Agg and written as SVG, which needs no display.

Every function takes a report's table (report.Table) and returns pictures and lines on what could not be drawn: what is
missing with the command that makes it, what is damaged with the file. Arms are told apart by colour and by shape.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llm_jepa.reports.results import scores
from llm_jepa.cli import UsageError

if TYPE_CHECKING:
    from llm_jepa.reports.results import Result, Table

# Okabe and Ito's colours without the yellow, which white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = ("o", "^", "s", "D", "v", "P", "X"), ("-", "--", "-.", ":")
CURVES = {
    "lm_loss": "lm_loss, nats a token",
    "jepa_loss": "jepa_loss, a pair",
    "cosine": "cosine of a pair",
    "spread": "spread, 1 − cosine",
}
POINTS = 150  # of a curve: each is the mean of a block of steps
EMBEDDINGS = "embeddings.safetensors"  # in RUN/eval/<dataset>/
T_SNE_PAIRS, T_SNE_ARMS = 250, 6  # more take long and show no more
SVG = {"svg.hashsalt": "report", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Picture:
    """One picture; `caption` says what it shows."""

    name: str
    caption: str
    svg: bytes = field(repr=False)


@dataclass
class Drawn:
    """What became of a table's pictures."""

    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # a line each, with the command that makes the data
    damaged: list[str] = field(default_factory=list)  # files that are there and cannot be used


def draw(table: Table) -> Drawn:
    """All pictures of a dataset."""
    drawn = Drawn()
    with matplotlib.rc_context(SVG):
        for part in (paired_dots, training_curves, costs, grid, embeddings):
            part(table, drawn)
    return drawn


def finish(figure: Figure, name: str, caption: str) -> Picture:
    """The figure as SVG, the same bytes for the same data."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return Picture(name, caption, file.getvalue())


def styles(table: Table) -> dict[str, dict[str, str]]:
    """Colour, marker and dash of each arm, the same in every picture of the table."""
    styles = {}
    for i, arm in enumerate(table.arms):
        round_ = i // len(COLOURS)  # arms beyond the colours come round again with other shapes and dashes
        marker, dash = MARKERS[(i + round_) % len(MARKERS)], DASHES[round_ % len(DASHES)]
        styles[arm] = {"color": COLOURS[i % len(COLOURS)], "marker": marker, "linestyle": dash}
    return styles


def canvas(rows: int, columns: int, width: float = 8.0, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure of rows × columns axes, each `height` inches high, that leaves room for all labels."""
    figure = Figure(figsize=(width, rows * height + 0.5), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def legend(figure: Figure, table: Table, arms: list[str], line: bool) -> None:
    """The arms' key below all axes, in as many columns as their names allow."""
    look, mark = styles(table), "linestyle" if line else "marker"
    handles = [
        Line2D([], [], label=plain(arm), color=look[arm]["color"], **{"linestyle": "none"} | {mark: look[arm][mark]})
        for arm in arms
    ]
    columns = max(1, min(4, 110 // (8 + max(map(len, arms)))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


# --------------------------------------------------------------------------------------------------------- scores


def paired_dots(table: Table, drawn: Drawn) -> None:
    """Each score, a dot a run, dots of one seed joined; a short bar at each arm's mean."""
    names = scores(next(iter(table.arms.values()))[0])
    wide = len(table.arms) > 3
    figure, panels = canvas(math.ceil(len(names) / (1 if wide else 2)), 1 if wide else 2)
    for axes in panels[len(names) :]:
        axes.remove()
    look, seeds = styles(table), sorted({r.seed for arm in table.arms.values() for r in arm})
    for name, axes in zip(names, panels, strict=False):
        by_arm = [{r.seed: r.columns.get(f"{name} %", math.nan) for r in arm} for arm in table.arms.values()]
        for seed in seeds:
            axes.plot([values.get(seed, math.nan) for values in by_arm], color="0.7", linewidth=1, zorder=1)
        for x, (arm, values) in enumerate(zip(table.arms, by_arm, strict=True)):
            style = {"color": look[arm]["color"], "marker": look[arm]["marker"], "zorder": 2}
            axes.scatter([x] * len(values), list(values.values()), s=28, **style)
            axes.hlines(np.mean(list(values.values())), x - 0.2, x + 0.2, color="black", linewidth=1.5, zorder=3)
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(by_arm) > 6 else {}
        shown = [plain(textwrap.fill(arm, 80 if turned else 60 // len(by_arm))) for arm in table.arms]
        if wide and name != names[-1]:  # panels above one another share the lowest one's names
            shown = [""] * len(by_arm)
        axes.set_xticks(range(len(by_arm)), shown, **turned)
        axes.set_xlim(-0.5, len(by_arm) - 0.5)
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, 100 + 0.03 * (100 - low)))  # there is nothing above 100 %
        axes.set_ylabel(f"{name}, %")
        axes.ticklabel_format(axis="y", useOffset=False)
    caption = "Scores: a dot a run, dots of the same seed joined, a bar at each arm's mean"
    drawn.pictures.append(finish(figure, "scores", caption))


def grid(table: Table, drawn: Drawn) -> None:
    """The headline score over the predictor tokens k and the JEPA loss's weight λ, a map for each set of such arms."""
    cells: dict[str, dict[tuple[float, float], list[Result]]] = {}
    for arm in table.arms.values():
        settings = arm[0].settings
        k, lbd = settings.get("predictors"), settings.get("lbd")
        if settings.get("regular") or not all(isinstance(v, (int, float)) for v in (k, lbd)):
            continue
        others = {name: value for name, value in settings.items() if name not in ("predictors", "lbd")}
        cells.setdefault(json.dumps([others, arm[0].made], sort_keys=True), {})[(k, lbd)] = arm
    full = False
    for part in cells.values():
        ks, lbds = (sorted({cell[i] for cell in part}) for i in (0, 1))
        complete = [(a, b) for a in itertools.combinations(ks, 2) for b in itertools.combinations(lbds, 2)]
        if not any(all((k, lbd) in part for k in pair for lbd in other) for pair, other in complete):
            continue
        full = True
        drawn.pictures.append(heat_map(table, part, ks, lbds))
    if not full:
        drawn.missing.append(
            "no map over k and λ, which needs two values of each: bash run.sh run_jepa MODEL LEARNING_RATE EPOCHS - "
            "PREDICTORS all LBD DATASET"
        )


def heat_map(table: Table, cells: dict, ks: list[float], lbds: list[float]) -> Picture:
    """The map: each cell's mean and n; cells without runs are grey."""
    score = next(iter(cells.values()))[0].headline
    means = np.full((len(lbds), len(ks)), np.nan)
    for (k, lbd), arm in cells.items():
        means[lbds.index(lbd), ks.index(k)] = np.mean([r.columns[f"{score} %"] for r in arm])
    figure, (axes,) = canvas(1, 1, width=3 + 0.9 * len(ks), height=1 + 0.6 * len(lbds))
    axes.set_facecolor("0.9")
    image = axes.imshow(means, cmap="cividis", aspect="auto", origin="lower")
    for (i, lbd), (j, k) in itertools.product(enumerate(lbds), enumerate(ks)):
        if (k, lbd) not in cells:
            axes.text(j, i, "not run", ha="center", va="center", color="0.3")
            continue
        light = image.norm(means[i, j]) > 0.5
        text = f"{means[i, j]:.1f}\nn = {len(cells[k, lbd])}"
        axes.text(j, i, text, ha="center", va="center", color="black" if light else "white")
    axes.set(xlabel="predictor tokens k", ylabel="weight λ of the JEPA loss")
    axes.set_xticks(range(len(ks)), [f"{k:g}" for k in ks])
    axes.set_yticks(range(len(lbds)), [f"{lbd:g}" for lbd in lbds])
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label=f"{score}, %")
    beside = [
        (label, arm) for label, arm in table.arms.items() if label == table.reference and arm[0].settings.get("regular")
    ]
    mean = "; ".join(f"{label}: {np.mean([r.columns[f'{score} %'] for r in arm]):.1f} %" for label, arm in beside)
    return finish(figure, "grid", f"{score} over k and λ, mean over the seeds{f' ({mean})' if mean else ''}")


# ------------------------------------------------------------------------------------------------------- training


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's training steps from metrics.jsonl, each once: one that a resumed run repeated, as it was last.

    Raises UsageError naming the file and the line that is damaged; FileNotFoundError where there is none.
    """
    steps: dict[int, dict[str, Any]] = {}
    path = run / "metrics.jsonl"
    for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            numbers = {name: float(row[name]) for name in (*CURVES, "flops") if row.get(name) is not None}
            if "lm_loss" in row:
                steps[int(row["step"])] = numbers
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UsageError(f"{path}:{i}: no line of metrics") from None
    return [{"step": step} | steps[step] for step in sorted(steps)]


def logged(table: Table, drawn: Drawn) -> Iterator[tuple[str, Result, list[dict[str, Any]]]]:
    """(arm, run, its training steps) of every run that has them."""
    for arm, results in table.arms.items():
        for result in results:
            try:
                yield arm, result, read_metrics(result.run)
            except UsageError as error:
                if str(error) not in drawn.damaged:
                    drawn.damaged.append(str(error))
            except OSError:
                pass


def blocks(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most POINTS points: the means of blocks of successive steps, the last block perhaps shorter."""
    size = math.ceil(len(steps) / POINTS)
    starts = np.arange(0, len(steps), size)
    lengths = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / lengths, np.add.reduceat(values, starts) / lengths


def training_curves(table: Table, drawn: Drawn) -> None:
    """Losses, cosine and spread over the steps, smoothed, a thin line a seed."""
    look, figure, panels = styles(table), *canvas(2, 2)
    arms: list[str] = []
    smallest, greatest = dict.fromkeys(CURVES, math.inf), dict.fromkeys(CURVES, -math.inf)
    for arm, _, rows in logged(table, drawn):
        for name, axes in zip(CURVES, panels, strict=True):
            own = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
            if own:
                steps, values = blocks(*np.array(own, dtype=np.float64).T)
                style = {"color": look[arm]["color"], "linestyle": look[arm]["linestyle"]}
                axes.plot(steps, values, linewidth=0.8, alpha=0.8, **style)
                smallest[name], greatest[name] = min(smallest[name], *values), max(greatest[name], *values)
                arms += [arm] if arm not in arms else []
    if not arms:
        drawn.missing.append(
            "no training curves: the runs have no metrics.jsonl, which python finetune.py --output_dir RUN writes"
        )
        return
    for (name, label), axes in zip(CURVES.items(), panels, strict=True):
        axes.set(xlabel="optimiser steps", ylabel=label)
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color="0.4")
            axes.set(xticks=[], yticks=[])
        elif smallest[name] > 0 and greatest[name] > 30 * smallest[name]:
            axes.set_yscale("log")
    legend(figure, table, arms, line=True)
    caption = f"Training: a line a seed, smoothed to the means of at most {POINTS} blocks of steps"
    drawn.pictures.append(finish(figure, "training", caption))


def costs(table: Table, drawn: Drawn) -> None:
    """The headline score against what training cost: operations where they were counted, and time."""
    flops: dict[Path, float] = {}
    for _, result, rows in logged(table, drawn):
        counted = max((row.get("flops", 0.0) for row in rows), default=0.0)
        if counted > 0:
            flops[result.run] = counted
    if not flops:
        drawn.missing.append(
            "no picture of scores against training FLOPs, which are counted by python finetune.py --track_flop"
        )
    look, score = styles(table), next(iter(table.arms.values()))[0].headline
    power = int(math.log10(max(flops.values()))) if flops else 0
    figure, panels = canvas(1, 1 + bool(flops), width=8 if flops else 5)
    for arm, results in table.arms.items():
        style = {"color": look[arm]["color"], "marker": look[arm]["marker"], "s": 28}
        scored = [r for r in results if f"{score} %" in r.columns]
        panels[-1].scatter([r.columns["train s"] for r in scored], [r.columns[f"{score} %"] for r in scored], **style)
        with_flops = [r for r in scored if r.run in flops]
        if flops:
            panels[0].scatter(
                [flops[r.run] / 10**power for r in with_flops], [r.columns[f"{score} %"] for r in with_flops], **style
            )
            panels[0].set_xlabel(f"training, $10^{{{power}}}$ floating-point operations")
    panels[-1].set_xlabel("training, seconds of wall time")
    for axes in panels:
        axes.set_ylabel(f"{score}, %")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(axis="x", nbins=6)
    legend(figure, table, list(table.arms), line=False)
    what = "FLOPs and wall time" if flops else "wall time"
    left = sum(len(arm) for arm in table.arms.values()) - len(flops)
    some = f"; {left} runs counted no FLOPs (python finetune.py --track_flop)" if flops and left else ""
    drawn.pictures.append(finish(figure, "costs", f"{score} against {what} of training, a point a run{some}"))


# ----------------------------------------------------------------------------------------------------- embeddings


def read_embeddings(result: Result, dataset: str) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """The run's exported views, Text and Code (P, D) in float64, and how they were read: layer, pooling, rows.

    Raises UsageError where the file is damaged or of other rows than the scores; FileNotFoundError where there is none.
    """
    from safetensors import SafetensorError, safe_open

    path = result.run / "eval" / dataset / EMBEDDINGS
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            text, code = (file.get_tensor(name).astype(np.float64) for name in ("text", "code"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if text.ndim != 2 or text.shape != code.shape or not (len(text) and np.isfinite(text - code).all()):
        raise UsageError(f"{path}: no pairs of finite embeddings")
    if metadata.get("data_sha256") != result.made["test data"]:
        raise UsageError(f"{path}: of other rows than {result.run / 'eval' / dataset / 'metrics.json'}")
    return text, code, {"layer": metadata.get("layer", ""), "pooling": metadata.get("pooling", ""), "n": str(len(text))}


def embeddings(table: Table, drawn: Drawn) -> None:
    """Singular values of Enc(Text) − Enc(Code), a line a run, and a t-SNE plane of one seed of each arm."""
    look, planes = styles(table), {}
    first: dict[str, str] | None = None
    figure, (axes,) = canvas(1, 1, width=6)
    for arm, results in table.arms.items():
        for result in sorted(results, key=lambda r: r.seed):
            try:
                text, code, how = read_embeddings(result, table.dataset)
                if how != (first := first or how):
                    was = f"{result.run / 'eval' / table.dataset / EMBEDDINGS}: {how}, but the first run's are {first}"
                    raise UsageError(was)
            except FileNotFoundError:
                continue
            except UsageError as error:
                drawn.damaged.append(str(error))
                continue
            top = np.linalg.svd(text - code, compute_uv=False)[:100]
            style = {"color": look[arm]["color"], "linestyle": look[arm]["linestyle"]}
            # A singular value of 0 has no place on a logarithmic axis; below float32's rounding they say nothing.
            axes.plot(np.arange(1, len(top) + 1), np.where(top > 1e-7 * top[0], top, np.nan), linewidth=0.8, **style)
            planes.setdefault(arm, (result.seed, text, code))
    if first is None:
        drawn.missing.append(
            "no singular values and no t-SNE of the views: python evaluate.py --model_name RUN --input_file "
            f"datasets/{table.dataset}_test.jsonl --export_embeddings RUN/eval/{table.dataset}/{EMBEDDINGS}"
        )
        return
    axes.set(xlabel="rank", ylabel="singular value", yscale="log")
    legend(figure, table, list(planes), line=True)
    how = f"{first['n']} pairs, layer {first['layer']}, pooling {first['pooling']}"
    caption = f"Greatest 100 singular values of Enc(Text) − Enc(Code), a line a run; {how}"
    drawn.pictures.append(finish(figure, "singular_values", caption))
    if 2 * int(first["n"]) < 10:  # fewer points have no neighbourhoods to keep
        drawn.missing.append(f"no t-SNE of the views: {2 * int(first['n'])} points are too few")
        return
    drawn.pictures.append(t_sne(planes))


def t_sne(planes: dict[str, tuple[int, np.ndarray, np.ndarray]]) -> Picture:
    """A t-SNE plane for each of the first arms: (seed, Text, Code) of a run, both views of its first pairs."""
    from sklearn.manifold import TSNE

    which = f", the first {T_SNE_ARMS} of {len(planes)}" if len(planes) > T_SNE_ARMS else ""
    planes = dict(itertools.islice(planes.items(), T_SNE_ARMS))
    columns = min(3, len(planes))
    figure, panels = canvas(math.ceil(len(planes) / columns), columns, width=1 + 2.8 * columns)
    for axes in panels[len(planes) :]:
        axes.remove()
    for axes, (arm, (seed, *views)) in zip(panels, planes.items(), strict=False):
        points = np.concatenate([view[:T_SNE_PAIRS] for view in views]).astype(np.float32)
        # scikit-learn divides by the spread along PCA's first axis, which collapsed embeddings do not have.
        init = "pca" if np.ptp(points, axis=0).any() else "random"
        near = min(30.0, (len(points) - 1) / 3)
        # So few points are done sooner with all their distances than by scikit-learn's approximation.
        plane = TSNE(perplexity=near, init=init, method="exact", max_iter=500, random_state=0).fit_transform(points)
        for name, half, colour, marker in zip(("Text", "Code"), np.split(plane, 2), COLOURS, MARKERS, strict=False):
            axes.scatter(*half.T, s=8, color=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
        axes.set_title(plain(textwrap.fill(f"{arm}, seed {seed}", 34)), fontsize=9)
        axes.set(xticks=[], yticks=[])
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, markerscale=2)
    what = f"the views of at most {T_SNE_PAIRS} pairs, one seed an arm{which}"
    caption = f"t-SNE of {what}; distances between planes mean nothing"
    return finish(figure, "t_sne", caption)


# ---------------------------------------------------------------------------------------------- shared with evaluate.py

T_SNE_MIN_POINTS = 10  # with fewer there are no neighborhoods to preserve
PALETTE = (
    ("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#E69F00", "D"), ("#CC79A7", "v"),
    ("#56B4E9", "P"), ("#000000", "X"), ("#332288", "*"), ("#882255", "<"), ("#999933", ">"),
)  # fmt: skip


def t_sne(points: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """t-SNE of points (N, D) in two dimensions: ((N, 2), perplexity), the same for the same seed."""
    from sklearn.manifold import TSNE

    # scikit-learn divides by the variance along the first principal component, which is 0 for collapsed embeddings.
    init = "pca" if np.ptp(points, axis=0).any() else "random"
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(points), perplexity


def t_sne_png(groups: dict[str, np.ndarray], title: str) -> bytes:
    """A PNG of each group's points (·, 2) in a t-SNE plane, with a legend."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[])
    axes.set_title(title, parse_math=False)
    size = float(np.clip(20000 / sum(map(len, groups.values())), 6, 40))
    for (name, xy), (color, marker) in zip(groups.items(), itertools.cycle(PALETTE), strict=False):
        label = f"{name} ({len(xy)})"
        axes.scatter(*xy.T, s=size, color=color, marker=marker, alpha=0.6, linewidths=0, label=label)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, markerscale=(60 / size) ** 0.5)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
