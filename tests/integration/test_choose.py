"""Answers chosen by likelihood: against the plainest computation, with the whole prompt, whatever the batch."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, MODELS, call, message_row, write_rows

import evaluate
from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.evaluation import generation

CHOICES = ("A", "B", "C", "D")
LONG = ("A", "a word, then another", "AB 12")  # of several tokens each
EXAMPLES = [
    Example("Choose.", f"{'context ' * (7 * i % 23)}\nA) {i}\nB) {i * i}\nC) x\nD) y", "A", f"rows:{i}", i)
    for i in range(1, 8)
]


@cache
def load(name: str, plain: bool = False):
    return evaluate.load(
        str(GOLDEN / "models" / name), evaluate.Settings(dtype="float32", task="hellaswag", plain=plain)
    )


@torch.no_grad()
def slow_likelihood(model, renderer, example: Example, choice: str) -> float:
    """Σ log p of the tokens of the chat from its first difference to another answer's chat, up to the answer's end."""
    chat = renderer.chat(dataclasses.replace(example, assistant=choice))
    ids = renderer.tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)
    answer = [t for t, (start, end) in enumerate(ids["offset_mapping"]) if end > chat.start and start < chat.end]
    logits = model(input_ids=torch.tensor([ids["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[t - 1, ids["input_ids"][t]].item() for t in answer)


def chosen(model, renderer, examples, choices, batch_size, **sizes) -> list[generation.Generation]:
    answers = generation.choose(model, renderer, examples, choices, batch_size, **sizes)
    found = {e.id: a for batch in answers for e, a in batch}
    return [found[e.id] for e in examples]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("choices", [CHOICES, LONG], ids=["letters", "longer"])
@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_those_of_one_plain_forward_a_choice(name, choices, plain):
    model, renderer = load(name, plain)
    for example, answer in zip(EXAMPLES, chosen(model, renderer, EXAMPLES, choices, 3), strict=True):
        slow = {choice: slow_likelihood(model, renderer, example, choice) for choice in choices}
        assert answer.log_likelihoods == pytest.approx(slow, abs=1e-4)
        assert answer.text == max(slow, key=slow.__getitem__)
        assert answer.stop_reason is None


def test_the_batch_changes_nothing_and_the_hook_is_gone():
    model, renderer = load("llama3")
    alone = chosen(model, renderer, EXAMPLES, CHOICES, 1)
    for size in (2, 100):
        for one, other in zip(alone, chosen(model, renderer, EXAMPLES, CHOICES, size), strict=True):
            assert one.text == other.text
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


def test_one_token_choices_cost_one_prompt_and_longer_ones_all(monkeypatch):
    model, renderer = load("llama3")
    rows, forward = [], type(model).forward

    def counting(self, input_ids=None, **kwargs):
        rows.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    chosen(model, renderer, EXAMPLES, CHOICES, 4)
    assert rows == [4, 3]
    rows.clear()
    chosen(model, renderer, EXAMPLES, LONG, 4)
    assert rows == [12, 9]


@pytest.mark.parametrize("choices", [CHOICES, LONG], ids=["letters", "longer"])
def test_a_token_budget_counts_the_rows_of_all_choices_and_changes_nothing(choices, monkeypatch):
    model, renderer = load("llama3")
    want = chosen(model, renderer, EXAMPLES, choices, 1)
    shapes, forward = [], type(model).forward

    def watching(self, input_ids=None, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", watching)
    got = chosen(model, renderer, EXAMPLES, choices, 64, tokens_per_batch=500)
    for one, other in zip(want, got, strict=True):
        assert one.text == other.text
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4)
    rows = 1 if choices == CHOICES else len(choices)  # of each example
    assert sum(r for r, _ in shapes) == rows * len(EXAMPLES) and len(shapes) > 1
    assert all(r * t <= 500 or r == rows for r, t in shapes)
    assert all((r + rows) * t > 500 for r, t in shapes[:-1]), "a batch takes what fits"


def test_processes_share_the_examples():
    model, renderer = load("llama3")
    want = chosen(model, renderer, EXAMPLES, CHOICES, 2)
    shares = [
        [pair for batch in generation.choose(model, renderer, EXAMPLES, CHOICES, 2, share=(n, 3)) for pair in batch]
        for n in range(3)
    ]
    assert sorted(len(share) for share in shares) == [2, 2, 3]
    assert [a for _, a in sorted(sum(shares, []), key=lambda pair: pair[0].id)] == want


def test_every_letter_of_the_prompt_counts():
    """A prompt cut anywhere (as to max_new_tokens) could not tell these two apart."""
    model, renderer = load("llama3")
    long = "word " * 150
    first, second = (dataclasses.replace(EXAMPLES[0], user=start + long) for start in ("A", "B"))
    one, other = chosen(model, renderer, [first, dataclasses.replace(second, id=99)], CHOICES, 2)
    assert one.log_likelihoods != pytest.approx(other.log_likelihoods, abs=1e-6)


def test_a_prompt_beyond_the_context_is_refused():
    model, renderer = load("llama3")
    limit = model.config.max_position_embeddings
    example = dataclasses.replace(EXAMPLES[0], user="w " * (limit + 1))
    with pytest.raises(ExampleError, match=f"rows:1: .* tokens, over the model's context of {limit}"):
        chosen(model, renderer, [example], CHOICES, 1)


@pytest.fixture
def hellaswag(tmp_path) -> Path:
    return write_rows(
        tmp_path / "hellaswag_test.jsonl",
        [message_row(e.user, CHOICES[e.id % 4], "Choose.") for e in EXAMPLES],
    )


def test_hellaswag_from_the_command_line(hellaswag, tmp_path):
    flags = ("--model_name", GOLDEN / "models" / "llama3", "--input_file", hellaswag, "--batch_size", 2)
    done = call("evaluate", *flags, "--output_file", tmp_path / "out" / "predictions.jsonl")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    right = [row["prediction"] == CHOICES[e.id % 4] for row, e in zip(rows, EXAMPLES, strict=True)]
    assert [row["choice"] for row in rows] == right
    assert (metrics["score"], metrics["n"], metrics["stop_rate"]) == ("choice", 7, None)
    assert metrics["choice"] == sum(right) / 7
    assert set(rows[0]["log_likelihoods"]) == set(CHOICES)
    assert "stop_rate" not in done.out


def test_max_new_tokens_is_refused_where_nothing_is_generated(hellaswag, tmp_path):
    done = call("evaluate", "--model_name", GOLDEN / "models" / "llama3", "--input_file", hellaswag,
                "--output_file", tmp_path / "p.jsonl", "--max_new_tokens", 5)  # fmt: skip
    assert done.code == 2
    assert "--max_new_tokens: task hellaswag generates nothing" in done.err
