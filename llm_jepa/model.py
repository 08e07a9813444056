"""Loads the tokenizer with the method's special tokens, the model, and a LoRA adapter on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.rendering import END_OF_TURN, PERCEPTION, predictor_token

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
MAX_LOGITS = 2**26  # logits held at once: 256 MiB in float32, and as much again for their gradient and the softmax
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def check_name(name: str, flag: str = "model_name") -> None:
    """Raises UsageError if a model's name is a path without a folder, or a folder without a model."""
    folder = Path(name)
    if folder.is_dir():
        known = ("config.json", "adapter_config.json", "tokenizer_config.json", "run.json")
        if not any((folder / file).is_file() for file in known):
            raise UsageError(f"--{flag} {name} is not a model folder: it has neither config.json nor a tokenizer")
        return
    beside_runs = "/" in name and any(folder.parent.glob("*/run.json"))  # otherwise it is a name on the hub
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or beside_runs:
        raise UsageError(f"--{flag} {name}: there is no such folder")


def load_tokenizer(name: str, revision: str | None = None, *, plain: bool = False, predictors: bool = True) -> Any:
    """The model's tokenizer with the special tokens that the method needs. Raises UsageError if it cannot be loaded."""
    check_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--model_name {name}: its tokenizer cannot be loaded ({first_line(error)})") from None
    if not tokenizer.is_fast:
        raise UsageError(f"--model_name {name}: its tokenizer gives no character offsets (it is not a fast tokenizer)")
    # Always all ten, in both arms: a softmax over another vocabulary would be another loss.
    wanted = [predictor_token(i) for i in range(1, 11)] if predictors else []
    wanted += [PERCEPTION, END_OF_TURN] if plain else []
    missing = [t for t in wanted if t not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or END_OF_TURN
    return tokenizer


def load_pretrained(name: str, **options: Any) -> Any:
    """A pretrained causal language model. Raises ValueError if parameters are missing, else one of LOADING_ERRORS."""
    model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if loading["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"weights are missing ({', '.join(sorted(loading['missing_keys'])[:3])} …)")
    return model


def load_config(name: str, revision: str | None = None) -> Any:
    """The model's configuration. Raises UsageError if there is none or the folder contains an adapter."""
    check_name(name)
    if (Path(name) / "adapter_config.json").is_file():
        raise UsageError(f"--model_name {name} is an adapter; give its merged model (finetune.py --merge)")
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except LOADING_ERRORS as error:
        raise UsageError(f"--model_name {name} cannot be loaded: {first_line(error)}") from None


def context_length(config: Any) -> int | None:
    """The longest text of a model in tokens, None if its configuration does not say."""
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions", "max_seq_len"))
    return next((limit for limit in limits if limit and limit > 0), None)  # XLNet has −1


def attention_window(config: Any) -> int | None:
    """The shortest window or chunk that a layer's attention is limited to, in tokens; None if no layer's is."""
    text, marks = config.get_text_config(), {"sliding_window": "sliding|compressed", "attention_chunk_size": "chunk"}
    kinds = getattr(text, "layer_types", None)
    used = [name for name in marks if kinds is None or any(re.search(marks[name], kind) for kind in kinds)]
    return min((size for name in used if (size := getattr(text, name, None) or 0) > 0), default=None)


def without_weights(config: Any, **options: Any) -> Any:
    """A model whose parameters another process sends. Their memory is reserved but not written, so it uses no RAM yet.

    They are not on torch's meta device, because accelerate identifies parameters by their addresses.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **options)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()
    return model


def check_generation_config(name: str, config: GenerationConfig) -> None:
    """Resets sampling settings that have no effect, because transformers refuses to save some published combinations.

    Raises UsageError if the configuration still cannot be saved: before training, not at the first checkpoint.
    """
    if config.do_sample is not True:
        usual = GenerationConfig()
        for setting in SAMPLING:
            setattr(config, setting, getattr(usual, setting, None))
    try:
        config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(line for line in str(error).splitlines() if line.startswith("- ")) or first_line(error)
        raise UsageError(f"--model_name {name}: its generation_config.json cannot be saved ({reason})") from None


def load_model(
    name: str, revision: str | None, tokenizer: Any, *, pretrain: bool = False, attn_implementation: str | None = None,
    empty: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """The causal language model, with embeddings for all tokens of the tokenizer.

    In float32 unless transformers' `options` say otherwise. `pretrain`: random parameters. `empty`: see
    `without_weights`. Raises UsageError if it cannot be loaded.
    """
    options = {"dtype": torch.float32} | options
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    try:
        if empty:
            config = load_config(name, revision)
            text = config.get_text_config()
            text.vocab_size = max(text.vocab_size, len(tokenizer))  # resizing later would touch the memory
            model = without_weights(config, **options)
        elif pretrain:
            model = AutoModelForCausalLM.from_config(load_config(name, revision), **options)
        else:
            model = load_pretrained(name, revision=revision, **options)
    except LOADING_ERRORS as error:
        hint = "" if pretrain else " (without weights, give --pretrain)"
        raise UsageError(f"--model_name {name} cannot be loaded{hint}: {first_line(error)}") from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not empty)
    if model.config.get_text_config() is not model.config:
        # A multimodal model's other towers get no gradient, and DDP would wait for it.
        text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in text)
    check_generation_config(name, model.generation_config)
    return model


def add_adapter(
    model: Any, tokenizer: Any, *, rank: int, dropout: float, predictors: int, plain: bool, revision: str | None = None
) -> Any:
    """The model with a LoRA adapter on its text layers' projections; the rows of added tokens train too.

    These rows are the embeddings of the `predictors` predictor tokens in use, and with `plain` the embeddings and
    output rows of the tokens that are labels.
    """
    from peft import LoraConfig, get_peft_model

    inside = {id(module) for module in model.get_decoder().modules()} - {id(model.get_output_embeddings())}
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and id(m) in inside]
    usual = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    # Some models fuse these (qkv_proj) or use other names (c_attn): then all linear layers.
    if usual <= {name.rpartition(".")[2] for name in linear}:
        linear = [name for name in linear if name.rpartition(".")[2] in usual]
    embedding, output = (
        next(name for name, module in model.named_modules() if module is layer).rpartition(".")[2]
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    ids = tokenizer.convert_tokens_to_ids
    labels = ids([PERCEPTION, END_OF_TURN]) if plain else []
    added = labels + ids([predictor_token(i) for i in range(1, predictors + 1)])
    # Otherwise predictor tokens would keep their random start, and a new end-of-turn token would never be learned.
    rows = {embedding: added} if added else {}
    if labels and model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        if getattr(model.get_output_embeddings(), "bias", None) is not None:  # PEFT would leave it out
            raise UsageError("--lora: not with --plain for a model whose output layer has a bias of its own")
        rows[output] = labels
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=linear or "all-linear",
        trainable_token_indices=rows or None,
    )
    return get_peft_model(model, config, revision=revision)


def blocks_after(model: torch.nn.Module, layer: int, flag: str) -> list[torch.nn.Module]:
    """The block that receives a layer's hidden states: 0 is the embedding layer, −1 the last, which no block receives.

    There are several if a model has towers of equal depth, or lists of a block's parts (XLM): a forward pass shows
    which one receives a text's states first. Raises UsageError if the model has no such layer.
    """
    lists, inside = [], ()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) and not name.startswith(inside):
            lists.append(module)
            inside += (f"{name}.",)
    lists = [m for m in lists if isinstance(m[0], GradientCheckpointingLayer)] or lists
    count = model.config.get_text_config().num_hidden_layers
    if len(lists) == 1:  # LongCat counts each block twice, decoders of encoder-decoder models the encoder's
        count = len(lists[0])
    if not -count - 1 <= layer <= count:
        raise UsageError(f"--{flag} {layer} is not in {-count - 1} to {count}, the layers of {type(model).__name__}")
    if layer in (-1, count):
        return []
    blocks = [m[layer % (count + 1)] for m in lists if len(m) == count]
    if not blocks:
        raise UsageError(f"--{flag} {layer}: the layers of {type(model).__name__} are not found; leave it out")
    return blocks


def add_stop_token(config: Any, token: int | None) -> None:
    """Makes plain `generate` of the saved model stop at the token that ends the turn in training."""
    known = config.eos_token_id
    known = set() if known is None else {known} if isinstance(known, int) else set(known)
    config.eos_token_id = sorted((known | {token}) - {None}) or None
