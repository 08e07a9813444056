"""Prepares datasets: writes NAME_train.jsonl, NAME_test.jsonl and an entry of manifest.json, and checks examples.

    python datasets/prepare.py gsm8k                                # from the hub, at a pinned commit
    python datasets/prepare.py turk --source deep-regex             # from a local copy of the authors' files
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

import check
from convert import DATASETS, Dataset, Parts, to_json
from sources import Source, file_entry, pinned

from llm_jepa.cli import Refusals, UsageError, run_command
from llm_jepa.data.examples import Example, ExampleError, Fields, Problems, is_hub, read_examples, split_examples
from llm_jepa.files import read_json, sha256, write_json, write_text

HERE = Path(__file__).resolve().parent


def write_dataset(args: argparse.Namespace, name: str, parts: Parts, entry: dict[str, Any]) -> list[Path]:
    """Writes the non-empty parts and the dataset's entry of manifest.json to `args.out_dir`; returns the data files.

    Raises UsageError if a file with other examples would be replaced or removed, unless `args.overwrite`.
    """
    args.out_dir.mkdir(exist_ok=True)
    by_path = {args.out_dir / f"{name}_{part}.jsonl": getattr(parts, part) or [] for part in ("train", "test")}
    texts = {
        path: "".join(json.dumps(to_json(example), ensure_ascii=False) + "\n" for example in examples)
        for path, examples in by_path.items()
    }
    changed = [path for path, text in texts.items() if path.exists() and path.read_bytes() != text.encode()]
    if changed and not args.overwrite:
        raise UsageError(f"{' and '.join(map(str, changed))} would be replaced; use --overwrite or another --out_dir")
    manifest_path = args.out_dir / "manifest.json"
    manifest = read_json(manifest_path) if manifest_path.exists() else {}
    files = {}
    for path, text in texts.items():
        if not text:  # a test part that exists would not match the new train part
            path.unlink(missing_ok=True)
            continue
        write_text(path, text)
        files[path.name] = {"rows": len(by_path[path]), "sha256": sha256(path)}
        print(f"{path}: {len(by_path[path])} examples")
    manifest[name] = {**entry, "split": parts.split, "files": files}
    write_json(manifest_path, dict(sorted(manifest.items())))
    return [args.out_dir / file for file in files]


def prepare(name: str, args: argparse.Namespace) -> None:
    """Prepares one dataset of DATASETS from `args.source` or the hub. Raises UsageError, OSError."""
    dataset, problems, source = DATASETS[name], Problems(skip=args.skip_bad_examples), Source(args.source)
    flags = {flag: getattr(args, flag) for flag in dataset.flags if hasattr(args, flag)}
    parts = dataset.convert(source, problems, **flags)
    skipped = problems.report()
    for part in ("train", "test"):
        if getattr(parts, part) == []:
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
    sizes = dataset.counts.get(flags.get("split", next(iter(dataset.counts), "")), ())
    published = {p: n for p, n in zip(("train", "test"), sizes, strict=False) if f"{p}_rows" not in flags}
    counts = {part: len(getattr(parts, part)) for part in published}
    return {part: f"{n}, not {published[part]}" for part, n in counts.items() if n != published[part]}


def prepare_all(args: argparse.Namespace) -> None:
    """Prepares every dataset. A failure is reported, the others are still prepared, and UsageError lists the failed."""
    folder, failed = args.source, []
    if folder and not folder.is_dir():
        raise UsageError(f"--source {folder}: no such folder")
    for name, dataset in DATASETS.items():
        args.source = folder / name if folder and dataset.source and (folder / name).exists() else None
        try:
            prepare(name, args)
        except (UsageError, OSError) as error:
            failed.append(name)
            print(f"prepare.py: error: {name}: {error}", file=sys.stderr)
    if failed:
        raise UsageError(f"not prepared: {', '.join(failed)}")


def prepare_own(args: argparse.Namespace) -> None:
    """Prepares a user's own examples. Raises UsageError, OSError."""
    r = Refusals({name for name, value in vars(args).items() if value is not None})
    wrong = not re.fullmatch(r"[\w.-]+", args.name) or args.name in DATASETS
    r.refuse(wrong, f"--name {args.name}: use letters, digits, '_', '-' and '.', and no name of a known dataset")
    r.refuse(bool(args.text_field) != bool(args.code_field), "--text_field and --code_field must be given together")
    r.only_if(bool(args.text_field), "system", "only with --text_field and --code_field")
    r.only_if(not args.test_file, "test_size", "not with --test_file")
    r.only_if(bool(args.test_size), "split_seed", "only with --test_size")
    if r:
        raise UsageError("\n".join(r))
    fields = Fields(args.text_field, args.code_field, args.system) if args.text_field else None
    problems, entries = Problems(skip=args.skip_bad_examples), []

    def read(path: str) -> list[Example]:
        address, entry = pinned(path) if is_hub(path) else (path, None)
        examples = read_examples(address, problems, fields)
        entries.append(entry or file_entry(Path(path)))
        return examples

    train, test, split = read(args.train_file), None, "all for training"
    if args.test_file:
        test, split = read(args.test_file), "the files' own"
    elif args.test_size:
        seed = 42 if args.split_seed is None else args.split_seed
        train, test = split_examples(train, args.test_size, seed)
        split = f"a share of {args.test_size:g} at random, seed {seed}"
    flags = {flag: value for flag in ("text_field", "code_field", "system") if (value := getattr(args, flag))}
    entry = {"licence": "own", "source": entries, **flags, "skipped": len(problems.found)}
    write_dataset(args, args.name, Parts(train, test, split), entry)
    if problems.found:
        print(problems.report())


def run_check(args: argparse.Namespace) -> int:
    """Prints the report of `check`. Returns 1 for a leak without --allow or a file that manifest.json does not match.

    Raises UsageError.
    """
    given = [Path(target) for target in args.data]
    if args.max_tokens is not None and not args.tokenizer:
        raise UsageError("--max_tokens requires --tokenizer")
    if len(given) > 2:
        raise UsageError("check accepts a name, a file, or a train and a test file")
    paths = dict(zip(("train", "test"), given, strict=False))
    if len(given) == 1 and not given[0].is_file():
        paths = check.find_parts(args.data[0], HERE)
    lines, leak = check.check(paths, 512 if args.max_tokens is None else args.max_tokens, args.tokenizer)
    changed = check.manifest_mismatches(paths.values())
    print(*lines, *changed, sep="\n")
    return int(bool(changed) or (leak and not args.allow))


def build_parser() -> argparse.ArgumentParser:
    """One subcommand per dataset, and `all`, `own` and `check`."""
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
        text = f"{dataset.convert.__doc__.splitlines()[0]} (license: {dataset.license})"
        known = command(name, partial(prepare, name), text, writing)
        known.set_defaults(source=None)
        if dataset.source:
            known.add_argument("--source", type=Path, help=dataset.source)
        for flag in dataset.flags:
            kind = {"choices": list(dataset.counts)} if flag == "split" else {"type": int, "metavar": "N"}
            text = None if flag == "split" else f"{flag.split('_')[0]} examples to draw; 0: all"
            known.add_argument(f"--{flag}", default=argparse.SUPPRESS, help=text, **kind)
    everything = command("all", prepare_all, "every dataset; a failure does not stop the others", writing)
    everything.add_argument("--source", type=Path, help="folder whose subfolder NAME is the --source of dataset NAME")

    own = command("own", prepare_own, "examples of any JSONL, CSV or Parquet file or hub dataset", writing)
    own.add_argument("--name", required=True, help="of the files: NAME_train.jsonl, NAME_test.jsonl")
    own.add_argument("--train_file", required=True, help="file, or OWNER/NAME[:CONFIG]:SPLIT[@REVISION] of the hub")
    own.add_argument("--test_file", help="the same for the test examples")
    own.add_argument("--test_size", type=float, help="share of --train_file for test, instead of --test_file")
    own.add_argument("--split_seed", type=int, help="seed of that split (default 42)")
    own.add_argument("--text_field", help="field of the Text view (default: examples are in the project's own format)")
    own.add_argument("--code_field", help="field of the Code view")
    own.add_argument("--system", help="system turn of every example (default: none)")

    text = "repeats, leaks between train and test, long chats, changed files; exit code 1 for a leak"
    checking = command("check", run_check, text)
    checking.add_argument("data", nargs="+", metavar="NAME|FILE", help="dataset, file, or a train and a test file")
    checking.add_argument("--max_tokens", type=int, help="longest chat that is not reported (default 512)")
    checking.add_argument("--tokenizer", help="model folder or hub name; without it tokens are not counted")
    checking.add_argument("--allow", action="store_true", help="exit code 0 for a leak too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 `check` found something or a file cannot be written, 2 the command or its data is wrong."""
    args = build_parser().parse_args(argv)
    return run_command("prepare.py", lambda: args.work(args))


if __name__ == "__main__":
    sys.exit(main())
