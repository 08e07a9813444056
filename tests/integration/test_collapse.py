"""A run says whether its auxiliary terms have learned: on the console, in metrics.jsonl and in run.json."""

from pathlib import Path

import pytest
from conftest import call, interrupted, metrics, start
from synthetic_runs import change

from llm_jepa.files import read_json
from llm_jepa.training.diagnostics import MARGIN, MIN_COUNT, announcements, judge

STEPS = 60
METHODS = {"cosine": (), "clip": ("--jepa_loss", "clip"), "nitp": ("--regular", "--nitp"),
           "shuffled nitp": ("--regular", "--nitp", "--nitp_targets", "shuffled"),
           "placebo": ("--jepa_loss", "clip", "--shuffle_pairs"), "regular": ("--regular",)}  # fmt: skip
COLLAPSED = ("cosine", "shuffled nitp", "placebo")


def begin(data: Path, out: Path, method: str) -> str:
    """Trains from random parameters; returns what the run has said of terms on the console."""
    jepa = () if "--regular" in METHODS[method] else ("--lbd", 1)
    done = start(data, out, "--pretrain", "--max_steps", STEPS, "--learning_rate", "3e-3", "--batch_size", 8,
                 "--grad_accum", 1, "--save_strategy", "steps", "--save_steps", 25, "--save_total_limit", 9,
                 "--keep_checkpoints", *jepa, *METHODS[method], code=0)  # fmt: skip
    return said(done.err)


def said(err: str) -> str:
    return "\n".join(line for line in err.splitlines() if " term " in line)


def learned(run: Path) -> dict:
    return read_json(run / "run.json")["learned"]


def announced(run: Path) -> list[tuple[int, str]]:
    """The steps and keys of the lines of metrics.jsonl that say that a term has not learned."""
    return [(line["step"], key) for line in metrics(run, "step") for key in line if key.endswith("_collapsed")]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """A run of each method, which a test must not change, and what it has said."""
    folder = tmp_path_factory.mktemp("runs")
    return {m: (folder / m, begin(data, folder / m, m)) for m in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_term_that_has_not_learned_is_announced_once_and_others_never(runs, method):
    run, text = runs[method]
    term = "nitp" if "nitp" in method else "jepa"
    assert text.count("has not learned") == len(announced(run)) == (method in COLLAPSED)
    assert text.count("has learned") == (method not in (*COLLAPSED, "regular"))
    if method in COLLAPSED:
        ((step, key),) = announced(run)
        assert STEPS / 2 <= step < STEPS and key == f"{term}_collapsed" and term.upper() in text
    expected = {} if method == "regular" else {term: method in COLLAPSED}
    assert {name: found["collapsed"] for name, found in learned(run).items()} == expected


def test_run_that_learned_after_the_announcement_says_so(data, tmp_path, monkeypatch):
    early = lambda history, line, steps: {"jepa_collapsed": 1} if line["step"] == 36 else {}  # noqa: E731
    monkeypatch.setattr("llm_jepa.training.diagnostics.announcements", early)
    first, last = begin(data, tmp_path / "run", "clip").splitlines()
    assert "step 36 of 60" in first and "has learned its pairs" in last


def test_final_judgement_is_that_of_the_last_lines(runs):
    run, _ = runs["clip"]
    found, last = learned(run)["jepa"], metrics(run)[-MIN_COUNT // 8 :]
    assert found["pairs"] == 8 * len(last) >= MIN_COUNT
    for key in ("cosine", "cosine_shuffled", "retrieval", "effective_rank"):
        assert found[key] == pytest.approx(sum(line[key] for line in last) / len(last), rel=1e-6), key
    ratios = [line["jepa_grad_ratio"] for line in metrics(run) if "jepa_grad_ratio" in line]
    assert found["grad_ratio"] == pytest.approx(sum(ratios) / len(ratios))


@pytest.mark.parametrize("step", [25, 50])
def test_resumed_run_says_the_same_and_nothing_twice(runs, tmp_path, step):
    run, text = runs["cosine"]
    again = interrupted(run, step, tmp_path / "again")
    change(again, "run.json", learned=...)
    done = call("finetune", "--resume", again, code=0)
    assert said(done.err) == (text if step == 25 else "")
    assert announced(again) == announced(run) and learned(again) == learned(run)


def test_run_that_stops_early_is_judged_by_the_steps_that_it_took(data, tmp_path):
    run = tmp_path / "run"
    done = start(data, run, "--pretrain", "--lbd", 1, "--jepa_loss", "clip", "--shuffle_pairs", "--max_steps", 1000,
                 "--learning_rate", 1, "--eval_file", data, "--eval_strategy", "steps", "--eval_steps", 10,
                 "--early_stopping_patience", 1, "--save_strategy", "steps", "--save_steps", 10, "--keep_checkpoints",
                 code=0)  # fmt: skip
    last = metrics(run, "label_tokens")[-1]["step"]
    assert last < 100 and learned(run)["jepa"]["collapsed"]
    assert announced(run) == [(last, "jepa_collapsed")] and said(done.err).count("has not learned") == 1
    again = interrupted(run, last, tmp_path / "again")
    assert said(call("finetune", "--resume", again, code=0).err).count("has not learned") == 1
    assert learned(again) == learned(run)


# ------------------------------------------------------------------------------------------------------- judgement


def history(effects: list, every: int = 1, pairs: int = 8, sd: float = 0.1, retrieval: float = 0) -> list[dict]:
    """Lines of a training with c − s = effect · σ in each line."""
    fixed = {"label_tokens": 9, "cosine_shuffled": 0.2, "cosine_shuffled_sd": sd, "pairs": pairs,
             "retrieval_chance": 1 / pairs, "effective_rank": 5.0}  # fmt: skip
    found = [{"cosine": 0.2 + x * sd, "retrieval": retrieval or (0.9 if x > MARGIN else 0.5)} for x in effects]
    return [fixed | {"step": every * (i + 1)} | figures for i, figures in enumerate(found)]


JUDGED = {  # the lines of a training, its steps, and whether the term has collapsed: None is too early to tell
    "below the margin": (history([MARGIN - 0.1] * 100), 100, True),
    "below the margin, but retrieved": (history([MARGIN - 0.1] * 100, retrieval=0.56), 100, False),
    "above the margin": (history([MARGIN + 0.1] * 100), 100, False),
    "below, by a small σ": (history([MARGIN - 0.1] * 100, sd=1e-5), 100, True),
    "above, by a small σ": (history([MARGIN + 0.1] * 100, sd=1e-5), 100, False),
    "retrieval near chance": (history([5.0] * 100, retrieval=1 / 8 + 0.07), 100, True),  # 80 pairs: 1 / 8 + 0.074
    "retrieval above chance": (history([5.0] * 100, retrieval=1 / 8 + 0.08), 100, False),
    "equal views": (history([0.0] * 100, sd=0.0, retrieval=1 / 8), 100, True),
    "learned in the last tenth": (history([0.0] * 90 + [5.0] * 10), 100, False),
    "collapsed in the last tenth": (history([5.0] * 90 + [0.0] * 10), 100, True),
    "at half of the steps": (history([0.0] * 40 + [5.0] * 10), 100, False),
    "a line about all steps": (history([5.0], every=100, pairs=100), 100, None),
    "the second of two lines": (history([0.0, 5.0], every=50, pairs=100), 100, False),
    "only lines of the start": (history([0.0] * 5), 100, None),
    "24 steps of 2 pairs": (history([5.0] * 40, pairs=2), 40, None),  # after two fifths of the steps
    "30 steps of 2 pairs": (history([5.0] * 50, pairs=2, retrieval=1.0), 50, False),
}


@pytest.mark.parametrize("case", JUDGED)
def test_term_is_judged_by_the_margin_and_retrieval_of_the_last_tenth_with_enough_pairs(case):
    lines, max_steps, expected = JUDGED[case]
    found = judge(lines, max_steps)
    assert (found["jepa"]["collapsed"] if found else None) is expected


def test_announced_at_the_first_tenth_from_half_on_and_not_again():
    lines = history([0.0] * 400 + [5.0] * 100 + [0.0] * 500)
    for i, line in enumerate(lines):
        line |= announcements(lines[:i], line, 1000)
    assert [line["step"] for line in lines if "jepa_collapsed" in line] == [600]
    assert not announcements(history([0.0] * 49), history([0.0] * 50)[-1] | {"step": 49}, 100)


@pytest.mark.parametrize(("cosine", "expected"), [(0.27, True), (0.29, False)])
def test_nitp_must_remove_a_tenth_of_the_distance(cosine, expected):
    lines = [
        {"step": i, "label_tokens": 9, "next_tokens": 90, "nitp_cosine": cosine, "nitp_cosine_shuffled": 0.2}
        for i in range(1, 101)
    ]
    assert judge(lines, 100)["nitp"]["collapsed"] is expected
