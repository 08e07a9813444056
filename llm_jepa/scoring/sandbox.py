"""Work on untrusted input in a child process, bounded in time and memory, whose end harms nobody.

    with Sandbox("llm_jepa.scoring.sql:execute", seconds=10) as sandbox:
        rows = sandbox.call("concert_singer.sqlite", "SELECT name FROM singer")

The child runs this file as a script: `python -I sandbox.py MODULE:FUNCTION MEMORY`. It reads one JSON list of arguments
a line and writes one JSON object a line, {"result": …} or {"failure": reason}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20
READY = b"ready\n"  # the child's first line
START_SECONDS = 60.0  # until then
TRIES = 3  # of a start that something from outside brings down


class Failure(Exception):
    """A call without a result. `reason` is one word, to be counted: timeout, memory, crash, or the function's own."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Sandbox:
    """A child process that answers calls of one function of one of the project's modules.

    The child starts with the first call and again after each that it did not outlive. It has an address space of
    `memory` bytes, cannot write to files, sees no environment variables, and ends itself after `seconds` of work on a
    call, so that it never outlives its parent by more.
    """

    def __init__(self, function: str, seconds: float, memory: int = 1024 * MEGABYTE, answer: int = 64 * MEGABYTE):
        """`function`: "module:name", called with JSON values, returns a JSON value of at most `answer` bytes."""
        self.function, self.seconds, self.memory, self.answer = function, seconds, memory, answer
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):  # what a dead child did not read
                    pipe.close()
            self._child = None

    def call(self, *arguments: Any) -> Any:
        """The function's result. Raises Failure where it raised one itself, or did not end, or the child died twice.

        A child that dies may have been killed by something else, also before it read the call: the second tells.
        """
        request = json.dumps([self.seconds, *arguments]).encode() + b"\n"
        try:
            line = self._answer(request)
        except Failure as failure:
            if failure.reason != "crash":
                raise
            line = self._answer(request)
        reply = json.loads(line)
        if "failure" in reply:
            raise Failure(reply["failure"])
        return reply["result"]

    def _answer(self, request: bytes) -> bytes:
        """The line that answers the request, of a new child where there is none."""
        if self._child is None:
            self._start()
        try:
            return self._exchange(request)
        except BaseException:  # an interrupted exchange would answer the next call
            self.close()
            raise

    def _start(self) -> None:
        """Starts the child, again where it was killed or hangs.

        Raises OSError with what it printed where it cannot work, no answer's fault.
        """
        for _ in range(TRIES):
            with tempfile.TemporaryFile() as errors:
                self._child = subprocess.Popen(
                    [sys.executable, "-I", str(Path(__file__).resolve()), self.function, str(self.memory)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                    env={}, bufsize=0, start_new_session=True,
                )  # fmt: skip
                with selectors.DefaultSelector() as ready:
                    ready.register(self._child.stdout, selectors.EVENT_READ)
                    hangs = not ready.select(START_SECONDS)
                if not hangs and self._child.stdout.readline() == READY:
                    return
                code = None
                if not hangs:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        code = self._child.wait(5)
                self.close()
                errors.seek(0)
                nothing = "it says nothing" if code is not None else "it hangs"
                said = (errors.read().decode(errors="replace").strip() or nothing).splitlines()[-1]
            if code is not None and code >= 0:  # it ended by itself
                break
        raise OSError(f"the process for {self.function} does not start with {sys.executable}: {said}")

    def _exchange(self, request: bytes) -> bytes:
        """Writes the request and reads the one line that answers it."""
        child, line = self._child, bytearray()
        deadline = time.monotonic() + self.seconds + 5  # the child reads, and ends itself before that
        for pipe in (child.stdin, child.stdout):
            os.set_blocking(pipe.fileno(), False)
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdin, selectors.EVENT_WRITE)
            ready.register(child.stdout, selectors.EVENT_READ)
            view = memoryview(request)
            while not line.endswith(b"\n"):
                for key, _ in ready.select(max(0.0, deadline - time.monotonic())):
                    if key.fileobj is child.stdin:
                        try:
                            view = view[os.write(child.stdin.fileno(), view[:65536]) :]
                        except BrokenPipeError:
                            raise Failure(self._cause()) from None
                        if not view:
                            ready.unregister(child.stdin)
                    else:
                        part = os.read(child.stdout.fileno(), MEGABYTE)
                        if not part:
                            raise Failure(self._cause())
                        line += part
                if len(line) > self.answer:
                    raise Failure("too_large")
                if time.monotonic() > deadline:
                    raise Failure("timeout")
        return bytes(line)

    def _cause(self) -> str:
        """Why the child is gone: its own alarm, or anything else."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5)
        return "timeout" if self._child.returncode == -signal.SIGALRM else "crash"


def serve(function: str, memory: int) -> None:
    """The child's life: answers calls until its parent closes the pipe."""
    import resource

    replies = os.fdopen(os.dup(1), "wb")
    module, _, name = function.partition(":")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    work = getattr(importlib.import_module(module), name)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for printed in (1, 2):
        os.dup2(nowhere, printed)
    for limit, value in (("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(getattr(resource, limit), (value, value))
    replies.write(READY)
    replies.flush()
    for request in sys.stdin.buffer:
        seconds, *arguments = json.loads(request)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # without a handler the alarm ends the process at once
        try:
            reply = json.dumps({"result": work(*arguments)})
        except Failure as failure:
            reply = json.dumps({"failure": failure.reason})
        except (MemoryError, RecursionError):
            reply = json.dumps({"failure": "memory"})
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(reply.encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    sys.modules["llm_jepa.scoring.sandbox"] = sys.modules[
        "__main__"
    ]  # one class Failure, here and in the module that is called
    serve(sys.argv[1], int(sys.argv[2]))
