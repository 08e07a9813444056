"""Prepares datasets: NAME_train.jsonl and NAME_test.jsonl, what they were made from, and a check of them.

    python datasets/prepare.py synth                                # the project's own rows, generated
    python datasets/prepare.py gsm8k                                # from the hub, at a pinned commit
    python datasets/prepare.py turk --source deep-regex             # from a local copy of the authors' files
    python datasets/prepare.py spider --split random                # from spider_data.zip
    python datasets/prepare.py all --source downloads               # downloads/turk, downloads/gsm8k … where they are
    python datasets/prepare.py own --name mine --train_file mine.csv --test_size 0.1 --text_field ask --code_field sql
    python datasets/prepare.py check spider --tokenizer models/tiny --max_tokens 512

A row is one JSON object a line, {"messages": [system, user, assistant]}, each message {"role", "content"}. What was
read, the licence, the counts and the checksums go to manifest.json beside the rows.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

import check
from convert import DATASETS, Dataset, Parts, as_row
from sources import Source, file_entry, pinned, read_manifest, refuse_other_encodings

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError, Fields, Problems, is_hub, read_examples, split_examples
from llm_jepa.files import sha256, write_json

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------- files


def rows_file(examples: Sequence[Example]) -> bytes:
    """A file of examples: UTF-8, one row a line, lines ended by LF."""
    return "".join(json.dumps(as_row(example), ensure_ascii=False) + "\n" for example in examples).encode()


def write_together(contents: dict[Path, bytes]) -> None:
    """Writes each file to a temporary one beside it, then renames them all, so none is ever there in part."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            temporary[path].write_bytes(content)
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: Sequence[str]) -> None:
    """Removes the temporary files of `write_together` for these names whose process was killed."""
    for name in names:
        for path in folder.glob(f".{glob.escape(name)}.*.tmp"):
            pid = path.name.removeprefix(f".{name}.").removesuffix(".tmp")
            if pid.isascii() and pid.isdigit() and not is_running(int(pid)):
                path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_atomically(path: Path, content: bytes) -> Path:
    """Writes one file like `write_together`."""
    write_together({path: content})
    return path


def write_checksums(paths: Sequence[Path], sums: Path) -> None:
    """Sets the lines of `paths` in `sums`, a file for `sha256sum -c`, sorted by name; lines of other files stay."""
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    digests = {line.split("  ", 1)[1]: line for line in lines if line}
    digests |= {path.name: f"{sha256(path)}  {path.name}" for path in paths}
    write_atomically(sums, "".join(digests[name] + "\n" for name in sorted(digests)).encode())


def write_dataset(out_dir: Path, name: str, parts: Parts, entry: dict[str, Any], overwrite: bool) -> list[Path]:
    """Writes the parts that have rows, and the dataset's entry of manifest.json.

    Raises UsageError where a file of the same name holds other rows, unless `overwrite` is given, and where
    manifest.json is damaged.
    """
    examples = {"train": parts.train, "test": parts.test}
    contents = {out_dir / f"{name}_{part}.jsonl": rows_file(rows) for part, rows in examples.items() if rows}
    changed = {p: content for p, content in contents.items() if not p.exists() or p.read_bytes() != content}
    # A part that is no longer made would go on being used, beside rows it does not belong to.
    stale = [p for part in examples if (p := out_dir / f"{name}_{part}.jsonl").exists() and p not in contents]
    kept = [str(path) for path in (*changed, *stale) if path.exists()]
    if kept and not overwrite:
        raise UsageError(f"{' and '.join(kept)} would be replaced; give --overwrite or another --out_dir")
    manifest = read_manifest(out_dir)
    write_together(changed)
    for path in stale:
        path.unlink()
        print(f"{path}: removed, since there is no such part any more")
    files = {p.name: {"rows": content.count(b"\n"), "sha256": sha256(p)} for p, content in contents.items()}
    manifest[name] = {**entry, "split": parts.split, "files": files}
    write_json(out_dir / "manifest.json", dict(sorted(manifest.items())))
    remove_leftovers(out_dir, [*(f"{name}_{part}.jsonl" for part in examples), "SHA256SUMS"])
    return list(contents)


# -------------------------------------------------------------------------------------------------------- commands


def prepare(name: str, args: argparse.Namespace, source_path: Path | None) -> None:
    """Prepares one dataset of the table. Raises ExampleError, UsageError, OSError."""
    dataset = DATASETS[name]
    if source_path is not None and not source_path.exists():
        raise UsageError(f"--source {source_path}: there is no such file or folder; it has to be {dataset.takes}")
    problems = Problems(skip=args.skip_bad_examples)
    source = Source(source_path, dataset.takes, problems)
    flags = {flag: getattr(args, flag) for flag in dataset.flags if hasattr(args, flag)}
    parts = dataset.convert(source, **flags)
    for part in dataset.parts:  # before anything is written: an empty part would take the place of good rows
        if not getattr(parts, part):
            raise source.no_rows(f"the {part} part of {name}")
    entry = {"licence": parts.licence or dataset.licence, "source": source.entries}
    entry["skipped"] = len(problems.found)
    other = other_than_published(dataset, parts, flags)
    if other:
        entry["rows other than published"] = other
    elif parts.published_split and not parts.other_set and not problems.found:
        parts.split = parts.published_split
    paths = write_dataset(args.out_dir, name, parts, entry, args.overwrite)
    if "generator" in source.entries[0]:  # rows of the project, the same everywhere
        write_checksums(paths, args.out_dir / "SHA256SUMS")
    report(paths, parts, problems)
    for part, counts in other.items():
        print(f"prepare.py: warning: {name}: {part} rows other than published: {counts}", file=sys.stderr)


def other_than_published(dataset: Dataset, parts: Parts, flags: dict[str, Any]) -> dict[str, str]:
    """By part "3000, not 7473"; nothing for a part as published or that a flag sizes, or where the set is another."""
    split = flags.get("split", "by_database" if "split" in dataset.flags else "")
    if parts.other_set or split not in dataset.rows:
        return {}
    counts = zip(dataset.parts, (len(parts.train), len(parts.test)), dataset.rows[split], strict=True)
    return {
        part: f"{there}, not {published}"
        for part, there, published in counts
        if there != published and f"{part}_rows" not in flags
    }


def report(paths: list[Path], parts: Parts, problems: Problems) -> None:
    """Says what was written."""
    for path, examples in zip(paths, (rows for rows in (parts.train, parts.test) if rows), strict=True):
        print(f"{path}: {len(examples)} rows")
    if problems.report():
        print(problems.report())


def prepare_all(args: argparse.Namespace) -> int:
    """Prepares every dataset; one that cannot be done is reported and does not keep the others from being done."""
    failed = []
    if args.source and not args.source.is_dir():
        raise UsageError(f"--source {args.source}: there is no such folder")
    for name in DATASETS:
        source_path = args.source and args.source / name
        try:
            prepare(name, args, source_path if source_path and source_path.exists() else None)
        except (ExampleError, UsageError, OSError) as error:
            failed.append(name)
            print(f"prepare.py: error: {name}: {error}", file=sys.stderr)
    if failed:
        print(f"prepare.py: error: not prepared: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


def prepare_own(args: argparse.Namespace) -> None:
    """Prepares rows of the user's own. Raises ExampleError, UsageError, OSError."""
    if not re.fullmatch(r"[\w.-]+", args.name) or args.name in DATASETS:
        raise UsageError(f"--name {args.name}: give a name of letters, digits, '_', '-' and '.' that is no dataset's")
    if bool(args.text_field) != bool(args.code_field):
        raise UsageError("give --text_field and --code_field together")
    if args.system and not args.text_field:
        raise UsageError("--system: only with --text_field and --code_field")
    if args.test_file and args.test_size:
        raise UsageError("give one of --test_file and --test_size")
    if args.split_seed is not None and not args.test_size:
        raise UsageError("--split_seed: only with --test_size")
    fields = Fields(args.text_field, args.code_field, args.system) if args.text_field else None
    problems, entries = Problems(skip=args.skip_bad_examples), []

    def read(path: str) -> list[Example]:
        address, entry = pinned(path) if is_hub(path) else (path, None)
        refuse_other_encodings(Path(path))
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
    parts = Parts(train, test, split)
    flags = {flag: getattr(args, flag) for flag in ("text_field", "code_field", "system")}
    entry = {"licence": "own", "source": entries, **{flag: value for flag, value in flags.items() if value}}
    entry["skipped"] = len(problems.found)
    paths = write_dataset(args.out_dir, args.name, parts, entry, args.overwrite)
    report(paths, parts, problems)


def run_check(args: argparse.Namespace) -> int:
    """Prints the report; 1 where something leaks, unless that is allowed, and where a file is not the manifest's.

    Raises ExampleError, UsageError.
    """
    given = [Path(target) for target in args.rows]
    if args.max_tokens is not None and not args.tokenizer:
        raise UsageError("--max_tokens: only with --tokenizer")
    max_tokens = 512 if args.max_tokens is None else args.max_tokens
    if len(given) > 2:
        raise UsageError("check takes a name, a file, or a train and a test file")
    if len(given) == 2 or given[0].is_file():
        paths = dict(zip(("train", "test"), given, strict=False))
    else:
        paths = check.find_parts(args.rows[0], HERE)
    lines, leak = check.check(paths, max_tokens, args.tokenizer)
    changed = check.not_the_manifests(paths.values())
    print("\n".join([*lines, *changed]))
    return 1 if changed or (leak and not args.allow) else 0


# ------------------------------------------------------------------------------------------------------------ main


def count(text: str) -> int:
    """A number of rows from the command line."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The parser: one subcommand a dataset, and all, own, check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="NAME", required=True)
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--out_dir", type=Path, default=HERE, help="made if its parent is there (default: datasets/)")
    writing.add_argument(
        "--overwrite", action="store_true", help="replace files of the same names that hold other rows"
    )
    writing.add_argument("--skip_bad_examples", action="store_true", help="leave bad rows out, count and report them")

    def command(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        summary = text.replace("%", "%%")
        return commands.add_parser(name, help=summary, description=summary, allow_abbrev=False, **options)

    for name, dataset in DATASETS.items():
        known = command(name, dataset.convert.__doc__.split("\n")[0], parents=[writing])
        known.add_argument("--source", type=Path, help=f"{dataset.takes} (licence: {dataset.licence})")
        flags = {"default": argparse.SUPPRESS, "type": count, "metavar": "N"}
        for flag in dataset.flags:
            if flag == "split":
                known.add_argument("--split", choices=list(dataset.rows), default=argparse.SUPPRESS)
            else:
                known.add_argument(f"--{flag}", help=f"{flag.split('_')[0]} rows drawn; 0: all", **flags)
    everything = command("all", "every dataset; one that cannot be had does not stop the others", parents=[writing])
    everything.add_argument("--source", type=Path, help="a folder whose folder NAME is a dataset's source, where there")

    own = command("own", "rows of any JSONL, CSV or Parquet file or hub dataset", parents=[writing])
    own.add_argument("--name", required=True, help="of the files: NAME_train.jsonl, NAME_test.jsonl")
    own.add_argument("--train_file", required=True, help="file, or OWNER/NAME[:CONFIG]:SPLIT[@REVISION] of the hub")
    own.add_argument("--test_file", help="the same for the test rows")
    own.add_argument("--test_size", type=float, help="share of --train_file for test, instead of a --test_file")
    own.add_argument("--split_seed", type=int, help="seed of that split (default 42)")
    own.add_argument("--text_field", help="field of the Text view; without it rows are in the project's own format")
    own.add_argument("--code_field", help="field of the Code view")
    own.add_argument("--system", help="system turn of every row (default: none)")

    checking = command(
        "check", "repeats, leaks between train and test, long rows, changed files; exit code 1 for a leak"
    )
    checking.add_argument("rows", nargs="+", metavar="NAME|FILE", help="dataset, file, or a train and a test file")
    checking.add_argument("--max_tokens", type=int, help="longest chat that is not reported (default 512)")
    checking.add_argument("--tokenizer", help="model folder or hub name whose tokens are counted (default: none are)")
    checking.add_argument("--allow", action="store_true", help="exit code 0 for a leak too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says; exit 2 with one message where that cannot be done."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            return run_check(args)
        try:
            args.out_dir.mkdir(exist_ok=True)
        except OSError as error:
            parser.error(f"cannot write to --out_dir {args.out_dir}: {error}")
        if args.command == "all":
            return prepare_all(args)
        if args.command == "own":
            prepare_own(args)
        else:
            prepare(args.command, args, args.source)
    except (ExampleError, UsageError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
