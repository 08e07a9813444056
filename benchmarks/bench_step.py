"""Times training steps on the same examples, model, precision and optimizer in every layout.

    pip install -e ".[bench]"        # for TRL's arms, which are skipped if trl is not installed
    python benchmarks/bench_step.py --input_file datasets/synth_train.jsonl --json step.json

Arms: the reference implementation's method (three rows per example, padded to --max_length, logits and hidden states of
all layers at every token); the additive mask, with both views of an example in one row; packed, the default; packed
with the Text view in the chat; packed with --torch_compile; regular fine-tuning, packed; the auxiliary losses, packed;
TRL's SFTTrainer, padded to the longest row, padding-free (a batch in one row) and packed. `statistics` is a step with
what the Trainer computes for the log, and `log` is its share of the step's time, timed inside the step. In
`gradient_stats 1` every step also compares gradients, so at the default --gradient_stats 150 the difference between
these two arms is divided by 150 and by the micro-batches of a step. A step is forward, backward, clipping and AdamW;
the batches are collated before. `useful` tokens are those of chats and views without padding. `time` is relative to
regular packed. `time/tokens` is that divided by the ratio of their useful tokens: 1 if the views cost as much per token
as the chats; `memory/tokens` is the same for peak memory. FLOPs are torch's count for the forward and backward pass;
`of matmul` is their rate over that of a large matrix product timed in the same run. `MFU` counts only 6 FLOPs per
parameter of the decoder layers and useful token, and per parameter of the output layer and label, over the data sheet's
dense bfloat16 rate of an H100 or H200. After each round the table so far is written to FILE.part of --json FILE,
without memory. The exit code is 1 if an arm failed; skipped arms do not count.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import send_to_device
from step_time import PEAK
from timing import DEVICE, ROOT, flag_parser, interleave, matmul_rate, measure, percentiles, report, write_results
from transformers import AutoTokenizer, LlamaConfig

import finetune
from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.files import open_data
from llm_jepa.training.flops import FlopCounter
from llm_jepa.training.trainer import compile_decoder

# About 5M parameters for a CPU, and the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B.
SHAPES = {
    "5m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
           "num_key_value_heads": 4, "tie_word_embeddings": True},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "tie_word_embeddings": True, "vocab_size": 49152},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                     "tie_word_embeddings": True, "rope_theta": 500000.0, "vocab_size": 128256},
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                     "tie_word_embeddings": False, "rope_theta": 500000.0, "vocab_size": 128256},
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {  # name → settings
    "reference layout": {},
    "additive": {"layout": "additive"},
    "packed": {},
    "packed, in_chat": {"text_view": "in_chat"},
    "packed, compiled": {"torch_compile": True},
    "regular packed": {"regular": True},
    "clip": {"jepa_loss": "clip"},
    "clip, in_chat": {"jepa_loss": "clip", "text_view": "in_chat"},
    "infonce": {"jepa_loss": "infonce"},
    "vicreg": {"jepa_loss": "vicreg"},
    "sigreg": {"sigreg": 0.05},
    "regular + stp": {"regular": True, "stp": "geodesic"},
    "regular + nitp": {"regular": True, "nitp": True},
    "clip + nitp": {"jepa_loss": "clip", "nitp": True},
    "clip + nitp, statistics": {"jepa_loss": "clip", "nitp": True, "gradient_stats": 0},
    "clip + nitp, gradient_stats 1": {"jepa_loss": "clip", "nitp": True, "gradient_stats": 1},
    "TRL padded": {"regular": True},
    "TRL padding-free": {"regular": True},
    "TRL packed": {"regular": True},
}
PARTS = {  # of a step: beginnings of the names of torch's operators
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "optimizer": ("aten::_fused_adamw", "aten::linalg_vector_norm", "aten::_foreach", "Optimizer"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index", "aten::_index_put"),
    "other operators": ("aten::",),
}


@dataclass
class Arm:
    """One kind of step: `loss` is a function of the model and one of the `batches`."""

    model: torch.nn.Module
    batches: list[Any]
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    examples: int  # in all batches
    useful: int  # tokens in all batches, without padding
    labels: int  # in all batches
    bf16: bool
    log_seconds: list[float] = field(default_factory=list)  # of each batch, for what the log shows

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())  # with the arm's own projectors
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)  # the default of --optim

    def __call__(self) -> None:
        """Runs all steps."""
        for batch in self.batches:
            self.backward(batch)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def backward(self, batch: Any) -> None:
        """Forward and backward pass of one batch."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.model, batch)
        loss.backward()

    def flops(self) -> float:
        """FLOPs of the forward and backward passes of all batches."""
        with FlopCounter() as counter:
            for batch in self.batches:
                self.backward(batch)
        self.optimizer.zero_grad()
        return float(counter.get_total_flops())

    def model_flops(self) -> float:
        """FLOPs of all batches that the model's matrices need without padding, attention and recomputation."""
        head = self.model.get_output_embeddings().weight.numel()
        layers = sum(p.numel() for p in self.model.get_decoder().layers.parameters())
        return 6.0 * (layers * self.useful + head * self.labels)

    def peak_memory(self) -> float:
        """Peak MB of the steps in addition to the model: gradients and optimizer state count. On a CPU: Linux only."""
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        self()
        return (peak_bytes() - before) / 1e6


def profiled(arm: Arm) -> dict[str, Any]:
    """Shares of the PARTS in the time of the arm's steps; on a CPU the rest is Python, autograd and the profiler."""
    arm()  # the first run allocates
    with torch.profiler.profile() as profiler:
        arm()
    times = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:  # a kernel; its operator has its time too
            continue
        part = next((part for part, names in PARTS.items() if event.key.startswith(names)), "rest")
        times[part] += event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
    return {part: time / sum(times.values()) for part, time in times.items()}


def peak_bytes() -> int:
    """This process's peak memory since the reset."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1000 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def ours(parts: finetune.Parts, s: finetune.Settings) -> Callable:
    """The loss of finetune.py."""
    return lambda _, batch: parts.objective(batch, s.gamma)[0]


def trainers(parts: finetune.Parts, s: finetune.Settings, bf16: bool, log_seconds: list[float]) -> Callable:
    """The same by the Trainer, which adds to its statistics; `log_seconds` gets the time of that."""
    make_arguments = partial(finetune.training_arguments, bf16=bf16)
    trainer = finetune.build_trainer(s, parts, PartialState(), make_arguments=make_arguments)
    trainer.state.max_steps, add = sys.maxsize, trainer.add_statistics
    trainer.add_statistics = lambda *given: log_seconds.append(measure(add, *given))

    def loss(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        trainer.begin_step()
        value = trainer.compute_loss(model, batch, num_items_in_batch=batch["counts"].clamp(min=1).float())
        log_seconds[-1] += measure(trainer.log, {"loss": 0.0})
        return value

    return loss


def reference_batch(items: list[Any], pad_id: int, length: int) -> dict[str, torch.Tensor]:
    """The examples as in the reference implementation: three rows per example, padded to a length."""

    def padded(values: list[np.ndarray], fill: int) -> torch.Tensor:
        rows = [F.pad(torch.tensor(v, dtype=torch.long), (0, length - len(v)), value=fill) for v in values]
        return torch.stack(rows).to(DEVICE)  # (3B, T)

    segments = [item[kind] for kind in range(3) for item in items]
    return {
        "input_ids": padded([x.ids for x in segments], pad_id),
        "attention_mask": padded([np.ones_like(x.ids) for x in segments], 0),
        "labels": padded([np.where(x.labels, x.ids, -100) for x in segments], -100),
        "views": torch.tensor([segment.view for segment in segments[len(items) :]], device=DEVICE),  # (2B,)
    }


def reference_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], lbd: float) -> torch.Tensor:
    """The same loss computed as in the reference implementation: all logits, and hidden states of all layers."""
    rows = {name: x for name, x in batch.items() if name != "views"}
    out, views = model(**rows, output_hidden_states=True, use_cache=False), batch["views"]
    n = len(views) // 2
    hidden = out.hidden_states[-1][n:].float()[torch.arange(2 * n, device=DEVICE), views]  # (2B, D)
    return out.loss + lbd * (1 - F.cosine_similarity(hidden[:n], hidden[n:], dim=-1)).mean()


def labels(items: list[Any]) -> int:
    """The number of label tokens."""
    return sum(int(chat.labels[1:].sum()) for chat, *_ in items)


def trl_arm(name: str, args: argparse.Namespace, parts: finetune.Parts, folder: str) -> Arm:
    """TRL's SFTTrainer on the same tokens and labels with its own collator, loss and metrics."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    items, bf16, packing = parts.train_set.items, args.dtype == "bfloat16", name == "TRL packed"
    free = name == "TRL padding-free"
    config = SFTConfig(
        output_dir=folder, per_device_train_batch_size=1 if packing else args.batch_size, packing=packing,
        padding_free=free, max_length=None if free else args.max_length, report_to=[], bf16=bf16,
        use_cpu=DEVICE == "cpu", gradient_checkpointing=False, completion_only_loss=True, disable_tqdm=True, seed=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    model, tokenizer = copy.deepcopy(parts.model), parts.encoder.renderer.tokenizer
    data = Dataset.from_list([{"input_ids": x.ids, "completion_mask": x.labels.astype(int)} for x, *_ in items])
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()]
    trainer.accelerator.backward = lambda loss, **_: None  # Arm.backward calls loss.backward()
    model.train()
    useful = sum(len(chat.ids) for chat, *_ in items)
    return Arm(model, batches, lambda m, b: trainer.compute_loss(m, dict(b)), len(items), useful, labels(items), bf16)


def head(file: str, n: int, folder: str) -> str:
    """A file in the folder with the first n examples of another one."""
    path = Path(folder) / f"{n}.jsonl"
    with open_data(file) as lines:
        path.write_bytes(b"".join(itertools.islice(lines, n)))
    return str(path)


def settings_of(name: str, args: argparse.Namespace, folder: str) -> finetune.Settings:
    """The settings of an arm on the model in the folder."""
    settings = {"predictors": 0 if "regular" in ARMS[name] else 1, "layout": "packed", "jepa_loss": "cosine"}
    return finetune.Settings(
        train_file=args.input_file, model_name=folder, pretrain=True, lbd=1.0, lm_labels="answer",
        attn_implementation=args.attn_implementation, max_length=args.max_length, batch_size=args.batch_size,
        tokens_per_row=args.tokens_per_row, finetune_seed=1, skip_bad_examples=True, output_dir=f"{folder}/run",
        eval_strategy="no", save_strategy="no", **settings | ARMS[name],
    )  # fmt: skip


def arm_of(
    name: str, args: argparse.Namespace, folder: str, shared: dict[str, Any], change: Callable = lambda item: item
) -> Arm:
    """The arm; arms with the same `shared` train one model. Raises ImportError, or UsageError if it cannot run.

    `change` is applied to each encoded example.
    """
    flash = args.attn_implementation == "flash_attention_2"
    package = "trl" if name.startswith("TRL") else "flash_attn" if flash else None
    if package and importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed")
    wanted = args.steps * args.batch_size
    few = head(args.input_file, 4 * wanted, folder)  # encoding all takes long, and some are skipped
    s = replace(settings_of(name, args, folder), train_file=few)
    if s.torch_compile:
        finetune.check_settings(s, {"torch_compile"})

    def load(*given: Any) -> torch.nn.Module:
        if "model" not in shared:
            with torch.device(DEVICE):  # random numbers of a GPU are fast
                shared["model"] = finetune.load_on_device(*given)
        model = copy.deepcopy(shared["model"]) if s.torch_compile else shared["model"]  # compiling changes it
        model._modules.pop("projectors", None)  # those of another arm
        return model.train()

    parts = finetune.prepare(s, PartialState(), load)
    parts.inspect(half=False)  # as in training: decides whether logits are computed in slices
    items = parts.train_set.items = [change(item) for item in parts.train_set.items[:wanted]]
    if len(items) < wanted:
        raise SystemExit(
            f"{args.input_file}: only {len(items)} of the first {4 * wanted} examples are usable, {wanted} are needed"
        )
    if name.startswith("TRL"):
        return trl_arm(name, args, parts, folder)
    if s.torch_compile:
        compile_decoder(parts.model)
    bf16, collate, loss = args.dtype == "bfloat16", parts.collator, ours(parts, s)
    log_seconds: list[float] = []
    if name == "reference layout":
        pad = parts.encoder.renderer.tokenizer.pad_token_id
        collate, loss = partial(reference_batch, pad_id=pad, length=args.max_length), partial(reference_loss, lbd=s.lbd)
    elif "stat" in name:
        loss = trainers(parts, s, bf16, log_seconds)
    rows = (items[i : i + args.batch_size] for i in range(0, len(items), args.batch_size))
    batches = [send_to_device(collate(few), DEVICE) for few in rows]
    useful = sum(len(segment.ids) for item in items for segment in item)
    arm = Arm(parts.model, batches, loss, len(items), useful, labels(items), bf16, log_seconds)
    arm.optimizer.state = shared.setdefault("moments", arm.optimizer.state)  # one copy for all arms
    return arm


def write_shape(args: argparse.Namespace, folder: str, **changes: Any) -> None:
    """Writes a model folder with only the configuration, that of the shape with these changes, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.vocabulary:
        texts = (f"{e.system or ''}\n{e.user}\n{e.assistant}" for e in read_examples(args.input_file, Problems()))
        tokenizer = tokenizer.train_new_from_iterator(texts, args.vocabulary, show_progress=False)
    tokenizer.save_pretrained(folder)
    shape = {"vocab_size": 0, "max_position_embeddings": 4096} | SHAPES[args.shape] | changes
    shape["vocab_size"] = max(shape["vocab_size"], len(tokenizer))
    LlamaConfig(architectures=["LlamaForCausalLM"], **shape).save_pretrained(folder)


def peak_memory(name: str, arm: Arm) -> float:
    """The arm's peak MB; on a CPU in a new process, whose memory no other arm has used."""
    if DEVICE == "cuda":
        return arm.peak_memory()
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(
    args: argparse.Namespace, arms: dict[str, Arm], flops: Callable[[str], float], rate: float,
    seconds: dict[str, list[float]], memory: dict[str, float],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row of the table per arm. `rate`: FLOP/s of a matrix product; `memory`: peak MB, {} if not measured."""
    times = {name: percentiles(own) for name, own in seconds.items()}
    medians = {name: own["p50"] for name, own in times.items()}
    rates = {name: arm.examples / medians[name] for name, arm in arms.items()}
    others = [name for name in ("reference layout", "TRL padded", "TRL padding-free", "TRL packed") if name in arms]
    usual, gpu = arms.get("regular packed"), torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    peak = PEAK if args.dtype == "bfloat16" and any(kind in gpu for kind in ("H100", "H200")) else None
    for name, arm in arms.items():
        tokens = usual and arm.useful / usual.useful
        yield {
            "arm": name,
            "examples/s": rates[name],
            **{f"× {other}": rates[name] / rates[other] for other in others},
            "time": usual and medians[name] / medians["regular packed"],
            "time/tokens": usual and medians[name] / medians["regular packed"] / tokens,
            "useful tokens/s": arm.useful / medians[name],
            "of matmul": flops(name) / medians[name] / rate,
            "MFU": peak and arm.model_flops() / medians[name] / peak,
            "log": np.median(arm.log_seconds) * len(arm.batches) / medians[name] if arm.log_seconds else None,
            **({"peak MB": memory[name]} if memory else {}),
            **({"memory/tokens": memory[name] / memory["regular packed"] / tokens} if memory and usual else {}),
            **{k: v / args.steps for k, v in times[name].items()},
        }


def step_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags of `arm_of` and `write_shape`."""
    parser = flag_parser(doc)
    parser.add_argument("--input_file", default=str(ROOT / "datasets" / "synth_train.jsonl"), help="training examples")
    parser.add_argument("--tokenizer", default=str(ROOT / "models" / "tiny"), help="tokenizer with a chat template")
    parser.add_argument("--vocabulary", type=int, help="retrain the tokenizer on the examples with this size")
    parser.add_argument("--shape", choices=SHAPES, default="5m", help="of the randomly initialized model (default 5m)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--batch_size", type=int, default=16, help="examples per step (default 16)")
    parser.add_argument("--max_length", type=int, default=512, help="longer examples are skipped (default 512)")
    parser.add_argument("--tokens_per_row", type=int, default=0, help="of packed rows (default: finetune.py's)")
    parser.add_argument("--attn_implementation", help="attention kernel of this project's arms")
    parser.add_argument("--repeats", type=int, default=5, help="how often each arm is timed (default 5)")
    return parser


def main() -> int:
    """Prints the table and writes the JSON. Returns 1 if an arm failed."""
    parser = step_parser(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed together (default 4)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--skip_memory", action="store_true", help="do not measure the peak memory")
    parser.add_argument("--profile", action="store_true", help="instead print which operators the time is spent in")
    parser.add_argument("--write_shape", metavar="FOLDER", help="only write the shape's configuration and tokenizer")
    parser.add_argument("--memory_of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_shape:
        write_shape(args, args.write_shape)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_shape(args, folder)
        if args.memory_of:
            print(arm_of(args.memory_of, args, folder, {}).peak_memory())
            return 0
        shared: dict[str, Any] = {}
        arms, missing = {}, []
        for name in args.arms:
            try:
                arms[name] = arm_of(name, args, folder, shared)
            except (UsageError, ImportError) as error:
                missing.append({"arm": name, "skipped" if isinstance(error, ImportError) else "failed": str(error)})
        if args.profile:
            found = [{"arm": name, **profiled(arm)} for name, arm in arms.items()]
            report(args, args.input_file, [*found, *missing])
        else:
            parameters = next((arm.model.num_parameters() for arm in arms.values()), None)
            flops, rate = cache(lambda name: arms[name].flops()), matmul_rate(getattr(torch, args.dtype))
            rows = partial(compare, args, arms, flops, rate)

            def save(seconds: dict[str, list[float]]) -> None:
                found = [*rows(seconds, {}), *missing]
                write_results(f"{args.json}.part", args, args.input_file, found, parameters=parameters)

            seconds = interleave(arms, args.repeats, save if args.json else None)
            memory = {} if args.skip_memory else {name: peak_memory(name, arm) for name, arm in arms.items()}
            report(args, args.input_file, [*rows(seconds, memory), *missing], parameters=parameters)
    return int(any("failed" in row for row in missing))


if __name__ == "__main__":
    sys.exit(main())
