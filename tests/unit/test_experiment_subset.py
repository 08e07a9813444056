"""experiments/subset.py: subsets of examples."""

import sys

import pytest
from conftest import ROOT, call, message_row, write_rows

sys.path.insert(0, str(ROOT / "experiments"))


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "source.jsonl", [message_row(f"question {i}", f"answer {i % 7}") for i in range(20)])


def test_first_and_skip_copy_lines(source, tmp_path):
    target = tmp_path / "part.jsonl"
    for _ in range(2):  # the same examples again are no conflict
        assert call("subset", source, target, "--skip", 3, "--first", 5).code == 0
    assert target.read_text().splitlines() == source.read_text().splitlines()[3:8]


@pytest.mark.parametrize("flags", [["--first", "21"], ["--skip", "20"], ["--first", "6"]])
def test_too_few_examples_or_an_existing_target_are_refused(source, tmp_path, flags):
    target = write_rows(tmp_path / "part.jsonl", [message_row("kept", "a")])
    done = call("subset", source, target, *flags)
    assert done.code == 2 and ".jsonl" in done.err and "kept" in target.read_text()
