"""experiments/subset.py: subsets of examples."""

import importlib.util
from pathlib import Path

import pytest
from conftest import message_row, write_rows

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


@pytest.mark.parametrize("flags", [["--first", "21"], ["--skip", "20"], ["--first", "6"]])
def test_too_few_examples_or_an_existing_target_are_refused(source, tmp_path, capsys, flags):
    target = write_rows(tmp_path / "part.jsonl", [message_row("kept", "a")])
    assert subset.main([str(source), str(target), *flags]) == 2
    assert (".jsonl" in capsys.readouterr().err) and "kept" in target.read_text()
