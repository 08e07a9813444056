"""The processes of a run: what torchrun's environment says, how a script starts, shared errors.

A script imports this module before its flags are accepted, so accelerate is imported where it is used.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from llm_jepa.cli import UsageError, end_at_interrupts, run_command

TORCHRUN = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all of them
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate reads them too
ACCELERATE = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")  # prefixes of accelerate's own variables
NO_WISH = ("", "0", "1", "no", "none", "false", "auto", "default")  # values that `accelerate launch` sets by itself


def under_torchrun() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, has started this process."""
    return all(os.environ.get(name) for name in TORCHRUN)


def processes() -> int:
    """The number of processes that work together."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main_process() -> bool:
    """Whether this is the first process, or the only one."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def clean_environment(name: str) -> None:
    """Removes variables that would change a run behind its flags: accelerate's, and a part of torchrun's.

    A note lists those of accelerate that ask for something. Raises UsageError if torchrun's are not numbers, or are
    incomplete for several processes.
    """
    own = {n: os.environ.pop(n) for n in sorted(os.environ) if n.startswith(ACCELERATE)}
    alone = not under_torchrun()
    for n in [n for n in (*TORCHRUN, *MPI_SIZES) if n != "MASTER_ADDR" and os.environ.get(n)]:
        if not os.environ[n].isdecimal():
            raise UsageError(f"{n}={os.environ[n]} is not a number; unset {n}")
        if alone and n.endswith("_SIZE") and os.environ[n] != "1" and n != "PMI_SIZE":  # srun can set it on each node
            missing = ", ".join(m for m in TORCHRUN if not os.environ.get(m))
            raise UsageError(f"{n}={os.environ[n]} without {missing}: start with torchrun, or unset {n}")
    for n in (*MPI_SIZES, *((*TORCHRUN, "LOCAL_WORLD_SIZE") if alone else ())):
        os.environ.pop(n, None)
    wishes = " ".join(f"{n}={value}" for n, value in own.items() if value.lower() not in NO_WISH)
    if wishes and is_main_process():
        print(f"{name}: note: no effect, because the flags decide: {wishes}", file=sys.stderr)


def start(name: str, check: Callable[[], object]) -> None:
    """What a script calls before its slow imports: `check` parses the flags, and a mistake in them ends the process."""

    def work() -> None:
        clean_environment(name)
        check()

    end_at_interrupts(name, is_main_process)
    if code := run_command(name, work, speaks=is_main_process):
        sys.exit(code)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """All processes leave the block together. A UsageError or OSError in one of them is raised in all."""
    from accelerate.utils import gather_object

    mistake = None
    try:
        yield
    except (UsageError, OSError) as error:
        mistake = error
    found = [error for error in gather_object([mistake]) if error]
    if found:
        raise found[0]
