"""Ways to the same micro-batches: kept tokens, several processes, token budgets, streams."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, call, dry_run, message_row, same_weights, write_rows

import finetune
from llm_jepa.data import batching, segments, streaming
from llm_jepa.data.examples import ExampleError, Problems, read_examples
from llm_jepa.data.rendering import Renderer
from llm_jepa.files import read_json
from llm_jepa.model import load_tokenizer
from llm_jepa.run_folder import mark_checkpoint

ROWS = [message_row(f"lines with the number {i} and word {i * i}", f"({i}).*" * (1 + i % 3)) for i in range(16)]
MODEL = GOLDEN / "models" / "llama3"


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def settings(data: Path, **flags: object) -> finetune.Settings:
    usual = {"predictors": 1, "lm_labels": "answer", "layout": "packed"} | flags
    return finetune.Settings(train_file=str(data), model_name=str(MODEL), **usual)


def renderer(data: Path, **flags: object) -> Renderer:
    s = settings(data, **flags)
    return Renderer(load_tokenizer(s), s)


def tokens(items: list) -> list:
    return [
        [(x.kind, x.ids.tolist(), x.labels.tolist(), x.view, x.stem, x.branch, x.user, x.answer) for x in item]
        for item in items
    ]


def train(data: Path, out: Path, *flags: object, code: int = 0) -> Path:
    done = call("finetune", "--train_file", data, "--model_name", MODEL, "--output_dir", out, "--learning_rate", "1e-3",
                "--grad_accum", 1, *flags)  # fmt: skip
    assert done.code == code, done.err
    return out


def metrics(run: Path, key: str = "total") -> list[float]:
    return [x[key] for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in x]


JEPA = ("--predictors", 2, "--lbd", 1)

# ---------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    import datasets

    monkeypatch.setattr(batching, "FEW", 1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "llm-jepa"


@pytest.mark.parametrize("flags", [{}, {"lbd": 0}, {"text_view": "in_chat"}, {"stp": "patch"}], ids=str)
def test_stored_segments_are_those_that_were_encoded(data, flags):
    examples, r = read_examples(str(data), Problems()), renderer(data, **flags)
    stored = batching.SegmentDataset(examples, r, Problems()).items
    assert tokens(stored) == tokens(segments.encode(r, examples))
    assert stored.lengths.tolist() == [sum(len(x.ids) for x in item) for item in stored]


def test_tokens_are_taken_from_the_cache(data, cache, monkeypatch):
    examples = read_examples(str(data), Problems())
    first = batching.SegmentDataset(examples, renderer(data), Problems(), cached=True)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(segments, "encode", None)
    again = batching.SegmentDataset(examples, renderer(data), Problems(), cached=True)
    assert tokens(again.items) == tokens(first.items)
    with pytest.raises(TypeError):
        batching.SegmentDataset(examples, renderer(data, predictors=2), Problems(), cached=True)


def test_bad_examples_are_named_from_the_cache_too(tmp_path, cache):
    data = write_rows(tmp_path / "long.jsonl", [*ROWS, message_row("word " * 600, "a")])
    examples = read_examples(str(data), Problems())
    for _ in range(2):
        with pytest.raises(ExampleError, match=r"long\.jsonl:17: the chat has \d+ tokens, over --max_length"):
            batching.SegmentDataset(examples, renderer(data), Problems(), cached=True)
        problems = Problems(skip=True)
        assert len(batching.SegmentDataset(examples, renderer(data), problems, cached=True)) == 16
        assert len(problems.messages) == 1


def test_without_a_cache_folder_tokens_are_made_anew(data, cache):
    cache.parent.write_text("a file where the folder should be")
    assert (
        len(batching.SegmentDataset(read_examples(str(data), Problems()), renderer(data), Problems(), cached=True))
        == 16
    )


def test_a_dry_run_keeps_nothing(data, cache):
    assert dry_run("--train_file", data, "--model_name", MODEL, "--dry_run", 16)["label_tokens"] > 0
    assert not cache.exists()


@pytest.mark.parametrize(
    "flags",
    [{"predictors": 2}, {"lbd": 0}, {"lm_labels": "all"}, {"max_length": 99}, {"plain": True}, {"front_pred": True},
     {"reverse_pred": True}, {"text_view": "in_chat"}, {"last_token": -2}, {"stp": "patch"}],
    ids=str,
)  # fmt: skip
def test_a_flag_that_changes_tokens_changes_the_key(data, flags):
    examples = read_examples(str(data), Problems())
    assert batching.cache_key(renderer(data, **flags), examples) != batching.cache_key(renderer(data), examples)


def test_text_tokenizer_and_template_change_the_key_and_seed_and_rate_do_not(data):
    examples, r = read_examples(str(data), Problems()), renderer(data)
    key = batching.cache_key(r, examples)
    assert batching.cache_key(renderer(data, finetune_seed=7, learning_rate=1.0), examples) == key
    assert batching.cache_key(r, [dataclasses.replace(examples[0], user="x"), *examples[1:]]) != key
    assert batching.cache_key(r, examples[::-1]) != key
    r.tokenizer.add_tokens(["number"])
    assert (with_token := batching.cache_key(r, examples)) != key
    r.tokenizer.chat_template += " "
    assert batching.cache_key(r, examples) not in (key, with_token)


@pytest.mark.parametrize("flags", [{}, {"text_view": "in_chat"}, {"plain": True}, {"stp": "geodesic"}], ids=str)
def test_the_key_knows_every_setting_that_encoding_asks_for(data, flags):
    asked, r = set(), renderer(data, **flags)

    class Recorder:
        def __getattr__(self, name: str) -> object:
            asked.add(name)
            return getattr(settings(data, **flags), name)

    r.s = Recorder()
    segments.encode(r, read_examples(str(data), Problems()))
    assert asked and asked <= set(segments.ENCODING_FLAGS)


def test_processes_encode_what_one_does_in_order(data, cache):
    examples = read_examples(str(data), Problems()) * 3
    one = batching.SegmentDataset(examples, renderer(data), Problems(), processes=1)
    two = batching.SegmentDataset(examples, renderer(data), Problems(), processes=2, cached=True)
    assert tokens(two.items) == tokens(one.items)
    assert len(list(cache.iterdir())) == 2


# --------------------------------------------------------------------------------------------------------- budgets


def test_a_token_budget_changes_which_examples_share_a_micro_batch_and_nothing_else(data, tmp_path):
    """All rows in one step: whole, in micro-batches of 4, and in micro-batches of like length."""
    whole = train(data, tmp_path / "whole", *JEPA, "--batch_size", 16, "--max_steps", 3)
    budget = train(data, tmp_path / "budget", *JEPA, "--tokens_per_batch", 400, "--max_steps", 3, "--grad_accum", 99)
    same_weights(whole, budget, rtol=1e-3, atol=2e-5)
    assert metrics(budget) == pytest.approx(metrics(whole), rel=1e-5)
    assert metrics(budget, "tokens") == metrics(whole, "tokens")


def test_micro_batches_of_a_budget_stay_near_it(data, tmp_path):
    run = train(data, tmp_path / "run", *JEPA, "--tokens_per_batch", 400, "--num_epochs", 2)
    sizes, total = metrics(run, "tokens"), sum(metrics(run, "tokens"))
    longest = batching.SegmentDataset(read_examples(str(data), Problems()), renderer(data, predictors=2), Problems())
    steps = int(np.ceil(total / 2 / 400))
    assert len(sizes) == 2 * steps and np.mean(sizes) <= 400
    assert max(sizes) - np.mean(sizes) <= longest.items.lengths.max()


# --------------------------------------------------------------------------------------------------------- streams


def test_a_stream_trains_on_what_the_file_holds(data, tmp_path):
    """One step of all rows, from a stream and from memory."""
    memory = train(data, tmp_path / "memory", *JEPA, "--batch_size", 16, "--max_steps", 3)
    stream = train(data, tmp_path / "stream", *JEPA, "--batch_size", 16, "--max_steps", 3, "--streaming")
    same_weights(memory, stream, rtol=1e-3, atol=2e-5)
    assert metrics(stream, "tokens") == metrics(memory, "tokens")


@pytest.mark.parametrize("flags", [("--batch_size", 3), ("--tokens_per_batch", 300, "--jepa_ratio", 0.5)], ids=str)
@pytest.mark.parametrize("block", [5, 8192])
def test_a_stopped_stream_goes_on_where_it_was(data, tmp_path, monkeypatch, flags, block):
    monkeypatch.setattr(streaming, "BLOCK", block)
    monkeypatch.setattr(streaming, "CHUNK", 2)
    flags = (*JEPA, *flags, "--streaming", "--lr_scheduler_type", "constant")
    straight = train(data, tmp_path / "straight", *flags, "--max_steps", 8)
    train(data, tmp_path / "halves", *flags, "--max_steps", 8, "--save_steps", 5, "--save_total_limit", 9)
    (tmp_path / "halves" / "run.json").write_text(json.dumps({"status": "interrupted"}))
    shutil.rmtree(tmp_path / "halves" / "checkpoint-8")
    train(data, tmp_path / "halves", *flags, "--max_steps", 8, "--save_steps", 5, "--save_total_limit", 9, "--resume")
    same_weights(straight, tmp_path / "halves")
    assert metrics(straight, "tokens") == metrics(tmp_path / "halves", "tokens")


def test_processes_share_out_a_stream(data, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 6)
    drawn = []
    for process in range(3):
        stream = streaming.SegmentStream(str(data), renderer(data), False, 1, process=process, processes=3)
        drawn.append([tokens(batch)[0] for batch, _ in zip_first(stream, 16)])
    epoch = [x for share in drawn for x in share[:5]]
    every = tokens(segments.encode(renderer(data), read_examples(str(data), Problems())))
    assert len(epoch) == 15 and all(x in every for x in epoch) and len({str(x) for x in epoch}) == 15


def zip_first(stream: streaming.SegmentStream, count: int) -> list:
    return [x[:2] for x, _ in zip(stream, range(count), strict=False)]


def test_each_epoch_of_a_stream_has_another_order(data):
    stream = streaming.SegmentStream(str(data), renderer(data), False, 16)
    (first, _), (second, _) = zip_first(stream, 2)
    assert sorted(map(str, tokens(first))) == sorted(map(str, tokens(second))) and tokens(first) != tokens(second)


def test_a_stream_with_workers_gives_the_same(data, tmp_path):
    here = train(data, tmp_path / "here", *JEPA, "--streaming", "--max_steps", 3)
    ahead = train(data, tmp_path / "ahead", *JEPA, "--streaming", "--max_steps", 3, "--dataloader_num_workers", 1)
    same_weights(here, ahead)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_of_a_stream_is_named_or_skipped(tmp_path, workers):
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"messages": []}, {"messages": [3]}])
    flags = (*JEPA, "--streaming", "--max_steps", 9, "--grad_accum", 2, "--dataloader_num_workers", workers)
    run = tmp_path / "run"
    done = call("finetune", "--train_file", data, "--model_name", MODEL, "--output_dir", run, *flags)
    said = re.search(r"error: .*rows\.jsonl:1[78]: .*", done.err)
    assert done.code == 2 and said and "Traceback" not in done.err
    record = read_json(run / "run.json")
    assert record["status"] == "failed" and f"error: {record['error']}" == said[0]
    assert not list(run.glob("*.safetensors"))

    train(data, tmp_path / "skipping", *flags, "--skip_bad_examples")
    record = read_json(tmp_path / "skipping" / "run.json")
    assert record["skipped_examples"] == 2, "counted once, whatever the number of epochs"


def test_a_resumed_stream_still_counts_what_it_had_skipped(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"messages": []}])
    flags = (*JEPA, "--batch_size", 4, "--streaming", "--max_steps", 5, "--save_steps", 4, "--skip_bad_examples")
    flags = (*flags, "--save_total_limit", 9)
    run = train(data, tmp_path / "run", *flags)
    (run / "run.json").write_text(json.dumps({"status": "interrupted"}))
    shutil.rmtree(run / "checkpoint-5")
    assert read_json(run / "checkpoint-4" / "stream-0.json")["skipped"]
    train(data, run, *flags, "--resume")
    assert read_json(run / "run.json")["skipped_examples"] == 1


def test_a_stream_without_a_usable_row_ends(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": []}] * 3)
    flags = ("--streaming", "--max_steps", 9, "--skip_bad_examples", "--output_dir", tmp_path / "run")
    done = call("finetune", "--train_file", data, "--model_name", MODEL, *flags)
    assert done.code == 2 and "rows.jsonl: no usable example" in done.err
    error = next(iter(streaming.SegmentStream(str(data), renderer(data), True, 1)))
    assert isinstance(error, ExampleError) and "no usable example for process 0" in str(error)


def test_a_stream_is_not_taken_up_by_another_number_of_processes(data, tmp_path):
    run = train(data, tmp_path / "run", *JEPA, "--streaming", "--max_steps", 4, "--save_steps", 2)
    place = run / "checkpoint-4" / "stream-0.json"
    place.write_text(json.dumps({"place": [0, 0, 3], "processes": 2}))
    mark_checkpoint(place.parent)  # otherwise it counts as damaged
    (run / "run.json").write_text(json.dumps({"status": "interrupted"}))
    flags = (*JEPA, "--streaming", "--learning_rate", "1e-3", "--grad_accum", 1, "--max_steps", 4, "--save_steps", 2)
    done = call("finetune", "--train_file", data, "--model_name", MODEL, "--output_dir", run, *flags, "--resume")
    assert done.code == 2 and "written by 2 processes, not 1" in done.err


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_streams_of_other_formats(tmp_path, ending):
    import pandas

    rows = pandas.DataFrame({"q": [f"number {i}" for i in range(9)], "a": [f"{i}.*" for i in range(9)]})
    path = tmp_path / f"own.{ending}"
    rows.to_csv(path, index=False) if ending == "csv" else rows.to_parquet(path)
    r = renderer(path, text_field="q", code_field="a", streaming=True)
    ((batch, _),) = zip_first(streaming.SegmentStream(str(path), r, False, 9), 1)
    every = segments.encode(r, read_examples(str(path), Problems(), r.s.fields))
    assert sorted(map(str, tokens(batch))) == sorted(map(str, tokens(every)))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--streaming",), "--max_steps"),
        (("--streaming", "--num_epochs", 2, "--max_steps", 2), "--num_epochs"),
        (("--streaming", "--max_steps", 2, "--val_fraction", 0.1), "--val_fraction"),
        (("--streaming", "--max_steps", 2, "--same_flop"), "--same_flop"),
        (("--streaming", "--max_steps", 2, "--save_strategy", "epoch"), "--save_strategy"),
        (("--streaming", "--max_steps", 2, "--dataloader_num_workers", 2), "--dataloader_num_workers"),
        (("--tokens_per_batch", 100, "--batch_size", 2), "--batch_size"),
        (("--tokens_per_batch", 100, "--layout", "separate"), "--tokens_per_batch"),
        (("--tokens_per_batch", -1), "--tokens_per_batch"),
        (("--use_liger_kernel",), "--use_liger_kernel"),
    ],
)
def test_flags_that_do_not_apply_are_refused(data, tmp_path, flags, named):
    done = call("finetune", "--train_file", data, "--model_name", MODEL, "--output_dir", tmp_path / "run", *flags)
    assert done.code == 2 and named in done.err and not (tmp_path / "run").exists()


def test_synth_rows_are_encoded_whole():
    """The project's own rows: as many items, each with its chat and two views."""
    data = ROOT / "datasets" / "synth_test.jsonl"
    items = batching.SegmentDataset(read_examples(str(data), Problems()), renderer(data), Problems()).items
    assert len(items) == 2000 and all([x.kind for x in item] == [*segments.KINDS] for item in items[::100])
