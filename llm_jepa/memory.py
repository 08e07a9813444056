"""Predicts the GPU memory and disk space of a training from the model's config, without loading the model.

    python -m llm_jepa.memory --model_name meta-llama/Llama-3.1-8B-Instruct --tokens 4096 --gpus 1,8,16

Let P be the parameters at w bytes each (--param_dtype: 4 or 2; with LoRA 2), Q the trained ones among them, and W the
GPUs over which FSDP2 shards the first dimension of every tensor. With DDP (also used for 4-bit weights, and for LoRA on
tied embeddings) each GPU has a full copy, so W = 1. Bytes per GPU:

    weights        P·w / W        a 4-bit weight: 0.5 + 4 per block of 64; LoRA's own: 4
    gradients      Q·w / W        reduced after each micro-batch; twice that for --gradient_stats, if W = 1
    optimizer      2·Q·w / W      AdamW's two moments, in the precision of the weights; with 8 bits 2 + 8 per block of
                                  256, but 8 for embeddings and for tensors below 4096 elements, as in transformers
    gathered       2·(end + 2 layers + projectors), W > 1: the layer in use, the next one, and the larger end of the
                   model: embeddings, or last norm and head (tied: one unit), as accelerate 1.15 shards them;
                   W = 1 with float32: autocast's bfloat16 copies of the trained matrices
    reduced        6·(largest trained unit), W > 1: its bfloat16 gradient and the float32 copy that is scattered;
                   DDP: its buckets, as large as the gradients
    hidden         (L + 1)·T·D·w (w = 2 if W > 1) and the mask, T·min(T, 4096)·3: what checkpointing stores for T tokens
                   and L layers; and what autograd stores of the projection of --nitp
    working        the larger of: what autograd stores of one layer while it is recomputed, counted by running the layer
                   on torch's meta device; and MAX_LOGITS logits at 16 bytes (bfloat16, float32, gradients, softmax)

    peak         = 1.05 · sum + 2 GiB

The last line allows for fragmentation, the CUDA context and NCCL; both numbers are assumptions, not measured on a GPU.
P and Q count the projectors of --nitp and --sigreg (12·D² each). On disk, a checkpoint is trained weights and moments,
in W files of equal size; the saved model is the weights without projectors, or with LoRA the adapter. The rows of
tokens that the model lacks are counted if its tokenizer can be loaded.
"""

import json
import sys
from dataclasses import dataclass

from llm_jepa.cli import Refusals, UsageError, flag, parse_flags, run_command
from llm_jepa.large.settings import LargeSettings
from llm_jepa.settings import BATCH, adapter_config, resolve

PLAN = "Memory plan"


@dataclass
class MemoryFlags(LargeSettings):
    """The flags of finetune8bh200.py, most of which have no effect on the memory, and those of this command."""

    tokens_per_batch: int = flag(
        0, "tokens in a micro-batch, views included, instead of --batch_size", BATCH, "--tokens"
    )
    gpus: str = flag("1,8,16", "numbers of GPUs, separated by commas", PLAN)
    json: bool = flag(False, "print one JSON object", PLAN)


def work(argv: list[str] | None) -> None:
    """Prints a plan. Raises UsageError for wrong flags, before torch is imported."""
    s, given = parse_flags(MemoryFlags, __doc__, argv)
    gpus = [int(n) if n.strip().isdigit() else 0 for n in s.gpus.split(",")]
    wrong = Refusals(given)
    wrong.refuse(not s.model_name, "--model_name is missing")
    is_adapter = bool(adapter_config(s.model_name))
    wrong.refuse(is_adapter and not s.lora, f"--model_name {s.model_name} is an adapter: continue it with --lora")
    for name in ("lora_rank", "batch_size", "max_length", "save_total_limit"):
        wrong.refuse(getattr(s, name) < 1, f"--{name} {getattr(s, name)} is not positive")
    wrong.refuse(s.tokens_per_batch < 0, f"--tokens_per_batch {s.tokens_per_batch} is negative")
    wrong.only_if(s.lora, "load_in_4bit", "only with --lora")
    wrong.refuse(min(gpus) < 1, f"--gpus {s.gpus}: give positive numbers separated by commas")
    if wrong:
        raise UsageError("\n".join(wrong))
    from llm_jepa.large.memory import plan, plan_table

    found = plan(resolve(s), gpus)
    print(json.dumps(found) if s.json else plan_table(found))


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, or 2 for a wrong model or flag."""
    return run_command("memory", lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
