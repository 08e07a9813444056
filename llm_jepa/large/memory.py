"""Says what a recipe needs of GPU memory and disk before anything is loaded: a dry run on torch's meta device.

    python -m llm_jepa.memory --model_name meta-llama/Llama-3.1-8B-Instruct --tokens 4096 --gpus 1,8,16

The config alone is read. With P parameters of w bytes (--param_dtype: 4 or 2; under LoRA 2), of which Q trained ones,
and W GPUs that shard every tensor along its first dimension (FSDP2; with DDP, so with 4-bit weights, or tied embeddings
under LoRA, each has them all, as if W were 1), each GPU holds

    weights        P·w / W        a 4-bit weight: 0.5 bytes + 4 for each block of 64; LoRA's own: 4
    gradients      Q·w / W        reduced after each micro-batch
    optimiser      2·Q·w / W      AdamW's two moments, in the weights' precision; in 8 bits 2 bytes + 8 for each block
                                  of 256, but embeddings and tensors below 4096 elements 8 bytes, as transformers has it
    gathered       2·(end + 2 layers), W > 1: one layer is at work and the next one on its way, beside the larger end of
                   the model: embeddings, or last norm and head (tied: all in one), as accelerate 1.15 shards them;
                   W = 1 with float32: autocast's bfloat16 copies of trained matrices
    reduced        6·(largest trained unit), W > 1: its bfloat16 gradient and the float32 copy that is scattered; with
                   DDP the gradients once more, its buckets
    hidden         (L + 1)·T·D·w, W > 1: 2 for w, and the mask, T·min(T, 4096)·3: what checkpointing keeps of T tokens
                   and L layers
    working        the larger of: what autograd keeps of one layer while it is recomputed, counted by running that layer
                   on the meta device; and a slice of at most 2**26 logits at 16 bytes each (bfloat16 and float32, their
                   gradients, the softmax; finetune.py's SLICE)

    peak         = 1.05 · sum + 2 GiB

The last line allows for fragments, the CUDA context and NCCL; both numbers are assumptions, not yet measured on a GPU.
On the disk a checkpoint is trained weights and moments, in W files of one W-th each; the saved model is the weights, or
with LoRA the adapter. The predictor tokens' ten rows of a full model's embeddings are below the precision of all this.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from finetune import SLICE
from llm_jepa.cli import UsageError, first_line, flag, parse_flags
from llm_jepa.model import LOADING_ERRORS, add_adapter

TAIL, EMBEDDING = -1, -2  # units of FSDP besides the layers
MARGIN, RESERVE = 1.05, 2 * 2**30  # of the peak; bytes
PARTS = ("weights", "gradients", "optimiser", "gathered", "reduced", "hidden", "working")
MODEL, BATCH, RUN = "Model", "Batches", "Run"


@dataclass
class Recipe:
    """What decides a run's memory; the names are those of the training's flags."""

    model_name: str | None = flag(None, "model folder (config.json is enough) or hub name", MODEL)
    revision: str | None = flag(None, "commit of a hub model", MODEL)
    lora: bool = flag(False, "train a LoRA adapter", MODEL)
    lora_rank: int = flag(16, "rank of the adapter", MODEL)
    predictors: int = flag(0, "predictor tokens, whose embedding rows train with LoRA", MODEL)
    load_in_4bit: bool = flag(False, "base in 4 bits, with --lora", MODEL)
    param_dtype: Literal["float32", "bfloat16"] = flag("float32", "precision of trained weights", MODEL)
    sharding: Literal["fsdp2", "ddp"] | None = flag(
        None, "with ddp each GPU has all weights; default as finetune8bh200.py's", MODEL
    )
    optim: str = flag("auto", "an AdamW of torch, or of 8 bits (adamw_bnb_8bit); auto as in finetune8bh200.py", MODEL)
    batch_size: int = flag(4, "examples a micro-batch and GPU", BATCH)
    max_length: int = flag(512, "longest chat in tokens", BATCH)
    regular: bool = flag(False, "no views: an example is its chat, else twice as many tokens", BATCH)
    tokens: int = flag(0, "tokens of a micro-batch instead", BATCH, "--tokens_per_batch")
    save_total_limit: int = flag(1, "checkpoints kept", RUN)
    gpus: str = flag("1,8,16", "numbers of GPUs, with commas", RUN)
    json: bool = flag(False, "print one JSON object", RUN)


class Piece(NamedTuple):
    """One parameter: elements, length of its first dimension, bytes an element, and what happens to it."""

    numel: int
    first: int
    bytes: float
    trained: bool
    unit: int
    quantised: bool
    embedding: bool  # bitsandbytes keeps its moments in float32
    cast: bool  # a matrix that autocast copies

    def shard(self, gpus: int) -> int:
        """Elements on the fullest of the GPUs."""
        return -(-self.first // gpus) * (self.numel // self.first)


def check(r: Recipe) -> list[int]:
    """The numbers of GPUs. Raises UsageError naming all flags that are wrong."""
    gpus = [int(n) if n.strip().isdigit() else 0 for n in r.gpus.split(",")]
    positive = ("lora_rank", "batch_size", "max_length", "save_total_limit")
    wrong = [f"--{n} {getattr(r, n)} is not positive" for n in positive if getattr(r, n) < 1]
    wrong += ["--model_name is missing"] if not r.model_name else []
    wrong += [f"--tokens {r.tokens} is negative"] if r.tokens < 0 else []
    wrong += ["--load_in_4bit: only with --lora"] if r.load_in_4bit and not r.lora else []
    wrong += [f"--gpus {r.gpus} are not positive numbers with commas"] if min(gpus) < 1 else []
    wrong += (
        [f"--optim {r.optim}: its state is not known here, an AdamW's is"]
        if "adamw" not in r.optim and r.optim != "auto"
        else []
    )
    if wrong:
        raise UsageError("\n".join(wrong))
    return gpus


def meta_model(r: Recipe) -> Any:
    """The model on the meta device in bfloat16, without any adapter. Raises UsageError where there is no such model."""
    AttentionInterface.register("counted", counted_attention)
    try:
        config = AutoConfig.from_pretrained(r.model_name, revision=r.revision)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="counted")
    except (*LOADING_ERRORS, StrictDataclassError, TypeError, AttributeError) as error:  # a config with odd values
        raise UsageError(
            f"--model_name {r.model_name}: no causal language model can be made of it ({first_line(error)})"
        ) from None


class _Attention(torch.autograd.Function):
    """Keeps what fused kernels keep: queries, keys and values of all heads, the output, one number a head and token."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def counted_attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Stands for an attention kernel on the meta device; takes (B, heads, T, size), gives (B, T, heads, size)."""
    heads = q.shape[1] // k.shape[1]
    out = _Attention.apply(q, k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1))
    return out.transpose(1, 2).contiguous(), None


def decoder_layers(model: Any) -> list[Any]:
    """The modules that FSDP shards as units of their own. Raises UsageError where the model names none."""
    names = set(model._no_split_modules or ())
    layers = [m for m in model.get_decoder().modules() if type(m).__name__ in names]
    if not layers:
        raise UsageError(f"{type(model).__name__} does not name its decoder layers (_no_split_modules)")
    return layers


def layer_activations(decoder: Any, layer: Any, tokens: int) -> int:
    """Bytes that autograd keeps of one layer's forward pass over a row of tokens, its weights left out."""
    weights = {p.untyped_storage()._cdata for p in decoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    inside = [False]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if inside[0] and storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    hooks = [
        layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        layer.register_forward_hook(lambda *_: inside.__setitem__(0, False)),
    ]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(storage.nbytes() for storage in kept.values())


def adapted(model: Any, r: Recipe) -> Any:
    """The model under the adapter that the training puts on it, and its rows of predictor tokens."""
    s = SimpleNamespace(
        lora_rank=r.lora_rank, lora_dropout=0.0, predictors=r.predictors, jepa=not r.regular, plain=False, revision=None
    )
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda tokens: list(range(len(tokens))))
    with torch.device("meta"):
        return add_adapter(model, s, tokenizer)


def pieces(model: Any, whole: Any, r: Recipe) -> list[Piece]:
    """Every parameter of the model, or with LoRA of `whole`, which wraps it."""
    unit = {id(p): i for i, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    head, embedding = (f().weight for f in (model.get_output_embeddings, model.get_input_embeddings))
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    base = {id(m.weight) for m in model.get_decoder().modules() if type(m) is torch.nn.Linear} - {id(head)}
    held = 2 if r.lora else {"float32": 4, "bfloat16": 2}[r.param_dtype]
    found = []
    for p in whole.parameters():
        trained, quantised = p.requires_grad, r.load_in_4bit and not p.requires_grad and id(p) in base
        size = 0.5 + 4 / 64 if quantised else 4 if r.lora and trained else held
        at = unit.get(id(p), EMBEDDING if p is embedding and p is not head else TAIL)
        found.append(
            Piece(p.numel(), len(p) if p.dim() else 1, size, trained, at, quantised, p is embedding,
                  held == 4 and trained and id(p) in linear)
        )  # fmt: skip
    return found


def optimiser(r: Recipe, gpus: int) -> str:
    """What --optim auto stands for on so many GPUs."""
    return r.optim if r.optim != "auto" else "adamw_bnb_8bit" if gpus == 1 and not r.lora else "adamw_torch_fused"


def moments(piece: Piece, elements: int, optim: str) -> float:
    """Bytes of AdamW's two moments of so many elements of a trained parameter."""
    if "8bit" not in optim:
        return 2 * elements * piece.bytes
    if piece.embedding or piece.numel < 4096:
        return 8 * elements
    return 2 * (elements + 4 * -(-elements // 256))


def units(found: list[Piece], size: Any) -> dict[int, float]:
    """The sum of `size(piece)` over each FSDP unit."""
    sums: dict[int, float] = {TAIL: 0, EMBEDDING: 0}
    for piece in found:
        sums[piece.unit] = sums.get(piece.unit, 0) + size(piece)
    return sums


def on_gpus(found: list[Piece], r: Recipe, gpus: int, parts: int, hidden: int, working: int) -> dict[str, Any]:
    """Bytes on the fullest of so many GPUs, which share the weights out in so many parts, and of each one's files."""
    optim = optimiser(r, gpus)
    trained = [p for p in found if p.trained]
    whole = units(found, lambda p: p.numel * (p.bytes if p.quantised else 2))
    buckets = sum(p.numel * p.bytes for p in trained) if gpus > 1 else 0  # DDP's own copy of the gradients
    layers, end = (
        sorted((n for unit, n in whole.items() if unit >= 0), reverse=True),
        max(whole[TAIL], whole[EMBEDDING]),
    )
    need = {
        "weights": sum(p.shard(parts) * p.bytes for p in found),
        "gradients": sum(p.shard(parts) * p.bytes for p in trained),
        "optimiser": sum(moments(p, p.shard(parts), optim) for p in trained),
        "gathered": end + sum(layers[:2]) if parts > 1 else sum(2 * p.numel for p in found if p.cast),
        "reduced": 6 * max(units(trained, lambda p: p.numel).values()) if parts > 1 else buckets,
        "hidden": hidden,
        "working": working,
    }
    shards = sum(p.shard(parts) * p.bytes + moments(p, p.shard(parts), optim) for p in trained)
    peak = MARGIN * sum(need.values()) + RESERVE
    return {"gpus": gpus} | {n: int(b) for n, b in need.items()} | {"peak": int(peak), "checkpoint_shard": int(shards)}


def plan(r: Recipe) -> dict[str, Any]:
    """Counts and bytes of a recipe; `on` has an entry for each number of GPUs. Raises UsageError."""
    gpus = check(r)
    model = meta_model(r)
    whole = adapted(model, r) if r.lora else model
    tokens = r.tokens or r.batch_size * r.max_length * (1 if r.regular else 2)  # both views are parts of the chat
    config, layers = model.config.get_text_config(), decoder_layers(model)
    found = pieces(model, whole, r)
    width = 2 if r.lora or r.param_dtype == "bfloat16" else 4
    # Where finetune8bh200.py shares out nothing.
    copies = r.sharding == "ddp" or r.load_in_4bit or (r.lora and config.tie_word_embeddings)
    states, mask = (len(layers) + 1) * tokens * config.hidden_size, 3 * tokens * min(tokens, 4096)
    logits = min(tokens, max(1, SLICE // config.vocab_size)) * config.vocab_size
    working = max(layer_activations(model.get_decoder(), layers[-1], tokens), 16 * logits)
    trained = [p for p in found if p.trained]
    saved = trained if r.lora else found
    elements = units(found, lambda p: p.numel)
    return {
        "model": r.model_name,
        "parameters": sum(p.numel for p in found) - (sum(p.numel for p in trained) if r.lora else 0),
        "trainable": sum(p.numel for p in trained),
        "tokens": tokens,
        "largest_layer": max(n for unit, n in elements.items() if unit >= 0),
        "tail_unit": elements[TAIL],
        "embedding_unit": elements[EMBEDDING],
        "checkpoint": int(sum(p.numel * p.bytes + moments(p, p.numel, optimiser(r, max(gpus))) for p in trained)),
        "saved_model": int(sum(p.numel * p.bytes for p in saved)),
        "on": [
            on_gpus(found, r, n, parts, states * (2 if parts > 1 else width) + mask, working)
            for n, parts in ((n, 1 if copies else n) for n in gpus)
        ],
    }


def table(p: dict[str, Any]) -> str:
    """A plan for people, in GiB."""
    rows = [("", *(f"{one['gpus']} GPU{'s' if one['gpus'] > 1 else ''}" for one in p["on"]))]
    for name in (*PARTS, "peak", "checkpoint_shard"):
        rows.append((name.replace("_", " "), *(f"{one[name] / 2**30:.1f}" for one in p["on"])))
    counts = f"{p['parameters']:,} parameters, {p['trainable']:,} trained"
    lines = [f"{p['model']}: {counts}, micro-batches of {p['tokens']} tokens; GiB a GPU:"]
    lines += ["  ".join([f"{row[0]:18}", *(f"{cell:>8}" for cell in row[1:])]) for row in rows]
    ends = f"{p['embedding_unit']:,} the embeddings, {p['tail_unit']:,} norm and head"
    lines.append(f"FSDP units: {p['largest_layer']:,} elements a layer, {ends}")
    sizes = (p[name] / 2**30 for name in ("checkpoint", "saved_model"))
    return "\n".join([*lines, "on the disk: {:.1f} GiB a checkpoint, {:.1f} GiB the saved model".format(*sizes)])


def main(argv: list[str] | None = None) -> int:
    """Prints the plan; 2 where the model or a flag is wrong."""
    recipe, _ = parse_flags(Recipe, __doc__, argv)
    try:
        found = plan(recipe)
    except UsageError as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if recipe.json else table(found))
    return 0
