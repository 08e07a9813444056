"""MBPP: which part of a response is the program, and which programs pass the tests."""

from __future__ import annotations

import shutil

import pytest
from conftest import call, message_row, skip_without_isolation, write_rows

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example
from llm_jepa.scoring.programs import extract_code, passes_tests

DOUBLE = "def double(x):\n    return 2 * x"


@pytest.mark.parametrize(
    "response, code",
    [
        (f" {DOUBLE}\n", DOUBLE),
        (f"```python\n{DOUBLE}\n```", f"{DOUBLE}\n"),
        (f"Sure:\n\n``` Python \r\n{DOUBLE}\r\n```\nIt uses `*`.", f"{DOUBLE}\n"),
        (f"```\n{DOUBLE}", f"{DOUBLE}\n"[:-1]),
        ("```bash\npip install x\n```\n```py\na\n```\n```py\nb\n```", "a\n"),
        ("```\na\n```\n```text\nb\n```", "a\n"),
        ("1. Code:\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass\n"),
        ("<think>\n```python\nwrong\n```\n</think>\n```python\nright\n```", "right\n"),
        ("x = '```'", "x = '```'"),
        ("", ""),
    ],
)
def test_program_is_the_first_python_block_or_the_complete_response(response, code):
    assert extract_code(response) == code


# (reference, tests, right programs, wrong programs with their reason)
CASES = {
    "function": (DOUBLE, "assert double(4) == 8\nassert double('a') == 'aa'",
                 [DOUBLE, "double = lambda x: x + x", "import decimal, re\n" + DOUBLE],
                 {"def double(x): return x": None, "def double(x)": "syntax", "": "error", "double = 8": "error",
                  "def double(x): return x / 0": "error", "assert 1 == 2": None}),
    "values": ("def f(): pass", "\n".join(
        f"assert f({v}) == {v} and type(f({v})) is type({v})" for v in (
            "None", "True", "10 ** 5000", "-0.1", "1e999", "2j", "'\\ud800\\n☃'", "b'\\xff'", "[1, (2, {3})]",
            "{(1, 'a'): [{}], None: ()}", "frozenset({(1,), frozenset()})", "set()")),
        ["def f(x): return x"], {"import json\ndef f(x): return json.loads(json.dumps(x))": "error"}),
    "subclasses": ("def f(): pass", "assert f('abca') == {'a': 2, 'b': 1, 'c': 1}",
                   ["import collections\nf = collections.Counter"], {"def f(x): return x": None}),
    # as in MBPP: the tests make objects of the program's classes
    "objects": ("class Node:\n    pass\ndef depth(n): pass",
                "root = Node(1)\nroot.left = Node(2)\nassert root.left.value == 2\nassert depth([root])\n"
                "assert root and not Node(0) and list(root) == [1, 2] and double_all(root.left)(3) == 6",
                ["class Node:\n    left = None\n    def __init__(self, value): self.value = value\n"
                 "    def __iter__(self): yield from (self.value, self.left.value)\n"
                 "    def __len__(self): return self.value\n"
                 "def depth(nodes): return nodes[0].left.value == 2\n"
                 "def double_all(n): return lambda x: x * n.value"],
                {"class Node: pass": "error"}),
    "a function with the name of a builtin": ("def sum(a, b): return a + b", "assert sum(3, 4) == 7",
                                              ["def sum(a, b): return a + b"], {"": "error"}),
    "imports of the answer": ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(4), 2)",
                              ["def f(x): return 2.0"],
                              {"import math\nmath.isclose = lambda *_: True\ndef f(x): return 3": None}),
    "exceptions": ("def f(x): raise ValueError",
                   "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
                   ["class Bad(ValueError): pass\ndef f(x): raise Bad(x)"],
                   {"def f(x): raise KeyError": "error", "def f(x): return x": None}),
    "example usage": (DOUBLE, "assert double(1) == 2", [DOUBLE + "\nif __name__ == '__main__':\n    double(input())"],
                      {DOUBLE + "\ninput()": "error"}),
    "wrong tests": (DOUBLE, "assert double(1) =", [], {DOUBLE: "gold_syntax"}),
    "wrong answer": ("def double", "assert double(1) == 2", [], {DOUBLE: "gold_syntax"}),
}  # fmt: skip


def example(answer: str, tests: str | None) -> Example:
    return Example(None, "question", answer, "data.jsonl:7", 7, tests=tests and (tests,))


@pytest.fixture(scope="module", params=["isolated", "allowed"])
def score(request):
    """The scorer, with bubblewrap and without."""
    opened = passes_tests(True)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "allowed":
            patch.setattr(shutil, "which", lambda name: None)
        else:
            skip_without_isolation()
        score = opened.__enter__()
    yield score
    opened.__exit__(None, None, None)


@pytest.mark.parametrize("case", CASES)
def test_program_passes_only_if_it_does_what_the_tests_expect(case, score):
    reference, tests, right, wrong = CASES[case]
    for program in right:
        assert score(f"```python\n{program}\n```", example(reference, tests)) == {"pass_at_1": True}, program
    for program, failure in wrong.items():
        reason = {"failure": failure} if failure else {}
        assert score(program, example(reference, tests)) == {"pass_at_1": False} | reason, program


def test_without_bubblewrap_the_task_is_refused_unless_allowed(tmp_path, monkeypatch):
    row = message_row("Double x.", DOUBLE) | {"tests": ["assert double(2) == 4"]}
    data = write_rows(tmp_path / "mbpp_test.jsonl", [row])
    monkeypatch.setenv("PATH", str(tmp_path))
    done = call("evaluate", "--score_gold", "--input_file", data)
    assert done.code == 2 and "bwrap" in done.err and "--allow_code_execution" in done.err
    with pytest.raises(UsageError), passes_tests(None):
        pass
    done = call("evaluate", "--score_gold", "--input_file", data, "--allow_code_execution")
    assert done.code == 0 and "pass_at_1" in done.out and "100.00" in done.out and "without isolation" in done.err
    done = call("evaluate", "--score_gold", "--input_file", data, "--task", "text", "--allow_code_execution")
    assert done.code == 2 and "--allow_code_execution" in done.err


def test_isolation_that_fails_is_refused(tmp_path, monkeypatch):
    bwrap = tmp_path / "bwrap"
    for script, reason in (("echo 'No permissions' >&2; exit 1", "No permissions"), ("exit 1", "bubblewrap")):
        bwrap.write_text(f"#!/bin/sh\n{script}\n")
        bwrap.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UsageError, match=reason), passes_tests(None):
            pass


def test_example_without_tests_is_reported_with_its_line(tmp_path):
    rows = [message_row("Double x.", DOUBLE) | {"tests": ["assert double(2) == 4"]}, message_row("a", "b")]
    data = write_rows(tmp_path / "mbpp_test.jsonl", rows)
    done = call("evaluate", "--score_gold", "--input_file", data)
    assert done.code == 2 and f"{data}:2" in done.err and '"tests"' in done.err
    data = write_rows(data, [rows[0] | {"tests": "assert double(2) == 4"}])
    done = call("evaluate", "--score_gold", "--input_file", data)
    assert done.code == 2 and f"{data}:1" in done.err and '"tests"' in done.err
