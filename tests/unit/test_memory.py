"""memory.py: its counts against known models and peft, its bytes against tensors that were really made."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, call
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import finetune
from llm_jepa.cli import UsageError
from llm_jepa.large import memory
from llm_jepa.large.memory import Recipe
from llm_jepa.model import load_model, load_tokenizer

TINY = {"vocab_size": 515, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "tie_word_embeddings": True}  # fmt: skip
LLAMA_8B = LLAMA_1B | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
                       "tie_word_embeddings": False}  # fmt: skip
needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")


def shape(folder: Path, **values) -> str:
    """A folder with a Llama's config.json and nothing else."""
    LlamaConfig(**values, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("values", "parameters"), [(LLAMA_8B, 8_030_261_248), (LLAMA_1B, 1_235_814_400)])
def test_parameters_of_the_published_models(tmp_path, values, parameters):
    found = memory.plan(Recipe(model_name=shape(tmp_path, **values), optim="adamw_torch_fused"))
    assert found["parameters"] == found["trainable"] == parameters
    assert found["saved_model"] == found["on"][0]["weights"] == 4 * parameters
    assert found["on"][0]["gradients"] == 4 * parameters and found["on"][0]["optimiser"] == 8 * parameters
    assert found["checkpoint"] == 12 * parameters
    layer = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    if values is LLAMA_8B:
        assert found["largest_layer"] == layer
        assert found["embedding_unit"] == 128256 * 4096 and found["tail_unit"] == 128256 * 4096 + 4096
        assert found["embedding_unit"] + found["tail_unit"] == parameters - 32 * layer


def test_an_adapter_is_counted_as_peft_makes_it(tmp_path):
    model = str(GOLDEN / "models/llama3")
    s = finetune.Settings(model_name=model, lora=True, lora_rank=6, predictors=2)
    real = load_model(s, load_tokenizer(s))
    trained = [p for p in real.parameters() if p.requires_grad]
    found = memory.plan(Recipe(model_name=model, lora=True, lora_rank=6, predictors=2))
    assert found["trainable"] == sum(p.numel() for p in trained)
    assert found["saved_model"] == sum(p.nbytes for p in trained) == found["on"][0]["gradients"]
    less = memory.plan(Recipe(model_name=model, lora=True, lora_rank=6))
    assert found["trainable"] - less["trainable"] == 2 * real.config.hidden_size
    whole = memory.plan(Recipe(model_name=model))
    assert less["parameters"] == whole["parameters"] == whole["trainable"]


def test_the_8b_adapter_by_hand(tmp_path):
    found = memory.plan(Recipe(model_name=shape(tmp_path, **LLAMA_8B), lora=True, lora_rank=16, predictors=1))
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)  # q, o; k, v; gate, up, down
    assert found["trainable"] == 32 * 16 * sides + 4096
    assert found["on"][0]["weights"] == 2 * 8_030_261_248 + 4 * found["trainable"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_a_model_trained_a_step(tmp_path, dtype, tied):
    values = TINY | {"tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**values)).to(getattr(torch, dtype))
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimiser.step()
    moments = [t for s in optimiser.state.values() for n, t in s.items() if n != "step"]
    recipe = Recipe(model_name=shape(tmp_path, **values), param_dtype=dtype, optim="adamw_torch_fused")
    one = memory.plan(recipe)["on"][0]
    assert one["weights"] == sum(p.nbytes for p in model.parameters())
    assert one["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert one["optimiser"] == sum(t.nbytes for t in moments)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert one["gathered"] == (2 * linear if dtype == "float32" else 0)


@needs_bitsandbytes
def test_bytes_of_eight_bit_moments(tmp_path):
    import bitsandbytes

    model = LlamaForCausalLM(LlamaConfig(**TINY))
    optimiser = bitsandbytes.optim.AdamW8bit(model.parameters())
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})  # as transformers does
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimiser.step()
    state = [s for s in optimiser.state.values()]
    real = sum(s[n].nbytes for s in state for n in ("state1", "state2", "absmax1", "absmax2") if n in s)
    recipe = Recipe(model_name=shape(tmp_path, **TINY), param_dtype="float32", optim="adamw_bnb_8bit")
    assert memory.plan(recipe)["on"][0]["optimiser"] == real


@needs_bitsandbytes
def test_bytes_of_a_base_in_four_bits(tmp_path):
    values = TINY | {"hidden_size": 128, "intermediate_size": 256}
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    real = sum(p.nbytes for p in quantised.parameters())
    real += sum(p.quant_state.absmax.nbytes for p in quantised.parameters() if hasattr(p, "quant_state"))
    found = memory.plan(Recipe(model_name=str(tmp_path), lora=True, load_in_4bit=True))
    assert found["on"][0]["weights"] == real + 4 * found["trainable"]


@pytest.mark.parametrize("gpus", [2, 7, 8])
def test_each_gpu_holds_a_share_of_every_first_dimension(tmp_path, gpus):
    recipe = Recipe(model_name=shape(tmp_path, **TINY), param_dtype="float32", gpus=str(gpus))
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    first = sum(p.chunk(gpus)[0].nbytes for p in model.parameters())  # the fullest
    found = memory.plan(recipe)
    (one,) = found["on"]
    assert (one["weights"], one["gradients"], one["optimiser"]) == (first, first, 2 * first)
    assert one["checkpoint_shard"] == 3 * first
    tail = 515 * 64 + 64
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert one["gathered"] == 2 * (tail + 2 * layer) and one["reduced"] == 6 * max(tail, layer)
    parts = sum(one[n] for n in memory.PARTS)
    assert one["peak"] == int(1.05 * parts + 2 * 2**30)


def test_what_is_not_shared_out_is_on_every_gpu(tmp_path):
    flags = {"lora": True, "gpus": "1,8", "optim": "adamw_torch_fused"}
    untied = shape(tmp_path / "untied", **TINY)
    tied = shape(tmp_path / "tied", **TINY | {"tie_word_embeddings": True})
    for model, more, shared in ((untied, {}, True), (untied, {"load_in_4bit": True}, False), (tied, {}, False)):
        one, eight = memory.plan(Recipe(model_name=model, **flags, **more))["on"]
        assert (eight["weights"] == one["weights"]) != shared
        assert shared or eight["reduced"] == eight["gradients"] == one["gradients"] and one["reduced"] == 0
        copies = memory.plan(Recipe(model_name=model, **flags, **more, sharding="ddp"))["on"][1]
        assert copies["weights"] == one["weights"] and copies["peak"] == pytest.approx(
            one["peak"] + 1.05 * one["gradients"], abs=2
        )


def test_the_usual_optimiser_of_one_gpu_has_eight_bits(tmp_path):
    model = shape(tmp_path, **TINY)
    one, two = memory.plan(Recipe(model_name=model, gpus="1,2"))["on"]
    named = [
        memory.plan(Recipe(model_name=model, gpus="1,2", optim=o))["on"] for o in ("adamw_bnb_8bit", "adamw_torch")
    ]
    assert one["optimiser"] == named[0][0]["optimiser"] < named[1][0]["optimiser"]
    assert two["optimiser"] == named[1][1]["optimiser"]
    assert memory.plan(Recipe(model_name=model, lora=True))["on"][0]["optimiser"] == pytest.approx(
        memory.plan(Recipe(model_name=model, lora=True, optim="adamw_torch"))["on"][0]["optimiser"]
    )


def test_activations_by_hand(tmp_path):
    d, i, heads, kv = 64, 192, 64, 32  # of all query heads, of all key-value heads
    recipes = {t: Recipe(model_name=shape(tmp_path, **TINY), param_dtype="bfloat16", tokens=t) for t in (256, 512)}
    by = {t: memory.plan(recipe)["on"][0] for t, recipe in recipes.items()}
    assert [by[t]["hidden"] for t in by] == [4 * t * d * 2 + 3 * t * t for t in by]
    model = memory.meta_model(Recipe(model_name=str(tmp_path)))
    decoder, layers = model.get_decoder(), model.get_decoder().layers
    few, many = (memory.layer_activations(decoder, layers[-1], t) for t in (256, 512))
    slope = (many - few) / 256
    assert few == 256 * slope, "tokens alone count, no weights"
    norms = 2 * (4 * d + 4 + 2 * d + 2 * d)  # in float32, its root mean square, in bfloat16, with the weight applied
    attention = 2 * (3 * heads + heads) + 4 * 4  # queries, keys and values repeated, output; one number of 4 heads
    mlp = 4 * 2 * i  # gate, its activation, up, their product
    angles = 2 * 2 * 16
    assert slope == pytest.approx(norms + attention + mlp + angles, rel=0.05) and kv < heads


def test_logits_are_counted_to_a_slice_at_most(tmp_path):
    values = TINY | {"vocab_size": 128256}
    few, many, more = (
        memory.plan(Recipe(model_name=shape(tmp_path, **values), tokens=t))["on"][0]["working"] for t in (8, 523, 4096)
    )
    assert few == 16 * 8 * 128256 and many == more == 16 * (finetune.SLICE // 128256) * 128256


def test_tokens_of_a_micro_batch(tmp_path):
    recipe = Recipe(model_name=shape(tmp_path, **TINY), batch_size=3, max_length=100)
    assert memory.plan(recipe)["tokens"] == 600
    assert memory.plan(dataclasses.replace(recipe, regular=True))["tokens"] == 300
    assert memory.plan(dataclasses.replace(recipe, tokens=77))["tokens"] == 77


def test_the_script(tmp_path):
    model = shape(tmp_path / "model", **TINY)
    done = call("llm_jepa.memory", "--model_name", model, "--tokens", 64, "--gpus", "1,4", "--json")
    assert done.code == 0 and json.loads(done.out) == memory.plan(Recipe(model_name=model, tokens=64, gpus="1,4"))
    shown = call("llm_jepa.memory", "--model_name", model, "--gpus", "1,8").out
    assert "1 GPU " in shown and "8 GPUs" in shown and "peak" in shown and "GiB a checkpoint" in shown


@pytest.mark.parametrize(
    "text", [None, "{}", "not JSON", '{"model_type": "vit"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_bad_model_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    done = call("llm_jepa.memory", "--model_name", tmp_path)
    assert done.code == 2 and str(tmp_path) in done.err and done.out == "" and "Traceback" not in done.err


def test_all_wrong_flags_are_named_together(tmp_path):
    with pytest.raises(UsageError) as error:
        memory.plan(Recipe(load_in_4bit=True, gpus="8,x", optim="sgd", tokens=-1, lora_rank=0))
    for name in ("--model_name", "--load_in_4bit", "--gpus 8,x", "--optim sgd", "--tokens -1", "--lora_rank 0"):
        assert name in str(error.value)
