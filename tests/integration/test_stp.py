"""--stp: the loss is the same in every layout, reads the right hidden states and costs no forward pass."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from conftest import (
    GOLDEN,
    JEPA,
    MODELS,
    column,
    dry_run,
    message_row,
    metrics,
    same_weights,
    train,
    weights,
    write_rows,
)

import finetune
from llm_jepa.losses import STP_LOSSES, stp_loss

MODEL = GOLDEN / "models" / "llama3"
ARMS = {"regular": ("--regular",), "jepa": JEPA, "dropout": (*JEPA, "--jepa_ratio", 0.5),
        "in_chat": (*JEPA, "--text_view", "in_chat")}  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("variant", "layer"), [("geodesic", -1), ("patch", -1), ("patch", 0), ("patch", 1)])
def test_layouts_agree(data, arm, variant, layer):
    flags = ("--train_file", data, "--model_name", MODEL, "--dry_run", 8, "--stp", variant, "--stp_spans", 3)
    flags += ("--stp_lbd", 2, *ARMS[arm])
    separate = dry_run(*flags, "--stp_layer", layer, "--layout", "separate")
    layouts = [("--layout", "packed"), ("--tokens_per_row", 100)]
    layouts += [] if arm == "regular" else [("--layout", "additive")]
    for other in (dry_run(*flags, "--stp_layer", layer, *layout) for layout in layouts):
        for key in ("lm_loss", "jepa_loss", "stp_loss", "total_loss"):
            assert other[key] == pytest.approx(separate[key], abs=1e-5), key
        assert other["grad_norm"] == pytest.approx(separate["grad_norm"], rel=1e-4)
        assert other["spans"] == separate["spans"] == 24
    jepa = (separate["jepa_loss"] or 0) * separate["pairs"] / 8  # of 8 pairs before loss dropout
    total = separate["lm_loss"] + jepa + 2 * separate["stp_loss"]
    assert separate["total_loss"] == pytest.approx(total, rel=1e-6)


class Read:
    """A model's hidden states at the spans, as LMHeadSelector reads them and as transformers returns them."""

    def __init__(self, data: Path, name: str, layer: int, **flags: object):
        s = finetune.Settings(train_file=str(data), model_name=str(GOLDEN / "models" / name), lm_labels="answer",
                              layout="packed", dry_run=4, stp="geodesic", stp_layer=layer, stp_spans=2, predictors=1,
                              finetune_seed=5, **flags)  # fmt: skip
        parts = finetune.prepare(s, PartialState(cpu=True))
        self.model, items = parts.model, parts.train_set[0, range(4)]
        self.batch = dataclasses.replace(parts.collator, layout="separate")(items)
        self.packed = parts.collator(items)
        self.selector = parts.selector

    def ours(self, batch: dict) -> torch.Tensor:
        return self.selector.lm_sum(self.model, batch)[1].path

    def theirs(self, layer: int) -> torch.Tensor:
        mask = (self.batch["segment_ids"] >= 0).long()
        out = self.model(input_ids=self.batch["input_ids"], attention_mask=mask, use_cache=False,
                         output_hidden_states=True)  # fmt: skip
        return out.hidden_states[layer][tuple(self.batch["path_at"])]

    def gradients(self, path: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        stp_loss(path, "geodesic")[0].backward()
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [-3, -2, -1, 0, 1, 2])
def test_layer_number_is_that_of_transformers_hidden_states(data, name, layer):
    read = Read(data, name, layer)
    expected = read.theirs(layer)
    for batch in (read.batch, read.packed):
        torch.testing.assert_close(read.ours(batch), expected, rtol=1e-4, atol=1e-5)
    ours, theirs = read.gradients(read.ours(read.packed)), read.gradients(read.theirs(layer))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-6)
    touched = {n.split(".layers.")[1].split(".")[0] for n in ours if ".layers." in n}
    assert touched == {str(i) for i in range(layer % 3)}, "blocks after the layer get no gradient"


@pytest.mark.parametrize("layer", [1, -1])
def test_hidden_states_of_a_model_with_adapter_are_read(data, layer):
    read = Read(data, "llama3", layer, lora=True)
    read.model.eval()
    torch.testing.assert_close(read.ours(read.packed), read.theirs(layer), rtol=1e-4, atol=1e-5)
    assert any("lora_B" in name for name in read.gradients(read.ours(read.packed)))


def test_gradient_checkpointing_gives_the_same_gradients_at_an_inner_layer(data):
    read = Read(data, "llama3", 1)
    read.model.train()
    usual = read.gradients(read.ours(read.packed))
    read.model.gradient_checkpointing_enable()
    recomputed = read.gradients(read.ours(read.packed))
    assert recomputed.keys() == usual.keys() and len(usual) > 5
    for key in usual:
        torch.testing.assert_close(recomputed[key], usual[key], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layer", [-1, 1])
def test_no_forward_pass_and_no_token_is_added(data, tmp_path, monkeypatch, layer):
    from transformers import LlamaForCausalLM

    real, calls = LlamaForCausalLM.forward, []

    def forward(self, *args, **kwargs):
        calls.append(kwargs["input_ids"].shape)
        return real(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(real)  # LMHeadSelector reads it
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    without = train(data, tmp_path / "without", *JEPA, "--max_steps", 2)
    before = calls.copy()
    calls.clear()
    stp = ("--stp", "patch", "--stp_spans", 5, "--stp_layer", layer)
    run = train(data, tmp_path / "with", *JEPA, "--max_steps", 2, *stp)
    assert len(before) > 4 and calls == before
    assert column(run, "tokens") == column(without, "tokens") and column(run, "spans") == [40] * 2


@pytest.mark.parametrize("arm", ["regular", "jepa"])
def test_zero_weight_equals_no_stp_bit_for_bit(trained, arm):
    flags = (*ARMS[arm], "--max_steps", 3)
    none, zero = trained(*flags), trained(*flags, "--stp", "patch", "--stp_lbd", 0)
    same_weights(none, zero)
    assert column(none, "loss") == column(zero, "loss") and metrics(zero)[0].keys() == metrics(none)[0].keys()
    some = trained(*flags, "--stp", "patch")
    assert not weights(some)["lm_head.weight"].equal(weights(none)["lm_head.weight"])


@pytest.mark.parametrize(
    ("warmup", "start", "expected"),
    [(3, 0, [1, 2, 3, 3]), (0.75, 0, [1, 2, 3, 3]), (4, 1, [1.5, 2, 2.5, 3])],
    ids=["steps", "fraction", "start"],
)
def test_logged_loss_is_the_formula_under_a_warmup(trained, warmup, start, expected):
    flags = (*JEPA, "--gamma", 0.5, "--stp", "geodesic", "--stp_lbd", 3, "--max_steps", 4)
    run = trained(*flags, "--stp_warmup", warmup, "--stp_min_lbd", start)
    assert column(run, "stp_lbd") == pytest.approx(expected)
    for m in metrics(run):
        total = 0.5 * m["lm_loss"] + m["jepa_loss"] + m["stp_lbd"] * m["stp_loss"]
        assert m["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("variant", sorted(STP_LOSSES))
def test_training_straightens_the_path(data, trained, variant):
    flags = ("--regular", "--stp", variant, "--stp_spans", 8, "--num_epochs", 6, "--eval_file", data, "--stp_lbd")
    little, much = (column(trained(*flags, weight), "eval_stp_loss")[-1] for weight in ("1e-9", 10))
    assert much < 0.8 * little


def test_chats_without_a_span_train_as_without_stp(tmp_path):
    data = write_rows(tmp_path / "short.jsonl", [message_row("a", "b")] * 8)
    none, run = (
        train(data, tmp_path / name, "--regular", "--max_steps", 2, *flags)
        for name, flags in (("none", ()), ("stp", ("--stp", "geodesic", "--stp_lbd", 1)))
    )
    same_weights(none, run)
    assert column(run, "spans") == [0, 0] and not column(run, "stp_loss")


def test_stream_has_the_same_spans_in_any_micro_batch(trained):
    flags = ("--regular", "--stp", "patch", "--stp_spans", 2, "--streaming", "--max_steps", 3)
    first, second = (trained(*flags, "--batch_size", b, "--grad_accum", a) for b, a in ((8, 1), (2, 4)))
    assert column(first, "spans") == column(second, "spans") == [16] * 3
    assert column(second, "stp_loss") == pytest.approx(column(first, "stp_loss"), rel=1e-5)
