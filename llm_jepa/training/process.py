"""Runs a script's work in the processes that torchrun started."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.utils import logging as transformers_logging

from llm_jepa.cli import first_line, run_command
from llm_jepa.distributed import is_main_process, process_group
from llm_jepa.files import names_file


def run_script(
    name: str, work: Callable[[PartialState], None], hint: str = "; a run that has started continues with --resume",
    **group: Any,
) -> int:  # fmt: skip
    """Runs `work(state)` in this process, with `group` as in `process_group`. Returns `run_command`'s exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def in_group() -> None:
        # The others wait while the main process loads and saves; torch's ten minutes are short for that.
        options = {"timeout": timedelta(hours=2)} | group
        with process_group(name, cpu=not torch.accelerator.is_available(), **options) as state:
            work(state)

    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    return run_command(name, in_group, speaks=is_main_process, hint=hint)


@contextlib.contextmanager
def write_errors(folder: str) -> Iterator[None]:
    """Makes an OSError that names a file or `folder` of every error that a refused write raises.

    The system refuses with an OSError. Safetensors and torch.save raise errors of their own instead, and sharded
    checkpoints one that contains those of all processes.
    """
    try:
        with names_file(folder):
            yield
    except (SafetensorError, CheckpointException, RuntimeError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, RuntimeError) and raised_in != torch.serialization.__file__:
            raise
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise OSError(f"{folder}: {first_line(cause)}") from None
