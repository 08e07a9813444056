"""Searches a corpus by a model's embeddings: the entries whose view is nearest to the other view of a question.

    python -m llm_jepa.search runs/mine --corpus mine_test.jsonl "a question"          the Codes nearest to a Text
    python -m llm_jepa.search runs/mine --corpus mine_test.jsonl --side text "code"    the Texts nearest to a Code
    python -m llm_jepa.search runs/mine --corpus codes.txt < questions.txt             one question per line

A corpus in .jsonl has examples in the project's format; any other file is text with one entry per line. A match is
printed as its cosine, its line number in the corpus and its text, separated by tabs; a newline in it becomes \\n.

The embeddings of the corpus are stored in RUN/index/, or in --index FILE, with checksums of the corpus, the model's
parameters and the tokens of all views. They are computed again if one of these changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llm_jepa.cli import FlagParser, UsageError, first_line, run_command
from llm_jepa.data.examples import Example, ExampleError, Problems, read_examples
from llm_jepa.files import READ_ERRORS, jsonl_lines, read_error, sha256, write_bytes
from llm_jepa.run_folder import run_settings

# What needs torch is imported where it is used: after the flags are accepted.


def note(text: str) -> None:
    """Prints a line on stderr."""
    print(f"search: {text}", file=sys.stderr, flush=True)


def entries(lines: Iterable[tuple[int, bytes]], place: str, system: str | None) -> Iterator[Example]:
    """Lines of text as examples, both of whose views are the line. Raises ExampleError naming the line."""
    try:
        for number, line in lines:
            text = line.decode().rstrip("\r\n")
            if text.strip():
                yield Example(system, text, text, f"{place}:{number}", number)
    except UnicodeDecodeError:
        raise ExampleError(f"{place}:{number}: not UTF-8") from None
    except READ_ERRORS as error:
        raise ExampleError(f"{place}: cannot be read ({read_error(error)})") from None


def read_index(path: Path, now: dict[str, str]) -> Any:
    """The vectors (N, D) of an index, None if a checksum has changed. Raises UsageError if it is no index."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            before, vectors = file.metadata(), file.get_tensor("vectors")
        changed = [name for name in now if before[name] != now[name]]
    except (SafetensorError, OSError, KeyError, TypeError):
        raise UsageError(f"{path} is not an index; delete it, or give another --index") from None
    note(f"{path}: the {changed[0]} changed; embedding again" if changed else f"{path}: used")
    return None if changed else vectors


def search(run: str, corpus: str, question: str | None, side: str, top: int, index: Path | None) -> None:
    """Prints the `top` entries of the corpus that are nearest to each question. Raises UsageError for bad input."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save
    from transformers.utils import logging

    from llm_jepa.evaluation import embeddings
    from llm_jepa.evaluation.model import layer_states, load
    from llm_jepa.evaluation.settings import EvaluationSettings

    def encode(examples: list[Example], kind: str) -> list[Any]:
        unread = {"user": "a", "text": None} if kind == "code" else {"assistant": "a", "code": None}
        examples = [dataclasses.replace(example, **unread) for example in examples]
        pairs = embeddings.encode_views(model, encoder, examples, Problems())[1]
        return [pair[kind == "code"] for pair in pairs]

    def embed(views: list[Any], show: bool) -> torch.Tensor:
        return embeddings.in_order(embeddings.embed_batches(views, read, tokens_per_batch=2048, show=show))  # (N, D)

    logging.disable_progress_bar()
    record, trained = run_settings(run) or ({}, {})
    system, texts = record.get("system_turn"), Path(corpus.removesuffix(".gz")).suffix != ".jsonl"
    examples = list(entries(jsonl_lines(corpus), corpus, system)) if texts else read_examples(corpus, Problems())
    if not examples or not Path(run).is_dir():
        raise UsageError(f"{run}: there is no such folder" if examples else f"{corpus}: no entries in the file")
    model, encoder = load(run, EvaluationSettings(model_name=run, plain=trained.get("plain", False)))
    if (record.get("learned", {}).get("jepa") or {}).get("collapsed"):
        note(f"warning: the JEPA loss of {run} has not learned its pairs; matches may be no better than chance")
    views, weights, tokens = encode(examples, side), hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    for view in views:
        tokens.update(f"{view.kind} {view.view} {view.ids.tolist()}".encode())
    now = {"corpus": sha256(corpus), "weights": weights.hexdigest(), "settings": tokens.hexdigest()}
    if not index and (Path(run) / "run.json").is_file():
        place = hashlib.sha256(str(Path(corpus).resolve()).encode()).hexdigest()[:8]  # of files of the same name
        index = Path(run) / "index" / f"{Path(corpus).name}.{side}.{place}.safetensors"
    with layer_states(model, encoder.renderer.tokenizer.pad_token_id, -1) as read:
        vectors = read_index(index, now) if index and index.exists() else None
        if vectors is None:
            vectors = embed(views, show=True)
            try:
                if index:
                    index.parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(index, save({"vectors": vectors}, now))
                    note(f"{index}: written")
            except OSError as error:
                note(f"the index is not kept: {first_line(error)}")
        lines = sys.stdin.buffer if question is None else [question.encode(errors="surrogateescape")]
        units, place = F.normalize(vectors, dim=-1), "stdin" if question is None else "the question"  # (N, D)
        for asked in entries(enumerate(lines, start=1), place, system):
            query = embed(encode([asked], "text" if side == "code" else "code"), show=False)  # (1, D)
            cosines = units @ F.normalize(query, dim=-1)[0]  # (N,)
            if question is None:
                print(asked.user)
            for i in cosines.argsort(descending=True, stable=True)[:top].tolist():
                own = examples[i]
                text = (own.code or own.assistant) if side == "code" else (own.text or own.user)
                print(f"{cosines[i]:.4f}", own.id, text.replace("\n", "\\n"), sep="\t", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 searched, 1 failed, 2 wrong usage or data, 130 interrupted."""
    parser = FlagParser(prog="search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder, or the folder of another model")
    parser.add_argument("question", nargs="?", help="what to search for; without it one per line is read from stdin")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="what is searched")
    parser.add_argument("--side", choices=["code", "text"], default="code", help="views of the corpus (default code)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="number of matches (default 10)")
    parser.add_argument("--index", type=Path, metavar="FILE", help="where embeddings are stored; default in RUN/index/")

    def work() -> None:
        options = parser.parse_intermixed_args(argv)  # the question may follow the flags
        if options.top < 1 or (options.question is not None and not options.question.strip()):
            raise UsageError("the question is empty" if options.top > 0 else f"--top {options.top} is less than 1")
        search(**vars(options))

    return run_command("search", work)


if __name__ == "__main__":
    sys.exit(main())
