"""Which arms the report compares, with which reference, and what it refuses."""

import html
import json
from pathlib import Path

import pytest
from synthetic_runs import FEW, JEPA, METRICS, REGULAR, change, one_arm, pretrained_run, two_arms

from llm_jepa.report import main
from llm_jepa.reports import writer
from llm_jepa.reports.plots import Drawn

EXACT = {82: 92.15, 23: 79.45, 37: 92.90, 84: 95.00, 4: 78.90}  # RESULTS.md
BETTER = {82: 95.50, 23: 79.90, 37: 91.90, 84: 95.95, 4: 78.90}


@pytest.fixture
def report(tmp_path, capsys, monkeypatch):
    """Writes a report of the runs without figures: (exit code, its datasets by name, stderr)."""
    monkeypatch.setattr(writer, "draw", lambda table: Drawn())

    def write(runs: list[str], *flags: str) -> tuple[int, dict[str, dict], str]:
        file = tmp_path / "out" / "report.json"
        file.unlink(missing_ok=True)
        code = main([*runs, "--output_dir", str(file.parent), *flags])
        datasets = json.loads(file.read_text())["datasets"] if file.exists() else []
        return code, {d["dataset"]: d for d in datasets}, capsys.readouterr().err

    return write


def test_arms_are_paired_by_seed_with_the_regular_arm(tmp_path, report):
    runs = two_arms(tmp_path, EXACT, dict(reversed(BETTER.items())))
    code, found, _ = report([*runs[5:], *runs[:5]])
    assert code == 0 and list(found["synth"]["arms"]) == ["regular", "JEPA λ=1, k=1"]
    exact, startswith, stop_rate = found["synth"]["comparisons"]
    assert [c["score"] for c in (exact, startswith, stop_rate)] == ["exact", "startswith", "stop_rate"]
    differences = dict(zip(exact["seeds"], exact["differences"], strict=True))
    assert differences == pytest.approx({s: BETTER[s] - EXACT[s] for s in EXACT})
    assert exact["interval"] == pytest.approx([-1.26, 2.76], abs=0.005)
    assert (exact["mean"], exact["family"], exact["p_holm"]) == (pytest.approx(0.75), 1, exact["p_two_sided"])
    assert {(c["family"], c["p_two_sided"]) for c in (startswith, stop_rate)} == {(0, None)}


def test_arms_without_a_common_seed_are_not_compared(tmp_path, report):
    code, found, err = report(two_arms(tmp_path, {82: 90.0}, {23: 80.0}))
    assert code == 1 and "no seed is in both" in err and not found["synth"]["comparisons"]


def test_holm_corrects_per_data_set(tmp_path, report):
    runs = two_arms(tmp_path, EXACT, BETTER) + one_arm(tmp_path, "k2", JEPA | {"predictors": 2}, BETTER)
    for name, settings in (("regular", REGULAR), ("jepa", JEPA)):
        runs += one_arm(tmp_path, f"turk-{name}", settings, FEW, dataset="turk")
    _, found, _ = report(runs)
    families = {name: [c["family"] for c in d["comparisons"]] for name, d in found.items()}
    assert families == {"synth": [2, 0, 0] * 2, "turk": [1, 0, 0]}


METHODS = {  # by their labels
    "JEPA λ=2, k=1": {"lbd": 2.0}, "JEPA λ=1, k=1, last_token=-2": {"last_token": -2},
    "JEPA infonce λ=1, k=1": {"infonce": True}, "JEPA λ=1, k=1, reverse_pred": {"reverse_pred": True},
    "JEPA λ=1, k=1, text_view=in_chat": {"text_view": "in_chat"}, "JEPA λ=1, k=1, sigreg=0.05": {"sigreg": 0.05},
    "JEPA λ=1, k=1, layout=additive": {"layout": "additive", "additive_mask": True},
    "JEPA clip λ=1, k=1, negatives_queue=64, temperature=0.2":
        {"jepa_loss": "clip", "temperature": 0.2, "negatives_queue": 64},
    "JEPA clip (shuffled pairs) λ=1, k=1": {"jepa_loss": "clip", "shuffle_pairs": True},
    "JEPA clip λ=1, k=1 + NITP λ=1": {"jepa_loss": "clip", "nitp": True, "nitp_lbd": 1.0},
    "NITP λ=0.8, nitp_layer=1, nitp_targets=random":
        {"regular": True, "nitp": True, "nitp_layer": 1, "nitp_targets": "random"},
    "STP geodesic λ=0.02": {"regular": True, "stp": "geodesic", "stp_lbd": 0.02},
    "JEPA λ=1, k=1, same_flop": {"same_flop": True},
    "JEPA λ=1, k=1 + STP geodesic λ=0.02": {"stp": "geodesic", "stp_lbd": 0.02},
}  # fmt: skip


def test_arms_may_differ_in_the_method_and_are_labeled_by_it(tmp_path, report):
    runs = one_arm(tmp_path, "regular", REGULAR, {82: 90.0})
    for i, method in enumerate(METHODS.values()):
        runs += one_arm(tmp_path, f"jepa{i}", JEPA | method, {82: 91.0})
    for run in runs[-2:]:  # --same_flop trains other numbers of steps
        change(run, "run.json", steps=800 if "same_flop" in Path(run, "args.json").read_text() else 2000)
    code, found, err = report(runs)
    assert code == 0, err
    assert list(found["synth"]["arms"]) == ["regular", *METHODS]
    assert {c["arm"] for c in found["synth"]["comparisons"]} == METHODS.keys()


# What else runs may differ in: the file, its new value and how the report shows both values.
OTHER = {
    "git_commit": ("run.json", {"git_commit": "4d5f"}, "'df01d15302ad41e7a9a4b4abdfa05be1820da814'", "'4d5f'"),
    "versions.torch": ("run.json", {"versions": {"python": "3.11.7", "torch": "2.12"}}, "'2.13.0+cpu'", "'2.12'"),
    "device": ("run.json", {"device": "NVIDIA H100"}, "'x86_64'", "'NVIDIA H100'"),
    "steps": ("run.json", {"steps": 1999}, "2000", "1999"),
    "train_data": ("run.json", {"data_sha256": {"train.jsonl": "c1d2"}}, "['b0a8']", "['c1d2']"),
    "test_data": (METRICS, {"data_sha256": "c1d2"}, "'5c44'", "'c1d2'"),
    "evaluation.max_new_tokens": (METRICS, {"settings": {"max_new_tokens": 64}}, "128", "64"),
    "lora": ("args.json", {"lora": True}, "False", "True"),
}


@pytest.mark.parametrize("name", OTHER)
def test_arms_that_differ_in_more_than_the_method_are_compared_only_if_allowed(tmp_path, report, name):
    runs = two_arms(tmp_path, {82: 90.0})
    file, changes, old, new = OTHER[name]
    change(runs[1], file, **changes)
    code, found, err = report(runs)
    difference = f"{name} {old} in {runs[0]} and {new} in {runs[1]}"
    assert code == 1 and err.count("\n") == 1 and err.strip().endswith(f": {difference}")
    assert found["synth"]["comparisons"] == [] and list(found["synth"]["not_compared"].values()) == [difference]
    code, found, _ = report(runs, "--allow", name)
    assert (code, len(found["synth"]["comparisons"])) == (0, 3)
    assert list(found["synth"]["allowed"].values()) == [[difference]]


def test_the_same_uncommitted_change_is_comparable(tmp_path, report):
    runs = two_arms(tmp_path)
    for name in ("run.json", METRICS):
        for run in runs:
            change(run, name, git_dirty=True, code_sha256="aa")
    assert report(runs)[0] == 0
    for name in ("run.json", METRICS):
        change(runs[-1], name, code_sha256="bb")
        code, found, err = report(runs)
        assert code == 1 and "code_sha256 'aa'" in err and not found["synth"]["comparisons"]
        change(runs[-1], name, code_sha256=None)  # of an older version
        assert report(runs)[0] == 1
        change(runs[-1], name, code_sha256="aa")
    for run in runs:  # without git: a checksum of the sources
        change(run, "run.json", git_commit=None, git_dirty=None)
    assert report(runs)[0] == 0


def test_allow_accepts_groups_but_no_parts_of_names(tmp_path, report):
    runs = two_arms(tmp_path, {82: 90.0}, lora_rank=4)
    for name in ("versions.torch", "device", "lora"):
        change(runs[1], OTHER[name][0], **OTHER[name][1])
    assert report(runs, "--allow", "versions", "device", "lora")[0] == 1  # lora is not lora_rank
    code, found, _ = report(runs, "--allow", "versions", "device", "--allow", "lora", "lora_rank")
    assert code == 0 and [len(names) for names in found["synth"]["allowed"].values()] == [4]
    code, _, err = report(runs, "--allow", "dev", "lora")
    assert code == 2 and "--allow dev:" in err


def test_two_regular_arms_need_a_reference(tmp_path, report):
    runs = two_arms(tmp_path) + one_arm(tmp_path, "other", REGULAR | {"learning_rate": 2e-3}, FEW)
    code, found, err = report(runs)
    assert code == 2 and not found and "regular; regular, learning_rate=0.002" in err and "--against" in err
    code, found, err = report(runs + one_arm(tmp_path, "turk", REGULAR, FEW, dataset="turk"))
    assert code == 1 and list(found) == ["turk"] and "synth: " in err  # other datasets are reported


@pytest.mark.parametrize("against", ["k=1", "jepa-s82", "./jepa-s82/"])
def test_against_selects_the_reference_by_label_run_name_or_path(tmp_path, report, against, monkeypatch):
    runs = two_arms(tmp_path) + one_arm(tmp_path, "more", JEPA | {"predictors": 2}, FEW)
    monkeypatch.chdir(tmp_path)
    _, found, _ = report(runs, "--against", against)
    assert found["synth"]["reference"] == next(iter(found["synth"]["arms"])) == "JEPA λ=1, k=1"
    assert {c["arm"] for c in found["synth"]["comparisons"]} == {"regular", "JEPA λ=1, k=2"}
    assert found["synth"]["comparisons"][0]["mean"] == -1.0


@pytest.mark.parametrize(("against", "count"), [("nothing", 0), ("JEPA", 2)])
def test_against_must_match_one_arm(tmp_path, report, against, count):
    runs = two_arms(tmp_path) + one_arm(tmp_path, "more", JEPA | {"predictors": 2}, FEW)
    code, found, err = report(runs, "--against", against)
    assert code == 2 and not found and f"--against {against} matches {count} " in err


NEW_FLAGS = {"jepa_loss": "cosine", "temperature": None, "shuffle_pairs": False, "nitp": False, "gradient_stats": 0}


def test_runs_without_the_newer_flags_are_of_the_same_arm(tmp_path, report):
    old = two_arms(tmp_path, {82: 90.0}) + one_arm(tmp_path, "l2", JEPA | {"jepa_l2": True}, {82: 91.0})
    new = []
    for name, settings in (("r", REGULAR), ("j", JEPA), ("n", JEPA | {"jepa_l2": False})):
        flags = NEW_FLAGS | ({"jepa_loss": "l2"} if name == "n" else {})
        new += one_arm(tmp_path, name, settings | flags, {23: 92.0})
    code, found, _ = report(old + new)
    sizes = {arm: len(runs) for arm, runs in found["synth"]["arms"].items()}
    assert code == 0 and sizes == {"regular": 2, "JEPA λ=1, k=1": 2, "JEPA l2 λ=1, k=1": 2}


def test_order_of_the_data_files_does_not_matter(tmp_path, report):
    runs = two_arms(tmp_path, {82: 90.0, 23: 91.0})
    for run, files in zip(map(Path, runs), (("a", "b"), ("b", "a")) * 2, strict=True):
        change(run, "args.json", train_file="a", eval_file="b")
        change(run, "run.json", data_sha256={name: f"checksum of {name}" for name in files})
    code, found, _ = report(runs)
    assert code == 0 and [len(runs) for runs in found["synth"]["arms"].values()] == [2, 2]
    change(runs[-1], "args.json", train_file="b", eval_file="a")
    assert report(runs)[0] == 1, "trained on the other file"


def test_an_arm_is_compared_with_its_own_placebo_without_correction(tmp_path, report):
    clip = JEPA | {"jepa_loss": "clip"}
    runs = two_arms(tmp_path, EXACT) + one_arm(tmp_path, "clip", clip, BETTER)
    runs += one_arm(tmp_path, "placebo", clip | {"shuffle_pairs": True}, EXACT)
    synth = report(runs)[1]["synth"]
    (placebo,) = synth["placebos"]
    assert (placebo["arm"], placebo["reference"]) == ("JEPA clip λ=1, k=1", "JEPA clip (shuffled pairs) λ=1, k=1")
    assert placebo["mean"] == pytest.approx(0.75) and placebo["interval"] == pytest.approx([-1.26, 2.76], abs=0.005)
    assert (placebo["family"], placebo["p_two_sided"]) == (0, None)
    assert {c["family"] for c in synth["comparisons"] if c["score"] == "exact"} == {3}
    for name in ("report.md", "report.html"):
        page = " ".join(html.unescape((tmp_path / "out" / name).read_text()).split())
        assert placebo["verdict"] in page and "+0.75 points" in placebo["verdict"]
    change(runs[-1], "run.json", device="NVIDIA H100")  # a placebo that is not compared with the reference
    assert report(runs)[1]["synth"]["placebos"] == []


def test_pretrained_arms_are_compared_by_their_pretraining(tmp_path, report):
    runs = [pretrained_run(tmp_path, "regular", REGULAR, seed, exact) for seed, exact in FEW.items()]
    jepa = JEPA | {"lbd": 0.5}
    runs += [pretrained_run(tmp_path, "jepa", jepa, seed, exact + 2) for seed, exact in FEW.items()]
    first = report(runs)[1]["synth"]["comparisons"][0]
    assert first["mean"] == 2.0 and "pretraining.lbd=0.5" in first["arm"]
    code, _, err = report([*runs[:2], *one_arm(tmp_path, "jepa", JEPA, FEW)])
    assert code == 1 and "pretrained True in" in err and "pretraining." not in err
