r"""DFA-equality against an independent matcher on all short strings, and against rewrites that keep the language.

The expressions are trees over the symbols a, b and `\b`; `.`, classes and complements also meet `c`, which none names.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.scoring.regexes import dfa_equal
from llm_jepa.scoring.sandbox import Failure

SYMBOLS, LENGTH, STATES = ("a", "b", r"\b", "c"), 4, 10_000
WORDS = [word for n in range(LENGTH + 1) for word in itertools.product(SYMBOLS, repeat=n)]

LEAVES = st.sampled_from(
    [
        ("symbols", "a", {"a"}),
        ("symbols", "b", {"b"}),
        ("symbols", r"\b", {r"\b"}),
        ("symbols", ".", set(SYMBOLS)),
        ("symbols", "[ab]", {"a", "b"}),
        ("symbols", "[^a]", set(SYMBOLS) - {"a"}),
        ("symbols", r"[^a\b]", {"b", "c"}),
        ("empty",),
    ]
)
COUNTS = [
    (0, None, "*"),
    (1, None, "+"),
    (0, 1, "?"),
    (2, None, "{2,}"),
    (0, 2, "{0,2}"),
    (1, 3, "{1,3}"),
    (2, 2, "{2}"),
]


def grow(parts):
    several = st.lists(parts, min_size=2, max_size=3).map(tuple)
    return st.one_of(
        st.tuples(st.sampled_from(["concatenate", "|", "&"]), several),
        st.tuples(st.just("~"), parts),
        st.tuples(st.just("repeat"), parts, st.sampled_from(COUNTS)),
    )


TREES = st.recursive(LEAVES, grow, max_leaves=6)
BINDING = {"|": 1, "&": 2, "concatenate": 3, "repeat": 4, "~": 5}


def written(tree: tuple, binding: int = 0) -> str:
    """The tree as text, in brackets only where it binds more loosely than its surroundings ask."""
    kind = tree[0]
    if kind == "symbols":
        return tree[1]
    if kind == "empty":
        return "()"
    own = BINDING[kind]
    if kind == "~":
        text = "~" + written(tree[1], own)
    elif kind == "repeat":
        text = written(tree[1], own) + tree[2][2]
    else:
        text = {"concatenate": ""}.get(kind, kind).join(written(part, own) for part in tree[1])
    return f"({text})" if own < binding else text


def ends(tree: tuple, word: tuple, start: int) -> frozenset[int]:
    """Where a match of the tree that begins at `start` of the word may end."""
    kind = tree[0]
    if kind == "symbols":
        return frozenset([start + 1] if start < len(word) and word[start] in tree[2] else [])
    if kind == "empty":
        return frozenset([start])
    if kind == "~":
        return frozenset(range(start, len(word) + 1)) - ends(tree[1], word, start)
    if kind == "|":
        return frozenset().union(*(ends(part, word, start) for part in tree[1]))
    if kind == "&":
        return frozenset.intersection(*(ends(part, word, start) for part in tree[1]))
    if kind == "concatenate":
        reached = frozenset([start])
        for part in tree[1]:
            reached = frozenset().union(*(ends(part, word, at) for at in reached))
        return reached
    _, x, (least, most, _) = tree
    reached, matched = frozenset([start]), set()
    for times in itertools.count():
        if times >= least:
            if most is None and reached <= matched:
                return frozenset(matched)
            matched |= reached
        if times == most:
            return frozenset(matched)
        reached = frozenset().union(*(ends(x, word, at) for at in reached))


def language(tree: tuple) -> frozenset[tuple]:
    """The words of up to LENGTH symbols that the tree matches."""
    return frozenset(word for word in WORDS if len(word) in ends(tree, word, 0))


def equal(a: tuple | str, b: tuple | str) -> bool | str:
    try:
        return dfa_equal(*(x if isinstance(x, str) else written(x) for x in (a, b)), STATES)
    except Failure as failure:
        return failure.reason


def exactly(words: frozenset[tuple]) -> str:
    """An expression of the words, by their first symbols; `c` stands for every symbol that nothing names."""
    branches = ["()"] if () in words else []
    for first, text in zip(SYMBOLS, ("a", "b", r"\b", r"[^ab\b]"), strict=True):
        rests = frozenset(word[1:] for word in words if word[:1] == (first,))
        branches += [f"{text}({exactly(rests)})"] if rests else []
    return "|".join(branches) or "~(.*)"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES)
def test_language_up_to_a_length_is_the_matchers(tree):
    assert equal(f"({written(tree)})&.{{0,{LENGTH}}}", exactly(language(tree))) is True


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TREES, TREES)
def test_equal_languages_agree_on_all_short_words(a, b):
    result, same = equal(a, b), language(a) == language(b)
    assert result == equal(b, a)
    assert same or result is not True


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TREES, st.sampled_from([w for w in WORDS if len(w) < 4]))
def test_one_word_more_or_less_makes_it_another_language(tree, word):
    one = exactly(frozenset([word]))
    inside = len(word) in ends(tree, word, 0)
    assert equal(f"({written(tree)})|{one}", tree) is inside
    assert equal(f"({written(tree)})&~({one})", tree) is (not inside)


REWRITES = {
    "itself": lambda x, y, z: (x, x),
    "brackets": lambda x, y, z: (x, f"(({x}))"),
    "two complements": lambda x, y, z: (x, f"~(~({x}))"),
    "De Morgan |": lambda x, y, z: (f"~({x}|{y})", f"~({x})&~({y})"),
    "De Morgan &": lambda x, y, z: (f"~(({x})&({y}))", f"~({x})|~({y})"),
    "| commutes": lambda x, y, z: (f"{x}|{y}", f"{y}|{x}"),
    "& commutes": lambda x, y, z: (f"({x})&({y})", f"({y})&({x})"),
    "| associates": lambda x, y, z: (f"({x}|{y})|({z})", f"({x})|({y}|{z})"),
    "concatenation associates": lambda x, y, z: (f"(({x})({y}))({z})", f"({x})(({y})({z}))"),
    "concatenation over |": lambda x, y, z: (f"({x})({y}|{z})", f"({x})({y})|({x})({z})"),
    "& over |": lambda x, y, z: (f"({x})&({y}|{z})", f"(({x})&({y}))|(({x})&({z}))"),
    "+": lambda x, y, z: (f"({x})+", f"({x})({x})*"),
    "?": lambda x, y, z: (f"({x})?", f"()|({x})"),
    "* unrolled": lambda x, y, z: (f"({x})*", f"()|({x})({x})*"),
    "{2,}": lambda x, y, z: (f"({x}){{2,}}", f"({x})({x})({x})*"),
    "{1,2}": lambda x, y, z: (f"({x}){{1,2}}", f"({x})|({x})({x})"),
    "nothing": lambda x, y, z: (f"({x})&~({x})", "~(.*)"),
    "everything": lambda x, y, z: (f"{x}|~({x})", ".*"),
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.tuples(TREES, TREES, TREES))
def test_rewrites_keep_the_language(rewrite, trees):
    a, b = rewrite(*map(written, trees))
    assert equal(a, b) is True
    assert equal(f"~({a})", b) is False


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab.&|~()[]^-*+?{}0123,\\", max_size=12))
def test_any_text_has_an_answer_or_a_reason(text):
    assert equal(text, "a") in (True, False, "syntax", "states")
