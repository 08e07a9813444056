"""report.py --output_dir: what is compared with what, what is refused, and the files that come of it."""

import base64
import json
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import JEPA, REGULAR, change, export_views, log_steps, synthetic_arm, synthetic_run

from llm_jepa.reports import writer
from llm_jepa.reports.results import main

METRICS = "eval/synth/metrics.json"
EXACT = {82: 92.15, 23: 79.45, 37: 92.90, 84: 95.00, 4: 78.90}
BETTER = {82: 95.50, 23: 79.90, 37: 91.90, 84: 95.95, 4: 78.90}
FEW = {82: 90.0, 23: 80.0}
FILES = ["report.html", "report.json", "report.md"]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "made" / "report"


def both(root: Path, exact: dict = FEW, better: dict | None = None, **changes) -> list[str]:
    """Run folders of a regular and a JEPA arm; `changes` replace settings of the latter."""
    better = better or {seed: value + 1 for seed, value in exact.items()}
    return synthetic_arm(root, "regular", REGULAR, exact) + synthetic_arm(root, "jepa", JEPA | changes, better)


def read(out: Path, dataset: int = 0) -> dict:
    return json.loads((out / "report.json").read_text())["datasets"][dataset]


def snapshot(folder: Path) -> dict[str, tuple]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


# -------------------------------------------------------------------------------------------------------- compare


def test_arms_are_paired_by_seed_with_the_regular_one(tmp_path, out, capsys):
    runs = both(tmp_path, EXACT, dict(reversed(BETTER.items())))  # the seeds in another order
    assert main([*runs[5:], *runs[:5], "--output_dir", str(out)]) == 0
    made = read(out)
    assert made["reference"] == "regular" and list(made["arms"]) == ["regular", "JEPA λ=1, k=1"]
    exact, startswith, stop_rate = made["comparisons"]
    assert exact["score"] == "exact" and exact["mean"] == pytest.approx(0.75)
    assert [round(x, 2) for x in exact["interval"]] == [-1.26, 2.76]
    assert dict(zip(exact["seeds"], exact["differences"], strict=True)) == pytest.approx(
        {s: BETTER[s] - EXACT[s] for s in EXACT}
    )
    assert (startswith["score"], stop_rate["score"]) == ("startswith", "stop_rate")
    assert (
        "no difference shown: +0.75 points [−1.26, 2.76], n = 5, p = 1 after Holm's correction over 3"
        in exact["verdict"]
    )
    for name in ("report.md", "report.html"):
        assert exact["verdict"].split(";")[0] in (out / name).read_text().replace("&#x27;", "'")
    printed = capsys.readouterr().out
    assert "mean ± sd (n = 5)" in printed and printed.endswith(f"{out / 'report.html'}\n")


def test_the_tables_hold_the_figures(tmp_path, out):
    main([*both(tmp_path, EXACT, BETTER), "--output_dir", str(out)])
    lines = (out / "report.md").read_text().splitlines()
    assert "| regular | 5 | 87.68 ± 7.84 | 90.00 ± 0.00 | 100.00 ± 0.00 | 122.60 ± 1.95 |" in lines
    assert "| JEPA λ=1, k=1 | exact | 5 | +0.75 | [−1.26, 2.76] | 0.36 | 0.18 | 0.5 (≥ 0.062) | 1 |" in lines, (
        "seeds of RESULTS.md"
    )
    assert "| JEPA λ=1, k=1 | stop_rate | 5 | 0.00 | – | – | – | 1 (≥ 0.062) | – |" in lines


def test_a_score_that_is_exact_match_by_another_name_is_one_column(tmp_path, out):
    runs = both(tmp_path)
    for run in runs:
        change(run, METRICS, scores=["exact"], score="exact")
    assert main([*runs, "--output_dir", str(out)]) == 0
    assert [c["score"] for c in read(out)["comparisons"]] == ["exact", "startswith", "stop_rate"]


def test_task_score_comes_first(tmp_path, out):
    arms = ((REGULAR, "r", 0), (JEPA, "j", 2))
    runs = [
        str(synthetic_run(tmp_path / f"{name}{s}", settings, s, {"exact": 70.0, "dfa_equal": 80.0 + gain + s / 100}))
        for settings, name, gain in arms
        for s in (1, 2, 3)
    ]
    assert main([*runs, "--output_dir", str(out)]) == 0
    comparisons = read(out)["comparisons"]
    assert [c["score"] for c in comparisons] == ["dfa_equal", "exact", "startswith", "stop_rate"]
    assert comparisons[0]["mean"] == pytest.approx(2.0)


def test_seeds_of_one_arm_alone_are_named(tmp_path, out):
    runs = both(tmp_path, {82: 90.0, 23: 80.0, 37: 85.0}, {23: 81.0, 37: 85.5, 4: 70.0})
    assert main([*runs, "--output_dir", str(out)]) == 0
    assert read(out)["comparisons"][0]["seeds"] == [23, 37]
    text = (out / "report.md").read_text()
    assert (
        "Not in the pairs of JEPA λ=1, k=1 and regular: seed 4 in JEPA λ=1, k=1 alone, seed 82 in regular alone."
        in text
    )


def test_arms_without_a_seed_in_common_are_not_compared(tmp_path, out, capsys):
    assert main([*both(tmp_path, {82: 90.0}, {23: 80.0}), "--output_dir", str(out)]) == 1
    assert "no seed is in both JEPA λ=1, k=1 and regular" in capsys.readouterr().err
    assert read(out)["comparisons"] == []


def test_one_pair_is_no_test(tmp_path, out):
    assert main([*both(tmp_path, {82: 90.0}), "--output_dir", str(out)]) == 0
    assert "nothing shown: +1.00 points on the one seed of both arms" in (out / "report.md").read_text()


def test_holm_corrects_over_all_comparisons_of_a_dataset(tmp_path, out):
    runs = both(tmp_path, EXACT, BETTER) + synthetic_arm(tmp_path, "k2", JEPA | {"predictors": 2}, BETTER)
    assert main([*runs, "--output_dir", str(out)]) == 0
    comparisons = read(out)["comparisons"]
    assert len(comparisons) == 6 and {c["family"] for c in comparisons} == {6}
    assert all("over 6 comparisons" in c["verdict"] for c in comparisons if c["p_holm"])


def test_datasets_are_compared_apart(tmp_path, out):
    runs = []
    for dataset, gain in (("synth", 1.0), ("turk", 3.0)):
        for name, settings, more in (("regular", REGULAR, 0), ("jepa", JEPA, gain)):
            exact = {seed: value + more for seed, value in FEW.items()}
            runs += synthetic_arm(tmp_path, f"{dataset}-{name}", settings, exact, dataset=dataset)
    assert main([*runs, "--output_dir", str(out)]) == 0
    for i, (dataset, gain) in enumerate((("synth", 1.0), ("turk", 3.0))):
        made = read(out, i)
        assert made["dataset"] == dataset and made["comparisons"][0]["mean"] == gain
        assert {c["family"] for c in made["comparisons"]} == {3}


METHODS = [
    {"lbd": 2.0}, {"predictors": 3}, {"last_token": -2}, {"jepa_l2": True}, {"jepa_mse": True}, {"infonce": True},
    {"front_pred": True}, {"reverse_pred": True}, {"text_view": "in_chat"}, {"jepa_ratio": 0.5},
    {"layout": "additive", "additive_mask": True}, {"same_flop": True},
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: next(iter(m)))
def test_arms_may_differ_in_the_method(tmp_path, out, method):
    assert main([*both(tmp_path, **method), "--output_dir", str(out)]) == 0
    assert len(read(out)["comparisons"]) == 3


def test_arms_of_the_same_flops_take_other_steps(tmp_path, out):
    runs = both(tmp_path, same_flop=True)
    for run in runs[2:]:
        change(run, "run.json", steps=800)
    assert main([*runs, "--output_dir", str(out)]) == 0
    assert len(read(out)["comparisons"]) == 3


def made_otherwise(run: str, name: str) -> None:
    """Changes one thing of a run that is no part of the method."""
    record, evaluation = "run.json", json.loads((Path(run) / METRICS).read_text())["settings"]
    {
        "git_commit": lambda: change(run, record, git_commit="4d5fcd5"),
        "versions.torch": lambda: change(run, record, versions={"python": "3.11.7", "torch": "2.12.0"}),
        "device": lambda: change(run, record, device="NVIDIA H100"),
        "processes": lambda: change(run, record, processes=2),
        "skipped_examples": lambda: change(run, record, skipped_examples=5),
        "steps": lambda: change(run, record, steps=1999),
        "train_data": lambda: change(run, record, data_sha256={"datasets/synth_train.jsonl": "c1d2"}),
        "test_data": lambda: change(run, METRICS, data_sha256="c1d2"),
        "databases": lambda: change(run, METRICS, databases_sha256="c1d2"),
        "n": lambda: change(run, METRICS, n=100),
        "evaluation.max_new_tokens": lambda: change(run, METRICS, settings=evaluation | {"max_new_tokens": 64}),
        "evaluation.versions.torch": lambda: change(run, METRICS, versions={"python": "3.11.7", "torch": "2.12.0"}),
        "evaluation.git_commit": lambda: change(run, METRICS, git_commit="4d5fcd5"),
        "learning_rate": lambda: change(run, "args.json", learning_rate=0.002),
        "gamma": lambda: change(run, "args.json", gamma=0.5),
        "lora": lambda: change(run, "args.json", lora=True),
    }[name]()  # fmt: skip


VALUES = {
    "git_commit": ("'df01d15302ad41e7a9a4b4abdfa05be1820da814'", "'4d5fcd5'"),
    "versions.torch": ("'2.13.0+cpu'", "'2.12.0'"),
    "device": ("'x86_64'", "'NVIDIA H100'"),
    "processes": ("1", "2"),
    "skipped_examples": ("0", "5"),
    "steps": ("2000", "1999"),
    "train_data": ("['b0a8']", "['c1d2']"),
    "test_data": ("'5c44'", "'c1d2'"),
    "databases": ("None", "'c1d2'"),
    "n": ("2000", "100"),
    "evaluation.max_new_tokens": ("128", "64"),
    "evaluation.versions.torch": ("'2.13.0+cpu'", "'2.12.0'"),
    "evaluation.git_commit": ("'df01d15302ad41e7a9a4b4abdfa05be1820da814'", "'4d5fcd5'"),
    "learning_rate": ("0.001", "0.002"),
    "gamma": ("None", "0.5"),
    "lora": ("None", "True"),
}


@pytest.mark.parametrize("name", VALUES)
def test_arms_that_differ_in_more_are_refused_unless_allowed(tmp_path, out, capsys, name):
    runs = both(tmp_path)
    for run in runs[2:]:
        made_otherwise(run, name)
    assert main([*runs, "--output_dir", str(out)]) == 1
    ours, theirs = VALUES[name]
    said = f"{name} {ours} in {runs[0]} and {theirs} in {runs[2]}"
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and ";" not in err, "and nothing else differs"
    assert read(out)["comparisons"] == [] and said in (out / "report.md").read_text()

    assert main([*runs, "--output_dir", str(out), "--allow", name]) == 0
    assert len(read(out)["comparisons"]) == 3
    text = (out / "report.md").read_text()
    assert "is compared though it differs in more than the method (--allow): " + said in text


@pytest.mark.parametrize("odd", range(4))
def test_one_run_of_an_arm_that_was_made_otherwise_is_enough(tmp_path, out, capsys, odd):
    runs = both(tmp_path)
    change(runs[odd], "run.json", git_commit="4d5fcd5")
    assert main([*runs, "--output_dir", str(out)]) == 1
    assert f"'4d5fcd5' in {runs[odd]}" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("git_dirty", True), ("git_commit", None)])
def test_unknown_code_is_no_common_code(tmp_path, out, capsys, name, value):
    runs = both(tmp_path)
    for run in runs:
        change(run, "run.json", **{name: value})
    assert main([*runs, "--output_dir", str(out)]) == 1
    assert f"{name} {value} in {runs[0]}" in capsys.readouterr().err
    assert main([*runs, "--output_dir", str(out), "--allow", name]) == 0


def test_allow_takes_several_names_and_whole_groups(tmp_path, out):
    runs = both(tmp_path)
    for run in runs[2:]:
        for name in ("versions.torch", "device", "learning_rate"):
            made_otherwise(run, name)
    command = [*runs, "--output_dir", str(out), "--allow"]
    assert main([*command, "versions", "device"]) == 1
    assert main([*command, "versions", "device", "--allow", "learning_rate"]) == 0
    assert [len(names) for names in read(out)["allowed"].values()] == [3]
    assert main([*command, "versions.torch", "dev", "learning_rate"]) == 2, "a part of a name is no name"


def test_allow_means_the_whole_name(tmp_path, out, capsys):
    runs = both(tmp_path, lora=True, lora_rank=4)
    for run in runs[:2]:
        change(run, "args.json", lora=True, lora_rank=16)
    assert main([*runs, "--output_dir", str(out), "--allow", "lora"]) == 1
    assert "lora_rank 16 in" in capsys.readouterr().err


def test_unknown_names_to_allow_are_refused(tmp_path, out, capsys):
    assert main([*both(tmp_path), "--output_dir", str(out), "--allow", "git_sha"]) == 2
    assert "--allow git_sha: nothing of this name" in capsys.readouterr().err and not out.exists()


# ------------------------------------------------------------------------------------------------------ reference


def test_two_regular_arms_need_a_name(tmp_path, out, capsys):
    runs = both(tmp_path) + synthetic_arm(tmp_path, "other", REGULAR | {"learning_rate": 2e-3}, FEW)
    assert main([*runs, "--output_dir", str(out)]) == 2
    err = capsys.readouterr().err
    assert "there are 2 of its arms (regular; regular learning_rate 0.002)" in err and "--against" in err
    assert not out.exists()
    assert main([*runs, "--output_dir", str(out), "--against", "other", "--allow", "learning_rate"]) == 0
    assert read(out)["reference"] == "regular learning_rate 0.002"


def test_a_dataset_whose_reference_is_unknown_does_not_hold_up_the_others(tmp_path, out, capsys):
    other = synthetic_arm(tmp_path, "other", REGULAR | {"learning_rate": 2e-3}, FEW)
    turk = [*synthetic_arm(tmp_path, "turk", REGULAR, FEW), *synthetic_arm(tmp_path, "turk-jepa", JEPA, FEW)]
    for run in turk:
        (Path(run) / "eval" / "synth").rename(Path(run) / "eval" / "turk")
    assert main([*both(tmp_path), *other, *turk, "--output_dir", str(out)]) == 1
    assert "synth: the regular arm is the reference, and there are 2 of its arms" in capsys.readouterr().err
    assert read(out)["dataset"] == "turk" and read(out)["comparisons"]


def test_semantic_tube_prediction_is_a_method_and_no_regular_arm(tmp_path, out):
    tube = {"stp": "geodesic", "stp_lbd": 0.02}
    runs = both(tmp_path) + synthetic_arm(tmp_path, "stp", REGULAR | tube, FEW)
    runs += synthetic_arm(tmp_path, "sum", JEPA | tube, FEW)
    assert main([*runs, "--output_dir", str(out)]) == 0
    made = read(out)
    assert list(made["arms"])[:2] == ["regular", "JEPA λ=1, k=1"]
    assert [name.startswith(("STP geodesic", "JEPA + STP geodesic λ=1, k=1")) for name in made["arms"]][2:] == [
        True
    ] * 2
    assert len({c["arm"] for c in made["comparisons"]}) == 3


@pytest.mark.parametrize("against", ["k=1", "jepa-s82", "RUN"])
def test_against_names_the_reference(tmp_path, out, against):
    runs = both(tmp_path) + synthetic_arm(tmp_path, "more", JEPA | {"predictors": 2}, FEW)
    against = runs[3] if against == "RUN" else against
    assert main([*runs, "--output_dir", str(out), "--against", against]) == 0
    made = read(out)
    assert made["reference"] == "JEPA λ=1, k=1" and next(iter(made["arms"])) == "JEPA λ=1, k=1"
    assert {c["arm"] for c in made["comparisons"]} == {"regular", "JEPA λ=1, k=2"}
    assert made["comparisons"][0]["mean"] == -1.0, "the arm's less the reference's"


@pytest.mark.parametrize(("against", "count"), [("nothing", 0), ("JEPA", 2)])
def test_against_must_name_one_arm(tmp_path, out, capsys, against, count):
    runs = both(tmp_path) + synthetic_arm(tmp_path, "more", JEPA | {"predictors": 2}, FEW)
    assert main([*runs, "--output_dir", str(out), "--against", against]) == 2
    assert f"--against {against} names {count} of its arms" in capsys.readouterr().err and not out.exists()


def test_arms_without_a_regular_one_need_a_name(tmp_path, out, capsys):
    runs = [r for k in (1, 2) for r in synthetic_arm(tmp_path, f"k{k}", JEPA | {"predictors": k}, FEW)]
    assert main([*runs, "--output_dir", str(out)]) == 2
    assert "there are 0 of its arms (JEPA λ=1, k=1; JEPA λ=1, k=2)" in capsys.readouterr().err


def test_one_arm_alone_is_reported_without_comparisons(tmp_path, out):
    assert main([*synthetic_arm(tmp_path, "jepa", JEPA, FEW), "--output_dir", str(out)]) == 0
    assert read(out)["reference"] is None and "nothing to compare it with" in (out / "report.md").read_text()


def test_pretrained_arms_are_compared_by_how_they_were_pretrained(tmp_path, out, capsys):
    runs = []
    for name, settings, gain in (("regular", REGULAR, 0), ("jepa", JEPA | {"lbd": 0.5}, 2)):
        for seed, exact in FEW.items():
            base = tmp_path / f"paraphrase-{name}-s{seed}"
            base.mkdir()
            (base / "args.json").write_text(json.dumps(settings | {"finetune_seed": seed, "output_dir": str(base)}))
            (base / "run.json").write_text(json.dumps({"data_sha256": {"paraphrase_train.jsonl": "aa"}}))
            tuned = REGULAR | {"model_name": str(base)}
            runs.append(str(synthetic_run(tmp_path / f"tuned-{base.name}", tuned, seed, {"exact": exact + gain})))
    assert main([*runs, "--output_dir", str(out)]) == 0
    made = read(out)
    assert made["comparisons"][0]["mean"] == 2.0 and "pretraining.lbd 0.5" in made["comparisons"][0]["arm"]
    alone = synthetic_arm(tmp_path, "alone", JEPA, FEW)
    assert main([*runs[:2], *alone, "--output_dir", str(out)]) == 1
    err = capsys.readouterr().err
    assert "pretrained True in" in err and "pretraining." not in err


@pytest.mark.parametrize(
    "flags", [["--against", "regular"], ["--allow", "n"], ["--line", "--output_dir", "x"]], ids=lambda f: f[0]
)
def test_flags_that_would_do_nothing_are_refused(tmp_path, flags):
    run = synthetic_arm(tmp_path, "a", JEPA, {82: 50.0})
    with pytest.raises(SystemExit) as stopped:
        main([*run, *flags])
    assert stopped.value.code == 2


def test_a_run_folder_is_no_place_for_a_report(tmp_path, capsys):
    runs = both(tmp_path)
    before = snapshot(tmp_path)
    assert main(["--output_dir", *runs]) == 2, "as a shell's runs/* gives it the first run"
    assert f"--output_dir {runs[0]} is a run folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert main([*runs, "--output_dir", str(tmp_path / "file")]) == 2
    (tmp_path / "file").unlink()
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------- files


def test_three_files_are_written_and_nothing_else(tmp_path, out):
    runs = both(tmp_path)
    before = snapshot(tmp_path)
    assert main(runs) == 0 and snapshot(tmp_path) == before, "nothing without the flag"
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    assert main([*runs, "--output_dir", str(out)]) == 0
    after = snapshot(tmp_path)
    assert {p: after[p] for p in before} == before
    assert sorted(p.name for p in out.iterdir()) == ["notes.txt", *FILES]
    assert (out / "notes.txt").read_text() == "mine"


def test_the_same_runs_give_the_same_bytes(tmp_path, out):
    runs = both(tmp_path)
    for run in runs:
        log_steps(run, 50)
    for folder in (out, tmp_path / "again"):
        main([*runs, "--output_dir", str(folder)])
    assert [(out / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in FILES] == [True] * 3


def test_a_report_that_fails_leaves_the_last_one_whole(tmp_path, out, monkeypatch):
    runs = both(tmp_path)
    main([*runs, "--output_dir", str(out)])
    before = snapshot(out)

    def broken(blocks):
        raise RuntimeError("no page")

    monkeypatch.setattr(writer, "as_html", broken)
    with pytest.raises(RuntimeError):
        main([*runs[:2], "--output_dir", str(out)])
    assert snapshot(out) == before


def damaged_empty(run: Path) -> None:
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damaged_empty, "run.json: cannot be read"),
        (lambda run: change(run, "run.json", status="running"), "running, not finished"),
        (lambda run: (run / METRICS).unlink(), "not evaluated"),
        (lambda run: (run / METRICS).write_text('{"task": "syn'), "cannot be read"),
        (lambda run: (run / "args.json").write_text("[]"), "args.json: no valid finetune_seed"),
    ],
)
def test_a_damaged_run_is_named_in_the_report_too(tmp_path, out, capsys, damage, reason):
    runs = both(tmp_path, EXACT, BETTER)
    damage(Path(runs[7]))
    assert main([*runs, "--output_dir", str(out)]) == 1
    err = capsys.readouterr().err
    assert runs[7] in err and reason in err and err.count("\n") == 1
    record = json.loads((out / "report.json").read_text())
    assert len(record["left_out"]) == 1 and reason in record["left_out"][0]
    assert read(out)["comparisons"][0]["reference_alone"] == [37]
    for name in ("report.md", "report.html"):
        assert reason in (out / name).read_text()


def test_nothing_is_written_where_no_run_is_left(tmp_path, out, capsys):
    (run,) = synthetic_arm(tmp_path, "a", JEPA, {82: 50.0})
    (Path(run) / METRICS).unlink()
    assert main([run, "--output_dir", str(out)]) == 1
    assert "nothing is written" in capsys.readouterr().err and not out.exists()


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def images(page: Page) -> dict[str, str]:
    """The SVG of each picture by its name."""
    start = "data:image/svg+xml;base64,"
    found = {a["id"]: a["src"] for tag, a in page.elements if tag == "img"}
    assert all(src.startswith(start) for src in found.values())
    return {name: base64.b64decode(src.removeprefix(start)).decode() for name, src in found.items()}


def test_the_page_needs_nothing_else_and_holds_every_picture(tmp_path, out):
    runs = synthetic_arm(tmp_path, "regular", REGULAR, FEW)
    for k in (1, 2):
        for lbd in (1.0, 2.0):
            runs += synthetic_arm(tmp_path, f"{k}-{lbd}", JEPA | {"predictors": k, "lbd": lbd}, FEW)
    for i, run in enumerate(runs):
        log_steps(run, 60, seed=i)
    export_views(runs[0], 20), export_views(runs[2], 20)
    assert main([*runs, "--output_dir", str(out)]) == 0
    assert read(out)["missing_pictures"] == []
    page = Page((out / "report.html").read_text())
    pictures = images(page)
    assert list(pictures) == ["scores", "training", "costs", "grid", "singular_values", "t_sne"]
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base"}
    for _, attributes in page.elements:
        assert not {name for name in attributes if name in ("href", "srcset", "action")}
    assert "@import" not in (out / "report.html").read_text() and "url(" not in (out / "report.html").read_text()
    for name, svg in pictures.items():
        root = xml.etree.ElementTree.fromstring(svg)
        for element in root.iter():
            for key, value in element.attrib.items():
                if key.endswith("href"):
                    assert value.startswith(("#", "data:")), name
                assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", value)), name


def test_text_of_the_runs_is_no_markup(tmp_path, out):
    runs = both(tmp_path / "<i>", model_name="<b>|x")
    for run in runs[:2]:
        change(run, "args.json", model_name="<b>|x")
    assert main([*runs, "--output_dir", str(out)]) == 0
    page = Page((out / "report.html").read_text())
    assert "<b>|x" in page.text and runs[0] in page.text
    assert not {"b", "i"} & {tag for tag, _ in page.elements}


def test_text_of_the_runs_is_no_formula_and_not_long(tmp_path, out):
    runs = both(tmp_path, system="It costs $5_{ or\n$6" + " and more" * 20)
    export_views(runs[0], 20), export_views(runs[2], 20)
    for run in runs:
        log_steps(run, 20)
    for run in runs[:2]:
        change(run, "args.json", system=None)
    assert main([*runs, "--output_dir", str(out), "--allow", "system"]) == 0
    assert list(read(out)["arms"])[1] == "JEPA λ=1, k=1, system It costs $5_{ or $6 and more and more an"


def test_answers_without_a_result_and_commits_are_shown(tmp_path, out):
    runs = both(tmp_path)
    change(runs[2], METRICS, failures={"timeout": 3})
    main([*runs, "--output_dir", str(out)])
    text = (out / "report.md").read_text()
    assert "JEPA λ=1, k=1, seed 82, without a result: 3 timeout" in text
    assert f"| df01d153 | {runs[0]} |" in text
