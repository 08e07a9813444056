"""Runs a script's work in the processes that torchrun started."""

import contextlib
import gc
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

from llm_jepa.cli import UsageError, first_line, run_command
from llm_jepa.distributed import clean_environment, is_main_process, under_torchrun
from llm_jepa.files import names_file


def run_script(name: str, work: Callable[[PartialState], None], hint: str = "", **group: Any) -> int:
    """Runs `work(state)` in torchrun's process group, or without torchrun in a single process.

    `group`: options of `init_process_group`. Returns `run_command`'s exit code.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def in_group() -> None:
        clean_environment(name)
        # The others wait while the main process loads and saves; torch's ten minutes are short for that.
        options = {"timeout": timedelta(hours=2)} | group if under_torchrun() else {}
        state, mistake = PartialState(cpu=not torch.accelerator.is_available(), **options), None
        state.wait_for_everyone()  # a process that ends at once could not be found by one that is still connecting
        try:
            work(state)
        except UsageError as error:  # raised by every process; after other errors some may be gone
            mistake = error
        # A thread of the group that is still running when the interpreter ends aborts it. Objects that reference the
        # group are freed first: freed later, they would wait for such a thread and hold the lock that it needs.
        gc.collect()
        state.destroy_process_group()
        if mistake:
            raise mistake

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
