"""Rows for an experiment, made of a dataset's rows.

    python experiments/rows.py datasets/synth_train.jsonl datasets/first500_train.jsonl --first 500
    python experiments/rows.py datasets/synth_train.jsonl datasets/placebo_train.jsonl --shuffle_views 0

With --shuffle_views the chat of each row stays as it is, and its Code view is another row's answer, drawn by the seed:
the language-model loss is the same, and the JEPA loss pulls views together that have nothing to do with each other.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError, Problems, read_examples
from llm_jepa.files import write_text


def others(answers: list[str], seed: int) -> list[str]:
    """The answers in a random order in which no row has its own. Raises UsageError where there is none."""
    answer, count = Counter(answers).most_common(1)[0]
    if 2 * count > len(answers):
        raise UsageError(f"{count} of {len(answers)} answers are {answer!r}: no order gives each row another one")
    draw = random.Random(seed)
    shuffled = draw.sample(answers, len(answers))
    for i, own in enumerate(answers):
        while shuffled[i] == own:  # changes places with a row that may have it, and whose answer it may have
            j = draw.randrange(len(answers))
            if shuffled[j] != own and answers[j] != own:
                shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return shuffled


def row(example: Example, code: str | None) -> str:
    """An example as a line of JSON; `code` replaces its Code view alone."""
    turns = [("system", example.system), ("user", example.user), ("assistant", example.assistant)]
    messages = [{"role": role, "content": content} for role, content in turns if content is not None]
    views = {} if code is None else {"code": [{"role": "assistant", "content": code}]}
    return json.dumps({"messages": messages} | views, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 2 wrong usage or rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="rows in the project's format")
    parser.add_argument("target", type=Path, help="file to write; it must not exist with other rows")
    parser.add_argument("--first", type=int, help="the first so many rows alone")
    parser.add_argument("--skip", type=int, default=0, help="without the first so many rows (default 0)")
    parser.add_argument(
        "--shuffle_views", type=int, metavar="SEED", help="each row's Code view is another row's answer"
    )
    options = parser.parse_args(argv)
    try:
        examples = read_examples(options.source, Problems(skip=False))
        if options.skip < 0 or (options.first is not None and options.first < 1):
            raise UsageError("--skip must not be negative, --first must be positive")
        wanted = examples[options.skip :][: options.first]
        if len(wanted) < (options.first or 1):
            raise UsageError(f"{options.source} has {len(examples)} rows, not enough for --skip and --first")
        if any(e.text is not None or e.code is not None or e.answers is not None for e in wanted):
            raise UsageError(f"{options.source} has rows with views or answers of their own")
        answers = [e.assistant for e in wanted]
        codes = [None] * len(wanted) if options.shuffle_views is None else others(answers, options.shuffle_views)
        text = "".join(map(row, wanted, codes))
        if options.target.exists() and options.target.read_text(encoding="utf-8") != text:
            raise UsageError(f"{options.target} exists with other rows")
        write_text(options.target, text)
    except (UsageError, ExampleError, OSError) as error:
        print(f"rows.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
