"""Prepares datasets: writes NAME_train.jsonl and NAME_test.jsonl, and checks examples.

    python datasets/prepare.py gsm8k                                # from the hub, at a pinned commit
    python datasets/prepare.py turk --source deep-regex             # from a local copy of the authors' files
    python datasets/prepare.py own --name mine --train_file mine.csv --test_size 0.1 --text_field ask --code_field sql
    python datasets/prepare.py check mine                           # repeats, ambiguous prompts, leaks

An example is one line of JSON, {"messages": [system, user, assistant]}, each message {"role", "content"}.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

import check
from convert import DATASETS, SEED, Parts, to_json

from llm_jepa.cli import Refusals, UsageError, run_command
from llm_jepa.data.examples import ExampleError, Fields, Problems, files_of, is_hub, read_examples, split_examples
from llm_jepa.files import sha256, write_text

HERE = Path(__file__).resolve().parent
OWN_FIELDS = ("text_field", "code_field", "system", "view_text_field", "view_code_field")


def write_dataset(args: argparse.Namespace, name: str, parts: Parts) -> list[Path]:
    """Writes the non-empty parts to `args.out_dir`; returns their files.

    Raises UsageError if a file with other examples would be replaced or removed, unless `args.overwrite`.
    """
    args.out_dir.mkdir(exist_ok=True)
    texts = {}
    for part, examples in zip(("train", "test"), parts, strict=True):
        lines = [json.dumps(to_json(example), ensure_ascii=False) + "\n" for example in examples or []]
        texts[args.out_dir / f"{name}_{part}.jsonl"] = lines
    changed = [path for path, text in texts.items() if path.exists() and path.read_bytes() != "".join(text).encode()]
    if changed and not args.overwrite:
        raise UsageError(f"{' and '.join(map(str, changed))} would be replaced; use --overwrite or another --out_dir")
    for path, text in texts.items():
        if text:
            write_text(path, "".join(text))
            print(f"{path}: {len(text)} examples")
        else:  # a test part that exists would not match the new train part
            path.unlink(missing_ok=True)
    return [path for path, text in texts.items() if text]


def prepare(name: str, args: argparse.Namespace) -> None:
    """Prepares one dataset of DATASETS from `args.source` or the hub. Raises UsageError, OSError."""
    dataset, problems = DATASETS[name], Problems(skip=args.skip_bad_examples)
    parts = dataset.convert(args.source, problems, **({"split": args.split} if args.split else {}))
    skipped = problems.report()
    if [] in parts:
        raise ExampleError(f"{name}: a part has no examples" + (f" ({skipped})" if skipped else ""))
    paths = write_dataset(args, name, parts)
    if name == "synth" and args.source is None:  # the same bytes everywhere
        sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(paths))
        write_text(args.out_dir / "SHA256SUMS", sums)
    if skipped:
        print(skipped)
    for part, examples, published in zip(("train", "test"), parts, dataset.counts.get(args.split, ()), strict=False):
        if len(examples) != published:
            text = f"prepare.py: warning: {name}: {len(examples)} {part} examples, not the published {published}"
            print(text, file=sys.stderr)


def prepare_own(args: argparse.Namespace) -> None:
    """Prepares a user's own examples. Raises UsageError, OSError."""
    r = Refusals({name for name, value in vars(args).items() if value is not None})
    wrong = not re.fullmatch(r"[\w.-]+", args.name) or args.name in DATASETS
    r.refuse(wrong, f"--name {args.name}: use letters, digits, '_', '-' and '.', and no name of a known dataset")
    r.refuse(bool(args.text_field) != bool(args.code_field), "--text_field and --code_field must be given together")
    r.only_if(bool(args.text_field), " ".join(OWN_FIELDS[2:]), "only with --text_field and --code_field")
    r.only_if(not args.test_file, "test_size", "not with --test_file")
    if r:
        raise UsageError("\n".join(r))
    given = {name: value for name in OWN_FIELDS if (value := getattr(args, name))}
    fields = Fields(**{name.removesuffix("_field"): value for name, value in given.items()}) if given else None
    problems = Problems(skip=args.skip_bad_examples)
    parts = read_examples(args.train_file, problems, fields), None
    if args.test_file:
        parts = parts[0], read_examples(args.test_file, problems, fields)
    elif args.test_size:
        train, test = split_examples(parts[0], args.test_size, SEED)
        known = set(map(check.prompt, train))
        repeated = [example for example in test if check.prompt(example) in known]
        test = [example for example in test if check.prompt(example) not in known]
        if not test:
            raise ExampleError(f"{args.train_file}: a test part would have only prompts that the train part has too")
        if repeated:
            print(f"{len(repeated)} test examples moved to train, because their prompts occur there too")
        parts = train + repeated, test
    write_dataset(args, args.name, parts)
    if problems.found:
        print(problems.report())


def run_check(args: argparse.Namespace) -> int:
    """Prints the report of `check`. Returns 1 for a leak. Raises UsageError."""
    given = [Path(target) for target in args.data]
    if len(given) == 1 and not given[0].is_file():
        prefixes = (given[0], HERE / given[0])
        pairs = ([p.with_name(f"{p.name}_{part}.jsonl") for part in ("train", "test")] for p in prefixes)
        given = next((paths for pair in pairs if (paths := [p for p in pair if p.is_file()])), given)
    if len(given) > 2:
        raise UsageError("check accepts a name, a file, or a train and a test file")
    if len(given) == 1 and not is_hub(str(given[0])) and not Path(files_of(str(given[0]))[0]).exists():
        raise UsageError(f"{given[0]} is no file, and there is no {HERE.name}/{given[0]}_train.jsonl or _test.jsonl")
    lines, leak = check.check(dict(zip(("train", "test"), given, strict=False)))
    print(*lines, sep="\n")
    return int(leak)


def build_parser() -> argparse.ArgumentParser:
    """One subcommand per dataset, and `own` and `check`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="NAME", required=True)
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--out_dir", type=Path, default=HERE, help="output folder (default: datasets/)")
    writing.add_argument("--overwrite", action="store_true", help="replace files that have other examples")
    writing.add_argument("--skip_bad_examples", action="store_true", help="skip, count and report bad examples")

    def command(name: str, work: Callable[[argparse.Namespace], int | None], text: str, *parents: Any) -> Any:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False, parents=parents)
        made.set_defaults(work=work)
        return made

    for name, dataset in DATASETS.items():
        text = f"{(dataset.convert.__doc__ or name).splitlines()[0]} (license: {dataset.license})"
        known = command(name, partial(prepare, name), text, writing)
        known.set_defaults(source=None, split="")
        if dataset.source:
            known.add_argument("--source", type=Path, help=dataset.source)
        if len(dataset.counts) > 1:
            known.add_argument("--split", choices=list(dataset.counts), default=next(iter(dataset.counts)))

    own = command("own", prepare_own, "examples of any JSON, CSV, TSV or Parquet file or hub dataset", writing)
    own.add_argument("--name", required=True, help="of the files: NAME_train.jsonl, NAME_test.jsonl")
    own.add_argument("--train_file", required=True, help="file, or OWNER/NAME[:CONFIG]:SPLIT[@REVISION] of the hub")
    own.add_argument("--test_file", help="the same for the test examples")
    own.add_argument("--test_size", type=float, help="share of --train_file for test, instead of --test_file")
    own.add_argument("--text_field", help="field of the Text view (default: examples are in the project's own format)")
    own.add_argument("--code_field", help="field of the Code view")
    own.add_argument("--view_text_field", help="field of the Text view if --text_field is only the user turn")
    own.add_argument("--view_code_field", help="field of the Code view if --code_field is only the answer")
    own.add_argument("--system", help="system turn of every example (default: none)")

    checking = command("check", run_check, "repeats, ambiguous prompts, leaks (exit code 1)")
    checking.add_argument("data", nargs="+", metavar="NAME|FILE", help="dataset, file, or a train and a test file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 `check` found something or a file cannot be written, 2 the command or its data is wrong."""
    args = build_parser().parse_args(argv)
    return run_command("prepare.py", lambda: args.work(args))


if __name__ == "__main__":
    sys.exit(main())
