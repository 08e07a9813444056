"""DFA-equality of all answers of SYNTH and TURK: equal to themselves, to a rewritten form, and not to a changed one.

Through the sandbox and with the bounds that scoring uses.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_jepa.scoring.regexes import dfa_equal
from llm_jepa.scoring.sandbox import Sandbox
from llm_jepa.scoring.tasks import REGEX_SECONDS, REGEX_STATES

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
FILES = {
    "made": [ROOT / "datasets" / "synth_test.jsonl"],
    "published": [SHARED / "synth_test.jsonl", SHARED / "turk_test.jsonl"],
}

# Each keeps the language of any x. The complements and the brackets are not worked away by the parser.
REWRITES = [
    "~(~({x}))",
    "~(~({x})|~(.*))",
    "({x})&.*",
    "({x})|~(.*)",
    "(({x})&.)|(({x})&(()|...*))",
    "()({x})()",
    "({x}){{1}}",
    "(({x})&[0-9].*)|(({x})&~([0-9].*))",
]


def answers(name: str) -> list[str]:
    """The different answers of the test files; TURK has the same ones as SYNTH."""
    regexes = []
    for path in FILES[name]:
        if not path.exists():
            pytest.skip(f"the published {path.name} is not here")
        with path.open(encoding="utf-8") as rows:
            regexes += [json.loads(row)["messages"][-1]["content"] for row in rows]
    assert len(regexes) == 2000 * len(FILES[name])
    return list(dict.fromkeys(regexes))


def changed_in_one_place(regex: str) -> Iterator[str]:
    """The expression with one change in one place: a count, an operator, a class or a string replaced."""
    changes = [
        ("&", "|"), ("|", "&"), ("~", ""), (")*", ")+"), (")+", ")*"), (",}", "}"), ("[0-9]", "[1-9]"),
        ("[a-z]", "[a-y]"), ("[A-Z]", "[B-Z]"), ("[AEIOUaeiou]", "[AEIOaeiou]"), ("[A-Za-z]", "[A-Za-y]"),
        ("dog", "fog"), ("truck", "truc"), ("ring", "rings"), ("lake", "lak"), (r"\b", ""), (".*", ".+"),
    ]  # fmt: skip
    for old, new in changes:
        at = regex.find(old)
        if at >= 0:
            yield regex[:at] + new + regex[at + len(old) :]


def one_word_changed(regex: str, word: str) -> str:
    """The expression without the word where it has it, else with it: another language whatever the two are."""
    return f"(({regex})|{word})&~(({regex})&{word})"


@pytest.mark.parametrize("name", FILES)
def test_answers_equal_themselves_and_rewritten_forms_only(name):
    rng, wrong = random.Random(5), []
    words = ["", "a", "E", "7", "dog", "truckdog", r"\bring\b", "x1Z", "☃", "aaaa000000"]
    with Sandbox("llm_jepa.scoring.regexes:dfa_equal", REGEX_SECONDS) as sandbox:
        for regex in answers(name):
            rewritten = rng.choice(REWRITES).format(x=regex)
            changed = one_word_changed(regex, rng.choice(words) or "()")
            for other, expected in ((regex, True), (rewritten, True), (changed, False)):
                if sandbox.call(other, regex, REGEX_STATES) is not expected:
                    wrong.append((other, regex))
    assert wrong == []


class Matcher:
    """Matches words by the positions where a match can end, apart from any automaton. Knows the answers' syntax."""

    def __init__(self, regex: str):
        self.text, self.at = regex, 0
        self.tree = self._binary("|", lambda: self._binary("&", self._row))
        assert self.at == len(regex)

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, length: int = 1) -> str:
        self.at += length
        return self.text[self.at - length : self.at]

    def _binary(self, sign, part):
        parts = [part()]
        while self._next() == sign:
            self._take()
            parts.append(part())
        return (sign, parts)

    def _row(self):
        parts = []
        while self._next() not in ("", "|", "&", ")"):
            parts.append(self._repeat())
        return ("row", parts)

    def _repeat(self):
        tree = self._complement()
        while self._next() in ("*", "+", "?", "{") and self._next():
            word = self._take() if self._next() != "{" else self._take(self.text.index("}", self.at) + 1 - self.at)
            least, _, most = {"*": "0,", "+": "1,", "?": "0,1"}.get(word, word[1:-1]).partition(",")
            tree = ("repeat", tree, int(least), int(most or (least if "," not in word and word[0] == "{" else 99)))
        return tree

    def _complement(self):
        if self._next() == "~":
            self._take()
            return ("~", self._complement())
        if self._next() == "(":
            self._take()
            tree = self._binary("|", lambda: self._binary("&", self._row))
            assert self._take() == ")"
            return tree
        if self._next() == "[":
            return ("set", self._take(self.text.index("]", self.at) + 1 - self.at))
        return ("set", self._take(2 if self._next() == "\\" else 1))

    def ends(self, tree, word, start) -> set[int]:
        kind = tree[0]
        if kind == "set":
            return {start + 1} if start < len(word) and self._has(tree[1], word[start]) else set()
        if kind == "~":
            return set(range(start, len(word) + 1)) - self.ends(tree[1], word, start)
        if kind == "repeat":
            reached, matched = {start}, {start} if tree[2] == 0 else set()
            for times in range(1, min(tree[3], tree[2] + len(word)) + 1):
                reached = set().union(*(self.ends(tree[1], word, at) for at in reached))
                matched |= reached if times >= tree[2] else set()
            return matched
        if kind == "row":
            reached = {start}
            for part in tree[1]:
                reached = set().union(*(self.ends(part, word, at) for at in reached))
            return reached
        parts = [self.ends(part, word, start) for part in tree[1]]
        return set.union(*parts) if kind == "|" else set.intersection(*parts)

    @staticmethod
    def _has(symbols: str, symbol: str) -> bool:
        if symbols == ".":
            return True
        if not symbols.startswith("["):
            return symbols == symbol
        inside, has = symbols[1:-1], False
        while inside:
            low, high = (inside[0], inside[2]) if inside[1:2] == "-" else (inside[0], inside[0])
            has |= len(symbol) == 1 and low <= symbol <= high
            inside = inside[3 if inside[1:2] == "-" else 1 :]
        return has

    def __contains__(self, word: tuple[str, ...]) -> bool:
        return len(word) in self.ends(self.tree, word, 0)


def sample_words(rng: random.Random, count: int) -> list[tuple[str, ...]]:
    """All very short words, and longer ones of the pieces that answers are made of."""
    single = ["a", "u", "z", "A", "Z", "0", "9", "-", r"\b"]
    pieces = [(s,) for s in single] + [
        tuple(s) for s in ("dog", "fog", "truck", "truc", "ring", "rings", "lake", "lak")
    ]
    words = [()] + [(a,) for a in single] + list(itertools.product(single, repeat=2))
    return words + [sum(rng.choices(pieces, k=rng.randint(2, 6)), ()) for _ in range(count)]


@pytest.mark.parametrize("name", FILES)
def test_changes_in_one_place_are_seen_where_a_word_tells_them_apart(name):
    """On a sample of 100 answers by seed: the independent matcher is slow."""
    rng, differing, equal = random.Random(7), 0, 0
    words = sample_words(rng, 60)
    for regex in rng.sample(answers(name), 100):
        gold = Matcher(regex)
        has = [word in gold for word in words]
        for changed in changed_in_one_place(regex):
            other = Matcher(changed)
            apart = any((word in other) is not h for word, h in zip(words, has, strict=True))
            result = dfa_equal(changed, regex, REGEX_STATES)
            assert not (apart and result), (changed, regex)
            differing += apart
            equal += result
    assert differing > 150 and equal > 50, (differing, equal)
