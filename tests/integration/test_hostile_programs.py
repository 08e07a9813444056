"""Programs that attack the machine or their verdict: none passes, none leaves anything behind.

Each program is bounded, so that it does little harm even if the isolation is broken.
"""

import contextlib
import inspect
import os
import socket
import time
from pathlib import Path

import pytest
from conftest import skip_without_isolation

from llm_jepa.data.examples import Example
from llm_jepa.scoring import programs
from llm_jepa.scoring.programs import PYTHON, passes_tests

NAMES = """
import contextlib, mmap, os, resource, signal, socket, subprocess, time
folder, home, python, pid, port = {!r}
"""
# An attack succeeds if nothing raises.
ESCAPES = [
    "for _ in range(20): os.fork() or (time.sleep(3), os._exit(0))",
    "subprocess.run(['/usr/bin/env'], check=True)",
    "mmap.mmap(-1, 2 << 30)",
    "open('/tmp/large', 'wb').write(bytes(20 << 20))",
    "for i in range(64): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
    "resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))",
    "os.setuid(0); os.listdir('/etc')",
    *(f"open({place} + '/evil', 'w')" for place in ("''", "'/dev/shm'", "'/usr'", "python", "folder", "home")),
    *(f"open({file})" for file in ("folder + '/bait'", "'/etc/passwd'", "'/proc/self/environ'", "'/dev/mem'")),
    "assert not all(python.startswith(os.path.join(home, name)) for name in os.listdir(home))",
    "assert 'hidden' in str(os.environ)",
    "socket.create_connection(('127.0.0.1', port), timeout=2)",
    "os.kill(pid, 0)",
    # Only in a namespace of its own; elsewhere it would do harm.
    "for pid in (-1, os.getppid(), os.getpid()) if os.getpid() < 10 else (): os.kill(pid, signal.SIGKILL)",
]
TEST = "assert set(secret()) == {'passes'}"
# Programs that do not return what the test expects, and do not search the memory of their process.
FORGERIES = {
    "prints a verdict": "print('passed', flush=True)\ndef secret(): return 'no'",
    "writes a verdict to all descriptors and exits": """
import contextlib, os
for fd in range(64):
    with contextlib.suppress(OSError):
        os.write(fd, b'passed')
os._exit(0)""",
    "exits before the tests": "import sys\nsys.exit(0)",
    "exits hard before the tests": "import os\nos._exit(0)",
    "exits in the tests": "def secret(): raise SystemExit(0)",
    "exits hard in the tests": "import os\ndef secret(): os._exit(0)",
    "interrupts the tests": "def secret(): raise KeyboardInterrupt",
    "redefines builtins that run the tests": """
import builtins, os
builtins.exec = builtins.compile = builtins.isinstance = os.write = lambda *_, **__: True
def secret(): return 'no'""",
    "redefines builtins that the tests use": """
import builtins
builtins.AssertionError = ValueError
builtins.set = lambda _: {'passes'}
def secret(): return 'no'""",
    "redefines the assertion": "class AssertionError(Exception): pass\ndef secret(): return 'no'",
}
EXHAUSTING = {
    "an endless loop in a call": ("def secret():\n    while True: pass", "timeout"),
    "a loop that ignores the signal": ("import signal\nsignal.signal(24, signal.SIG_IGN)\nwhile True: pass", "crash"),
    "endless output": ("while True: print('x' * 10000)", "timeout"),
    "endless output to all files": ("import os\nwhile True:\n    os.write(3, bytes(1 << 20))", "crash"),
    "endless recursion": ("def secret(): return secret()", "error"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "crash"),
    "much memory": ("def secret(): return bytearray(1 << 30)", "memory"),
    "text that is not Unicode": ("x = '\ud800'", "error"),
}


def example(tests: str) -> Example:
    return Example(None, "question", "answer", "data.jsonl:1", 1, tests=(tests,))


@pytest.fixture(scope="module")
def score():
    skip_without_isolation()
    with pytest.MonkeyPatch.context() as patch, passes_tests(None) as score:
        patch.setitem(programs.LIMITS, "CPU", (1, 2))
        yield score


def test_no_program_escapes(score, tmp_path, monkeypatch):
    (tmp_path / "bait").write_text("bait")
    (tmp_path / "bait").chmod(0o666)
    tmp_path.chmod(0o777)
    monkeypatch.setenv("SECRET", "hidden")
    with socket.create_server(("127.0.0.1", 0)) as server:
        words = (str(tmp_path), str(Path.home()), str(PYTHON.parents[1]), os.getpid(), server.getsockname()[1])
        names = NAMES.format(words)
        scores = {attack: score(names + attack, example("assert True")) for attack in ESCAPES}
    assert {a for a, s in scores.items() if s["pass_at_1"] or s.get("failure") in ("syntax", "timeout")} == set()
    assert [path.name for path in tmp_path.iterdir()] == ["bait"] and (tmp_path / "bait").read_text() == "bait"
    assert score(names, example("assert home")) == {"pass_at_1": True}


def test_no_program_forges_its_verdict(score):
    wrong = {name: score(program, example(TEST)) for name, program in FORGERIES.items()}
    assert {name for name, scores in wrong.items() if scores["pass_at_1"]} == set()
    assert score("def secret(): return ['passes']", example(TEST)) == {"pass_at_1": True}


def test_programs_beyond_a_limit_fail_with_a_reason(score):
    reasons = {name: score(program, example(TEST)).get("failure") for name, (program, _) in EXHAUSTING.items()}
    assert reasons == {name: reason for name, (_, reason) in EXHAUSTING.items()}


def test_a_program_that_waits_is_ended(score, tmp_path, monkeypatch):
    source, mark = inspect.getsource(programs.child), f"# {tmp_path}\n"
    monkeypatch.setattr(inspect, "getsource", lambda _: mark + source)
    monkeypatch.setattr(programs, "SECONDS", 3.0)
    assert score("import time\ntime.sleep(600)", example(TEST)) == {"pass_at_1": False, "failure": "timeout"}
    time.sleep(1)
    commands = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(process.read_text(errors="replace"))
    assert len(commands) > 0 and not any(mark in command for command in commands)
