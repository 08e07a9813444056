"""experiments/rows.py: subsets of rows, and rows whose Code view is another row's answer."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from examples import Problems, read_examples
from runs import UsageError

SCRIPT = Path(__file__).parents[2] / "experiments" / "rows.py"
spec = importlib.util.spec_from_file_location("experiment_rows", SCRIPT)
rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rows)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.jsonl"
    turns = [("lines", f"question {i}", f"answer {i % 7}") for i in range(20)]
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles(), t, strict=True)]}) + "\n"
            for t in turns
        )
    )
    return path


def roles():
    return ("system", "user", "assistant")


def test_first_and_skip_take_the_rows_they_name_unchanged(source, tmp_path):
    target = tmp_path / "part.jsonl"
    assert rows.main([str(source), str(target), "--skip", "3", "--first", "5"]) == 0
    assert target.read_text().splitlines() == source.read_text().splitlines()[3:8]


def test_shuffled_views_are_the_same_answers_none_with_its_own_row(source, tmp_path):
    target = tmp_path / "placebo.jsonl"
    assert rows.main([str(source), str(target), "--shuffle_views", "0"]) == 0
    before, after = (read_examples(str(p), Problems(skip=False)) for p in (source, target))
    assert [(e.system, e.user, e.assistant) for e in after] == [(e.system, e.user, e.assistant) for e in before]
    assert all(e.code != e.assistant and e.text is None for e in after)
    assert Counter(e.code for e in after) == Counter(e.assistant for e in before)


def test_the_seed_decides_the_order():
    answers = [str(i) for i in range(50)]
    assert rows.others(answers, 1) == rows.others(answers, 1) != rows.others(answers, 2)


@pytest.mark.parametrize("seed", range(5))
def test_half_the_answers_may_be_the_same(seed):
    answers = ["Good"] * 10 + ["Bad"] * 10
    shuffled = rows.others(answers, seed)
    assert all(a != b for a, b in zip(answers, shuffled, strict=True))


def test_more_than_half_the_same_is_refused():
    with pytest.raises(UsageError, match="11 of 20 answers are 'Good'"):
        rows.others(["Good"] * 11 + ["Bad"] * 9, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--first", "21"], "has 20 rows"),
        (["--skip", "20"], "has 20 rows"),
        (["--first", "0"], "must be positive"),
        (["--skip", "-1"], "must not be negative"),
    ],
)
def test_rows_that_are_not_there_are_refused(source, tmp_path, capsys, flags, message):
    assert rows.main([str(source), str(tmp_path / "part.jsonl"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "part.jsonl").exists()


def test_other_rows_are_not_replaced(source, tmp_path, capsys):
    target = tmp_path / "part.jsonl"
    assert rows.main([str(source), str(target), "--first", "5"]) == 0
    assert rows.main([str(source), str(target), "--first", "5"]) == 0  # the same rows
    assert rows.main([str(source), str(target), "--first", "6"]) == 2
    assert "exists with other rows" in capsys.readouterr().err and len(target.read_text().splitlines()) == 5


def test_rows_with_views_of_their_own_are_refused(source, tmp_path, capsys):
    target, again = tmp_path / "placebo.jsonl", tmp_path / "again.jsonl"
    assert rows.main([str(source), str(target), "--shuffle_views", "0"]) == 0
    assert rows.main([str(target), str(again), "--shuffle_views", "0"]) == 2
    assert "views or answers of their own" in capsys.readouterr().err and not again.exists()
