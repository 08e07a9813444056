"""Programs that attack the machine, the evaluation or their verdict: none passes, none leaves anything behind.

Each program is bounded, so that it does little harm even if the isolation is broken.
"""

from __future__ import annotations

import socket
import time

import pytest
from conftest import skip_without_isolation

from llm_jepa.data.examples import Example
from llm_jepa.scoring import programs
from llm_jepa.scoring.programs import CHILD, PYTHON, passes_tests

# Bodies of attack(), which returns "escaped" if the attack succeeds. {folder} is a folder of the test.
ESCAPES = {
    "forks": """
        for _ in range(20):
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
        return "escaped" """,
    "a thread": """
        threading.Thread(target=time.sleep, args=[1]).start()
        return "escaped" """,
    "another program": """
        subprocess.run(["/usr/bin/env"], check=True)
        return "escaped" """,
    "memory": """
        block = mmap.mmap(-1, 2 << 30)  # never touched
        return "escaped" """,
    "memory in files": """
        blocks = []
        for i in range(100):
            blocks.append(os.memfd_create(str(i)))
            os.write(blocks[-1], bytes(1 << 20))
        return "escaped" """,
    "a large file in memory": """
        file = os.memfd_create("large")
        for _ in range(64):
            os.write(file, bytes(1 << 20))
        return "escaped" """,
    "a large file": """
        with open("/tmp/large", "wb") as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
        return "escaped" """,
    "many files": """
        for i in range(64):
            with open(f"/tmp/{i}", "wb") as file:
                file.write(bytes(1 << 20))
        return "escaped" """,
    "raised limits": """
        resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
        return "escaped" """,
    "another user": """
        os.setuid(0)
        return "escaped" if os.path.exists("/etc") else "in a user namespace" """,
    "writes outside /tmp": """
        for place in ("/", "/dev/shm/", "/usr/", "{python}/", "{folder}/", "/tmp/../"):
            with contextlib.suppress(OSError):
                open(place + "evil", "w").close()
                return "escaped"
        with contextlib.suppress(OSError):
            open("/{child}", "a").close()
            return "escaped" """,
    "reads files": """
        for file in ("{folder}/bait", "/etc/passwd", "/proc/self/environ", "/proc/1/cmdline", "/dev/mem"):
            with contextlib.suppress(OSError):
                open(file).close()
                return "escaped" """,
    "lists home": """
        with contextlib.suppress(OSError):
            shown = [os.path.join("{home}", name) for name in os.listdir("{home}")]
            return all("{python}".startswith(path) for path in shown) or "escaped" """,
    "environment": """
        return "escaped" if "hidden" in str(os.environ) else None """,
    "network": """
        socket.create_connection(("127.0.0.1", {port}), timeout=2)
        return "escaped" """,
    "abstract socket": """
        socket.socket(socket.AF_UNIX).connect("\\0llm-jepa-{port}")
        return "escaped" """,
    "signals": """
        if os.getpid() > 10:
            return "escaped"  # not in a namespace of its own: nothing below is safe
        os.kill({pid}, 0)
        return "escaped" """,
    "kills its parent and all others": """
        if os.getpid() > 10:
            return "escaped"
        for pid in (os.getppid(), 1, -1):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        return "escaped" """,
}
IMPORTS = "import contextlib, mmap, os, resource, signal, socket, subprocess, threading, time\n"
# Programs that do not know the expected value.
FORGERIES = {
    "prints the verdict": """print('{"result": true}', flush=True)""",
    "writes the verdict to all descriptors and exits": """
import os
for fd in range(64):
    for text in (b'{"result": true}\\n', b'[true, true]\\n' * 9):
        try:
            os.write(fd, text)
        except OSError:
            pass
os._exit(0)""",
    "exits before the tests": "import sys\nsys.exit(0)",
    "exits hard before the tests": "import os\nos._exit(0)",
    "exits in the tests": "def secret(): raise SystemExit(0)",
    "interrupts the tests": "def secret(): raise KeyboardInterrupt",
    "exits hard in the tests": "import os\ndef secret(): os._exit(0)",
    "prints the verdict at exit": """
import atexit
atexit.register(print, '{"result": true}')
def secret(): raise SystemExit(0)""",
    "equals everything": """
class Always(str):
    __eq__ = __bool__ = lambda *_: True
    __ne__ = lambda *_: False
    __hash__ = str.__hash__
def secret(): return Always()""",
    "an object that equals everything": """
class Always:
    __eq__ = lambda *_: True
def secret(): return Always()""",
    "a class that equals everything": """
class Meta(type):
    __eq__ = lambda *_: True
class secret(metaclass=Meta): pass""",
    "redefines builtins": """
import builtins, json, operator
builtins.AssertionError = builtins.bool = builtins.isinstance = builtins.str = lambda *_: True
builtins.compile = builtins.exec = builtins.print = lambda *_: True
json.dumps = lambda *_: '[true, true]'
def secret(): return True""",
    "changes the process that serves it": """
import sys
main = sys.modules["__main__"]
main.run_tests = lambda *_: {"result": True}
main.encode = lambda *_: {"result": True}
def secret(): return True""",
    "searches for the expected value": """
import gc, os, sys
def secret():
    found = [sys.argv, dict(os.environ)]
    frame = sys._getframe()
    while frame:
        found.append(dict(frame.f_locals) | frame.f_globals)
        frame = frame.f_back
    for file in range(64):
        try:
            os.set_blocking(file, False)
            found.append(os.read(file, 10000))
        except OSError:
            pass
    texts = [repr(o) for o in (*gc.get_objects(), *found) if type(o) in (str, bytes, list, dict, tuple)]
    return max((t[t.index("pass" + "es-"):][:9] for t in texts if "pass" + "es-" in t), default="nothing")""",
}
EXHAUSTING = {
    "an endless loop": "while True: pass",
    "an endless loop in a call": "def secret():\n    while True: pass",
    "a loop that ignores the signal": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "endless output": "while True: print('x' * 10000)",
    "a loop in C": "def secret(): return sum(iter(int, 1))",
    "endless recursion": "def secret(): return secret()",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "a large result": "def secret(): return 'x' * (20 << 20)",
    "a large number": "def secret(): return 1 << 100_000_000",
    "a deep result": "def secret():\n    x = []\n    for _ in range(10 ** 6): x = [x]\n    return x",
    "a result that contains itself": "def secret():\n    x = []\n    x.append(x)\n    return x",
    "much memory": "def secret(): return bytearray(1 << 30)",
    "deep source": "(" * 100_000,
    "text that is not Unicode": "x = '\ud800'",
    "zero bytes": "\0",
}


def example(tests: str) -> Example:
    return Example(None, "question", "def secret(): pass\ndef attack(): pass", "data.jsonl:1", 1, tests=(tests,))


@pytest.fixture(scope="module")
def score():
    skip_without_isolation()
    with pytest.MonkeyPatch.context() as patch, passes_tests(None) as score:
        patch.setattr(programs, "CPU_SECONDS", 1)
        yield score


def test_no_program_escapes(score, tmp_path, monkeypatch):
    (tmp_path / "bait").write_text("bait")
    (tmp_path / "bait").chmod(0o666)
    tmp_path.chmod(0o777)
    monkeypatch.setenv("SECRET", "hidden")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        port = server.getsockname()[1]
        local.bind(f"\0llm-jepa-{port}")
        local.listen()
        words = {"folder": tmp_path, "home": programs.Path.home(), "python": PYTHON.parents[1], "child": CHILD.name,
                 "port": port, "pid": programs.os.getpid()}  # fmt: skip
        escaped = []
        for name, body in ESCAPES.items():
            for word, value in words.items():
                body = body.replace(f"{{{word}}}", str(value))
            scores = score(f"{IMPORTS}def attack():{body.rstrip()}\n", example("assert attack() == 'escaped'"))
            if scores["pass_at_1"] or scores.get("failure") in ("syntax", "timeout"):
                escaped.append((name, scores))
    assert escaped == []
    assert [path.name for path in tmp_path.iterdir()] == ["bait"] and (tmp_path / "bait").read_text() == "bait"
    assert score("def attack(): return 'escaped'", example("assert attack() == 'escaped'")) == {"pass_at_1": True}


def test_no_program_forges_its_verdict(score):
    wrong = {name: score(program, example("assert secret() == 'passes-71'")) for name, program in FORGERIES.items()}
    assert {name for name, scores in wrong.items() if scores["pass_at_1"]} == set()
    assert score("def secret(): return 'passes-71'", example("assert secret() == 'passes-71'")) == {"pass_at_1": True}


def test_programs_beyond_a_limit_fail_and_the_next_one_works(score):
    scores = {name: score(program, example("assert secret() == 1")) for name, program in EXHAUSTING.items()}
    assert {name for name, s in scores.items() if s["pass_at_1"] or "failure" not in s} == set()
    assert [s["failure"] for s in scores.values()][:2] == ["timeout", "timeout"]
    assert (scores["a large result"]["failure"], scores["a crash"]["failure"]) == ("too_large", "crash")
    assert scores["much memory"]["failure"] == "memory"
    assert score("def secret(): return 1", example("assert secret() == 1")) == {"pass_at_1": True}


def test_a_program_that_waits_is_ended(score, monkeypatch):
    monkeypatch.setattr(programs, "SECONDS", 2.0)
    started = time.monotonic()
    assert score("import time\ntime.sleep(600)", example("")) == {"pass_at_1": False, "failure": "timeout"}
    assert time.monotonic() - started < 60
