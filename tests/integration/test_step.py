"""What a training step costs: logits held at once, waits for the device, shapes that a compiler meets."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDEN, ROOT, call, dry_run, message_row, weights, write_rows
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import finetune

ROWS = [message_row(f"lines with the number {i} and word {i * i}", f"({i}).*" * (1 + i % 3)) for i in range(12)]
MODEL = GOLDEN / "models" / "llama3"
CASES = json.loads((GOLDEN / "cases.json").read_text())
ANSWERS = [case for case in CASES if "lm_labels=answer_text" in case]


def flags_of(case: dict, scope: str) -> list:
    flags = {"lbd": 1, "gamma": 1} | case["flags"]
    argv = [x for k, v in flags.items() for x in ([f"--{k}"] if v is True else [f"--{k}", v])]
    return ["--model_name", GOLDEN / "models" / case["model"], "--train_file", GOLDEN / case["file"], "--dry_run",
            case["rows"], "--predictors", case["predictors"], "--last_token", case["last_token"], "--lm_labels", scope,
            *argv]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- logits


class Largest(TorchDispatchMode):
    """The most rows of logits that any one tensor holds."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.vocabulary, self.hidden, self.rows = model.config.vocab_size, model.config.hidden_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            # The output layer's weight, transposed, is (D, V).
            logits = isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == self.vocabulary
            if logits and x.shape[-2] != self.hidden:
                self.rows = max(self.rows, x.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: f"{c['model']}-{c['file']}-k{c['predictors']}")
def test_golden_numbers_with_sliced_logits(case, monkeypatch):
    scope = next(s for s in ("reference", "answer_text") if f"lm_labels={s}" in case)
    argv = flags_of(case, scope)
    vocabulary = len(json.loads((GOLDEN / "models" / case["model"] / "tokenizer.json").read_text())["model"]["vocab"])
    monkeypatch.setattr(finetune, "SLICE", 3 * (vocabulary + 64))
    got, want = dry_run(*argv), case[f"lm_labels={scope}"]
    assert got["label_tokens"] == want["label_tokens"] > 4
    assert got["lm_loss"] == pytest.approx(want["lm_loss"], rel=1e-4)
    assert got["jepa_loss"] == pytest.approx(case["jepa_loss"], rel=1e-4)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def loaded(model: str = "llama3", **flags: object) -> tuple:
    s = finetune.Settings(
        **{"train_file": str(GOLDEN / "regex_rows.jsonl"), "model_name": str(GOLDEN / "models" / model), "dry_run": 4,
           "predictors": 1, "lm_labels": "all", "layout": "packed"} | flags
    )  # fmt: skip
    parts = finetune.prepare(s, finetune.PartialState(cpu=True))
    return parts, parts.collator(parts.train_set.items)


@pytest.mark.parametrize("labels", [1, 5, 7, 1000])
def test_no_more_logits_than_a_slice_are_held(monkeypatch, labels):
    parts, batch = loaded()
    assert len(batch["label_ids"]) > 100 and parts.head.slices
    with Largest(parts.model) as whole:
        parts.head.losses(parts.model, batch)[0].backward()
    monkeypatch.setattr(finetune, "SLICE", labels * parts.head.vocabulary + 3)
    with Largest(parts.model) as sliced:
        parts.head.losses(parts.model, batch)[0].backward()
    assert whole.rows == len(batch["label_ids"]) and sliced.rows == min(labels, len(batch["label_ids"]))


def test_no_logits_are_kept_for_the_backward_pass(monkeypatch):
    parts, batch = loaded()
    kept = {}
    for name, size in (("whole", finetune.SLICE), ("sliced", 5 * parts.head.vocabulary)):
        monkeypatch.setattr(finetune, "SLICE", size)
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=shapes: to.append(tuple(x.shape)) or x, lambda x: x):
            parts.head.losses(parts.model, batch)
        kept[name] = [s for s in shapes if s[-1:] == (parts.head.vocabulary,) and s[:-1] != (48,)]
    assert kept["whole"] and not kept["sliced"]


@pytest.mark.parametrize("train", [True, False])
def test_slices_change_no_gradient_and_leave_the_model_as_it_was(monkeypatch, train):
    parts, batch = loaded()
    parts.model.train(train)
    gradients = []
    for size in (finetune.SLICE, 7 * parts.head.vocabulary):
        monkeypatch.setattr(finetune, "SLICE", size)
        loss, views, _ = parts.head.losses(parts.model, batch)
        (loss + views.square().sum()).backward()
        gradients.append([p.grad.clone() for p in parts.model.parameters()])
        parts.model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(parts.model.get_output_embeddings())
    assert parts.model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, parts.head.vocabulary)


def test_training_all_tokens_in_slices_gives_the_weights_of_whole_logits(tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ("--train_file", data, "--model_name", MODEL, "--train_all", "--plain", "--regular", "--max_steps", 4,
             "--learning_rate", "1e-3", "--lora")  # fmt: skip
    for size, name in ((finetune.SLICE, "whole"), (20_000, "sliced")):
        monkeypatch.setattr(finetune, "SLICE", size)
        done = call("finetune", *flags, "--output_dir", tmp_path / name)
        assert done.code == 0, done.err
    whole, sliced = (weights(tmp_path / n, "adapter_model.safetensors") for n in ("whole", "sliced"))
    for key, value in whole.items():
        torch.testing.assert_close(sliced[key], value, rtol=1e-3, atol=2e-5)


def test_a_model_that_bends_its_logits_gets_them_whole(tmp_path, monkeypatch):
    """Gemma 2 caps its logits behind the output layer."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models" / "google_gemma")
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, sliding_window=4096,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parts, batch = loaded(str(tmp_path))
    assert not parts.head.slices
    before = parts.head.losses(parts.model, batch)[0]
    monkeypatch.setattr(finetune, "SLICE", 1000)
    assert parts.head.losses(parts.model, batch)[0].equal(before)


# ----------------------------------------------------------------------------------------------------------- waits


class Waits(TorchFunctionMode):
    """Calls that bring a number from the device to the host, which waits for all that was asked of the device."""

    NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "is_nonzero",
             "__contains__", "equal")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [("--regular",), ("--predictors", 2, "--lbd", 1)], ids=["regular", "jepa"])
def test_a_step_waits_for_the_device_once(tmp_path, flags):
    """However many micro-batches it has: what the steps beyond the third cost, loading and the first ones aside."""
    data, waits = write_rows(tmp_path / "rows.jsonl", 5 * ROWS), {}  # 10 steps an epoch
    for steps in (3, 5, 9):
        with Waits() as mode:
            done = call("finetune", "--train_file", data, "--model_name", MODEL, "--output_dir", tmp_path / f"{steps}",
                        *flags, "--batch_size", 2, "--grad_accum", 3, "--max_steps", steps, "--save_strategy", "no",
                        "--logging_steps", 100, "--lr_scheduler_type", "constant")  # fmt: skip
        assert done.code == 0, done.err
        waits[steps] = mode.calls
    assert len(waits[9]) - len(waits[5]) == 4 and len(waits[5]) - len(waits[3]) == 2, waits


# --------------------------------------------------------------------------------------------------------- compile


def test_a_compiler_meets_few_shapes_and_changes_no_number():
    parts, _ = loaded(torch_compile=True, batch_size=3, dry_run=0, lm_labels="answer", train_file=str(
        ROOT / "datasets" / "synth_test.jsonl"))  # fmt: skip
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(parts.model, backend=count)
    for begin in range(0, 120, 3):
        batch = parts.collator(parts.train_set.items[begin : begin + 3])
        assert batch["input_ids"].shape[1] % 64 == 0
        with torch.no_grad():
            ours, theirs = parts.head.losses(parts.model, batch)[0], parts.head.losses(compiled, batch)[0]
        torch.testing.assert_close(ours, theirs)
        if begin == 57:
            early = len(graphs)
    torch._dynamo.reset()
    assert 0 < early <= 12 and len(graphs) == early, (early, len(graphs))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ANSWERS[::5], ids=lambda c: f"{c['model']}-{c['file']}-k{c['predictors']}")
def test_golden_numbers_of_each_kernel(case, kernel):
    got, want = dry_run(*flags_of(case, "answer_text"), "--attn_implementation", kernel), case["lm_labels=answer_text"]
    assert got["lm_loss"] == pytest.approx(want["lm_loss"], rel=1e-4)
    assert got["jepa_loss"] == pytest.approx(case["jepa_loss"], rel=1e-4)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("case", ANSWERS[::5], ids=lambda c: f"{c['model']}-{c['file']}-k{c['predictors']}")
def test_golden_numbers_of_a_stream_and_of_padded_rows(case):
    streamed = dry_run(*flags_of(case, "answer_text"), "--streaming")
    padded = dry_run(*flags_of(case, "answer_text"), "--torch_compile")
    want = case["lm_labels=answer_text"]
    for got in (streamed, padded):
        assert got["lm_loss"] == pytest.approx(want["lm_loss"], rel=1e-4)
        assert got["total_loss"] == pytest.approx(want["total"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    assert sum(padded["tokens"].values()) % 64 == 0


def test_flash_kernels_are_told_where_segments_are():
    parts, batch = loaded()
    parts.head.kernel = "flash_attention_2"
    inputs = parts.head._inputs(batch)
    assert inputs["attention_mask"] is None and inputs["cu_seq_lens_q"] is inputs["cu_seq_lens_k"]
    lengths = sorted(len(x.ids) for item in parts.train_set.items for x in item)
    assert sorted(batch["boundaries"].diff().tolist())[-len(lengths) :][-1] == inputs["max_length_q"] >= lengths[-1]
    assert batch["boundaries"].dtype == torch.int32 and int(batch["boundaries"][-1]) == batch["input_ids"].numel()
