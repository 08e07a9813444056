"""What an adapter reaches and stores, rows of new tokens, saved settings, and models that are refused."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from conftest import JEPA, call, make_model, message_row, predictions, start, train, weights, write_rows
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm_jepa import model
from llm_jepa.cli import UsageError
from llm_jepa.files import read_json, write_json

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
MIXERS = {"n_groups": 1, "chunk_size": 16, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS = {
    "glm4_moe": TINY | EXPERTS | {"head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "laguna": TINY | EXPERTS | {"head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
    "nemotron_h": TINY | MIXERS | {"head_dim": 8, "layers_block_type": ["mamba", "attention"]},
}


def base_model(folder: Path, kind: str = "llama", rows: int = 531, tokens: tuple = (), **values: object) -> Path:
    """A random model with the golden ChatML tokenizer; `tokens` replace its turn tokens, `rows` are the embedding's."""
    usual = {"vocab_size": rows, "pad_token_id": None, "eos_token_id": 6, "bos_token_id": None}
    make_model(folder, kind, std=0.2, **usual | MODELS.get(kind, TINY) | values)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for new, old in zip(tokens, ("<|im_start|>", "<|im_end|>"), strict=False):
        tokenizer.add_tokens(new, special_tokens=True)
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [message_row(f"word {i}", "a" * i) for i in (1, 3, 5, 7)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def without_rows(data, tmp_path_factory) -> tuple[Path, Path]:
    """A base that lacks the rows of its turn tokens and the run of an adapter on it."""
    folder = tmp_path_factory.mktemp("rows")
    base = base_model(folder / "base", tokens=("<|begin|>", "<|stop|>"), use_cache=True)
    flags = (*JEPA, "--lora", "--merge", "--keep_checkpoints", "--max_steps", 2)
    return base, train(data, folder / "run", *flags, model=base)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 60)[None]).logits


def same_as_merged(run: Path) -> None:
    """Asserts that plain PEFT loads the adapter on its base, with the outputs of the merged model."""
    loaded, merged = AutoPeftModelForCausalLM.from_pretrained(run), AutoModelForCausalLM.from_pretrained(run / "merged")
    torch.testing.assert_close(logits(loaded), logits(merged), rtol=1e-3, atol=1e-4)
    with loaded.disable_adapter():
        assert not torch.allclose(logits(loaded), logits(merged), atol=1e-2)


# ------------------------------------------------------------------------------------------------ what is adapted


@pytest.mark.parametrize(
    ("kind", "flags", "reached", "left"),
    [("glm4_moe", (), "q_proj shared_experts.gate_proj layers.0.mlp.down_proj experts.base_layer", "gate.weight"),
     ("glm4_moe", ("--target_modules", "all-linear"), "q_proj shared_experts.gate_proj layers.0.mlp.down_proj",
      "gate.weight mlp.experts"),
     ("laguna", (), "q_proj mlp.experts", "shared_experts.up_proj"),  # which PEFT would not load again
     ("mamba", ("--layout", "separate"), "in_proj x_proj", "out_proj dt_proj conv1d"),
     ("phi", (), "q_proj dense fc1 fc2", ""),  # its output layer has a bias
     ("phi3", (), "qkv_proj o_proj gate_up_proj down_proj", ""),
     ("nemotron_h", ("--layout", "separate"), "in_proj q_proj o_proj", "out_proj conv1d")],
)  # fmt: skip
def test_adapter_reaches_what_peft_can_and_records_the_rest(kind, flags, reached, left, data, tmp_path):
    base = base_model(tmp_path / "base", kind)
    run = train(data, tmp_path / "run", *JEPA, *flags, "--lora", "--lora_rank", 2, "--merge", "--learning_rate", 0.01,
                "--max_steps", 2, model=base)  # fmt: skip
    found = weights(run, "adapter_model.safetensors")
    trained = " ".join(name for name, w in found.items() if "lora_B" in name and w.any())
    recorded = read_json(run / "run.json")["not_adapted"]
    assert all(part in trained for part in reached.split()), trained
    assert all(any(part in name for name in recorded) for part in left.split()), recorded
    assert any("mlp.experts" in name for name in recorded) == ("mlp.experts" in left)
    assert not any("q_proj" in name for name in recorded)
    same_as_merged(run)


def test_towers_of_a_multimodal_model_are_not_adapted(data, tmp_path):
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = TINY | {"vocab_size": 531, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    tower = part | {"image_size": 28, "patch_size": 14}
    base = base_model(tmp_path / "base", "gemma3", text_config=text, vision_config=tower, mm_tokens_per_image=4)
    run = train(data, tmp_path / "run", *JEPA, "--lora", "--max_steps", 1, model=base)
    names = weights(run, "adapter_model.safetensors")
    assert any("mlp.down_proj" in n for n in names) and not any("vision" in n or "projector" in n for n in names)


OPTIONS = [
    ("--lora_alpha 4 --target_modules q_proj,mlp.up_proj", {"lora_alpha": 4},
     lambda names: {n.split(".lora_A")[0].split(".")[-1] for n in names if "lora_A" in n} == {"q_proj", "up_proj"}),
    ("--use_rslora --init_lora_weights gaussian --lora_dropout 0.3",
     {"use_rslora": True, "init_lora_weights": "gaussian", "lora_dropout": 0.3}, bool),
    ("--use_dora", {"use_dora": True}, lambda names: any("lora_magnitude_vector" in n for n in names)),
    *((f"--init_lora_weights {x}", {"init_lora_weights": x}, bool) for x in ("pissa", "olora", "orthogonal", "mica")),
    ("--modules_to_save lm_head,embed_tokens", {"trainable_token_indices": None},
     lambda names: sum("lm_head" in n or "embed_tokens" in n for n in names) == 2),
    ("--modules_to_save norm,q_proj", {"modules_to_save": ["model.layers.0.self_attn.q_proj",
                                                           "model.layers.1.self_attn.q_proj", "model.norm"]},
     lambda names: {n.split(".")[-2] for n in names if "norm" in n or "q_proj" in n} == {"norm", "q_proj"}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "values", "reached"), OPTIONS, ids=[flags for flags, *_ in OPTIONS])
def test_options_of_peft_and_the_adapter_is_continued(flags, values, reached, without_rows, data, tmp_path):
    usual = (*JEPA, "--lora", "--merge", "--max_steps", 2, "--learning_rate")
    base = without_rows[0]
    run = train(data, tmp_path / "run", *usual, 0.01, "--lora_rank", 4, *flags.split(), model=base)
    config = read_json(run / "adapter_config.json")
    assert {name: config[name] for name in values} == values and config["r"] == 4
    assert reached([name for name, w in weights(run, "adapter_model.safetensors").items() if w.any()])
    left = read_json(run / "run.json")["not_adapted"]
    assert "target" in flags or not any("q_proj" in name or "head" in name for name in left)
    same_as_merged(run)
    after = train(data, tmp_path / "after", *usual, "1e-12", model=run)  # so slowly that it shows where it started
    same_as_merged(after)
    first, second = map(AutoPeftModelForCausalLM.from_pretrained, (run, after))
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-4, atol=1e-4)
    assert read_json(after / "adapter_config.json")["base_model_name_or_path"] == str(base)
    before, now = (read_json(x / "args.json") for x in (run, after))
    for name in ("lora_rank", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"):
        assert now[name] == before[name], name
    assert now["lora_alpha"] == config["lora_alpha"] == (values.get("lora_alpha") or 8)


def test_continued_adapter_trains_and_refuses_what_it_cannot_change(without_rows, data, tmp_path):
    _, run = without_rows
    after = train(data, tmp_path / "after", *JEPA, "--lora", "--max_steps", 2, model=run)
    before, now = weights(run, "adapter_model.safetensors"), weights(after, "adapter_model.safetensors")
    assert before.keys() == now.keys() and not any(before[name].equal(now[name]) for name in before)
    for flags, part in (((), "--lora"), (("--lora", "--lora_rank", 2), "--lora_rank"), (
            ("--lora", "--use_dora", "--target_modules", "q_proj"), "--target_modules"),
            (("--lora", "--lbd", 1, "--predictors", 3), "--predictors")):  # fmt: skip
        done = start(data, tmp_path / "no", *(flags if "--predictors" in flags else (*JEPA, *flags)), model=run)
        assert done.code == 2 and str(run) in done.err and part in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("llama", "--target_modules q_proj,query"),
        ("llama", "--modules_to_save score"),
        ("glm4_moe", "--use_dora"),
        ("glm4_moe", "--init_lora_weights olora"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(kind, flags, data, tmp_path):
    base = base_model(tmp_path / "base", kind)
    done = start(data, tmp_path / "run", *JEPA, "--lora", *flags.split(), model=base)
    named = flags.split()[0] if kind == "llama" else "PEFT refuses"
    assert done.code == 2 and named in done.err and not (tmp_path / "run").exists(), done.err


# ------------------------------------------------------------------------------------------------ new tokens


def test_rows_that_the_model_lacked_train_and_are_all_that_is_stored_besides_lora(without_rows):
    base, run = without_rows
    tokenizer, merged, old = AutoTokenizer.from_pretrained(run), weights(run / "merged"), weights(base)
    begin, stop, predictor = tokenizer.convert_tokens_to_ids(["<|begin|>", "<|stop|>", "<|predictor_1|>"])
    assert (begin, stop) == (531, 532)
    stored = weights(run, "adapter_model.safetensors")
    rows = {name.split(".")[-3]: w for name, w in stored.items() if "lora_" not in name}
    # The two predictor tokens have rows of the base; they are never labels.
    assert {name: len(w) for name, w in rows.items()} == {"embed_tokens": 4, "lm_head": 2}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = old[name].mean(dim=0)
        assert not torch.allclose(merged[name][begin], merged[name][stop], atol=1e-4)
        assert (merged[name][[begin, stop]] - mean).abs().max() < 0.05
    name = "model.embed_tokens.weight"
    assert not merged[name][predictor].equal(old[name][predictor])
    same_as_merged(run)


@pytest.mark.parametrize("flags", [(), ("--lora", "--merge")], ids=["full", "lora"])
def test_new_tokens_in_spare_rows_start_at_the_mean(flags, data, tmp_path):
    base = base_model(tmp_path / "base", rows=540)
    core, known = read_json(base / "tokenizer.json"), 520
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < known]
    write_json(base / "tokenizer.json", core)
    config = read_json(base / "tokenizer_config.json")
    write_json(base / "tokenizer_config.json", {k: v for k, v in config.items() if "_special_tokens" not in k})
    tensors = weights(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][known:] = 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    tiny = ("--plain", "--learning_rate", "1e-9", "--max_steps", 1)
    run = train(data, tmp_path / "run", *JEPA, *tiny, *flags, model=base)
    tokens = ["<|perception|>", *(f"<|predictor_{i}|>" for i in range(1, 3 if flags else 11))]
    new = AutoTokenizer.from_pretrained(run).convert_tokens_to_ids(tokens)
    assert min(new) >= known
    after, old = weights(run / "merged" if flags else run), weights(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = old[name][:known].mean(dim=0).expand(len(new), -1)
        torch.testing.assert_close(after[name][new], mean, rtol=0, atol=1e-5)
        rest = [i for i in range(known, 540) if i not in new]
        assert after[name][rest].abs().max() < 1e-6  # of other tokens and of predictor tokens that are not in use


def test_embedding_of_the_padding_token_trains(data, tmp_path):
    base = base_model(tmp_path / "base", pad_token_id=6)  # it ends the turns, too
    name = "model.embed_tokens.weight"
    run = train(data, tmp_path / "run", *JEPA, "--max_steps", 2, model=base)
    assert (weights(run)[name][6] - weights(base)[name][6]).abs().max() > 1e-4
    run = train(data, tmp_path / "random", *JEPA, "--pretrain", "--max_steps", 1, model=base)
    assert weights(run)[name][6].abs().mean() > 0.2 * weights(run)[name].abs().mean()
    assert read_json(run / "config.json")["pad_token_id"] == 6


@pytest.mark.parametrize("special", [True, False])
def test_tokenizer_without_eos_and_padding_token(special, data, tmp_path):
    base = base_model(tmp_path / "base")
    config, core = read_json(base / "tokenizer_config.json"), read_json(base / "tokenizer.json")
    gone = ("eos_token", "pad_token", *(() if special else ("bos_token", "unk_token", "extra_special_tokens")))
    core["added_tokens"] = [token | {"special": special} for token in core["added_tokens"]]
    write_json(base / "tokenizer_config.json", {name: value for name, value in config.items() if name not in gone})
    write_json(base / "tokenizer.json", core)
    done = start(data, tmp_path / "run", "--regular", "--max_steps", 1, model=base)
    if special:
        assert done.code == 0, done.err
        assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [6]
    else:
        assert done.code == 2 and "pad_token" in done.err and "Traceback" not in done.err


def test_saved_settings_are_those_of_the_base(without_rows, data, tmp_path):
    base, adapter = without_rows
    run = train(data, tmp_path / "run", *JEPA, "--max_steps", 1, "--keep_checkpoints", model=base)
    before = AutoConfig.from_pretrained(base).to_dict()
    for folder in (run, run / "checkpoint-1", adapter / "merged"):
        after = AutoConfig.from_pretrained(folder).to_dict()
        assert {k for k in before if before[k] != after.get(k)} <= {"vocab_size", "_name_or_path"}, folder
        assert before.keys() == after.keys() and after["vocab_size"] == 533
    for folder in (run, run / "checkpoint-1", adapter, adapter / "checkpoint-2", adapter / "merged"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [6, 532], folder


# ------------------------------------------------------------------------------------------------ loading


def test_tokenizer_and_template_of_other_files(data, tmp_path):
    base, template = base_model(tmp_path / "base"), tmp_path / "template.jinja"
    tokenizer = shutil.copytree(base, tmp_path / "tokenizer")
    for file in base.glob("*token*"):
        file.unlink()
    (base / "chat_template.jinja").unlink()
    template.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}")
    flags = ("--tokenizer_name", tokenizer, "--chat_template", template, "--dry_run", 2)
    done = start(data, tmp_path / "run", "--regular", *flags, model=base)
    assert done.code == 0 and json.loads(done.out)["first_row"]["chat"].startswith("[system]"), done.err
    for flag, file in (("--tokenizer_name", tmp_path / "none"), ("--chat_template", tmp_path / "none")):
        done = start(data, tmp_path / "run", "--regular", *flags, flag, file, model=base)
        assert done.code == 2 and f"{flag} {file}" in done.err and done.err.count("\n") == 1
    assert len(predictions(base, data, tmp_path, *flags[:4])) == 4
    template.write_text("{% for m in messages %}")
    done = start(data, tmp_path / "run", "--regular", *flags, model=base)
    assert done.code == 2 and "--chat_template" in done.err and "--model_name" not in done.err


def test_code_of_a_repository_needs_its_flag(data, tmp_path):
    base = base_model(tmp_path / "base")
    config = read_json(base / "config.json") | {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.MineForCausalLM"}
    write_json(base / "config.json", config)
    (base / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = Mine\n"
    )
    flags = (*JEPA, "--max_steps", 1)
    done = start(data, tmp_path / "run", *flags, model=base)
    assert done.code == 2 and "--trust_remote_code" in done.err and not (tmp_path / "run").exists()
    tokenizer = ("--tokenizer_name", shutil.copytree(base, tmp_path / "tokenizer"))
    for file in base.glob("*token*"):
        file.unlink()
    run = train(data, tmp_path / "run", *flags, *tokenizer, "--trust_remote_code", model=base)
    assert len(predictions(run, data, tmp_path, "--trust_remote_code")) == 4
    assert call("llm_jepa.search", run, "--corpus", data, "q").code == 0  # with the flags of the training


ENCODERS = [
    ("bert", {}, "is_decoder"),
    ("t5", {"d_model": 16, "d_ff": 16, "num_layers": 1}, "t5"),
    ("llama", {"is_causal": False}, "is_causal"),
]


@pytest.mark.parametrize(("kind", "values", "field"), ENCODERS)
def test_models_that_are_not_causal_are_refused(kind, values, field, data, tmp_path):
    base = base_model(tmp_path / "base")
    AutoConfig.for_model(kind, **values).save_pretrained(base)
    out = tmp_path / "out" / "p.jsonl"
    evaluation = ("--model_name", base, "--input_file", data, "--task", "text", "--output_file", out)
    for done in (start(data, tmp_path / "run", "--layout", "separate", model=base), call("evaluate", *evaluation)):
        assert done.code == 2 and str(base) in done.err and field in done.err and "--layout" not in done.err, done.err
    assert not out.parent.exists() and not (tmp_path / "run").exists()


def test_adapter_that_does_not_fit_is_refused(without_rows, data, tmp_path):
    _, run = without_rows
    other = base_model(tmp_path / "other", hidden_size=16)
    evaluation = ("--input_file", data, "--task", "text", "--output_file", tmp_path / "p.jsonl")
    done = call("evaluate", "--model_name", run, "--original_model_name", other, *evaluation)
    assert done.code == 2 and str(other) in done.err and "size mismatch" in done.err
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "adapter_model.safetensors").unlink()
    done = call("evaluate", "--model_name", broken, *evaluation)
    assert done.code == 2 and str(broken) in done.err and "adapter_model.safetensors" in done.err


def test_unreachable_hub_is_one_try(monkeypatch):
    tries = Mock(side_effect=ConnectionError("no network"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model, "get_hf_file_metadata", tries)
    for _ in range(2):
        with pytest.raises(UsageError, match="--model_name no-owner/no-model.*no network"):
            model.load_config("no-owner/no-model")
    assert tries.call_count == 1
