"""The pictures of a report show the runs' figures, and say what is missing or damaged."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from synthetic_runs import JEPA, REGULAR, change, export_views, log_steps, synthetic_arm

from llm_jepa.cli import UsageError
from llm_jepa.reports import plots
from llm_jepa.reports.results import Table, compare_arms, main, read_runs

FEW = {82: 90.0, 23: 80.0}


@pytest.fixture
def figures(monkeypatch) -> dict:
    """The figures that are drawn, by their names."""
    drawn: dict = {}

    def keep(figure, name, caption):
        drawn[name] = (figure, caption)
        return plots.Picture(name, caption, b"")

    monkeypatch.setattr(plots, "finish", keep)
    return drawn


def table(runs: list[str]) -> Table:
    results, problems = read_runs([Path(run) for run in runs])
    assert not problems
    return compare_arms(results, None, set())[0][0]


def both(root: Path) -> list[str]:
    """A regular arm with the seeds 82 and 23, and a JEPA arm with 23, 82 and 4."""
    better = {23: 81.0, 82: 92.0, 4: 70.0}
    return synthetic_arm(root, "regular", REGULAR, FEW) + synthetic_arm(root, "jepa", JEPA, better)


def test_dots_of_a_seed_are_joined(tmp_path, figures):
    drawn = plots.Drawn()
    plots.paired_dots(table(both(tmp_path)), drawn)
    axes = figures["scores"][0].axes
    assert [a.get_ylabel() for a in axes] == ["exact, %", "startswith, %", "stop_rate, %"]
    lines = [[None if math.isnan(y) else y for y in line.get_ydata()] for line in axes[0].lines]
    assert lines == [[None, 70.0], [80.0, 81.0], [90.0, 92.0]], "seeds 4, 23, 82"
    dots = [sorted(d.get_offsets()[:, 1]) for d in axes[0].collections if len(d.get_offsets()) > 1]
    assert dots == [[80.0, 90.0], [70.0, 81.0, 92.0]]
    assert [t.get_text() for t in axes[0].get_xticklabels()] == ["regular", "JEPA λ=1, k=1"]
    assert axes[2].get_ylim()[1] <= 100.5


def test_training_curves_are_means_of_blocks(tmp_path, figures):
    runs = both(tmp_path)
    for run in runs:
        log_steps(run, 600)
    drawn = plots.Drawn()
    plots.training_curves(table(runs), drawn)
    axes = figures["training"][0].axes
    assert [len(a.lines) for a in axes] == [5, 3, 3, 3], "a line a run, and regular runs have no views"
    losses = [json.loads(line)["lm_loss"] for line in (Path(runs[0]) / "metrics.jsonl").read_text().splitlines()[:-1]]
    first = axes[0].lines[0]
    assert first.get_ydata() == pytest.approx(np.reshape(losses, (150, 4)).mean(axis=1))
    assert first.get_xdata()[:2] == pytest.approx([2.5, 6.5])
    assert axes[0].get_yscale() == "log" and axes[2].get_yscale() == "linear"
    assert {a.get_xlabel() for a in axes} == {"optimiser steps"}
    colours = [line.get_color() for line in axes[0].lines]
    assert len(set(colours[:2])) == len(set(colours[2:])) == 1 and colours[0] != colours[2], "a colour an arm"


@pytest.mark.parametrize("n", [1, 149, 150, 151, 1000])
def test_blocks_keep_the_mean(n):
    steps, values = np.arange(1.0, n + 1), np.random.default_rng(n).normal(size=n)
    x, y = plots.blocks(steps, values)
    size = math.ceil(n / plots.POINTS)
    assert len(x) == len(y) == math.ceil(n / size) <= plots.POINTS
    assert y == pytest.approx([values[i : i + size].mean() for i in range(0, n, size)])
    assert x == pytest.approx([steps[i : i + size].mean() for i in range(0, n, size)])


def test_a_step_that_a_resumed_run_repeated_counts_once(tmp_path):
    rows = [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5)]
    text = "".join(json.dumps({"step": s, "lm_loss": loss, "loss": 9.0}) + "\n" for s, loss in rows)
    (tmp_path / "metrics.jsonl").write_text(text + json.dumps({"step": 3, "eval_lm_loss": 7.0}) + "\n")
    read = plots.read_metrics(tmp_path)
    assert read == [{"step": 1, "lm_loss": 3.0}, {"step": 2, "lm_loss": 2.5}, {"step": 3, "lm_loss": 1.0}]


@pytest.mark.parametrize("line", ['{"step": 2, "lm', "[]", '{"lm_loss": 1.0}', '{"step": 2, "lm_loss": "x"}', "\x00"])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 3.0}\n' + line)
    with pytest.raises(UsageError, match=r"metrics\.jsonl:2: no line of metrics"):
        plots.read_metrics(tmp_path)


def test_costs_of_the_runs_that_counted_them(tmp_path, figures):
    runs = both(tmp_path)
    for run in runs[:3]:
        log_steps(run, 100)
    log_steps(runs[3], 100, flops=False)
    drawn = plots.Drawn()
    plots.costs(table(runs), drawn)
    figure, caption = figures["costs"]
    flops, seconds = figure.axes
    assert [d.get_offsets().tolist() for d in flops.collections] == [[[1.0, 90.0], [1.0, 80.0]], [[2.0, 81.0]]]
    assert flops.get_xlabel() == "training, $10^{14}$ floating-point operations"
    assert [len(d.get_offsets()) for d in seconds.collections] == [2, 3]
    assert seconds.collections[0].get_offsets().tolist() == [[125.0, 90.0], [122.0, 80.0]]
    assert "2 runs counted no FLOPs" in caption and not drawn.missing


def test_without_counted_operations_time_is_left(tmp_path, figures):
    drawn = plots.Drawn()
    plots.costs(table(both(tmp_path)), drawn)
    assert [a.get_xlabel() for a in figures["costs"][0].axes] == ["training, seconds of wall time"]
    assert "python finetune.py --track_flop" in drawn.missing[0]


def cells(root: Path, which: list[tuple[int, float]]) -> list[str]:
    runs = synthetic_arm(root, "regular", REGULAR, FEW)
    for k, lbd in which:
        exact = {seed: value + k + 3 * lbd for seed, value in FEW.items()}
        runs += synthetic_arm(root, f"k{k}-lbd{lbd}", JEPA | {"predictors": k, "lbd": lbd}, exact)
    return runs


def test_the_map_shows_means_at_their_k_and_lambda(tmp_path, figures):
    runs = cells(tmp_path, [(2, 1.0), (0, 0.5), (2, 0.5), (0, 1.0), (1, 1.0)])
    drawn = plots.Drawn()
    plots.grid(table(runs), drawn)
    figure, caption = figures["grid"]
    axes = figure.axes[0]
    shown = axes.images[0].get_array().filled(np.nan)
    assert shown == pytest.approx(np.array([[86.5, np.nan, 88.5], [88.0, 89.0, 90.0]]), nan_ok=True)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.5", "1"]
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert texts[(2, 0)] == "88.5\nn = 2" and texts[(1, 0)] == "not run"
    assert "regular: 85.0 %" in caption and not drawn.missing


@pytest.mark.parametrize(
    "which", [[(1, 1.0)], [(0, 1.0), (1, 1.0), (2, 1.0)], [(0, 1.0), (1, 1.0), (2, 2.0), (0, 3.0)]]
)
def test_there_is_no_map_of_fewer_than_two_by_two(tmp_path, figures, which):
    drawn = plots.Drawn()
    plots.grid(table(cells(tmp_path, which)), drawn)
    assert not figures and "bash run.sh run_jepa" in drawn.missing[0]


def test_singular_values_are_of_the_difference_of_the_views(tmp_path, figures):
    runs = both(tmp_path)
    paths = [export_views(run, seed=i) for i, run in enumerate(runs[1:4])]
    drawn = plots.Drawn()
    plots.embeddings(table(runs), drawn)
    (axes,) = figures["singular_values"][0].axes
    assert len(axes.lines) == 3 and axes.get_yscale() == "log"
    views = load_file(paths[0])
    expected = np.linalg.svd(views["text"].astype(np.float64) - views["code"], compute_uv=False)
    assert axes.lines[0].get_ydata() == pytest.approx(expected) and axes.lines[0].get_xdata()[0] == 1
    planes = figures["t_sne"][0].axes
    assert [a.get_title() for a in planes] == ["regular, seed 23", "JEPA λ=1, k=1, seed 23"]
    assert [[len(c.get_offsets()) for c in a.collections] for a in planes] == [[40, 40], [40, 40]]


def test_collapsed_views_are_drawn(tmp_path, figures):
    runs = both(tmp_path)
    from safetensors.numpy import save_file

    same = np.ones((12, 4), dtype=np.float32)
    path = export_views(runs[0])
    save_file({"text": same, "code": same}, path, {"layer": "-1", "pooling": "last", "data_sha256": "5c44"})
    drawn = plots.Drawn()
    plots.embeddings(table(runs), drawn)
    assert set(figures) == {"singular_values", "t_sne"} and not drawn.damaged


def test_views_are_asked_for_with_a_command_of_evaluate_py(tmp_path, figures):
    import evaluate

    drawn = plots.Drawn()
    plots.embeddings(table(both(tmp_path)), drawn)
    (line,) = drawn.missing
    script, *flags = line.split("python ")[1].split()
    settings, given = evaluate.parse_flags(evaluate.Settings, "", flags)
    evaluate.check_settings(settings, given)
    assert script == "evaluate.py" and settings.export_embeddings == "RUN/eval/synth/embeddings.safetensors"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: export_views(path.parents[2], data_sha256="c1d2"), "of other rows"),
        (lambda path: export_views(path.parents[2], layer="0"), "but the first run's are"),
        (lambda path: export_views(path.parents[2], pairs=20), "but the first run's are"),
    ],
)
def test_views_that_cannot_be_used_are_named(tmp_path, capsys, damage, reason):
    runs = both(tmp_path)
    paths = [export_views(run) for run in runs]
    damage(paths[3])
    assert main([*runs, "--output_dir", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert str(paths[3]) in err and reason in err and err.count("\n") == 1
    assert reason in (tmp_path / "out" / "report.md").read_text()


def test_damaged_metrics_are_named_once_and_the_scores_still_compared(tmp_path, capsys):
    runs = both(tmp_path)
    for run in runs:
        log_steps(run, 20)
    with open(Path(runs[0]) / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lm_lo')
    assert main([*runs, "--output_dir", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert f"{runs[0]}/metrics.jsonl:22: no line of metrics" in err and err.count("\n") == 1
    made = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"][0]
    assert made["comparisons"][0]["n"] == 2


def test_pictures_without_data_are_a_line_each(tmp_path):
    assert main([*both(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
    missing = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"][0]["missing_pictures"]
    commands = ("finetune.py --output_dir", "finetune.py --track_flop", "run.sh run_jepa", "evaluate.py --model_name")
    assert len(missing) == 4 and all(command in line for command, line in zip(commands, missing, strict=True))
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(line.replace("'", "&#x27;") in page for line in missing)


def test_no_two_arms_look_alike(tmp_path):
    runs = []
    for k, lbd in itertools.product(range(11), (1.0, 2.0)):
        runs += synthetic_arm(tmp_path, f"{k}-{lbd}", JEPA | {"predictors": k, "lbd": lbd}, {82: 1.0})
    runs += synthetic_arm(tmp_path, "regular", REGULAR, {82: 1.0})
    looks = plots.styles(table(runs)).values()
    for one, other in itertools.combinations(looks, 2):
        assert (one["color"], one["marker"]) != (other["color"], other["marker"])
        assert (one["color"], one["linestyle"]) != (other["color"], other["linestyle"])


def test_runs_with_the_task_score_are_drawn_by_it(tmp_path, figures):
    runs = both(tmp_path)
    for run in runs:
        change(run, "eval/synth/metrics.json", scores=["dfa_equal"], score="dfa_equal", dfa_equal=0.5)
    plots.costs(table(runs), plots.Drawn())
    assert figures["costs"][0].axes[0].get_ylabel() == "dfa_equal, %"
