"""The run folder: what marks a checkpoint as whole, and files written whole or not at all."""

from __future__ import annotations

import pytest

from llm_jepa.cli import UsageError, parse_flags
from llm_jepa.files import read_json, sha256, write_json
from llm_jepa.run_folder import CHECKPOINT_MARK, Run, mark_checkpoint, provenance, whole_checkpoints
from llm_jepa.settings import Settings


def checkpoint(run, step, mark=True):
    folder = run / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * step)
    (folder / "sub" / "state").write_bytes(b"s")
    if mark:
        mark_checkpoint(folder)
    return folder


def test_only_whole_checkpoints_count_and_in_the_order_of_steps(tmp_path):
    for step in (100, 20, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 200, mark=False)
    checkpoint(tmp_path, 150)
    (tmp_path / "checkpoint-150" / "sub" / "state").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in whole_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    (tmp_path / "checkpoint-20" / CHECKPOINT_MARK).write_text('{"model.safetens')
    (tmp_path / "checkpoint-100" / "model.safetensors").write_bytes(b"short")
    assert [p.name for p in whole_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})

    class Unwritable:
        def __str__(self):
            raise RuntimeError("cannot be written")

    with pytest.raises(RuntimeError):
        write_json(path, {"a": Unwritable()})
    assert read_json(path) == {"a": 1}


def test_damaged_json_names_its_file(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match="run.json"):
        read_json(tmp_path / "run.json")


def test_provenance_tells_commit_versions_and_data(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("abc")
    assert sha256(data) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    facts = provenance({str(data): sha256(data)})
    assert facts["data_sha256"] == {str(data): sha256(data)}
    assert {"torch", "transformers", "python"} <= facts["versions"].keys()
    assert facts["git_commit"] is None or len(facts["git_commit"]) == 40


def test_a_run_folder_belongs_to_one_process_at_a_time(tmp_path):
    """A second process that resumes a run still going would load checkpoints the first is pruning."""
    record = {"argv": [], "data_sha256": {}}
    first = Run(str(tmp_path / "run"), {})
    first.start(False, record)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="in use by another process"):
            Run(str(tmp_path / "run"), {}).start(overwrite, record)
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    first.close()  # as the end of its process does
    Run(str(tmp_path / "run"), {}).start(False, record)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--learning-rate", "1"), "unrecognized arguments: --learning-rate 1 (did you mean --learning_rate?)"),
        (("--epochs", "2", "--lora_rnk", "8"), "(did you mean --num_epochs or --lora_rank"),
        (("--zzz",), "unrecognized arguments: --zzz; --help lists all flags"),
        (("--lbd", "much"), "argument --lbd: invalid float value: 'much'; --help"),
        (("--layout", "pakced"), "argument --layout: invalid choice: 'pakced' (choose from"),
    ],
)
def test_a_wrong_flag_is_one_line_with_what_looks_like_it(given, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_flags(Settings, "", list(given))
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
