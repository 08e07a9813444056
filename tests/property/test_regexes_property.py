r"""DFA-equality against an independent matcher on all short strings.

The expressions are trees over the symbols a, b and `\b`; `.`, classes and complements also match `c`.
"""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.scoring.regexes import dfa_equal
from llm_jepa.scoring.sandbox import Failure

SYMBOLS, LENGTH, STATES = ("a", "b", r"\b", "c"), 3, 10_000
WORDS = [word for n in range(LENGTH + 1) for word in itertools.product(SYMBOLS, repeat=n)]
CLASSES = {
    "a": {"a"}, "b": {"b"}, r"\b": {r"\b"}, ".": set(SYMBOLS), "[ab]": {"a", "b"},
    "[^a]": {"b", "c", r"\b"}, r"[^a\b]": {"b", "c"},
}  # fmt: skip
LEAVES = st.sampled_from([*(("symbols", *item) for item in CLASSES.items()), ("empty",)])
COUNTS = [(0, None, "*"), (1, None, "+"), (0, 1, "?"), (2, None, "{2,}"), (0, 2, "{0,2}"), (1, 3, "{1,3}")]
PRECEDENCE = {"|": 1, "&": 2, "concatenate": 3, "repeat": 4, "~": 5}


def grow(parts):
    several = st.lists(parts, min_size=2, max_size=3).map(tuple)
    return st.one_of(
        st.tuples(st.sampled_from(["concatenate", "|", "&"]), several),
        st.tuples(st.just("~"), parts),
        st.tuples(st.just("repeat"), parts, st.sampled_from(COUNTS)),
    )


TREES = st.recursive(LEAVES, grow, max_leaves=6)


def written(tree: tuple, precedence: int = 0) -> str:
    """The tree as text, with brackets only if its operator has a lower precedence than `precedence`."""
    kind = tree[0]
    if kind == "symbols":
        return tree[1]
    if kind == "empty":
        return "()"
    own = PRECEDENCE[kind]
    if kind == "~":
        text = "~" + written(tree[1], own)
    elif kind == "repeat":
        text = written(tree[1], own) + tree[2][2]
    else:
        text = {"concatenate": ""}.get(kind, kind).join(written(part, own) for part in tree[1])
    return f"({text})" if own < precedence else text


def ends(tree: tuple, word: tuple, start: int) -> frozenset[int]:
    """The positions at which a match of the tree that begins at `start` of the word may end."""
    kind = tree[0]
    if kind == "symbols":
        return frozenset([start + 1] if start < len(word) and word[start] in tree[2] else [])
    if kind == "empty":
        return frozenset([start])
    if kind == "~":
        return frozenset(range(start, len(word) + 1)) - ends(tree[1], word, start)
    if kind in "|&":
        parts = [ends(part, word, start) for part in tree[1]]
        return frozenset.union(*parts) if kind == "|" else frozenset.intersection(*parts)
    if kind == "concatenate":
        reached = frozenset([start])
        for part in tree[1]:
            reached = frozenset().union(*(ends(part, word, at) for at in reached))
        return reached
    _, part, (least, most, _) = tree
    reached, matched = frozenset([start]), set()
    for times in range((least + len(word) if most is None else most) + 1):
        matched |= reached if times >= least else set()
        reached = frozenset().union(*(ends(part, word, at) for at in reached))
    return frozenset(matched)


def language(tree: tuple) -> frozenset[tuple]:
    """The words of up to LENGTH symbols that the tree matches."""
    return frozenset(word for word in WORDS if len(word) in ends(tree, word, 0))


def equal(a: str, b: str) -> bool | str:
    try:
        return dfa_equal(a, b, STATES)
    except Failure as failure:
        return failure.reason


def exactly(words: frozenset[tuple]) -> str:
    """An expression of exactly these words; `c` represents all symbols that no expression contains."""
    branches = ["()"] if () in words else []
    for first, text in zip(SYMBOLS, ("a", "b", r"\b", r"[^ab\b]"), strict=True):
        rests = frozenset(word[1:] for word in words if word[:1] == (first,))
        branches += [f"{text}({exactly(rests)})"] if rests else []
    return "|".join(branches) or "~(.*)"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TREES)
def test_language_up_to_a_length_is_the_matchers(tree):
    assert equal(f"({written(tree)})&.{{0,{LENGTH}}}", exactly(language(tree))) is True


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab.&|~()[]^-*+?{}0123,\\", max_size=12))
def test_any_text_gives_a_verdict_or_a_reason(text):
    assert equal(text, "a") in (True, False, "syntax", "states")
