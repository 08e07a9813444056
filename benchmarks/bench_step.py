"""Times training steps on the same examples, model, precision and optimizer in every layout.

    pip install -e ".[bench]"        # for TRL's arms, which are skipped if trl is not installed
    python benchmarks/bench_step.py --input_file datasets/synth_train.jsonl --json step.json
    python benchmarks/bench_step.py --growth growth.png --json growth.json

Arms: the reference implementation's method (three rows per example, padded to 512 tokens, logits and all layers' hidden
states at every token); the additive mask, with both views of an example in one row; packed, the default of finetune.py;
packed with the Text view in the chat; regular fine-tuning, packed; TRL's SFTTrainer, padded to the longest row and
packed. A step is collation, forward, backward, clipping and AdamW. `useful` tokens are those of chats and views without
padding. `time/tokens` is an arm's time over that of regular packed, divided by the ratio of their useful tokens: 1 if
the views cost as much per token as the chats. FLOPs are torch's count for the forward and backward pass; `of matmul` is
their rate over that of a large matrix product timed in the same run.

With --growth: the time of a packed step for 1, 2, 4 and 8 times the examples, and for 1, 2, 4 and 8 times their length.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from timing import interleave, matmul_rate, percentiles, table, write
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
from llm_jepa.data.examples import Problems, read_examples  # noqa: E402
from llm_jepa.data.segments import Segment  # noqa: E402
from llm_jepa.files import sha256  # noqa: E402
from llm_jepa.training.checks import on_device  # noqa: E402

# About 5M parameters for a CPU, and the shape of Llama-3.2-1B.
SHAPES = {
    "5m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
           "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                     "tie_word_embeddings": True, "rope_theta": 500000.0},
}  # fmt: skip
PADDED = 512  # tokens of each of the reference's rows


@dataclass
class Arm:
    """One kind of step: `batches` stores the examples of each step, `loss` collates them and runs the model."""

    model: torch.nn.Module
    batches: list[Any]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    examples: int  # in all batches
    useful: int  # tokens in all batches, without padding
    bf16: bool

    def __post_init__(self) -> None:
        fused = next(self.model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused or None)

    def __call__(self) -> None:
        """Takes all steps."""
        for batch in self.batches:
            self.backward(batch)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def backward(self, batch: Any) -> None:
        """Forward and backward pass of one batch."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.model, batch)
        loss.backward()

    def flops(self) -> float:
        """FLOPs of the forward and backward passes of all batches."""
        with FlopCounterMode(display=False) as counter:
            for batch in self.batches:
                self.backward(batch)
        self.optimizer.zero_grad()
        return float(counter.get_total_flops())


def ours(parts: finetune.Parts, model: torch.nn.Module, s: finetune.Settings) -> Callable:
    """The loss of finetune.py with the layout of `parts`."""
    selector = finetune.LMHeadSelector(model)

    def loss(model: torch.nn.Module, items: list[Any]) -> torch.Tensor:
        batch = on_device(parts.collator(items), next(model.parameters()).device)
        lm_sum, states = selector.lm_sum(model, batch)
        terms = [(term, term.weight) for term in parts.terms]
        return finetune.objective(lm_sum, states, batch["counts"].clamp(min=1), s.gamma, terms)[0]

    return loss


def reference_loss(pad_id: int, lbd: float) -> Callable:
    """The same loss computed as in the reference implementation, with three padded rows per example."""

    def loss(model: torch.nn.Module, items: list[Any]) -> torch.Tensor:
        segments = [segment for kind in range(3) for segment in (item[kind] for item in items)]
        device, n = next(model.parameters()).device, len(items)
        ids = torch.full((3 * n, PADDED), pad_id)  # (3B, T)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for r, segment in enumerate(segments):
            tokens = torch.tensor(segment.ids, dtype=torch.long)
            ids[r, : len(tokens)] = tokens
            mask[r, : len(segment.ids)] = 1
            chosen = torch.tensor(segment.labels)
            labels[r, : len(chosen)][chosen] = tokens[chosen]
        out = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device),
            output_hidden_states=True, use_cache=False,
        )  # fmt: skip
        views = torch.tensor([segment.view for segment in segments[n:]], device=device)
        hidden = out.hidden_states[-1][n:].float()[torch.arange(2 * n, device=device), views]  # (2B, D)
        return out.loss + lbd * (1 - F.cosine_similarity(hidden[:n], hidden[n:], dim=-1)).mean()

    return loss


def trl_arm(args: argparse.Namespace, parts: finetune.Parts, packing: bool, folder: str) -> Arm:
    """TRL's SFTTrainer on the same chats with labels on the answers and its own collator, loss and metrics."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def turns(example: Any) -> dict[str, list]:
        contents = {"system": example.system, "user": example.user, "assistant": example.assistant}
        chat = [{"role": role, "content": content} for role, content in contents.items() if content]
        return {"prompt": chat[:-1], "completion": chat[-1:]}

    rows = args.steps * args.batch_size
    config = SFTConfig(
        output_dir=folder, per_device_train_batch_size=1 if packing else args.batch_size, packing=packing,
        max_length=PADDED, report_to=[], bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu",
        gradient_checkpointing=False, dataset_num_proc=1, disable_tqdm=True, seed=1, dataloader_pin_memory=False,
    )  # fmt: skip
    model = copy.deepcopy(parts.model)
    data = Dataset.from_list([turns(e) for e in parts.train_set.examples[:rows]])
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=parts.encoder.renderer.tokenizer
    )
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    trainer.accelerator.backward = lambda loss, **_: None  # Arm.backward calls loss.backward()
    model.train()
    useful = sum(len(item[0].ids) for item in parts.train_set.items[:rows])
    return Arm(model, batches, lambda m, b: trainer.compute_loss(m, dict(b)), rows, useful, args.dtype == "bfloat16")


def arm_of(name: str, args: argparse.Namespace, folder: str, shared: dict[str, Any] | None = None) -> Arm | None:
    """The arm, or None if its package is not installed; arms with the same `shared` train one model."""
    regular = name.startswith(("regular", "TRL"))
    s = finetune.Settings(
        train_file=args.input_file, model_name=folder, pretrain=True, predictors=0 if regular else 1, lbd=1.0,
        regular=regular, layout="additive" if name == "additive" else "packed", lm_labels="answer",
        text_view="in_chat" if name == "packed, in_chat" else "alone", attn_implementation=args.attn_implementation,
        max_length=args.max_length, batch_size=args.batch_size, tokens_per_row=args.tokens_per_row, finetune_seed=1,
        skip_bad_examples=True,
    )  # fmt: skip
    parts = finetune.prepare(s, PartialState())
    parts.train_set.items = parts.train_set.items[: args.steps * args.batch_size]
    parts.model = (shared if shared is not None else {}).setdefault("model", parts.model)
    parts.model.train()
    if name.startswith("TRL"):
        if importlib.util.find_spec("trl") is None:
            return None
        return trl_arm(args, parts, name == "TRL packed", folder)
    items = parts.train_set.items
    if len(items) < args.steps * args.batch_size:
        raise SystemExit(f"{args.input_file} has only {len(items)} usable examples for {args.steps} steps")
    batches = [items[i : i + args.batch_size] for i in range(0, len(items), args.batch_size)]
    pad = parts.encoder.renderer.tokenizer.pad_token_id
    loss = reference_loss(pad, s.lbd) if name == "reference's way" else ours(parts, parts.model, s)
    useful = sum(len(segment.ids) for item in items for segment in item)
    return Arm(parts.model, batches, loss, len(items), useful, args.dtype == "bfloat16")


ARMS = ("reference's way", "additive", "packed", "packed, in_chat", "regular packed", "TRL padded", "TRL packed")


def peak_memory_gpu(arm: Arm) -> float:
    """Peak MB of an arm's steps in addition to its model; gradients and optimizer state count."""
    arm.optimizer.zero_grad()
    arm.optimizer.state.clear()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_memory(name: str, args: argparse.Namespace, folder: str) -> float:
    """The same on a CPU (Linux), in a process of its own."""
    arm = arm_of(name, args, folder)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak_kilobytes()
    arm()
    return (_peak_kilobytes() - before) / 1e3


def _peak_kilobytes() -> int:
    """This process's peak memory since the reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def write_shape(args: argparse.Namespace, folder: str) -> None:
    """Writes a model folder with only the configuration and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.vocabulary:
        texts = (f"{e.system or ''}\n{e.user}\n{e.assistant}" for e in read_examples(args.input_file, Problems()))
        tokenizer = tokenizer.train_new_from_iterator(texts, args.vocabulary, show_progress=False)
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **SHAPES[args.shape]).save_pretrained(folder)


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_file", default=str(ROOT / "datasets" / "synth_train.jsonl"), help="training examples")
    parser.add_argument("--tokenizer", default=str(ROOT / "models" / "tiny"), help="tokenizer with a chat template")
    parser.add_argument("--vocabulary", type=int, help="retrain the tokenizer on the examples with this size")
    parser.add_argument("--shape", choices=SHAPES, default="5m", help="of the randomly initialized model (default 5m)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--batch_size", type=int, default=16, help="examples per step (default 16)")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed together (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each arm's steps are timed (default 5)")
    parser.add_argument("--max_length", type=int, default=PADDED, help="longer examples are skipped (default 512)")
    parser.add_argument("--tokens_per_row", type=int, default=0, help="of packed rows (default: finetune.py's)")
    parser.add_argument("--attn_implementation", help="attention kernel of this project's arms")
    parser.add_argument("--growth", metavar="PNG", help="measure growth instead and plot it to this file")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="default: all")
    parser.add_argument("--json", help="file for the results and their provenance")
    parser.add_argument("--memory_of", choices=ARMS, help=argparse.SUPPRESS)
    return parser


def results(args: argparse.Namespace, arms: dict[str, Arm], folder: str) -> Iterator[dict[str, Any]]:
    """One row of the table per arm."""
    seconds = interleave(arms, args.repeats)
    rate = matmul_rate(args.device, getattr(torch, args.dtype))
    rates = {name: arms[name].examples / statistics.median(times) for name, times in seconds.items()}
    for name, arm in arms.items():
        if args.device == "cuda":
            memory = peak_memory_gpu(arm)
        else:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
            memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        median = statistics.median(seconds[name])
        usual = arms.get("regular packed")
        share = usual and median / statistics.median(seconds["regular packed"]) / (arm.useful / usual.useful)
        yield {
            "arm": name,
            "examples/s": rates[name],
            **{
                f"× {other}": rates[name] / rates[other]
                for other in ("reference's way", "TRL padded", "TRL packed")
                if other in rates
            },
            "time/tokens": share,
            "useful tokens/s": arm.useful / median,
            "of matmul": arm.flops() / median / rate,
            "peak MB": memory,
            **{k: v / args.steps for k, v in percentiles(seconds[name]).items()},
        }


GROWTH = (1, 2, 4, 8)


def longer(item: tuple[Segment, ...], times: int) -> tuple[Segment, ...]:
    """The item with each of its segments repeated, in place of a longer text."""
    return tuple(
        dataclasses.replace(
            x, ids=np.tile(x.ids, times), labels=np.tile(x.labels, times),
            view=None if x.view is None else x.view + len(x.ids) * (times - 1),
        )
        for x in item
    )  # fmt: skip


def growth(args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Times a packed step with more and with longer examples."""
    args.steps = 8
    arm, arms = arm_of("packed", args, folder), {}
    for what, by in (("examples", 1), ("length", 0)):
        for times in GROWTH:
            batch = [item for part in arm.batches[: times if by else 1] for item in part]
            batch = batch if by else [longer(item, times) for item in batch]
            useful = sum(len(x.ids) for item in batch for x in item)
            arms[f"{what} × {times}"] = dataclasses.replace(arm, batches=[batch], examples=len(batch), useful=useful)
    seconds, lines = interleave(arms, args.repeats), []
    for name, times in seconds.items():
        first, median = seconds[name.split(" × ")[0] + " × 1"], statistics.median(times)
        lines.append({
            "step": name, "examples": arms[name].examples, "tokens": arms[name].useful,
            "× time": median / statistics.median(first), "tokens/s": arms[name].useful / median, **percentiles(times),
        })  # fmt: skip
    return lines


def draw(lines: list[dict[str, Any]], path: str) -> None:
    """Plots time over tokens on logarithmic axes, with a line of proportional growth through each first point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for what, colour, mark in (("examples", "#0072B2", "o"), ("length", "#D55E00", "^")):
        some = [line for line in lines if line["step"].startswith(what)]
        tokens, times = [x["tokens"] for x in some], [1e3 * x["p50"] for x in some]
        axes.loglog(tokens, times, color=colour, marker=mark, label=f"more {what}" if what == "examples" else "longer")
        axes.loglog(tokens, [times[0] * t / tokens[0] for t in tokens], color=colour, ls=":", lw=1)
    axes.set(xlabel="tokens per step, views included", ylabel="time per step (ms, median)", title="A packed step")
    axes.plot([], [], color="grey", ls=":", lw=1, label="proportional to tokens")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the table and writes the JSON."""
    args = flags().parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_shape(args, folder)
        if args.memory_of:
            return print(json.dumps(peak_memory(args.memory_of, args, folder)))
        if args.growth:
            lines = growth(args, folder)
            draw(lines, args.growth)
            print(table(lines))
            return write(args.json, {args.input_file: sha256(args.input_file)}, shape=vars(args), results=lines)
        shared: dict[str, Any] = {}
        arms = {name: arm for name in args.arms if (arm := arm_of(name, args, folder, shared))}
        lines = list(results(args, arms, folder))
        parameters = sum(p.numel() for p in next(iter(arms.values())).model.parameters())
    print(table(lines))
    shape = vars(args) | {"parameters": parameters}
    write(args.json, {args.input_file: sha256(args.input_file)}, shape=shape, results=lines)


if __name__ == "__main__":
    main()
