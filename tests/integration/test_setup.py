"""setup.sh: what it accepts, and when an environment is complete. Only CI runs a real installation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with setup.sh and an environment without pip that is marked as complete."""
    folder = tmp_path_factory.mktemp("setup")
    for name in ("setup.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    version = f"Python {sys.version.split()[0]}"
    stamp = ["torch cuda", version, *(folder / "requirements.txt").read_text().split()]
    (folder / ".venv/.installed").write_text("\n".join(stamp) + "\n")
    return folder


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs setup.sh; an installation would fail, since PYTHON does not exist."""
    environment = os.environ | {"PYTHON": "no-such-python"}
    return subprocess.run(["bash", folder / "setup.sh", *arguments], env=environment, capture_output=True, text=True)


def test_a_complete_environment_needs_no_installation(installed):
    before = sorted((path, path.stat().st_mtime_ns) for path in installed.rglob("*"))
    assert setup(installed).returncode == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in installed.rglob("*")) == before


@pytest.mark.parametrize("missing", ["--dev", "unfinished"])
def test_an_incomplete_environment_is_installed(installed, missing, tmp_path):
    folder = shutil.copytree(installed, tmp_path / "copy", symlinks=True)
    if missing == "unfinished":
        (folder / ".venv/.unfinished").touch()
    done = setup(folder, *([missing] if missing.startswith("--") else []))
    assert done.returncode == 1 and "no-such-python" in done.stderr


def test_unknown_arguments_are_refused_and_help_lists_the_variables(installed):
    done = setup(installed, "--develop")
    assert done.returncode == 2 and "--develop" in done.stderr
    assert all(word in setup(installed, "--help").stdout for word in ("--dev", "--vllm", "PYTHON", "TORCH_BUILD"))


def test_a_misspelled_variable_is_refused(installed, tmp_path):
    folder = shutil.copytree(installed, tmp_path / "copy", symlinks=True)
    (folder / "llm_jepa").mkdir()
    shutil.copy(ROOT / "llm_jepa/variables.py", folder / "llm_jepa")
    for variables, code in (({"TORCH_BULID": "cpu"}, 2), ({"TORCH_BUILD": "cuda"}, 0)):
        environment = os.environ | {"PYTHON": sys.executable} | variables
        done = subprocess.run(["bash", folder / "setup.sh"], env=environment, capture_output=True, text=True)
        assert done.returncode == code and ("TORCH_BUILD" in done.stderr) == (code == 2), done.stderr
