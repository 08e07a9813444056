"""Weights in 8 and 4 bits and device maps: the same answers' likelihoods to the precision of the weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, call, message_row, write_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import evaluate
from llm_jepa.data.examples import Example
from llm_jepa.evaluation import generation

EXAMPLES = [Example("Choose.", f"question {i}", "A", f"rows:{i}", i) for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama whose layers' sizes are multiples of 64, as 4-bit kernels need."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models" / "llama3")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def likelihoods(folder: Path, **flags) -> tuple[torch.Tensor, set[str]]:
    """Log-likelihoods of four letters (4 examples, 4) and the kinds of linear layers in the model."""
    model, renderer = evaluate.load(str(folder), evaluate.Settings(dtype="float32", task="hellaswag", **flags))
    answers = {e.id: a for b in generation.choose(model, renderer, EXAMPLES, tuple("ABCD"), 2) for e, a in b}
    kinds = {type(m).__name__ for m in model.get_decoder().modules() if "Linear" in type(m).__name__}
    return torch.tensor([list(answers[e.id].log_likelihoods.values()) for e in EXAMPLES]), kinds


@pytest.mark.parametrize(
    ("flag", "kind", "error"), [("load_in_8bit", "Linear8bitLt", 0.1), ("load_in_4bit", "Linear4bit", 1)]
)
def test_quantised_weights_answer_nearly_as_the_whole_ones(model, flag, kind, error):
    (whole, _), (quantised, kinds) = likelihoods(model), likelihoods(model, **{flag: True})
    assert kinds == {kind}
    difference = (whole - quantised).square().mean().sqrt()
    assert 0 < difference < error * whole.std()


def test_a_device_map_changes_nothing(model):
    assert likelihoods(model, device_map="auto")[0].equal(likelihoods(model)[0])


def refusal(tmp_path: Path, *flags: object) -> str:
    rows = write_rows(tmp_path / "synth_test.jsonl", [message_row("u", "a")])
    done = call("evaluate", "--model_name", "m", "--input_file", rows, "--output_file", tmp_path / "p.jsonl", *flags)
    assert done.code == 2
    return done.err


def test_both_precisions_are_refused(tmp_path):
    assert "give one of --load_in_8bit and --load_in_4bit" in refusal(tmp_path, "--load_in_8bit", "--load_in_4bit")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    assert "--load_in_4bit: install the package bitsandbytes first" in refusal(tmp_path, "--load_in_4bit")
