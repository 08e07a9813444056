"""Multiple choice by likelihood, and quantized models: against complete forward passes, for any batch."""

import contextlib
import dataclasses
import json
import math
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, MODEL, MODELS, call, make_model, message_row, read_lines, weights, write_rows
from safetensors.torch import save_file

import evaluate
from llm_jepa.data.examples import Example, Problems
from llm_jepa.evaluation import generation
from llm_jepa.evaluation.settings import EvaluationSettings

LETTERS = ("A", "B", "C", "D")
LONG = ("A", "a word, then another", "AB 12")  # of several tokens each
EXAMPLES = [
    Example("Choose.", f"{'context ' * (7 * i % 23)}\nA) {i}\nB) {i * i}\nC) x\nD) y", "A", f"data:{i}", i)
    for i in range(1, 8)
]


@cache
def load(name: str, plain: bool = False):
    settings = EvaluationSettings(dtype="float32", task="hellaswag", plain=plain)
    return evaluate.load(str(GOLDEN / "models" / name), settings)


@torch.no_grad()
def expected(model, renderer, example: Example, choice: str) -> float:
    """Σ log p of the answer's tokens, found by their characters."""
    chat = renderer.chat(dataclasses.replace(example, assistant=choice))
    ids = renderer.tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)
    answer = [t for t, (start, end) in enumerate(ids["offset_mapping"]) if end > chat.start and start < chat.end]
    logits = model(input_ids=torch.tensor([ids["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[t - 1, ids["input_ids"][t]].item() for t in answer)


def chosen(model, encoder, examples, choices, batch_size) -> dict[int, generation.Generation]:
    examples, encoded = generation.encode_choices(model.config, encoder, examples, choices, Problems())
    batches = generation.batches(list(map(generation.forward_size, encoded)), batch_size)
    with evaluate.label_logits(model, encoder.renderer.tokenizer.pad_token_id) as read:
        found = generation.respond(examples, encoded, partial(generation.choose, read, choices), batches)
        return {e.id: g for batch in found for e, g in batch}


@pytest.mark.parametrize(("choices", "plain"), [(LETTERS, True), (LONG, False)], ids=["letters-plain", "longer"])
@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_equal_one_forward_pass_per_choice(name, choices, plain):
    model, encoder = load(name, plain)
    found = chosen(model, encoder, EXAMPLES, choices, 3)
    for example in EXAMPLES:
        want = {choice: expected(model, encoder.renderer, example, choice) for choice in choices}
        assert found[example.id].log_likelihoods == pytest.approx(want, abs=1e-4)
        assert found[example.id].text == max(want, key=want.__getitem__)
        assert found[example.id].stop_reason is None
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3, "the hook is removed"


def evaluated(model: Path, folder: Path, *flags: object):
    data = folder / "hellaswag_test.jsonl"
    write_rows(data, [message_row(e.user, LETTERS[e.id % 4], "Choose.") for e in EXAMPLES])
    done = call("evaluate", "--model_name", model, "--input_file", data, "--output_file", folder / "p.jsonl", *flags)
    path = folder / "p.jsonl"
    return done, read_lines(path) if path.exists() else []


def test_hellaswag_from_the_command_line(tmp_path):
    done, rows = evaluated(MODEL, tmp_path, "--batch_size", 2)
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    right = [row["prediction"] == LETTERS[e.id % 4] for row, e in zip(rows, EXAMPLES, strict=True)]
    assert [row["choice"] for row in rows] == right and set(rows[0]["log_likelihoods"]) == set(LETTERS)
    assert (metrics["score"], metrics["n"], metrics["stop_rate"]) == ("choice", 7, None)
    assert metrics["choice"] == sum(right) / 7 and "stop_rate" not in done.out
    done, _ = evaluated(MODEL, tmp_path, "--max_new_tokens", 5, "--overwrite")
    assert done.code == 2 and "--max_new_tokens" in done.err


def test_likelihoods_that_are_not_finite_are_an_error(tmp_path):
    folder, tensors = shutil.copytree(MODEL, tmp_path / "broken"), weights(MODEL)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done, rows = evaluated(folder, tmp_path)
    assert done.code == 2 and "--dtype float32" in done.err
    assert not rows and not (tmp_path / "metrics.json").exists()


@pytest.fixture(scope="module")
def model64(tmp_path_factory) -> Path:
    """A Llama whose layer sizes are multiples of 64, as 4-bit kernels need."""
    sizes = {"vocab_size": 531, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05}  # fmt: skip
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama", "llama3", **sizes)


def likelihoods(folder: Path, **flags) -> tuple[torch.Tensor, set[str]]:
    """Log-likelihoods of four letters (4 examples, 4) and the kinds of linear layers in the model."""
    settings = EvaluationSettings(**{"dtype": "float32", "task": "hellaswag"} | flags)
    model, encoder = evaluate.load(str(folder), settings)
    found = chosen(model, encoder, EXAMPLES[:4], LETTERS, 2)
    kinds = {type(m).__name__ for m in model.get_decoder().modules() if "Linear" in type(m).__name__}
    return torch.tensor([list(found[e.id].log_likelihoods.values()) for e in EXAMPLES[:4]]), kinds


@pytest.mark.parametrize(
    ("flag", "kind", "error"), [("load_in_8bit", "Linear8bitLt", 0.1), ("load_in_4bit", "Linear4bit", 1)]
)
def test_quantized_model_gives_nearly_the_same_likelihoods(model64, flag, kind, error):
    (full, _), (quantized, kinds) = likelihoods(model64), likelihoods(model64, **{flag: True})
    assert kinds == {kind}
    assert 0 < (full - quantized).square().mean().sqrt() < error * full.std()


def test_choices_of_half_precision_are_compared_by_float32_logits(monkeypatch):
    exact, _ = likelihoods(MODEL, dtype="bfloat16")
    monkeypatch.setattr(generation, "float32_logits", lambda model: contextlib.nullcontext())
    rounded, _ = likelihoods(MODEL, dtype="bfloat16")
    assert not exact.equal(rounded) and (exact - rounded).abs().max() < 0.05


def test_device_map_changes_nothing(model64):
    assert likelihoods(model64, device_map="auto")[0].equal(likelihoods(model64)[0])
