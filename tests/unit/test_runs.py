"""The run folder: complete checkpoints, atomic files, provenance, one process at a time."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import resource
from pathlib import Path

import pytest
import torch

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, write_json
from llm_jepa.run_folder import CHECKPOINT_MARK, RunFolder, complete_checkpoints, launch_id, mark_checkpoint
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


def test_job_is_identified_without_a_name_of_the_machine(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "alices-laptop")
    found = {}
    for name in ("none", "none", "alices-laptop:29500", "other"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert found.setdefault(name, launch_id()) == launch_id()
    assert len({*found.values()}) == 3 and "alice" not in "".join(found.values())
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launch_id() is None


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
    waiting = open(tmp_path / ".run.lock", "a")  # opened before it is removed
    first.close()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with waiting:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a file that is gone: keeps nobody out
        RunFolder(str(run), {}).start(False, record)


def unfinished_run(folder: Path, **settings: object) -> dict:
    """Writes the files of an interrupted run of two processes; returns its settings."""
    folder.mkdir()
    settings = dataclasses.asdict(Settings(jepa_loss="cosine", batch_size=4, grad_accum=2)) | settings
    write_json(folder / "args.json", settings)
    write_json(folder / "run.json", {"status": "interrupted", "processes": 2})
    return settings


@pytest.mark.parametrize(
    ("flag", "loss"), [("jepa_l2", "l2"), ("jepa_mse", "mse"), ("infonce", "infonce"), (None, "cosine")]
)
def test_run_with_the_old_name_of_its_loss_is_resumed(tmp_path, monkeypatch, flag, loss):
    monkeypatch.setattr("llm_jepa.run_folder.processes", lambda: 2)
    settings = unfinished_run(tmp_path / "run", **({flag: True} if flag else {}))
    write_json(tmp_path / "run/args.json", {k: v for k, v in settings.items() if k not in ("jepa_loss", "temperature")})
    now = settings | {"jepa_loss": loss, "jepa_l2": False, "jepa_mse": False, "infonce": False}
    RunFolder(str(tmp_path / "run"), now).check(resume=True, overwrite=False)
    with pytest.raises(UsageError, match="--jepa_loss"):
        RunFolder(str(tmp_path / "run"), now | {"jepa_loss": "vicreg"}).check(resume=True, overwrite=False)


@pytest.mark.parametrize(("loss", "processes", "batch", "accum", "mentioned"), [
    ("cosine", 4, 4, 1, None), ("clip", 4, 2, 2, None), ("clip", 4, 4, 1, "--batch_size 2 --grad_accum 2"),
    ("vicreg", 1, 4, 4, "--batch_size 8 --grad_accum 2"), ("cosine", 4, 4, 2, "--batch_size"),
])  # fmt: skip
def test_other_processes_keep_the_step_and_negatives(tmp_path, monkeypatch, loss, processes, batch, accum, mentioned):
    settings = unfinished_run(tmp_path / "run", jepa_loss=loss) | {"batch_size": batch, "grad_accum": accum}
    monkeypatch.setattr("llm_jepa.run_folder.processes", lambda: processes)
    with pytest.raises(UsageError, match=mentioned) if mentioned else contextlib.nullcontext():
        RunFolder(str(tmp_path / "run"), settings).check(resume=True, overwrite=False)
