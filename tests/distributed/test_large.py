"""finetune8bh200.py: shards of FSDP2 in two and four gloo processes train to what one process trains to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, message_row, same_weights, weights, write_rows
from ranks import Ranks

from llm_jepa.files import read_json, write_json

# 22 rows in steps of 8: the last step of a pass has 6, so that some of four processes have a micro-batch of 1, or none.
ROWS = [message_row(f"lines with the number {i}", f"({i}).*" * (1 + i % 5)) for i in range(22)]
STEPS = 6  # two passes
MODEL = GOLDEN / "models" / "llama3"
JEPA = ("--predictors", 2, "--lbd", 1)


@pytest.fixture(scope="module")
def ranks():
    started = Ranks("finetune8bh200")
    yield started
    started.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def variant(folder: Path, **changes: object) -> Path:
    """A model like the golden one, of random weights, with another configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(MODEL)
    config.update(changes)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Its embeddings are its output layer."""
    return variant(tmp_path_factory.mktemp("tied") / "llama3", tie_word_embeddings=True)


def train(ranks: Ranks, processes: int, out: Path, data: Path, *flags: object, model: Path = MODEL) -> Path:
    flags = ("--model_name", model, "--learning_rate", "1e-3", "--num_epochs", 2, *flags)
    codes, errors = ranks(processes, "--train_file", data, "--output_dir", out, *flags)
    assert codes == [0] * processes, errors
    return out


def sizes(processes: int, batch: int = 1) -> tuple[object, ...]:
    """Flags for 8 examples a step."""
    return "--batch_size", batch, "--grad_accum", 8 // batch // processes


def metrics(run: Path, key: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def same_run(one: Path, other: Path, **files: str) -> None:
    """The same losses, gradients and weights, up to the order of sums."""
    for key in ("total", "lm_loss", "jepa_loss"):
        assert metrics(other, key) == pytest.approx(metrics(one, key), rel=1e-5)
    assert metrics(other, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-4)
    for key in ("tokens", "label_tokens", "pairs"):
        assert metrics(other, key) == metrics(one, key)
    assert len(metrics(one, "total")) == STEPS
    same_weights(one, other, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "flags",
    [("--regular",), JEPA, (*JEPA, "--layout", "additive"), (*JEPA, "--jepa_ratio", 0.3, "--stp", "geodesic")],
    ids=["regular", "packed", "additive", "few-pairs"],
)
def test_shards_train_to_what_one_process_trains_to(ranks, tmp_path, data, flags):
    one = train(ranks, 1, tmp_path / "one", data, *flags, *sizes(1, 8))
    two = train(ranks, 2, tmp_path / "two", data, *flags, *sizes(2))
    same_run(one, two)
    four = train(ranks, 4, tmp_path / "four", data, *flags, *sizes(4, 2))
    same_run(one, four)
    assert read_json(four / "args.json")["sharding"] == "fsdp2"


def test_shards_of_tied_embeddings(ranks, tmp_path, data, tied):
    one = train(ranks, 1, tmp_path / "one", data, *JEPA, *sizes(1, 8), model=tied)
    same_run(one, train(ranks, 2, tmp_path / "two", data, *JEPA, *sizes(2), model=tied))
    assert "lm_head.weight" not in weights(one)


def test_copies_train_to_what_shards_train_to(ranks, tmp_path, data):
    shards = train(ranks, 2, tmp_path / "shards", data, *JEPA, *sizes(2))
    copies = train(ranks, 2, tmp_path / "copies", data, *JEPA, *sizes(2), "--sharding", "ddp")
    same_run(copies, shards)


def test_each_process_holds_its_part_alone(ranks, tmp_path, data):
    flags = ("--max_steps", 2, "--save_strategy", "steps", "--save_steps", 2, "--keep_checkpoints")
    run = tmp_path / "run"
    codes, errors = ranks(4, "--train_file", data, "--output_dir", run, "--model_name", MODEL, *JEPA, *sizes(4), *flags)
    assert codes == [0] * 4, errors
    whole = sum(w.numel() for w in weights(run).values())
    for folder, copies in (("pytorch_model_fsdp_0", 1), ("optimizer_0", 2)):  # AdamW has two moments
        parts = elements(run / "checkpoint-2" / folder)
        assert len(parts) == 4 and sum(parts) == pytest.approx(copies * whole, rel=0.01)  # and a counter a weight
        assert max(parts) < 1.1 * sum(parts) / 4
    assert not list((run / "checkpoint-2").glob("*.safetensors"))


def elements(folder: Path) -> list[int]:
    """Numbers in each process's file of a sharded checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata, found = FileSystemReader(folder).read_metadata(), Counter()
    for index, place in metadata.storage_data.items():
        chunks = getattr(metadata.state_dict_metadata[index.fqn], "chunks", ())
        found[place.relative_path] += sum(c.sizes.numel() for c in chunks if c.offsets == index.offset)
    return sorted(found.values())


def test_an_interrupted_run_goes_on_with_half_the_processes(ranks, tmp_path, data):
    flags = (*JEPA, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 9, "--keep_checkpoints")
    whole = train(ranks, 4, tmp_path / "whole", data, *flags, *sizes(4))
    for kept in (2, 4, 6):  # in the first pass, in the second, and at the end, before the model was saved
        cut = tmp_path / f"cut-{kept}"
        shutil.copytree(whole, cut)
        for step in range(kept + 2, STEPS + 1, 2):
            shutil.rmtree(cut / f"checkpoint-{step}")
        (cut / "model.safetensors").unlink()
        write_json(cut / "run.json", read_json(cut / "run.json") | {"status": "interrupted"})
        train(ranks, 2, cut, data, *flags, *sizes(2), "--resume")
        same_weights(whole, cut, rtol=1e-4, atol=1e-6)
        assert read_json(cut / "run.json")["processes"] == 2
        assert metrics(cut, "tokens") == metrics(whole, "tokens")


def test_other_processes_must_have_the_same_steps(ranks, tmp_path, data):
    run = train(ranks, 2, tmp_path / "run", data, *JEPA, *sizes(2))
    write_json(run / "run.json", read_json(run / "run.json") | {"status": "interrupted"})
    common = ("--train_file", data, "--output_dir", run, "--model_name", MODEL, "--learning_rate", "1e-3", *JEPA)
    common = (*common, "--num_epochs", 2, "--resume")
    codes, errors = ranks(4, *common, *sizes(2))
    assert 2 in codes and all(codes)
    assert "was trained by 2 processes, now 4; a step would have 16 examples instead of 8" in errors
    assert "their product is 2" in errors
    codes, errors = ranks(4, *common, "--tokens_per_batch", 64, "--grad_accum", 2)
    assert 2 in codes and all(codes) and "--tokens_per_batch the steps would have other examples" in errors


@pytest.mark.parametrize(
    ("sharding", "more"), [("fsdp2", ()), ("ddp", ()), ("fsdp2", ("--plain",))], ids=["fsdp2", "ddp", "output-rows"]
)
def test_adapters_train_to_what_one_process_trains_to(ranks, tmp_path, data, tied, sharding, more):
    model = tied if sharding == "ddp" else MODEL
    flags = (*JEPA, *more, "--lora", "--lora_rank", 4, "--lora_dropout", 0, "--merge")
    one = train(ranks, 1, tmp_path / "one", data, *flags, *sizes(1, 8), model=model)
    two = train(ranks, 2, tmp_path / "two", data, *flags, *sizes(2), model=model)
    assert read_json(two / "args.json")["sharding"] == sharding
    assert metrics(two, "total") == pytest.approx(metrics(one, "total"), rel=1e-5)
    first, second = (weights(run, "adapter_model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    assert ("base_model.model.lm_head.token_adapter.trainable_tokens_delta" in first) == bool(more)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=2e-4, msg=name)
        assert weight.any(), name
    same_weights(one / "merged", two / "merged", rtol=1e-3, atol=2e-4)


def test_quantised_weights_of_two_processes(ranks, tmp_path, data):
    flags = (*JEPA, "--lora", "--lora_rank", 4, "--lora_dropout", 0, "--load_in_4bit")
    # The kernels of a CPU take multiples of 32.
    wide = variant(tmp_path / "llama3", hidden_size=64, intermediate_size=128, head_dim=16)
    one = train(ranks, 1, tmp_path / "one", data, *flags, *sizes(1, 8), model=wide)
    two = train(ranks, 2, tmp_path / "two", data, *flags, *sizes(2), model=wide)
    assert read_json(two / "args.json")["sharding"] == "ddp"
    assert metrics(two, "total") == pytest.approx(metrics(one, "total"), rel=2e-3)
    whole = train(ranks, 1, tmp_path / "whole", data, *flags[:-1], *sizes(1, 8), model=wide)
    assert abs(metrics(one, "lm_loss")[0] - metrics(whole, "lm_loss")[0]) > 1e-4  # the frozen weights are not the same
    assert min(metrics(one, "jepa_loss")) < 0.9 * metrics(one, "jepa_loss")[0]


@pytest.mark.parametrize(
    ("processes", "flags", "message"),
    [
        (1, ("--sharding", "ddp"), "--sharding: only with several processes"),
        (1, ("--load_in_4bit",), "--load_in_4bit: only with --lora"),
        (1, ("--lora", "--param_dtype", "bfloat16"), "--param_dtype: not with --lora"),
        (1, ("--param_dtype", "bfloat16", "--dtype", "float32"), "--dtype float32: not with --param_dtype bfloat16"),
        (2, ("--optim", "adamw_bnb_8bit"), "--optim adamw_bnb_8bit: not with --sharding fsdp2"),
        (2, ("--eval_generate", 2, "--val_fraction", 0.2), "--eval_generate: not with --sharding fsdp2"),
        (
            2,
            ("--lora", "--load_in_4bit", "--sharding", "fsdp2"),
            "--sharding fsdp2: cannot share out its 4-bit weights",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(ranks, tmp_path, data, processes, flags, message):
    codes, errors = ranks(
        processes, "--train_file", data, "--model_name", MODEL, "--output_dir", tmp_path / "run", *flags
    )
    assert 2 in codes and all(codes) and f"finetune8bh200.py: error: {message}" in errors
    assert not (tmp_path / "run").exists()


def test_bfloat16_weights_are_saved_as_such(ranks, tmp_path, data):
    two = train(ranks, 2, tmp_path / "two", data, *JEPA, *sizes(2), "--param_dtype", "bfloat16")
    whole = train(ranks, 2, tmp_path / "whole", data, *JEPA, *sizes(2), "--dtype", "bfloat16")
    assert {w.dtype for w in weights(two).values()} == {torch.bfloat16}
    assert {w.dtype for w in weights(whole).values()} == {torch.float32}
    assert metrics(two, "lm_loss") == pytest.approx(metrics(whole, "lm_loss"), rel=0.02)


# ------------------------------------------------------------------------------------------------------- torchrun


def torchrun(*options: object, out: Path, data: Path, flags: tuple = (), before: tuple = ()) -> subprocess.Popen:
    """A job as a user starts it; `before`: what stands in front of the command."""
    command = [*before, sys.executable, "-m", "torch.distributed.run", *options, ROOT / "finetune8bh200.py"]
    command += ["--train_file", data, "--output_dir", out, "--model_name", MODEL, "--learning_rate", "1e-3", *flags]
    # Else processes that are started again may find the addresses of those that died.
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = open(out.with_suffix(".log"), "a")
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, env=environment, stdout=log, stderr=log)


def worker(launcher: int, rank: int) -> int:
    """Process id of one of torchrun's processes."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, environment = (folder / "stat").read_text(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if int(status.rpartition(")")[2].split()[1]) == launcher and f"\0RANK={rank}\0".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def wait_for(path: Path, job: subprocess.Popen, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not path.exists():
        assert job.poll() is None and time.monotonic() < ends, path.parents[1].with_suffix(".log").read_text()
        time.sleep(0.02)


def test_a_killed_process_is_started_again_and_nothing_is_lost(ranks, tmp_path, data):
    flags = (*JEPA, *sizes(2), "--num_epochs", 6, "--save_strategy", "steps", "--save_steps", 5)
    codes, errors = ranks(
        2,
        "--train_file",
        data,
        "--output_dir",
        tmp_path / "calm",
        "--model_name",
        MODEL,
        "--learning_rate",
        1e-3,
        *flags,
    )
    assert codes == [0, 0], errors
    killed = tmp_path / "killed"
    job = torchrun("--standalone", "--nproc_per_node", 2, "--max-restarts", 2, out=killed, data=data, flags=flags)
    wait_for(killed / "checkpoint-5" / "complete.json", job)
    os.kill(worker(job.pid, 1), signal.SIGKILL)
    log = killed.with_suffix(".log")
    assert job.wait(timeout=200) == 0, log.read_text()
    assert "resuming from checkpoint-" in log.read_text()
    record = read_json(killed / "run.json")
    assert record["status"] == "finished" and len(record["attempts"]) == 2
    same_weights(tmp_path / "calm", killed)
    assert metrics(killed, "lm_loss") == metrics(tmp_path / "calm", "lm_loss")


def test_a_finished_run_that_is_started_again_stays_as_it_is(ranks, tmp_path, data):
    run = train(ranks, 2, tmp_path / "run", data, *JEPA, *sizes(2))
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert not list(run.glob("checkpoint-*")), "a finished run has its model alone"
    flags = ("--model_name", MODEL, "--learning_rate", "1e-3", "--num_epochs", 2, *JEPA, *sizes(2))
    codes, errors = ranks(2, "--train_file", data, "--output_dir", run, *flags, TORCHELASTIC_RESTART_COUNT="1")
    assert codes == [0, 0], errors
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    # Started again in a job that did not make it, it is as much in the way as at the first start.
    for job in ("another", "none"):
        again = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": job}
        codes, errors = ranks(2, "--train_file", data, "--output_dir", run, *flags, **again)
        assert codes == [2, 2] and "exists; give --resume" in errors
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_restart_that_one_node_counts_is_one_of_all(ranks, tmp_path, data):
    """Of two nodes the one whose processes had not failed by themselves is started again with a count of 0."""
    run = train(ranks, 2, tmp_path / "run", data, *JEPA, *sizes(2))
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    flags = ("--model_name", MODEL, "--learning_rate", "1e-3", "--num_epochs", 2, *JEPA, *sizes(2), "--overwrite")
    count = "import os\nos.environ['TORCHELASTIC_RESTART_COUNT'] = os.environ['RANK']\n"
    codes, errors = ranks(2, "--train_file", data, "--output_dir", run, *flags, before=count)
    assert codes == [0, 0], errors
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before, "not removed"


def test_what_fails_for_certain_is_not_tried_again(ranks, tmp_path, data):
    run = train(ranks, 2, tmp_path / "run", data, *JEPA, *sizes(2))
    failed = {"status": "failed", "repeats": True, "error": "the loss of step 3 is nan; training stopped"}
    write_json(run / "run.json", read_json(run / "run.json") | failed)
    flags = ("--model_name", MODEL, "--learning_rate", "1e-3", "--num_epochs", 2, *JEPA, *sizes(2))
    codes, errors = ranks(2, "--train_file", data, "--output_dir", run, *flags, TORCHELASTIC_RESTART_COUNT="1")
    assert codes == [2, 2] and errors.count("the loss of step 3 is nan; training stopped (not tried again)") == 1, (
        errors
    )


ADDRESSES = ("10.213.77.1", "10.213.77.2")


@pytest.fixture
def two_nodes():
    """Commands that run what follows them in a network of its own, two networks joined by a cable."""
    names, cables = [f"jepa{os.getpid()}{c}" for c in "ab"], [f"j{os.getpid() % 10**6}{c}" for c in "ab"]
    made = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here ({error})")
        yield [
            ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}", f"TP_SOCKET_IFNAME={cable}")
            for name, cable in zip(names, cables, strict=True)
        ]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_nodes_train_as_one_process_and_their_checkpoint_goes_on(ranks, tmp_path, data, two_nodes):
    one = train(ranks, 1, tmp_path / "one", data, *JEPA, *sizes(1, 8))
    out, flags = tmp_path / "run", (*JEPA, *sizes(2), "--num_epochs", 2, "--save_strategy", "steps", "--save_steps", 4)
    flags = (*flags, "--save_total_limit", 2, "--keep_checkpoints")
    options = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", ADDRESSES[0], "--master_port", 29511)
    jobs = [
        torchrun(*options, "--node_rank", i, out=out, data=data, flags=flags, before=node)
        for i, node in enumerate(two_nodes)
    ]
    assert [job.wait(timeout=200) for job in jobs] == [0, 0], out.with_suffix(".log").read_text()
    same_run(one, out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "model.safetensors").unlink()
    write_json(out / "run.json", read_json(out / "run.json") | {"status": "interrupted"})
    where = ("--train_file", data, "--output_dir", out, "--model_name", MODEL, "--learning_rate", "1e-3")
    codes, errors = ranks(2, *where, *flags, "--resume")
    assert codes == [0, 0] and "resuming from checkpoint-4" in errors, errors
    same_run(one, out)
