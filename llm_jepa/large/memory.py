"""Predicts the GPU memory and disk space of a training; llm_jepa/memory.py has the formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pandas
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from llm_jepa.cli import UsageError, first_line
from llm_jepa.large.settings import LargeSettings, choose_sharding
from llm_jepa.losses import nitp_loss
from llm_jepa.model import LOADING_ERRORS, MAX_LOGITS, add_adapter, load_tokenizer, new_rows, tokenizer_options
from llm_jepa.projectors import Projector

HEAD, EMBEDDING, PROJECTORS = -1, -2, -3  # units of FSDP other than the layers
MARGIN, RESERVE = 1.05, 2 * 2**30  # factor and bytes that the peak is above the sum of its parts
PARTS = ("weights", "gradients", "optimizer", "gathered", "reduced", "hidden", "working")


def plan_tokenizer(s: LargeSettings) -> Any:
    """The run's tokenizer, or one that has a row for each token if it cannot be loaded: a config is enough to plan."""
    try:
        return load_tokenizer(s.model_name, s.revision, **tokenizer_options(s))
    except UsageError:
        ids = itertools.count()
        return SimpleNamespace(convert_tokens_to_ids=lambda tokens: [next(ids) for _ in tokens], get_vocab=dict)


def meta_model(s: LargeSettings, tokenizer: Any) -> Any:
    """The model in bfloat16 on the meta device, without an adapter. Raises UsageError if it cannot be built."""
    AttentionInterface.register("counted", counted_attention)
    code, (name, revision) = {"trust_remote_code": s.trust_remote_code}, s.base
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **code)
        text = config.get_text_config()
        new = new_rows(tokenizer, text.vocab_size, s.stored_predictors)
        text.vocab_size = max(text.vocab_size, len(tokenizer.get_vocab()))
        options = {"dtype": torch.bfloat16, "attn_implementation": "counted"} | code
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
    except (*LOADING_ERRORS, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f"{name} cannot be loaded: {first_line(error)}") from None
    model.new_rows = new
    return model


class _Attention(torch.autograd.Function):
    """Saves what fused kernels save: queries, keys and values of all heads, the output, a float per head and token."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def counted_attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Replaces an attention kernel on the meta device: (B, heads, T, size) → (B, T, heads, size)."""
    heads = q.shape[1] // k.shape[1]
    out = _Attention.apply(q, k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1))
    return out.transpose(1, 2).contiguous(), None


def decoder_layers(model: Any) -> list[Any]:
    """The modules that are FSDP units of their own. Raises UsageError if the model does not name them."""
    names = set(model._no_split_modules or ())
    layers = [m for m in model.get_decoder().modules() if type(m).__name__ in names]
    if not layers:
        raise UsageError(f"{type(model).__name__} does not name its decoder layers (_no_split_modules)")
    return layers


def saved_bytes(module: Any, run: Callable[[], Any]) -> int:
    """Bytes that autograd stores for a forward pass, without the module's weights."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    stored: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            stored[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in stored.values())


def layer_activations(decoder: Any, layer: Any, tokens: int) -> int:
    """Bytes that autograd stores for one layer's forward pass over a row of tokens."""
    inputs: list[Any] = []
    with layer.register_forward_pre_hook(lambda _, *given: inputs.extend(given), with_kwargs=True):
        decoder(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)
    args, kwargs = inputs
    return saved_bytes(decoder, lambda: layer(*args, **kwargs))


def nitp_activations(size: int, tokens: int) -> int:
    """Bytes that autograd stores for the loss of --nitp at so many tokens."""
    with torch.device("meta"):
        projector, states = Projector(size).bfloat16(), torch.empty(2, tokens, size, dtype=torch.bfloat16)
    return saved_bytes(projector, lambda: nitp_loss(projector(states[0]), states[1]))


def parameter_table(model: Any, trained_model: Any, s: LargeSettings) -> pandas.DataFrame:
    """One row per parameter of `trained_model`, which is `model`, or with LoRA wraps it.

    numel, length (of the first dimension), bytes (per element), trained, unit (of FSDP: number of the decoder layer,
    HEAD, EMBEDDING or PROJECTORS), quantized, embedding (bitsandbytes keeps its moments in float32), autocast (a matrix
    of which autocast makes a bfloat16 copy).
    """
    unit = {id(p): i for i, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    unit |= {id(p): PROJECTORS for p in trained_model.projectors.parameters()}
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    head, embedding = (getattr(end, "original_module", end).weight for end in ends)  # that of PEFT's wrapper
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    base = {id(m.weight) for m in model.get_decoder().modules() if type(m) is torch.nn.Linear} - {id(head)}
    width = 2 if s.lora or s.param_dtype == "bfloat16" else 4
    rows = []
    for p in trained_model.parameters():
        quantized = s.load_in_4bit and not p.requires_grad and id(p) in base
        row = {"numel": p.numel(), "length": len(p) if p.dim() else 1, "trained": p.requires_grad}
        row["bytes"] = 0.5 + 4 / 64 if quantized else 4 if s.lora and p.requires_grad else width
        row["unit"] = unit.get(id(p), EMBEDDING if p is embedding and p is not head else HEAD)
        row |= {"quantized": quantized, "embedding": p is embedding}
        rows.append(row | {"autocast": width == 4 and p.requires_grad and id(p) in linear})
    return pandas.DataFrame(rows)


def moments(trained: pandas.DataFrame, elements: pandas.Series, optim: str) -> float:
    """Bytes of AdamW's two moments for these numbers of elements of the trained parameters."""
    if "8bit" not in optim:
        return (2 * elements * trained.bytes).sum()
    full = trained.embedding | (trained.numel < 4096)
    return (8 * elements).where(full, 2 * (elements + 4 * -(-elements // 256))).sum()


def gpu_plan(
    table: pandas.DataFrame, optim: str, gpus: int, parts: int, copies: int, hidden: int, working: int
) -> dict[str, int]:
    """Bytes on the GPU with the most, if `gpus` store the weights in `parts` shards; and of its checkpoint file.

    `copies`: of the gradients.
    """
    shard = -(-table.length // parts) * (table.numel // table.length)  # elements on the GPU with the most
    trained = table[table.trained]
    gathered = (table.numel * table.bytes.where(table.quantized, 2)).groupby(table.unit).sum()
    end = max(gathered.get(HEAD, 0), gathered.get(EMBEDDING, 0))
    weights = shard * table.bytes
    need = {
        "weights": weights.sum(),
        "gradients": weights[table.trained].sum(),
        "optimizer": moments(trained, shard[table.trained], optim),
        "gathered": 2 * table.numel[table.autocast].sum(),
        "reduced": (trained.numel * trained.bytes).sum() if gpus > 1 else 0,
        "hidden": hidden,
        "working": working,
    }
    if parts > 1:
        need["gathered"] = end + gathered[gathered.index >= 0].nlargest(2).sum() + gathered.get(PROJECTORS, 0)
        need["reduced"] = 6 * trained.groupby("unit").numel.sum().max()
    checkpoint = need["gradients"] + need["optimizer"]
    need["gradients"] *= copies
    need["peak"] = MARGIN * sum(need.values()) + RESERVE
    need["checkpoint_shard"] = checkpoint
    return {"gpus": gpus} | {name: int(size) for name, size in need.items()}


def plan(s: LargeSettings, gpus: Sequence[int]) -> dict[str, Any]:
    """Parameter counts and bytes of a training; `on` has one entry per number of GPUs.

    Raises UsageError if the model cannot be built, or for flags whose memory cannot be predicted.
    """
    if s.optim != "auto" and "adamw" not in s.optim:
        raise UsageError(f"--optim {s.optim}: only the memory of AdamW can be predicted")

    def optim(n: int) -> str:
        return s.optim if s.optim != "auto" else "adamw_bnb_8bit" if n == 1 and not s.lora else "adamw_torch_fused"

    tokenizer = plan_tokenizer(s)
    model = meta_model(s, tokenizer)
    config, layers = model.config.get_text_config(), decoder_layers(model)
    sharding = choose_sharding(s.sharding, lora=s.lora, load_in_4bit=s.load_in_4bit, tied=config.tie_word_embeddings)
    trained_model, size = model, model.get_output_embeddings().weight.shape[1]
    with torch.device("meta"):
        if s.lora:
            options = s.lora_options | {"dropout": 0.0, "init_lora_weights": True}
            trained_model = add_adapter(model, tokenizer, **options)
        trained_model.projectors = torch.nn.ModuleList(Projector(size) for _ in s.projectors)
    table = parameter_table(model, trained_model, s)
    trained, saved = table[table.trained], table[table.unit != PROJECTORS]
    tokens = s.tokens
    states, mask = (len(layers) + 1) * tokens * config.hidden_size, 3 * tokens * min(tokens, 4096)
    logits = min(tokens, max(1, MAX_LOGITS // config.vocab_size)) * config.vocab_size
    working, on = max(layer_activations(model.get_decoder(), layers[-1], tokens), 16 * logits), []
    nitp = nitp_activations(size, tokens // (1 + s.jepa)) if "nitp" in s.chat_losses else 0
    for n in gpus:
        parts = 1 if sharding == "ddp" else n
        width = 2 if parts > 1 or s.lora or s.param_dtype == "bfloat16" else 4
        copies = 1 + (parts == 1 and s.gradient_stats > 0)
        on.append(gpu_plan(table, optim(n), n, parts, copies, states * width + mask + nitp, working))
    return {
        "model": s.model_name,
        "parameters": int((saved[~saved.trained] if s.lora else saved).numel.sum()),
        "trainable": int(trained.numel.sum()),
        "tokens": tokens,
        "checkpoint": int((trained.numel * trained.bytes).sum() + moments(trained, trained.numel, optim(max(gpus)))),
        "saved_model": int((saved.numel * saved.bytes)[saved.trained | (not s.lora)].sum()),
        "on": on,
    }


def plan_table(p: dict[str, Any]) -> str:
    """A plan as text, in GiB."""
    counts = f"{p['parameters']:,} parameters, {p['trainable']:,} trained, {p['tokens']} tokens in a micro-batch"
    lines = [f"{p['model']}: {counts}; GiB per GPU:", f"{'GPUs':18}" + "".join(f"{one['gpus']:>8}" for one in p["on"])]
    for name in (*PARTS, "peak", "checkpoint_shard"):
        lines.append(f"{name.replace('_', ' '):18}" + "".join(f"{one[name] / 2**30:8.1f}" for one in p["on"]))
    sizes = (p[name] / 2**30 for name in ("checkpoint", "saved_model"))
    return "\n".join([*lines, "on disk: {:.1f} GiB per checkpoint, {:.1f} GiB the saved model".format(*sizes)])
