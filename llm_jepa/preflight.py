"""Checks everything that a long training needs before it starts, and reports all problems at once.

    python -m llm_jepa.preflight --model_name MODEL --data_files datasets/synth_train.jsonl --output_dir runs \\
        --nproc_per_node 8 --runs 10 -- --param_dtype bfloat16 --batch_size 4

The flags of the training follow `--`. For trainings with several sets of flags, put another `--` between the sets: the
one that needs the most memory decides. With several nodes, run this on each with its own --node_rank: the nodes
exchange their problems at --master_addr, and each prints all of them. Exit code: 0 ready, 1 something is missing, 2
wrong flags.
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from llm_jepa.cli import Refusals, UsageError, first_line, flag, parse_flags, run_command
from llm_jepa.files import read_json

# torch and transformers are imported where they are used: not before the flags are accepted, and the processes of the
# all-reduce need only torch.

TRAINING, NODES = "Training", "Nodes"
GRACE = 10.0  # seconds after --join_limit that nodes which have connected may still exchange their problems


@dataclass
class Preflight:
    """The flags of the preflight."""

    model_name: str | None = flag(None, "model folder or hub name", TRAINING)
    revision: str | None = flag(None, "commit of a hub model", TRAINING)
    data_files: str = flag("", "files that must exist, separated by commas", TRAINING)
    output_dir: str = flag("runs", "folder of the run folders", TRAINING)
    runs: int = flag(1, "trainings that must fit on the disk", TRAINING)
    device: Literal["cuda", "cpu"] = flag("cuda", "cpu: skip the checks of GPUs", NODES)
    nproc_per_node: int = flag(1, "processes, one per GPU", NODES)
    nnodes: int = flag(1, "nodes", NODES)
    node_rank: int = flag(0, "number of this node, from 0", NODES)
    master_addr: str = flag("127.0.0.1", "address of node 0", NODES)
    master_port: int = flag(29500, "port of node 0 for the rendezvous", NODES)
    join_limit: float = flag(600.0, "seconds to wait for the other nodes", NODES)
    collective_limit: float = flag(180.0, "seconds for an all-reduce on this node", NODES)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2g} GiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


# ------------------------------------------------------------------------------------------------------------- model


def model_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a model's files, in the hub's cache for a hub model; None if it is not on this node."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "config.json", revision=revision, local_files_only=True)
    except OSError:
        return None
    return Path(found).parent if found else None


def weight_problems(folder: Path) -> list[str]:
    """Checks that every file of the weights is complete and has the tensors that the index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (single.is_file() or index.is_file()):
        return [f"{folder} has neither {single.name} nor {index.name}: download the weights, or use --pretrain"]
    files: dict[str, set[str]] = {} if index.is_file() else {single.name: set()}
    problems = []
    try:
        for tensor, file in read_json(index)["weight_map"].items() if index.is_file() else ():
            files.setdefault(file, set()).add(tensor)
    except (UsageError, KeyError, AttributeError, TypeError) as error:  # not JSON, or not an index
        problems.append(f"{index} is damaged ({first_line(error)}); download it again")
    for file, tensors in sorted(files.items()):
        try:
            with safe_open(folder / file, "pt") as opened:  # compares the file's size with its header
                if missing := tensors - set(opened.keys()):
                    problems.append(f"{folder / file} lacks {len(missing)} tensors of {index.name}; download it again")
        except (SafetensorError, OSError) as error:
            problems.append(f"{folder / file} is missing or incomplete ({first_line(error)}); download it again")
    return problems


def model_problems(s: Any) -> list[str]:
    """Checks the weights (unless they will be random) and the tokenizer of a training's settings."""
    from llm_jepa.model import check_name, load_tokenizer, tokenizer_options

    name, revision = s.base
    try:
        check_name(name, "model_name" if name == s.model_name else f"model_name {s.model_name}, an adapter of")
    except UsageError as error:
        return [str(error)]
    folder = model_folder(name, revision)
    if folder is None:
        download = f".venv/bin/hf download {name}" + (f" --revision {revision}" if revision else "")
        return [
            f"{name} is neither a model folder nor downloaded: run `{download} --exclude 'original/*'` (for a gated "
            "model, first request access on its page and run `.venv/bin/hf auth login`)"
        ]
    problems = [] if s.pretrain else weight_problems(folder)
    try:
        load_tokenizer(s.model_name, s.revision, **tokenizer_options(s))
    except UsageError as error:
        problems.append(str(error))
    return problems


# -------------------------------------------------------------------------------------------------------------- disk


def disk_problems(folder: str, plan: dict[str, Any], runs: int, limit: int, keep: bool) -> list[str]:
    """Compares the free space of the folder, which need not exist, with what this number of trainings writes.

    A checkpoint is written before the oldest of `limit` is removed. `keep`: finished trainings keep their checkpoints.
    """
    model, checkpoint, checkpoints = plan["saved_model"], plan["checkpoint"], (runs if keep else 1) * limit + 1
    path = Path(folder).resolve()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    need = runs * model + checkpoints * checkpoint
    parts = f"{runs} × {gib(model)} model, {checkpoints} × {gib(checkpoint)} checkpoint, one of them being written"
    short = f"{folder} has {gib(free)} free on its disk, {gib(need)} are needed ({parts}): use another folder"
    return [short] if free < need else []


# -------------------------------------------------------------------------------------------------------- all-reduce


def all_reduce(rank: int, processes: int, device: str, store: str) -> None:
    """One process of an all-reduce of 2**20 numbers. Raises RuntimeError if the sum is wrong."""
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=processes)
    value = torch.full((2**20,), rank + 1.0, device=device)
    dist.all_reduce(value)
    if not bool((value == processes * (processes + 1) / 2).all()):
        raise RuntimeError(f"the sum of 1 … {processes} is {value[0].item()}")
    dist.destroy_process_group()


def collective_problems(processes: int, device: str, limit: float) -> list[str]:
    """Runs an all-reduce of this node's processes; ends them if they take longer than `limit` seconds."""
    import torch.multiprocessing as mp

    name, ends = f"an all-reduce of {processes} processes on {device}", time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(all_reduce, (processes, device, f"{folder}/store"), processes, join=False)
        try:
            while not context.join(max(0.0, ends - time.monotonic())):
                if time.monotonic() > ends:
                    hint = "; NCCL_DEBUG=INFO shows where it waits" if device == "cuda" else ""
                    return [f"{name} took more than {limit:g} s{hint}"]
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            return [f"{name} failed ({str(error).strip().splitlines()[-1]})"]
        finally:
            for process in context.processes:
                process.kill()
    return []


# ------------------------------------------------------------------------------------------------------------- nodes


def problems_of_all_nodes(problems: list[str], s: Preflight) -> list[str]:
    """Exchanges the problems of all nodes within --join_limit; what prevents that is a problem of this node.

    A marker in the folder of the runs, written by node 0, must be visible to all nodes.
    """
    import torch.distributed as dist
    from torch.distributed.elastic.utils.store import synchronize

    address = f"MASTER_ADDR:MASTER_PORT {s.master_addr}:{s.master_port}"
    marker = Path(s.output_dir) / f".preflight-{s.node_rank}-{os.getpid()}.tmp"
    limit, found, reason = timedelta(seconds=s.join_limit), [], "no reply"

    def exchange() -> None:
        nonlocal reason
        own = problems
        try:
            store = dist.TCPStore(s.master_addr, s.master_port, None, s.node_rank == 0, limit, wait_for_workers=False)
            if s.node_rank == 0:
                store.set("marker", marker.name if marker.exists() else "")
            elif not (marker.parent / store.get("marker").decode()).exists():
                own = [*own, f"{marker.parent} is not the folder of node 0: use a folder that all nodes share"]
            found.extend(synchronize(store, json.dumps(own).encode(), s.node_rank, s.nnodes, "problems", s.join_limit))
        except dist.DistError as error:
            reason = first_line(error)

    print(f"preflight: waiting for {s.nnodes} nodes at {address}, at most {s.join_limit:g} s", file=sys.stderr)
    with contextlib.suppress(OSError):  # local_problems has reported it
        marker.touch()
    # torch waits without limit for the reply of another program at the port, so it runs in a thread.
    thread = threading.Thread(target=exchange, daemon=True)
    try:
        thread.start()
        thread.join(s.join_limit + GRACE)
    finally:
        with contextlib.suppress(OSError):
            marker.unlink()
    if found:
        return [f"node {node}: {problem}" for node, text in enumerate(found) for problem in json.loads(text)]
    absent = (
        f"{s.nnodes} nodes did not connect at {address} within {s.join_limit:g} s ({reason}): run the same command on "
        "each node with its own NODE_RANK, and check that the port is open and that no other program uses it"
    )
    return [f"node {s.node_rank}: {problem}" for problem in (*problems, absent)]


# -------------------------------------------------------------------------------------------------------------- main


def local_problems(s: Preflight, trainings: list[list[str]]) -> tuple[list[str], list[str]]:
    """(problems of this node, what could not be checked); `trainings`: the flags of each set."""
    import torch

    from llm_jepa.large import memory
    from llm_jepa.large.settings import LargeSettings, check_large_settings

    notes, plans, gpus = [], [], s.nproc_per_node * s.nnodes
    shared = ["--model_name", s.model_name, "--train_file", s.data_files.split(",")[0] or "examples.jsonl"]
    shared += ["--revision", s.revision] if s.revision else []
    parsed = [parse_flags(LargeSettings, "", [*shared, *flags]) for flags in trainings]
    last = parsed[-1][0]
    problems = model_problems(last)
    if model_folder(*last.base):
        for training, given in parsed:
            try:
                plans.append(memory.plan(check_large_settings(training, given, gpus > 1), [gpus]))
            except UsageError as error:
                problems += str(error).splitlines()
    for file in filter(None, s.data_files.split(",")):
        if not (Path(file).is_file() and Path(file).stat().st_size):
            problems.append(f"{file} does not exist or is empty; see datasets/README.md")
    try:
        Path(s.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=s.output_dir).close()
    except OSError as error:
        problems.append(f"{s.output_dir} cannot be written to ({first_line(error)}): use another folder")
    enough = s.device == "cpu" or torch.cuda.device_count() >= s.nproc_per_node
    if not enough:
        hint = "set NPROC (--nproc_per_node), or see nvidia-smi and CUDA_VISIBLE_DEVICES"
        problems.append(f"{s.nproc_per_node} GPUs are needed, {torch.cuda.device_count()} found: {hint}")
    if s.device == "cpu":
        notes.append("GPUs and their memory (--device cpu)")
    elif plans and enough:
        peak = max(plan["on"][0]["peak"] for plan in plans)
        problems += [
            f"GPU {i} has {gib(free)} free, {gib(peak)} are predicted (python -m llm_jepa.memory shows how): end other "
            "programs on it (nvidia-smi), or use more GPUs, a smaller --batch_size, --lora, or on one GPU "
            "--optim adamw_bnb_8bit"
            for i in range(s.nproc_per_node)
            if (free := torch.cuda.mem_get_info(i)[0]) < peak
        ]
    if plans:
        plan = max(plans, key=lambda plan: plan["checkpoint"])
        if last.merge:
            plan["saved_model"] += plan["parameters"] * (4 if last.param_dtype == "float32" else 2)
        problems += disk_problems(
            s.output_dir, plan, s.runs, last.save_total_limit + last.save_best, last.keep_checkpoints
        )
        if not last.gradient_checkpointing:
            notes.append("activations that --no-gradient_checkpointing stores: the predicted memory is without them")
    if enough and (s.nproc_per_node > 1 or s.device == "cuda"):
        problems += collective_problems(s.nproc_per_node, s.device, s.collective_limit)
    return list(dict.fromkeys(problems)), notes


def preflight(argv: list[str]) -> int:
    """Prints the problems of all nodes; returns 1 if there are any. Raises UsageError for wrong flags."""
    first, *arms = ([*arm] for is_end, arm in itertools.groupby(["", *argv], lambda a: a == "--") if not is_end)
    s, _ = parse_flags(Preflight, __doc__, first[1:])
    wrong = Refusals(set())
    wrong.refuse(not s.model_name, "--model_name is missing")
    for name in ("runs", "nproc_per_node", "nnodes", "join_limit", "collective_limit"):
        wrong.refuse(getattr(s, name) <= 0, f"--{name} {getattr(s, name)} is not positive")
    wrong.refuse(not 0 <= s.node_rank < s.nnodes, f"--node_rank {s.node_rank} is not in 0 to {s.nnodes - 1}")
    wrong.refuse(not 0 < s.master_port < 65536, f"--master_port {s.master_port} is not in 1 to 65535")
    if wrong:
        raise UsageError("\n".join(wrong))
    problems, notes = local_problems(s, arms or [[]])
    problems = problems_of_all_nodes(problems, s) if s.nnodes > 1 else problems
    lines = [f"not checked: {note}" for note in notes] + [f"missing: {problem}" for problem in problems]
    for line in lines if problems else [*lines, "nothing is missing"]:
        print(f"preflight: {line}", file=sys.stderr)
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes as in the docstring of this file."""
    return run_command("preflight", lambda: preflight(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints a C++ stack for each failed connection
    sys.exit(main())
