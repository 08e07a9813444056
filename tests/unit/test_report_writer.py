"""The files of a report: report.md, report.json and report.html."""

import base64
import html
import json
import re
from pathlib import Path

import pytest
from conftest import snapshot
from synthetic_runs import FEW, JEPA, METRICS, REGULAR, add_learning, change, export_views, log_steps, one_arm, two_arms
from test_comparison import BETTER, EXACT

from llm_jepa.report import main

FILES = ["report.html", "report.json", "report.md"]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "made" / "report"


def paragraphs(folder: Path) -> list[str]:
    """The paragraphs and lists of report.md, each in one line, and the lines of its tables without padding."""
    blocks = (folder / "report.md").read_text().replace("|\n|", "|\n\n|").split("\n\n")
    return [" ".join(block.split()) for block in blocks]


def test_tables_and_headline_have_the_figures(tmp_path, out):
    runs = two_arms(tmp_path, EXACT, BETTER)
    change(runs[5], METRICS, failures={"timeout": 3})
    change(runs[5], "run.json", git_commit="4d5f")
    assert main([*runs, "--output_dir", str(out), "--allow", "git_commit"]) == 0
    lines = paragraphs(out)
    verdict = json.loads((out / "report.json").read_text())["datasets"][0]["comparisons"][0]["verdict"]
    assert lines[1] == f"synth, exact: {verdict}; auxiliary terms not measured: JEPA λ=1, k=1."
    for line in (
        "| regular | reference | – | – | – | 87.68 ± 7.84 | 5 |",
        "| JEPA λ=1, k=1 | not significant | +0.75 | [−1.26, 2.76] | 0.36 | 88.43 ± 8.40 | 5 |",
        "| regular | 5 | 87.68 ± 7.84 | 90.00 ± 0.00 | 100.00 ± 0.00 | 122.60 ± 1.95 |",
        "| JEPA λ=1, k=1 | exact | 5 | +0.75 | [−1.26, 2.76] | 0.36 | 0.18 | 0.5 (≥ 0.062) | 0.36 |",
        "| JEPA λ=1, k=1 | stop_rate | 5 | 0.00 | – | – | – | – | – |",
        f"| JEPA λ=1, k=1 | 82 | 95.50 | 90.00 | 100.00 | 145.00 | 4d5f | {runs[5]} | without a result: 3 timeout |",
    ):
        assert line in lines, line
    page = html.unescape((out / "report.html").read_text())
    assert verdict in page and "[−1.26, 2.76]" in page


def test_markdown_fits_a_terminal(tmp_path, out):
    runs = two_arms(tmp_path, EXACT, BETTER)
    assert main([*runs, "--output_dir", str(out)]) == 0
    *shown, _ = (out / "report.md").read_text().split("### Every run")  # its lines have paths
    tables = [block.splitlines() for block in shown[0].split("\n\n") if block.startswith("|")]
    assert max(map(len, shown[0].splitlines())) <= 120 and len(tables) == 4
    for rows in tables:
        assert len({tuple(i for i, c in enumerate(row) if c == "|") for row in rows}) == 1  # columns are aligned


GAIN = {seed: value + x for (seed, value), x in zip(EXACT.items(), (2.0, 2.2, 1.9, 2.1, 2.3), strict=True)}
FLOOR = dict.fromkeys(FEW, 0.0)


@pytest.mark.parametrize(
    ("regular", "jepa", "k2", "expected"),
    [(EXACT, GAIN, BETTER, ["1 of 2 arms differs", "JEPA λ=1, k=1 +2.10 points [1.90, 2.30];"]),
     (FLOOR, FLOOR, FEW, ["no arm", "k=2 +85.00 points", "nothing can show: JEPA λ=1, k=1 (0 %);"])],
)  # fmt: skip
def test_headline_lists_arms_that_differ_or_cannot(tmp_path, out, regular, jepa, k2, expected):
    runs = two_arms(tmp_path, regular, jepa) + one_arm(tmp_path, "k2", JEPA | {"predictors": 2}, k2)
    assert main([*runs, "--output_dir", str(out)]) == 0
    headline = paragraphs(out)[1]
    assert headline.startswith(f"synth, exact: {expected[0]}") and all(text in headline for text in expected), headline


def test_headline_and_table_say_what_the_terms_have_learned(tmp_path, out):
    runs = two_arms(tmp_path) + one_arm(tmp_path, "clip", JEPA | {"jepa_loss": "clip", "nitp": True}, FEW)
    runs += one_arm(tmp_path, "nitp", REGULAR | {"nitp": True}, FEW)
    for run, cosine in zip(runs[2:6], (0.1, 0.1, 0.8, 0.1), strict=True):
        add_learning(run, cosine, r1=cosine / 2)
    add_learning(runs[6], 0.8, r1=0.0, term="nitp")
    assert main([*runs, "--output_dir", str(out)]) == 0
    lines = paragraphs(out)
    assert lines[1].endswith(
        "; auxiliary terms learned in no run: JEPA λ=1, k=1; learned in 1 of 2 runs: JEPA of JEPA clip λ=1, k=1 + NITP "
        "λ=0.8; not measured: NITP of JEPA clip λ=1, k=1 + NITP λ=0.8; learned in all runs: NITP λ=0.8."
    )
    both = "| JEPA clip λ=1, k=1 + NITP λ=0.8"
    for line in (
        "| JEPA λ=1, k=1 | JEPA | 0 of 2 | 0.1 | 0.1 | 0.1 | 5 | 0.25 | 0.05 | 0.025 | 0.0005 |",
        f"{both} | JEPA | 1 of 2 | 0.45 | 0.1 | 0.45 | 5 | 0.25 | 0.225 | 0.1125 | 0.0005 |",
        f"{both} | NITP | not measured | – | – | – | – | – | 0.225 | 0.1125 | 0.0005 |",
        "| NITP λ=0.8 | NITP | 1 of 1 | 0.8 | 0.1 | – | – | 0.25 | 0 | 0 | 0.0005 |",
    ):
        assert line in lines, line
    assert "<td>1 of 2</td>" in (out / "report.html").read_text()


def test_only_the_three_files_are_written_and_repeat_byte_for_byte(tmp_path, out):
    runs = two_arms(tmp_path)
    for run in runs:
        log_steps(run, 50)
    before = snapshot(tmp_path)
    assert main(runs) == 0 and snapshot(tmp_path) == before
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    for folder in (out, tmp_path / "again"):
        assert main([*runs, "--output_dir", str(folder)]) == 0
    assert before.items() <= snapshot(tmp_path).items()
    assert sorted(p.name for p in out.iterdir()) == ["notes.txt", *FILES]
    assert [(out / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in FILES] == [True] * 3


def test_output_dir_must_be_a_folder_without_a_run(tmp_path, capsys):
    runs = two_arms(tmp_path)
    before = snapshot(tmp_path)
    assert main(["--output_dir", *runs]) == 2  # what the shell makes of --output_dir runs/*
    assert f"--output_dir {runs[0]}" in capsys.readouterr().err and snapshot(tmp_path) == before
    (tmp_path / "file").write_text("mine")
    assert main([*runs, "--output_dir", str(tmp_path / "file")]) == 2


def test_skipped_runs_are_in_all_files(tmp_path, out, capsys):
    runs = two_arms(tmp_path, EXACT, BETTER)
    (Path(runs[7]) / METRICS).unlink()
    assert main([*runs, "--output_dir", str(out)]) == 1
    (problem,) = json.loads((out / "report.json").read_text())["left_out"]
    assert runs[7] in problem and capsys.readouterr().err == f"report.py: {problem}\n"
    assert f"- {problem}" in paragraphs(out) and problem in html.unescape((out / "report.html").read_text())


def test_nothing_is_written_without_runs_and_no_comparison_with_one_arm(tmp_path, out):
    (run,) = one_arm(tmp_path, "a", REGULAR, {82: 50.0})
    assert main([run, "--output_dir", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["datasets"][0]["reference"] is None
    assert "learn" not in (out / "report.md").read_text().split("## How to read")[0]  # there is no term
    (Path(run) / METRICS).unlink()
    assert main([run, "--output_dir", str(out / "second")]) == 1 and not (out / "second").exists()


def test_page_is_self_contained_and_has_every_figure(tmp_path, out):
    runs = one_arm(tmp_path, "regular", REGULAR, FEW)
    for k in (1, 2):
        for lbd in (1.0, 2.0):
            runs += one_arm(tmp_path, f"{k}-{lbd}", JEPA | {"predictors": k, "lbd": lbd}, FEW)
    for i, run in enumerate(runs):
        log_steps(run, 60, seed=i)
    export_views(runs[0], 20), export_views(runs[2], 20)
    assert main([*runs, "--output_dir", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["datasets"][0]["missing_figures"] == []
    page = (out / "report.html").read_text()
    images = re.findall(r'<img alt="[^"]+" src="([^"]*)">', page)
    figures = ["differences", "training", "singular_values", "t_sne", "costs", "grid"]
    assert re.findall(r'<figure class="(\w+)"', page) == figures and len(images) == page.count("<img")
    assert not re.search(r"<script|<link|<iframe|href=|@import|url\(", page)
    for source in images:
        svg = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()
        assert not re.search(r'(href="|url\()(?!#|data:)', svg)


def test_text_of_the_runs_is_neither_markup_nor_formula(tmp_path, out):
    system = "It costs $5_{ or\n$6 <b>|x" + " and more" * 20
    runs = two_arms(tmp_path / "<i>", {82: 90.0}, system=system)
    change(runs[0], "args.json", system=None)
    export_views(runs[0], 20), export_views(runs[1], 20)
    assert main([*runs, "--output_dir", str(out), "--allow", "system"]) == 0
    label = "JEPA λ=1, k=1, system=It costs $5_{ or $6 <b>|x and more and m"
    page = (out / "report.html").read_text()
    assert html.escape(label) in page and html.escape(runs[0]) in page and not re.search("<[bi]>", page)
    assert any(line.startswith(f"| {label} | not tested |".replace("|x", "\\|x")) for line in paragraphs(out))
