"""README.md and docs/: what they say about files, flags, tasks, datasets and results agrees with the repository."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from llm_jepa.cli import parse_flags
from llm_jepa.scoring.tasks import TASKS
from llm_jepa.settings import Settings, check_settings

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "RESULTS.md", *sorted(DOCS.glob("*.md"))]


def code_lines(page: Path) -> list[str]:
    """The lines of indented code blocks, line continuations joined."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_files_exist(page: Path):
    names = set(re.findall(r"(?<![\w./-])[\w/-]+\.(?:py|sh|sbatch)\b", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(names) if not any((d / name).exists() for d in (ROOT, ROOT / "datasets"))] == []


def test_commands_of_finetune_have_flags_that_go_together():
    lines = [line for page in PAGES for line in code_lines(page) if line.startswith("python finetune.py")]
    assert lines
    for line in lines:
        check_settings(*parse_flags(Settings, "", shlex.split(line)[2:]))


def test_python_blocks_import_what_exists():
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    code = [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks if "import" in block]
    nodes = [node for block in code for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    names = [(node.module, alias.name) for node in nodes for alias in node.names]
    assert len(names) > 5
    assert [name for name in names if not hasattr(importlib.import_module(name[0]), name[1])] == []


def test_table_of_datasets_agrees_with_the_converters(monkeypatch: pytest.MonkeyPatch):
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


def test_readme_is_short_and_starts_with_the_two_commands():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
    first = [line.split("  ")[0] for line in code_lines(README)][:2]
    assert first == ["bash run.sh run_jepa", "bash setup.sh --dev && .venv/bin/python -m pytest"]


def test_figures_of_the_main_finding_are_in_the_results():
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    finding = README.read_text(encoding="utf-8").split("## Main finding")[1].split("\n## ")[0]
    numbers = set(re.findall(r"\d+\.\d+", finding))
    assert numbers and numbers <= set(re.findall(r"\d+\.\d+", results))
