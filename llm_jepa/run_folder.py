"""The run folder: settings, provenance, status and complete checkpoints.

A run folder contains `args.json` (all resolved settings), `run.json` (provenance and status), `metrics.jsonl`, the
model, checkpoints and `eval/<dataset>/`.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_jepa.cli import UsageError
from llm_jepa.distributed import processes
from llm_jepa.files import read_json, sha256, write_json
from llm_jepa.settings import VOLATILE, read_settings

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT_MARK = "complete.json"
PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "numpy")  # they determine a run's numbers


def code_version() -> dict[str, Any]:
    """The commit, and a checksum of what differs from it: the diff and untracked modules; without git all modules."""

    def git(*command: str) -> bytes | None:
        try:
            return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-color")
    tracked = {ROOT / os.fsdecode(name) for name in (git("ls-files", "-z") or b"").split(b"\0") if commit}
    modules = sorted({*ROOT.glob("*.py"), *(ROOT / "llm_jepa").rglob("*.py")} - tracked)
    changes = (diff or b"") + b"".join(f"{sha256(m)} {m.relative_to(ROOT).as_posix()}\n".encode() for m in modules)
    return {
        "git_commit": commit and commit.decode().strip(),
        "git_dirty": None if diff is None else bool(diff),
        "code_sha256": hashlib.sha256(changes).hexdigest() if changes else None,
    }


def provenance(data: dict[str, str]) -> dict[str, Any]:
    """Where a result comes from: command, code, versions, device, and `data`, the checksums of the data by path."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "argv": sys.argv,
        **code_version(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
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


def origin_of_model(name: str) -> dict[str, Any]:
    """What the report needs of --model_name, whatever the working directory is then.

    `model`: the hub name or the path, from the project's folder if it is inside. `base`: settings, checksums of the
    data and base of the run that the model comes from, or None.
    """
    folder, (record, settings) = Path(name).resolve(), run_settings(name) or ({}, None)
    path = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    base = {"settings": settings, "data_sha256": record.get("data_sha256", {}), "base": record.get("base")}
    return {"model": str(path) if folder.is_dir() else name, "base": base if settings else None}


def launch_id() -> str | None:
    """Identifies this torchrun job, the same in each of its restarts: a hash, which names no machine."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without a rendezvous id, which torchrun calls "none", its process on this node identifies the job.
    name = f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name
    return name and hashlib.sha256(name.encode()).hexdigest()[:16]


class RunFolder:
    """A run folder. Only the main process writes to it.

    `start` makes the folder (or empties it with `overwrite`) after all input was checked, so that a mistake on the
    command line loses nothing.
    """

    def __init__(self, folder: str, settings: dict[str, Any]):
        self.path, self.settings = Path(folder), settings
        self.record: dict[str, Any] = {}
        self._lock_file: FileLock | None = None
        self._started = time.time()

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises UsageError if the folder exists and neither flag allows that, or if it belongs to another run."""
        if resume and not self.path.exists():
            raise UsageError(f"--resume: there is no run folder {self.path}")
        parent = next(p for p in (self.path, *self.path.parents) if os.path.lexists(p))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"--output_dir {self.path}: {parent} is not a folder that can be written to")
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
        was = read_settings(before)
        before = {name: getattr(was, name, value) for name, value in before.items()} | {"jepa_loss": was.jepa_loss}
        free = VOLATILE | self._free_batch_settings(was.contrasts, before, now, record.get("processes", processes()))
        differing = [
            f"--{name} {before.get(name)!r} (now {now.get(name)!r})"
            for name in sorted(before.keys() | now.keys())
            if name not in free and before.get(name, now.get(name)) != now.get(name)  # a flag can be newer than the run
        ]
        if differing:
            raise UsageError(f"--resume: {self.path} was made with other settings: " + ", ".join(differing))

    def _free_batch_settings(self, contrasts: bool, before: dict[str, Any], now: dict[str, Any], had: int) -> set[str]:
        """Settings that may differ with another number of processes: an optimizer step keeps its examples.

        `had`: the run's processes. Raises UsageError if a step would have other examples, or, with `contrasts`, a pair
        be contrasted with another number of pairs.
        """
        have = processes()
        if had == have or not {"batch_size", "grad_accum"} <= before.keys() & now.keys():
            return set()
        was = f"--resume: {self.path} was trained by {had} processes, now {have}"
        if before.get("tokens_per_batch") or now.get("tokens_per_batch"):
            raise UsageError(f"{was}; with --tokens_per_batch the steps would have other examples")
        step, other = had * before["batch_size"] * before["grad_accum"], have * now["batch_size"] * now["grad_accum"]
        if step != other:
            choice = f"choose --batch_size and --grad_accum with the product {step / have:g}"
            raise UsageError(f"{was}; a step would have {other} examples instead of {step}: {choice}")
        if contrasts and before["grad_accum"] != now["grad_accum"]:
            choice = f"choose --batch_size {had * before['batch_size'] / have:g} --grad_accum {before['grad_accum']}"
            raise UsageError(f"{was}; its pairs would be contrasted with another number of pairs: {choice}")
        return {"batch_size", "grad_accum"}

    def start(self, overwrite: bool, record: dict[str, Any]) -> None:
        """Makes the folder and writes args.json and run.json with status `running`. A resumed run keeps its history."""
        folder = self.path.resolve()  # a link to a folder stays
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Keeps every other process out until `close`; next to the folder, which --overwrite replaces.
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(f"--output_dir {self.path} is in use by another process") from None
        self._lock_file = lock
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        previous = read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}
        if previous.get("status") == "finished":  # by another process, after `check`
            raise UsageError(f"--resume: {self.path} is finished")
        if record["data_sha256"] != previous.get("data_sha256", record["data_sha256"]):
            raise UsageError(f"--resume: the data of {self.path} has changed since it was started")
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        attempts = previous.get("attempts", []) + [{"argv": record["argv"], "started": now, "launch": launch_id()}]
        self._previous_seconds = previous.get("wall_seconds", 0.0)
        self.record = {"status": "running", **record, "wall_seconds": self._previous_seconds, "attempts": attempts}
        write_json(self.path / "args.json", self.settings)
        write_json(self.path / "run.json", self.record)

    def close(self) -> None:
        """Removes the lock file and releases the lock."""
        if self._lock_file is not None:
            Path(self._lock_file.lock_file).unlink(missing_ok=True)
            self._lock_file.release()

    def remove_checkpoints(self, keep: Iterable[Path] = ()) -> None:
        """Removes all checkpoints but those to keep; one is three times as large as the model."""
        for path in set(self.path.glob("checkpoint-*")) - set(keep):
            shutil.rmtree(path, ignore_errors=True)

    def update(self, status: str, **facts: Any) -> None:
        """Records the status of the run: `running`, `finished`, `failed` or `interrupted`."""
        seconds = round(self._previous_seconds + time.time() - self._started, 1)
        self.record |= {"status": status, "wall_seconds": seconds, **facts}
        write_json(self.path / "run.json", self.record)


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
