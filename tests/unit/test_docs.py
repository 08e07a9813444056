"""README and docs: the page of flags is current, commands name existing files and flags, and links lead to files."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

from llm_jepa import flag_docs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:[A-Z_0-9]+=\S* )*(?:python|\.venv/bin/python|torchrun|bash) ")


def blocks(page: Path) -> str:
    """The fenced and indented code of a page, line continuations joined."""
    fenced, lines = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return re.sub(r"\\\n", "", "\n".join(lines))


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command that runs something of this repository."""
    found = []
    for page in PAGES:
        for line in blocks(page).splitlines():
            for part in re.split(r" && | \| ", line):
                words = shlex.split(part, comments=True) if COMMAND.match(part) else []
                if any(re.fullmatch(r"[\w/]+\.(py|sh)|llm_jepa\.\w+", word) for word in words):
                    found.append((page.name, words))
    return found


@cache
def help_text(*command: str) -> str:
    """What a script (a path) or module (a dotted name) prints with --help; the second word is a subcommand."""
    argv, path, out = sys.argv, sys.path[:], io.StringIO()
    sys.argv = [*command, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            if command[0].endswith(".py"):
                sys.path.insert(0, str((ROOT / command[0]).parent))
                runpy.run_path(str(ROOT / command[0]), run_name="__main__")
            else:
                runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path = argv, path
    return out.getvalue()


def test_page_of_flags_is_current():
    assert flag_docs.PAGE.read_text(encoding="utf-8") == flag_docs.page(), "run python -m llm_jepa.flag_docs"


def test_flag_tables_have_three_columns_and_every_command():
    text = flag_docs.page()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(len(re.split(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert [c for c, *_ in flag_docs.COMMANDS] == re.findall(r"^## `(.*)`$", text, flags=re.M)


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_command_names_existing_files_and_flags(page, words):
    at = next(i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.(py|sh)|llm_jepa\.\w+", word))
    target, rest = words[at], words[at + 1 :]
    assert target.startswith("llm_jepa.") or (ROOT / target).is_file()
    if target.endswith(".sh"):
        flags, shown = rest, (ROOT / target).read_text() + help_text("finetune.py")
    elif target == "llm_jepa.preflight":
        flags, shown = rest, help_text(target) + help_text("finetune8bh200.py")
    else:
        subcommand = rest[:1] if target == "datasets/prepare.py" else []
        flags, shown = rest, help_text(target, *subcommand)
    for flag in (word.partition("=")[0] for word in flags if word.startswith("--") and word != "--"):
        assert re.search(rf"{flag}(?![\w-])", shown), f"{target} has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_existing_files(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"https?:|mailto:", link)]
    assert [link for link in links if not (page.parent / link).exists()] == []
