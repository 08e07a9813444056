"""Generates answers with a model and scores them.

    python evaluate.py --model_name runs/RUN --input_file datasets/synth_test.jsonl
    python evaluate.py --score_only predictions.jsonl --input_file datasets/synth_test.jsonl

Writes predictions.jsonl as it goes and metrics.json beside it; an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

import finetune
from examples import Example, ExampleError, Problems, Renderer, dataset_name, read_examples, split_examples
from runs import UsageError, flag, parse_flags, read_json, sha256, versions, write_json
from scoring import TASKS, score_text, wilson

MODEL, DATA, GENERATION, OUTPUT = "Model", "Data", "Generation", "Output"


@dataclass
class Settings:
    """Every flag of evaluate.py."""

    model_name: str | None = flag(None, "run folder, adapter folder, model folder or hub name", MODEL)
    original_model_name: str | None = flag(None, "base of an adapter; the model before fine-tuning", MODEL)
    revision: str | None = flag(None, "commit of a hub model", MODEL)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "precision of weights and computation; auto: bfloat16 where the GPU has it", MODEL
    )
    attn_implementation: str | None = flag(None, "attention kernel of transformers", MODEL)

    input_file: str | None = flag(None, "JSONL file of the rows to answer", DATA)
    task: str | None = flag(None, f"how to score ({', '.join(TASKS)}); default: told by the file's base name", DATA)
    nosplit_data: bool = flag(False, "use the whole file (which is the default)", DATA)
    process_split: Literal["train", "test"] | None = flag(
        None, "use one part of a file that finetune.py took as --data_file", DATA
    )
    test_size: float = flag(0.2, "--process_split: share of the test part (--eval_split of finetune.py)", DATA)
    split_seed: int = flag(42, "--process_split: seed of the split", DATA)
    max_examples: int = flag(0, "use the first N rows; 0: all", DATA)
    skip_bad_examples: bool = flag(False, "leave bad examples out, count and report them", DATA)

    batch_size: int = flag(64, "prompts answered at a time", GENERATION)
    max_new_tokens: int = flag(128, "longest answer in tokens; -1: up to the model's context", GENERATION)
    plain: bool = flag(False, "no chat format: user<|perception|>", GENERATION)
    startswith: bool = flag(False, "startswith is the headline score instead of exact", GENERATION, "--statswith")

    output_file: str | None = flag(None, "predictions; default RUN/eval/<dataset>/predictions.jsonl", OUTPUT)
    overwrite: bool = flag(False, "replace existing predictions", OUTPUT)
    score_only: str | None = flag(None, "score this file (JSON objects, one a line: id, prediction), no model", OUTPUT)
    split_tune_untune: bool = flag(
        False, "also answer with --original_model_name; scores apart for rows it got right and wrong", OUTPUT
    )


def check_settings(s: Settings, given: set[str]) -> Settings:
    """Resolves task and output file. Raises UsageError naming every wrong or inapplicable flag at once."""
    wrong: list[str] = []
    if not s.input_file:
        wrong.append("--input_file is missing")
    if bool(s.model_name) == bool(s.score_only):
        wrong.append("give one of --model_name and --score_only")
    if s.score_only:
        unused = given & {"original_model_name", "revision", "dtype", "attn_implementation", "batch_size",
                          "max_new_tokens", "plain", "split_tune_untune"}  # fmt: skip
        wrong += [f"--{name}: not with --score_only, which uses no model" for name in sorted(unused)]
    if s.nosplit_data and s.process_split:
        wrong.append("--nosplit_data: not with --process_split")
    if not s.process_split:
        wrong += [f"--{name}: only with --process_split" for name in sorted(given & {"test_size", "split_seed"})]
    elif not 0 < s.test_size < 1:
        wrong.append(f"--test_size {s.test_size} is not between 0 and 1")
    if s.split_tune_untune and not s.original_model_name:
        wrong.append("--split_tune_untune: only with --original_model_name")
    if s.batch_size < 1:
        wrong.append(f"--batch_size {s.batch_size} is not positive")
    if s.max_new_tokens < 1 and s.max_new_tokens != -1:
        wrong.append(f"--max_new_tokens {s.max_new_tokens} is neither positive nor -1")
    if s.max_examples < 0:
        wrong.append(f"--max_examples {s.max_examples} is negative")
    name = dataset_name(s.input_file or "")
    if s.task not in (None, *TASKS):
        wrong.append(f"--task {s.task} is not one of {', '.join(TASKS)}")
    elif s.task is None and s.input_file and name not in TASKS:
        wrong.append(f"--task: {s.input_file} does not name its task; give one of {', '.join(TASKS)}")
    output = s.output_file
    if not output and s.score_only:
        output = str(Path(s.score_only).with_suffix(".scored.jsonl"))
    elif not output and s.model_name and (Path(s.model_name) / "run.json").is_file():
        output = str(Path(s.model_name) / "eval" / name / "predictions.jsonl")
    elif not output and s.model_name:
        wrong.append("--output_file is missing (only a run folder has a place of its own for it)")
    if output and Path(output).resolve() in {Path(p).resolve() for p in (s.input_file, s.score_only) if p}:
        wrong.append(f"--output_file {output} is also read")
    if output and Path(output).name == "metrics.json":
        wrong.append(f"--output_file {output}: metrics.json is the name of the file beside it")
    if wrong:
        raise UsageError("\n".join(wrong))
    return dataclasses.replace(s, task=s.task or name, output_file=output)


# ----------------------------------------------------------------------------------------------------------- load


def load(name: str, s: Settings) -> tuple[Any, Renderer]:
    """The model, on its device and in evaluation mode, and the renderer of its prompts.

    Raises UsageError for an unfinished run, a run trained in the other format, or a model that cannot be loaded.
    """
    folder = Path(name)
    if (folder / "run.json").is_file():
        status, trained = read_json(folder / "run.json").get("status"), read_json(folder / "args.json")
        if status != "finished":
            raise UsageError(f"--model_name {name}: the run is {status}, not finished")
        if trained["plain"] != s.plain:
            raise UsageError(f"--model_name {name} was trained with{'' if trained['plain'] else 'out'} --plain")
        split = (trained["eval_split"], trained["split_seed"])
        if s.process_split and trained["data_file"] and split != (s.test_size, s.split_seed):
            raise UsageError(f"--model_name {name} was split by --test_size {split[0]} --split_seed {split[1]}")
    adapter = (folder / "adapter_config.json").is_file()
    base = name
    if adapter:
        base = s.original_model_name or read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    has_tokenizer = (folder / "tokenizer_config.json").is_file() or not folder.is_dir()
    render_as = finetune.Settings(
        model_name=name if has_tokenizer else s.original_model_name or base, revision=s.revision, plain=s.plain,
        max_length=sys.maxsize, lm_labels="answer",
    )  # fmt: skip
    tokenizer = finetune.load_tokenizer(render_as, predictors=False)
    renderer = Renderer(tokenizer, render_as)

    cuda = torch.cuda.is_available()
    auto = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    options = {"dtype": auto if s.dtype == "auto" else getattr(torch, s.dtype), "revision": s.revision}
    if s.attn_implementation:
        options["attn_implementation"] = s.attn_implementation
    try:
        if adapter and s.revision is None:
            options["revision"] = read_json(folder / "adapter_config.json").get("revision")
        model = finetune.load_weights(base, **options)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name)
    except finetune.LOADING_ERRORS as error:
        raise UsageError(f"--model_name {name} cannot be loaded: {finetune.first_line(error)}") from None
    return model.to("cuda" if cuda else "cpu").eval(), renderer


# ------------------------------------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class Generation:
    """What a model answered: the text without special tokens, and why it ended there."""

    text: str
    stop_reason: Literal["stop", "length"]


def stop_ids(model: Any, renderer: Renderer) -> list[int]:
    """The template's end-of-turn token and every other token that ends generation."""
    eos = model.generation_config.eos_token_id
    known = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return sorted((known | {finetune.end_of_turn(renderer), renderer.tokenizer.eos_token_id}) - {None})


def context(model: Any) -> int | None:
    """The longest text of the model in tokens, None where its configuration does not tell."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def next_tokens(model: Any, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy tokens behind each prompt, up to and with the first stop token; arguments as in generate_batch."""
    pad, stops, width = renderer.tokenizer.pad_token_id, stop_ids(model, renderer), max(map(len, prompts))
    limit, most = context(model), sys.maxsize if max_new_tokens == -1 else max_new_tokens
    room = [min(most, limit - len(p)) if limit else min(most, 8192) for p in prompts]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)  # (B, T)
    greedy = GenerationConfig(do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=min(room),
                              eos_token_id=stops, pad_token_id=pad, use_cache=True)  # fmt: skip
    # Whatever `generate` is not told it would take from the model's own settings (suppressed tokens, a least length …).
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)[:, width:].tolist()
    finally:
        model.generation_config = own
    ends = [next((t + 1 for t, token in enumerate(row) if token in stops), None) for row in rows]
    rows = [row[:end] for row, end in zip(rows, ends, strict=True)]
    # At the end of the context the longest prompt has the least room; the others go on without it.
    more = [i for i, end in enumerate(ends) if end is None and room[i] > min(room)]
    if more:
        left = -1 if max_new_tokens == -1 else max_new_tokens - min(room)
        for i, rest in zip(more, next_tokens(model, renderer, [prompts[i] + rows[i] for i in more], left), strict=True):
            rows[i] += rest
    return rows


def generate_batch(model: Any, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int) -> list[Generation]:
    """Greedy answers to a batch of tokenised prompts, padded on the left.

    Each is at most max_new_tokens long (−1: any length) and ends with the model's context.
    """
    stops, answers = stop_ids(model, renderer), []
    for row in next_tokens(model, renderer, prompts, max_new_tokens):
        stopped = row[-1] in stops
        text = row[:-1] if stopped else row
        text = renderer.tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append(Generation(text, "stop" if stopped else "length"))
    return answers


def tokenise(model: Any, renderer: Renderer, examples: list[Example]) -> list[list[int]]:
    """The prompts as token ids. Raises ExampleError for one the template refuses or that fills the model's context."""
    texts = []
    for example in examples:
        try:
            texts.append(renderer.prompt(example))
        except (ValueError, TemplateError) as error:
            raise ExampleError(f"{example.source}: {error}") from None
    prompts = renderer.tokenizer(texts, add_special_tokens=False)["input_ids"]
    limit = context(model) or sys.maxsize
    for example, tokens in zip(examples, map(len, prompts), strict=True):
        if tokens >= limit:
            raise ExampleError(f"{example.source}: the prompt's {tokens} tokens fill the model's context of {limit}")
    return prompts


def generate(
    model: Any, renderer: Renderer, examples: list[Example], batch_size: int, max_new_tokens: int,
    done: set[int] = frozenset(), prompts: list[list[int]] | None = None,
) -> Iterator[list[tuple[Example, Generation]]]:  # fmt: skip
    """Answers batch by batch, prompts of like length together, the longest first; leaves out ids in `done`.

    Batches are the same whatever is done already, so that a continued evaluation computes what one sitting would have.
    Raises ExampleError for a prompt that fills the model's context, unless `prompts` are given.
    """
    prompts = prompts or tokenise(model, renderer, examples)
    order = sorted(range(len(examples)), key=lambda i: -len(prompts[i]))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        if all(examples[i].id in done for i in batch):
            continue
        answers = generate_batch(model, renderer, [prompts[i] for i in batch], max_new_tokens)
        yield [(examples[i], a) for i, a in zip(batch, answers, strict=True) if examples[i].id not in done]


# ---------------------------------------------------------------------------------------------------------- score


def scored_row(example: Example, prediction: str, stop_reason: str | None, task: str) -> dict[str, Any]:
    """One line of predictions.jsonl; `id` is the row's line number in the input file, counted from 1."""
    scores = score_text(prediction, example.assistant) | TASKS[task](prediction, example.assistant)
    return {"id": example.id, "prediction": prediction, "stop_reason": stop_reason} | scores


def summarise(rows: list[dict[str, Any]], s: Settings) -> dict[str, Any]:
    """Each score as a fraction of n, with its 95 % Wilson interval under `ci95`."""
    names = [k for k in rows[0] if k not in ("id", "prediction", "stop_reason")]
    hits = {name: sum(row[name] for row in rows) for name in names}
    if all(row["stop_reason"] is not None for row in rows):
        hits["stop_rate"] = sum(row["stop_reason"] == "stop" for row in rows)
    n, own = len(rows), [name for name in names if name not in ("exact", "startswith")]
    return {
        "task": s.task,
        "n": n,
        "score": "startswith" if s.startswith else [*own, "exact"][0],
        **{name: hits[name] / n if name in hits else None for name in (*names, "stop_rate")},
        "scores": own,
        "ci95": {name: wilson(count, n) for name, count in hits.items()},
    }


def table(metrics: dict[str, Any]) -> str:
    """A short table: each score in percent with its interval, the headline score first."""
    names = [metrics["score"], *[n for n in (*metrics["scores"], "exact", "startswith", "stop_rate")]]
    lines = [f"{metrics['task']}, n = {metrics['n']}", f"{'':12}{'%':>7}  95 % interval"]
    for name in dict.fromkeys(names):
        if metrics[name] is not None:
            low, high = (100 * x for x in metrics["ci95"][name])
            lines.append(f"{name:12}{100 * metrics[name]:7.2f}  [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- write


def read_rows(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """The rows of a predictions file; with `repair` a last line that a kill cut short is dropped.

    Raises UsageError naming file and line for a row without `id` and `prediction`, or an id given twice.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    rows, seen = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            good = type(row["id"]) is int and row.get("stop_reason") in (None, "stop", "length")
            row["prediction"].encode("utf-8")  # fails at half a surrogate pair, which could not be written
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if repair and number == len(lines):
                break
            good = False
        if not good:
            what = "an integer id, a string prediction and, if any, a stop_reason of stop or length"
            raise UsageError(f"{path}:{number}: not a JSON object with {what}")
        if row["id"] in seen:
            raise UsageError(f"{path}:{number}: id {row['id']} stands there a second time")
        seen.add(row["id"])
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a predictions file whole or not at all, in the order of ids."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in sorted(rows, key=lambda r: r["id"]))
    os.replace(temporary, path)


def owner(metrics: Path) -> str | None:
    """Name of the predictions file that a metrics.json belongs to, None where there is no metrics.json."""
    try:
        return Path(read_json(metrics)["settings"]["output_file"]).name if metrics.exists() else None
    except (KeyError, TypeError):
        return "something else"


def begin_output(path: Path, identity: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """Prepares the output files; returns the rows that an interrupted evaluation of the same kind left.

    Raises UsageError where other results stand in their place, unless they are to be overwritten.
    """
    metrics, mark = path.with_name("metrics.json"), path.with_name(path.name + ".settings.json")
    if owner(metrics) not in (None, path.name):
        raise UsageError(f"{metrics} belongs to {owner(metrics)}; give an --output_file in another folder")
    if overwrite:
        for old in (path, mark, metrics):
            old.unlink(missing_ok=True)
    if metrics.exists():
        raise UsageError(f"{metrics} exists, an evaluation was finished here; give --overwrite or another folder")
    if path.exists():
        before = read_json(mark) if mark.exists() else None
        if before != json.loads(json.dumps(identity)):
            raise UsageError(f"--output_file {path} exists and was made otherwise; give --overwrite or another one")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(mark, identity)
    rows = read_rows(path, repair=True) if path.exists() else []
    write_rows(path, rows)
    return rows


def answer(
    name: str, examples: list[Example], s: Settings, path: Path, identity: dict[str, Any]
) -> list[dict[str, Any]]:
    """Answers all examples with a model, writing each batch as it comes; returns the rows in the order of ids."""
    model, renderer = load(name, s)
    prompts = tokenise(model, renderer, examples)
    stop_ids(model, renderer)  # like the prompts refused before anything is replaced
    rows = begin_output(path, identity, s.overwrite)
    done = {row["id"] for row in rows}
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(examples), initial=len(done), unit="row") as bar:
        for batch in generate(model, renderer, examples, s.batch_size, s.max_new_tokens, done, prompts):
            new = [scored_row(e, g.text, g.stop_reason, s.task) for e, g in batch]
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
            file.flush()
            rows += new
            bar.update(len(new))
    write_rows(path, rows)
    return sorted(rows, key=lambda r: r["id"])


def score_file(examples: list[Example], s: Settings) -> list[dict[str, Any]]:
    """Scores predictions made elsewhere. Raises UsageError where they are not those of the input file's rows."""
    given = {row["id"]: row for row in read_rows(Path(s.score_only))}
    wanted = {e.id for e in examples}
    for ids, what in ((wanted - given.keys(), "has no prediction for"), (given.keys() - wanted, "has predictions for")):
        if ids:
            shown = ", ".join(map(str, sorted(ids)[:5])) + (" …" if len(ids) > 5 else "")
            tail = "" if "no" in what.split() else f", which {s.input_file} does not have"
            raise UsageError(f"--score_only {s.score_only} {what} {len(ids)} rows (ids {shown}){tail}")
    return [scored_row(e, given[e.id]["prediction"], given[e.id].get("stop_reason"), s.task) for e in examples]


def load_rows(s: Settings) -> list[Example]:
    """The examples to answer. Raises ExampleError for bad data."""
    problems = Problems(s.skip_bad_examples)
    examples = read_examples(s.input_file, problems)
    if s.process_split:
        examples = split_examples(examples, s.test_size, s.split_seed)[s.process_split == "test"]
    if problems.report():
        print(problems.report(), file=sys.stderr)
    return examples[: s.max_examples or None]


def model_mark(name: str) -> dict[str, Any]:
    """Tells a model folder's weights from other weights of the same name: their sizes and times of change."""
    files = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
    weights = [p for p in files if p.suffix in (".safetensors", ".bin")]
    return {"name": name, "weights": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights]}


def run(s: Settings) -> None:
    """A whole evaluation: answers or reads predictions, scores, writes, prints the table."""
    examples = load_rows(s)
    path, marks, data = Path(s.output_file), [s.output_file], sha256(s.input_file)
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k != "overwrite"}
    identity = {"settings": settings, "data_sha256": data}
    if s.score_only:
        identity["predictions_sha256"] = sha256(s.score_only) if Path(s.score_only).is_file() else None
        rows = score_file(examples, s)
        begin_output(path, identity, s.overwrite)
        write_rows(path, rows)
    else:
        rows = answer(s.model_name, examples, s, path, identity | {"model": model_mark(s.model_name)})
    metrics = summarise(rows, s)
    if s.split_tune_untune:
        other = path.with_name("untuned") / path.name
        mark = identity | {"model": model_mark(s.original_model_name)}
        untuned = answer(s.original_model_name, examples, dataclasses.replace(s, original_model_name=None), other, mark)
        right = {row["id"] for row in untuned if row["exact"]}
        parts = {"right": [r for r in rows if r["id"] in right], "wrong": [r for r in rows if r["id"] not in right]}
        marks.append(str(other))
        metrics["untuned"] = summarise(untuned, s)
        metrics["by_untuned"] = {k: summarise(part, s) if part else None for k, part in parts.items()}
    record = {"settings": settings, "versions": versions(), "data_sha256": data, "argv": sys.argv}
    if owner(path.with_name("metrics.json")):
        raise UsageError(f"{path.with_name('metrics.json')} was written meanwhile; {path} is whole, but not summarised")
    write_json(path.with_name("metrics.json"), metrics | record)
    for done in marks:
        Path(done + ".settings.json").unlink(missing_ok=True)
    print(table(metrics))
    for part, scores in metrics.get("by_untuned", {}).items():
        if scores:
            print(f"\nrows the untuned model got {part}: " + table(scores))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 scored, 1 failed, 2 wrong usage or data, 130 interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings, given = parse_flags(Settings, __doc__, argv)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        run(check_settings(settings, given))
    except (UsageError, ExampleError) as error:
        for line in str(error).splitlines():
            print(f"evaluate.py: error: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
