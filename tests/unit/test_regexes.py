"""DFA-equality of regular expressions: the syntax, the languages, and the limits."""

from __future__ import annotations

import pytest

from llm_jepa.scoring.regexes import dfa_equal
from llm_jepa.scoring.sandbox import Failure, Sandbox

STATES = 10_000


def reason(prediction: str, states: int = STATES) -> str:
    with pytest.raises(Failure) as failure:
        dfa_equal(prediction, "a", states)
    return failure.value.reason


# Repetition, union, intersection, complement, precedence, classes, `\b`, characters, and answers of the datasets.
EQUAL = [
    ("a*", "()|a+"), ("a+", "aa*"), ("a?", "()|a"), ("a{3}", "aaa"), ("a{2,}", "aaa*"), ("a{0,}", "a*"),
    ("a{1,3}", "a|aa|aaa"), ("a{0}", "()"), ("a{0,0}", "()"), ("a{1}", "a"), ("a{02}", "aa"), ("(a{2}){3}", "a{6}"),
    ("a{2}{3}", "a{6}"), ("a*?", "a*"), ("(a*)*", "a*"), ("(a|b)*", "(a*b*)*"), ("(ab)*a", "a(ba)*"),
    ("(a?){3}", "a{0,3}"), ("(){5}", "()"), ("a|b", "b|a"), ("a|a", "a"), ("a|b|c", "[abc]"), ("a&a", "a"),
    ("a&b", "~(.*)"), ("a&b&a", "~(.*)"), ("[ab]&[bc]&[bd]", "b"), (".*a.*&.*b.*", ".*(a.*b|b.*a).*"),
    ("~(a|b)", "~a&~b"), ("~(a&b)", ".*"), ("~~a", "a"), ("~()", ".+"), ("~(~(.*))", ".*"), ("~(.*a.*)", "[^a]*"),
    ("~(.*)a", "~(.*)"), ("(~(.*))*", "()"), ("(~(.*))?", "()"), ("(~(.*)){2,3}", "~(.*)"), ("(~(.*))|a", "a"),
    ("a|bc", "a|(bc)"), ("ab|c", "(ab)|c"), ("a|b&c", "a|(b&c)"), ("a&b|c", "(a&b)|c"), ("ab&ac|d", "((ab)&(ac))|d"),
    ("ab*", "a(b*)"), ("ab{2}", "abb"), ("~(a)*", "(~(a))*"), ("~a*", "(~a)*"), ("~a{2}", "(~a)(~a)"),
    ("~ab", "(~a)b"), ("~a|b", "(~a)|b"), ("~(a)b*&c", "((~(a))(b*))&c"), ("a~b", "a(~b)"), ("a~~b", "ab"),
    ("[a-c]", "a|b|c"), ("[c-c]", "c"), ("[a-cb-d]", "[abcd]"), ("[abc]", "[cba]"), ("[a-]", "a|-"), ("[-a]", "a|-"),
    ("[a-c-]", "[abc]|-"), (r"[a\-c]", "[ac]|-"), ("[^a]", "~(a)&."), ("[^a-y]", "~([a-y])&."),
    ("[^b-dx-za-c]", "~([a-dx-z])&."), ("[a^]", "a|^"), ("[.*|&~(){}?+]", r"\.|\*|\||\&|\~|\(|\)|\{|\}|\?|\+"),
    (r"[\]\[]", r"\[|\]"), ("[A-Za-z]&[AEIOUaeiou]", "[AEIOUaeiou]"), ("[0-9]|[^0-9]", "."),
    ("[\x00-\U0010ffff]", r".&~\b"), (r"\b", r"[\b]"), (r"\bdog\b", r"(\b)(dog)(\b)"), (r".&[^\b]", r"[^\b]"),
    (r"[^a]&\b", r"\b"), (r".*\b.*|[^\b]*", ".*"), (r"\.", "[.]"), ("\\\\", r"[\\]"), (r"\-", "-"), (r"\_", "_"),
    ("^a$", r"\^a\$"), ('-,:#@<>" \'', r'\-\,\:\#\@\<\>\"\ \''), ("é|☃|😀", "[☃é😀]"), ("[à-ï]&é", "é"), ("\n", "[\n]"),
    ("((a))", "a"), ("(a|())", "a?"), ("()a()", "a"),
    ("~((dog.*[0-9].*){3,})", "~((dog.*[0-9].*)(dog.*[0-9].*)(dog.*[0-9].*)(dog.*[0-9].*)*)"),
    (".*(.*)(([AEIOUaeiou])*).*", ".*"), ("(([0-9])|(.)).*([AEIOUaeiou]).*", "..*[AEIOUaeiou].*"),
    ("(.*[A-Z].*)&(~(.*dog.*))", "~(~(.*[A-Z].*)|.*dog.*)"), ("(dog)&(truck)", "[a-z]&[0-9]"),
]  # fmt: skip
DIFFERENT = [
    ("a*", "a+"), ("a?", "a"), ("a{2}", "a{3}"), ("a{2,}", "a{3,}"), ("a{1,3}", "a{1,4}"), ("a{1,3}", "a{0,3}"),
    ("a{2}", "a{2,}"), ("ab", "ba"), ("a|b", "a"), ("(a|b)*", "a*|b*"), ("a|bc", "(a|b)c"), ("a&b|c", "a&(b|c)"),
    ("b|a&c", "(b|a)&c"), ("ab*", "(ab)*"), ("ab&ab", "a(b&a)b"), ("~(a)*", "~((a)*)"), ("~ab", "~(ab)"),
    ("~a", "[^a]"), ("~()", ".*"), ("()", "~(.*)"), ("a", "~(.*)"), ("a", "b"), ("a", "A"), ("[a-c]", "[a-d]"),
    ("[b-d]", "[a-d]"), ("[ac]", "[a-c]"), ("[^a]", "[^b]"), ("[^a-c]", "[^a-d]"), ("[^a]", "."), (".", ".."),
    (".", "a"), (".", "[\x00-\U0010ffff]"), (r"\b", "b"), (r"\b", "."), (r"\b", "()"), (r"\bdog\b", "dog"),
    (r"\b", r"\\b"), (r"\.", "."), ("^a", "a"), (" a", "a"), ("é", "e\u0301"), ("(dog).*(truck)", "(dog).*(truck).*"),
    ("(.*dog.*){2,}", "(.*dog.*){3,}"), ("(.*a.*){7}", "(.*a.*){6}"), ("(.*)([A-Z])", "(.*)([A-Za-z])"),
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
        "", "(", ")", "(a", "a)", "())", "(()", "a(", "(a))(b", "a|", "|a", "a||b", "(|a)", "(a|)", "a&",
        "&a", "a&|b", "*", "+a", "?", "{2}", "(*a)", "a|*", "~", "~*", "~)", "a~", "(~)", "a{", "a}", "a{}",
        "a{,2}", "a{2", "a{3,2}", "a{-1}", "a{1,2,3}", "a{ 1}", "a{x}", "a{٣}", "a{9999999999}", "[", "]",
        "[]", "[^]", "[a", "a]", "[b-a]", "[a-c", "[[a]", r"[\d]", r"[a-\b]", r"[\b-z]", "\\", "a\\", r"\d",
        r"\w+", r"\1", r"\é", "[a\\]",
    ):  # fmt: skip
        assert reason(text) == "syntax", text


def test_limit_on_states():
    # Whether the ninth symbol from the end is an a takes 2⁹ states, and some more before they are minimized.
    assert dfa_equal(".*a.{8}", ".*a.{8}", 1100) is True
    assert reason(".*a.{8}", 511) == "states"
    # the datasets' largest answer
    assert dfa_equal("(((dog).*(truck).*)|(ring)){6,}", "(ring|dog.*truck.*){5}(ring|dog.*truck.*)+", 3000) is True


@pytest.mark.parametrize(
    "text",
    [
        ".*a.{8}", ".*a.{8}|b", "~(.*a.{8})", "~(.*a.{8})&~b", "(.*a.{8})&b", "(~(.*a.{8})b){2}", "a{501}", "a{0,501}",
        "a{501,}", "(a{30}){30}", "a" * 501, "|".join("a" * 501),
    ],
)  # fmt: skip
def test_limit_on_states_applies_to_parts(text):
    assert reason(text, 500) == "states"


def test_hostile_expressions_end_soon_with_a_verdict_or_a_reason():
    hostile = {
        "(" * 10_000: "syntax",
        "(" * 5_000 + "a" + ")" * 5_000: True,
        "(b|" * 200 + "a" + ")" * 200: False,
        "~" * 1_000 + "a": True,
        "a" * 10_000: "states",
        "a" * 500: False,
        "a&" * 300 + "a": True,
        "a{99999}": "states",
        "(((){999999999}){999999999})|a": "states",
        "a{" + "9" * 10_000 + "}": "syntax",
        "~(.*a.{20})": "states",
        "&".join(f"(.{{{p}}})*" for p in (11, 13, 17, 19)): "states",
        "[" + "-" * 10_000 + "]": False,
        "[^" + "a-z" * 3_000 + "]": False,
        "The answer is a regular expression. " * 300: "states",
        "\0": False,
        "\ud800": False,
        "(a*)*" * 2_000: "timeout",
    }
    with Sandbox("llm_jepa.scoring.regexes:dfa_equal", seconds=2) as sandbox:
        for text, expected in hostile.items():
            try:
                result = sandbox.call(text, "a", STATES)
            except Failure as failure:
                result = failure.reason
            assert result == expected, text[:40]
