"""The flags of evaluate.py, and their checks against each other and against the run that is evaluated."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_jepa.cli import Refusals, UsageError, flag
from llm_jepa.data.examples import Example, Fields, data_sha256, dataset_name, files_of, split_examples
from llm_jepa.files import read_json
from llm_jepa.run_folder import CHECKPOINT_MARK, run_settings
from llm_jepa.scoring.tasks import TASK_NAMES, find_task

MODEL, DATA, GENERATION, EMBEDDING, OUTPUT = "Model", "Data", "Generation", "Embeddings", "Output"


@dataclass
class EvaluationSettings:
    """Every flag of evaluate.py."""

    model_name: str | None = flag(None, "run folder, adapter folder, model folder or hub name", MODEL)
    original_model_name: str | None = flag(
        None, "base of an adapter, or with --split_tune_untune the other model", MODEL
    )
    revision: str | None = flag(None, "commit of a hub model", MODEL)
    tokenizer_name: str | None = flag(None, "folder or hub name of the tokenizer; default: that of the model", MODEL)
    chat_template: str | None = flag(None, "file with a Jinja chat template that replaces the tokenizer's", MODEL)
    trust_remote_code: bool = flag(False, "run the Python code that a model's repository contains", MODEL)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "precision of parameters and computation; auto: bfloat16 if the GPU supports it", MODEL
    )
    attn_implementation: str | None = flag(None, "attention kernel of transformers", MODEL)
    load_in_8bit: bool = flag(False, "parameters in 8 bits (needs the package bitsandbytes)", MODEL)
    load_in_4bit: bool = flag(False, "parameters in 4 bits (needs the package bitsandbytes)", MODEL)
    device_map: str | None = flag(None, "distribute the model over devices (auto, balanced …)", MODEL)
    engine: Literal["transformers", "vllm"] = flag(
        "transformers", "program that generates; vllm needs the environment that setup.sh --vllm creates", MODEL
    )
    tensor_parallel_size: int = flag(1, "--engine vllm: GPUs that share the model's layers", MODEL)

    input_file: str | None = flag(
        None, "file, glob or hub dataset OWNER/NAME[:CONFIG]:SPLIT[@REVISION] of examples", DATA
    )
    text_field: str | None = flag(None, "field of the Text view in other JSON, CSV, TSV, Parquet or hub data", DATA)
    code_field: str | None = flag(None, "field of the Code view in such data", DATA)
    view_text_field: str | None = flag(None, "field of the Text view if --text_field is only the user turn", DATA)
    view_code_field: str | None = flag(None, "field of the Code view if --code_field is only the answer", DATA)
    system: str | None = flag(None, "system turn of such data; default: none", DATA)
    task: str | None = flag(None, f"how to score ({TASK_NAMES}); default: by the file's base name", DATA)
    spider_path: str = flag("spider_data.zip", "task spider: folder or zip file of Spider with its databases", DATA)
    allow_code_execution: bool = flag(
        False, "task mbpp: run programs without isolation, with all your rights, if bubblewrap does not work", DATA
    )
    nosplit_data: bool = flag(False, "use the complete file, even if the run was trained on a part of it", DATA)
    process_split: Literal["train", "test"] | None = flag(
        None, "use one part of a file that --data_file or --val_fraction split; test: the held-out part", DATA
    )
    test_size: float | None = flag(None, "--process_split: fraction of test; default: the run's, else 0.2", DATA)
    split_seed: int | None = flag(None, "--process_split: seed of the split; default: the run's, else 42", DATA)
    max_examples: int = flag(0, "use the first N examples; 0: all", DATA)
    skip_bad_examples: bool = flag(False, "skip bad examples, count and report them", DATA)

    batch_size: int = flag(64, "prompts in a batch", GENERATION)
    tokens_per_batch: int = flag(
        0, "batches of this many tokens or fewer, padding included, or one prompt, instead of --batch_size", GENERATION
    )
    max_new_tokens: int | None = flag(
        None, "longest response in tokens; default: 128, more if the data needs more; -1: the context", GENERATION
    )
    plain: bool = flag(False, "no chat format: user<|perception|>", GENERATION)
    unmask_assistant_special_tokens: bool = flag(False, "reference implementation; no effect here", GENERATION)
    startswith: bool = flag(False, "startswith is the primary score instead of the task's", GENERATION, "--statswith")

    similarity: bool = flag(False, "embed the views and measure their similarity, without generating", EMBEDDING)
    t_sne: bool = flag(False, "embed the views and draw them in two dimensions", EMBEDDING)
    t_sne_type: Literal["in_n_out", "paraphrase", "rotten_tomatoes"] = flag(
        "in_n_out",
        "--t_sne: what is drawn in different colors. in_n_out: Text and Code views; paraphrase: the Text views of the "
        "ten largest sets of paraphrases; rotten_tomatoes: the Text views of each class",
        EMBEDDING,
    )
    export_embeddings: str | None = flag(None, "embed the views and write them to this safetensors file", EMBEDDING)
    embedding_layer: int = flag(
        -1, "layer that is read; k: input of the k-th block, 0 the embeddings; -1: input of the output layer", EMBEDDING
    )
    embedding_pooling: Literal["last", "mean", "cls"] = flag(
        "last", "last: the view token, as in training; mean: the mean of all tokens; cls: the first token", EMBEDDING
    )

    output_file: str | None = flag(
        None, "predictions, or results of --similarity; default in RUN/eval/<dataset>/, if the model is a run", OUTPUT
    )
    overwrite: bool = flag(False, "replace existing predictions", OUTPUT)
    score_only: str | None = flag(None, "score this file of predictions (JSON lines with id and prediction)", OUTPUT)
    score_gold: bool = flag(False, "score the data's own answers, without a model; writes nothing", OUTPUT)
    config: str | None = flag(
        None, "YAML file of flags, or a run folder to evaluate as it was trained; flags on the command line win", OUTPUT
    )
    split_tune_untune: bool = flag(
        False, "also evaluate --original_model_name; separate scores for what it got right and wrong", OUTPUT
    )

    @classmethod
    def configured(cls, run: Path) -> dict[str, Any]:
        """The run as the model, with how it reads examples. Raises UsageError if it is no run folder."""
        names = ("text_field", "code_field", "view_text_field", "view_code_field", "system", "plain",
                 "trust_remote_code", "skip_bad_examples")  # fmt: skip
        stored = read_json(run / "args.json")
        return {name: stored[name] for name in names if name in stored} | {"model_name": str(run)}

    @property
    def fields(self) -> Fields | None:
        """The fields of the examples, None for the project's own format."""
        views = (self.view_text_field, self.view_code_field)
        return Fields(self.text_field, self.code_field, self.system, *views) if self.text_field else None

    @property
    def embeds(self) -> bool:
        """Whether views are embedded instead of responses generated."""
        return self.similarity or self.t_sne or self.export_embeddings is not None


SINGLE_PROCESS = "device_map score_only score_gold similarity t_sne export_embeddings"
NEEDS_MODEL = ("plain dtype engine split_tune_untune similarity t_sne export_embeddings revision attn_implementation "
               "load_in_8bit load_in_4bit device_map batch_size tokens_per_batch max_new_tokens "
               "original_model_name tokenizer_name chat_template trust_remote_code")  # fmt: skip
NOT_VLLM = ("attn_implementation load_in_8bit load_in_4bit device_map batch_size tokens_per_batch similarity t_sne "
            "export_embeddings trust_remote_code")  # fmt: skip


def check_evaluation_settings(s: EvaluationSettings, processes: int = 1) -> EvaluationSettings:
    """Resolves task and output file. Raises UsageError naming all wrong or inapplicable flags.

    A flag that has no effect is refused unless it has its default.
    """
    r = Refusals({f.name for f in dataclasses.fields(s) if getattr(s, f.name) != f.default})
    vllm, sources = s.engine == "vllm", bool(s.model_name) + bool(s.score_only) + s.score_gold
    r.refuse(not s.input_file, "--input_file is missing")
    r.refuse(sources != 1, "give one of --model_name, --score_only and --score_gold")
    r.only_if(bool(s.model_name) or sources != 1, NEEDS_MODEL, "only with --model_name")
    r.only_if(not s.score_gold, "output_file overwrite", "not with --score_gold, which writes nothing")
    r.only_if(processes == 1, SINGLE_PROCESS, "not under torchrun")
    r.refuse(vllm and processes > 1, "--engine vllm: not under torchrun; for several GPUs give --tensor_parallel_size")
    r.only_if(not vllm, NOT_VLLM, "not with --engine vllm")
    r.only_if(vllm, "tensor_parallel_size", "only with --engine vllm")
    r.only_if(not s.plain, "chat_template", "not with --plain")
    r.refuse(s.load_in_8bit and s.load_in_4bit, "give one of --load_in_8bit and --load_in_4bit")
    r.refuse(s.nosplit_data and bool(s.process_split), "--nosplit_data: not with --process_split")
    r.only_if(bool(s.process_split), "test_size split_seed", "only with --process_split")
    r.refuse(bool(s.text_field) != bool(s.code_field), "give --text_field and --code_field together")
    r.only_if(bool(s.text_field), "system view_text_field view_code_field", "only with --text_field and --code_field")
    r.refuse(s.split_tune_untune and not s.original_model_name, "--split_tune_untune: only with --original_model_name")
    generating = "task spider_path allow_code_execution max_new_tokens startswith split_tune_untune"
    r.only_if(not s.embeds, generating, "not with --similarity, --t_sne, --export_embeddings")
    r.only_if(s.embeds, "embedding_layer embedding_pooling", "only with --similarity, --t_sne or --export_embeddings")
    r.only_if(s.t_sne, "t_sne_type", "only with --t_sne")
    r.only_if(s.similarity or s.t_sne or not s.embeds, "output_file", "not if --export_embeddings is the only output")
    r.only_if(not s.tokens_per_batch, "batch_size", "not with --tokens_per_batch")
    smallest = {"batch_size": 1, "tensor_parallel_size": 1, "tokens_per_batch": 0, "max_examples": 0, "split_seed": 0}
    for name, least in smallest.items():
        value = getattr(s, name)
        r.refuse(value is not None and value < least, f"--{name} {value} is less than {least}")
    task, output = check_task(s, r), check_output(s, r)
    for name in ("input_file", "score_only"):
        path = Path(getattr(s, name) or "nothing")
        r.refuse(path.exists() and not path.is_file(), f"--{name} {path} is not a regular file")
    if r:
        raise UsageError("\n".join(r))
    from llm_jepa.model import check_name  # imports torch, so after the mistakes that are found without

    for name in ("model_name", "original_model_name"):
        if value := getattr(s, name):
            check_name(value, name)
    return dataclasses.replace(s, task=task, output_file=output, unmask_assistant_special_tokens=False)


def check_task(s: EvaluationSettings, r: Refusals) -> str | None:
    """The task, None with embeddings; adds to `r` what is wrong with it or with the length of responses."""
    wrong_length = s.max_new_tokens is not None and s.max_new_tokens < 1 and s.max_new_tokens != -1
    r.refuse(wrong_length, f"--max_new_tokens {s.max_new_tokens} is neither positive nor -1")
    if s.embeds or not s.input_file:
        return None
    by_name = dataset_name(s.input_file)
    task = s.task or (by_name if by_name != "text" else "")  # a usual name for data of any task
    try:
        found = find_task(task)
    except UsageError as error:
        unknown = f"--task cannot be inferred from the name {s.input_file}; give one of {TASK_NAMES}"
        r.append(str(error) if s.task else unknown)
        return task
    r.only_if(found.needs_databases, "spider_path", f"not with task {task}")
    r.only_if(found.runs_programs, "allow_code_execution", f"not with task {task}")
    if found.choices:
        r.only_if(False, "max_new_tokens", f"task {task} generates nothing")
        r.refuse(s.engine == "vllm", f"--engine vllm: not with task {task}, which compares likelihoods")
    return task


def check_output(s: EvaluationSettings, r: Refusals) -> str | None:
    """Where results go, None with --score_gold; adds to `r` what is wrong with it."""
    output = s.output_file
    if not output and s.score_only:
        output = str(Path(s.score_only).with_suffix(".scored.jsonl"))
    elif not output and s.model_name and (Path(s.model_name) / "run.json").is_file():
        file = "similarity.json" if s.embeds else "predictions.jsonl"
        output = str(Path(s.model_name) / "eval" / dataset_name(s.input_file or "") / file)
    needed = bool(s.model_name) and (s.similarity or s.t_sne or not s.embeds)
    r.refuse(needed and not output, f"--output_file is missing: {s.model_name} is not a run folder, which has one")
    paths = [*files_of(s.input_file or ""), s.score_only, output, s.export_embeddings]
    files = [Path(path).resolve() for path in paths if path]
    twice = "--input_file, --score_only, --output_file and --export_embeddings must be different files"
    r.refuse(len(set(files)) < len(files), twice)
    r.refuse(Path(output or "").name == "metrics.json", f"--output_file {output}: metrics.json is written next to it")
    return output


# ---------------------------------------------------------------------------------------------------------- the run


def run_split(name: str | None, checksum: str) -> tuple[float, int] | None:
    """(fraction, seed) by which a run held out a part of the file with this checksum, or None."""
    record, trained = (name and run_settings(name)) or ({}, {})
    file = trained.get("data_file") or trained.get("train_file")
    share = trained.get("eval_split" if trained.get("data_file") else "val_fraction")
    return (share, trained["split_seed"]) if share and record["data_sha256"].get(file) == checksum else None


def check_run(name: str, s: EvaluationSettings) -> dict[str, Any]:
    """The settings that a run was trained with, {} for any other model; those of its run for a checkpoint.

    Raises UsageError if the run is not finished, or was trained in another format or with another split.
    """
    record, trained = run_settings(name) or ({}, {})
    if not record:
        return {}
    if record["status"] != "finished" and not (Path(name) / CHECKPOINT_MARK).is_file():
        raise UsageError(f"--model_name {name}: the run is {record['status']}, not finished; resume it with --resume")
    if trained["plain"] != s.plain:
        raise UsageError(f"--model_name {name} was trained with{'' if trained['plain'] else 'out'} --plain")
    if s.input_file and (split := run_split(name, data_sha256(s.input_file, s.fields))):  # none in a search
        if s.process_split and split != (s.test_size, s.split_seed):
            raise UsageError(f"--model_name {name} was split by --test_size {split[0]} --split_seed {split[1]}")
        if trained["data_file"] and not (s.process_split or s.nosplit_data):
            how = "give --process_split test, or --nosplit_data for all of its examples"
            raise UsageError(f"--model_name {name} was trained on a part of {s.input_file}: {how}")
    turn = trained["system"]
    if s.fields and trained.get("text_field") and turn != s.system and not s.plain:
        how = "out a system turn; leave out --system" if turn is None else f" --system {shlex.quote(turn)}"
        raise UsageError(f"--model_name {name} was trained with{how}")
    return trained


def notes_on(s: EvaluationSettings, examples: list[Example], file: list[Example], checksum: str) -> list[str]:
    """What a reader of the scores must know about these examples of a file and those that the run was trained on."""
    (record, trained), notes = (s.model_name and run_settings(s.model_name)) or ({}, {}), []
    if record.get("data_sha256", {}).get(trained.get("data_file") or trained.get("train_file")) == checksum:
        split = run_split(s.model_name, checksum)
        known = {example.id for example in (split_examples(file, *split)[0] if split else file)}
        if count := sum(example.id in known for example in examples):
            notes.append(f"the run was trained on {count} of these {len(examples)} examples of {s.input_file}")
    turn = record.get("system_turn", ...)
    if turn is not ... and {example.system for example in examples} != {turn} and not s.plain:
        notes.append(f"the examples' system turn is not the one that the run was trained with ({turn!r})")
    return notes
