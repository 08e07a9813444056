"""Answers rows with a model and scores the answers, or says how the model embeds their views.

    python evaluate.py --model_name runs/RUN --input_file datasets/synth_test.jsonl
    python evaluate.py --score_only predictions.jsonl --input_file datasets/synth_test.jsonl
    torchrun --nproc_per_node 8 evaluate.py --model_name runs/RUN --input_file datasets/synth_test.jsonl
    python evaluate.py --similarity --t_sne --model_name runs/RUN --input_file datasets/synth_test.jsonl

Writes predictions.jsonl as it goes and metrics.json beside it; an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import BitsAndBytesConfig, set_seed
from transformers.utils import logging as transformers_logging

from finetune import Collator, LMHeadSelector
from llm_jepa.cli import Refusals, UsageError, first_line, flag, parse_flags
from llm_jepa.data.examples import (
    Example,
    ExampleError,
    Fields,
    Problems,
    data_sha256,
    dataset_name,
    read_examples,
    split_examples,
)
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder, Item
from llm_jepa.evaluation import vllm_engine
from llm_jepa.evaluation.generation import (
    Generation,
    choose,
    encode_choices,
    float32_logits,
    generate,
    stop_ids,
    tokenise,
)
from llm_jepa.evaluation.predictions import (
    agreed,
    begin_output,
    check_free,
    collect,
    owner,
    processes,
    read_rows,
    write_rows,
)
from llm_jepa.files import folder_sha256, read_json, sha256, write_json
from llm_jepa.model import LOADING_ERRORS, check_name, load_pretrained, load_tokenizer
from llm_jepa.run_folder import provenance
from llm_jepa.scoring.tasks import TASKS, Scorer, score_text, wilson
from llm_jepa.training.checks import on_device

HERE = Path(__file__).resolve().parent
GOLD_RIGHT = 0.9  # of the rows' own answers must count as right: published sets have a few that fail
MODEL, DATA, GENERATION, EMBEDDING, OUTPUT = "Model", "Data", "Generation", "Embeddings", "Output"


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
    load_in_8bit: bool = flag(False, "weights in 8 bits (needs the package bitsandbytes)", MODEL)
    load_in_4bit: bool = flag(False, "weights in 4 bits (needs the package bitsandbytes)", MODEL)
    device_map: str | None = flag(None, "spread the model over devices (auto, balanced …) instead of one", MODEL)
    engine: Literal["transformers", "vllm"] = flag(
        "transformers", "what generates; vllm: in an environment of its own, made by setup.sh --vllm", MODEL
    )
    tensor_parallel_size: int = flag(1, "--engine vllm: GPUs that share the model's layers", MODEL)

    input_file: str | None = flag(
        None,
        "rows to answer: a file, or with the fields named a hub dataset OWNER/NAME[:CONFIG]:SPLIT[@REVISION]",
        DATA,
    )
    text_field: str | None = flag(None, "field of the Text view, in JSONL, CSV, Parquet or hub rows of any kind", DATA)
    code_field: str | None = flag(None, "field of the Code view in such rows", DATA)
    system: str | None = flag(None, "system turn of such rows; default: none", DATA)
    task: str | None = flag(None, f"how to score ({', '.join(TASKS)}); default: told by the file's base name", DATA)
    spider_path: str = flag("spider_data.zip", "task spider: folder or zip of Spider, with its databases", DATA)
    nosplit_data: bool = flag(False, "use the whole file, also one that the run was trained on a part of", DATA)
    process_split: Literal["train", "test"] | None = flag(
        None, "use one part of a file that finetune.py took as --data_file", DATA
    )
    test_size: float = flag(0.2, "--process_split: share of the test part (--eval_split of finetune.py)", DATA)
    split_seed: int = flag(42, "--process_split: seed of the split", DATA)
    max_examples: int = flag(0, "use the first N rows; 0: all", DATA)
    skip_bad_examples: bool = flag(False, "leave bad examples out, count and report them", DATA)

    batch_size: int = flag(64, "prompts answered at a time", GENERATION)
    tokens_per_batch: int = flag(
        0,
        "instead: as many prompts at a time as, padded, have so many tokens, at least one; 0: --batch_size",
        GENERATION,
    )
    max_new_tokens: int = flag(128, "longest answer in tokens; -1: up to the model's context", GENERATION)
    plain: bool = flag(False, "no chat format: user<|perception|>", GENERATION)
    startswith: bool = flag(False, "startswith is the headline score instead of exact", GENERATION, "--statswith")

    similarity: bool = flag(False, "embed the views and measure how near they are; answers nothing", EMBEDDING)
    t_sne: bool = flag(False, "embed the views and draw them in two dimensions", EMBEDDING)
    t_sne_type: Literal["in_n_out", "paraphrase", "rotten_tomatoes"] = flag(
        "in_n_out",
        "what --t_sne tells apart: Text and Code views, the Text views of the ten largest sets of paraphrases, or the "
        "Text views by their answer's class",
        EMBEDDING,
    )
    export_embeddings: str | None = flag(None, "embed the views and write them to this safetensors file", EMBEDDING)
    embedding_layer: int = flag(
        -1, "hidden states to read: 0 the embedding layer … -1 the last, behind the norm", EMBEDDING
    )
    embedding_pooling: Literal["last", "mean", "cls"] = flag(
        "last", "last: the view token, as in training; mean: of all tokens; cls: the first", EMBEDDING
    )

    output_file: str | None = flag(
        None, "predictions, or figures of --similarity; default RUN/eval/<dataset>/predictions.jsonl", OUTPUT
    )
    overwrite: bool = flag(False, "replace existing predictions", OUTPUT)
    score_only: str | None = flag(None, "score this file (JSON objects, one a line: id, prediction), no model", OUTPUT)
    score_gold: bool = flag(False, "score the rows' own answers, no model; writes nothing", OUTPUT)
    split_tune_untune: bool = flag(
        False, "also answer with --original_model_name; scores apart for rows it got right and wrong", OUTPUT
    )

    @property
    def fields(self) -> Fields | None:
        """Where the rows have their views, None for rows in the project's own format."""
        return Fields(self.text_field, self.code_field, self.system) if self.text_field else None

    @property
    def embeds(self) -> bool:
        """Whether views are embedded instead of rows answered."""
        return self.similarity or self.t_sne or self.export_embeddings is not None


SINGLE = "device_map score_only score_gold similarity t_sne export_embeddings"  # flags of a single process
ANSWERING = "task spider_path max_new_tokens startswith split_tune_untune"  # flags that embedding has not
LOADING = ("model_name original_model_name revision dtype attn_implementation load_in_8bit load_in_4bit device_map "
           "engine tensor_parallel_size batch_size tokens_per_batch max_new_tokens plain split_tune_untune similarity "
           "t_sne export_embeddings")  # fmt: skip
NOT_VLLM = ("attn_implementation load_in_8bit load_in_4bit device_map batch_size tokens_per_batch similarity t_sne "
            "export_embeddings")  # fmt: skip


def check_settings(s: Settings, given: set[str], processes: int = 1) -> Settings:
    """Resolves task and output file. Raises UsageError naming every wrong or inapplicable flag at once."""
    r = Refusals(given)
    r.refuse(not s.input_file, "--input_file is missing")
    r.refuse(
        bool(s.model_name) + bool(s.score_only) + s.score_gold != 1,
        "give one of --model_name, --score_only and --score_gold",
    )
    r.only_if(not s.score_only, LOADING, "not with --score_only, which uses no model")
    r.only_if(not s.score_gold, LOADING + " output_file overwrite", "not with --score_gold, which writes nothing")
    r.only_if(processes == 1, SINGLE, "not under torchrun, whose processes share out rows to answer")
    vllm = s.engine == "vllm"
    r.refuse(vllm and processes > 1, "--engine vllm: not under torchrun; several GPUs by --tensor_parallel_size")
    r.only_if(not vllm, NOT_VLLM, "not with --engine vllm")
    r.only_if(vllm, "tensor_parallel_size", "only with --engine vllm")
    r.refuse(s.tensor_parallel_size < 1, f"--tensor_parallel_size {s.tensor_parallel_size} is not positive")
    r.refuse(s.load_in_8bit and s.load_in_4bit, "give one of --load_in_8bit and --load_in_4bit")
    missing = (s.load_in_8bit or s.load_in_4bit) and importlib.util.find_spec("bitsandbytes") is None
    r.refuse(missing, f"--load_in_{8 if s.load_in_8bit else 4}bit: install the package bitsandbytes first")
    r.refuse(s.nosplit_data and bool(s.process_split), "--nosplit_data: not with --process_split")
    r.only_if(bool(s.process_split), "test_size split_seed", "only with --process_split")
    r.refuse(not 0 < s.test_size < 1, f"--test_size {s.test_size} is not between 0 and 1")
    r.refuse(bool(s.text_field) != bool(s.code_field), "give --text_field and --code_field together")
    r.only_if(bool(s.text_field), "system", "only with --text_field and --code_field")
    here = Path(s.model_name or "-")
    whole = here.is_dir() and not (here / "adapter_config.json").is_file() and not s.original_model_name
    r.only_if(not whole, "revision", "only with a model of the hub")
    r.refuse(s.split_tune_untune and not s.original_model_name, "--split_tune_untune: only with --original_model_name")
    r.only_if(not s.embeds, ANSWERING, "not with --similarity, --t_sne, --export_embeddings")
    r.only_if(s.embeds, "embedding_layer embedding_pooling", "only with --similarity, --t_sne or --export_embeddings")
    r.only_if(s.t_sne, "t_sne_type", "only with --t_sne")
    r.only_if(s.similarity or s.t_sne or not s.embeds, "output_file", "not with --export_embeddings alone")
    r.refuse({"batch_size", "tokens_per_batch"} <= given, "give one of --batch_size and --tokens_per_batch")
    r.refuse(s.batch_size < 1, f"--batch_size {s.batch_size} is not positive")
    r.refuse(s.tokens_per_batch < 0, f"--tokens_per_batch {s.tokens_per_batch} is negative")
    wrong_length = s.max_new_tokens < 1 and s.max_new_tokens != -1
    r.refuse(wrong_length, f"--max_new_tokens {s.max_new_tokens} is neither positive nor -1")
    r.refuse(s.max_examples < 0, f"--max_examples {s.max_examples} is negative")
    for flag_ in ("model_name", "original_model_name"):
        try:
            if name := getattr(s, flag_):
                check_name(name, flag_)
        except UsageError as error:
            r.append(str(error))
    named = dataset_name(s.input_file or "")
    task = s.task or (named if named != "text" else None)  # which says nothing of how to score
    if s.task not in (None, *TASKS):
        r.append(f"--task {s.task} is not one of {', '.join(TASKS)}")
    elif s.input_file and not s.embeds and task not in TASKS:
        known = ", ".join(TASKS)
        r.append(f"--task: {s.input_file} does not name its task; give one of {known}; text is for rows of your own")
    elif task in TASKS:
        r.only_if(TASKS[task].needs_databases, "spider_path", f"not with task {task}")
        r.only_if(not TASKS[task].choices, "max_new_tokens", f"task {task} generates nothing")
        likelihoods = vllm and TASKS[task].choices and not s.embeds
        r.refuse(bool(likelihoods), f"--engine vllm: task {task} compares likelihoods; give --engine transformers")
    output = check_output(s, r)
    if r:
        raise UsageError("\n".join(r))
    return dataclasses.replace(s, task=None if s.embeds else task, output_file=output)


def check_output(s: Settings, r: Refusals) -> str | None:
    """Where results go, None with --score_gold; adds to `r` what is wrong with it."""
    output = s.output_file
    file = "similarity.json" if s.embeds else "predictions.jsonl"
    if not output and s.score_only:
        output = str(Path(s.score_only).with_suffix(".scored.jsonl"))
    elif not output and s.model_name and (Path(s.model_name) / "run.json").is_file():
        output = str(Path(s.model_name) / "eval" / dataset_name(s.input_file or "") / file)
    needed = bool(s.model_name) and (s.similarity or s.t_sne or not s.embeds)
    missing = f"--output_file is missing: {s.model_name} is no run folder, which has a place of its own for it"
    r.refuse(needed and not output, missing)
    read = {Path(p).resolve() for p in (s.input_file, s.score_only) if p}
    for flag_, path in (("output_file", output), ("export_embeddings", s.export_embeddings)):
        r.refuse(bool(path) and Path(path).resolve() in read, f"--{flag_} {path} is also read")
    if output:
        same = bool(s.export_embeddings) and Path(s.export_embeddings).resolve() == Path(output).resolve()
        r.refuse(same, f"--export_embeddings {output}: --output_file is the same file")
        taken = Path(output).name == "metrics.json"
        r.refuse(taken, f"--output_file {output}: metrics.json is the name of the file beside it")
    return output


# ----------------------------------------------------------------------------------------------------------- load


def run_folder(name: str) -> Path | None:
    """The run folder that a model folder is or, merged, belongs to; None for any other model."""
    folder = Path(name)
    folder = folder.parent if folder.name == "merged" else folder
    return folder if (folder / "run.json").is_file() else None


def check_run(name: str, s: Settings) -> dict[str, Any]:
    """The settings that a run was trained with, none for any other model.

    Raises UsageError for an unfinished run, or one trained in another format or on another split.
    """
    run = run_folder(name)
    if run is None:
        return {}
    record, trained = read_json(run / "run.json"), read_json(run / "args.json")
    status = record.get("status")
    if status != "finished":
        how = "train it to its end by its own command and --resume"
        raise UsageError(f"--model_name {name}: the run is {status}, not finished; {how}")
    if trained["plain"] != s.plain:
        raise UsageError(f"--model_name {name} was trained with{'' if trained['plain'] else 'out'} --plain")
    split = (trained["eval_split"], trained["split_seed"])
    if s.process_split and trained["data_file"] and split != (s.test_size, s.split_seed):
        raise UsageError(f"--model_name {name} was split by --test_size {split[0]} --split_seed {split[1]}")
    whole = bool(trained["data_file"] and s.input_file) and not (s.process_split or s.nosplit_data)
    if whole and data_sha256(s.input_file) in record.get("data_sha256", {}).values():
        raise UsageError(
            f"--model_name {name} was trained on a part of {s.input_file}: give --process_split test, "
            "or --nosplit_data for all of its rows"
        )
    turn = trained["system"]
    if s.fields and trained.get("text_field") and turn != s.system and not s.plain:
        how = "without a system turn; leave out --system" if turn is None else f"with --system {shlex.quote(turn)}"
        raise UsageError(f"--model_name {name} was trained on rows {how}")
    return trained


def notes_on(s: Settings, examples: list[Example], checksum: str) -> list[str]:
    """What a reader of the scores must know of how these rows stand to those that the run was trained on."""
    run = run_folder(s.model_name) if s.model_name else None
    if run is None or not examples:
        return []
    record, trained, notes = read_json(run / "run.json"), read_json(run / "args.json"), []
    own = record.get("data_sha256", {}).get(trained.get("train_file"))
    if own == checksum:
        notes.append(f"{s.input_file} has the rows that the run was trained on")
    turn, turns = record.get("system_turn", ...), {example.system for example in examples}
    if turn is not ... and turns != {turn} and not s.plain:  # which renders none
        notes.append(f"the rows' system turn is not the one that the run was trained with ({turn!r})")
    return notes


def load_encoder(name: str, s: Settings, base: str) -> Encoder:
    """Encodes a model's prompts and views as in its training; `base` has the tokenizer of an adapter without one.

    Raises UsageError for an unfinished run or a run trained in another format.
    """
    folder, trained = Path(name), check_run(name, s)
    has_tokenizer = (folder / "tokenizer_config.json").is_file() or not folder.is_dir()
    source = name if has_tokenizer else s.original_model_name or base
    tokenizer = load_tokenizer(source, s.revision, plain=s.plain, predictors=False)
    views = trained if s.embeds else {}
    renderer = Renderer(
        tokenizer, plain=s.plain, predictors=views.get("predictors", 0), front_pred=views.get("front_pred", False),
        reverse_pred=views.get("reverse_pred", False),
    )  # fmt: skip
    labels = "answer_text" if s.task and TASKS[s.task].choices else "answer"
    return Encoder(
        renderer, labels, max_length=sys.maxsize, last_token=views.get("last_token"),
        text_view=views.get("text_view", "alone"),
    )  # fmt: skip


def load(name: str, s: Settings) -> tuple[Any, Encoder]:
    """The model, on its device and in evaluation mode, and its encoder.

    Raises UsageError as load_encoder does, or for a model that cannot be loaded.
    """
    folder, base = Path(name), name
    adapter = (folder / "adapter_config.json").is_file()
    if adapter:
        base = s.original_model_name or read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    encoder = load_encoder(name, s, base)
    tokenizer, (options, device) = encoder.renderer.tokenizer, load_options(s)
    set_seed(42)  # rows of tokens that a model lacks (--plain) are drawn at random
    try:
        if adapter and s.revision is None:
            options["revision"] = read_json(folder / "adapter_config.json").get("revision")
        model = load_pretrained(base, **options)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name)
    except LOADING_ERRORS as error:
        raise UsageError(f"--model_name {name} cannot be loaded: {first_line(error)}") from None
    return (model if "device_map" in options else model.to(device)).eval(), encoder


def describe(name: str, s: Settings) -> tuple[Any, Encoder]:
    """As `load`, with what the model's configuration tells in place of its weights, which vLLM loads."""
    vllm_engine.check_whole(name)
    encoder = load_encoder(name, s, name)
    dtype = str(load_options(s)[0]["dtype"])
    return vllm_engine.Described.read(name, s.revision, dtype, encoder.renderer), encoder


def load_options(s: Settings) -> tuple[dict[str, Any], str]:
    """(arguments of from_pretrained, the device of a model without a device map)."""
    cuda = torch.cuda.is_available()
    auto = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    options: dict[str, Any] = {"dtype": auto if s.dtype == "auto" else getattr(torch, s.dtype), "revision": s.revision}
    if s.attn_implementation:
        options["attn_implementation"] = s.attn_implementation
    device = "cuda" if cuda else "cpu"
    if s.load_in_8bit or s.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=s.load_in_8bit, load_in_4bit=s.load_in_4bit, bnb_4bit_compute_dtype=options["dtype"]
        )
    if s.device_map or "quantization_config" in options:  # quantised weights are made where they stay
        options["device_map"] = s.device_map or device
    return options, device


# ---------------------------------------------------------------------------------------------------------- score


def scored_row(example: Example, answer: Generation, score: Scorer) -> dict[str, Any]:
    """One line of predictions.jsonl; `id` is the row's line number in the input file, counted from 1."""
    row = {"id": example.id, "prediction": answer.text, "stop_reason": answer.stop_reason}
    if answer.log_likelihoods:
        row["log_likelihoods"] = answer.log_likelihoods
    return row | score_text(answer.text, example.assistant) | score(answer.text, example)


def databases_of(s: Settings) -> Path | None:
    """The folder of Spider's databases, None for a task without. Raises UsageError where there are none."""
    if not TASKS[s.task].needs_databases:
        return None
    from llm_jepa.scoring.sql import spider_databases

    path = Path(s.spider_path)
    here = path if path.exists() or path.is_absolute() else HERE / path
    return spider_databases(here, HERE / "datasets" / "spider_databases")


@contextlib.contextmanager
def scorer(s: Settings, examples: list[Example]) -> Iterator[Scorer]:
    """Opens what the task needs to score. Raises ExampleError for an example that names no database there is."""
    with TASKS[s.task].start(databases_of(s)) as score:
        if TASKS[s.task].needs_databases:
            for example in examples:
                score.database(example)
        yield score


def summarise(rows: list[dict[str, Any]], s: Settings) -> dict[str, Any]:
    """Each score as a fraction of n, with its 95 % Wilson interval under `ci95`; `failures` counted by reason."""
    own = TASKS[s.task].scores
    names = [*own, "exact", "startswith"]
    hits = {name: sum(row[name] for row in rows) for name in names}
    if all(row["stop_reason"] is not None for row in rows):
        hits["stop_rate"] = sum(row["stop_reason"] == "stop" for row in rows)
    n = len(rows)
    return {
        "task": s.task,
        "n": n,
        "score": "startswith" if s.startswith else names[0],
        **{name: hits[name] / n if name in hits else None for name in (*names, "stop_rate")},
        "scores": list(own),
        "ci95": {name: wilson(count, n) for name, count in hits.items()},
        "failures": dict(Counter(row["failure"] for row in rows if "failure" in row).most_common()),
    }


def table(metrics: dict[str, Any]) -> str:
    """A short table: each score in percent with its interval, the headline score first."""
    names = [metrics["score"], *[n for n in (*metrics["scores"], "exact", "startswith", "stop_rate")]]
    lines = [f"{metrics['task']}, n = {metrics['n']}", f"{'':18}{'%':>7}  95 % interval"]
    for name in dict.fromkeys(names):
        if metrics[name] is not None:
            low, high = (100 * x for x in metrics["ci95"][name])
            lines.append(f"{name:18}{100 * metrics[name]:7.2f}  [{low:.2f}, {high:.2f}]")
    if metrics["failures"]:
        lines.append("without a result: " + ", ".join(f"{n} {reason}" for reason, n in metrics["failures"].items()))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ run


@contextlib.contextmanager
def label_logits(model: Any, pad_id: int) -> Iterator[Callable[[list[Item]], torch.Tensor]]:
    """A function of items: the logits (N, V) at their labels."""
    collator = Collator("separate", pad_id, sys.maxsize)
    with float32_logits(model), contextlib.closing(LMHeadSelector(model)) as selector:
        yield lambda items: selector.read(model, on_device(collator(items), model.device)).logits


def answer(
    name: str, examples: list[Example], s: Settings, path: Path, identity: dict[str, Any], problems: Problems
) -> list[dict[str, Any]]:
    """Answers all examples with a model, writing each batch as it comes; returns the rows in the order of ids.

    Of several processes each answers its share of the batches, and the main process returns the rows of all.
    """
    with contextlib.ExitStack() as stack:
        with agreed():  # whatever is wrong with the examples is refused before anything is replaced
            choices, vllm = TASKS[s.task].choices, s.engine == "vllm"
            model, encoder = (describe if vllm else load)(name, s)
            renderer = encoder.renderer
            if choices:
                examples, encoded = encode_choices(model, encoder, examples, choices, problems)
                read = stack.enter_context(label_logits(model, renderer.tokenizer.pad_token_id))
                answers = partial(
                    choose, read, examples, encoded, choices, s.batch_size, tokens_per_batch=s.tokens_per_batch
                )
            else:
                examples, prompts = tokenise(model, renderer, examples, problems)
                stop_ids(model, renderer)
                answers = partial(generate, model, renderer, examples, s.batch_size, s.max_new_tokens, prompts=prompts,
                                  tokens_per_batch=s.tokens_per_batch)  # fmt: skip
            if not examples:
                raise ExampleError("no usable example is left: " + "; ".join(problems.messages[:3]))
            score = stack.enter_context(scorer(s, examples))
            if vllm:
                answers = stack.enter_context(vllm_engine.started(model, renderer, examples, prompts, s))

        def scored(done: set[int], share: tuple[int, int]) -> Iterator[list[dict[str, Any]]]:
            for batch in answers(done=done, share=share):
                yield [scored_row(example, answer, score) for example, answer in batch]

        return collect(path, identity, s.overwrite, len(examples), scored)


def score_file(examples: list[Example], s: Settings) -> list[dict[str, Any]]:
    """Scores predictions made elsewhere. Raises UsageError where they are not those of the input file's rows."""
    given = {row["id"]: row for row in read_rows(Path(s.score_only))}
    wanted = {e.id for e in examples}
    for ids, what in ((wanted - given.keys(), "has no prediction for"), (given.keys() - wanted, "has predictions for")):
        if ids:
            shown = ", ".join(map(str, sorted(ids)[:5])) + (" …" if len(ids) > 5 else "")
            tail = "" if "no" in what.split() else f", which {s.input_file} does not have"
            raise UsageError(f"--score_only {s.score_only} {what} {len(ids)} rows (ids {shown}){tail}")
    answers = [Generation(given[e.id]["prediction"], given[e.id].get("stop_reason")) for e in examples]
    with scorer(s, examples) as score:
        return [scored_row(e, a, score) for e, a in zip(examples, tqdm(answers, unit="row"), strict=True)]


def check_gold(metrics: dict[str, Any], s: Settings) -> None:
    """Prints how the rows' own answers score. Raises UsageError where too many of them count as wrong."""
    print(table(metrics))
    headline = (*metrics["scores"], "exact")[0]
    if metrics[headline] < GOLD_RIGHT:
        raise UsageError(
            f"{s.input_file}: only {100 * metrics[headline]:.1f} % of its own answers are right by {headline}: "
            "the rows do not belong to this task or these databases"
        )


def load_rows(s: Settings, problems: Problems) -> list[Example]:
    """The examples to answer. Raises ExampleError for bad data."""
    examples = read_examples(s.input_file, problems, s.fields)
    if s.process_split:
        examples = split_examples(examples, s.test_size, s.split_seed)[s.process_split == "test"]
    return examples[: s.max_examples or None]


def model_mark(name: str) -> dict[str, Any]:
    """Tells a model folder's weights from other weights of the same name: their sizes and times of change."""
    files = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
    weights = [p for p in files if p.suffix in (".safetensors", ".bin")]
    return {"name": name, "weights": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights]}


def run(s: Settings) -> None:
    """A whole evaluation: answers or reads predictions, scores, writes, prints the table."""
    problems = Problems(s.skip_bad_examples)
    with agreed():
        examples = load_rows(s, problems)
        settings = {k: v for k, v in dataclasses.asdict(s).items() if k != "overwrite"}
        identity = {"settings": settings, "data_sha256": data_sha256(s.input_file)}
        if s.task and (databases := databases_of(s)):
            identity["databases_sha256"] = folder_sha256(databases)
        if s.output_file and not s.embeds:
            check_free(Path(s.output_file), s.overwrite)
        versions = vllm_engine.versions() if s.engine == "vllm" else {}
        notes = notes_on(s, examples, identity["data_sha256"])
    record = provenance({}) | identity | {"notes": notes}
    record["versions"] |= versions
    for note in notes if PartialState().is_main_process else ():
        print(f"evaluate.py: note: {note}", file=sys.stderr)
    if s.embeds:
        return run_embeddings(s, examples, record, problems)
    if s.score_gold:
        with scorer(s, examples) as score:
            rows = [scored_row(e, Generation(e.assistant, None), score) for e in examples]
        if problems.report():
            print(problems.report(), file=sys.stderr)
        return check_gold(summarise(rows, s), s)
    path, marks, untuned = Path(s.output_file), [s.output_file], None
    if s.score_only:
        identity["predictions_sha256"] = sha256(s.score_only) if Path(s.score_only).is_file() else None
        rows = score_file(examples, s)
        begin_output(path, identity, s.overwrite)
        write_rows(path, rows)
    else:
        rows = answer(s.model_name, examples, s, path, identity | {"model": model_mark(s.model_name)}, problems)
    if s.split_tune_untune:
        other = path.with_name("untuned") / path.name
        mark = identity | {"model": model_mark(s.original_model_name)}
        plain = dataclasses.replace(s, original_model_name=None)
        untuned = answer(s.original_model_name, examples, plain, other, mark, Problems(s.skip_bad_examples))
        marks.append(str(other))
    if not PartialState().is_main_process:
        return
    record["skipped_examples"] = len(problems.messages)
    if problems.report():
        print(problems.report(), file=sys.stderr)
    metrics = summarise(rows, s)
    if untuned:
        headline = metrics["score"]
        right = {row["id"] for row in untuned if row[headline]}
        parts = {"right": [r for r in rows if r["id"] in right], "wrong": [r for r in rows if r["id"] not in right]}
        metrics["untuned"] = summarise(untuned, s)
        metrics["by_untuned"] = {k: summarise(part, s) if part else None for k, part in parts.items()}
    if owner(path.with_name("metrics.json")):
        raise UsageError(f"{path.with_name('metrics.json')} was written meanwhile; {path} is whole, but not summarised")
    write_json(path.with_name("metrics.json"), metrics | record)
    for done in marks:
        Path(done + ".settings.json").unlink(missing_ok=True)
    print(table(metrics))
    for part, scores in metrics.get("by_untuned", {}).items():
        if scores:
            print(f"\nrows the untuned model got {part}: " + table(scores))


def run_embeddings(s: Settings, examples: list[Example], record: dict[str, Any], problems: Problems) -> None:
    """Embeds the views, writes what the flags ask for, prints the figures. Refuses to replace files."""
    from llm_jepa.evaluation import embeddings

    drawing = Path(s.output_file).with_name(f"t_sne_{s.t_sne_type}.png") if s.t_sne else None
    figures, vectors = (Path(p) if p else None for p in (s.similarity and s.output_file, s.export_embeddings))
    for path in (drawing, drawing and drawing.with_suffix(".json"), figures, vectors):
        if path and path.exists() and not s.overwrite:
            raise UsageError(f"{path} exists; give --overwrite")
    model, encoder = load(s.model_name, s)
    if s.skip_bad_examples:
        examples = embeddings.usable(model, encoder, examples, problems)
    record["skipped_examples"] = len(problems.messages)
    if problems.report():
        print(problems.report(), file=sys.stderr)
    where = {"model": s.model_name, "layer": s.embedding_layer, "pooling": s.embedding_pooling}
    text, code = embeddings.embed(
        model, encoder, examples, s.batch_size, s.embedding_layer, s.embedding_pooling,
        tokens_per_batch=s.tokens_per_batch,
    )  # fmt: skip
    if vectors:
        ids = [example.id for example in examples]
        embeddings.export(vectors, text, code, ids, where | {"data_sha256": record["data_sha256"]})
        print(vectors)
    if figures:
        measured = embeddings.similarity(text, code, seed=42)
        figures.parent.mkdir(parents=True, exist_ok=True)
        write_json(figures, where | measured | record)
        print("\n".join(f"{k:34}{v:.6g}" for k, v in measured.items() if isinstance(v, (int, float))))
        if measured["least_squares_error"] is None:
            print(f"no least-squares error: it needs more pairs than the {measured['dims']} dimensions")
    if drawing:  # last: what it cannot draw costs nothing else
        groups = embeddings.t_sne_groups(s.t_sne_type, text, code, examples)
        embeddings.t_sne(drawing, groups, seed=42, title=f"{Path(s.model_name).name}, {dataset_name(s.input_file)}")
        print(drawing)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 scored, 1 failed, 2 wrong usage or data, 130 interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    with processes() as state:
        main_process = state.is_main_process  # which alone tells what all processes find
        with contextlib.nullcontext() if main_process else contextlib.redirect_stderr(io.StringIO()):
            settings, given = parse_flags(Settings, __doc__, argv)
        try:
            run(check_settings(settings, given, state.num_processes))
        except (UsageError, ExampleError) as error:
            for line in str(error).splitlines() if main_process else ():
                print(f"evaluate.py: error: {line}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            way = " without --overwrite" if settings.overwrite else ""
            goes_on = settings.model_name and not settings.embeds
            hint = f"; the same command{way} goes on from here" if goes_on else ""
            if main_process:
                print(f"evaluate.py: interrupted{hint}", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
