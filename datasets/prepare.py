"""Prepares datasets: writes NAME_train.jsonl, NAME_test.jsonl and an entry of manifest.json, and checks examples.

    python datasets/prepare.py synth                                # the project's own examples, generated
    python datasets/prepare.py gsm8k                                # from the hub, at a pinned commit
    python datasets/prepare.py turk --source deep-regex             # from a local copy of the authors' files
    python datasets/prepare.py spider --split random                # from spider_data.zip
    python datasets/prepare.py all --source downloads               # uses downloads/turk, downloads/spider … if present
    python datasets/prepare.py own --name mine --train_file mine.csv --test_size 0.1 --text_field ask --code_field sql
    python datasets/prepare.py check spider --tokenizer models/tiny --max_tokens 512

An example is one line of JSON, {"messages": [system, user, assistant]}, each message {"role", "content"}. manifest.json
records what was read, the license, the counts and the checksums.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

import check
from convert import DATASETS, Dataset, Parts, to_json
from sources import Source, file_entry, pinned

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError, Fields, Problems, is_hub, read_examples, split_examples
from llm_jepa.files import read_json, sha256, write_json, write_text

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------------- files


def write_dataset(args: argparse.Namespace, name: str, parts: Parts, entry: dict[str, Any]) -> list[Path]:
    """Writes the non-empty parts and the dataset's entry of manifest.json to `args.out_dir`; returns the data files.

    Raises UsageError if a file with other examples would be replaced or removed, unless `args.overwrite`.
    """
    by_path = {args.out_dir / f"{name}_{part}.jsonl": getattr(parts, part) for part in ("train", "test")}
    texts = {
        path: "".join(json.dumps(to_json(example), ensure_ascii=False) + "\n" for example in examples)
        for path, examples in by_path.items()
        if examples
    }
    changed = [path for path, text in texts.items() if not path.exists() or path.read_bytes() != text.encode()]
    stale = [path for path in by_path if path not in texts and path.exists()]  # it would not match the new train part
    replaced = [str(path) for path in (*changed, *stale) if path.exists()]
    if replaced and not args.overwrite:
        raise UsageError(f"{' and '.join(replaced)} would be replaced; use --overwrite or another --out_dir")
    manifest_path = args.out_dir / "manifest.json"
    manifest = read_json(manifest_path) if manifest_path.exists() else {}
    for path in changed:
        write_text(path, texts[path])
    for path in stale:
        path.unlink()
    files = {path.name: {"rows": len(by_path[path]), "sha256": sha256(path)} for path in texts}
    manifest[name] = {**entry, "split": parts.split, "files": files}
    write_json(manifest_path, dict(sorted(manifest.items())))
    for path in texts:
        print(f"{path}: {len(by_path[path])} examples")
    return list(texts)


# --------------------------------------------------------------------------------------------------- commands


def prepare(name: str, args: argparse.Namespace, source_path: Path | None) -> None:
    """Prepares one dataset of DATASETS. Raises ExampleError, UsageError, OSError."""
    dataset = DATASETS[name]
    problems, source = Problems(skip=args.skip_bad_examples), Source(source_path)
    flags = {flag: getattr(args, flag) for flag in dataset.flags if hasattr(args, flag)}
    parts = dataset.convert(source, problems, **flags)
    skipped = problems.report()
    for part in dataset.parts:
        if not getattr(parts, part):
            raise ExampleError(f"no examples in the {part} part of {name}" + (f" ({skipped})" if skipped else ""))
    entry = {"licence": parts.license or dataset.license, "source": source.entries, "skipped": len(problems.found)}
    unexpected = {} if parts.license else unexpected_counts(dataset, parts, flags)
    if unexpected:
        entry["rows other than published"] = unexpected
    elif parts.published_split and not parts.license and not skipped:
        parts.split = parts.published_split
    paths = write_dataset(args, name, parts, entry)
    if "generator" in source.entries[0]:  # the same bytes everywhere
        sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(paths))
        write_text(args.out_dir / "SHA256SUMS", sums)
    if skipped:
        print(skipped)
    for part, counts in unexpected.items():
        print(f"prepare.py: warning: {name}: {part} examples other than published: {counts}", file=sys.stderr)


def unexpected_counts(dataset: Dataset, parts: Parts, flags: dict[str, Any]) -> dict[str, str]:
    """Part → "3000, not 7473" for each part whose count is not the published one and was not set by a flag."""
    split = flags.get("split", next(iter(dataset.counts), ""))
    counts = zip(dataset.parts, (len(parts.train), len(parts.test)), dataset.counts.get(split, ()), strict=False)
    return {
        part: f"{count}, not {published}"
        for part, count, published in counts
        if count != published and f"{part}_rows" not in flags
    }


def prepare_all(args: argparse.Namespace) -> int:
    """Prepares every dataset; a failure is reported and the others are still prepared. Returns the exit code."""
    if args.source and not args.source.is_dir():
        raise UsageError(f"--source {args.source}: no such folder")
    failed = []
    for name, dataset in DATASETS.items():
        path = args.source / name if args.source and dataset.source else None
        try:
            prepare(name, args, path if path and path.exists() else None)
        except (ExampleError, UsageError, OSError) as error:
            failed.append(name)
            print(f"prepare.py: error: {name}: {error}", file=sys.stderr)
    if failed:
        print(f"prepare.py: error: not prepared: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


def prepare_own(args: argparse.Namespace) -> None:
    """Prepares a user's own examples. Raises ExampleError, UsageError, OSError."""
    if not re.fullmatch(r"[\w.-]+", args.name) or args.name in DATASETS:
        raise UsageError(f"--name {args.name}: use letters, digits, '_', '-' and '.', and no name of a known dataset")
    if bool(args.text_field) != bool(args.code_field):
        raise UsageError("--text_field and --code_field must be given together")
    if args.system and not args.text_field:
        raise UsageError("--system requires --text_field and --code_field")
    if args.test_file and args.test_size:
        raise UsageError("--test_file and --test_size exclude each other")
    if args.split_seed is not None and not args.test_size:
        raise UsageError("--split_seed requires --test_size")
    fields = Fields(args.text_field, args.code_field, args.system) if args.text_field else None
    problems, entries = Problems(skip=args.skip_bad_examples), []

    def read(path: str) -> list[Example]:
        address, entry = pinned(path) if is_hub(path) else (path, None)
        examples = read_examples(address, problems, fields)
        entries.append(entry or file_entry(Path(path)))
        return examples

    train, test, split = read(args.train_file), [], "all for training"
    if args.test_file:
        test, split = read(args.test_file), "the files' own"
    elif args.test_size:
        seed = 42 if args.split_seed is None else args.split_seed
        train, test = split_examples(train, args.test_size, seed)
        split = f"a share of {args.test_size:g} at random, seed {seed}"
    flags = {flag: getattr(args, flag) for flag in ("text_field", "code_field", "system")}
    entry = {"licence": "own", "source": entries, **{flag: value for flag, value in flags.items() if value}}
    entry["skipped"] = len(problems.found)
    write_dataset(args, args.name, Parts(train, test, split), entry)
    if problems.found:
        print(problems.report())


def run_check(args: argparse.Namespace) -> int:
    """Prints the report of `check`. Returns 1 for a leak without --allow or a file that manifest.json does not match.

    Raises ExampleError, UsageError.
    """
    given = [Path(target) for target in args.data]
    if args.max_tokens is not None and not args.tokenizer:
        raise UsageError("--max_tokens requires --tokenizer")
    if len(given) > 2:
        raise UsageError("check takes a name, a file, or a train and a test file")
    if len(given) == 2 or given[0].is_file():
        paths = dict(zip(("train", "test"), given, strict=False))
    else:
        paths = check.find_parts(args.data[0], HERE)
    lines, leak = check.check(paths, 512 if args.max_tokens is None else args.max_tokens, args.tokenizer)
    changed = check.manifest_mismatches(paths.values())
    print("\n".join([*lines, *changed]))
    return 1 if changed or (leak and not args.allow) else 0


# ------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    """One subcommand per dataset, and `all`, `own` and `check`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="NAME", required=True)
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--out_dir", type=Path, default=HERE, help="output folder (default: datasets/)")
    writing.add_argument("--overwrite", action="store_true", help="replace files that have other examples")
    writing.add_argument("--skip_bad_examples", action="store_true", help="skip, count and report bad examples")

    def command(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False, **options)

    for name, dataset in DATASETS.items():
        text = f"{dataset.convert.__doc__.splitlines()[0]} (license: {dataset.license})"
        known = command(name, text, parents=[writing])
        if dataset.source:
            known.add_argument("--source", type=Path, help=dataset.source)
        for flag in dataset.flags:
            if flag == "split":
                known.add_argument("--split", choices=list(dataset.counts), default=argparse.SUPPRESS)
            else:
                text = f"{flag.split('_')[0]} examples to draw; 0: all"
                known.add_argument(f"--{flag}", type=int, metavar="N", default=argparse.SUPPRESS, help=text)
    everything = command("all", "every dataset; a failure does not stop the others", parents=[writing])
    everything.add_argument("--source", type=Path, help="folder whose subfolder NAME is the --source of dataset NAME")

    own = command("own", "examples of any JSONL, CSV or Parquet file or hub dataset", parents=[writing])
    own.add_argument("--name", required=True, help="of the files: NAME_train.jsonl, NAME_test.jsonl")
    own.add_argument("--train_file", required=True, help="file, or OWNER/NAME[:CONFIG]:SPLIT[@REVISION] of the hub")
    own.add_argument("--test_file", help="the same for the test examples")
    own.add_argument("--test_size", type=float, help="share of --train_file for test, instead of --test_file")
    own.add_argument("--split_seed", type=int, help="seed of that split (default 42)")
    own.add_argument("--text_field", help="field of the Text view (default: examples are in the project's own format)")
    own.add_argument("--code_field", help="field of the Code view")
    own.add_argument("--system", help="system turn of every example (default: none)")

    checking = command(
        "check", "repeats, leaks between train and test, long chats, changed files; exit code 1 for a leak"
    )
    checking.add_argument("data", nargs="+", metavar="NAME|FILE", help="dataset, file, or a train and a test file")
    checking.add_argument("--max_tokens", type=int, help="longest chat that is not reported (default 512)")
    checking.add_argument("--tokenizer", help="model folder or hub name; without it tokens are not counted")
    checking.add_argument("--allow", action="store_true", help="exit code 0 for a leak too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 `check` found something, 2 the command or its data is wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            return run_check(args)
        args.out_dir.mkdir(exist_ok=True)
        if args.command == "all":
            return prepare_all(args)
        if args.command == "own":
            prepare_own(args)
        else:
            prepare(args.command, args, getattr(args, "source", None))
    except (ExampleError, UsageError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
