"""The SYNTH generator: it writes the committed files, and each description has the stated meaning."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))

import synth_grammar

DATASETS = Path(synth_grammar.__file__).parent


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


LEAVES = {
    "a vowel": "[AEIOUaeiou]",
    "a number": "[0-9]",
    "a capital letter": "[A-Z]",
    "a lower-case letter": "[a-z]",
    "a letter": "[A-Za-z]",
    "a character": ".",
    **{f"the string '{name}'": name for name in ("dog", "truck", "ring", "lake")},
}
TIMES = {
    r", (\d) or more times": r"{\1,}",
    r" at least (\d) times": r"{\1,}",
    r" at most (\d) times": r"{1,\1}",
    r" at least once": "+",
    r", one or more times": "+",
    r", zero or more times": "*",
}
PROPERTIES = {
    r"(starting|beginning) with ": "({})(.*)",
    r"ending (with|in) ": "(.*)({})",
    r"(containing|having) only ": "{}",
    r"(containing|having) ": ".*{!s}.*",
}


class Parser:
    """Parses a description by the precedence in datasets/README.md, independently of the generator's table."""

    def __init__(self):
        self.used = Counter()

    def line(self, words):
        if rest := re.fullmatch("lines with (.+)", words):
            return self.phrase(rest[1])
        verb = "(?:not )?(?:starting|beginning|ending|containing|having) "
        first, *second = re.split(f" (and|or) (?={verb})", words.removeprefix("lines "))
        if not second:
            return self.property(first)
        self.used[f"two properties, {second[0]}"] += 1
        sign = {"and": "&", "or": "|"}[second[0]]
        return f"({self.property(first)}){sign}({self.property(second[1])})"

    def property(self, words):
        if words.startswith("not "):
            self.used["not, of a property"] += 1
            return f"~({self.property(words[4:])})"
        for wording, regex in PROPERTIES.items():
            if start := re.match(wording, words):
                self.used[regex] += 1
                rest = words[start.end() :]
                return regex.format(self.wrapped(rest) if "!s" in regex else self.phrase(rest))
        raise AssertionError(words)

    def wrapped(self, words):
        return LEAVES.get(words) or f"({self.phrase(words)})"

    def joined(self, sign, parts):
        self.used[f"{len(parts)} by {sign}"] += 1
        return sign.join(f"({self.phrase(part)})" for part in parts)

    def phrase(self, words):
        if words in LEAVES:
            return LEAVES[words]
        if words.startswith("words with "):
            self.used["words"] += 1
            return rf"\b{self.wrapped(words[11:])}\b"
        if " before " in words:
            self.used["before"] += 1
            return "({}).*({}).*".format(*map(self.phrase, words.split(" before ", 1)))
        for wording, count in TIMES.items():
            if times := re.search(wording + "$", words):
                self.used[re.sub(r"\\1", "N", count)] += 1
                return f"({self.phrase(words[: times.start()])}){times.expand(count)}"
        if re.search(r"(?<!,) or ", words):
            return self.joined("|", words.removeprefix("either ").split(" or "))
        for word, sign in (("or", "|"), ("and", "&")):
            if f", {word} " in words:
                left, last = words.removeprefix("either ").split(f", {word} ")
                return self.joined(sign, [*left.split(", "), last])
        if " and " in words:
            return self.joined("&", words.removeprefix("both ").split(" and "))
        if negated := re.fullmatch("(?:not|anything but) (.+)", words):
            self.used["not"] += 1
            return f"~({LEAVES[negated[1]]})"
        first, second = words.split(" followed by ")
        self.used["followed by"] += 1
        return f"{LEAVES[first]}.*{LEAVES[second]}.*"


def test_each_description_parses_to_its_regex_and_each_rule_occurs(pairs):
    parser = Parser()
    assert [(words, regex) for words, regex in pairs if parser.line(words) != regex] == []
    signs = ["2 by &", "3 by &", "2 by |", "3 by |", "{N,}", "{1,N}", "+", "*"]
    other = ["not", "followed by", "before", "words", "not, of a property", *PROPERTIES.values()]
    assert sorted(parser.used) == sorted([*signs, *other, "two properties, and", "two properties, or"])
    assert min(parser.used.values()) > 100, parser.used


def test_strings_are_named_in_order_of_appearance(pairs):
    for description, regex in pairs:
        for text in (re.findall(r"'(\w+)'", description), re.findall("dog|truck|ring|lake", regex)):
            assert list(dict.fromkeys(text)) == list(synth_grammar.STRINGS)[: len(set(text))], (description, regex)


def test_choose_draws_in_proportion_to_the_weights():
    rng = random.Random(3)
    drawn = Counter(synth_grammar.choose(rng, [("often", 3), ("never", 0), ("seldom", 1)]) for _ in range(4000))
    assert set(drawn) == {"often", "seldom"}
    assert 2850 < drawn["often"] < 3150  # five standard deviations are 137
