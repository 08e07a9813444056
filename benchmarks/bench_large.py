"""Times the training of an 8B-parameter model by finetune8bh200.py: speed, memory next to the prediction of
`llm_jepa.memory`, and the time to load, to write a checkpoint, to resume from it and to save the model.

    python benchmarks/bench_large.py --model_name LLAMA --work WORK --json large.json
    python benchmarks/bench_large.py --model_name LLAMA --work WORK --arms jepa regular -- --param_dtype bfloat16

LLAMA is a model folder. If it has only config.json and a tokenizer, a model with random bfloat16 parameters is written
to WORK/base. Flags after -- are passed to the training of each arm. WORK needs space for the base, a checkpoint and the
saved model (`python -m llm_jepa.memory` prints how much); each arm's files are removed when the arm ends.

Each arm trains until a checkpoint after --steps, and then in new processes from it to the next one. `used` is the
memory of the main process's GPU that is not free after the steps, including contexts, NCCL and other programs. `of
matmul` is the rate of the model's own FLOPs (6, with LoRA 4, per parameter of the decoder layers and token, and per
parameter of the output layer and label; recomputation does not count) over that of a large matrix product timed in the
same process. On a CPU there is no memory to compare.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from timing import DEVICE, flag_parser, matmul_rate, measure, report
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import finetune8bh200
from llm_jepa.cli import parse_flags
from llm_jepa.files import read_json, read_jsonl, write_json
from llm_jepa.large import memory
from llm_jepa.large.settings import LargeSettings

JEPA = ["--predictors", "1", "--lbd", "1"]
ARMS = {
    "jepa": JEPA,
    "regular": ["--regular"],
    "lora jepa": [*JEPA, "--lora", "--lora_rank", "64"],
    "lora regular": ["--regular", "--lora", "--lora_rank", "64"],
}
WARM_UP = 2  # steps that are not timed


class TimedTrainer(finetune8bh200.LargeTrainer):
    """Ends the training after its first checkpoint."""

    times: dict[str, Any] = {}  # seconds and bytes

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains; the time until the first step includes that of resuming."""
        self.began = time.perf_counter()
        super().train_from(checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step."""
        self.times.setdefault("begin s", time.perf_counter() - self.began)
        return super().training_step(*args, **kwargs)

    def _save_checkpoint(self, *args: Any) -> None:
        self.times["checkpoint s"] = measure(super()._save_checkpoint, *args)
        self.times["used bytes"] = used_memory()
        self.times["save s"] = measure(self.save_model)
        raise KeyboardInterrupt


def used_memory() -> int:
    """Bytes of the GPU that are not free, 0 without a GPU."""
    free, total = torch.cuda.mem_get_info() if DEVICE == "cuda" else (0, 0)
    return total - free


def worker(file: str, flags: list[str]) -> int:
    """One training process; the main one writes its times to the file. Returns the exit code."""
    times, load = TimedTrainer.times, finetune8bh200.load

    def timed_load(*args: Any) -> Any:
        begin = time.perf_counter()
        model = load(*args)
        times["load s"] = time.perf_counter() - begin
        return model

    finetune8bh200.load, finetune8bh200.LargeTrainer = timed_load, TimedTrainer
    code = finetune8bh200.main(flags)
    if "used bytes" not in times:
        return code
    if os.environ.get("RANK", "0") == "0":
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        write_json(Path(file), times | {"matmul": matmul_rate(dtype)})
    return 0  # ended by TimedTrainer; on another code torchrun would end the others


def base_of(args: argparse.Namespace) -> Path:
    """The model's folder, or a new one with random parameters."""
    model, base = Path(args.model_name), Path(args.work) / "base"
    if list(model.glob("*.safetensors")):
        return model
    if not (base / "config.json").is_file():
        with torch.device(DEVICE):
            made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
        AutoTokenizer.from_pretrained(model).save_pretrained(base)
        made.save_pretrained(base)
        del made
        torch.cuda.empty_cache()
    return base


def train(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """The times of one training. Raises SystemExit if it fails."""
    file = Path(args.work) / "times.json"
    launch = [sys.executable]
    if args.nproc_per_node > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.nproc_per_node)]
    file.unlink(missing_ok=True)
    done = subprocess.run([*launch, __file__, "--worker", str(file), *flags], stdout=subprocess.DEVNULL)
    if not file.exists():
        raise SystemExit(f"bench_large.py: error: training ended with exit code {done.returncode}: {' '.join(flags)}")
    return read_json(file)


def train_arm(name: str, args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """One row of the table."""
    run = Path(args.work) / name.replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    flags = ["--model_name", str(model), "--train_file", args.input_file, "--output_dir", str(run), *ARMS[name]]
    flags += ["--tokens_per_batch", str(args.tokens_per_batch), "--grad_accum", "1", *args.training]
    flags += ["--save_strategy", "steps", "--save_steps", str(args.steps), "--max_steps", str(2 * args.steps + 1)]
    first = train(args, flags)
    print(f"{name}: {first}", file=sys.stderr, flush=True)  # the figures so far
    again = train(args, [*flags, "--resume"])
    steps = [step for _, step in read_jsonl(run / "metrics.jsonl") if "tokens" in step]
    steps = [step for step in steps if WARM_UP < step["step"] <= args.steps]
    shutil.rmtree(run)
    rate = statistics.median(step["tokens_per_second"] for step in steps)
    labels = sum(step["label_tokens"] for step in steps) / sum(step["tokens"] for step in steps)  # per token
    settings = parse_flags(LargeSettings, "", flags)[0]
    full = memory.meta_model(settings, memory.plan_tokenizer(settings))
    layers = sum(p.numel() for layer in memory.decoder_layers(full) for p in layer.parameters())
    work = (4 if "lora" in name else 6) * (layers + full.get_output_embeddings().weight.numel() * labels)
    predicted = memory.plan(settings, [args.nproc_per_node])["on"][0]["peak"]
    used = max(first["used bytes"], again["used bytes"])
    return {
        "arm": name,
        "tokens/s": rate,
        "of matmul": work * rate / args.nproc_per_node / first["matmul"],
        "used GiB": used / 2**30 if used else "-",
        "predicted GiB": predicted / 2**30,
        "predicted/used": predicted / used if used else "-",
        "load s": first["load s"],
        "checkpoint s": first["checkpoint s"],
        "resume s": again["begin s"],
        "save s": again["save s"],
    }


def main() -> None:
    """Prints the table and writes the JSON."""
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2], sys.argv[3:]))
    parser = flag_parser(__doc__)
    parser.add_argument("--model_name", required=True, help="folder with at least config.json and a tokenizer")
    parser.add_argument("--work", required=True, help="folder for models and checkpoints, removed after each arm")
    parser.add_argument("--input_file", default="datasets/synth_train.jsonl", help="training examples")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--nproc_per_node", type=int, default=1, help="GPUs (default 1)")
    parser.add_argument("--tokens_per_batch", type=int, default=4096, help="per step and GPU (default 4096)")
    parser.add_argument("--steps", type=int, default=12, help=f"the first {WARM_UP} are not timed (default 12)")
    parser.add_argument("training", nargs="*", metavar="-- FLAGS", help="flags of finetune8bh200.py")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} are not timed")
    Path(args.work).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # this process shall use no memory of a GPU
        model = pool.submit(base_of, args).result()
    report(args, args.input_file, [train_arm(name, args, model) for name in args.arms])


if __name__ == "__main__":
    main()
