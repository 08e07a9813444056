"""The run folder: settings, provenance, status and complete checkpoints.

A run folder holds `args.json` (all resolved settings), `run.json` (provenance and status), `metrics.jsonl`, the model,
checkpoints and `eval/<dataset>/`. Nothing about a run is read from printed output.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, write_json

CHECKPOINT_MARK = "complete.json"
# Settings that change no number: a resumed run may change them, and they do not distinguish arms.
VOLATILE = {"output_dir", "resume", "overwrite", "dry_run", "report_to", "save_total_limit", "logging_steps",
            "dataloader_num_workers", "preprocessing_num_workers"}  # fmt: skip
PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine a run's numbers."""
    return {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES}


def provenance(data: dict[str, str]) -> dict[str, Any]:
    """Where a result comes from: command, commit, versions, device, and `data`, the checksums of the data by path."""
    import torch

    def git(*command: str) -> str | None:
        here = Path(__file__).resolve().parent
        try:
            return subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    cuda = torch.cuda.is_available()
    return {
        "argv": sys.argv,
        "git_commit": commit and commit.strip(),
        "git_dirty": None if changes is None else bool(changes),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "data_sha256": data,
    }


def run_settings(model: str | Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """run.json and args.json of the run that a model folder is or, as checkpoint-N and merged, belongs to, or None."""
    folder = Path(os.path.abspath(model))
    for run in (folder, folder.parent) if folder.is_dir() else ():
        if (run / "run.json").is_file():
            return read_json(run / "run.json"), read_json(run / "args.json")
    return None


def processes() -> int:
    """The number of processes that train together, from torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch_id() -> str | None:
    """Identifies this torchrun job, the same in each of its restarts."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a rendezvous id, which torchrun calls "none", its process on this node identifies the job.
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


class RunFolder:
    """A run folder. Only the main process writes to it.

    `start` makes the folder (or empties it with `overwrite`) after all input was checked, so that a mistake on the
    command line loses nothing.
    """

    def __init__(self, folder: str, settings: dict[str, Any]):
        self.path, self.settings = Path(folder), settings
        self.record: dict[str, Any] = {}
        self._lock_file: Any = None
        self._started = time.time()

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises UsageError if the folder exists and neither flag allows that, or if it belongs to another run."""
        if resume and not self.path.exists():
            raise UsageError(f"--resume: there is no run folder {self.path}")
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not (resume or overwrite):
            raise UsageError(f"--output_dir {self.path} exists; give --resume, --overwrite or another folder")
        if not (self.path / "args.json").is_file():
            raise UsageError(f"--output_dir {self.path} exists and is not a run folder (it has no args.json)")
        if overwrite:
            return
        before, now = read_json(self.path / "args.json"), json.loads(json.dumps(self.settings, default=str))
        # A kill right at the start leaves only args.json.
        record = read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}
        if record.get("status") == "finished":
            raise UsageError(f"--resume: {self.path} is finished")
        free = VOLATILE | self._free_batch_settings(before, now, record.get("processes", processes()))
        differing = [
            f"--{name} {before.get(name)!r} (now {now.get(name)!r})"
            for name in sorted(before.keys() | now.keys())
            if name not in free and before.get(name) != now.get(name)
        ]
        if differing:
            raise UsageError(f"--resume: {self.path} was made with other settings: " + ", ".join(differing))

    def _free_batch_settings(self, before: dict[str, Any], now: dict[str, Any], had: int) -> set[str]:
        """Settings that may differ with another number of processes: an optimizer step keeps its examples.

        Raises UsageError if a step would have other examples.
        """
        have = processes()
        if had == have or not {"batch_size", "grad_accum"} <= before.keys() & now.keys():
            return set()
        was, by = f"--resume: {self.path} was trained by {had} processes, now {have}", ("batch_size", "grad_accum")
        if before.get("tokens_per_batch") or now.get("tokens_per_batch"):
            raise UsageError(f"{was}; with --tokens_per_batch the steps would have other examples")
        step, other = (math.prod((s[name] for name in by), start=n) for s, n in ((before, had), (now, have)))
        if step != other:
            raise UsageError(
                f"{was}; a step would have {other} examples instead of {step}: choose --batch_size and --grad_accum so "
                f"that their product is {step / have:g}"
            )
        return set(by)

    def start(self, overwrite: bool, record: dict[str, Any]) -> None:
        """Makes the folder and writes args.json and run.json with status `running`. A resumed run keeps its history."""
        self._lock()
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        previous = read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}
        if previous.get("status") == "finished":  # by another process, after `check`
            raise UsageError(f"--resume: {self.path} is finished")
        if record["data_sha256"] != previous.get("data_sha256", record["data_sha256"]):
            raise UsageError(f"--resume: the data of {self.path} has changed since it was started")
        attempts = previous.get("attempts", []) + [{"argv": record["argv"], "started": _now(), "launch": launch_id()}]
        self._previous_seconds = previous.get("wall_seconds", 0.0)
        self.record = {"status": "running", **record, "wall_seconds": self._previous_seconds, "attempts": attempts}
        write_json(self.path / "args.json", self.settings)
        write_json(self.path / "run.json", self.record)

    def _lock(self) -> None:
        """Keeps every other process out of the folder until `close`. Raises UsageError if one is using it.

        The lock file is next to the folder, which --overwrite replaces, and ends with the process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock_file = open(self.path.with_name(f".{self.path.name}.lock"), "a")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output_dir {self.path} is in use by another process") from None
        except OSError:  # a file system without locks
            return

    def close(self) -> None:
        """Releases the lock."""
        if self._lock_file is not None:
            self._lock_file.close()

    def update(self, status: str, **facts: Any) -> None:
        """Records the status of the run: `running`, `finished`, `failed` or `interrupted`."""
        self.record |= {
            "status": status,
            "wall_seconds": round(self._previous_seconds + time.time() - self._started, 1),
            **facts,
        }
        write_json(self.path / "run.json", self.record)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def mark_checkpoint(folder: Path) -> None:
    """Marks a checkpoint as complete: the sizes of its files, written when all of them are on the disk."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CHECKPOINT_MARK]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_json(folder / CHECKPOINT_MARK, {str(p.relative_to(folder)): p.stat().st_size for p in files})


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; a kill or a full disk can leave incomplete ones."""

    def complete(folder: Path) -> bool:
        try:
            sizes = json.loads((folder / CHECKPOINT_MARK).read_text())
            return all((folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError):
            return False

    numbered = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return [p for p in sorted(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-"))) if complete(p)]
