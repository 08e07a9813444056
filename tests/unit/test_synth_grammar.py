"""The SYNTH generator writes the committed files."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

DATASETS = ROOT / "datasets"


def test_generator_writes_the_committed_files_from_any_folder(tmp_path):
    command = [sys.executable, str(DATASETS / "prepare.py"), "synth", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    for name in ("synth_train.jsonl", "synth_test.jsonl", "SHA256SUMS"):
        assert (tmp_path / name).read_bytes() == (DATASETS / name).read_bytes()
