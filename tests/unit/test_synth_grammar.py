"""The SYNTH generator: it writes the committed files, and each description has the stated meaning."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

DATASETS = ROOT / "datasets"
sys.path.insert(0, str(DATASETS))

import synth_grammar  # noqa: E402


@pytest.fixture(scope="module")
def pairs():
    """(description, regular expression) of each example, train then test."""
    found = []
    for part, count in (("train", 8000), ("test", 2000)):
        lines = (DATASETS / f"synth_{part}.jsonl").read_text(encoding="utf-8").splitlines()
        chats = [json.loads(line)["messages"] for line in lines]
        assert [[m["role"] for m in chat] for chat in chats] == [["system", "user", "assistant"]] * count
        found += [(chat[1]["content"], chat[2]["content"]) for chat in chats]
    return found


def test_generator_writes_the_committed_files_from_any_folder(tmp_path):
    command = [sys.executable, str(DATASETS / "prepare.py"), "synth", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    for name in ("synth_train.jsonl", "synth_test.jsonl", "SHA256SUMS"):
        assert (tmp_path / name).read_bytes() == (DATASETS / name).read_bytes()


def test_descriptions_and_regexes_are_unique(pairs):
    for column in zip(*pairs, strict=True):
        assert len(set(column)) == len(column)


MEANINGS = {  # an example of the data for each rule and each step of the precedence in datasets/README.md
    "lines with a vowel, 4 or more times before a character followed by a capital letter": (
        "(([AEIOUaeiou]){4,}).*(..*[A-Z].*).*"
    ),
    "lines with a vowel or the string 'dog' and a lower-case letter followed by a letter": (
        "([AEIOUaeiou])|((dog)&([a-z].*[A-Za-z].*))"
    ),
    "lines with not a number or a capital letter, a lower-case letter, and the string 'dog'": (
        "(~([0-9]))|(([A-Z])&([a-z])&(dog))"
    ),
    "lines with a letter, zero or more times before not a capital letter": "(([A-Za-z])*).*(~([A-Z])).*",
    "lines with a letter, 7 or more times before a capital letter": "(([A-Za-z]){7,}).*([A-Z]).*",
    "lines with both a number and the string 'dog' before a character at least once": "(([0-9])&(dog)).*((.)+).*",
    "lines with words with the string 'dog', 3 or more times": r"\b((dog){3,})\b",
    "lines with the string 'dog' before a vowel, anything but a character, and not a number": (
        "(dog).*(([AEIOUaeiou])&(~(.))&(~([0-9]))).*"
    ),
    "lines containing only a character at most 7 times": "(.){1,7}",
    "lines containing only a number or starting with the string 'dog'": "([0-9])|((dog)(.*))",
    "lines starting with a capital letter or containing a capital letter": "(([A-Z])(.*))|(.*[A-Z].*)",
    "lines ending in a number and not having a number": "((.*)([0-9]))&(~(.*[0-9].*))",
    "lines not ending in the string 'dog' or a number": "~((.*)((dog)|([0-9])))",
}


def test_descriptions_have_the_stated_meaning(pairs):
    assert MEANINGS.items() <= dict(pairs).items()


def test_strings_are_named_in_order_of_appearance(pairs):
    for description, regex in pairs:
        for text in (re.findall(r"'(\w+)'", description), re.findall("dog|truck|ring|lake", regex)):
            assert list(dict.fromkeys(text)) == list(synth_grammar.STRINGS)[: len(set(text))], (description, regex)
