"""Runs a training script's work in the processes that torchrun started."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from llm_jepa.cli import first_line, run_command
from llm_jepa.distributed import is_main_process, process_group


def run_training(name: str, work: Callable[[PartialState], None]) -> int:
    """Runs `work(state)` in this process. Returns the exit code of `run_command`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    def in_group() -> None:
        # The others wait while the main process loads and saves; torch's ten minutes are short for that.
        with process_group(name, cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=2)) as state:
            work(state)

    signal.signal(signal.SIGTERM, stop)
    hint = "; a run that has started continues with --resume"
    return run_command(name, in_group, speaks=is_main_process, hint=hint)


@contextlib.contextmanager
def full_disk_is_an_error(folder: str) -> Iterator[None]:
    """Turns what torch and safetensors raise on a full disk into an OSError that names --output_dir."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or error.filename:
            raise
        raise OSError(f"{first_line(error)} (--output_dir {folder})") from None
    except (SafetensorError, RuntimeError) as error:
        if not any(text in str(error) for text in ("No space left", "inline_container")):  # safetensors' and torch's
            raise
        message = f"cannot write to --output_dir {folder}; is its disk full? ({first_line(error)})"
        raise OSError(message) from None
