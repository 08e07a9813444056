"""MBPP: which part of a response is the program, and which programs pass the tests."""

import contextlib
import io
import shutil

import pytest
from conftest import call, message_row, metrics, skip_without_isolation, start, train, write_rows

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example
from llm_jepa.scoring.programs import extract_code, passes_tests

DOUBLE = "def double(x):\n    return 2 * x"


@pytest.mark.parametrize(
    "response, code",
    [(f" {DOUBLE}\n", DOUBLE),
     (f"```python\n{DOUBLE}\n```", f"{DOUBLE}\n"),
     (f"Sure:\n\n``` Python \r\n{DOUBLE}\r\n```\nIt uses `*`.", f"{DOUBLE}\n"),
     (f"```\n{DOUBLE}", f"{DOUBLE}\n"[:-1]),
     ("```bash\npip install x\n```\n```py\na\n```\n```py\nb\n```", "a\n"),
     ("```\na\n```\n```text\nb\n```", "a\n"),
     ("1. Code:\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass\n"),
     ("<think>\n```python\nwrong\n```\n</think>\n```python\nright\n```", "right\n"),
     ("x = '```'", "x = '```'"),
     ("", "")],
)  # fmt: skip
def test_program_is_the_first_python_block_or_the_complete_response(response, code):
    assert extract_code(response) == code


# tests, right programs, wrong programs with their reason
CASES = {
    "function": ("assert double(4) == 8\nassert double('a') == 'aa'",
                 [DOUBLE, "double = lambda x: x + x", "import decimal, re\n" + DOUBLE,
                  DOUBLE + "\nif __name__ == '__main__':\n    double(input())",
                  "import time\nclass Slow:\n  def __del__(self): time.sleep(99)\nslow = Slow()\n" + DOUBLE],
                 {"def double(x): return x": None, "def double(x)": "syntax", "if 1:\ndouble = 8": "syntax",
                  "": "error", "double = 8": "error", "def double(x): return x / 0": "error",
                  DOUBLE + "\ninput()": "error", "raise MemoryError": "memory"}),
    # program and tests share objects: arguments change, objects are equal, functions are arguments
    "objects": ("root = Node(1)\nroot.left = Node(2)\nassert root == Node(1) and root is same(root)\n"
                "values = [3, 1]\nsort(values, key=lambda x: x)\nassert values == [1, 3]",
                ["class Node:\n    def __init__(self, value): self.value = value\n"
                 "    def __eq__(self, other): return self.value == other.value\n"
                 "def same(x): return x\ndef sort(values, key): values.sort(key=key)"], {"class Node: pass": "error"}),
    "data class": ("assert Point(1, 2).x == 1",
                   ["from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n"
                    "class Point:\n    x: int\n    y: int"], {}),
    "a function with the name of a builtin": ("assert sum(3, 4) == 7", ["def sum(a, b): return a + b"], {"": "error"}),
}  # fmt: skip


@pytest.fixture(scope="module", params=["isolated", "allowed"])
def score(request):
    """The scorer, with bubblewrap and without."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            if request.param == "allowed":
                patch.setattr(shutil, "which", lambda name: None)
            else:
                skip_without_isolation()
            score = stack.enter_context(passes_tests(True))
        yield score


@pytest.mark.parametrize("case", CASES)
def test_program_passes_only_if_it_does_what_the_tests_expect(case, score):
    tests, right, wrong = CASES[case]
    example = Example(None, "question", "answer", "data.jsonl:7", 7, tests=tuple(tests.splitlines()))
    for program in right:
        assert score(f"```python\n{program}\n```", example) == {"pass_at_1": True}, program
    for program, failure in wrong.items():
        reason = {"failure": failure} if failure else {}
        assert score(program, example) == {"pass_at_1": False} | reason, program


def test_without_bubblewrap_the_task_is_refused_unless_allowed(tmp_path, monkeypatch):
    row = message_row("Double x.", DOUBLE) | {"tests": ["assert double(2) == 4"]}
    data = write_rows(tmp_path / "mbpp_test.jsonl", [row])
    monkeypatch.setenv("PATH", str(tmp_path))
    done = call("evaluate", "--score_gold", "--input_file", data)
    assert done.code == 2 and "bwrap" in done.err and "--allow_code_execution" in done.err
    done = call("evaluate", "--score_gold", "--input_file", data, "--allow_code_execution")
    assert done.code == 0 and "pass_at_1" in done.out and "100.00" in done.out and "without isolation" in done.err
    done = call("evaluate", "--score_gold", "--input_file", data, "--task", "text", "--allow_code_execution")
    assert done.code == 2 and "--allow_code_execution" in done.err
    flags = ("--regular", "--max_steps", 1, "--eval_file", data, "--eval_generate", 1)
    for task in (), ("--task", "text", "--allow_code_execution"):
        assert "--allow_code_execution" in start(data, tmp_path / "run", *flags, *task, code=2).err
    run = train(data, tmp_path / "run", *flags, "--allow_code_execution")
    assert metrics(run, "eval_pass_at_1")
    flags = (run, "--input_file", data, "--task", "mbpp", "--max_new_tokens", 1)
    assert "--allow_code_execution" in call("llm_jepa.chat", *flags, code=2).err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Double x.")))
    assert "pass_at_1 no" in call("llm_jepa.chat", *flags, "--allow_code_execution", code=0).err


def test_isolation_that_fails_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'No permissions' >&2; exit 1")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="No permissions"), passes_tests(None):
        pass


def test_example_without_tests_is_reported_with_its_line(tmp_path):
    rows = [message_row("Double x.", DOUBLE) | {"tests": ["assert double(2) == 4"]}, message_row("a", "b")]
    data = write_rows(tmp_path / "mbpp_test.jsonl", rows)
    done = call("evaluate", "--score_gold", "--input_file", data)
    assert done.code == 2 and f"{data}:2" in done.err and '"tests"' in done.err
