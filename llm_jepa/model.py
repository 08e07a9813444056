"""Loading: the tokenizer with the method's special tokens, the model's weights, a LoRA adapter on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.rendering import END_OF_TURN, PERCEPTION, predictor_token


def check_name(name: str, flag: str = "model_name") -> None:
    """Raises UsageError where a model's name is that of a folder which is not there, or holds no model."""
    folder = Path(name)
    if folder.is_dir():
        known = ("config.json", "adapter_config.json", "tokenizer_config.json", "run.json")
        if not any((folder / file).is_file() for file in known):
            raise UsageError(f"--{flag} {name} is no model folder: it has neither config.json nor a tokenizer")
        return
    beside_runs = "/" in name and any(folder.parent.glob("*/run.json"))  # else it is a name of the hub
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or beside_runs:
        raise UsageError(f"--{flag} {name}: there is no such folder")


def load_tokenizer(s: Any, predictors: bool = True) -> Any:
    """The model's tokenizer with the special tokens the method needs. Raises UsageError where there is none."""
    check_name(s.model_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(s.model_name, revision=s.revision)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--model_name {s.model_name}: its tokenizer cannot be loaded ({first_line(error)})") from None
    if not tokenizer.is_fast:
        raise UsageError(f"--model_name {s.model_name}: its tokenizer gives no character offsets (not a fast one)")
    # Always all ten, in both arms: softmax over another vocabulary would be another loss.
    wanted = [predictor_token(i) for i in range(1, 11)] if predictors else []
    wanted += [PERCEPTION, END_OF_TURN] if s.plain else []
    missing = [t for t in wanted if t not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or END_OF_TURN
    return tokenizer


LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


def load_weights(name: str, **options: Any) -> Any:
    """A pretrained causal language model. Raises ValueError where weights are missing, one of LOADING_ERRORS else."""
    model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if loading["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"weights are missing ({', '.join(sorted(loading['missing_keys'])[:3])} …)")
    return model


def load_config(s: Any) -> Any:
    """The model's configuration. Raises UsageError where there is none."""
    try:
        return AutoConfig.from_pretrained(s.model_name, revision=s.revision)
    except LOADING_ERRORS as error:
        raise UsageError(f"--model_name {s.model_name} cannot be loaded: {first_line(error)}") from None


def context(s: Any) -> int | None:
    """The longest text of the model in tokens, None where its configuration does not tell."""
    try:
        return getattr(load_config(s).get_text_config(), "max_position_embeddings", None)
    except UsageError:  # load_model says the same
        return None


def without_weights(config: Any, **options: Any) -> Any:
    """A model whose weights come from another process: their memory is set aside and never touched, so it costs none.

    Nor are they on torch's meta device: accelerate tells parameters apart by their addresses.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **options)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()
    return model


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def check_generation_config(s: Any, config: GenerationConfig) -> None:
    """Makes a model's settings of `generate` such as can be saved, as some published ones are not, without another
    answer. Raises UsageError where they cannot: before the training, not at its first checkpoint."""
    if config.do_sample is not True:  # then these have no effect, and transformers does not save them
        usual = GenerationConfig()
        for name in SAMPLING:
            setattr(config, name, getattr(usual, name, None))
    try:
        config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(line for line in str(error).splitlines() if line.startswith("- ")) or first_line(error)
        raise UsageError(
            f"--model_name {s.model_name}: its generation_config.json cannot be saved ({reason})"
        ) from None


def load_model(s: Any, tokenizer: Any, empty: bool = False, **options: Any) -> Any:
    """The causal language model, its embeddings as long as the tokenizer, with --lora an adapter on top.

    In float32, unless transformers' `options` say otherwise. `empty`: see `without_weights`. Raises UsageError where it
    cannot be loaded.
    """
    if (Path(s.model_name) / "adapter_config.json").is_file():
        raise UsageError(f"--model_name {s.model_name} is an adapter; train from its merged model (--merge)")
    try:
        options = {"dtype": torch.float32} | options
        if s.attn_implementation:
            options["attn_implementation"] = s.attn_implementation
        if empty:
            config = load_config(s)
            text = config.get_text_config()
            text.vocab_size = max(text.vocab_size, len(tokenizer))  # to grow it afterwards would touch its memory
            model = without_weights(config, **options)
        elif s.pretrain:
            model = AutoModelForCausalLM.from_config(load_config(s), **options)
        else:
            model = load_weights(s.model_name, revision=s.revision, **options)
    except LOADING_ERRORS as error:
        hint = "" if s.pretrain else " (without weights, give --pretrain)"
        raise UsageError(f"--model_name {s.model_name} cannot be loaded{hint}: {first_line(error)}") from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not empty)
    if model.config.get_text_config() is not model.config:
        # A multimodal model's other towers get no gradient here, and DDP would wait for it.
        text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in text)
    check_generation_config(s, model.generation_config)
    return add_adapter(model, s, tokenizer) if s.lora else model


def add_adapter(model: Any, s: Any, tokenizer: Any) -> Any:
    """The model under a LoRA adapter on its text layers' projections; the added tokens' rows train too.

    That is their embeddings, and of those that are labels what an output layer of its own has for them.
    """
    from peft import LoraConfig, get_peft_model

    inside = {id(module) for module in model.get_decoder().modules()} - {id(model.get_output_embeddings())}
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and id(m) in inside]
    usual = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    # Some models join these (qkv_proj) or name them otherwise (c_attn): then all linear layers.
    if usual <= {name.rpartition(".")[2] for name in linear}:
        linear = [name for name in linear if name.rpartition(".")[2] in usual]
    embedding, output = (
        next(name for name, module in model.named_modules() if module is layer).rpartition(".")[2]
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    ids = tokenizer.convert_tokens_to_ids
    labels = ids([PERCEPTION, END_OF_TURN]) if s.plain else []
    added = labels + (ids([predictor_token(i) for i in range(1, s.predictors + 1)]) if s.jepa else [])
    # Without this the predictor tokens would stay at their random start, and a new end-of-turn token never be answered.
    rows = {embedding: added} if added else {}
    if labels and model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        if getattr(model.get_output_embeddings(), "bias", None) is not None:  # which PEFT would leave out
            raise UsageError("--lora: not with --plain for a model whose output layer has a bias of its own")
        rows[output] = labels
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=s.lora_rank,
        lora_alpha=2 * s.lora_rank,
        lora_dropout=s.lora_dropout,
        target_modules=linear or "all-linear",
        trainable_token_indices=rows or None,
    )
    return get_peft_model(model, config, revision=s.revision)
