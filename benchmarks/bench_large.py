"""Training of eight billion weights as finetune8bh200.py does it: speed, memory against memory.py's prediction, and how
long it takes to load, to write a checkpoint, to go on from it and to save the model.

    python benchmarks/bench_large.py --model_name LLAMA --work WORK --json large.json
    python benchmarks/bench_large.py --model_name LLAMA --work WORK --arms jepa regular -- --param_dtype bfloat16

LLAMA: a folder with config.json and tokenizer, or a whole model; without weights random ones in bfloat16 are written to
WORK/base. What stands behind -- goes to the training of each arm. WORK needs room for the base, a checkpoint and the
saved model (memory.py says how much); an arm's are removed behind it.

Each arm is trained from the start, with a checkpoint behind the last of --steps, then by new processes from there. Used
is all of the main process's GPU that is not free when the steps are done, with the processes' contexts, NCCL and what
other programs use. `of matmul` is the rate of the model's own FLOPs, 6 (LoRA: 4) for each weight of the decoder layers
and token and of the output layer and label, over that of a large matrix product timed in the same process; what is
recomputed does not count. On a CPU there is no memory to compare.
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

import finetune  # noqa: E402
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
WARM_UP = 2  # steps whose time does not count
MORE = 2  # steps of the processes that go on from the checkpoint


class Clock(TrainerCallback):
    """Times a training and ends it: behind its first checkpoint, or having gone on from one, MORE steps later."""

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


class Timed(finetune8bh200.Sharded):
    """finetune8bh200.py's engine under a clock."""

    def __init__(self, times: dict[str, Any]):
        self.times, self.clock = times, Clock(times)

    def load(self, *args: Any) -> Any:
        begin = time.perf_counter()
        model = super().load(*args)
        self.times["load s"] = time.perf_counter() - begin
        return model

    def callbacks(self, *args: Any) -> list[TrainerCallback]:
        return [*super().callbacks(*args), self.clock]


def used_memory() -> int | None:
    """Bytes of the GPU that are not free."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def seconds(action: Any, *args: Any) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action(*args)
    return time.perf_counter() - begin


def worker(file: str, flags: list[str]) -> int:
    """A process of a training: the main one writes its times to the file."""
    times: dict[str, Any] = {}
    engine, run_trainer = Timed(times), finetune.run_trainer
    save_checkpoint = finetune8bh200.LargeTrainer._save_checkpoint

    def started(trainer: Any, checkpoints: list[Path]) -> None:
        engine.clock.trainer, engine.clock.began = trainer, time.perf_counter()
        run_trainer(trainer, checkpoints)

    def timed(self: Any, *args: Any) -> None:
        times["checkpoint s"] = seconds(save_checkpoint, self, *args)

    finetune.run_trainer, finetune8bh200.LargeTrainer._save_checkpoint = started, timed
    code = finetune.main(flags, engine)
    if os.environ.get("RANK", "0") == "0" and "used bytes" in times:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        write_json(Path(file), times | {"matmul": matmul_rate(device, dtype)})
    return 0 if "used bytes" in times else code  # its clock ended it; torchrun would end the others


def base_of(args: argparse.Namespace) -> Path:
    """The model's folder, or one of random weights."""
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
    """Times of a training that its clock ends. Raises SystemExit where it fails."""
    launch = [sys.executable]
    if args.nproc_per_node > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.nproc_per_node)]
    file.unlink(missing_ok=True)
    done = subprocess.run([*launch, __file__, "--worker", str(file), *flags], stdout=subprocess.DEVNULL)
    if not file.exists():
        raise SystemExit(f"bench_large.py: error: exit code {done.returncode} of a training: {' '.join(flags)}")
    return read_json(file)


def flops(model: Path, tokens: float, labels: float, lora: bool) -> float:
    """The model's own FLOPs of so many tokens and labels."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers = sum(p.numel() for layer in memory.decoder_layers(whole) for p in layer.parameters())
    return (4 if lora else 6) * (layers * tokens + whole.get_output_embeddings().weight.numel() * labels)


def measure(name: str, args: argparse.Namespace, model: Path, more: list[str]) -> dict[str, Any]:
    """A line of the table."""
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
    """One table, and with --json the same in a file."""
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--work", required=True, help="folder for weights and checkpoints, removed behind each arm")
    parser.add_argument("--input_file", default="datasets/synth_train.jsonl")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--nproc_per_node", type=int, default=1)
    parser.add_argument("--tokens_per_batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, more = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} do not count")
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
