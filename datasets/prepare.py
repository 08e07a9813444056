"""Write a dataset's train and test rows and their checksums.

    python datasets/prepare.py synth --out_dir datasets

A row is one JSON object a line, `{"messages": [system, user, assistant]}`, each message `{"role", "content"}`.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# ---- synth: descriptions and regular expressions from one synchronous grammar, after arXiv 1608.03000 ----

SYNTH_SYSTEM = "Convert natural language to regular expression."
SYNTH_SEED, SYNTH_ROWS, SYNTH_TEST_EVERY = 160803000, 10_000, 5  # every fifth row is a test row: 8000 and 2000
SYNTH_MAX_WORDS = 20  # a longer description is dropped
STRINGS = ("dog", "truck", "ring", "lake")  # renamed in order of appearance, so the first string of a row is 'dog'
STRING_NAME = re.compile("(?<!st)(?:" + "|".join(STRINGS) + ")")  # not the "ring" of "the string"
DEPTHS = ((1, 5), (2, 87), (3, 8))  # rules nested at most, and the weight of that
LEAF_SHARE = 0.5  # of the arguments that could be a rule


class Phrase(NamedTuple):
    """Words and the regular expression they stand for; a leaf needs no parentheses."""

    words: str
    regex: str
    leaf: bool = False


class Rule(NamedTuple):
    """A regular expression and its wordings, which share the arguments.

    `kind` is the rule's own kind, `slots` the kinds that each argument may have, `weight` how often it is drawn.
    In `regex` an argument x, y or z keeps the parentheses written there; X, Y or Z gets some unless it is a leaf.
    N is a number of times, the same in both.
    """

    kind: str
    regex: str
    wordings: tuple[str, ...]
    slots: tuple[str, ...]
    weight: int


LEAVES = (
    *((Phrase(f"the string '{s}'", s, leaf=True), 6) for s in STRINGS),
    (Phrase("a vowel", "[AEIOUaeiou]", leaf=True), 10),
    (Phrase("a number", "[0-9]", leaf=True), 10),
    (Phrase("a capital letter", "[A-Z]", leaf=True), 10),
    (Phrase("a lower-case letter", "[a-z]", leaf=True), 10),
    (Phrase("a letter", "[A-Za-z]", leaf=True), 10),
    (Phrase("a character", ".", leaf=True), 10),
)

# Kinds: L leaf, T tight, A and, O or, R repeated, B before, W words, V property of the line, U its negation, J two
# properties, S sentence. From L to B they are in order of precedence and an argument binds tighter than its rule; what
# follows W or V belongs to it. So a sentence has one reading: "a vowel or a number, 2 or more times" repeats the "or".
NOUN = "LTAORBW"
RULES = (
    Rule("T", "~(x)", ("not x", "anything but x"), ("L",), 10),
    Rule("T", "X.*Y.*", ("x followed by y",), ("L", "L"), 15),
    Rule("A", "(x)&(y)", ("x and y", "both x and y"), ("LT", "LT"), 16),
    Rule("A", "(x)&(y)&(z)", ("x, y, and z",), ("LT", "LT", "LT"), 5),
    Rule("O", "(x)|(y)", ("x or y", "either x or y"), ("LTA", "LTA"), 18),
    Rule("O", "(x)|(y)|(z)", ("x, y, or z", "either x, y, or z"), ("LT", "LT", "LT"), 5),
    Rule("R", "(x){N,}", ("x, N or more times", "x at least N times"), ("LTAO",), 17),
    Rule("R", "(x){1,N}", ("x at most N times",), ("LTAO",), 4),
    Rule("R", "(x)+", ("x at least once", "x, one or more times"), ("LTAO",), 6),
    Rule("R", "(x)*", ("x, zero or more times",), ("LTAO",), 6),
    Rule("B", "(x).*(y).*", ("x before y",), ("LTAOR", "LTAORW"), 70),
    Rule("W", r"\bX\b", ("words with x",), ("LTAORB",), 10),
    Rule("V", "(x)(.*)", ("starting with x", "beginning with x"), (NOUN,), 10),
    Rule("V", "(.*)(x)", ("ending with x", "ending in x"), (NOUN,), 10),
    Rule("V", ".*X.*", ("containing x", "having x"), (NOUN,), 16),
    Rule("V", "x", ("containing only x", "having only x"), (NOUN,), 3),
    Rule("U", "~(x)", ("not x",), ("V",), 12),
    Rule("J", "(x)&(y)", ("x and y",), ("VU", "VU"), 4),
    Rule("J", "(x)|(y)", ("x or y",), ("VU", "VU"), 4),
    Rule("S", "x", ("lines with x",), ("TAORBW",), 10),
    Rule("S", "x", ("lines x",), ("VUJ",), 16),
)


def choose(rng: random.Random, items: Sequence[tuple[T, int]]) -> T:
    """Draw one item in proportion to its weight, the same one on every platform and Python version.

    `rng.random()` is the one method whose stream is promised, and a sum of floats is not the same in every version,
    so the weights are integers.
    """
    at = rng.random() * sum(weight for _, weight in items)
    for item, weight in items:
        at -= weight
        if at < 0:
            return item
    return items[-1][0]


def draw_phrase(rng: random.Random, kinds: str, depth: int) -> Phrase:
    """Draw a phrase of one of `kinds` with at most `depth` nested rules, the arguments of each rule distinct."""
    if kinds == "L" or "L" in kinds and (depth == 0 or rng.random() < LEAF_SHARE):
        return choose(rng, LEAVES)
    # The arguments of U and J are rules themselves, never leaves, and need a level of their own.
    rule = choose(rng, [(r, r.weight) for r in RULES if r.kind in kinds and (depth > 1 or r.kind not in "UJ")])
    inner = depth - (rule.regex != "x")  # a rule that only adds words costs no depth
    arguments: list[Phrase] = []
    while len({a.regex for a in arguments}) < len(rule.slots):
        arguments = [draw_phrase(rng, slot, inner) for slot in rule.slots]
    times = str(choose(rng, [(n, 1) for n in range(2, 8)]))
    words, regex = {"N": times}, {"N": times}
    for name, argument in zip("xyz", arguments, strict=False):
        words[name] = argument.words
        regex[name] = argument.regex
        regex[name.upper()] = argument.regex if argument.leaf else f"({argument.regex})"
    wording = choose(rng, [(w, 1) for w in rule.wordings])
    return Phrase(
        re.sub(r"\b[xyzN]\b", lambda m: words[m[0]], wording),
        re.sub(r"[xyzXYZN]", lambda m: regex[m[0]], rule.regex),
        arguments[0].leaf and rule.regex == "x",
    )


def synth(out_dir: Path) -> list[Path]:
    """Write `synth_train.jsonl` (8000 rows) and `synth_test.jsonl` (2000), no regex twice in the two together.

    No description stands there twice either, as each has one regex. Raises OSError where a file cannot be written.
    """
    rng = random.Random(SYNTH_SEED)
    rows: dict[str, str] = {}  # description by regex
    while len(rows) < SYNTH_ROWS:
        phrase = draw_phrase(rng, "S", choose(rng, DEPTHS))
        names = dict(zip(dict.fromkeys(STRING_NAME.findall(phrase.words)), STRINGS, strict=False))
        description, regex = (STRING_NAME.sub(lambda m, names=names: names[m[0]], text) for text in phrase[:2])
        if len(description.split()) <= SYNTH_MAX_WORDS:
            rows.setdefault(regex, description)
    chats = [{"system": SYNTH_SYSTEM, "user": words, "assistant": regex} for regex, words in rows.items()]
    test = chats[::SYNTH_TEST_EVERY]
    train = [chat for i, chat in enumerate(chats) if i % SYNTH_TEST_EVERY]
    return [write_rows(out_dir / "synth_train.jsonl", train), write_rows(out_dir / "synth_test.jsonl", test)]


# ---- files ----


def write_atomically(path: Path, content: bytes) -> Path:
    """Write `content` to a temporary file beside `path` and rename it there, so `path` is old or new, never partial."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_rows(path: Path, chats: Iterable[dict[str, str]]) -> Path:
    """Write `chats`, each a content by role, to `path` as UTF-8, one row a line, lines ended by LF."""
    rows = ({"messages": [{"role": role, "content": text} for role, text in chat.items()]} for chat in chats)
    return write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def update_checksums(paths: Iterable[Path], sums: Path) -> None:
    """Set the lines of `paths` in `sums`, a file for `sha256sum -c`, sorted by name; lines of other files stay."""
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    digests = {line.split("  ", 1)[1]: line for line in lines if line}
    for path in paths:
        digests[path.name] = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"
    write_atomically(sums, "".join(digests[name] + "\n" for name in sorted(digests)).encode())


DATASETS: dict[str, Callable[[Path], list[Path]]] = {"synth": synth}


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the dataset named on the command line; exit 2 with one message where that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(DATASETS), help="the dataset to prepare")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).parent, help="made if its parent is there")
    args = parser.parse_args(argv)
    try:
        args.out_dir.mkdir(exist_ok=True)
        paths = DATASETS[args.name](args.out_dir)
        update_checksums(paths, args.out_dir / "SHA256SUMS")
    except OSError as error:
        parser.error(f"cannot write to --out_dir {args.out_dir}: {error}")
    for path in paths:
        print(f"{path}: {len(path.read_bytes().splitlines())} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
