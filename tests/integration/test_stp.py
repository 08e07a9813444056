"""--stp from the command line: whatever lays its spans out gives the same loss, and it costs no forward pass."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from conftest import GOLDEN, MODELS, call, dry_run, message_row, same_weights, weights, write_rows

import finetune

ROWS = [message_row(f"lines with the number {i} and word {i * i}", f"({i}).*[{i * i}]") for i in range(24)]
MODEL = GOLDEN / "models" / "llama3"
JEPA = ("--predictors", 2, "--lbd", 1)
ARMS = {"regular": ("--regular",), "jepa": JEPA, "ld": (*JEPA, "--jepa_ratio", 0.5)}


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "words_train.jsonl", ROWS)


def train(data: Path, out: Path, *flags: object) -> Path:
    done = call("finetune", "--train_file", data, "--model_name", MODEL, "--output_dir", out, "--batch_size", 4,
                "--grad_accum", 2, "--learning_rate", "1e-3", *flags)  # fmt: skip
    assert done.code == 0, done.err
    return out


def metrics(run: Path, key: str = "total") -> list[dict]:
    return [x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in x]


@pytest.mark.parametrize("tube", sorted(finetune.TUBES))
@pytest.mark.parametrize("arm", [*ARMS, "in_chat"])
def test_layouts_agree(data, arm, tube):
    arm = ARMS.get(arm, (*JEPA, "--text_view", "in_chat"))
    flags = ("--train_file", data, "--model_name", MODEL, "--dry_run", 8, "--stp", tube, "--stp_spans", 3, *arm)
    flags += ("--stp_lbd", 2)
    separate = dry_run(*flags, "--layout", "separate")
    others = [("--layout", "packed"), ("--tokens_per_row", 100), ("--tokens_per_row", 5000)]
    others += [] if "--regular" in arm else [("--layout", "additive")]
    for other in (dry_run(*flags, *layout) for layout in others):
        for key in ("lm_loss", "jepa_loss", "stp_loss", "total_loss"):
            assert other[key] == pytest.approx(separate[key], abs=1e-5), key
        assert other["grad_norm"] == pytest.approx(separate["grad_norm"], rel=1e-4)
        assert other["spans"] == separate["spans"] == 24
    total = separate["lm_loss"] + 1 * (separate["jepa_loss"] or 0) + 2 * separate["stp_loss"]
    assert separate["total_loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("arm", [*ARMS, "in_chat"])
def test_layouts_agree_at_an_inner_layer(data, arm, layer):
    arm = ARMS.get(arm, (*JEPA, "--text_view", "in_chat"))
    flags = ("--train_file", data, "--model_name", MODEL, "--dry_run", 8, "--stp", "patch", "--stp_spans", 3, *arm)
    flags += ("--stp_lbd", 2)
    last = dry_run(*flags)
    separate = dry_run(*flags, "--stp_layer", layer, "--layout", "separate")
    others = [("--layout", "packed"), ("--tokens_per_row", 100)]
    others += [] if "--regular" in arm else [("--layout", "additive")]
    for other in (dry_run(*flags, "--stp_layer", layer, *layout) for layout in others):
        for key in ("lm_loss", "jepa_loss", "stp_loss", "total_loss"):
            assert other[key] == pytest.approx(separate[key], abs=1e-5), key
        assert other["grad_norm"] == pytest.approx(separate["grad_norm"], rel=1e-4)
    assert separate["lm_loss"] == pytest.approx(last["lm_loss"], abs=1e-5)
    assert abs(separate["stp_loss"] - last["stp_loss"]) > 1e-3, "another layer's states"


class Read:
    """A model's hidden states at the spans, as HeadInput reads them, and as transformers gives them."""

    def __init__(self, data: Path, name: str, layer: int, **flags: object):
        s = finetune.Settings(train_file=str(data), model_name=str(GOLDEN / "models" / name), lm_labels="answer",
                              layout="packed", dry_run=4, stp="geodesic", stp_layer=layer, stp_spans=2, predictors=1,
                              finetune_seed=5, **flags)  # fmt: skip
        parts = finetune.prepare(s, PartialState(cpu=True))
        self.model, items = parts.model, parts.train_set[0, range(4)]
        self.batch = dataclasses.replace(parts.collator, layout="separate")(items)
        self.packed = parts.collator(items)
        self.head = parts.head

    def ours(self, batch: dict) -> torch.Tensor:
        return self.head.losses(self.model, batch)[2]

    def theirs(self, layer: int) -> torch.Tensor:
        mask = (self.batch["spans"][0] >= 0).long()
        out = self.model(input_ids=self.batch["input_ids"], attention_mask=mask, use_cache=False,
                         output_hidden_states=True)  # fmt: skip
        return out.hidden_states[layer][tuple(self.batch["span_at"])]

    def gradients(self, path: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        finetune.stp_loss(path, "geodesic")[0].backward()
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [-3, -2, -1, 0, 1, 2])
def test_a_layer_is_transformers_hidden_states_of_that_number(data, name, layer):
    read = Read(data, name, layer)
    expected = read.theirs(layer)
    for batch in (read.batch, read.packed):
        torch.testing.assert_close(read.ours(batch), expected, rtol=1e-4, atol=1e-5)
    ours, theirs = read.gradients(read.ours(read.packed)), read.gradients(read.theirs(layer))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-6)
    touched = {n.split(".layers.")[1].split(".")[0] for n in ours if ".layers." in n}
    assert touched == {str(i) for i in range(layer % 3)}, "the blocks behind the layer have no part in it"


@pytest.mark.parametrize("layer", [1, -1])
def test_a_layer_of_a_model_under_an_adapter_is_read_too(data, layer):
    read = Read(data, "llama3", layer, lora=True)
    read.model.eval()
    torch.testing.assert_close(read.ours(read.packed), read.theirs(layer), rtol=1e-4, atol=1e-5)
    assert any("lora_B" in name for name in read.gradients(read.ours(read.packed)))


def test_recomputed_activations_give_the_same_gradients_at_an_inner_layer(data):
    read = Read(data, "llama3", 1)
    read.model.train()
    usual = read.gradients(read.ours(read.packed))
    read.model.gradient_checkpointing_enable()
    recomputed = read.gradients(read.ours(read.packed))
    assert recomputed.keys() == usual.keys() and len(usual) > 5
    for key in usual:
        torch.testing.assert_close(recomputed[key], usual[key], rtol=1e-5, atol=1e-8)


def test_one_layer_s_states_are_kept_and_only_while_they_are_read(data):
    read = Read(data, "llama3", 1)
    asked = []
    hook = read.model.model.register_forward_pre_hook(lambda m, a, k: asked.append(k), with_kwargs=True)
    assert read.ours(read.packed).shape == (3, 8, read.model.config.hidden_size)
    hook.remove()
    assert len(asked) == 1 and not asked[0].get("output_hidden_states")
    assert read.head.path is None and read.head._inner is None
    read.model(input_ids=read.batch["input_ids"])
    assert read.head._inner is None, "outside of a loss nothing is noted"
    read.head.close()
    assert not any(m._forward_pre_hooks for m in read.model.modules())


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_the_model_has_not_is_refused(data, tmp_path, layer):
    flags = ("--train_file", data, "--model_name", MODEL, "--output_dir", tmp_path / "run", "--regular")
    done = call("finetune", *flags, "--stp", "patch", "--stp_layer", layer)
    assert done.code == 2 and f"--stp_layer {layer} is not in -3 to 2, the layers of LlamaForCausalLM" in done.err
    assert not (tmp_path / "run").exists()


def test_the_loss_does_not_depend_on_the_jepa_term(data):
    flags = ("--train_file", data, "--model_name", MODEL, "--dry_run", 8, "--stp", "patch")
    one, *others = [dry_run(*flags, *arm)["stp_loss"] for arm in ARMS.values()]
    assert others == pytest.approx([one] * len(others), abs=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_micro_batches_and_accumulation_do_not_change_loss_or_weights(data, tmp_path, arm):
    flags = (*ARMS[arm], "--stp", "geodesic", "--stp_lbd", 0.5, "--stp_spans", 2, "--max_steps", 4)
    runs = [
        train(data, tmp_path / f"{b}x{a}", *flags, "--batch_size", b, "--grad_accum", a)
        for b, a in ((8, 1), (4, 2), (1, 8))
    ]
    for other in runs[1:]:
        same_weights(runs[0], other, rtol=1e-3, atol=2e-5)
        for x, y in zip(metrics(runs[0]), metrics(other), strict=True):
            for key in ("total", "stp_loss", "lm_loss"):
                assert x[key] == pytest.approx(y[key], rel=1e-5)
            assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
            assert x["spans"] == y["spans"] == 16


def test_the_last_short_batch_is_normalised_by_its_own_spans(tmp_path):
    """10 rows in batches of 4 × 2; one of them is too short for a triple."""
    rows = [message_row("a", "b"), *ROWS[:9]]
    data = write_rows(tmp_path / "ten.jsonl", rows)
    run = train(data, tmp_path / "run", "--regular", "--stp", "geodesic", "--stp_lbd", 1, "--num_epochs", 2)
    spans = [m["spans"] for m in metrics(run)]
    assert sorted(spans[:2]) in ([1, 8], [2, 7]) and sum(spans) == 18
    for m in metrics(run):
        assert m["total"] == pytest.approx(m["lm_loss"] + m["stp_loss"], rel=1e-5) and m["stp_loss"] > 0.5


@pytest.mark.parametrize("layer", [-1, 1])
def test_no_forward_pass_and_no_token_is_added(data, tmp_path, monkeypatch, layer):
    from transformers import LlamaForCausalLM

    real, calls = LlamaForCausalLM.forward, []

    def forward(self, *args, **kwargs):
        calls.append(kwargs["input_ids"].shape)
        return real(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(real)  # what HeadInput goes by
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    without = train(data, tmp_path / "without", *JEPA, "--max_steps", 3)
    before = calls.copy()
    calls.clear()
    tube = train(data, tmp_path / "with", *JEPA, "--max_steps", 3, "--stp", "patch", "--stp_spans", 5, "--stp_layer",
                 layer)  # fmt: skip
    assert len(before) > 6 and calls == before
    assert [m["tokens"] for m in metrics(tube)] == [m["tokens"] for m in metrics(without)]
    assert [m["spans"] for m in metrics(tube)] == [40] * 3


@pytest.mark.parametrize("arm", ["regular", "jepa"])
def test_a_weight_of_zero_is_without_it_bit_for_bit(data, tmp_path, arm):
    none = train(data, tmp_path / "none", *ARMS[arm], "--max_steps", 3)
    zero = train(data, tmp_path / "zero", *ARMS[arm], "--max_steps", 3, "--stp", "patch", "--stp_lbd", 0)
    some = train(data, tmp_path / "some", *ARMS[arm], "--max_steps", 3, "--stp", "patch")
    same_weights(none, zero)
    assert [m["total"] for m in metrics(none)] == [m["total"] for m in metrics(zero)]
    assert metrics(zero)[0].keys() == metrics(none)[0].keys()
    assert not weights(some)["lm_head.weight"].equal(weights(none)["lm_head.weight"])


def test_logged_loss_is_the_formula_under_a_warm_up(data, tmp_path):
    flags = (*JEPA, "--gamma", 0.5, "--stp", "geodesic", "--stp_lbd", 3, "--max_steps", 4)
    run = train(data, tmp_path / "run", *flags, "--stp_warmup", 3)
    lines = metrics(run)
    assert [m["stp_lbd"] for m in lines] == pytest.approx([1, 2, 3, 3])
    for m in lines:
        total = 0.5 * m["lm_loss"] + m["jepa_loss"] + m["stp_lbd"] * m["stp_loss"]
        assert m["total"] == pytest.approx(total, rel=1e-5)
    share = train(data, tmp_path / "share", *flags, "--stp_warmup", 0.75)
    assert [m["total"] for m in metrics(share)] == [m["total"] for m in lines]


def test_a_warm_up_starts_from_its_least_weight(data, tmp_path):
    flags = (*JEPA, "--stp", "geodesic", "--stp_lbd", 3, "--max_steps", 5, "--stp_warmup", 4)
    lines = metrics(train(data, tmp_path / "run", *flags, "--stp_min_lbd", 1))
    assert [m["stp_lbd"] for m in lines] == [1.5, 2, 2.5, 3, 3]
    for m in lines:
        assert m["total"] == pytest.approx(m["lm_loss"] + m["jepa_loss"] + m["stp_lbd"] * m["stp_loss"], rel=1e-5)
    none, zero = (train(data, tmp_path / n, *flags, *f) for n, f in (("none", ()), ("zero", ("--stp_min_lbd", 0))))
    same_weights(none, zero)


def test_held_out_loss_is_that_of_the_rows_in_one_batch_at_the_whole_weight(data, tmp_path):
    stp = (*JEPA, "--stp", "patch", "--stp_lbd", 2, "--stp_part", "chat", "--stp_max_length", 4)
    run = train(data, tmp_path / "run", *stp, "--eval_file", data, "--max_steps", 2, "--eval_strategy", "steps",
                "--eval_steps", 2, "--batch_size", 5, "--stp_warmup", 100)  # fmt: skip
    line = metrics(run, "eval_loss")[0]
    whole = dry_run("--train_file", data, "--model_name", run, "--dry_run", len(ROWS), *stp)
    assert line["eval_stp_loss"] == pytest.approx(whole["stp_loss"], rel=1e-5)
    assert line["eval_loss"] == pytest.approx(whole["total_loss"], rel=1e-5)
    final = json.loads((run / "run.json").read_text())["final"]
    assert {"stp_loss", "eval_stp_loss"} <= final.keys()


@pytest.mark.parametrize("tube", sorted(finetune.TUBES))
def test_training_straightens_the_path(data, tmp_path, tube):
    flags = ("--regular", "--stp", tube, "--stp_spans", 8, "--num_epochs", 6, "--eval_file", data)
    little = train(data, tmp_path / "little", *flags, "--stp_lbd", "1e-9")
    much = train(data, tmp_path / "much", *flags, "--stp_lbd", 10)
    first, second = (metrics(run, "eval_loss")[-1]["eval_stp_loss"] for run in (little, much))
    assert second < 0.8 * first


def test_chats_without_a_span_train_as_without_it(tmp_path):
    data = write_rows(tmp_path / "short.jsonl", [message_row("a", "b")] * 8)
    none = train(data, tmp_path / "none", "--regular", "--max_steps", 2)
    run = train(data, tmp_path / "run", "--regular", "--max_steps", 2, "--stp", "geodesic", "--stp_lbd", 1)
    same_weights(none, run)
    assert [(m["stp_loss"], m["spans"]) for m in metrics(run)] == [(0, 0)] * 2


def test_a_stream_has_spans_too(data, tmp_path):
    flags = ("--regular", "--stp", "patch", "--stp_spans", 2, "--streaming", "--max_steps", 3)
    runs = [
        train(data, tmp_path / f"{b}x{a}", *flags, "--batch_size", b, "--grad_accum", a) for b, a in ((8, 1), (2, 4))
    ]
    first, second = ([(m["spans"], m["stp_loss"]) for m in metrics(run)] for run in runs)
    assert [n for n, _ in first] == [16] * 3
    assert [x for _, x in second] == pytest.approx([x for _, x in first], rel=1e-5)


def test_the_start_block_names_it(data, tmp_path):
    flags = ("--train_file", data, "--model_name", MODEL, "--output_dir", tmp_path / "run", "--max_steps", 1)
    flags += ("--overwrite", "--regular", "--stp", "patch")
    assert "regular + STP patch, weight 0.02;" in call("finetune", *flags).err
    assert "regular + STP patch, weight 0.02, layer 1;" in call("finetune", *flags, "--stp_layer", 1).err


@pytest.mark.parametrize("tube", sorted(finetune.TUBES))
def test_plain_pretraining_draws_from_its_one_text(data, tube):
    flags = ("--train_file", data, "--model_name", MODEL, "--dry_run", 4, "--regular", "--plain", "--train_all")
    assert dry_run(*flags, "--stp", tube)["spans"] == 4


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--stp_lbd", 1], "--stp_lbd: only with --stp"),
        (
            ["--stp_spans", 2, "--stp_part", "chat", "--stp_max_length", 3, "--stp_warmup", 1],
            "--stp_spans, --stp_part, --stp_max_length, --stp_warmup: only with --stp",
        ),
        (["--stp_layer", 1, "--stp_min_lbd", 0], "--stp_min_lbd, --stp_layer: only with --stp"),
        (["--stp", "patch", "--stp_min_lbd", 0.01], "--stp_min_lbd: only with --stp_warmup"),
        (["--stp", "patch", "--stp_warmup", 2, "--stp_min_lbd", 0.03], "--stp_min_lbd 0.03 is over --stp_lbd 0.02"),
        (["--stp", "patch", "--stp_warmup", 2, "--stp_min_lbd", -1], "--stp_min_lbd -1.0 is negative"),
        (["--stp", "patch", "--stp_spans", 0], "--stp_spans 0 is not positive"),
        (["--stp", "patch", "--stp_lbd", -1], "--stp_lbd -1.0 is negative"),
        (["--stp", "patch", "--stp_max_length", -1], "--stp_max_length -1 is negative"),
        (["--stp", "geodesic", "--stp_max_length", 1], "--stp_max_length 1: --stp geodesic needs three tokens"),
        (["--stp", "patch", "--stp_warmup", -1], "--stp_warmup -1.0 is negative"),
        (["--stp", "patch", "--plain", "--train_all", "--stp_part", "answer"], "--stp_part answer: not with --plain"),
    ],
)
def test_what_does_not_apply_is_refused(data, tmp_path, flags, named):
    done = call("finetune", "--train_file", data, "--model_name", MODEL, "--output_dir", tmp_path / "run", *flags)
    assert done.code == 2 and named in done.err and not (tmp_path / "run").exists()
