"""The project's own SYNTH pairs: descriptions and regular expressions drawn from one synchronous grammar.

The rules are those of arXiv 1608.03000.
"""

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

SEED, PAIRS, TEST_EVERY = 160803000, 10_000, 5  # every fifth pair is a test pair: 8000 and 2000
MAX_WORDS = 20  # a longer description is dropped
STRINGS = ("dog", "truck", "ring", "lake")  # renamed in order of appearance, so the first string of a pair is 'dog'
STRING_NAME = re.compile("(?<!st)(?:" + "|".join(STRINGS) + ")")  # excludes the "ring" of "the string"
DEPTHS = ((1, 5), (2, 87), (3, 8))  # (largest nesting depth of rules, weight)
LEAF_SHARE = 0.5  # share of leaves among arguments that could also be rules


class Phrase(NamedTuple):
    """A description and its regular expression. A leaf needs no parentheses."""

    words: str
    regex: str
    leaf: bool = False


class Rule(NamedTuple):
    """A regular expression and its wordings, which have the same arguments x, y, z.

    `kind` is the rule's kind, `slots` the kinds allowed for each argument, `weight` its relative frequency. In `regex`
    x, y and z are inserted as they are; X, Y and Z are put in parentheses unless they are leaves. N is a count, the
    same in the regular expression and the wording.
    """

    kind: str
    regex: str
    wordings: tuple[str, ...]
    slots: tuple[str, ...]
    weight: int


LEAVES = (
    *((Phrase(f"the string '{s}'", s, leaf=True), 6) for s in STRINGS),
    (Phrase("a vowel", "[AEIOUaeiou]", leaf=True), 10),
    (Phrase("a number", "[0-9]", leaf=True), 10),
    (Phrase("a capital letter", "[A-Z]", leaf=True), 10),
    (Phrase("a lower-case letter", "[a-z]", leaf=True), 10),
    (Phrase("a letter", "[A-Za-z]", leaf=True), 10),
    (Phrase("a character", ".", leaf=True), 10),
)

# Kinds: L leaf, T tight, A and, O or, R repeated, B before, W words, V property of the line, U its negation, J two
# properties, S sentence. L to B are in order of precedence, and an argument binds tighter than its rule. The phrase
# after W or V is its argument. So a sentence is unambiguous: "a vowel or a number, 2 or more times" repeats the "or".
NOUN = "LTAORBW"
RULES = (
    Rule("T", "~(x)", ("not x", "anything but x"), ("L",), 10),
    Rule("T", "X.*Y.*", ("x followed by y",), ("L", "L"), 15),
    Rule("A", "(x)&(y)", ("x and y", "both x and y"), ("LT", "LT"), 16),
    Rule("A", "(x)&(y)&(z)", ("x, y, and z",), ("LT", "LT", "LT"), 5),
    Rule("O", "(x)|(y)", ("x or y", "either x or y"), ("LTA", "LTA"), 18),
    Rule("O", "(x)|(y)|(z)", ("x, y, or z", "either x, y, or z"), ("LT", "LT", "LT"), 5),
    Rule("R", "(x){N,}", ("x, N or more times", "x at least N times"), ("LTAO",), 17),
    Rule("R", "(x){1,N}", ("x at most N times",), ("LTAO",), 4),
    Rule("R", "(x)+", ("x at least once", "x, one or more times"), ("LTAO",), 6),
    Rule("R", "(x)*", ("x, zero or more times",), ("LTAO",), 6),
    Rule("B", "(x).*(y).*", ("x before y",), ("LTAOR", "LTAORW"), 70),
    Rule("W", r"\bX\b", ("words with x",), ("LTAORB",), 10),
    Rule("V", "(x)(.*)", ("starting with x", "beginning with x"), (NOUN,), 10),
    Rule("V", "(.*)(x)", ("ending with x", "ending in x"), (NOUN,), 10),
    Rule("V", ".*X.*", ("containing x", "having x"), (NOUN,), 16),
    Rule("V", "x", ("containing only x", "having only x"), (NOUN,), 3),
    Rule("U", "~(x)", ("not x",), ("V",), 12),
    Rule("J", "(x)&(y)", ("x and y",), ("VU", "VU"), 4),
    Rule("J", "(x)|(y)", ("x or y",), ("VU", "VU"), 4),
    Rule("S", "x", ("lines with x",), ("TAORBW",), 10),
    Rule("S", "x", ("lines x",), ("VUJ",), 16),
)


def choose(rng: random.Random, items: Sequence[tuple[Any, int]]) -> Any:
    """Draws one item in proportion to its weight, the same one on every platform and Python version.

    Only the stream of `rng.random()` is guaranteed across versions. Sums of floats are not, so weights are integers.
    """
    at = rng.random() * sum(weight for _, weight in items)
    for item, weight in items:
        at -= weight
        if at < 0:
            return item
    return items[-1][0]


def draw_phrase(rng: random.Random, kinds: str, depth: int) -> Phrase:
    """Draws a phrase of one of `kinds` with at most `depth` nested rules. The arguments of a rule are distinct."""
    if kinds == "L" or "L" in kinds and (depth == 0 or rng.random() < LEAF_SHARE):
        return choose(rng, LEAVES)
    # The arguments of U and J are rules, never leaves, and need one more level.
    rule = choose(rng, [(r, r.weight) for r in RULES if r.kind in kinds and (depth > 1 or r.kind not in "UJ")])
    inner = depth - (rule.regex != "x")  # a rule that only adds words adds no depth
    arguments: list[Phrase] = []
    while len({a.regex for a in arguments}) < len(rule.slots):
        arguments = [draw_phrase(rng, slot, inner) for slot in rule.slots]
    times = str(choose(rng, [(n, 1) for n in range(2, 8)]))
    words, regex = {"N": times}, {"N": times}
    for name, argument in zip("xyz", arguments, strict=False):
        words[name] = argument.words
        regex[name] = argument.regex
        regex[name.upper()] = argument.regex if argument.leaf else f"({argument.regex})"
    wording = choose(rng, [(w, 1) for w in rule.wordings])
    return Phrase(
        re.sub(r"\b[xyzN]\b", lambda m: words[m[0]], wording),
        re.sub(r"[xyzXYZN]", lambda m: regex[m[0]], rule.regex),
        arguments[0].leaf and rule.regex == "x",
    )


def normalize(phrase: Phrase) -> tuple[str, str]:
    """The description and the regular expression of a sentence, with the strings renamed in order of appearance."""
    names = dict(zip(dict.fromkeys(STRING_NAME.findall(phrase.words)), STRINGS, strict=False))
    description, regex = (STRING_NAME.sub(lambda m: names[m[0]], text) for text in phrase[:2])
    return description, regex


def draw_pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(train, test): 8000 and 2000 pairs of a description and its regular expression, without duplicates.

    Regular expressions are unique across both parts, and so are descriptions, because each has one reading.
    """
    rng = random.Random(SEED)
    descriptions: dict[str, str] = {}  # by regex
    while len(descriptions) < PAIRS:
        description, regex = normalize(draw_phrase(rng, "S", choose(rng, DEPTHS)))
        if len(description.split()) <= MAX_WORDS:
            descriptions.setdefault(regex, description)
    pairs = [(words, regex) for regex, words in descriptions.items()]
    return [pair for i, pair in enumerate(pairs) if i % TEST_EVERY], pairs[::TEST_EVERY]
