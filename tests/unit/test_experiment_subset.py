"""experiments/subset.py: subsets of examples."""

import sys

import pytest
from conftest import ROOT, call, message_row, write_rows

sys.path.insert(0, str(ROOT / "experiments"))


def test_first_and_skip_copy_lines(eight, tmp_path):
    target = tmp_path / "part.jsonl"
    for _ in range(2):  # the same examples again are no conflict
        assert call("subset", eight, target, "--skip", 3, "--first", 2).code == 0
    assert target.read_text().splitlines() == eight.read_text().splitlines()[3:5]


@pytest.mark.parametrize("flags", [["--first", "9"], ["--skip", "8"], ["--first", "6"]])
def test_too_few_examples_or_an_existing_target_are_refused(eight, tmp_path, flags):
    target = write_rows(tmp_path / "part.jsonl", [message_row("kept", "a")])
    done = call("subset", eight, target, *flags)
    assert done.code == 2 and ".jsonl" in done.err and "kept" in target.read_text()
