"""Which modules import which: read from the source with ast, without importing anything."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"finetune", "finetune8bh200", "evaluate"}
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "pandas", "scipy", "numpy", "huggingface_hub"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "llm_jepa").rglob("*.py")
}
# Imported before every command, or by the child process that runs hostile SQL and regular expressions.
LIGHT = ("llm_jepa", "llm_jepa.cli", "llm_jepa.scoring.sandbox", "llm_jepa.scoring.sql", "llm_jepa.scoring.regexes",
         "llm_jepa.scoring.programs",
         *(f"llm_jepa.{command}" for command in ("report", "model_card", "memory", "preflight", "search", "sweep",
                                                 "flag_docs", "driver")))  # fmt: skip


def imported(path: Path, everywhere: bool) -> set[str]:
    """The modules that a file imports at module level, or everywhere; not under `if TYPE_CHECKING`."""
    found, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


def within_package(name: str) -> set[str]:
    """The modules of the package that a module imports at module level, its parent packages included."""
    names = {n for n in imported(MODULES[name], everywhere=False) if n.startswith("llm_jepa")}
    return {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 2)} & MODULES.keys() - {name}


def reached(name: str) -> set[str]:
    """The modules that importing a module loads, itself and its parent packages included."""
    parts, done = name.split("."), set()
    to_do = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    while to_do:
        if (module := to_do.pop()) not in done:
            done.add(module)
            to_do += within_package(module)
    return done


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_parse_their_flags_before_slow_imports(script):
    body = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")).body
    at = next(i for i, node in enumerate(body) if isinstance(node, ast.If))
    assert ast.unparse(body[at].test) == "__name__ == '__main__'" and "start(" in ast.unparse(body[at])
    names = {node.module for node in body[:at] if isinstance(node, ast.ImportFrom)} & MODULES.keys()
    names |= {alias.name for node in body[:at] if isinstance(node, ast.Import) for alias in node.names}
    assert "llm_jepa.distributed" in names
    loaded = {m for n in names & MODULES.keys() for r in reached(n) for m in imported(MODULES[r], everywhere=False)}
    assert {n.split(".")[0] for n in names | loaded} & HEAVY == set()


def test_root_contains_three_scripts():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


def test_package_never_imports_a_root_script():
    found = {name: imported(path, everywhere=True) for name, path in MODULES.items()}
    assert {name for name, names in found.items() if SCRIPTS & {n.split(".")[0] for n in names}} == set()


def test_package_has_no_import_cycle():
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    TopologicalSorter({name: within_package(name) - packages for name in MODULES}).prepare()


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_deep_learning_library(name):
    assert "llm_jepa" in reached(name)
    loaded = {n.split(".")[0] for module in reached(name) for n in imported(MODULES[module], everywhere=False)}
    assert loaded & HEAVY == set()
