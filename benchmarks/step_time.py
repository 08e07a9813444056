"""Calculates the time of a training step on many GPUs from published rates. It is a calculation, not a measurement.

    python benchmarks/step_time.py --model_name meta-llama/Llama-3.1-8B-Instruct --tokens 4096 --gpus 8,64,512

With FSDP2 over W GPUs in nodes of 8, a micro-batch of T tokens per GPU, N of them labels, P parameters, L of them in
the decoder layers, H in the output layer, and `--pairs` pairs per GPU:

    compute          (8·L·T + 8·H·N) / (COMPUTE · PEAK)        6 FLOPs per parameter and token, and 2 that
                                                               checkpointing and sliced logits compute again;
                                                               attention is not counted
    all-gather       2 · 2·P · (W − 1)/W / bandwidth           bfloat16 parameters, for the forward and backward pass
    reduce-scatter   4·P · (W − 1)/W / bandwidth               float32 gradients
    latency          3 collectives per layer, each one HOP per other node
    negatives        2 · 2·4·pairs·D·(W − 1) / bandwidth       both views of all pairs in float32, and their gradients
                     + 3·4·pairs²·W·D / (COMPUTE · PEAK)       the similarities and their backward pass

    step = max(compute, all-gather + reduce-scatter + latency) + negatives

FSDP2 gathers the next layer while one is computed; the negatives are needed before the loss, so nothing hides them.
Bandwidth per GPU: NVLINK in one node; with several, no more than the node's InfiniBand ports let through, because each
node receives all parameters once. PEAK, NVLINK and PORT are NVIDIA's figures for H100 SXM, H200 SXM and NDR InfiniBand;
COMPUTE, LINK and HOP are assumptions.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the repository's own modules

from llm_jepa.cli import UsageError, flag, parse_flags, run_command  # noqa: E402
from llm_jepa.memory import MemoryFlags  # noqa: E402
from llm_jepa.settings import adapter_config  # noqa: E402

PEAK = 989.4e12  # FLOP/s, dense bfloat16
NVLINK = 450e9  # bytes/s in each direction; data sheets add both: 900 GB/s
PORT = 50e9  # bytes/s of one NDR port (400 Gb/s)
GPUS_PER_NODE = 8
COMPUTE, LINK = 0.5, 0.8  # achieved share of PEAK, and of NVLINK and PORT (assumptions)
HOP = 10e-6  # seconds that a collective spends per other node (assumption)
PLAN = "Step time"


@dataclass
class StepTimeFlags(MemoryFlags):
    """The flags of the memory plan, and those of this command."""

    gpus: str = flag("8,64,512", "numbers of GPUs, separated by commas", PLAN)
    ports: int = flag(8, "InfiniBand ports of 400 Gb/s per node", PLAN)
    labels: float = flag(0.25, "share of the tokens that are labels", PLAN)
    pairs: int = flag(16, "pairs per GPU and micro-batch; 0: no gathered negatives", PLAN)


def step_time(
    gpus: int, *, parameters: int, in_layers: int, in_head: int, layers: int, size: int, tokens: int, labels: float,
    pairs: int, ports: int = 8,
) -> dict[str, float]:  # fmt: skip
    """Seconds of a micro-batch and its parts by the formulas above; `size` is D, `labels` the share of the tokens."""
    nodes, others = -(-gpus // GPUS_PER_NODE), (gpus - 1) / gpus
    bandwidth = LINK * (NVLINK if nodes == 1 else min(NVLINK, ports * PORT))
    rate = COMPUTE * PEAK
    parts = {
        "compute": 8 * tokens * (in_layers + in_head * labels) / rate,
        "all-gather": 2 * 2 * parameters * others / bandwidth,
        "reduce-scatter": 4 * parameters * others / bandwidth,
        "latency": 3 * layers * (nodes - 1) * HOP,
        "negatives": 16 * pairs * size * (gpus - 1) / bandwidth + 12 * pairs**2 * gpus * size / rate,
    }
    network = parts["all-gather"] + parts["reduce-scatter"] + parts["latency"]
    parts["step"] = max(parts["compute"], network) + parts["negatives"]
    return parts | {"tokens/s": gpus * tokens / parts["step"], "network": network}


def work(argv: list[str] | None) -> None:
    """Prints the table."""
    s, _ = parse_flags(StepTimeFlags, __doc__, argv)
    if not s.model_name or not all(n.strip().isdigit() and int(n) for n in s.gpus.split(",")):
        raise UsageError("give --model_name, and with --gpus positive numbers separated by commas")
    if s.ports < 1 or s.pairs < 0 or not 0 <= s.labels <= 1:
        raise UsageError("--ports is at least 1, --pairs at least 0, and --labels from 0 to 1")
    if s.lora or adapter_config(s.model_name):
        raise UsageError("--lora, and adapters: the calculation is for full fine-tuning")
    import pandas

    from llm_jepa.large.memory import decoder_layers, meta_model, plan_tokenizer

    model = meta_model(s, plan_tokenizer(s))
    layers, head = decoder_layers(model), model.get_output_embeddings().weight
    shape = {"parameters": model.num_parameters(), "layers": len(layers), "in_head": head.numel(),
             "in_layers": sum(p.numel() for layer in layers for p in layer.parameters()), "size": head.shape[1],
             "tokens": s.tokens, "labels": s.labels, "pairs": s.pairs, "ports": s.ports}  # fmt: skip
    rows = []
    for n in map(int, s.gpus.split(",")):
        found = step_time(n, **shape)
        rate, network = found.pop("tokens/s"), found.pop("network")
        limit = "compute" if found["compute"] > network else "network"
        rows.append({"GPUs": n, **{f"{k} ms": 1e3 * v for k, v in found.items()}, "tokens/s": rate, "limit": limit})
    print(f"{s.model_name}, {shape['tokens']} tokens per GPU and micro-batch, {s.ports} ports per node: calculated")
    print(pandas.DataFrame(rows).to_string(index=False, float_format="{:,.1f}".format))


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, or 2 for a wrong model or flag."""
    return run_command("step_time.py", lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
