"""examples/own_pairs.ipynb runs from the CSV file to the verdict."""

import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from llm_jepa.files import read_json


@pytest.mark.timeout(1200)
def test_notebook_leads_from_pairs_to_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("llm_jepa", "datasets", "models", "examples"):  # so that files may be edited while the test runs
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("finetune.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    notebook = nbformat.read(ROOT / "examples" / "own_pairs.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "commit the notebook without its outputs"
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path / "examples")}}).execute()

    [work] = tmp_path.glob("own_pairs_*")
    runs = list((work / "runs").iterdir())
    assert len(runs) == 6 and {read_json(run / "run.json")["status"] for run in runs} == {"finished"}
    record = read_json(work / "report" / "report.json")
    assert record["left_out"] == []
    [exact] = [c for c in record["datasets"][0]["comparisons"] if c["score"] == "exact"]
    assert exact["n"] == 3 and exact["verdict"] in "".join(output.text for output in cells[-1].outputs)
