"""pass@1 for MBPP: does a generated program pass the example's tests?

    with passes_tests(False) as score:
        score("def double(x):\\n    return 2 * x", example)  # {"pass_at_1": True}

Programs are untrusted. bubblewrap (`bwrap`) isolates each one, with its tests, in a process of its own. A program that
neither passes nor fails an assertion has one of these reasons: `syntax`, `error` (an exception), `timeout`, `memory`,
`crash` (the process has ended, or the program has written to the file of the verdict).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.scoring.sandbox import MEGABYTE, Failure

if TYPE_CHECKING:  # tasks.py imports this module
    from llm_jepa.scoring.tasks import Scorer, Scores

PYTHON = Path(sys.executable).resolve()  # outside a virtual environment, so with the standard library only
NOBODY = 65534
SECONDS = 30.0  # on the clock
# Soft and hard; the soft one on CPU time ends the process with SIGXCPU.
LIMITS = {"CPU": (10, 11), "AS": 2 * [1024 * MEGABYTE], "FSIZE": 2 * [16 * MEGABYTE], "NOFILE": (64, 64),
          "NPROC": (0, 0), "CORE": (0, 0)}  # fmt: skip
FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
PROBE = "import os\ntry:\n    os._exit(os.fork() < 0)\nexcept OSError:\n    pass"  # passes if it cannot start a process


def extract_code(response: str) -> str:
    """The first Python block in ``` fences after a thinking block, else the first block, else the complete text.

    A block without its closing fence, cut at the maximum length, ends with the text.
    """
    response = response.rpartition("</think>")[2].replace("\r\n", "\n")
    blocks = FENCED.findall(response)
    languages = [language.lower() in ("python", "py", "python3") for language, _ in blocks]
    return textwrap.dedent(blocks[languages.index(max(languages))][1]) if blocks else response.strip()


def example_tests(example: Example) -> str:
    """The example's tests. Raises ExampleError if it has none."""
    if not example.tests:
        raise ExampleError(f'{example.source}: no "tests", which decide whether a program is right')
    return "\n".join(example.tests)


def child() -> None:
    """The process of a program: only this function's text runs there.

    stdin: JSON [token, limits, user ID or null, program, tests]. stdout: the token after all tests have passed, else a
    reason. The program's own stdin, stdout and stderr are /dev/null.
    """
    import builtins, json, os, resource, sys, types  # noqa: E401, I001

    token, limits, user, *sources = json.load(sys.stdin)
    if user is not None:  # root has no limit on processes
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), limit)
    verdict, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    module = sys.modules["program"] = types.ModuleType("program")  # not __main__, so that no example usage runs
    namespace, original = vars(module), vars(builtins).copy()
    run, write, leave = exec, os.write, os._exit  # the program may replace them
    try:
        program, tests = (compile(source, "program", "exec") for source in sources)
        run(program, namespace)
        namespace["__builtins__"] = original
        run(tests, namespace)
        result = token
    except BaseException as error:  # also SystemExit
        reasons = {AssertionError: "assert", MemoryError: "memory", SyntaxError: "syntax", BaseException: "error"}
        result = next(reason for kind, reason in reasons.items() if isinstance(error, kind))
    write(verdict, result.encode())
    leave(0)  # without the finalizers of the program's objects


def isolation() -> list[str]:
    """bubblewrap's part of a command: the process sees only Python, read-only, and an empty /tmp, and no network.

    Raises OSError with the reason if that does not work here.
    """
    bwrap, prefix = shutil.which("bwrap"), PYTHON.parents[1]
    if not bwrap or Path.home().is_relative_to(prefix):
        raise OSError(f"{prefix} contains the home folder" if bwrap else "bwrap: not found; apt-get install bubblewrap")
    # Folders above a mounted one are made here, because bubblewrap may give them the mode 0700.
    folders, root = [*map(str, prefix.parents[-2::-1]), "/dev"], ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    isolated = [
        bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--die-with-parent", "--cap-drop", "ALL", *(root if os.getuid() == 0 else ()),
        *(word for folder in folders for word in ("--perms", "0755", "--dir", folder)),
        *(word for folder in ("/usr", "/lib", "/lib64", str(prefix)) for word in ("--ro-bind-try", folder, folder)),
        "--dev-bind", "/dev/null", "/dev/null", "--perms", "1777", "--size", str(32 * MEGABYTE), "--tmpfs", "/tmp",
        "--remount-ro", "/", "--chdir", "/tmp",
    ]  # fmt: skip
    try:
        passes(isolated, PROBE, "")
    except Failure as failure:
        raise OSError(f"a test of its limit on processes ends with {failure.reason}") from None
    return isolated


def passes(isolated: list[str], program: str, tests: str) -> bool:
    """Whether a program passes the tests. `isolated`: the result of `isolation`, or [] for none.

    Raises Failure with one of the module's reasons, and OSError if the process does not start.
    """
    token, user = secrets.token_hex(), NOBODY if isolated and os.getuid() == 0 else None
    job = json.dumps([token, LIMITS, user, program, tests]).encode()
    command = [*isolated, str(PYTHON), "-S", "-s", "-P", "-c", inspect.getsource(child) + "child()"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:  # a file has a limit on its size
        try:
            done = subprocess.run(
                command, input=job, stdout=output, stderr=subprocess.PIPE, timeout=SECONDS, start_new_session=True,
                cwd=folder, env={"PYTHONHASHSEED": "0"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failure("timeout") from None
        output.seek(0)
        verdict = output.read(2 * len(token)).decode(errors="replace")
    if done.stderr:  # of bubblewrap, or of Python before the program
        raise OSError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    if verdict in (token, "assert"):
        return verdict == token
    if abs(done.returncode) % 128 == signal.SIGXCPU:
        raise Failure("timeout")
    raise Failure(verdict if verdict in ("memory", "syntax", "error") else "crash")


def passes_tests(allow_code_execution: bool | None) -> contextlib.AbstractContextManager[Scorer]:
    """Opens the scorer `pass_at_1`. It raises ExampleError for an example without tests.

    Raises UsageError where programs cannot be isolated, unless `allow_code_execution`: then a warning is printed.
    """
    try:
        isolated = isolation()
    except OSError as error:
        if not allow_code_execution:
            hint = "--allow_code_execution runs them with all your rights"
            raise UsageError(f"bubblewrap cannot isolate generated programs ({error}); {hint}") from None
        print(f"warning: generated programs run without isolation ({error})", file=sys.stderr)
        isolated = []

    def score(prediction: str, example: Example) -> Scores:
        tests = example_tests(example)
        try:
            return {"pass_at_1": passes(isolated, extract_code(prediction), tests)}
        except Failure as failure:
            return {"pass_at_1": False, "failure": failure.reason}

    return contextlib.nullcontext(score)
