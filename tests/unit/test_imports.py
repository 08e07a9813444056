"""Which modules import which: nothing slow before the flags are parsed, no script from the package."""

import ast
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {"finetune", "finetune8bh200", "evaluate"}
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "pandas", "scipy", "numpy", "huggingface_hub"}
# Imported before every command, or by the child process that runs hostile SQL and regular expressions.
LIGHT = ("cli", "scoring.sandbox", "scoring.sql", "scoring.regexes", "scoring.programs", "report", "model_card",
         "memory", "preflight", "search", "sweep", "chat", "driver")  # fmt: skip


def imported(tree: ast.AST) -> set[str]:
    """The modules that the import statements name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


COMMANDS = [  # and what the error mentions
    (f"-c 'import llm_jepa.{', llm_jepa.'.join(LIGHT)}'", None),
    *((f"{script}.py --help", None) for script in sorted(SCRIPTS)),
    ("finetune.py --regular --lbd 2", "--lbd"),
    ("finetune.py --train_file missing.jsonl --model_name m", "missing.jsonl"),
    ("finetune8bh200.py --train_file t --param_dtype bfloat16 --lora", "--param_dtype"),
    ("evaluate.py --input_file t --score_gold --batch_size 3", "--batch_size"),
    ("-m llm_jepa.report", "RUN"),
]


@pytest.mark.parametrize(("command", "mentioned"), COMMANDS)
def test_light_modules_help_and_refusals_load_no_deep_learning_library(command, mentioned):
    argv = [sys.executable, "-X", "importtime", *shlex.split(command)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == (2 if mentioned else 0) and (mentioned or "") in "\n".join(errors), errors
    assert "llm_jepa" in loaded and loaded & HEAVY == set()


def test_package_never_imports_a_root_script():
    for path in (ROOT / "llm_jepa").rglob("*.py"):
        assert not imported(ast.parse(path.read_text(encoding="utf-8"))) & SCRIPTS, path
