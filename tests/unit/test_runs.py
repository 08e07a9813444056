"""The run folder: complete checkpoints, atomic files, provenance, one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, sha256, write_json
from llm_jepa.run_folder import CHECKPOINT_MARK, RunFolder, complete_checkpoints, mark_checkpoint, provenance


def checkpoint(run: Path, step: int, mark: bool = True) -> None:
    folder = run / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * step)
    (folder / "sub" / "state").write_bytes(b"s")
    if mark:
        mark_checkpoint(folder)


def test_only_complete_checkpoints_count_ordered_by_step(tmp_path):
    for step in (100, 20, 3, 150):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 200, mark=False)
    (tmp_path / "checkpoint-150" / "sub" / "state").unlink()
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    (tmp_path / "checkpoint-20" / CHECKPOINT_MARK).write_text('{"model.safetens')
    (tmp_path / "checkpoint-100" / "model.safetensors").write_bytes(b"short")
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_json_is_written_atomically_and_damage_is_reported(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": "\ud800"})
    assert read_json(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(UsageError, match="run.json"):
        read_json(path)


def test_provenance_records_commit_versions_and_data(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("abc")
    assert sha256(data) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    facts = provenance({str(data): sha256(data)})
    assert facts["data_sha256"] == {str(data): sha256(data)}
    assert {"torch", "transformers", "python"} <= facts["versions"].keys()
    assert facts["git_commit"] is None or len(facts["git_commit"]) == 40


def test_run_folder_is_locked_until_closed(tmp_path):
    """A second process that resumes the run would load checkpoints that the first one deletes."""
    run, record = tmp_path / "run", {"argv": [], "data_sha256": {}}
    first = RunFolder(str(run), {})
    first.start(False, record)
    before = {p: p.read_bytes() for p in run.iterdir()}
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=str(run)):
            RunFolder(str(run), {}).start(overwrite, record)
    assert {p: p.read_bytes() for p in run.iterdir()} == before
    first.close()
    RunFolder(str(run), {}).start(False, record)
