"""The preflight: every problem is caused, and must be reported."""

import importlib.util
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL, call
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm_jepa import preflight
from llm_jepa.preflight import Preflight

GIB = 2**30


@pytest.fixture
def check(tmp_path):
    """Runs the preflight with flags of the training and changes of its own flags."""
    data = tmp_path / "synth_train.jsonl"
    data.write_text("an example\n")
    default = {"model_name": MODEL, "data_files": data, "output_dir": tmp_path / "runs", "device": "cpu"}

    def run(*training: object, **changes: object):
        flags = [x for name, value in (default | changes).items() for x in (f"--{name}", value)]
        return call("llm_jepa.preflight", *flags, *(("--", *training) if training else ()))

    return run


def missing(done) -> list[str]:
    return [line for line in done.err.splitlines() if " missing: " in line]


# --------------------------------------------------------------------------------------------------------- this node


def test_nothing_missing(tmp_path, check):
    done = check()
    assert (done.code, done.out, missing(done)) == (0, "", [])
    assert "not checked: " in done.err and "--device cpu" in done.err
    assert list((tmp_path / "runs").iterdir()) == []


def test_all_problems_are_reported_together(tmp_path, check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    changes = {"data_files": f"none.jsonl,{tmp_path}", "output_dir": tmp_path / "synth_train.jsonl/runs"}
    done = check(model_name="org/Nothing", device="cuda", nproc_per_node=2, **changes)
    words = ("hf download org/Nothing", "none.jsonl", f"{tmp_path} ", "synth_train.jsonl/runs", "NPROC")
    assert done.code == 1 and len(missing(done)) == len(words)
    assert all(word in line for word, line in zip(words, missing(done), strict=True))


def test_gpu_memory_is_compared_with_the_plan(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ((3 if i else 1) * GIB, 80 * GIB))
    monkeypatch.setattr(preflight, "collective_problems", lambda *a: [])
    (line,) = missing(check(device="cuda", nproc_per_node=2))
    assert "GPU 0 has 1.0 GiB free, 2.1 GiB" in line
    large = ("--tokens_per_batch", 65536)
    for trainings in (large, (*large, "--", "--regular"), ("--regular", "--", *large)):  # the largest one decides
        lines = missing(check(*trainings, device="cuda", nproc_per_node=2))
        assert len(lines) == 2 and "GPU 1 has 3.0 GiB free" in lines[1]


def test_disk_space(monkeypatch):
    plan = {"saved_model": 15 * GIB, "checkpoint": 45 * GIB}

    def fits(free: int, runs: int, limit: int, keep: bool) -> bool:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return not preflight.disk_problems("runs/new", plan, runs, limit, keep)

    for runs, limit, keep, need in ((10, 2, False, 150 + 135), (10, 1, True, 150 + 495)):
        assert fits(need * GIB, runs, limit, keep) and not fits(need * GIB - 1, runs, limit, keep)


# ----------------------------------------------------------------------------------------------------- model and flags


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A model in several files, without a tokenizer."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4))
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


@pytest.mark.parametrize("damage", ["none", "missing", "one byte short", "of another", "index"])
def test_damaged_weights(sharded, damage):
    first, path, *_ = sorted(sharded.glob("model-*.safetensors"))
    if damage == "missing":
        path.unlink()
    elif damage == "one byte short":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "of another":
        shutil.copy(first, path)
    elif damage == "index":
        path = sharded / "model.safetensors.index.json"
        path.write_text(path.read_text()[:-40])
    problems = preflight.weight_problems(sharded)
    assert len(problems) == (damage != "none") and all(p.startswith(str(path)) for p in problems)


def test_missing_weights_tokenizer_or_config(tmp_path, check, sharded):
    (line,) = missing(check(model_name=sharded))
    assert "tokenizer" in line
    folder = shutil.copytree(MODEL, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    (line,) = missing(check(model_name=folder))
    assert "--pretrain" in line and check("--pretrain", model_name=folder).code == 0
    (folder / "config.json").unlink()
    assert check(model_name=folder).code == 1


def test_flags_that_the_training_refuses(check):
    lines = missing(check("--predictors", 11, "--param_dtype", "bfloat16", "--lora"))
    assert len(lines) == 2 and all(any(name in line for line in lines) for name in ("--predictors 11", "--param_dtype"))
    (line,) = missing(check("--regular", "--jepa_ratio", 0.5, "--", "--jepa_ratio", 0.5))
    assert "--jepa_ratio" in line and "--regular" in line
    clip = ("--jepa_loss", "clip", "--batch_size", 1)  # several processes have other pairs
    assert check(*clip, nproc_per_node=2).code == 0
    assert "--batch_size 1" in missing(check(*clip))[0]


def test_continued_adapter_is_checked_by_its_base(tmp_path, check):
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(r=4)).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(adapter)
    done = check("--lora", model_name=adapter)
    assert done.code == 0, done.err
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace(str(MODEL), f"{tmp_path}/none"))
    done = check("--lora", model_name=adapter)
    assert done.code == 1 and str(adapter) in missing(done)[0] and f"{tmp_path}/none" in missing(done)[0]


def test_wrong_flags_exit_with_2(check):
    done = check(nnodes=2, node_rank=2, master_port=0)
    assert done.code == 2 and "--node_rank 2" in done.err and "--master_port 0" in done.err


def test_missing_bitsandbytes(check, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    (line,) = missing(check("--optim", "adamw_bnb_8bit"))
    assert "--optim adamw_bnb_8bit" in line and "pip install bitsandbytes" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (80 * GIB, 80 * GIB))
    monkeypatch.setattr(preflight, "collective_problems", lambda *a: [])
    for gpus, needed in ((1, True), (2, False)):  # the default of one GPU is an 8-bit AdamW
        assert bool(missing(check(device="cuda", nproc_per_node=gpus))) == needed


# ------------------------------------------------------------------------------------------------------------- nodes


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def exchange(folders: list[Path], port: int, problems: list[list[str] | None], limit: float = 20.0) -> list:
    """What each node gets from its own problems; a node whose problems are None is absent. Node 0 starts last."""
    received: dict[int, list[str]] = {}

    def run(node: int) -> None:
        s = Preflight(output_dir=str(folders[node % len(folders)]), nnodes=len(problems), node_rank=node,
                      master_port=port, join_limit=limit)  # fmt: skip
        received[node] = preflight.problems_of_all_nodes(problems[node], s)

    threads = [threading.Thread(target=run, args=(node,)) for node, own in enumerate(problems) if own is not None]
    for thread in reversed(threads):
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(60)
    return [received[node] for node in sorted(received)]


def test_nodes_get_the_problems_of_all(tmp_path, port):
    for problems in (["a"], []):  # twice: the port is free again at once
        received = exchange([tmp_path], port, [problems, [], problems])
        assert received == [[f"node {node}: {p}" for node in (0, 2) for p in problems]] * 3
    assert list(tmp_path.iterdir()) == []


def test_nodes_without_a_shared_folder(tmp_path, port):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = exchange(folders, port, [[], []])
    assert first == second and len(first) == 1 and first[0].startswith(f"node 1: {folders[1]} ")


def test_absent_node_is_reported(tmp_path, port):
    first, second = exchange([tmp_path], port, [["x"], [], None], limit=2.0)
    assert first[0] == "node 0: x" and len(first) == 2 and len(second) == 1
    assert all("NODE_RANK" in problem and f":{port}" in problem for problem in (first[1], second[0]))


def test_port_in_use_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "GRACE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ((busy,),) = exchange([tmp_path], port, [[], None])
        ((own, silent),) = exchange([tmp_path], port, [None, ["x"]], limit=0.5)  # torch itself waits without limit
    assert "MASTER_PORT" in busy and str(port) in busy
    assert own == "node 1: x" and silent.startswith("node 1: ") and "NODE_RANK" in silent


def test_command_reports_the_problems_of_other_nodes(tmp_path, check, port):
    first = threading.Thread(target=exchange, args=([tmp_path / "runs"], port, [["a"], None]))
    first.start()
    done = check(nnodes=2, node_rank=1, master_port=port, data_files="lost.jsonl")
    first.join(60)
    own, other = (line.partition(" missing: ")[2] for line in missing(done))
    assert done.code == 1 and own == "node 0: a" and other.startswith("node 1: lost.jsonl")


def test_all_reduce():
    assert preflight.collective_problems(2, "cpu", 100.0) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_all_reduce_that_fails_or_takes_too_long():
    (problem,) = preflight.collective_problems(1, "cuda", 100.0)
    assert "failed (" in problem
    begin = time.monotonic()
    (problem,) = preflight.collective_problems(2, "cpu", 0.2)
    assert "took more than 0.2 s" in problem and time.monotonic() - begin < 10
