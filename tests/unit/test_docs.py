"""README.md and docs/: commands, flags, files, links, tasks, datasets and figures agree with the repository."""

import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

from llm_jepa.cli import parse_flags
from llm_jepa.scoring.tasks import TASKS
from llm_jepa.settings import Settings, check_settings

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
COMMAND = re.compile(r"(?:[A-Z_0-9]+=\S* )*(?:python|\.venv/bin/python|torchrun|bash) ")
TARGET = re.compile(r"[\w/]+\.(py|sh)|llm_jepa\.\w+")


def code_lines(page: Path) -> list[str]:
    """The lines of fenced and indented code blocks, line continuations joined."""
    fenced, lines = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return re.sub(r"\\\n", "", "\n".join(lines)).splitlines()


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command that runs something of this repository."""
    parts = [(page.name, part) for page in PAGES for line in code_lines(page) for part in re.split(r" && | \| ", line)]
    found = [(page, shlex.split(part, comments=True)) for page, part in parts if COMMAND.match(part)]
    return [(page, words) for page, words in found if any(map(TARGET.fullmatch, words)) and "pytest" not in words]


@cache
def help_text(*command: str) -> str:
    """What a script (a path) or module (a dotted name) prints with --help; the second word is a subcommand."""
    out, file = io.StringIO(), ROOT / command[0]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [*command, "--help"])
        if file.suffix == ".py":
            patch.syspath_prepend(file.parent)
            runpy.run_path(str(file), run_name="__main__")
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    return out.getvalue()


def test_page_of_flags_is_current():
    text = runpy.run_path(str(ROOT / "docs/flags.py"))["page"]()
    assert (ROOT / "docs/flags.md").read_text(encoding="utf-8") == text, "run python docs/flags.py"
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(len(re.split(r"(?<!\\)\|", row)) == 5 for row in rows)


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_command_mentions_existing_files_and_flags(page, words):
    at = next(i for i, word in enumerate(words) if TARGET.fullmatch(word))
    target, rest = words[at], words[at + 1 :]
    assert target.startswith("llm_jepa.") or (ROOT / target).is_file()
    flags = [word.partition("=")[0] for word in rest if word.startswith("--") and word != "--"]
    if target.endswith(".sh"):
        shown = (ROOT / target).read_text() + help_text("finetune.py")
    elif target == "llm_jepa.preflight":
        shown = help_text(target) + help_text("finetune8bh200.py")
    elif flags:
        shown = help_text(target, *(rest[:1] if target == "datasets/prepare.py" else []))
    if target == "finetune.py":
        check_settings(*parse_flags(Settings, "", rest))
    for flag in flags:
        assert re.search(rf"{flag}(?![\w-])", shown), f"{target} has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_and_mentioned_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", text)
    assert [x for x in links if not (page.parent / x).exists()] == []
    names = re.findall(r"(?<![\w./-])[\w/-]+\.(?:py|sh|sbatch)\b", text)
    assert [name for name in names if not any((d / name).exists() for d in (ROOT, ROOT / "datasets"))] == []


def test_python_blocks_import_what_exists():
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (DOCS / "python.md").read_text(encoding="utf-8"), re.MULTILINE)
    code = [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks if "import" in block]
    nodes = [node for block in code for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    names = [(node.module, alias.name) for node in nodes for alias in node.names]
    assert len(names) > 5
    assert [name for name in names if not hasattr(importlib.import_module(name[0]), name[1])] == []


def test_table_of_datasets_agrees_with_the_converters(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "datasets"))
    convert = importlib.import_module("convert")
    lines = (DOCS / "data.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 5}
    assert table.keys() == convert.DATASETS.keys()
    for name, (_, counts, scores, command) in table.items():
        for numbers in convert.DATASETS[name].counts.values():
            assert " / ".join(map(str, numbers)) in counts, name
        assert re.findall(r"`(\w+)`", scores) == list(TASKS[name].scores if name in TASKS else ()), name
        assert (f"DATASET={name} " in command) == (name not in ("synth", "paraphrase")), name


def test_table_of_scores_has_those_of_all_tasks():
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| [^|]*\| `(\w+)` \|", text, re.MULTILINE)
    assert set(explained) == {score for task in TASKS.values() for score in task.scores}


def test_figures_of_the_main_finding_are_in_the_results():
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    finding = README.read_text(encoding="utf-8").split("## Main finding")[1].split("\n## ")[0]
    numbers = set(re.findall(r"\d+\.\d+", finding))
    assert numbers and numbers <= set(re.findall(r"\d+\.\d+", results))
