"""DFA equality on a sample of SYNTH's test answers, through the sandbox and with the bounds that scoring uses."""

from __future__ import annotations

import json
import random

from conftest import ROOT

from llm_jepa.scoring.sandbox import Sandbox
from llm_jepa.scoring.tasks import REGEX_SECONDS, REGEX_STATES

SYNTH_TEST = ROOT / "datasets" / "synth_test.jsonl"
REWRITES = [  # each keeps the language of any x
    "~(~({x}))",
    "~(~({x})|~(.*))",
    "(({x})&.)|(({x})&(()|...*))",
    "(({x})&[0-9].*)|(({x})&~([0-9].*))",
]
WORDS = ["()", "a", "E", "7", "dog", "truckdog", r"\bring\b", "x1Z", "☃", "aaaa000000"]


def test_answers_equal_themselves_and_rewrites_but_not_another_language():
    rng, wrong = random.Random(5), []
    with (
        SYNTH_TEST.open(encoding="utf-8") as lines,
        Sandbox("llm_jepa.scoring.regexes:dfa_equal", REGEX_SECONDS) as sandbox,
    ):
        answers = [json.loads(line)["messages"][-1]["content"] for line in lines]
        for regex in rng.sample(answers, 400):
            rewritten, word = rng.choice(REWRITES).format(x=regex), rng.choice(WORDS)
            one_word_changed = f"(({regex})|{word})&~(({regex})&{word})"  # without the word if it matches, else with it
            for other, expected in ((regex, True), (rewritten, True), (one_word_changed, False)):
                if sandbox.call(other, regex, REGEX_STATES) is not expected:
                    wrong.append((other, regex))
    assert wrong == []
