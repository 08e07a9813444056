"""Other architectures than Llama's: which hidden states are read, and what is refused in one line before training."""

import contextlib
import itertools
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import survey
import torch
from conftest import JEPA, call, column, dry_run, make_model, message_row, random_model, start, train, write_rows
from transformers import modeling_utils
from transformers.modeling_utils import AttentionInterface

import evaluate
import finetune
from llm_jepa.cli import UsageError
from llm_jepa.data.segments import Segment
from llm_jepa.projectors import add_projectors

SIZE = {"vocab_size": 531, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "pad_token_id": 10, "max_position_embeddings": 512}  # fmt: skip
ALTUP = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 531, "laurel_rank": 4, "head_dim": 8,
         "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [32, 32],
         "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
MAMBA = {"vocab_size": 531, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 10}
XLNET = {"vocab_size": 531, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "pad_token_id": 10}
MODERN = SIZE | {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1, "local_attention": 64}
LONGCAT = {"vocab_size": 531, "hidden_size": 16, "ffn_hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
           "n_routed_experts": 4, "zero_expert_num": 1, "moe_topk": 2, "expert_ffn_hidden_size": 16, "kv_lora_rank": 8,
           "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}  # fmt: skip


# kind → (sizes, its list of blocks)
MODELS = {
    "mamba": (MAMBA, "backbone.layers"),
    "modernbert-decoder": (MODERN, "model.layers"),
    "xlm": ({"vocab_size": 531, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "causal": True}, "transformer.attentions"),
    "longcat_flash": (LONGCAT, "model.layers"),
    "gemma3n_text": (SIZE | ALTUP, None),
    "xlnet": (XLNET, None),
}


@cache
def model(kind: str):
    """A model with a projector."""
    made = random_model(kind, std=0.2, **MODELS[kind][0]).eval()
    add_projectors(made, ["nitp"], 0)
    return made


def segment(kind: str, length: int) -> Segment:
    return Segment(kind, np.arange(20, 20 + length), np.zeros(length, dtype=bool), 3)


VIEWS = [segment("text_view", 6), segment("code_view", 8)]


def received(of: torch.nn.Module, module: torch.nn.Module) -> torch.Tensor:
    """What a module of the model receives (T, D) when the model reads the Code view."""
    seen = []
    hook = module.register_forward_pre_hook(lambda m, args, kwargs: seen.append([*args, *kwargs.values()][0]),
                                            with_kwargs=True)  # fmt: skip
    with torch.no_grad():
        of(input_ids=torch.tensor(VIEWS[1].ids)[None], use_cache=False)
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("kind", [kind for kind, (_, blocks) in MODELS.items() if blocks])
def test_evaluation_and_training_read_what_the_block_or_the_output_layer_receives(kind):
    made, blocks = model(kind), model(kind).get_submodule(MODELS[kind][1])
    batch = finetune.Collator("separate", 10, 1)([tuple(VIEWS)])
    batch["path_at"] = torch.tensor([[[1]], [[5]]])  # of the Code view
    batch["next_at"] = torch.tensor([[1], [4]])
    last = received(made, made.get_output_embeddings())
    for layer in (0, 1, -1, -2, -3):
        expected = received(made, made.get_output_embeddings() if layer == -1 else blocks[layer % 3])
        with evaluate.layer_states(made, 10, layer) as read, torch.no_grad():
            torch.testing.assert_close(read(VIEWS)[1], expected, rtol=1e-5, atol=1e-5)
        selector = finetune.LMHeadSelector(made, layer, target_layer=layer)
        with contextlib.closing(selector), torch.no_grad():
            states = selector.read(made, batch)
            projected = made.projectors["nitp"](last[4])
        torch.testing.assert_close(states.path[0, 0], expected[5], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states.target[0], expected[5], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states.predicted[0], projected, rtol=1e-5, atol=1e-5)
        if layer == -1:
            torch.testing.assert_close(states.views[1, 0], expected[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma3n_text", "xlnet"])
def test_layer_without_one_state_per_token_is_refused(kind):
    with evaluate.layer_states(model(kind), 10, -1) as read, torch.no_grad():
        assert read(VIEWS).shape == (2, 8, 16)
    for layer in (0, 1):
        with evaluate.layer_states(model(kind), 10, layer) as read, torch.no_grad():
            with pytest.raises(UsageError, match=f"--embedding_layer {layer}: "):
                read(VIEWS)
        selector = finetune.LMHeadSelector(model(kind), target_layer=layer)
        with contextlib.closing(selector), pytest.raises(UsageError, match=f"--nitp_layer {layer}: "):
            selector.read(model(kind), finetune.Collator("separate", 10, 1)([tuple(VIEWS)]))


# ------------------------------------------------------------------------------------------ windows and dense masks

WINDOWED = {
    "gemma3_text": {"head_dim": 8, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"head_dim": 8, "attention_chunk_size": 32, "num_local_experts": 2, "intermediate_size_mlp": 32,
                    "layer_types": ["chunked_attention", "full_attention"]},
    "mistral": {"sliding_window": 32},
}  # fmt: skip
LONG = message_row("a long text " * 8, "x")


def same_figures(data: Path, model: Path, *layouts: str) -> None:
    """Asserts that the layouts have the losses and gradients of separate rows."""
    flags = ("--train_file", data, "--model_name", model, "--dry_run", 4, *JEPA, "--layout")
    separate = dry_run(*flags, "separate")
    for found in (dry_run(*flags, layout) for layout in layouts):
        for key in ("lm_loss", "jepa_loss", "grad_norm"):
            assert found[key] == pytest.approx(separate[key], rel=1e-4)


@pytest.mark.parametrize("kind", WINDOWED)
def test_dense_mask_is_refused_if_any_row_is_longer_than_the_window(kind, tmp_path):
    made = make_model(tmp_path / "model", kind, **SIZE | WINDOWED[kind])
    short = write_rows(tmp_path / "short.jsonl", [message_row("a", "b", None)] * 4)
    longer = write_rows(tmp_path / "long.jsonl", [message_row("a", "b", None)] * 3 + [LONG])
    flags = ("--model_name", made, "--max_steps", 1, "--predictors", 1, "--lbd", 1)
    for dense in (("--layout", "additive"), ("--text_view", "in_chat", "--layout", "separate")):
        for data in (("--train_file", longer), ("--train_file", short, "--eval_file", longer)):
            done = call("finetune", *data, *flags, *dense, "--output_dir", tmp_path / "run")
            assert done.code == 2 and dense[0] in done.err and "32 tokens" in done.err
            assert not (tmp_path / "run").exists()
    same_figures(short, made, "additive")
    same_figures(longer, made, "packed")
    # The length of a stream is not known before it ends.
    stream = ("--train_file", short, "--streaming", "--layout", "additive", "--dry_run", 4, "--max_length")
    for limit, code in ((32, 0), (33, 2)):
        assert call("finetune", "--model_name", made, *JEPA, *stream, limit).code == code


@pytest.mark.parametrize("unused", [{"layer_types": ["full_attention"] * 2}, {"use_sliding_window": False}], ids=str)
def test_window_that_no_layer_uses_is_not_refused(unused, tmp_path):
    kind = "qwen2" if "use_sliding_window" in unused else "gemma3_text"
    made = make_model(tmp_path / "model", kind, **SIZE | {"head_dim": 8, "sliding_window": 8} | unused)
    same_figures(write_rows(tmp_path / "rows.jsonl", [message_row("a", "b"), LONG] * 2), made, "additive")


# --------------------------------------------------------------------------------------------- the packing probe


@pytest.fixture
def kernel(monkeypatch):
    """A function: registers an attention kernel that tells packed segments apart by cu_seq_lens, with a leak.

    `odd`: the number of the call whose result is wrong, as of a kernel that does not always repeat its results.
    """
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None)

    def register(name: str, leak: float, odd: int = -1) -> str:
        calls = itertools.count()

        def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            scores = (query @ key.transpose(-1, -2)).float() * (scaling or query.shape[-1] ** -0.5)
            place = torch.arange(query.shape[2])
            bias = torch.where(place <= place[:, None], 0.0, -math.inf)
            if kwargs.get("cu_seq_lens_q") is not None and len(query) == 1:
                assert attention_mask is None and kwargs["max_length_q"] >= kwargs["cu_seq_lens_q"].diff().max()
                number = torch.searchsorted(kwargs["cu_seq_lens_q"][1:].long(), place, right=True)
                bias = bias + torch.where(number == number[:, None], 0.0, math.log(leak) if leak else -math.inf)
            out = (scores + bias).softmax(-1).to(value.dtype) @ value * (1.1 if next(calls) == odd else 1)
            return out.transpose(1, 2).contiguous(), None

        AttentionInterface.register(name, attention)
        return name

    return register


MIXTRAL = SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 32}


def test_leak_between_packed_segments_is_refused_whatever_its_size(data, kernel, tmp_path):
    for kind, sizes, leaks in (("llama", SIZE, (0, 1e-3, 1e-4)), ("mixtral", MIXTRAL, (0, 1e-2))):
        made = make_model(tmp_path / kind, kind, **sizes)
        for number, leak in enumerate(leaks):
            name = kernel(f"flash_{kind}_{number}", leak)
            done = start(data, tmp_path / name, *JEPA, "--max_steps", 1, "--attn_implementation", name, model=made)
            assert done.code == (2 if leak else 0), (name, done.err)
            assert not leak or "--layout separate" in done.err


def test_a_kernel_that_once_does_not_repeat_its_result_is_no_leak(data, kernel, tmp_path):
    made = make_model(tmp_path / "llama", "llama", **SIZE)
    for odd in range(3):
        name = kernel(f"flash_odd_{odd}", 0, odd)
        start(data, tmp_path / name, *JEPA, "--max_steps", 1, "--attn_implementation", name, model=made, code=0)


# ------------------------------------------------------------------------------------------------------- refusals

CTRL = {"vocab_size": 531, "n_embd": 16, "dff": 32, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    ("kind", "sizes", "flags", "mentioned"),
    [("mamba", MAMBA, "", "--layout separate"), ("mamba", MAMBA, "--regular", "--layout separate"),
     ("mamba", MAMBA, "--dry_run 3", "--layout separate"), ("phi", SIZE, "--lora --plain", "--lora --plain"),
     ("xlm", MODELS["xlm"][0], "--layout additive", "--layout"), ("ctrl", CTRL, "--gradient_checkpointing", "--grad")],
)  # fmt: skip
def test_what_an_architecture_cannot_do_is_refused_before_the_run_begins(kind, sizes, flags, mentioned, data, tmp_path):
    made, jepa = make_model(tmp_path / "model", kind, **sizes), () if flags == "--regular" else JEPA
    done = start(data, tmp_path / "run", *jepa, "--max_steps", 1, *flags.split(), model=made)
    last = done.err.splitlines()[-1].lower()
    assert done.code == 2 and all(word in last for word in (kind, *mentioned.split()))
    assert not (tmp_path / "run").exists()


def test_padding_leaves_gradients_finite(data, tmp_path):
    made = make_model(tmp_path / "model", "gemma3n_text", **SIZE | ALTUP)
    for layout in ("additive", "separate"):  # their rows are padded
        flags = ("--layout", layout, "--max_steps", 2, *JEPA)
        run = train(data, tmp_path / layout, *flags, model=made)
        assert all(map(math.isfinite, column(run, "grad_norm")))


def test_survey_writes_the_table(tmp_path):
    survey.main(tmp_path / "table.md", "mamba", "llama")
    table = (tmp_path / "table.md").read_text()
    assert "| llama | ok | ok | ok | ok |" in table
    assert table.index("| llama |") < table.index("| mamba | ok, separate rows |")
    ok, refused = dict.fromkeys(survey.COLUMNS, "ok"), {"training": "refused: a|b"}
    page = survey.page({"c": ok, "b": refused, "a": ok})
    assert page.index("| a, c | ok | ok | ok | ok |") < page.index("| b | refused: a/b |  |  |  |")
