"""Runs a function on untrusted input in a child process with limits on time and memory.

    with Sandbox("llm_jepa.scoring.sql:execute", seconds=10) as sandbox:
        rows = sandbox.call("concert_singer.sqlite", "SELECT name FROM singer")

The child process runs `serve`. For each call it reads one line of JSON, [seconds, *arguments], and writes one line of
JSON, {"result": …} or {"failure": reason}.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20
READY = "ready"  # the child's first line
CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from llm_jepa.scoring.sandbox import serve; serve(sys.argv[2], int(sys.argv[3]))"
)
ROOT = Path(__file__).resolve().parents[2]


class Failure(Exception):
    """A call without a result. `reason` is one word: timeout, memory, crash, too_large, or the function's own."""

    reason = property(str)


class Sandbox(contextlib.AbstractContextManager):
    """Calls one function in a child process.

    The child starts with the first call, and again after a call that ended it. It has an address space of `memory`
    bytes, cannot write to files, has no environment variables, and ends itself after `seconds` of work on one call, so
    it outlives its parent by at most `seconds`.
    """

    def __init__(self, function: str, seconds: float, memory: int = 1024 * MEGABYTE, max_reply: int = 64 * MEGABYTE):
        """`function`: "module:name"; its arguments and result are JSON values, the result at most `max_reply` bytes."""
        self.function, self.seconds, self.memory, self.max_reply = function, seconds, memory, max_reply
        self._child: subprocess.Popen | None = None

    def __exit__(self, *exception: object) -> None:
        if self._child is not None:
            self.close()

    def close(self) -> str:
        """Ends the child process and returns the last line of its errors."""
        self._child.kill()
        errors = self._child.communicate()[1]  # closes the pipes and waits
        self._child = None
        return errors.decode(errors="replace").strip().rpartition("\n")[2]

    def call(self, *arguments: Any) -> Any:
        """Returns the function's result.

        Raises Failure if the function raised one, exceeded a limit, or ended the child.
        """
        if self._child is None:
            self._start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.write(json.dumps([self.seconds, *arguments]).encode() + b"\n")
                self._child.stdin.flush()
            line = self._child.stdout.readline(self.max_reply)
            if len(line) >= self.max_reply:
                raise Failure("too_large")
            if not line.endswith(b"\n"):
                raise Failure("timeout" if self._child.wait() == -signal.SIGALRM else "crash")
        except BaseException:  # otherwise the next call would get the reply to an interrupted one
            self.close()
            raise
        reply = json.loads(line)
        if "failure" in reply:
            raise Failure(reply["failure"])
        return reply["result"]

    def _start(self) -> None:
        """Starts the child. Raises OSError with the child's error if it does not get ready."""
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-c", CHILD, str(ROOT), self.function, str(self.memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, start_new_session=True,
        )  # fmt: skip
        if self._child.stdout.readline().decode().strip() != READY:
            error = self.close()
            raise OSError(f"the process for {self.function} does not start with {sys.executable}: {error}")


def serve(function: str, memory: int) -> None:
    """The child process: replies to calls until its parent closes the pipe."""
    replies = os.fdopen(os.dup(1), "w")
    work = pkgutil.resolve_name(function)
    devnull = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(devnull, output)
    for limit, value in (("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has every limit
            resource.setrlimit(getattr(resource, limit), (value, value))
    print(READY, file=replies, flush=True)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once
    for request in sys.stdin.buffer:
        seconds, *arguments = json.loads(request)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            reply = json.dumps({"result": work(*arguments)})
        except Failure as failure:
            reply = json.dumps({"failure": failure.reason})
        except (MemoryError, RecursionError):
            reply = json.dumps({"failure": "memory"})
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, file=replies, flush=True)
