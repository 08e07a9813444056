"""The SYNTH generator: the committed files are its output, and each row is what datasets/README.md says."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))

import prepare
import synth_grammar

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ROOT / "datasets"
SCRIPT = DATASETS / "prepare.py"
NAMES = ("synth_train.jsonl", "synth_test.jsonl")


def run(*arguments, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def read(name):
    """(description, regex) of each row of a committed file."""
    with (DATASETS / name).open(encoding="utf-8") as rows:
        chats = [json.loads(row)["messages"] for row in rows]
    return [(chat[1]["content"], chat[2]["content"]) for chat in chats]


@pytest.fixture(scope="module")
def train():
    return read("synth_train.jsonl")


@pytest.fixture(scope="module")
def test():
    return read("synth_test.jsonl")


# ---- the files ----


def test_generator_reproduces_the_committed_files(tmp_path):
    done = run("synth", "--out_dir", tmp_path, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "manifest.json", *sorted(NAMES)]
    committed = dict(
        reversed(line.split("  ", 1)) for line in (DATASETS / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    )
    for name in NAMES:
        made = (tmp_path / name).read_bytes()
        assert made == (DATASETS / name).read_bytes()
        assert hashlib.sha256(made).hexdigest() == committed[name]


def test_checksums_follow_the_files_and_keep_other_lines(tmp_path):
    other = f"{'0' * 64}  another_train.jsonl"
    stale = f"{'1' * 64}  synth_test.jsonl"
    (tmp_path / "SHA256SUMS").write_text(f"{stale}\n{other}\n", encoding="utf-8")
    assert prepare.main(["synth", "--out_dir", str(tmp_path)]) == 0
    sums = (tmp_path / "SHA256SUMS").read_text(encoding="utf-8")
    own = [f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}" for name in sorted(NAMES)]
    assert sums == "\n".join([other, *own]) + "\n"


@pytest.mark.parametrize("name, count", [("synth_train.jsonl", 8000), ("synth_test.jsonl", 2000)])
def test_rows_have_the_documented_shape(name, count):
    content = (DATASETS / name).read_bytes()
    assert content.endswith(b"\n") and b"\r" not in content
    rows = [json.loads(line) for line in content.decode("utf-8").split("\n")[:-1]]
    assert len(rows) == count
    for row in rows:
        assert list(row) == ["messages"]
        assert [list(message) for message in row["messages"]] == [["role", "content"]] * 3
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        system, description, regex = (message["content"] for message in row["messages"])
        assert system == "Convert natural language to regular expression."
        assert description.startswith("lines ") and regex
        assert description == " ".join(description.split()) and regex == regex.strip()


def test_no_description_and_no_regex_stands_twice(train, test):
    for column in zip(*(train + test), strict=True):
        assert [text for text, count in Counter(column).items() if count > 1] == []


# ---- the grammar ----


def test_regexes_are_well_formed(train, test):
    compiled = 0
    for description, regex in train + test:
        depth = 0
        for character in regex:
            depth += {"(": 1, ")": -1}.get(character, 0)
            assert depth >= 0, (description, regex)
        assert depth == 0, (description, regex)
        assert "()" not in regex
        if not set("&~") & set(regex):
            re.compile(regex)
            compiled += 1
    assert compiled > 2000


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


class Reader:
    """Reads a description by the precedence that datasets/README.md states, apart from the generator's table."""

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


def test_each_description_reads_as_its_regex_and_each_rule_occurs(train, test):
    reader = Reader()
    wrong = [(words, regex) for words, regex in test if reader.line(words) != regex]
    reader.used.clear()
    wrong += [(words, regex) for words, regex in train if reader.line(words) != regex]
    assert wrong == []
    signs = ["2 by &", "3 by &", "2 by |", "3 by |", "{N,}", "{1,N}", "+", "*"]
    other = ["not", "followed by", "before", "words", "not, of a property", *PROPERTIES.values()]
    both = ["two properties, and", "two properties, or"]
    assert sorted(reader.used) == sorted(signs + other + both)
    assert min(reader.used.values()) > 100, reader.used


def test_every_wording_of_the_table_occurs_in_train(train):
    text = "\n".join(description for description, _ in train)
    for rule in synth_grammar.RULES:
        for wording in rule.wordings:
            pattern = re.sub(r"\b[xyz]\b", ".+", re.escape(wording).replace(r"\ ", " "))
            assert re.search(re.sub(r"\bN\b", r"\\d", pattern), text), wording


def test_a_description_has_one_regex():
    rng = random.Random(11)
    regexes = {}
    for _ in range(20_000):
        phrase = synth_grammar.draw_phrase(rng, "S", 3)
        assert regexes.setdefault(phrase.words, phrase.regex) == phrase.regex
    assert len(regexes) > 10_000


def test_strings_are_named_in_order_of_appearance(train):
    for description, regex in train:
        for text in (re.findall(r"'(\w+)'", description), re.findall("dog|truck|ring|lake", regex)):
            assert list(dict.fromkeys(text)) == list(synth_grammar.STRINGS)[: len(set(text))], (description, regex)


def test_arguments_of_and_and_or_are_distinct(train):
    operands = r"\([^()]*\)"
    for _, regex in train:
        for chain in re.findall(rf"(?:{operands}[&|])+{operands}", regex):
            arguments = re.split(r"(?<=\))[&|](?=\()", chain)
            assert len(set(arguments)) == len(arguments), regex


def test_choose_keeps_to_the_weights():
    rng = random.Random(3)
    drawn = Counter(synth_grammar.choose(rng, [("often", 3), ("never", 0), ("seldom", 1)]) for _ in range(4000))
    assert set(drawn) == {"often", "seldom"}
    assert 2850 < drawn["often"] < 3150  # five standard deviations are 137


# ---- failures ----


def test_unknown_dataset_is_refused(tmp_path):
    done = run("sinth", "--out_dir", tmp_path)
    assert done.returncode == 2
    assert "invalid choice: 'sinth'" in done.stderr and "synth" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing parent", "file"])
def test_unusable_out_dir_is_one_clear_error(tmp_path, kind):
    out_dir = tmp_path / "missing" / "out" if kind == "missing parent" else tmp_path / "file"
    if kind == "file":
        out_dir.write_text("kept", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    done = run("synth", "--out_dir", out_dir)
    assert done.returncode == 2
    assert f"cannot write to --out_dir {out_dir}" in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("at", ["write", "rename"])
def test_interruption_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch, at):
    path = tmp_path / "synth_train.jsonl"
    path.write_text("old\n", encoding="utf-8")

    def write_half(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    def interrupt(*_):
        raise KeyboardInterrupt

    if at == "write":
        monkeypatch.setattr(Path, "write_bytes", write_half)
    else:
        monkeypatch.setattr(prepare.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.main(["synth", "--out_dir", str(tmp_path), "--overwrite"])
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["synth_train.jsonl"]
    assert path.read_text(encoding="utf-8") == "old\n"
