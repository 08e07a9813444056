"""Checks all that a long training needs before it begins, and names everything that is missing at once.

    python -m llm_jepa.preflight --model_name MODEL --data_files datasets/synth_train.jsonl --output_dir runs \\
        --nproc_per_node 8 --runs 10 -- --param_dtype bfloat16 --batch_size 4

Behind -- stand the training's flags, of which memory.py takes what it knows; those of another arm behind another --,
the one that needs most last. With several nodes every node runs this with its own --node_rank: they meet at
--master_addr and all of them hear what is wrong with any. Exit code: 0 all is well, 1 something is missing, 2 wrong
flags.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from llm_jepa.cli import UsageError, build_parser, first_line, flag, parse_flags
from llm_jepa.large.rendezvous import gather, tell

# memory.py and loading.py are imported where they are used: the processes of the collective need torch alone.

WHAT, WHERE = "Training", "Nodes"


@dataclass
class Preflight:
    """Every flag of preflight.py."""

    model_name: str | None = flag(None, "model folder or hub name", WHAT)
    revision: str | None = flag(None, "commit of a hub model", WHAT)
    data_files: str = flag("", "files that must be there, with commas", WHAT)
    output_dir: str = flag("runs", "folder that the run folders go into", WHAT)
    runs: int = flag(1, "trainings that it must have room for", WHAT)
    device: Literal["cuda", "cpu"] = flag("cuda", "cpu: try the rest on a machine without GPUs", WHERE)
    nproc_per_node: int = flag(1, "processes, one a GPU", WHERE)
    nnodes: int = flag(1, "nodes", WHERE)
    node_rank: int = flag(0, "this node, the first is 0", WHERE)
    master_addr: str = flag("127.0.0.1", "the first node", WHERE)
    master_port: int = flag(29500, "its port for the rendezvous", WHERE)
    join_limit: float = flag(600.0, "seconds to wait for the other nodes", WHERE)
    collective_limit: float = flag(180.0, "seconds for an all-reduce on this node", WHERE)


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


# ---------------------------------------------------------------------------------------------------- this node alone


def gpu_problems(wanted: int, found: int) -> list[str]:
    """One GPU a process."""
    if found >= wanted:
        return []
    look = "set NPROC (--nproc_per_node), or look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    return [f"{wanted} GPUs are needed, {found} are there: {look}"]


def memory_problems(free: list[int], peak: int) -> list[str]:
    """`free` bytes of each GPU against what is predicted for one."""
    return [
        f"GPU {i} has {gib(size)} free, {gib(peak)} are predicted: end what runs there (nvidia-smi), or use more GPUs, "
        "a smaller --batch_size, --lora, or on one GPU --optim adamw_bnb_8bit; python -m llm_jepa.memory shows them"
        for i, size in enumerate(free)
        if size < peak
    ]


def disk_problems(folder: str, free: int, need: int, parts: str) -> list[str]:
    """`free` bytes where the folder is against what the trainings write."""
    if free >= need:
        return []
    return [
        f"{folder} has {gib(free)} free on its disk, {gib(need)} are needed ({parts}): make room or use another folder"
    ]


def disk_need(plan: dict[str, Any], runs: int, limit: int, keep: bool) -> tuple[int, str]:
    """Bytes of so many trainings, one at a time, and of what.

    While a checkpoint is written the `limit` older ones are still there; `keep`: also those of finished trainings.
    """
    model, checkpoint = plan["saved_model"], plan["checkpoint"]
    checkpoints = (runs if keep else 1) * limit + 1
    parts = f"{runs} × {gib(model)} model, {checkpoints} × {gib(checkpoint)} checkpoint, one of them being written"
    return runs * model + checkpoints * checkpoint, parts


def free_space(folder: str) -> int:
    """Bytes free in the file system of a folder that need not exist yet."""
    path = Path(folder).resolve()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def data_problems(files: str) -> list[str]:
    """Every data file is there and not empty."""
    missing = [
        name for name in filter(None, files.split(",")) if not (Path(name).is_file() and Path(name).stat().st_size)
    ]
    return [f"{name}: there is no such file, or it is empty; see datasets/README.md" for name in missing]


def model_folder(name: str, revision: str | None) -> Path | None:
    """Where a model's files lie: a folder, or a hub model's place in the cache; None where it is not here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).is_dir():
        return Path(name)
    with contextlib.suppress(HFValidationError):
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    return None


def weight_problems(folder: Path) -> list[str]:
    """Every shard that the index names is there, as long as its header says, and has the index's tensors."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    wanted: dict[str, set[str]] = {}
    if index.is_file():
        try:
            for tensor, file in json.loads(index.read_text())["weight_map"].items():
                wanted.setdefault(file, set()).add(tensor)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return [f"{index}: cannot be read ({first_line(error)}); download it again"]
    elif single.is_file():
        wanted[single.name] = set()
    else:
        return [f"{folder} has neither {single.name} nor {index.name}: download the weights, or give --pretrain"]
    problems = []
    for path, tensors in ((folder / file, tensors) for file, tensors in sorted(wanted.items())):
        try:
            with safe_open(path, "pt") as file:  # checks the size against the header
                lacking = sorted(tensors - set(file.keys()))
            problems += [f"{path} lacks {len(lacking)} tensors of the index, {lacking[0]} …"] if lacking else []
        except FileNotFoundError:
            problems.append(f"{path} is missing; download it again")
        except (SafetensorError, OSError) as error:
            problems.append(
                f"{path} is not whole ({path.stat().st_size} bytes; {first_line(error)}); download it again"
            )
    return problems


def tokenizer_problems(s: Preflight) -> list[str]:
    """The tokenizer loads as the training loads it."""
    from llm_jepa.model import load_tokenizer

    try:
        load_tokenizer(SimpleNamespace(model_name=s.model_name, revision=s.revision, plain=False))
    except UsageError as error:
        return [str(error)]
    return []


def model_problems(s: Preflight, pretrain: bool) -> list[str]:
    """The model's files; weights that are to be random are not looked for."""
    folder = model_folder(s.model_name, s.revision)
    if folder is None:
        revision = f" --revision {s.revision}" if s.revision else ""
        return [
            f"{s.model_name} is no folder and not downloaded: run `.venv/bin/hf download {s.model_name}{revision} "
            "--exclude 'original/*'`; a gated model needs access, asked for on its page, and `.venv/bin/hf auth login`"
        ]
    return ([] if pretrain else weight_problems(folder)) + tokenizer_problems(s)


def flag_problems(s: Preflight, flags: list[str]) -> list[str]:
    """What the training would refuse of its flags, at each of its starts."""
    from llm_jepa.large.settings import LargeSettings, check_large_settings

    def refuse(message: str) -> None:
        raise UsageError(message)

    parser = build_parser(LargeSettings, "")
    parser.error = refuse
    try:
        given = vars(parser.parse_args(flags))
        if model_folder(s.model_name, s.revision):
            train_file = next(filter(None, s.data_files.split(",")), "rows.jsonl")
            fixed = {"model_name": s.model_name, "revision": s.revision, "train_file": train_file}
            check_large_settings(LargeSettings(**given | fixed), set(given), s.nproc_per_node * s.nnodes > 1)
    except UsageError as error:
        return [f"a training that takes these flags: {line}" for line in str(error).splitlines()]
    return []


def collective_problems(s: Preflight) -> list[str]:
    """An all-reduce of this node's processes, started as the training is."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", s.nproc_per_node]
    command += ["-m", "llm_jepa.preflight", "collective", s.device]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(
        [str(c) for c in command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    kind = "NCCL" if s.device == "cuda" else "gloo"
    try:
        output, _ = process.communicate(timeout=s.collective_limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun ends its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=40)
        process.kill()
        hint = "NCCL_DEBUG=INFO says where it waits" if s.device == "cuda" else "is the machine overloaded?"
        return [f"an all-reduce of {s.nproc_per_node} processes with {kind} took over {s.collective_limit:g} s: {hint}"]
    if process.returncode == 0:
        return []
    said = [line for line in output.splitlines() if "Error" in line] or output.splitlines()[-1:] or ["nothing said"]
    return [f"an all-reduce of {s.nproc_per_node} processes with {kind} failed ({said[0].strip()[:300]})"]


def collective(device: str) -> None:
    """One process of the all-reduce. Raises RuntimeError where the sum is wrong."""
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    value = torch.full((2**20,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(value)
    size = dist.get_world_size()
    if not bool((value == size * (size + 1) / 2).all()):
        raise RuntimeError(f"all-reduce of 1 … {size} gave {value[0].item()}")
    dist.destroy_process_group()


def folder_problems(folder: str) -> list[str]:
    """The folder for the runs can be made and written into."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".preflight-{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return [f"{folder} cannot be written into ({first_line(error)}): use another folder"]
    return []


# ------------------------------------------------------------------------------------------------------------- main


def local_problems(s: Preflight, arms: list[list[str]]) -> tuple[list[str], list[str]]:
    """(what is missing on this node, what could not be checked); `arms` are the flags of the training of each."""
    from llm_jepa.large import memory

    flags = arms[-1]

    recipe, other = build_parser(memory.Recipe, "").parse_known_args(flags)
    recipe = memory.Recipe(**{**vars(recipe), "model_name": s.model_name, "revision": s.revision})
    recipe.gpus = str(s.nproc_per_node * s.nnodes)
    problems, notes, plan = model_problems(s, "--pretrain" in other), [], None
    if model_folder(s.model_name, s.revision):
        try:
            plan = memory.plan(recipe)
        except UsageError as error:
            problems += str(error).splitlines()
    problems += dict.fromkeys(problem for arm in arms for problem in flag_problems(s, arm))
    problems += data_problems(s.data_files) + folder_problems(s.output_dir)
    found = torch.cuda.device_count() if s.device == "cuda" else s.nproc_per_node
    lacking = gpu_problems(s.nproc_per_node, found)
    problems += lacking
    if "--no-gradient_checkpointing" in other:
        notes.append("activations that are kept (--no-gradient_checkpointing): the memory is predicted without")
    if s.device == "cpu":
        notes.append("GPUs and their memory (--device cpu)")
    elif plan and not lacking:
        free = [torch.cuda.mem_get_info(i)[0] for i in range(s.nproc_per_node)]
        problems += memory_problems(free, plan["on"][0]["peak"])
    if plan:
        if "--merge" in other:
            plan["saved_model"] += plan["parameters"] * (4 if recipe.param_dtype == "float32" else 2)
        need, parts = disk_need(plan, s.runs, recipe.save_total_limit, "--keep_checkpoints" in other)
        problems += disk_problems(s.output_dir, free_space(s.output_dir), need, parts)
    else:
        notes.append("memory and room on the disk (nothing is known of the model)")
    if lacking:
        notes.append("an all-reduce (there are too few GPUs)")
    elif s.nproc_per_node > 1 or s.device == "cuda":
        problems += collective_problems(s)
    return problems, notes


def check(s: Preflight) -> None:
    """Raises UsageError naming all flags that are wrong."""
    positive = ("runs", "nproc_per_node", "nnodes", "join_limit", "collective_limit")
    wrong = [f"--{n} {getattr(s, n)} is not positive" for n in positive if getattr(s, n) <= 0]
    wrong += ["--model_name is missing"] if not s.model_name else []
    wrong += [] if 0 <= s.node_rank < s.nnodes else [f"--node_rank {s.node_rank} is not in 0 to {s.nnodes - 1}"]
    wrong += [] if 0 < s.master_port < 65536 else [f"--master_port {s.master_port} is not in 1 to 65535"]
    if wrong:
        raise UsageError("\n".join(wrong))


def main(argv: list[str] | None = None) -> int:
    """Says what is missing; the exit code is in the docstring of the file."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["collective"]:
        collective(argv[1])
        return 0
    at = argv.index("--") if "--" in argv else len(argv)
    s, _ = parse_flags(Preflight, __doc__, argv[:at])
    try:
        check(s)
    except UsageError as error:
        print(f"preflight.py: error: {error}", file=sys.stderr)
        return 2
    arms = [list(arm) for is_end, arm in itertools.groupby(argv[at + 1 :], lambda a: a == "--") if not is_end]
    problems, notes = local_problems(s, arms or [[]])
    if s.nnodes > 1:
        problems = (tell if s.node_rank else gather)(s, problems)
    for note in notes:
        print(f"preflight.py: not checked: {note}", file=sys.stderr)
    for problem in problems:
        print(f"preflight.py: missing: {problem}", file=sys.stderr)
    if not problems:
        print("preflight.py: nothing is missing", file=sys.stderr)
    return 1 if problems else 0
