"""Exports a run for other programs.

    python -m llm_jepa.export retriever runs/mine mine_retriever     two models for sentence-transformers
    python -m llm_jepa.export lm_eval runs/mine results              results in the format of lm-evaluation-harness
    python -m llm_jepa.export merged runs/mine runs/mine/merged      the model of a LoRA run with its adapter merged in

`retriever` writes OUT/text and OUT/code, which embed texts as the run's Text and Code views.

`lm_eval` writes OUT/MODEL/results_DATE.json and a samples_TASK_DATE.jsonl for each evaluation of the run. RUN can also
be the folder to which evaluate.py wrote metrics.json. DATE is when the last evaluation was finished.

`merged` writes to OUT what `--merge` of the training writes to RUN/merged: model and tokenizer. This project's programs
find the settings of the run, such as its predictor tokens, only if OUT is RUN/merged.
"""

import argparse
import collections
import hashlib
import json
import math
import re
import statistics
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_jepa.cli import FlagParser, UsageError, run_command
from llm_jepa.data.examples import Example, Problems, data_sha256, dataset_name, read_examples, split_examples
from llm_jepa.evaluation.settings import EvaluationSettings
from llm_jepa.files import read_json, read_jsonl, sha256, write_json, write_text
from llm_jepa.reports.results import score_names
from llm_jepa.run_folder import run_settings
from llm_jepa.scoring.tasks import find_task, is_task_file
from llm_jepa.settings import read_settings

# ------------------------------------------------------------------------------------------------------- retriever

SIDES = ("text", "code")
PROMPTS = ("view", "query", "document")  # of encode, encode_query and encode_document
MARK = "\ue010\ue011"  # in no chat template
PROBES = ("a", "lines with 3 words, or more.", "SELECT name FROM t WHERE x > 1;", "(a|b).*[0-9]{2,}", "naïve 你好 🙂")


def view_frames(run: Path, model: Any, encoder: Any, system: str | None) -> list[tuple[str, list[int]]]:
    """(text before the input, tokens after it) of the Text and the Code view; a view ends at its view token.

    A causal model's state at a token does not depend on the tokens after it. Raises UsageError if the views are not of
    this form, or the output layer reads other states than the last hidden ones.
    """
    import torch

    from llm_jepa.evaluation.embeddings import embed_batches, encode_views, in_order
    from llm_jepa.evaluation.model import layer_states

    renderer, tokenizer, frames = encoder.renderer, encoder.renderer.tokenizer, []
    marked = list(renderer.views(Example(None, MARK, MARK, "", 0)))[:: -1 if renderer.reverse_pred else 1]
    if encoder.text_view == "in_chat":
        marked[0] = renderer.chat(Example(system, MARK, "a", "", 0))
    probes = [Example(system, probe, probe, "a probe", 0) for probe in PROBES]
    sides = zip(*encode_views(model, encoder, probes, Problems())[1], strict=True)
    for name, rendered, views in zip(SIDES, marked, sides, strict=True):
        before = rendered.text.partition(MARK)[0]
        ids = [view.ids[: view.view + 1].tolist() for view in views]
        inputs = [tokenizer(before + probe, add_special_tokens=False)["input_ids"] for probe in PROBES]
        after = ids[0][len(inputs[0]) :]
        if [tokens + after for tokens in inputs] != ids:
            raise UsageError(f"{run}: the {name} view is not fixed text, the input and fixed tokens")
        with layer_states(model, tokenizer.pad_token_id, -1) as read, torch.inference_mode():
            want = in_order(embed_batches(views, read, show=False))  # (P, D)
            rows = [model.base_model(torch.tensor([i], device=model.device)).last_hidden_state[0, -1] for i in ids]
        if not torch.allclose(torch.stack(rows).cpu(), want, rtol=1e-4, atol=1e-4):
            raise UsageError(f"{run}: the output layer of {type(model).__name__} does not read the last hidden state")
        frames.append((before, after))
    return frames


def write_encoder(folder: Path, tokenizer: Any, config: Any, before: str, after: list[int]) -> None:
    """Writes what sentence-transformers needs besides the model: prompt, tokenizer with tokens after it, pooling."""
    from llm_jepa.model import context_length

    tokenizer.save_pretrained(folder)
    single, special = [{"Sequence": {"id": "A", "type_id": 0}}], {}
    if after:
        single.append({"SpecialToken": {"id": "after", "type_id": 0}})
        special["after"] = {"id": "after", "ids": after, "tokens": tokenizer.convert_ids_to_tokens(after)}
    template = {"type": "TemplateProcessing", "single": single, "special_tokens": special}
    template["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    own = read_json(folder / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    own = {name: value for name, value in own.items() if name not in ("add_bos_token", "add_eos_token")}
    kind, length = "sentence_transformers.models", context_length(config)
    files = {
        "tokenizer.json": read_json(folder / "tokenizer.json") | {"post_processor": template},
        "tokenizer_config.json": own,
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
                         {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"}],
        "sentence_bert_config.json": {"max_seq_length": length} if length else {},
        "1_Pooling/config.json": {"word_embedding_dimension": config.get_text_config().hidden_size,
                                  "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True},
        "config_sentence_transformers.json": {"prompts": dict.fromkeys(PROMPTS, before), "default_prompt_name": "view",
                                              "similarity_fn_name": "cosine"},
    }  # fmt: skip
    (folder / "1_Pooling").mkdir()
    for name, value in files.items():
        write_json(folder / name, value)


def export_retriever(run: Path, output: Path) -> list[Path]:
    """Writes OUT/text and OUT/code, models of sentence-transformers. Raises UsageError if they cannot be written."""
    folders = [output / side for side in SIDES]
    if found := [folder for folder in folders if folder.exists()]:
        raise UsageError(f"{found[0]} exists; remove it or choose another OUT")
    if (run / "adapter_config.json").is_file():
        raise UsageError(f"{run} is an adapter; merge it first: python -m llm_jepa.export merged {run} {run}/merged")
    from llm_jepa.evaluation.model import load  # imports torch

    record, trained = run_settings(run) or ({}, {})
    flags = {name: trained[name] for name in ("plain", "trust_remote_code") if name in trained}
    model, encoder = load(str(run), EvaluationSettings(model_name=str(run), dtype="float32", **flags))
    if encoder.text_view == "in_chat" and "system_turn" not in record:
        raise UsageError(f"{run}: the text view contains the system turn, which was not the same in all examples")
    frames, tokenizer = view_frames(run, model, encoder, record.get("system_turn")), encoder.renderer.tokenizer
    model.base_model.save_pretrained(folders[0])
    folders[1].mkdir()
    for file in folders[0].iterdir():  # both encoders are the same model
        (folders[1] / file.name).symlink_to(Path("..", SIDES[0], file.name))
    tokenizer.chat_template = None  # else inputs would be rendered as chats
    for folder, frame in zip(folders, frames, strict=True):
        write_encoder(folder, tokenizer, model.config, *frame)
    return folders


# --------------------------------------------------------------------------------------------------------- lm_eval


def read_samples(metrics: dict[str, Any], s: EvaluationSettings) -> tuple[list[dict[str, Any]], int]:
    """(one sample for each prediction of an evaluation with these metrics, the number of examples in its data)."""
    from llm_jepa.data.rendering import Renderer
    from llm_jepa.model import load_tokenizer, tokenizer_options

    changed = data_sha256(s.input_file, s.fields) != metrics["data_sha256"] and s.input_file
    changed = changed or (is_task_file(s.task) and sha256(s.task) != metrics["task_sha256"] and s.task)
    if changed:
        raise UsageError(f"{changed} has changed since {s.model_name} was evaluated with it")
    everything = read_examples(s.input_file, Problems(skip=True), s.fields)
    if s.process_split:
        everything = split_examples(everything, s.test_size, s.split_seed)[s.process_split == "test"]
    examples = {example.id: example for example in everything if example.has_chat}
    tokenizer = load_tokenizer(s.model_name, s.revision, predictors=False, **tokenizer_options(s))
    renderer, limits = Renderer(tokenizer, plain=s.plain), {"do_sample": False, "max_gen_toks": s.max_new_tokens}
    samples, scores = [], [*find_task(s.task).scores, "exact", "startswith"]
    for _, row in read_jsonl(s.output_file):
        example = examples[row["id"]]
        doc = {name: getattr(example, name) for name in ("system", "history", "user", "assistant")}
        prompt, target, response = renderer.prompt(example), example.assistant, row["prediction"]
        if choices := row.get("log_likelihoods"):  # whether each choice is the greedy response is not known
            requests, found = [(prompt, choice) for choice in choices], [[str(x), "None"] for x in choices.values()]
        else:
            requests, found = [(prompt, limits)], [response]
        arguments = {f"gen_args_{i}": {"arg_0": a, "arg_1": b} for i, (a, b) in enumerate(requests)}
        texts = {"doc": json.dumps(doc, indent=2, ensure_ascii=False), "prompt": prompt, "target": target}
        hashes = {f"{name}_hash": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        samples.append(
            {"doc_id": example.id - 1, "doc": doc, "target": target, "arguments": arguments}
            | {"resps": [[response] for response in found], "filtered_resps": found, "filter": "none"}
            | {"metrics": scores, **hashes}
            | {name: float(row[name]) for name in scores}
        )
        if "stop_rate" in metrics:
            samples[-1]["metrics"] = [*scores, "stop_rate"]
            samples[-1]["stop_rate"] = float(row["stop_reason"] == "stop")
    return samples, len(examples)


def export_results(run: Path, output: Path) -> list[Path]:
    """Writes the evaluations of a run as lm-evaluation-harness does, one task for each.

    Raises UsageError if there is none or the data has changed since.
    """
    files = [run / "metrics.json"] if (run / "metrics.json").is_file() else sorted(run.glob("eval/*/metrics.json"))
    if not files:
        raise UsageError(f"{run} has no metrics.json and no eval/*/metrics.json of evaluate.py")
    date, results, samples = max(file.stat().st_mtime for file in files), collections.defaultdict(dict), {}
    for file in files:
        metrics = read_json(file)
        try:
            s, n, names = EvaluationSettings(**metrics["settings"]), metrics["n"], score_names(metrics)
        except (KeyError, TypeError) as error:
            raise UsageError(f"{file} was written by another version ({error})") from None
        if not s.model_name:
            raise UsageError(f"{file}: its predictions were made by another program (--score_only)")
        task = dataset_name(s.input_file) if file.parent == run else file.parent.name
        s.output_file = str(file.with_name(Path(s.output_file).name))
        s.task = metrics["settings"]["task"] or metrics["task"]
        if (run / "run.json").is_file():
            s.model_name = str(run)  # it may have been moved
        samples[task], total = read_samples(metrics, s)
        shown = {"name": task, "alias": task, "sample_len": n}
        for name in names:
            values = [sample[name] for sample in samples[task]]
            error = statistics.stdev(values) / math.sqrt(n) if n > 1 else "N/A"
            shown |= {f"{name},none": metrics[name], f"{name}_stderr,none": error}
        kind = "multiple_choice" if find_task(s.task).choices else "generate_until"
        measured = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
        config = {"task": task, "dataset_path": s.input_file, "output_type": kind, "metric_list": measured}
        hashes = "".join(x["doc_hash"] + x["prompt_hash"] + x["target_hash"] for x in samples[task])
        results["results"][task] = shown
        results["configs"][task] = config | {"num_fewshot": 0, "repeats": 1, "metadata": {"version": 1}}
        results["versions"][task], results["n-shot"][task] = 1, 0
        results["higher_is_better"][task] = dict.fromkeys(names, True)
        results["n-samples"][task] = {"original": total, "effective": n}
        results["task_hashes"][task] = hashlib.sha256(hashes.encode()).hexdigest()
    source, model = "vllm" if s.engine == "vllm" else "hf", re.sub(r"[\"<>:/|\\?*\[\]]+", "__", s.model_name)
    written = results | {
        "config": {"model": source, "model_args": {"pretrained": s.model_name, "dtype": s.dtype},
                   "batch_size": str(s.batch_size), "device": metrics["device"], "limit": s.max_examples or None},
        "git_hash": metrics["git_commit"], "date": date, "transformers_version": metrics["versions"]["transformers"],
        "model_source": source, "model_name": s.model_name, "model_name_sanitized": model,
    }  # fmt: skip
    folder, day = output / model, datetime.fromtimestamp(date).isoformat().replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"results_{day}.json", *(folder / f"samples_{task}_{day}.jsonl" for task in samples)]
    for path, rows in zip(paths[1:], samples.values(), strict=True):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(paths[0], written)
    return paths


# ---------------------------------------------------------------------------------------------------------- merged


def export_merged(run: Path, output: Path) -> list[Path]:
    """Writes the model of a run with its adapter merged in. Raises UsageError if there is none or OUT is not empty."""
    found = run_settings(run)
    if not found or not (run / "adapter_config.json").is_file():
        raise UsageError(f"{run} is not a run with an adapter (run.json and adapter_config.json)")
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty; remove it or choose another OUT")
    import torch
    from transformers import GenerationConfig, set_seed

    from llm_jepa.model import load_adapter, load_model, load_tokenizer

    (record, settings), adapter = found, read_json(run / "adapter_config.json")
    s, name, revision = read_settings(settings), adapter["base_model_name_or_path"], adapter.get("revision")
    code = {"trust_remote_code": s.trust_remote_code}
    # finetune8bh200.py, whose settings have more flags, stores frozen parameters in the precision of the computation.
    half = "sharding" in settings and record["computation"]["autocast"] == "bfloat16"
    options = {"dtype": torch.bfloat16 if half else torch.float32, "predictors": s.stored_predictors} | code
    tokenizer = load_tokenizer(str(run), predictors=False, **code)
    set_seed(s.finetune_seed)  # rows of tokens that are not in use are drawn again
    model = load_adapter(load_model(name, revision, tokenizer, **options), str(run)).merge_and_unload()
    model.generation_config = GenerationConfig.from_pretrained(run)
    for part in (model, tokenizer):
        part.save_pretrained(output)
    return [output]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 1 failed, 2 wrong usage or run."""
    exports = {"retriever": export_retriever, "lm_eval": export_results, "merged": export_merged}
    parser = FlagParser(prog="export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=exports)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write to")
    options = parser.parse_args(argv)
    return run_command("export", lambda: print(*exports[options.what](options.run, options.output), sep="\n"))


if __name__ == "__main__":
    sys.exit(main())
