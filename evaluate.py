"""Generates responses with a model and scores them, or measures how the model embeds the two views.

    python evaluate.py --model_name runs/RUN --input_file datasets/synth_test.jsonl
    python evaluate.py --score_only predictions.jsonl --input_file datasets/synth_test.jsonl
    torchrun --nproc_per_node 8 evaluate.py --model_name runs/RUN --input_file datasets/synth_test.jsonl
    python evaluate.py --similarity --t_sne --model_name runs/RUN --input_file datasets/synth_test.jsonl

Writes predictions.jsonl batch by batch and metrics.json at the end; the same command resumes an interrupted evaluation.
"""

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError, first_line, parse_flags
from llm_jepa.distributed import agreed, processes, start
from llm_jepa.evaluation.settings import EvaluationSettings, check_evaluation_settings, notes_on, run_split

if __name__ == "__main__":  # before the slow imports, so that --help and flag errors are fast
    start("evaluate.py", lambda: check_evaluation_settings(parse_flags(EvaluationSettings, __doc__)[0], processes()))

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from llm_jepa.data.examples import Example, Problems, data_sha256, dataset_name, read_examples, split_examples
from llm_jepa.data.segments import Encoder
from llm_jepa.evaluation import generation, predictions, vllm_engine
from llm_jepa.evaluation.generation import Generation
from llm_jepa.evaluation.model import label_logits, layer_states, load, weight_files
from llm_jepa.evaluation.predictions import Predictions
from llm_jepa.evaluation.scores import databases_of, retrieval_table, score_table, scored_row, scorer, summarize
from llm_jepa.files import folder_sha256, sha256, write_json
from llm_jepa.run_folder import provenance
from llm_jepa.scoring.tasks import find_task, is_task_file
from llm_jepa.training.process import run_script, write_errors

MIN_GOLD_SCORE = 0.9  # of the data's own answers; published datasets contain a few wrong answers
TOKENS_PER_BATCH = 2048  # of views, which are embedded before generating, without --tokens_per_batch

# ------------------------------------------------------------------------------------------------------- generate


def encode(
    model: Any, encoder: Encoder, examples: list[Example], s: EvaluationSettings, problems: Problems
) -> tuple[list[Example], list[Any]]:
    """(examples, their prompts or their chats with each choice), without those that cannot be encoded."""
    if choices := find_task(s.task).choices:
        return generation.encode_choices(model.config, encoder, examples, choices, problems)
    return generation.encode_prompts(model.config, encoder.renderer, examples, problems)


def with_weights(identity: dict[str, Any], name: str) -> dict[str, Any]:
    """An evaluation's settings and checksums with `model`: its name and `weight_files`."""
    return identity | {"model": {"name": name, "weights": weight_files(name)}}


def add_notes(record: dict[str, Any], notes: list[str]) -> None:
    """Adds notes to the record and prints them."""
    record["notes"] += notes
    for note in notes if PartialState().is_main_process else ():
        print(f"evaluate.py: note: {note}", file=sys.stderr)


def predict(
    name: str, examples: list[Example], s: EvaluationSettings, path: Path, identity: dict[str, Any],
    record: dict[str, Any], problems: Problems,
) -> Predictions:  # fmt: skip
    """Generates, scores and writes batch by batch. Returns all rows in the main process, [] in the others.

    `record` gets the maximum length that was used, and notes on how responses were computed.
    """
    with contextlib.ExitStack() as stack:
        with agreed():  # nothing is replaced before all input is checked
            score = stack.enter_context(scorer(s.task, s.spider_path, examples, s.allow_code_execution))
            model, encoder = load(name, s)
            choices, renderer, plan = find_task(s.task).choices, encoder.renderer, generation.Plan()
            limit = s.max_new_tokens or generation.answer_limit(renderer, examples)
            record["settings"] = identity["settings"] | {"max_new_tokens": limit}
            examples, encoded = encode(model, encoder, examples, s, problems)
            if choices:
                read = stack.enter_context(label_logits(model, renderer.tokenizer.pad_token_id))
                response = partial(generation.choose, read, choices)
                lengths = [generation.forward_size(chats) for chats in encoded]
            else:
                if s.engine == "transformers":
                    plan = generation.make_plan(model, encoded, renderer.tokenizer.pad_token_id)
                    add_notes(record, plan.notes(model))
                response = partial(generation.generate_batch, model, renderer, limit, plan)
                lengths = [len(prompt) for prompt in encoded]
            if s.engine == "vllm":
                sizes = (limit, s.tensor_parallel_size)
                responses = stack.enter_context(vllm_engine.started(model, renderer, examples, encoded, *sizes))
        if s.engine != "vllm":
            alike = all(gather_object([plan.batch]))  # all processes must make the same batches
            sizes = (s.batch_size, s.tokens_per_batch) if alike else (1, 0)
            batches = generation.batches(lengths, *sizes)
            responses = partial(generation.respond, examples, encoded, response, batches)

        def rows(done: set[int], share: tuple[int, int]) -> Iterator[Predictions]:
            for batch in responses(done, share):
                yield [scored_row(example, found, score) for example, found in batch]

        add_retrieval(model, encoder, examples, s, record)  # before generating, so that an error loses nothing
        return predictions.collect(path, with_weights(identity, name), s.overwrite, len(examples), rows)


def add_retrieval(
    model: Any, encoder: Encoder, examples: list[Example], s: EvaluationSettings, record: dict[str, Any]
) -> None:
    """Adds `retrieval` to the main process's record: see `embeddings.retrieval`. The processes share the views.

    A note says why if the model has none, or the views cannot be embedded.
    """
    from llm_jepa.evaluation import embeddings

    state, parts = PartialState(), []
    sizes = {"tokens_per_batch": s.tokens_per_batch or TOKENS_PER_BATCH}
    try:
        with agreed():
            if s.engine == "vllm" or find_task(s.task).choices:
                raise UsageError(f"--task {s.task} with --engine {s.engine} gives no hidden states of the views")
            views = embeddings.encode_views(model, encoder, examples, Problems(s.skip_bad_examples))[1]
            share = (state.process_index, state.num_processes)
            with layer_states(model, encoder.renderer.tokenizer.pad_token_id, -1) as read:
                parts = list(embeddings.embed_batches(embeddings.by_side(views), read, share=share, **sizes))
    except UsageError as error:
        add_notes(record, [f"no retrieval: {first_line(error)}"])
        return
    parts = gather_object(parts)
    if state.is_main_process:
        text, code = embeddings.in_order(parts).double().chunk(2)
        record["retrieval"] = embeddings.retrieval(text.numpy(), code.numpy())


# ---------------------------------------------------------------------------------------------------------- score


def score_file(path: str, examples: list[Example], s: EvaluationSettings) -> Predictions:
    """Scores predictions made elsewhere. Raises UsageError if their ids are not those of the examples."""
    given, ids = {row["id"]: row for row in predictions.read(Path(path))}, {e.id for e in examples}
    for wrong, what in ((ids - given.keys(), "without a prediction"), (given.keys() - ids, "without an example")):
        if wrong:
            raise UsageError(f"--score_only {path}: {len(wrong)} ids {what} in {s.input_file}: {min(wrong)} …")
    responses = {i: Generation(row["prediction"], row.get("stop_reason")) for i, row in given.items()}
    with scorer(s.task, s.spider_path, examples, s.allow_code_execution) as score:
        return [scored_row(example, responses[example.id], score) for example in tqdm(examples, unit="example")]


def check_gold(examples: list[Example], s: EvaluationSettings) -> None:
    """Prints the scores of the data's own answers. Raises UsageError if less than MIN_GOLD_SCORE of them are right."""
    with scorer(s.task, s.spider_path, examples, s.allow_code_execution) as score:
        rows = [scored_row(e, Generation(e.assistant, None), score) for e in examples]
    metrics = summarize(rows, s.task)
    print(score_table(metrics))
    if metrics[metrics["score"]] < MIN_GOLD_SCORE:
        share = f"only {100 * metrics[metrics['score']]:.1f} % of its own answers are right by {metrics['score']}"
        raise UsageError(f"{s.input_file}: {share}: it does not belong to --task {s.task} or these databases")


# ------------------------------------------------------------------------------------------------- write and main


def report_skipped(problems: Problems, record: dict[str, Any]) -> None:
    """Counts and prints the examples that were skipped."""
    record["skipped_examples"] = len(problems.found)
    if problems.report():
        print(problems.report(), file=sys.stderr)


def evaluate_predictions(
    s: EvaluationSettings, examples: list[Example], identity: dict[str, Any], record: dict[str, Any], problems: Problems
) -> None:
    """Gets predictions from models or a file, writes them and their metrics, and prints the scores."""
    path, untuned = Path(s.output_file), None
    untuned_path = path.with_name("untuned") / path.name
    base, others = dataclasses.replace(s, original_model_name=None), Problems(s.skip_bad_examples)
    if s.split_tune_untune:
        with agreed():  # before the other model generates
            predictions.check_resumable(untuned_path, with_weights(identity, s.original_model_name), s.overwrite)
            encode(*load(s.original_model_name, base), examples, base, others)
    if s.score_only:
        rows = score_file(s.score_only, examples, s)
        predictions.begin_output(path, identity | {"predictions_sha256": sha256(s.score_only)}, s.overwrite)
        rows = predictions.write(path, rows)
    else:
        rows = predict(s.model_name, examples, s, path, identity, record, problems)
    if s.split_tune_untune:
        own = record | {"notes": []}
        untuned = predict(s.original_model_name, examples, base, untuned_path, identity, own, others)
    if not PartialState().is_main_process:
        return
    report_skipped(problems, record)
    metrics = summarize(rows, s.task, s.startswith)
    print(score_table(metrics))
    if "retrieval" in record:
        print(f"\n{retrieval_table(record['retrieval'])}")
    if untuned:
        right = {row["id"] for row in untuned if row[metrics["score"]] == 1}
        parts = {"right": [r for r in rows if r["id"] in right], "wrong": [r for r in rows if r["id"] not in right]}
        found = {name: summarize(part, s.task, s.startswith) for name, part in parts.items() if part}
        metrics["untuned"] = summarize(untuned, s.task, s.startswith) | {"retrieval": own.get("retrieval")}
        metrics["by_untuned"] = {name: found.get(name) for name in parts}
        for name, scores in found.items():
            print(f"\nexamples the untuned model got {name}: " + score_table(scores))
    write_json(path.with_name("metrics.json"), metrics | record)
    print(f"evaluate.py: written: {path}, metrics.json", file=sys.stderr)
    for file in (path, untuned_path):
        predictions.settings_file(file).unlink(missing_ok=True)


def evaluate_embeddings(
    s: EvaluationSettings, examples: list[Example], record: dict[str, Any], problems: Problems
) -> None:
    """Embeds the views, writes the requested files and prints the figures. Raises UsageError if a file exists."""
    from llm_jepa.evaluation import embeddings

    drawing = Path(s.output_file).with_name(f"t_sne_{s.t_sne_type}.png") if s.t_sne else None
    figures, vectors = (Path(p) if p else None for p in (s.similarity and s.output_file, s.export_embeddings))
    for path in (drawing, drawing and drawing.with_suffix(".json"), figures, vectors):
        if path and path.exists() and not s.overwrite:
            raise UsageError(f"{path} exists; give --overwrite")
        if path:
            predictions.check_place(path)
    model, encoder = load(s.model_name, s)
    examples, views = embeddings.encode_views(model, encoder, examples, problems)
    if drawing:  # raises before anything is computed
        embeddings.t_sne_groups(s.t_sne_type, *torch.empty(2, len(examples), 1), examples)
    report_skipped(problems, record)
    sizes = {"batch_size": s.batch_size, "tokens_per_batch": s.tokens_per_batch}
    pad_id = encoder.renderer.tokenizer.pad_token_id
    with layer_states(model, pad_id, s.embedding_layer) as read:
        text, code = embeddings.embed(views, read, pooling=s.embedding_pooling, **sizes)  # (P, D) each
    origin = {"model": s.model_name, "layer": s.embedding_layer, "pooling": s.embedding_pooling}
    if vectors:
        ids = [example.id for example in examples]
        embeddings.export(vectors, text, code, ids, origin | {"data_sha256": record["data_sha256"]})
        print(vectors)
    if figures:
        measured = embeddings.similarity(text, code, seed=42)
        figures.parent.mkdir(parents=True, exist_ok=True)
        write_json(figures, origin | measured | record)
        print("\n".join(f"{k:34}{v:.6g}" for k, v in measured.items() if isinstance(v, (int, float))))
        print(f"\n{retrieval_table(measured)}")
    if drawing:  # last, because it raises for data that cannot be drawn
        groups = embeddings.t_sne_groups(s.t_sne_type, text, code, examples)
        embeddings.t_sne(drawing, groups, seed=42, title=f"{Path(s.model_name).name}, {dataset_name(s.input_file)}")
        print(drawing)


def evaluate(s: EvaluationSettings) -> None:
    """Runs an evaluation with checked settings in this process."""
    problems = Problems(s.skip_bad_examples)
    with agreed():
        file = examples = read_examples(s.input_file, problems, s.fields)
        checksum = data_sha256(s.input_file, s.fields)
        share, seed = s.process_split and run_split(s.model_name, checksum) or (0.2, 42)
        share, seed = share if s.test_size is None else s.test_size, seed if s.split_seed is None else s.split_seed
        s = dataclasses.replace(s, test_size=share, split_seed=seed)
        if s.process_split:
            examples = split_examples(examples, share, seed)[s.process_split == "test"]
        examples = [e for e in examples if (e.pair if s.embeds else e.has_chat)][: s.max_examples or None]
        if not examples:
            raise UsageError(f"{s.input_file}: no example has {'a pair of views' if s.embeds else 'a chat'}")
        settings = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("overwrite", "config")}
        identity = {"settings": settings, "data_sha256": checksum}
        if s.task and (databases := databases_of(s.task, s.spider_path)):
            identity["databases_sha256"] = folder_sha256(databases)
        if is_task_file(s.task):
            identity["task_sha256"] = sha256(s.task)
        if s.output_file and not s.embeds:
            predictions.check_free(Path(s.output_file), s.overwrite)
        record, notes = provenance({}) | identity | {"notes": []}, notes_on(s, examples, file, checksum)
        record["versions"] |= vllm_engine.versions() if s.engine == "vllm" else {}
    add_notes(record, notes)
    if s.embeds:
        with write_errors(s.output_file or s.export_embeddings):
            evaluate_embeddings(s, examples, record, problems)
    elif s.score_gold:
        report_skipped(problems, record)
        check_gold(examples, s)
    else:
        evaluate_predictions(s, examples, identity, record, problems)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 scored, 1 failed, 2 wrong usage or data, 130 interrupted."""
    settings, _ = parse_flags(EvaluationSettings, __doc__, argv)
    resumes = settings.model_name and not settings.embeds
    hint = "; the same command without --overwrite resumes" if resumes else ""
    check = partial(check_evaluation_settings, settings)
    # gloo for GPUs too: only Python objects are exchanged. The timeout bounds how long one batch may take.
    group = {"backend": "gloo", "timeout": timedelta(days=7)}
    return run_script("evaluate.py", lambda state: evaluate(check(state.num_processes)), hint, **group)


if __name__ == "__main__":
    gc.freeze()  # otherwise each collection examines all imported modules
    sys.exit(main())
