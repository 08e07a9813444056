"""experiments/subset.py: subsets of examples, and the shuffled-pair placebo."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from conftest import message_row, write_rows

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Problems, read_examples

SCRIPT = Path(__file__).parents[2] / "experiments" / "subset.py"
spec = importlib.util.spec_from_file_location("experiment_subset", SCRIPT)
subset = importlib.util.module_from_spec(spec)
spec.loader.exec_module(subset)


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "source.jsonl", [message_row(f"question {i}", f"answer {i % 7}") for i in range(20)])


def test_first_and_skip_copy_lines(source, tmp_path):
    target = tmp_path / "part.jsonl"
    for _ in range(2):  # the same examples again are no conflict
        assert subset.main([str(source), str(target), "--skip", "3", "--first", "5"]) == 0
    assert target.read_text().splitlines() == source.read_text().splitlines()[3:8]


def test_shuffled_views_are_answers_of_other_examples(source, tmp_path):
    target = tmp_path / "placebo.jsonl"
    assert subset.main([str(source), str(target), "--shuffle_views", "0"]) == 0
    before, after = (read_examples(str(p), Problems(skip=False)) for p in (source, target))
    assert [(e.system, e.user, e.assistant) for e in after] == [(e.system, e.user, e.assistant) for e in before]
    assert all(e.code != e.assistant and e.text is None for e in after)
    assert Counter(e.code for e in after) == Counter(e.assistant for e in before)
    assert subset.main([str(target), str(tmp_path / "again.jsonl"), "--shuffle_views", "0"]) == 2


def test_derange_depends_on_the_seed_and_needs_half_of_other_answers():
    answers = ["Good"] * 10 + [f"Bad {i}" for i in range(10)]
    assert subset.derange(answers, 1) == subset.derange(answers, 1) != subset.derange(answers, 2)
    for seed in range(5):
        assert all(a != b for a, b in zip(answers, subset.derange(answers, seed), strict=True))
    with pytest.raises(UsageError, match="11 of 20"):
        subset.derange(["Good"] * 11 + ["Bad"] * 9, 0)


@pytest.mark.parametrize("flags", [["--first", "21"], ["--skip", "20"], ["--first", "6"]])
def test_too_few_examples_or_an_existing_target_are_refused(source, tmp_path, capsys, flags):
    target = write_rows(tmp_path / "part.jsonl", [message_row("kept", "a")])
    assert subset.main([str(source), str(target), *flags]) == 2
    assert (".jsonl" in capsys.readouterr().err) and "kept" in target.read_text()
