"""The cost of a training step: logits in memory, waits for the device, shapes that a compiler gets."""

import itertools

import pytest
import torch
from conftest import EXAMPLES, GOLDEN, JEPA, MODEL, column, dry_run, make_model, message_row, start, train, write_rows
from test_terms import prepared
from torch._inductor import cpp_builder
from transformers import AutoConfig, AutoModelForCausalLM

import finetune
from llm_jepa.losses import Term
from llm_jepa.training.flops import FlopCounter

DATA = GOLDEN / "regex_rows.jsonl"


def test_attention_kernel_changes_no_number():
    flags = ("--train_file", DATA, "--model_name", MODEL, "--dry_run", 8, *JEPA)
    usual, eager = dry_run(*flags), dry_run(*flags, "--attn_implementation", "eager")
    for key in ("lm_loss", "jepa_loss", "total_loss", "grad_norm"):
        assert eager[key] == pytest.approx(usual[key], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- logits


def loaded(**flags: object) -> tuple[finetune.Parts, dict]:
    """A run's parts after the checks, and its first examples as a batch."""
    parts = prepared(DATA, dry_run=4, predictors=1, lm_labels="all", **flags)
    parts.inspect(half=False)
    return parts, parts.collator(parts.train_set.items)


@pytest.mark.parametrize("training", [True, False])
def test_slices_change_no_gradient_keep_no_logits_and_restore_the_model(training):
    parts, batch = loaded()
    selector, gradients, kept = parts.selector, [], []
    parts.model.train(training)
    for limit in (selector.max_logits, 7 * selector.vocab_size):
        selector.max_logits, shapes = limit, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=shapes: to.append(x.shape) or x, lambda x: x):
            loss, states = selector.lm_sum(parts.model, batch)
        kept.append([s for s in shapes if s[-1:] == (selector.vocab_size,) and s[0] != parts.model.config.hidden_size])
        (loss + states.views.square().sum()).backward()
        gradients.append([p.grad.clone() for p in parts.model.parameters()])
        parts.model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert kept[0] and not kept[1]
    assert "forward" not in vars(parts.model.get_output_embeddings())
    assert parts.model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, selector.vocab_size)


def test_model_that_changes_logits_after_the_output_layer_gets_all_of_them(tmp_path):
    """Gemma 2 caps its logits."""
    sizes = {"vocab_size": 531, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
             "num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": 0.5}  # fmt: skip
    make_model(tmp_path, "gemma2", "google_gemma", **sizes)
    parts, batch = loaded(model_name=str(tmp_path))
    before = parts.selector.lm_sum(parts.model, batch)[0]
    parts.selector.max_logits = 1000
    assert not parts.selector.slices and parts.selector.lm_sum(parts.model, batch)[0].equal(before)


def test_loss_that_reads_logits_gets_all_of_them():
    parts, batch = loaded()
    parts.selector.max_logits = 1000
    assert parts.selector.lm_sum(parts.model, batch)[1].logits.shape[1] == 1
    parts.terms.append(Term("z", ("logits",), "labels", len, 1.0))
    parts.inspect(half=False)
    assert parts.selector.lm_sum(parts.model, batch)[1].logits.shape[1] == parts.selector.vocab_size


# ----------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(("layout", "lora", "checkpointing"), [("packed", True, False), ("separate", False, True)])
def test_attention_counts_whatever_the_kernel(layout, lora, checkpointing):
    """Against torch's count of eager attention, which consists of matrix products that torch has formulas for."""
    counted = []
    for kernel in ("eager", "sdpa"):
        parts, batch = loaded(layout=layout, lora=lora, lora_dropout=0.0, attn_implementation=kernel)
        if checkpointing:
            parts.model.activation_checkpointing_enable()
        parts.model.train()
        with FlopCounter() as counter:
            loss, states = parts.selector.lm_sum(parts.model, batch)
            (loss + states.views.sum()).backward()
        counted.append(counter.get_total_flops())
    (rows, width), config = batch["input_ids"].shape, parts.model.config
    scores = 2 * rows * width**2 * config.num_attention_heads * config.head_dim
    assert counted[1] == counted[0] + config.num_hidden_layers * scores  # the fused kernel computes them again


def test_experts_count_whatever_the_kernel():
    counted = []
    for experts in ("eager", "grouped_mm"):
        config = AutoConfig.for_model(
            "qwen3_moe", vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=4,
            num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, experts_implementation=experts)
        with FlopCounter() as counter:
            model(input_ids=torch.arange(20)[None]).logits.sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


@torch.library.custom_op("flash_test::_flash_attn_varlen_forward", mutates_args=())
def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> torch.Tensor:
    """An attention kernel with the arguments of flash-attn's."""
    return q.clone()


@torch.library.custom_op("flash_test::scan", mutates_args=())
def scan(x: torch.Tensor) -> torch.Tensor:
    """An operator that nothing is known of."""
    return x.clone()


def test_flash_kernels_count_and_unknown_operators_are_reported_once(capsys):
    q, k, begins = torch.ones(10, 4, 6), torch.ones(10, 2, 6), torch.tensor([0, 3, 10], dtype=torch.int32)
    with FlopCounter() as counter:
        varlen(q, k, k, begins, begins)
    assert counter.get_total_flops() == 2 * 2 * (3 * 3 + 7 * 7) * 4 * 6 and "varlen" not in capsys.readouterr().err
    with FlopCounter() as counter:
        scan(scan(q) @ q.mT)
    assert counter.get_total_flops() == 2 * 10 * 4 * 6 * 4
    assert capsys.readouterr().err.count("flash_test.scan") == 1


# ------------------------------------------------------------------------------------------------ waits and shapes


# Calls that copy a number from the device to the host, which waits for the device.
WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "is_nonzero",
         "__contains__", "equal")  # fmt: skip


def test_step_waits_for_the_device_once(tmp_path, monkeypatch):
    """The waits of additional steps, so that loading and the first steps do not count."""
    data, calls, waits = write_rows(tmp_path / "rows.jsonl", 3 * EXAMPLES), [], {}  # 12 steps in an epoch
    for owner, name in itertools.product((torch, torch.Tensor), WAITS):
        if real := getattr(owner, name, None):
            monkeypatch.setattr(owner, name, lambda *x, real=real, **y: calls.append(real) or real(*x, **y))
    for steps in (3, 5, 9):
        calls.clear()
        train(data, tmp_path / f"{steps}", *JEPA, "--batch_size", 2, "--grad_accum", 3, "--max_steps", steps,
              "--save_strategy", "no", "--logging_steps", 100, "--lr_scheduler_type", "constant")  # fmt: skip
        waits[steps] = len(calls)
    assert waits[9] - waits[5] == 4 and waits[5] - waits[3] == 2, waits


@pytest.mark.parametrize(
    "flags",
    [(*JEPA, "--jepa_ratio", 0.5, "--lora", "--eval_generate", 1),
     ("--regular", "--stp", "geodesic", "--stp_lbd", 1, "--stp_layer", 1, "--gradient_checkpointing"),
     (*JEPA, "--nitp", "--nitp_layer", 1, "--jepa_loss", "clip", "--negatives_queue", 9, "--sigreg", 0.1)],
    ids=["lora", "stp-checkpointing", "nitp-clip-sigreg"],
)  # fmt: skip
def test_compiler_gets_few_graphs_and_changes_no_number(tmp_path, monkeypatch, flags):
    """12 steps with other numbers of rows, tokens, labels, pairs and spans, evaluated after each half."""
    rows = [message_row("q" * (1 + 37 * i % 101), f"({'a' * (1 + 17 * i % 53)})") for i in range(18)]
    data, graphs = write_rows(tmp_path / "rows.jsonl", rows), []
    compile_with = torch.compile

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_with(*args, backend=count, **options))
    flags = (*flags, "--batch_size", 3, "--grad_accum", 1, "--num_epochs", 2, "--eval_file", data)
    plain = train(data, tmp_path / "plain", *flags)
    torch._dynamo.reset()
    assert not graphs
    compiled = train(data, tmp_path / "compiled", *flags, "--torch_compile")
    torch._dynamo.reset()
    assert 0 < len(graphs) <= 4, len(graphs)
    for key in ("loss", "lm_loss", "grad_norm", "eval_loss"):
        assert column(compiled, key) == pytest.approx(column(plain, key), rel=1e-4), key
    assert len(set(column(compiled, "padding"))) > 3


def test_compiling_without_a_compiler_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-compiler",))
    assert "--torch_compile" in start(data, tmp_path / "run", "--torch_compile", code=2).err
