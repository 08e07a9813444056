"""The SYNTH generator: it writes the committed files, and each description has the stated meaning."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

from llm_jepa.files import read_jsonl

DATASETS = ROOT / "datasets"
PAIRS = {}  # description: regular expression
for part in ("train", "test"):
    chats = [e["messages"] for _, e in read_jsonl(DATASETS / f"synth_{part}.jsonl")]
    PAIRS |= {chat[1]["content"]: chat[2]["content"] for chat in chats}


def test_generator_writes_the_committed_files_from_any_folder(tmp_path):
    command = [sys.executable, str(DATASETS / "prepare.py"), "synth", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    for name in ("synth_train.jsonl", "synth_test.jsonl", "SHA256SUMS"):
        assert (tmp_path / name).read_bytes() == (DATASETS / name).read_bytes()


MEANINGS = {  # examples of the data for the rules and the precedence in datasets/README.md
    "lines with a vowel, 4 or more times before a character followed by a capital letter": (
        "(([AEIOUaeiou]){4,}).*(..*[A-Z].*).*"
    ),
    "lines with not a number or a capital letter, a lower-case letter, and the string 'dog'": (
        "(~([0-9]))|(([A-Z])&([a-z])&(dog))"
    ),
    "lines not ending in the string 'dog' or a number": "~((.*)((dog)|([0-9])))",
}


def test_descriptions_are_unique_and_have_the_stated_meaning():
    assert len(PAIRS) == len(set(PAIRS.values())) == 10_000
    assert MEANINGS.items() <= PAIRS.items()
