"""Write a subset of a dataset, or the shuffled-pair placebo, for an experiment.

    python experiments/subset.py datasets/synth_train.jsonl datasets/first500_train.jsonl --first 500
    python experiments/subset.py datasets/synth_train.jsonl datasets/placebo_train.jsonl --shuffle_views 0

With --shuffle_views the chat of each example is unchanged, and its Code view is the answer of another example, drawn by
the seed. The language-model loss is the same, and the JEPA loss pairs unrelated views.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

from llm_jepa.cli import UsageError, run_command
from llm_jepa.data.examples import Example, Problems, read_examples
from llm_jepa.files import write_text


def derange(answers: list[str], seed: int) -> list[str]:
    """The answers in a random order in which no answer keeps its value at its place.

    Raises UsageError if more than half of the answers are equal, because there is no such order.
    """
    answer, count = Counter(answers).most_common(1)[0]
    if 2 * count > len(answers):
        raise UsageError(f"--shuffle_views: {count} of {len(answers)} answers are {answer!r}, more than half")
    rng = random.Random(seed)
    shuffled = rng.sample(answers, len(answers))
    for i, own in enumerate(answers):
        while shuffled[i] == own:  # swap with a place where both answers are allowed
            j = rng.randrange(len(answers))
            if shuffled[j] != own and answers[j] != own:
                shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return shuffled


def to_line(example: Example, code: str | None) -> str:
    """An example as a line of JSON. `code` replaces only its Code view."""
    turns = [("system", example.system), ("user", example.user), ("assistant", example.assistant)]
    messages = [{"role": role, "content": content} for role, content in turns if content is not None]
    views = {} if code is None else {"code": [{"role": "assistant", "content": code}]}
    return json.dumps({"messages": messages} | views, ensure_ascii=False) + "\n"


def work(argv: list[str] | None) -> None:
    """Parses the flags, selects the examples and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="examples in the project's format")
    parser.add_argument("target", type=Path, help="output file; must not exist with other examples")
    parser.add_argument("--first", type=int, help="number of examples (default: all)")
    parser.add_argument("--skip", type=int, default=0, help="number of examples to skip before them (default 0)")
    parser.add_argument("--shuffle_views", type=int, metavar="SEED", help="set each Code view to another answer")
    options = parser.parse_args(argv)
    examples = read_examples(options.source, Problems(skip=False))
    chosen = examples[options.skip :][: options.first]
    if len(chosen) < (options.first or 1):
        raise UsageError(f"{options.source} has {len(examples)} examples, too few for --skip and --first")
    if any(e.text is not None or e.code is not None or e.answers is not None for e in chosen):
        raise UsageError(f'{options.source} has examples with "text", "code" or "answers"')
    answers = [e.assistant for e in chosen]
    codes = [None] * len(chosen) if options.shuffle_views is None else derange(answers, options.shuffle_views)
    text = "".join(map(to_line, chosen, codes))
    if options.target.exists() and options.target.read_text(encoding="utf-8") != text:
        raise UsageError(f"{options.target} exists with other examples")
    write_text(options.target, text)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 1 the file system failed, 2 wrong flags or data."""
    return run_command("subset.py", lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
