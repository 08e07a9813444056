"""Times the training of an 8B-parameter model by finetune8bh200.py: speed, memory next to the prediction of
`llm_jepa.memory`, and the time to load, to write a checkpoint, to resume from it and to save the model.

    python benchmarks/bench_large.py --model_name LLAMA --work WORK --json large.json
    python benchmarks/bench_large.py --model_name LLAMA --work WORK --arms jepa regular -- --param_dtype bfloat16

LLAMA is a model folder. If it has only config.json and a tokenizer, a model with random bfloat16 parameters is written
to WORK/base. Flags after -- are passed to the training of each arm. WORK needs space for the base, a checkpoint and the
saved model (`python -m llm_jepa.memory` prints how much); each arm's files are removed when the arm ends.

Each arm trains from the start, with a checkpoint after --steps, and then resumes in new processes. `used` is the memory
of the main process's GPU that is not free after the steps, including contexts, NCCL and other programs. `of matmul` is
the rate of the model's own FLOPs (6, with LoRA 4, per parameter of the decoder layers and token, and per parameter of
the output layer and label; recomputation does not count) over that of a large matrix product timed in the same process.
On a CPU there is no memory to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import matmul_rate, table, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import finetune8bh200  # noqa: E402
from llm_jepa.cli import UsageError, parse_flags  # noqa: E402
from llm_jepa.files import read_json, sha256, write_json  # noqa: E402
from llm_jepa.large import memory  # noqa: E402
from llm_jepa.large.settings import LargeSettings  # noqa: E402

JEPA = ["--predictors", "1", "--lbd", "1"]
ARMS = {
    "jepa": JEPA,
    "regular": ["--regular"],
    "lora jepa": [*JEPA, "--lora", "--lora_rank", "64"],
    "lora regular": ["--regular", "--lora", "--lora_rank", "64"],
}
WARM_UP = 2  # steps that are not timed
MORE = 2  # steps after resuming


class Clock(TrainerCallback):
    """Times a training and ends it after its first checkpoint or, if it resumed, after MORE steps."""

    def __init__(self, times: dict[str, Any]):
        self.times, self.trainer, self.began = times, None, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times["begin s"] = time.perf_counter() - self.began
        self.times["first step"] = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.times["first step"] and state.global_step == self.times["first step"] + MORE:
            self.times["used bytes"] = used_memory()
            self.times["save s"] = seconds(self.trainer.save_model)
            raise KeyboardInterrupt

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times["used bytes"] = used_memory()
        raise KeyboardInterrupt


def used_memory() -> int | None:
    """Bytes of the GPU that are not free."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def seconds(action: Any, *args: Any) -> float:
    """Seconds that the action takes."""
    begin = time.perf_counter()
    action(*args)
    return time.perf_counter() - begin


def worker(file: str, flags: list[str]) -> int:
    """One training process; the main one writes its times to the file."""
    times: dict[str, Any] = {}
    clock, load, trainer = Clock(times), finetune8bh200.load, finetune8bh200.LargeTrainer
    train_from, save_checkpoint = trainer.train_from, trainer._save_checkpoint

    def timed_load(*args: Any) -> Any:
        begin = time.perf_counter()
        model = load(*args)
        times["load s"] = time.perf_counter() - begin
        return model

    def timed_training(self: Any, checkpoint: Path | None) -> None:
        clock.trainer, clock.began = self, time.perf_counter()
        self.add_callback(clock)
        train_from(self, checkpoint)

    def timed_checkpoint(self: Any, *args: Any) -> None:
        times["checkpoint s"] = seconds(save_checkpoint, self, *args)

    finetune8bh200.load, trainer.train_from, trainer._save_checkpoint = timed_load, timed_training, timed_checkpoint
    code = finetune8bh200.main(flags)
    if os.environ.get("RANK", "0") == "0" and "used bytes" in times:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        write_json(Path(file), times | {"matmul": matmul_rate(device, dtype)})
    return 0 if "used bytes" in times else code  # ended by its Clock; on another code torchrun would end the others


def base_of(args: argparse.Namespace) -> Path:
    """The model's folder, or a new one with random parameters."""
    model = Path(args.model_name)
    if list(model.glob("*.safetensors")):
        return model
    base = Path(args.work) / "base"
    if not (base / "config.json").is_file():
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
        AutoTokenizer.from_pretrained(model).save_pretrained(base)
        made.save_pretrained(base)
        del made
        torch.cuda.empty_cache()
    return base


def processes_of(args: argparse.Namespace, flags: list[str], file: Path) -> dict[str, Any]:
    """The times of one training. Raises SystemExit if it fails."""
    launch = [sys.executable]
    if args.nproc_per_node > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.nproc_per_node)]
    file.unlink(missing_ok=True)
    done = subprocess.run([*launch, __file__, "--worker", str(file), *flags], stdout=subprocess.DEVNULL)
    if not file.exists():
        raise SystemExit(f"bench_large.py: error: training ended with exit code {done.returncode}: {' '.join(flags)}")
    return read_json(file)


def flops(model: Path, tokens: float, labels: float, lora: bool) -> float:
    """The model's own FLOPs for these numbers of tokens and labels."""
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers = sum(p.numel() for layer in memory.decoder_layers(full) for p in layer.parameters())
    return (4 if lora else 6) * (layers * tokens + full.get_output_embeddings().weight.numel() * labels)


def measure(name: str, args: argparse.Namespace, model: Path, more: list[str]) -> dict[str, Any]:
    """One row of the table."""
    run, file = Path(args.work) / name.replace(" ", "-"), Path(args.work) / "times.json"
    shutil.rmtree(run, ignore_errors=True)
    size = ["--tokens_per_batch", str(args.tokens_per_batch)]
    flags = ["--model_name", str(model), "--train_file", args.input_file, "--output_dir", str(run), *size, *ARMS[name]]
    flags += ["--grad_accum", "1", "--max_steps", str(args.steps + MORE + 1), *more]
    flags += ["--save_strategy", "steps", "--save_steps", str(args.steps)]
    first = processes_of(args, flags, file)
    again = processes_of(args, [*flags, "--resume"], file)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "tokens" in step and WARM_UP < step["step"] <= args.steps]
    rate = statistics.median(step["tokens_per_second"] for step in steps)
    tokens, labels = (sum(step[key] for step in steps) for key in ("tokens", "label_tokens"))
    spent = flops(model, tokens, labels, name.startswith("lora")) / tokens * rate / args.nproc_per_node
    settings, _ = parse_flags(LargeSettings, "", flags)
    predicted = memory.plan(settings, [args.nproc_per_node])["on"][0]["peak"]
    shutil.rmtree(run)
    used = max(first["used bytes"] or 0, again["used bytes"] or 0)
    return {
        "arm": name,
        "tokens/s": rate,
        "of matmul": spent / first["matmul"],
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--work", required=True, help="folder for models and checkpoints, removed after each arm")
    parser.add_argument("--input_file", default="datasets/synth_train.jsonl")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--nproc_per_node", type=int, default=1)
    parser.add_argument("--tokens_per_batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, more = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} are not timed")
    Path(args.work).mkdir(parents=True, exist_ok=True)
    try:
        model = base_of(args)
        rows = [measure(name, args, model, more) for name in args.arms]
    except UsageError as error:
        parser.error(str(error))
    print(table(rows))
    write(args.json, {args.input_file: sha256(args.input_file)}, settings=vars(args), training=more, arms=rows)


if __name__ == "__main__":
    main()
