"""Write a subset of a dataset for an experiment.

    python experiments/subset.py datasets/synth_train.jsonl datasets/first500_train.jsonl --first 500

A file that exists with other examples is not overwritten.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

from llm_jepa.cli import UsageError, run_command
from llm_jepa.data.examples import Example, Problems, read_examples
from llm_jepa.files import write_text


def to_line(example: Example) -> str:
    """An example as a line of JSON."""
    turns = [("system", example.system), ("user", example.user), ("assistant", example.assistant)]
    messages = [{"role": role, "content": content} for role, content in turns if content is not None]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def work(argv: list[str] | None) -> None:
    """Parses the flags, selects the examples and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="examples in the project's format")
    parser.add_argument("target", type=Path, help="output file; must not exist with other examples")
    parser.add_argument("--first", type=int, help="number of examples (default: all)")
    parser.add_argument("--skip", type=int, default=0, help="number of examples to skip before them (default 0)")
    options = parser.parse_args(argv)
    examples = read_examples(options.source, Problems())
    chosen = examples[options.skip :][: options.first]
    if len(chosen) < (options.first or 1):
        raise UsageError(f"{options.source} has {len(examples)} examples, too few for --skip and --first")
    if any(e.text is not None or e.code is not None or e.answers is not None for e in chosen):
        raise UsageError(f'{options.source} has examples with "text", "code" or "answers"')
    text = "".join(map(to_line, chosen))
    if options.target.exists() and options.target.read_text(encoding="utf-8") != text:
        raise UsageError(f"{options.target} exists with other examples")
    write_text(options.target, text)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 1 the file system failed, 2 wrong flags or data."""
    return run_command("subset.py", lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
