"""Searches a corpus by a model's embeddings: the entries whose view is nearest to the other view of a question.

    python -m llm_jepa.search runs/mine --corpus mine_test.jsonl "a question"          the Codes nearest to a Text
    python -m llm_jepa.search runs/mine --corpus mine_test.jsonl --side text "code"    the Texts nearest to a Code
    python -m llm_jepa.search runs/mine --corpus codes.txt < questions.txt             one question per line

A corpus in .jsonl has examples in the project's format; any other file is text with one entry per line. A match is
printed as its cosine, its line number in the corpus and its text, separated by tabs; a newline in it becomes \\n.

The embeddings of the corpus are stored in RUN/index/, or in --index FILE. They are computed again if the model's files
or the tokens of the views have changed.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llm_jepa.cli import FlagParser, UsageError, run_command
from llm_jepa.data.examples import Example, ExampleError, Problems, read_examples
from llm_jepa.files import READ_ERRORS, jsonl_lines, read_error, write_bytes
from llm_jepa.run_folder import run_settings


def note(text: str) -> None:
    """Prints a line on stderr."""
    print(f"search: {text}", file=sys.stderr, flush=True)


def entries(lines: Iterable[tuple[int, bytes]], place: str, system: str | None) -> Iterator[Example]:
    """Lines of text as examples, both of whose views are the line. Raises ExampleError naming the line."""
    where = place
    try:
        for number, line in lines:
            where = f"{place}:{number}"
            text = line.decode().rstrip("\r\n")
            if text.strip():
                yield Example(system, text, text, where, number)
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        raise ExampleError(f"{where}: cannot be read ({read_error(error)})") from None


def read_index(path: Path, identity: dict[str, str]) -> Any:
    """The vectors (N, D) of an index, None if its identity is another one. Raises UsageError if it is no index."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            vectors, changed = file.get_tensor("vectors"), [k for k in identity if file.metadata()[k] != identity[k]]
    except (SafetensorError, OSError, KeyError, TypeError):
        raise UsageError(f"{path} is not an index; delete it, or give another --index") from None
    note(f"{path}: the {changed[0]} changed; embedding again" if changed else f"{path}: used")
    return None if changed else vectors


def search(run: str, corpus: str, question: str | None, side: str, top: int, index: Path | None) -> None:
    """Prints the `top` entries of the corpus that are nearest to each question. Raises UsageError for bad input."""
    if top < 1 or question is not None and not question.strip():
        raise UsageError(f"--top {top} is not positive" if top < 1 else "the question is empty")
    import torch  # here, so that wrong flags are reported at once
    from safetensors.torch import save

    from llm_jepa.evaluation.embeddings import embed_batches, encode_views, in_order
    from llm_jepa.evaluation.model import layer_states, load, weight_files
    from llm_jepa.evaluation.settings import EvaluationSettings

    def encode(examples: list[Example], kind: str) -> list[Any]:
        code = kind == "code"  # the other side is not read, so that its length does not matter
        turns = [("a", e.code or e.assistant) if code else (e.text or e.user, "a") for e in examples]
        one_sided = [dataclasses.replace(e, user=user, assistant=answer, text=None, code=e.code if code else None)
                     for e, (user, answer) in zip(examples, turns, strict=True)]  # fmt: skip
        return [pair[code] for pair in encode_views(model, encoder, one_sided, Problems())[1]]

    record, trained = run_settings(run) or ({}, {})
    system, texts = record.get("system_turn"), Path(corpus.removesuffix(".gz")).suffix != ".jsonl"
    examples = list(entries(jsonl_lines(corpus), corpus, system)) if texts else read_examples(corpus, Problems())
    examples = [example for example in examples if example.pair]
    if not examples or not Path(run).is_dir():
        raise UsageError(f"{run}: there is no such folder" if examples else f"{corpus}: no entries in the file")
    flags = {name: trained[name] for name in ("plain", "trust_remote_code") if name in trained}
    model, encoder = load(run, EvaluationSettings(model_name=run, **flags))
    if (record.get("learned", {}).get("jepa") or {}).get("collapsed"):
        note(f"warning: the JEPA loss of {run} has not learned its pairs; matches may be no better than chance")
    views = encode(examples, side)
    tokens = json.dumps([(view.kind, view.view, view.ids.tolist()) for view in views])
    identity = {"weights": json.dumps(weight_files(run)), "views": hashlib.sha256(tokens.encode()).hexdigest()}
    if not index and (Path(run) / "run.json").is_file():
        index = Path(run) / "index" / f"{Path(corpus).name}.{side}.safetensors"
    with layer_states(model, encoder.renderer.tokenizer.pad_token_id, -1) as read:
        vectors = read_index(index, identity) if index and index.exists() else None
        if vectors is None:
            vectors = in_order(embed_batches(views, read, tokens_per_batch=2048))  # (N, D)
            if index:
                try:
                    index.parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(index, save({"vectors": vectors}, identity))
                    note(f"{index}: written")
                except OSError as error:
                    note(f"{index} cannot be written ({error.strerror}); --index FILE sets another place")
        lines = sys.stdin.buffer if question is None else [question.encode(errors="surrogateescape")]
        for asked in entries(enumerate(lines, start=1), "stdin" if question is None else "the question", system):
            query = in_order(embed_batches(encode([asked], "text" if side == "code" else "code"), read, show=False))
            cosines = torch.cosine_similarity(vectors, query)  # (N, D), (1, D) → (N,)
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
    # Intermixed: the question may follow the flags.
    return run_command("search", lambda: search(**vars(parser.parse_intermixed_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
