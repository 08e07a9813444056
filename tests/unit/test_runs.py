"""The run folder: complete checkpoints, atomic files, provenance, one process at a time."""

import contextlib
import dataclasses
import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, write_json
from llm_jepa.run_folder import CHECKPOINT_MARK, RunFolder, complete_checkpoints, mark_checkpoint
from llm_jepa.settings import Settings
from llm_jepa.training.process import write_errors


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
    (tmp_path / "run.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        write_json(path, {"a": "b" * 1000})
    assert error.value.errno == errno.ENOSPC and str(path) in str(error.value)
    with pytest.raises(ValueError):
        write_json(path, {"a": "\ud800"})
    assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["run.json"]
    path.write_text("{")
    with pytest.raises(UsageError, match="run.json"):
        read_json(path)


def test_error_of_torch_about_a_refused_write_names_the_folder_in_one_line(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as error, write_errors(str(tmp_path)):
            torch.save({"a": torch.ones(9999)}, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="^no write$"), write_errors(str(tmp_path)):
        raise RuntimeError("no write")


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
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    RunFolder(str(run), {}).start(False, record)


@pytest.mark.parametrize(("loss", "processes", "batch", "accum", "mentioned"), [
    ("cosine", 4, 4, 1, None), ("clip", 4, 2, 2, None), ("clip", 4, 4, 1, "--batch_size 2 --grad_accum 2"),
    ("vicreg", 1, 4, 4, "--batch_size 8 --grad_accum 2"), ("cosine", 4, 4, 2, "--batch_size"),
])  # fmt: skip
def test_other_processes_keep_the_step_and_negatives(tmp_path, monkeypatch, loss, processes, batch, accum, mentioned):
    settings = dataclasses.asdict(Settings(jepa_loss=loss, batch_size=4, grad_accum=2))
    write_json(tmp_path / "args.json", settings)
    write_json(tmp_path / "run.json", {"status": "interrupted", "processes": 2})
    now = settings | {"batch_size": batch, "grad_accum": accum}
    monkeypatch.setattr("llm_jepa.run_folder.processes", lambda: processes)
    with pytest.raises(UsageError, match=mentioned) if mentioned else contextlib.nullcontext():
        RunFolder(str(tmp_path), now).check(resume=True, overwrite=False)
