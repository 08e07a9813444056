"""pass@1 for MBPP: does a generated program pass the example's tests?

    with passes_tests(False) as score:
        score("def double(x):\\n    return 2 * x", example)  # {"pass_at_1": True}

Programs are untrusted. For each one, bubblewrap (`bwrap`) isolates two processes of program_child.py: one with the
program and one with the tests, which gives the verdict. Without a verdict there is one of these reasons: `syntax`,
`error` (an exception), `timeout`, `memory`, `crash` (a process has ended), `too_large` (a returned value), and
`gold_syntax` (the example's tests or its answer are not Python).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.scoring.program_child import MEGABYTE
from llm_jepa.scoring.sandbox import Failure

if TYPE_CHECKING:  # tasks.py imports this module
    from llm_jepa.scoring.tasks import Scorer, Scores

CPU_SECONDS, SECONDS = 10, 30.0  # limits of each of the two processes: CPU time, and time on the clock
CHILD = Path(__file__).with_name("program_child.py")
PYTHON = Path(sys.executable).resolve()  # outside a virtual environment, so with the standard library only
NOBODY = "65534"
TEMPORARY = 32 * MEGABYTE  # bytes of the private folder
FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
# A program that returns True only where it cannot start a process.
PROBE = """
import os
def limited():
    try:
        if os.fork() == 0:
            os._exit(0)
    except OSError:
        return True
"""


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


def isolation() -> list[str]:
    """bubblewrap's part of a command: the process sees only Python, read-only, and an empty /tmp, and no network.

    Raises OSError with the reason if that does not work here.
    """
    bwrap, prefix = shutil.which("bwrap"), PYTHON.parents[1]
    if not bwrap:
        raise OSError("bwrap is not installed; try apt-get install bubblewrap")
    if Path(os.path.expanduser("~")).is_relative_to(prefix):
        raise OSError(f"Python's folder {prefix} contains the home folder")
    # Made here, because bubblewrap may give a folder above a mounted one the mode 0700.
    folders = [*map(str, prefix.parents[-2::-1]), "/dev"]
    root = ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if os.getuid() == 0 else ()
    isolated = [
        bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--die-with-parent", *root,
        *(word for folder in folders for word in ("--perms", "0755", "--dir", folder)),
        *(word for folder in ("/usr", "/lib", "/lib64") for word in ("--ro-bind-try", folder, folder)),
        "--ro-bind", str(prefix), str(prefix), "--ro-bind", str(CHILD), f"/{CHILD.name}",
        "--dev-bind", "/dev/null", "/dev/null", "--perms", "1777", "--size", str(TEMPORARY), "--tmpfs", "/tmp",
        "--remount-ro", "/", "--chdir", "/tmp",
    ]  # fmt: skip
    try:
        limited = passes(isolated, PROBE, PROBE, "assert limited()")
    except Failure as failure:
        raise OSError(f"a program fails with {failure.reason}") from None
    if not limited:
        raise OSError("it does not limit processes")
    return isolated


def passes(isolated: list[str], program: str, reference: str, tests: str) -> bool:
    """Whether a program passes the tests. `isolated`: the result of `isolation`, or [] for none.

    Raises Failure with one of the module's reasons, and OSError if the two processes do not start.
    """
    path, uid = (f"/{CHILD.name}", NOBODY if os.getuid() == 0 else "-") if isolated else (str(CHILD), "-")
    command = [*isolated, str(PYTHON), "-S", "-s", "-P", path, str(CPU_SECONDS), uid]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def start(*role: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen:
            child = subprocess.Popen(
                [*command, *role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder,
                env={"PYTHONHASHSEED": "0"}, start_new_session=True, pass_fds=pass_fds,
            )  # fmt: skip
            stack.enter_context(child)  # closes its pipes and waits
            stack.callback(kill, child)
            return child

        served = start("program")
        pipes = (served.stdout.fileno(), served.stdin.fileno())
        tested = start("tests", *map(str, pipes), pass_fds=pipes)
        served.stdout.close()
        served.stdin.close()
        try:
            reply, errors = tested.communicate(json.dumps([program, reference, tests]).encode(), SECONDS)
            verdict = json.loads(reply or '{"failure": "crash"}')
            if verdict.get("failure") in ("crash", "start"):
                served.wait(1)
        except subprocess.TimeoutExpired:
            raise Failure("timeout") from None
        if not reply and errors or verdict.get("failure") == "start":
            error = (errors or served.stderr.read()).decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"the processes for a program do not start: {error}")
    if "failure" in verdict:
        ended = {abs(child.returncode) % 128 for child in (served, tested)}
        raise Failure("timeout" if signal.SIGXCPU in ended else verdict["failure"])
    return verdict["result"]


def kill(child: subprocess.Popen) -> None:
    """Ends a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def passes_tests(allow_code_execution: bool | None) -> Iterator[Scorer]:
    """Opens the scorer `pass_at_1`. It raises ExampleError for an example without tests.

    Raises UsageError where programs cannot be isolated, unless `allow_code_execution`: then a warning is printed.
    """
    try:
        isolated = isolation()
    except OSError as error:
        if not allow_code_execution:
            hint = "give --allow_code_execution to run them with all your rights"
            raise UsageError(f"bubblewrap cannot isolate generated programs ({error}); {hint}") from None
        print(f"warning: generated programs run without isolation ({error})", file=sys.stderr)
        isolated = []

    def score(prediction: str, example: Example) -> Scores:
        tests, answer = example_tests(example), extract_code(example.assistant)
        try:
            return {"pass_at_1": passes(isolated, extract_code(prediction), answer, tests)}
        except Failure as failure:
            return {"pass_at_1": False, "failure": failure.reason}

    yield score
