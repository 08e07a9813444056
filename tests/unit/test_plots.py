"""The figures show the runs' values, and report which data is missing or damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from synthetic_runs import FEW, JEPA, REGULAR, export_views, log_steps, one_arm, two_arms

from llm_jepa.report import main
from llm_jepa.reports import plots
from llm_jepa.reports.comparison import Table, compare_arms
from llm_jepa.reports.results import read_runs

NITP = REGULAR | {"nitp": True}
BETTER = {23: 81.0, 82: 92.0, 4: 70.0}


@pytest.fixture
def figures(monkeypatch) -> dict:
    """The axes of the panels, except the legend, and the caption of each figure that is drawn."""
    drawn: dict = {}

    def add(self, name, caption, panels):
        drawn[name] = ([axes for text, axes in panels.items() if "Legend" not in text], caption)
        self.figures.append(name)

    monkeypatch.setattr(plots.Drawn, "add", add)
    return drawn


def table(runs: list[str]) -> Table:
    results, problems = read_runs([Path(run) for run in runs])
    assert not problems
    return compare_arms(results, None, set())[0][0]


def draw(plot, runs: list[str]) -> plots.Drawn:
    drawn = plots.Drawn()
    plot(table(runs), drawn)
    return drawn


def test_result_shows_differences_and_which_are_significant(tmp_path, figures):
    exact = {23: 80.0, 82: 90.0, 4: 70.0}
    better = {seed: value + 2 + seed / 1000 for seed, value in exact.items()}
    runs = two_arms(tmp_path, exact, {23: 81.0, 82: 88.0, 4: 72.0}) + one_arm(tmp_path, "nitp", NITP, better)
    draw(plots.plot_differences, runs)
    (axes,) = figures["differences"][0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["JEPA λ=1, k=1", "NITP λ=0.8"]
    (seeds, interval, mean), (_, narrow, other) = axes.collections[:3], axes.collections[3:]
    assert sorted(seeds.get_offsets()[:, 0]) == pytest.approx([-2.0, 1.0, 2.0])
    means = [collection.get_offsets()[0, 0] for collection in (mean, other)]
    assert means == pytest.approx([1 / 3, 2.0363], abs=1e-3)
    low, high = interval.get_segments()[0][:, 0]
    assert low < -4 and high > 5 and 1.8 < narrow.get_segments()[0][0, 0] < 2.0363
    fills = [tuple(m.get_facecolor()[0]) == tuple(m.get_edgecolor()[0]) for m in (mean, other)]
    assert fills == [False, True]  # filled only if significant


def test_training_curves_are_block_means(tmp_path, figures):
    runs = two_arms(tmp_path, FEW, BETTER)
    for run in runs:
        log_steps(run, 602)
    draw(plots.plot_training, runs)
    axes = figures["training"][0]
    assert [len(a.lines) for a in axes] == [5, *[3] * 5]  # one line per run; regular runs have no views
    losses = [json.loads(line)["lm_loss"] for line in (Path(runs[0]) / "metrics.jsonl").read_text().splitlines()[:-1]]
    first = axes[0].lines[0]
    assert first.get_ydata() == pytest.approx([np.mean(losses[i : i + 5]) for i in range(0, 602, 5)])
    assert first.get_xdata()[[0, 1, -1]] == pytest.approx([3.0, 8.0, 601.5])
    assert axes[0].get_yscale() == "log" and axes[2].get_yscale() == "linear"
    looks = {(line.get_label(), line.get_color(), line.get_marker()) for line in axes[0].lines}
    assert [len({look[i] for look in looks}) for i in range(3)] == [2, 2, 2]  # arms differ also without color


def test_repeated_step_counts_once(tmp_path):
    runs = one_arm(tmp_path, "a", JEPA, {82: 90.0})
    logged = ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5))
    rows = [{"step": step, "lm_loss": loss, "loss": 9.0, "label_tokens": 8} for step, loss in logged]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 3, "eval_lm_loss": 7.0}])
    (Path(runs[0]) / "metrics.jsonl").write_text(text)
    ((_, _, steps),) = plots.training_steps(table(runs), [])
    assert steps[["step", "lm_loss"]].to_numpy().tolist() == [[1, 3.0], [2, 2.5], [3, 1.0]]


def test_costs_show_wall_time_and_counted_flops(tmp_path, figures):
    runs = two_arms(tmp_path, FEW, BETTER)
    assert "--track_flop" in draw(plots.plot_costs, runs).missing[0]
    assert len(figures["costs"][0]) == 1
    for run in runs[:3]:
        log_steps(run, 100)
    log_steps(runs[3], 100, flops=False)
    assert not draw(plots.plot_costs, runs).missing
    seconds, flops = figures["costs"][0]
    assert [d.get_offsets().tolist() for d in flops.collections] == [[[1e14, 90.0], [1e14, 80.0]], [[2e14, 81.0]]]
    assert seconds.collections[0].get_offsets().tolist() == [[125.0, 90.0], [122.0, 80.0]]


def test_grid_shows_means_at_their_k_and_lambda(tmp_path, figures):
    runs = one_arm(tmp_path, "regular", REGULAR, FEW)
    for k, lbd in [(2, 1.0), (0, 0.5), (2, 0.5), (0, 1.0), (1, 1.0)]:
        exact = {seed: value + k + 3 * lbd for seed, value in FEW.items()}
        runs += one_arm(tmp_path, f"k{k}-lbd{lbd}", JEPA | {"predictors": k, "lbd": lbd}, exact)
    drawn = draw(plots.plot_grid, runs)
    (axes,), caption = figures["grid"]
    means = axes.images[0].get_array().filled(np.nan)
    assert means == pytest.approx(np.array([[86.5, np.nan, 88.5], [88.0, 89.0, 90.0]]), nan_ok=True)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.5", "1"]
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert texts[(2, 0)] == "88.5\nn = 2" and (1, 0) not in texts
    assert "regular: 85.0 %" in caption and not drawn.missing


def test_singular_values_are_of_the_difference_of_the_views(tmp_path, figures):
    runs = two_arms(tmp_path, FEW, BETTER)
    paths = [export_views(run, seed=i) for i, run in enumerate(runs[1:4])]
    draw(plots.plot_embeddings, runs)
    (axes,) = figures["singular_values"][0]
    assert len(axes.lines) == 3 and axes.get_yscale() == "log"
    views = load_file(paths[0])
    expected = np.linalg.svd(views["text"].astype(np.float64) - views["code"], compute_uv=False)
    assert axes.lines[0].get_ydata() == pytest.approx(expected) and axes.lines[0].get_xdata()[0] == 1
    planes = figures["t_sne"][0]
    assert [a.get_title() for a in planes] == ["regular, seed 23", "JEPA λ=1, k=1, seed 23"]
    assert [[len(c.get_offsets()) for c in a.collections] for a in planes] == [[40, 40], [40, 40]]


@pytest.mark.parametrize("how", [None, {"data_sha256": "c1d2"}, {"layer": "0"}, {"pairs": 20}], ids=str)
def test_unusable_views_are_reported(tmp_path, figures, how):
    runs = two_arms(tmp_path)
    for run in runs:
        path = export_views(run)
    export_views(runs[3], **how) if how else path.write_bytes(path.read_bytes()[:100])
    (problem,) = draw(plots.plot_embeddings, runs).damaged
    assert runs[3] in problem and len(figures["singular_values"][0][0].lines) == 3


def test_missing_and_damaged_data_is_in_the_report(tmp_path, capsys):
    runs = two_arms(tmp_path)
    (Path(runs[0]) / "metrics.jsonl").write_text('{"step": 21, "lm_lo')
    assert main([*runs, "--output_dir", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert f"{runs[0]}/metrics.jsonl" in err and err.count("\n") == 1
    made = json.loads((tmp_path / "out" / "report.json").read_text())["datasets"][0]
    commands = ("finetune.py --output_dir", "finetune.py --track_flop", "run.sh run_jepa", "evaluate.py --model_name")
    assert made["comparisons"][0]["n"] == 2
    assert all(command in line for command, line in zip(commands, made["missing_figures"], strict=True))
    assert "RUN/eval/synth/embeddings.safetensors" in made["missing_figures"][3]
