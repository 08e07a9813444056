"""Flags that finetune8bh200.py adds to those of finetune.py, and their checks."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Literal

from llm_jepa.cli import Refusals, UsageError, flag
from llm_jepa.settings import MODEL, OPTIM, RUN, Settings, check_settings


@dataclass
class LargeSettings(Settings):
    """The flags of finetune.py and those that only a large model needs."""

    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass", MODEL)
    param_dtype: Literal["float32", "bfloat16"] = flag(
        "float32",
        "precision of the trained parameters, their gradients and AdamW's moments. bfloat16 halves the memory, but "
        "updates smaller than 1/256 of a parameter are lost, and with --adam_beta2 above 0.99 AdamW's second moment "
        "cannot decrease",
        MODEL,
    )
    sharding: Literal["fsdp2", "ddp"] | None = flag(
        None,
        "for several processes: fsdp2 shards parameters, gradients and optimizer states; ddp keeps a full copy in each "
        "process. Default fsdp2, but ddp with --load_in_4bit, or with --lora on a model with tied embeddings. "
        "Without the full model, fsdp2 refuses --eval_generate, --sample_generations, --save_best, --same_flop, "
        "--torch_compile and --gradient_stats",
        MODEL,
    )
    load_in_4bit: bool = flag(False, "QLoRA: frozen parameters in 4 bits (needs the package bitsandbytes)", MODEL)
    optim: str = flag(
        "auto",
        "optimizer of transformers; auto: adamw_bnb_8bit for full fine-tuning on one GPU, else adamw_torch_fused",
        OPTIM,
    )
    gradient_stats: int = flag(0, "compare gradients every N steps, with a second copy of them; 0: never", RUN)

    @property
    def tokens(self) -> int:
        """The most tokens of a micro-batch, those of the views included."""
        return self.tokens_per_batch or self.batch_size * self.max_length * (1 if self.regular else 2)


def choose_sharding(requested: str | None, *, lora: bool, load_in_4bit: bool, tied: bool) -> str:
    """How several processes store the weights: fsdp2 (sharded) or ddp (a full copy each).

    `tied`: whether the embeddings are also the output layer. Raises UsageError if the weights cannot be sharded as
    requested.
    """
    unshardable = "4-bit weights" if load_in_4bit else None
    if lora and tied:
        unshardable = "tied embeddings under a LoRA adapter"  # accelerate would shard them twice
    if requested == "fsdp2" and unshardable:
        raise UsageError(f"--sharding fsdp2: cannot shard {unshardable}; use --sharding ddp")
    return requested or ("ddp" if unshardable else "fsdp2")


def check_large_settings(s: LargeSettings, given: set[str], several: bool) -> LargeSettings:
    """Resolves defaults that depend on other flags or on the hardware.

    `given`: names of the flags on the command line; `several`: whether several processes train together. Raises
    UsageError with all wrong or inapplicable flags.
    """
    r, sharding = Refusals(given), None
    if several and s.model_name:
        from llm_jepa.model import load_config

        config = load_config(*s.base, trust_remote_code=s.trust_remote_code)
        tied = config.get_text_config().tie_word_embeddings
        sharding = choose_sharding(s.sharding, lora=s.lora, load_in_4bit=s.load_in_4bit, tied=tied)
    r.only_if(s.lora, "load_in_4bit", "only with --lora")
    r.only_if(not s.lora, "param_dtype", "not with --lora, whose adapter is float32; --dtype sets the frozen weights")
    mixed = s.param_dtype == "bfloat16" and s.dtype not in ("auto", "bfloat16")
    r.refuse(mixed, f"--dtype {s.dtype}: not with --param_dtype bfloat16")
    reads_base = s.init_lora_weights in ("olora", "pissa", "mica") and (s.load_in_4bit or sharding == "fsdp2")
    where = "--load_in_4bit or --sharding fsdp2, where it cannot be calculated from the base"
    r.refuse(reads_base, f"--init_lora_weights {s.init_lora_weights}: not with {where}")
    r.only_if(several, "sharding", "only with several processes")
    unsharded = "eval_generate sample_generations save_best same_flop torch_compile gradient_stats"
    r.only_if(sharding != "fsdp2", unsharded, "not with --sharding fsdp2, where no process has the full model")
    s = replace(s, sharding=sharding)
    if sharding == "fsdp2" and s.optim == "adamw_bnb_8bit" and "optim" not in given:
        s = replace(s, optim="auto")  # --config of a run on one GPU, which resolved its default
    if s.optim == "auto":
        s = replace(s, optim="adamw_torch_fused")
        if not several and not s.lora:
            check_settings(s, given, r, several)  # mistakes are reported before the slow import
            import torch

            s = replace(s, optim="adamw_bnb_8bit") if torch.cuda.is_available() else s
    bitsandbytes = "bnb" in s.optim or "8bit" in s.optim
    r.refuse(bitsandbytes and sharding == "fsdp2", f"--optim {s.optim}: not with --sharding fsdp2")
    r.refuse(
        (bitsandbytes or s.load_in_4bit) and importlib.util.find_spec("bitsandbytes") is None,
        f"{'--load_in_4bit' if s.load_in_4bit else f'--optim {s.optim}'}: install the package bitsandbytes first "
        "(.venv/bin/pip install bitsandbytes)",
    )
    return check_settings(s, given, r, several)
