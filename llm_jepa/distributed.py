"""The process group of torchrun, and errors that all processes raise together."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from llm_jepa.cli import UsageError


@contextlib.contextmanager
def process_group(cpu: bool, **options: Any) -> Iterator[PartialState]:
    """Joins torchrun's process group, with `options` of `init_process_group`; without torchrun a single process."""
    state = PartialState(cpu=cpu, **(options if "LOCAL_RANK" in os.environ else {}))
    state.wait_for_everyone()  # a process that ends at once could not be found by one that is still connecting
    complete = True
    try:
        yield state
    except BaseException as error:
        complete = isinstance(error, UsageError)  # raised by every process; after other errors some may be gone
        raise
    finally:
        if complete:
            # A thread of the group that is still running when the interpreter ends aborts it. Objects that reference
            # the group are freed first: freed later, they would wait for such a thread and hold the lock that it needs.
            gc.collect()
            state.destroy_process_group()


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """All processes leave the block together. A UsageError or OSError in one of them is raised in all."""
    mistake = None
    try:
        yield
    except (UsageError, OSError) as error:
        mistake = error
    found = [error for error in gather_object([mistake]) if error]
    if found:
        raise found[0]
