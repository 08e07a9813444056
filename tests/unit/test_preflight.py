"""preflight.py and meeting.py: every message, brought about by what it speaks of."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, call
from transformers import LlamaConfig, LlamaForCausalLM

from llm_jepa.large import preflight, rendezvous
from llm_jepa.large.preflight import Preflight

MODEL = GOLDEN / "models/llama3"
GIB = 2**30


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "synth_train.jsonl"
    path.write_text("a row\n")
    return path


def flags(tmp_path, data, **changes) -> list[str]:
    values = {"model_name": MODEL, "data_files": data, "output_dir": tmp_path / "runs", "device": "cpu"} | changes
    return [str(x) for name, value in values.items() for x in (f"--{name}", value)]


# ---------------------------------------------------------------------------------------------------- this node alone


def test_nothing_is_missing(tmp_path, data):
    done = call("llm_jepa.preflight", *flags(tmp_path, data))
    assert (done.code, done.out) == (0, "") and "nothing is missing" in done.err
    assert "not checked: GPUs and their memory (--device cpu)" in done.err, "what was not made is said"
    assert (tmp_path / "runs").is_dir() and not list((tmp_path / "runs").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_and_everything_else_at_once(tmp_path, data):
    (tmp_path / "file").touch()
    changes = {
        "device": "cuda",
        "data_files": f"{data},none.jsonl,{tmp_path}/file",
        "output_dir": tmp_path / "file/runs",
    }
    done = call("llm_jepa.preflight", *flags(tmp_path, data, model_name="org/Nothing", nproc_per_node=2, **changes))
    assert done.code == 1
    told = [line.removeprefix("preflight.py: missing: ") for line in done.err.splitlines() if "missing: " in line]
    assert len(told) == 5
    assert told[0].startswith(
        "org/Nothing is no folder and not downloaded: run `.venv/bin/hf download org/Nothing --exclude 'original/*'`"
    )
    assert told[1].startswith("none.jsonl: there is no such file") and told[2].startswith(f"{tmp_path}/file: ")
    assert told[3].startswith(f"{tmp_path}/file/runs cannot be written into")
    assert told[4].startswith("2 GPUs are needed, 0 are there: set NPROC")
    assert done.err.count("not checked: ") == 2


@pytest.mark.parametrize(("wanted", "found", "problems"), [(8, 8, 0), (1, 8, 0), (8, 7, 1), (1, 0, 1)])
def test_gpus(wanted, found, problems):
    told = preflight.gpu_problems(wanted, found)
    assert len(told) == problems and all(f"{wanted} GPUs are needed, {found} are there" in t for t in told)


def test_memory_of_each_gpu():
    assert preflight.memory_problems([80 * GIB, 80 * GIB], 80 * GIB) == []
    (told,) = preflight.memory_problems([80 * GIB, 12 * GIB, 80 * GIB], 67 * GIB)
    assert told.startswith("GPU 1 has 12.0 GiB free, 67.0 GiB are predicted") and "--batch_size" in told


def test_gpu_memory_is_held_against_the_plan(tmp_path, data, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: asked.append(i) or ((3 if i else 1) * GIB, 80 * GIB))
    monkeypatch.setattr(preflight, "collective_problems", lambda s: [])
    done = call("llm_jepa.preflight", *flags(tmp_path, data, device="cuda", nproc_per_node=2))
    assert done.code == 1 and asked == [0, 1]
    assert "GPU 0 has 1.0 GiB free, 2.1 GiB are predicted" in done.err and "GPU 1 has" not in done.err
    more = call(
        "llm_jepa.preflight", *flags(tmp_path, data, device="cuda", nproc_per_node=2), "--", "--tokens_per_batch", 65536
    )
    assert "GPU 1 has 3.0 GiB free" in more.err, "the training's flags count"


def test_disk():
    plan = {"saved_model": 15 * GIB, "checkpoint": 45 * GIB}
    need, parts = preflight.disk_need(plan, 10, 1, keep=False)
    assert need == (10 * 15 + 2 * 45) * GIB
    assert preflight.disk_need(plan, 10, 2, keep=False)[0] - need == 45 * GIB
    assert preflight.disk_need(plan, 10, 1, keep=True)[0] == (10 * (15 + 45) + 45) * GIB
    assert preflight.disk_problems("runs", need, need, parts) == []
    (told,) = preflight.disk_problems("runs", need - 1, need, parts)
    assert told == (
        "runs has 240.0 GiB free on its disk, 240.0 GiB are needed (10 × 15.0 GiB model, 2 × 45.0 GiB checkpoint, one "
        "of them being written): make room or use another folder"
    )


def test_merged_adapters_need_room_for_whole_models(tmp_path, data, monkeypatch):
    monkeypatch.setattr(preflight, "free_space", lambda folder: 0)
    adapter, merged = (
        call("llm_jepa.preflight", *flags(tmp_path, data), "--", "--lora", *more).err for more in ((), ("--merge",))
    )
    assert "MiB are needed" in adapter and adapter != merged


def test_a_full_disk(tmp_path, data):
    """A file system of one megabyte, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        assert preflight.free_space(str(disk / "runs/deeper")) == 2**20
        done = call("llm_jepa.preflight", *flags(tmp_path, data, output_dir=disk / "runs"))
        assert done.code == 1 and f"{disk}/runs has 1.0 MiB free on its disk, " in done.err
    finally:
        subprocess.run(["umount", disk], check=True)


# --------------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                         num_attention_heads=2, num_key_value_heads=2))  # fmt: skip
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


@pytest.mark.parametrize("damage", ["none", "missing", "shorter", "one byte", "empty", "of another", "index"])
def test_shards(sharded, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    path = shard(folder)
    if damage == "missing":
        path.unlink()
    elif damage in ("shorter", "one byte", "empty"):
        size = {"shorter": path.stat().st_size // 2, "one byte": path.stat().st_size - 1, "empty": 0}[damage]
        os.truncate(path, size)
    elif damage == "of another":
        shutil.copy(sorted(folder.glob("model-*.safetensors"))[0], path)
    elif damage == "index":
        path = folder / "model.safetensors.index.json"
        path.write_text(path.read_text()[:-40])
    told = preflight.weight_problems(folder)
    if damage == "none":
        assert told == []
        return
    word = {"missing": "is missing", "of another": "lacks", "index": "cannot be read"}.get(damage, "is not whole")
    assert len(told) == 1 and told[0].startswith(str(path)) and word in told[0]


def test_a_model_without_weights(tmp_path, data):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    given = flags(tmp_path, data, model_name=tmp_path / "model")
    done = call("llm_jepa.preflight", *given)
    assert done.code == 1 and "has neither model.safetensors nor model.safetensors.index.json" in done.err
    assert call("llm_jepa.preflight", *given, "--", "--pretrain").code == 0, "random weights need no file"


def test_a_model_without_tokenizer_or_config(tmp_path, data, sharded):
    done = call("llm_jepa.preflight", *flags(tmp_path, data, model_name=sharded))
    assert done.code == 1 and "its tokenizer cannot be loaded" in done.err and done.err.count("missing: ") == 1
    (tmp_path / "model").mkdir()
    shutil.copy(MODEL / "model.safetensors", tmp_path / "model")
    assert (
        "no causal language model can be made of it"
        in call("llm_jepa.preflight", *flags(tmp_path, data, model_name=tmp_path / "model")).err
    )


def test_a_package_that_is_missing(tmp_path, data, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    done = call("llm_jepa.preflight", *flags(tmp_path, data, nproc_per_node=1), "--", "--optim", "adamw_bnb_8bit")
    assert done.code == 1 and "--optim adamw_bnb_8bit: install the package bitsandbytes first" in done.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (80 * GIB, 80 * GIB))
    monkeypatch.setattr(preflight, "collective_problems", lambda s: [])
    for gpus, lacks in ((1, True), (2, False)):  # the default of one GPU is AdamW of 8 bits
        done = call("llm_jepa.preflight", *flags(tmp_path, data, device="cuda", nproc_per_node=gpus))
        assert ("install the package bitsandbytes" in done.err) == lacks


def test_flags_that_the_training_would_refuse(tmp_path, data):
    done = call("llm_jepa.preflight", *flags(tmp_path, data, nproc_per_node=1), "--", "--lorra", "--lora")
    assert done.code == 1 and "a training that takes these flags: unrecognized arguments: --lorra" in done.err
    wrong = ("--predictors", 11, "--param_dtype", "bfloat16", "--lora", "--sharding", "ddp")
    done = call("llm_jepa.preflight", *flags(tmp_path, data, nproc_per_node=1), "--", *wrong)
    for told in (
        "--predictors 11 is not in 0 to 10",
        "--param_dtype: not with --lora",
        "--sharding: only with several",
    ):
        assert f"missing: a training that takes these flags: {told}" in done.err
    assert done.code == 1 and done.err.count("these flags") == 3
    both = ("--regular", "--jepa_ratio", 0.5, "--", "--jepa_ratio", 0.5)
    done = call("llm_jepa.preflight", *flags(tmp_path, data, nproc_per_node=1), "--", *both)
    assert "these flags: --jepa_ratio: not with --regular" in done.err and done.err.count("these flags") == 1


def test_wrong_flags(tmp_path, data):
    done = call("llm_jepa.preflight", *flags(tmp_path, data, nnodes=2, node_rank=2, master_port=0, runs=0))
    assert done.code == 2 and done.err.count("\n") == 3
    for name in ("--node_rank 2", "--master_port 0", "--runs 0"):
        assert name in done.err
    assert (
        "--load_in_4bit: only with --lora"
        in call("llm_jepa.preflight", *flags(tmp_path, data), "--", "--load_in_4bit").err
    )


# -------------------------------------------------------------------------------------------------------- the nodes


def of(tmp_path, node: int, port: int, **changes) -> Preflight:
    values = {"output_dir": str(tmp_path), "nnodes": 2, "node_rank": node, "master_port": port, "join_limit": 20.0}
    return Preflight(**values | changes)


def met(*nodes: tuple[Preflight, list[str]]) -> list[list[str]]:
    """What each node hears."""
    heard: list = [None] * len(nodes)

    def run(i: int, s: Preflight, problems: list[str]) -> None:
        heard[i] = (rendezvous.tell if s.node_rank else rendezvous.gather)(s, problems)

    threads = [threading.Thread(target=run, args=(i, *node)) for i, node in enumerate(nodes)]
    for thread in reversed(threads):  # the first node comes last
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(60)
    return heard


def test_nodes_hear_of_each_other_s_problems(tmp_path):
    port = free_port()
    three = [(of(tmp_path, n, port, nnodes=3), [f"problem {n}"] if n != 1 else []) for n in range(3)]
    heard = met(*three)
    assert sorted(heard[0]) == ["node 0: problem 0", "node 2: problem 2"] and heard[0] == heard[1] == heard[2]
    assert list(tmp_path.iterdir()) == []
    assert met(*[(s, []) for s, _ in three]) == [[], [], []], "the port is free again at once"


def test_nodes_with_folders_of_their_own(tmp_path):
    port, other = free_port(), tmp_path / "elsewhere"
    other.mkdir()
    first, second = met((of(tmp_path, 0, port), []), (of(tmp_path, 1, port, output_dir=str(other)), []))
    assert first == second == [f"node 1: its {tmp_path} is not node 0's: use a folder that all nodes share"]


def test_two_nodes_of_one_rank(tmp_path):
    port = free_port()
    heard = met(*[(of(tmp_path, n, port, nnodes=3, join_limit=2.0), []) for n in (0, 1, 1)])
    assert heard[0][0] == "two nodes have NODE_RANK 1" and heard[0][1].startswith("node 2 did not come to port")
    assert heard[1] == heard[2] == heard[0]


def test_a_busy_port(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (told,) = rendezvous.gather(of(tmp_path, 0, port), [])
    assert told.startswith(f"node 0: MASTER_PORT {port} cannot be used on this node") and "in use" in told
    assert rendezvous.busy_port(port) == []


def test_a_node_that_does_not_come(tmp_path):
    port, begin = free_port(), time.monotonic()
    told = rendezvous.gather(of(tmp_path, 0, port, nnodes=3, join_limit=0.5), ["x"])
    assert time.monotonic() - begin < 5
    assert told[0] == "node 0: x" and told[1].startswith(f"node 1, 2 did not come to port {port} within 0.5 s")


@pytest.mark.parametrize(
    ("address", "why"), [("127.0.0.1", "refused"), ("192.0.2.1", ""), ("no-such-host.invalid", "")]
)
def test_an_unreachable_first_node(tmp_path, address, why):
    begin = time.monotonic()
    given = of(tmp_path, 1, free_port(), master_addr=address, join_limit=1.0)
    told = rendezvous.tell(given, ["x"])
    assert time.monotonic() - begin < 8
    assert told[0] == "node 1: x"
    assert (
        told[1].startswith(f"node 1: node 0 cannot be reached at {address}:{given.master_port} within 1 s")
        and why in told[1]
    )
    assert list(tmp_path.iterdir()) == []


def test_something_else_answers_for_the_first_node(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(4096)  # or closing would reset the connection
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        given = of(tmp_path, 1, server.getsockname()[1], master_addr="127.0.0.1", join_limit=0.4)
        (told,) = rendezvous.tell(given, [])
        thread.join()
    assert "(what answers there is no preflight.py)" in told
    assert f"looking for node 0 at 127.0.0.1:{given.master_port}, 0.4 s at most" in capsys.readouterr().err


def test_somebody_else_at_the_port(tmp_path):
    port = free_port()
    thread = threading.Thread(target=lambda: heard.append(rendezvous.gather(of(tmp_path, 0, port), [])))
    heard: list = []
    thread.start()
    time.sleep(0.2)
    for text in (b"GET / HTTP/1.1\r\n", b"[1]\n", b'{"node": 1}\n', b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(text)
    assert rendezvous.tell(of(tmp_path, 1, port), []) == []
    thread.join(20)
    assert heard == [[]]


def test_two_nodes_by_the_script(tmp_path, data):
    port, begin = free_port(), time.monotonic()
    command = [sys.executable, "-m", "llm_jepa.preflight", *flags(tmp_path, data, nnodes=2, master_port=port)]
    command[command.index("--data_files") + 1] = "lost.jsonl"
    second = subprocess.Popen([*command, "--node_rank", "1"], text=True, stderr=subprocess.PIPE)
    first = call("llm_jepa.preflight", *flags(tmp_path, data, nnodes=2, master_port=port, join_limit=120))
    _, told = second.communicate(timeout=60)
    assert (first.code, second.returncode) == (1, 1) and time.monotonic() - begin < 120
    for text in (first.err, told):
        assert "missing: node 1: lost.jsonl: there is no such file" in text and "node 0: " not in text


# ---------------------------------------------------------------------------------------------------- the all-reduce


def test_a_real_all_reduce_through_torchrun():
    assert preflight.collective_problems(Preflight(device="cpu", nproc_per_node=2)) == []


def test_an_all_reduce_that_fails_or_hangs(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    monkeypatch.setattr(preflight, "__file__", str(script))
    script.write_text("import sys\nsys.exit('RuntimeError: no route')\n")
    s = Preflight(device="cpu", nproc_per_node=2, collective_limit=60.0)
    (told,) = preflight.collective_problems(s)
    assert told.startswith("an all-reduce of 2 processes with gloo failed (") and "Error" in told
    script.write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, f'pid-{{os.getpid()}}').touch()\ntime.sleep(300)\n"
    )
    s.collective_limit, begin = 12.0, time.monotonic()
    (told,) = preflight.collective_problems(s)
    assert told.startswith("an all-reduce of 2 processes with gloo took over 12 s") and time.monotonic() - begin < 60
    workers = [int(p.name.removeprefix("pid-")) for p in tmp_path.glob("pid-*")]
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_all_reduce_of_gpus_needs_gpus():
    (told,) = preflight.collective_problems(Preflight(device="cuda", nproc_per_node=1, collective_limit=100.0))
    assert "with NCCL failed" in told


def test_a_wrong_sum_is_an_error(monkeypatch):
    import torch.distributed as dist

    for name, value in {"init_process_group": None, "all_reduce": None, "get_rank": 1, "get_world_size": 2}.items():
        monkeypatch.setattr(dist, name, lambda *a, v=value: v)
    with pytest.raises(RuntimeError, match="gave 2.0"):
        preflight.collective("cpu")
