"""DFA-equality of regular expressions: the syntax, the languages, and the limits."""

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jepa.scoring.regexes import dfa_equal
from llm_jepa.scoring.sandbox import Failure, Sandbox

STATES = 10_000


def verdict(prediction: str, answer: str, states: int = STATES, compare=dfa_equal) -> bool | str:
    """The result of a comparison, or why it failed."""
    try:
        return compare(prediction, answer, states)
    except Failure as failure:
        return failure.reason


# What the trees below do not have: counts, ranges, escapes, characters, the datasets' answers.
EQUAL = [
    ("a{3}", "aaa"), ("a{2,}", "aaa*"), ("a{1,3}", "a|aa|aaa"), ("a{0}", "()"), ("a{02}", "aa"), ("a{2}{3}", "a{6}"),
    ("a*?", "a*"), ("(){5}", "()"), ("(~(.*)){2,3}", "~(.*)"), ("~(a)*", "(~(a))*"), ("~ab", "(~a)b"), ("~~a", "a"),
    ("[a-c]", "a|b|c"), ("[c-c]", "c"), ("[a-cb-d]", "[abcd]"), ("[abc]", "[cba]"), ("[a-]", "a|-"), ("[-a]", "a|-"),
    ("[a-c-]", "[abc]|-"), (r"[a\-c]", "[ac]|-"), ("[^b-dx-za-c]", "~([a-dx-z])&."), ("[a^]", "a|^"),
    ("[.*|&~(){}?+]", r"\.|\*|\||\&|\~|\(|\)|\{|\}|\?|\+"), (r"[\]\[]", r"\[|\]"), ("\\\\", r"[\\]"),
    ("[\x00-\U0010ffff]", r".&~\b"), (r"\bdog\b", r"(\b)(dog)(\b)"), (r".&[^\b]", r"[^\b]"), (r"\_", "_"),
    ("^a$", r"\^a\$"), ("é|☃|😀", "[☃é😀]"), ("[à-ï]&é", "é"), ("\n", "[\n]"), ("((a))", "a"), ("()a()", "a"),
    ("~((dog.*[0-9].*){3,})", "~((dog.*[0-9].*)(dog.*[0-9].*)(dog.*[0-9].*)(dog.*[0-9].*)*)"),
    (".*(.*)(([AEIOUaeiou])*).*", ".*"), ("(.*[A-Z].*)&(~(.*dog.*))", "~(~(.*[A-Z].*)|.*dog.*)"),
]  # fmt: skip
DIFFERENT = [
    ("a{2}", "a{2,}"), ("a{1,3}", "a{0,3}"), ("ab", "ba"), ("a|bc", "(a|b)c"), ("~(a)*", "~((a)*)"), ("~a", "[^a]"),
    ("()", "~(.*)"), ("a", "A"), ("[b-d]", "[a-d]"), ("[ac]", "[a-c]"), ("[^a]", "."), (".", "[\x00-\U0010ffff]"),
    (r"\b", "b"), (r"\bdog\b", "dog"), (r"\.", "."), ("^a", "a"), (" a", "a"), ("é", "e\u0301"),
    ("(.*a.*){7}", "(.*a.*){6}"), ("(.*)([A-Z])", "(.*)([A-Za-z])"),
]  # fmt: skip


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal_languages(a, b):
    assert dfa_equal(a, b, STATES) is True
    assert dfa_equal(b, a, STATES) is True
    assert dfa_equal(f"~({a})", b, STATES) is False


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different_languages(a, b):
    assert dfa_equal(a, b, STATES) is False
    assert dfa_equal(b, a, STATES) is False
    assert dfa_equal(f"~({a})", f"~({b})", STATES) is False


def test_text_that_is_no_expression():
    for text in (
        "", "(", "a)", "(a))(b", "a|", "a||b", "(|a)", "&a", "*", "(*a)", "~", "~*", "a~", "(~)", "a{", "a}", "a{,2}",
        "a{3,2}", "a{-1}", "a{1,2,3}", "a{ 1}", "a{٣}", "a{9999999999}", "[]", "[^]", "[a", "a]", "[b-a]", "[[a]",
        r"[\d]", r"[a-\b]", r"[\b-z]", "a\\", r"\d", r"\1", r"\é", "[a\\]",
    ):  # fmt: skip
        assert verdict(text, "a") == "syntax", text


def test_limit_on_states_of_an_expression_and_its_parts():
    # Whether the ninth symbol from the end is an a takes 2⁹ states, and some more before they are minimized.
    assert dfa_equal(".*a.{8}", ".*a.{8}", 1100) is True
    assert verdict(".*a.{8}", "a", 511) == "states"
    # the datasets' largest answer
    assert dfa_equal("(((dog).*(truck).*)|(ring)){6,}", "(ring|dog.*truck.*){5}(ring|dog.*truck.*)+", 3000) is True
    parts = (".*a.{8}|b", "(.*a.{8})&b", "(~(.*a.{8})b){2}", "a{0,501}", "(a{30}){30}", "a" * 501, "|".join("a" * 501))
    assert [verdict(part, "a", 500) for part in parts] == ["states"] * 7


def test_hostile_expressions_end_soon_with_a_verdict_or_a_reason():
    hostile = {
        "(" * 10_000: "syntax",
        "(" * 5_000 + "a" + ")" * 5_000: True,
        "~" * 1_000 + "a": True,
        "a" * 10_000: "states",
        "a&" * 300 + "a": True,
        "(((){999999999}){999999999})|a": "states",
        "a{" + "9" * 10_000 + "}": "syntax",
        "&".join(f"(.{{{p}}})*" for p in (11, 13, 17, 19)): "states",
        "[^" + "a-z" * 3_000 + "]": False,
        "\ud800": False,
        "(a*)*" * 2_000: "timeout",
    }
    with Sandbox("llm_jepa.scoring.regexes:dfa_equal", seconds=2) as sandbox:
        for text, expected in hostile.items():
            assert verdict(text, "a", compare=sandbox.call) == expected, text[:40]


# ------------------------------------------------------------------- an independent matcher, on all short strings
# The expressions are trees over the symbols a, b and `\b`; `.`, classes and complements also match `c`.

SYMBOLS, LENGTH = ("a", "b", r"\b", "c"), 3
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


def joined(*languages: set[tuple]) -> set[tuple]:
    """All concatenations of up to LENGTH symbols."""
    words = map(functools.partial(sum, start=()), itertools.product(*languages))
    return {word for word in words if len(word) <= LENGTH}


def language(tree: tuple) -> set[tuple]:
    """The words of up to LENGTH symbols that the tree matches."""
    kind = tree[0]
    if kind == "symbols":
        return {(symbol,) for symbol in tree[2]}
    if kind == "empty":
        return {()}
    if kind == "~":
        return set(WORDS) - language(tree[1])
    if kind == "repeat":
        own, (least, most, _) = language(tree[1]), tree[2]
        powers = itertools.accumulate([own] * (least + LENGTH if most is None else most), joined, initial={()})
        return set().union(*itertools.islice(powers, least, None))
    join = {"|": set.union, "&": set.intersection, "concatenate": joined}[kind]
    return functools.reduce(join, map(language, tree[1]))


def exactly(words: set[tuple]) -> str:
    """An expression of exactly these words; `c` represents all symbols that no expression contains."""
    branches = ["()"] if () in words else []
    for first, text in zip(SYMBOLS, ("a", "b", r"\b", r"[^ab\b]"), strict=True):
        rests = {word[1:] for word in words if word[:1] == (first,)}
        branches += [f"{text}({exactly(rests)})"] if rests else []
    return "|".join(branches) or "~(.*)"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TREES)
def test_language_up_to_a_length_is_the_matchers(tree):
    assert verdict(f"({written(tree)})&.{{0,{LENGTH}}}", exactly(language(tree))) is True
