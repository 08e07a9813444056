"""DFA-equality of regular expressions: the syntax, the languages, and the bounds."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jepa.scoring.regexes import dfa_equal, parse
from llm_jepa.scoring.sandbox import Failure, Sandbox

STATES = 10_000
UNIVERSE, NOTHING = ".*", "~(.*)"


def reason(prediction: str, answer: str = "a", states: int = STATES) -> str:
    with pytest.raises(Failure) as failure:
        dfa_equal(prediction, answer, states)
    return failure.value.reason


EQUAL = [
    # repetition
    ("a*", "()|a+"),
    ("a+", "aa*"),
    ("a?", "()|a"),
    ("a{3}", "aaa"),
    ("a{2,}", "aaa*"),
    ("a{0,}", "a*"),
    ("a{1,3}", "a|aa|aaa"),
    ("a{0}", "()"),
    ("a{0,0}", "()"),
    ("a{1}", "a"),
    ("a{02}", "aa"),
    ("(a{2}){3}", "a{6}"),
    ("a{2}{3}", "a{6}"),
    ("a*?", "a*"),
    ("(a*)*", "a*"),
    ("(a|b)*", "(a*b*)*"),
    ("(ab)*a", "a(ba)*"),
    ("(a?){3}", "a{0,3}"),
    ("(){5}", "()"),
    # union, intersection, complement
    ("a|b", "b|a"),
    ("a|a", "a"),
    ("a|b|c", "[abc]"),
    ("a&a", "a"),
    ("a&b", NOTHING),
    ("a&b&a", NOTHING),
    ("[ab]&[bc]&[bd]", "b"),
    (".*a.*&.*b.*", ".*(a.*b|b.*a).*"),
    ("~(a|b)", "~a&~b"),
    ("~(a&b)", UNIVERSE),
    ("~~a", "a"),
    ("~()", ".+"),
    (f"~({NOTHING})", UNIVERSE),
    ("~(.*a.*)", "[^a]*"),
    (f"{NOTHING}a", NOTHING),
    (f"({NOTHING})*", "()"),
    (f"({NOTHING})?", "()"),
    (f"({NOTHING}){{2,3}}", NOTHING),
    (f"({NOTHING})|a", "a"),
    # precedence, loosest first: | & concatenation repetition ~
    ("a|bc", "a|(bc)"),
    ("ab|c", "(ab)|c"),
    ("a|b&c", "a|(b&c)"),
    ("a&b|c", "(a&b)|c"),
    ("ab&ac|d", "((ab)&(ac))|d"),
    ("ab*", "a(b*)"),
    ("ab{2}", "abb"),
    ("~(a)*", "(~(a))*"),
    ("~a*", "(~a)*"),
    ("~a{2}", "(~a)(~a)"),
    ("~ab", "(~a)b"),
    ("~a|b", "(~a)|b"),
    ("~(a)b*&c", "((~(a))(b*))&c"),
    ("a~b", "a(~b)"),
    ("a~~b", "ab"),
    # classes
    ("[a-c]", "a|b|c"),
    ("[c-c]", "c"),
    ("[a-cb-d]", "[abcd]"),
    ("[abc]", "[cba]"),
    ("[a-]", "a|-"),
    ("[-a]", "a|-"),
    ("[a-c-]", "[abc]|-"),
    (r"[a\-c]", "[ac]|-"),
    ("[^a]", "~(a)&."),
    ("[^a-y]", "~([a-y])&."),
    ("[^b-dx-za-c]", "~([a-dx-z])&."),
    ("[a^]", r"a|^"),
    ("[.*|&~(){}?+]", r"\.|\*|\||\&|\~|\(|\)|\{|\}|\?|\+"),
    (r"[\]\[]", r"\[|\]"),
    ("[A-Za-z]&[AEIOUaeiou]", "[AEIOUaeiou]"),
    ("[0-9]|[^0-9]", "."),
    ("[\0-\U0010ffff]", r".&~\b"),
    # \b is a symbol of its own
    (r"\b", r"[\b]"),
    (r"\bdog\b", r"(\b)(dog)(\b)"),
    (r".&[^\b]", r"[^\b]"),
    (r"[^a]&\b", r"\b"),
    (r".*\b.*|[^\b]*", UNIVERSE),
    # characters
    (r"\.", "[.]"),
    (r"\\", r"[\\]"),
    (r"\-", "-"),
    (r"\_", "_"),
    ("^a$", r"\^a\$"),
    ("-,:#@<>\" '", r"\-\,\:\#\@\<\>\"\ \'"),
    ("é|☃|😀", "[☃é😀]"),
    ("[à-ï]&é", "é"),
    ("\n", "[\n]"),
    ("((a))", "a"),
    ("(a|())", "a?"),
    ("()a()", "a"),
    # of the datasets
    ("~((dog.*[0-9].*){3,})", "~((dog.*[0-9].*)(dog.*[0-9].*)(dog.*[0-9].*)(dog.*[0-9].*)*)"),
    (".*(.*)(([AEIOUaeiou])*).*", UNIVERSE),
    ("(([0-9])|(.)).*([AEIOUaeiou]).*", "..*[AEIOUaeiou].*"),
    ("(.*[A-Z].*)&(~(.*dog.*))", "~(~(.*[A-Z].*)|.*dog.*)"),
    ("(dog)&(truck)", "[a-z]&[0-9]"),
]

DIFFERENT = [
    ("a*", "a+"),
    ("a?", "a"),
    ("a{2}", "a{3}"),
    ("a{2,}", "a{3,}"),
    ("a{1,3}", "a{1,4}"),
    ("a{1,3}", "a{0,3}"),
    ("a{2}", "a{2,}"),
    ("ab", "ba"),
    ("a|b", "a"),
    ("(a|b)*", "a*|b*"),
    ("a|bc", "(a|b)c"),
    ("a&b|c", "a&(b|c)"),
    ("b|a&c", "(b|a)&c"),
    ("ab*", "(ab)*"),
    ("ab&ab", "a(b&a)b"),
    ("~(a)*", "~((a)*)"),
    ("~ab", "~(ab)"),
    ("~a", "[^a]"),
    ("~()", UNIVERSE),
    ("()", NOTHING),
    ("a", NOTHING),
    ("a", "b"),
    ("a", "A"),
    ("[a-c]", "[a-d]"),
    ("[b-d]", "[a-d]"),
    ("[ac]", "[a-c]"),
    ("[^a]", "[^b]"),
    ("[^a-c]", "[^a-d]"),
    ("[^a]", "."),
    (".", ".."),
    (".", "a"),
    (".", "[\0-\U0010ffff]"),
    (r"\b", "b"),
    (r"\b", "."),
    (r"\b", "()"),
    (r"\bdog\b", "dog"),
    (r"\b", r"\\b"),
    (r"\.", "."),
    ("^a", "a"),
    (" a", "a"),
    ("é", "e\u0301"),
    ("(dog).*(truck)", "(dog).*(truck).*"),
    ("(.*dog.*){2,}", "(.*dog.*){3,}"),
    ("(.*a.*){7}", "(.*a.*){6}"),
    ("(.*)([A-Z])", "(.*)([A-Za-z])"),
]


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal(a, b):
    assert dfa_equal(a, b, STATES) is True
    assert dfa_equal(b, a, STATES) is True
    assert dfa_equal(f"~({a})", b, STATES) is False


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different(a, b):
    assert dfa_equal(a, b, STATES) is False
    assert dfa_equal(b, a, STATES) is False
    assert dfa_equal(f"~({a})", f"~({b})", STATES) is False


@pytest.mark.parametrize(
    "text",
    [
        "", "(", ")", "(a", "a)", "())", "(()", "a(", "(a))(b", "a|", "|a", "a||b", "(|a)", "(a|)", "a&",
        "&a", "a&|b", "*", "+a", "?", "{2}", "(*a)", "a|*", "~", "~*", "~)", "a~", "(~)", "a{", "a}", "a{}",
        "a{,2}", "a{2", "a{3,2}", "a{-1}", "a{1,2,3}", "a{ 1}", "a{x}", "a{٣}", "a{9999999999}", "[", "]",
        "[]", "[^]", "[a", "a]", "[b-a]", "[a-c", "[[a]", r"[\d]", r"[a-\b]", r"[\b-z]", "\\", "a\\", r"\d",
        r"\w+", r"\1", r"\é", "[a\\]",
    ],
)  # fmt: skip
def test_no_expression(text):
    assert reason(text) == "syntax"
    assert reason("a", text) == "gold_syntax"
    assert reason("*", text) == "gold_syntax"


def test_postfix_order():
    def symbol(c):
        return ("symbols", (range(ord(c), ord(c) + 1),))

    a, b, c = map(symbol, "abc")
    assert parse("abc") == [a, b, c, ("concatenate", 3)]
    assert parse("a|b|c") == [a, b, c, ("|", 3)]
    assert parse("a|b&c") == [a, b, c, ("&", 2), ("|", 2)]
    assert parse("~a{2,}b") == [a, ("~", 1), ("repeat", 2, None), b, ("concatenate", 2)]
    assert parse("a(b|())?") == [a, b, ("empty",), ("|", 2), ("repeat", 0, 1), ("concatenate", 2)]


def test_bound_is_reached_where_it_must_be():
    # Whether the ninth symbol from the end is an a takes 2⁹ states, and some more before they are minimised.
    assert dfa_equal(".*a.{8}", ".*a.{8}", 1100) is True
    assert reason(".*a.{8}", "a", 511) == "states"
    assert reason("a", ".*a.{8}", 511) == "gold_states"


@pytest.mark.parametrize("text", [".*a.{8}|b", "~(.*a.{8})", "~(.*a.{8})&~b", "(.*a.{8})&b", "(~(.*a.{8})b){2}"])
def test_bound_holds_within_the_expression(text):
    assert reason(text, "a", 500) == "states"


@pytest.mark.parametrize("text", ["a{501}", "a{0,501}", "a{501,}", "(a{30}){30}", "a" * 501, "|".join("a" * 501)])
def test_bound_holds_for_what_is_written_out(text):
    assert reason(text, "a", 500) == "states"


def test_bound_leaves_room_for_the_datasets_largest():
    largest = "(((dog).*(truck).*)|(ring)){6,}"
    assert dfa_equal(largest, "(ring|dog.*truck.*){5}(ring|dog.*truck.*)+", 3000) is True


# What a model may write. The reasons: an answer (equal, not equal), or why there is none.
NASTY = {
    "open": ("(" * 10_000, "syntax"),
    "close": (")" * 10_000, "syntax"),
    "deep": ("(" * 5_000 + "a" + ")" * 5_000, True),
    "deep union": ("(b|" * 500 + "a" + ")" * 500, False),
    "complements": ("~" * 5_000 + "a", True),
    "deep complements": ("~(" * 2_001 + "a" + ")" * 2_001, False),
    "long": ("a" * 10_000, "states"),
    "long enough": ("a" * 1_000, False),
    "stars": ("a" + "*" * 150, False),
    "alternatives": ("a|" * 2_000 + "a", True),
    "intersections": ("a&" * 1_000 + "a", True),
    "repeat": ("a{99999}", "states"),
    "repeats": ("((((((a{9}){9}){9}){9}){9}){9})", "states"),
    "repeats of nothing": ("(((){999999999}){999999999})|a", "states"),
    "optional repeats": ("(((a{0,30}){0,30}){0,30})", "states"),
    "digits": ("a{" + "9" * 10_000 + "}", "syntax"),
    "exponential": ("(.*a.{20})", "states"),
    "exponential complement": ("~(.*a.{20})", "states"),
    "product": ("&".join(f"(.{{{p}}})*" for p in (11, 13, 17, 19)), "states"),
    "classes": ("[" * 10_000, "syntax"),
    "dashes": ("[" + "-" * 10_000 + "]", False),
    "ranges": ("[\0-\U0010ffff]" * 500, False),
    "brackets": ("[^" + "a-z" * 3_000 + "]", False),
    "text": ("The answer is a regular expression. " * 300, "states"),
    "null": ("\0", False),
    "half a pair": ("\ud800", False),
}


def test_nasty_inputs_end_soon_with_a_reason():
    with Sandbox("llm_jepa.scoring.regexes:dfa_equal", seconds=20) as sandbox:
        for name, (text, expected) in NASTY.items():
            before = time.monotonic()
            try:
                result = sandbox.call(text, "a", STATES)
            except Failure as failure:
                result = failure.reason
            assert result == expected, name
            assert time.monotonic() - before < 15, name


@pytest.mark.parametrize("text", ["(a*)*" * 2_000, "(.{0,50}a.{0,50}b.{0,50}c){5}"])
def test_slow_inputs_are_stopped(text):
    with Sandbox("llm_jepa.scoring.regexes:dfa_equal", seconds=0.5) as sandbox:
        with pytest.raises(Failure, match="timeout"):
            sandbox.call(text, "a", STATES)
        assert sandbox.call("a", "a", STATES) is True


def test_imports_nothing_heavy():
    code = "import sys, llm_jepa.scoring.regexes; print({'torch', 'scipy', 'transformers', 'numpy'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
