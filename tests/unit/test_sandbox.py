"""The sandbox's limits on time, memory, files and replies, and what happens when its child process dies."""

import os
import signal
import time

import pytest

from llm_jepa.scoring.sandbox import MEGABYTE, Failure, Sandbox


@pytest.mark.parametrize(
    "function, arguments, reason",
    [
        ("time:sleep", [60], "timeout"),
        ("operator:mul", ["x", 300 * MEGABYTE], "memory"),
        ("operator:mul", ["x", 2 * MEGABYTE], "too_large"),
        ("os:abort", [], "crash"),
        ("builtins:int", ["no number"], "crash"),  # an exception that is not a Failure
    ],
)
def test_call_beyond_a_limit_fails_and_the_next_call_works(function, arguments, reason):
    started, open_files = time.monotonic(), len(os.listdir("/proc/self/fd"))
    with Sandbox(function, seconds=0.5, memory=200 * MEGABYTE, max_reply=MEGABYTE) as box:
        with pytest.raises(Failure, match=f"^{reason}$"):
            box.call(*arguments)
        works = {"time:sleep": [0], "operator:mul": ["x", 2], "builtins:int": ["7"]}
        if function in works:
            assert box.call(*works[function]) == {"operator:mul": "xx", "builtins:int": 7}.get(function)
        child = box._child
    assert child is None or child.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 10 and len(os.listdir("/proc/self/fd")) == open_files


def test_child_cannot_write_to_files_and_sees_no_environment(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("text")
    with Sandbox("shutil:copyfile", 5) as box, pytest.raises(Failure, match="crash"):
        box.call(str(source), str(target))
    assert target.read_bytes() == b""
    with Sandbox("os:getenv", 5) as box:
        assert box.call("PATH") is None
