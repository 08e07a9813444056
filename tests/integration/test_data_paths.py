"""Different ways to the same micro-batches: stored tokens, several processes, token budgets, streams."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import templates
from conftest import EXAMPLES, JEPA, column, interrupted, same_weights, start, train, write_rows

from llm_jepa.data import streaming
from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.examples import Example, ExampleError, Problems, read_examples
from llm_jepa.data.spans import Draws
from llm_jepa.data.streaming import SegmentStream
from llm_jepa.files import read_json
from llm_jepa.run_folder import mark_checkpoint

KEEP = Draws(seed=42)
encoder = functools.partial(templates.encoder, "llama3", predictors=1)


def stream_of(path: Path, **options: object) -> SegmentStream:
    options = {"fields": None, "seed": 42, "skip": False, "batch_size": 1} | options
    return SegmentStream(str(path), encoder(), KEEP, **options)


def tokens(items: list) -> list[str]:
    """All that an encoded example consists of, comparable."""
    fields = ("kind", "ids", "labels", "view", "stem", "branch", "user", "answer", "paired")
    return [str([[np.asarray(getattr(x, name)).tolist() for name in fields] for x in item]) for item in items]


@pytest.mark.parametrize("flags", [{}, {"jepa": False}, {"text_view": "in_chat"}, {"locate_user": True}], ids=str)
def test_stored_segments_equal_encoded_segments_in_any_number_of_processes(data, flags):
    examples = read_examples(str(data), Problems())
    examples += [dataclasses.replace(examples[0], history=("u", "a")), dataclasses.replace(examples[0], pair=False)]
    examples += [] if "text_view" in flags else [Example(None, None, None, "views", 1, text="a view", code="its code")]
    encoded = encoder(**flags)(examples)
    for processes in (1, 2) if not flags else (1,):
        items = SegmentDataset(examples, encoder(**flags), Problems(), KEEP, processes).items
        assert tokens(items) == tokens(filter(None, encoded))  # views have no segment without the JEPA loss
        assert items.lengths.tolist() == [sum(len(x.ids) for x in item) for item in encoded if item]


def test_stream_trains_on_the_same_examples_as_memory_with_and_without_workers(trained):
    flags = (*JEPA, "--batch_size", 24, "--grad_accum", 1, "--max_steps", 3)
    memory, stream = trained(*flags), trained(*flags, "--streaming")
    same_weights(memory, stream, rtol=1e-3, atol=2e-5)
    assert column(stream, "tokens") == column(memory, "tokens")
    assert column(stream, "epoch")[:3] == [0, 1, 2], "complete passes over the 24 examples before a step's last example"
    same_weights(stream, trained(*flags, "--streaming", "--dataloader_num_workers", 1))


@pytest.mark.parametrize(
    ("size", "block"), [(("--batch_size", 3), 5), (("--tokens_per_batch", 300), 8192)], ids=["examples", "tokens"]
)
def test_resumed_stream_equals_uninterrupted_stream_bit_for_bit(tmp_path, monkeypatch, size, block):
    monkeypatch.setattr(streaming, "BLOCK", block)
    monkeypatch.setattr(streaming, "CHUNK", 2)
    data = write_rows(tmp_path / "data.jsonl", [*EXAMPLES[:16], {"messages": []}])
    flags = (*JEPA, *size, "--jepa_ratio", 0.5, "--lora", "--lora_dropout", 0.3, "--streaming", "--skip_bad_examples",
             "--grad_accum", 1, "--max_steps", 8, "--save_steps", 5, "--save_total_limit", 9,
             "--keep_checkpoints")  # fmt: skip
    straight = train(data, tmp_path / "straight", *flags)
    run = train(data, interrupted(straight, 5, tmp_path / "run"), *flags, "--resume")
    same_weights(straight, run)
    for key in ("loss", "tokens", "epoch"):
        assert column(straight, key) == column(run, key)
    assert read_json(run / "run.json")["skipped_examples"] == 1, "counted once over epochs and attempts"


def test_stream_is_not_resumed_by_another_number_of_processes(data, trained, tmp_path):
    flags = (*JEPA, "--streaming", "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 9, "--keep_checkpoints")
    run = interrupted(trained(*flags), 2, tmp_path / "run")
    place = run / "checkpoint-2" / "stream-0.json"
    place.write_text(json.dumps({"place": [0, 0, 3], "processes": 2}))
    mark_checkpoint(place.parent)  # otherwise it counts as incomplete
    assert "2 processes" in start(data, run, *flags, "--resume", code=2).err


def test_processes_share_each_epoch_of_a_stream_in_another_order(data, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 9)
    streams = [itertools.islice(stream_of(data, process=n, processes=3), 16) for n in range(3)]
    shares = [[tokens(batch) for batch, *_ in stream] for stream in streams]
    first, second = ([item for share in shares for (item,) in share[part]] for part in (slice(8), slice(8, 16)))
    every = sorted(tokens(encoder()(read_examples(str(data), Problems()))))
    assert sorted(first) == sorted(second) == every and first != second


def test_stream_without_a_usable_example_ends(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": []}] * 3)
    done = start(data, tmp_path / "run", "--streaming", "--max_steps", 9, "--skip_bad_examples")
    assert done.code == 2 and "rows.jsonl" in done.err
    assert isinstance(next(iter(stream_of(data, skip=True))), ExampleError)
