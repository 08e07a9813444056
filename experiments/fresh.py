"""Write new SYNTH examples that are in no part of the dataset, for a confirmation on untouched examples.

    python experiments/fresh.py datasets/synth_fresh_test.jsonl --count 2000 --seed 1

They are drawn from the same grammar with another seed. Regular expressions and descriptions of the train and test parts
are left out. The common short ones are among those, so new examples are harder on average.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "datasets"))

from synth_grammar import DEPTHS, MAX_WORDS, choose, draw_pairs, draw_phrase, normalize

from llm_jepa.cli import run_command
from llm_jepa.files import write_text

SYSTEM = "Convert natural language to regular expression."


def draw_fresh(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` pairs of a description and its regular expression that are not in the dataset, without duplicates."""
    train, test = draw_pairs()
    known = {text for pair in train + test for text in pair}
    rng, fresh = random.Random(seed), {}
    while len(fresh) < count:
        description, regex = normalize(draw_phrase(rng, "S", choose(rng, DEPTHS)))
        if len(description.split()) <= MAX_WORDS and not known & {description, regex}:
            fresh.setdefault(regex, description)
    return [(words, regex) for regex, words in fresh.items()]


def work(argv: list[str] | None) -> None:
    """Parses the flags and writes the examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="output file")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    lines = []
    for words, regex in draw_fresh(options.count, options.seed):
        turns = (("system", SYSTEM), ("user", words), ("assistant", regex))
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}, ensure_ascii=False))
    write_text(options.target, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(run_command("fresh.py", lambda: work(None)))
