"""The processes that torchrun started: their process group, and errors that all of them must agree on."""

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
    """This process's place among those of torchrun. `options` go to `init_process_group` if there are several."""
    state = PartialState(cpu=cpu, **(options if "LOCAL_RANK" in os.environ else {}))
    state.wait_for_everyone()  # a process that leaves at once would be missed by one that still looks for it
    try:
        yield state
    except UsageError:  # raised by every process; after other errors some may be gone
        _close(state)
        raise
    _close(state)


def _close(state: PartialState) -> None:
    # A thread of the group that still has work to release when the interpreter ends would abort it. The objects that
    # hold the group go first: freeing them later would wait for such a thread while holding the lock it waits for.
    gc.collect()
    state.destroy_process_group()


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """All processes leave the block together; an error that one of them finds in it is raised in each."""
    mistake = None
    try:
        yield
    except (UsageError, OSError) as error:
        mistake = error
    found = [error for error in gather_object([mistake]) if error]
    if found:
        raise found[0]
