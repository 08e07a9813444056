"""The memory plan: counts compared with known models and peft, bytes with allocated tensors."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MODEL, call
from safetensors.torch import load_file
from templates import LLAMA_1B, LLAMA_8B
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import finetune
from llm_jepa.large import memory
from llm_jepa.large.settings import LargeSettings
from llm_jepa.losses import nitp_loss
from llm_jepa.model import load_tokenizer
from llm_jepa.projectors import Projector

TINY = {"vocab_size": 515, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")


def config_folder(folder: Path, **values) -> str:
    """A folder that has only a Llama's config.json."""
    LlamaConfig(**values, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def plan(model: str, *gpus: int, **flags) -> dict:
    return memory.plan(LargeSettings(model_name=model, **flags), gpus or (1,))


def trained_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("values", "parameters"), [(LLAMA_8B, 8_030_261_248), (LLAMA_1B, 1_235_814_400)])
def test_parameters_of_published_models(tmp_path, values, parameters):
    found = plan(config_folder(tmp_path, **values), optim="adamw_torch_fused")
    (one,) = found["on"]
    assert found["parameters"] == found["trainable"] == parameters
    assert found["saved_model"] == one["weights"] == one["gradients"] == 4 * parameters
    assert one["optimizer"] == 8 * parameters and found["checkpoint"] == 12 * parameters


@pytest.mark.parametrize("rows", [531, 525, 540])  # of the embedding; the tokenizer has 531 tokens
def test_adapter_has_the_parameters_of_the_training(rows, tmp_path):
    model = str(shutil.copytree(MODEL, tmp_path / "model"))
    config = AutoConfig.from_pretrained(model, vocab_size=rows)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    s = finetune.Settings(model_name=model, lora=True, lora_rank=6, predictors=2)
    real = finetune.load_on_device(s, load_tokenizer(model), torch.device("cpu"))
    trained = [p for p in real.parameters() if p.requires_grad]
    real.save_pretrained(tmp_path / "adapter")
    found = plan(model, lora=True, lora_rank=6, predictors=2)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found["saved_model"] == sum(w.nbytes for w in stored.values())
    assert found["trainable"] == sum(p.numel() for p in trained)
    assert found["saved_model"] == sum(p.nbytes for p in trained) == found["on"][0]["gradients"]
    regular = plan(model, lora=True, lora_rank=6, predictors=2, regular=True)
    assert found["trainable"] - regular["trainable"] == 2 * real.config.hidden_size
    assert regular["parameters"] == plan(model)["parameters"]
    load_tokenizer(model).save_pretrained(tmp_path / "adapter")
    continued = ("--model_name", tmp_path / "adapter", "--predictors", 2)
    assert json.loads(call("llm_jepa.memory", *continued, "--lora", "--json").out)["trainable"] == found["trainable"]
    done = call("llm_jepa.memory", *continued)
    assert done.code == 2 and "adapter" in done.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_trained_model(tmp_path, dtype, tied):
    values = TINY | {"tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**values)).to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    trained_step(model, optimizer)
    moments = [t for s in optimizer.state.values() for n, t in s.items() if n != "step"]
    (one,) = plan(config_folder(tmp_path, **values), param_dtype=dtype, optim="adamw_torch_fused")["on"]
    assert one["weights"] == sum(p.nbytes for p in model.parameters())
    assert one["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert one["optimizer"] == sum(t.nbytes for t in moments)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert one["gathered"] == (2 * linear if dtype == "float32" else 0)


@needs_bitsandbytes
def test_bytes_of_eight_bit_moments(tmp_path):
    import bitsandbytes

    model = LlamaForCausalLM(LlamaConfig(**TINY))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})  # as transformers does
    trained_step(model, optimizer)
    names = ("state1", "state2", "absmax1", "absmax2")
    real = sum(s[n].nbytes for s in optimizer.state.values() for n in names if n in s)
    assert plan(config_folder(tmp_path, **TINY), optim="adamw_bnb_8bit")["on"][0]["optimizer"] == real


@needs_bitsandbytes
def test_bytes_of_four_bit_weights(tmp_path):
    values = TINY | {"hidden_size": 128, "intermediate_size": 256}
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(tmp_path)
    four = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **four)
    real = sum(p.nbytes for p in quantized.parameters())
    real += sum(p.quant_state.absmax.nbytes for p in quantized.parameters() if hasattr(p, "quant_state"))
    found = plan(str(tmp_path), lora=True, load_in_4bit=True)
    assert found["on"][0]["weights"] == real + 4 * found["trainable"]


@pytest.mark.parametrize("gpus", [2, 7, 8])
def test_fsdp_shards_every_first_dimension(tmp_path, gpus):
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    (one,) = plan(config_folder(tmp_path, **TINY), gpus)["on"]
    largest = sum(p.chunk(gpus)[0].nbytes for p in model.parameters())
    assert (one["weights"], one["gradients"], one["optimizer"]) == (largest, largest, 2 * largest)
    assert one["checkpoint_shard"] == 3 * largest
    head = 515 * 64 + 64  # and the last norm
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert one["gathered"] == 2 * (head + 2 * layer) and one["reduced"] == 6 * max(head, layer)
    assert one["peak"] == int(1.05 * sum(one[n] for n in memory.PARTS) + 2 * 2**30)


@pytest.mark.parametrize(("tied", "more", "sharded"), [(False, {}, True), (False, {"load_in_4bit": True}, False),
                                                       (True, {}, False)])  # fmt: skip
def test_ddp_copies_are_on_every_gpu(tmp_path, tied, more, sharded):
    model = config_folder(tmp_path, **TINY | {"tie_word_embeddings": tied})
    one, eight = plan(model, 1, 8, lora=True, **more)["on"]
    assert (eight["weights"] < one["weights"]) == sharded
    copies = plan(model, 8, lora=True, sharding="ddp", **more)["on"][0]
    assert copies["weights"] == one["weights"] and copies["reduced"] == one["gradients"]
    assert sharded or eight == copies


def test_default_optimizer_of_one_gpu_has_eight_bits(tmp_path):
    model = config_folder(tmp_path, **TINY)
    default, eight, full = (
        [one["optimizer"] for one in plan(model, 1, 2, optim=optim)["on"]]
        for optim in ("auto", "adamw_bnb_8bit", "adamw_torch")
    )
    assert default == [eight[0], full[1]] and eight[0] < full[0]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("gpus", [1, 8])
def test_projectors_train_but_are_not_saved(tmp_path, gpus, lora):
    model, projector = config_folder(tmp_path, **TINY), 12 * TINY["hidden_size"] ** 2
    terms = {"nitp": True, "sigreg": 0.05}
    plain, more = (plan(model, gpus, lora=lora, optim="adamw_torch", **x) for x in ({}, terms))
    for key, size in (("trainable", 2), ("parameters", 0), ("saved_model", 0), ("checkpoint", 2 * 3 * 4)):
        assert more[key] - plain[key] == size * projector, key
    (before,), (now,) = plain["on"], more["on"]
    for key, size in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
        assert now[key] - before[key] == 2 * size * projector // gpus, key
    assert now["hidden"] > before["hidden"]
    if gpus > 1:  # gathered from the beginning of a forward pass to the end of the backward pass
        assert now["gathered"] - before["gathered"] == 2 * 2 * projector
        assert now["reduced"] >= 6 * 2 * projector


def test_activations_of_a_projection_are_those_of_real_tensors():
    projector, states = Projector(64).bfloat16(), torch.randn(2, 100, 64, dtype=torch.bfloat16)
    real = memory.saved_bytes(projector, lambda: nitp_loss(projector(states[0]), states[1]))
    assert memory.nitp_activations(64, tokens=100) == real


@pytest.mark.parametrize("lora", [False, True])
def test_compared_gradients_are_a_second_copy_where_they_are_not_sharded(tmp_path, lora):
    model = config_folder(tmp_path, **TINY)
    usual, compared = (plan(model, 1, 8, gradient_stats=n, lora=lora) for n in (0, 100))
    assert compared["on"][0]["gradients"] == 2 * usual["on"][0]["gradients"]
    assert compared["on"][0]["checkpoint_shard"] == usual["on"][0]["checkpoint_shard"]
    assert compared["on"][1] == usual["on"][1] and compared["checkpoint"] == usual["checkpoint"]


def test_activations_by_hand(tmp_path):
    folder, d, i, heads = config_folder(tmp_path, **TINY), 64, 192, 64  # `heads`: size of all query heads
    for t in (256, 512):
        (one,) = plan(folder, param_dtype="bfloat16", tokens_per_batch=t)["on"]
        assert one["hidden"] == 4 * t * d * 2 + 3 * t * t
    s = LargeSettings(model_name=folder)
    decoder = memory.meta_model(s, memory.plan_tokenizer(s)).get_decoder()
    few, many = (memory.layer_activations(decoder, decoder.layers[-1], t) for t in (256, 512))
    slope = (many - few) / 256
    assert few == 256 * slope, "weights are counted"
    norms = 2 * (4 * d + 4 + 2 * d + 2 * d)  # in float32, root mean square, in bfloat16, times the weight
    attention = 2 * (3 * heads + heads) + 4 * 4  # queries, repeated keys and values, output; a float for each head
    mlp = 4 * 2 * i  # gate, its activation, up, their product
    angles = 2 * 2 * 16
    assert slope == pytest.approx(norms + attention + mlp + angles, rel=0.05)


def test_logits_are_limited(tmp_path):
    folder = config_folder(tmp_path, **TINY | {"vocab_size": 128256})
    few, many, more = (plan(folder, tokens_per_batch=t)["on"][0]["working"] for t in (8, 523, 4096))
    assert few == 16 * 8 * 128256 and many == more == 16 * (memory.MAX_LOGITS // 128256) * 128256


@pytest.mark.parametrize(("flags", "tokens"), [({}, 600), ({"regular": True}, 300), ({"tokens_per_batch": 77}, 77)])
def test_tokens_in_a_micro_batch(tmp_path, flags, tokens):
    assert plan(config_folder(tmp_path, **TINY), batch_size=3, max_length=100, **flags)["tokens"] == tokens


def test_command_prints_json_or_a_table(tmp_path):
    model = config_folder(tmp_path, **TINY)
    done = call("llm_jepa.memory", "--model_name", model, "--tokens", 64, "--gpus", "1,4", "--json")
    assert done.code == 0 and json.loads(done.out) == plan(model, 1, 4, tokens_per_batch=64)
    table = call("llm_jepa.memory", "--model_name", model, "--gpus", "1,8").out.split()
    assert {*memory.PARTS, "peak", "1", "8"} <= set(table)


@pytest.mark.parametrize(
    "text", [None, "not JSON", '{"model_type": "vit"}', '{"model_type": "llama", "vocab_size": ""}']
)
def test_bad_model_is_reported(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    done = call("llm_jepa.memory", "--model_name", tmp_path)
    assert done.code == 2 and str(tmp_path) in done.err and done.out == ""


def test_wrong_flags_are_reported(tmp_path):
    done = call("llm_jepa.memory", "--load_in_4bit", "--gpus", "8,x")
    assert done.code == 2 and all(name in done.err for name in ("--model_name", "--load_in_4bit", "--gpus 8,x"))
    done = call("llm_jepa.memory", "--model_name", config_folder(tmp_path, **TINY), "--optim", "sgd")
    assert done.code == 2 and "--optim sgd" in done.err
