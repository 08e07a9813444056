"""Pytest hooks: the marker `fast`, and with CI=true every skip that is not on a short list is an error.

tests/conftest.py imports the hooks.
"""

from __future__ import annotations

import os
import re

import pytest

# What a machine may lack; nothing else may be skipped in CI.
ALLOWED_SKIPS = (
    r"no GPU",
    r"there is a GPU",  # tests of the messages for machines without one
    r"vLLM is not installed",
    r"bitsandbytes",
    r"no network namespaces",  # two nodes on one machine need root
    r"a file system cannot be mounted",
)
# Files of tests/unit that take longer than a few seconds.
SLOW_FILES: set[str] = set()
unexpected: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the unit tests as fast, except those of SLOW_FILES."""
    for item in items:
        if item.path.parent.name == "unit" and item.path.name not in SLOW_FILES:
            item.add_marker(pytest.mark.fast)


def _record(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""
    if reason and not any(re.search(allowed, reason) for allowed in ALLOWED_SKIPS):
        unexpected.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects the unexpected skips of tests, with pytest-xdist in the main process."""
    _record(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Collects the unexpected skips of test files."""
    _record(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the session in CI if there are unexpected skips."""
    if unexpected and os.environ.get("CI") == "true" and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists the unexpected skips."""
    if unexpected and os.environ.get("CI") == "true":
        terminalreporter.section("skips that are not allowed in CI (tests/skips.py)")
        for line in sorted(set(unexpected)):
            terminalreporter.write_line(line)
