"""finetune8bh200.py: FSDP2 over two, four and eight gloo processes gives the results of one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import JEPA, MODEL, ROOT, column, interrupted, make_model, message_row, same_weights, weights, write_rows
from ranks import Ranks

from llm_jepa.files import read_json, write_json

# 22 examples in steps of 8: the last step of an epoch has 6, so some of four processes have one example or none.
EXAMPLES = [message_row(f"lines with the number {i}", f"({i}).*" * (1 + i % 5)) for i in range(22)]
SCRIPT, STEPS = "finetune8bh200", 6  # two epochs
CHECKPOINTS = ("--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 9, "--keep_checkpoints")
TERMS = ("--jepa_loss", "clip", "--negatives_queue", 99, "--nitp", "--sigreg", 0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "examples.jsonl", EXAMPLES)


def variant(folder: Path, kind: str = "llama", **changes: object) -> Path:
    """A random model with the golden tokenizer and, but for `changes`, the golden configuration."""
    config = read_json(MODEL / "config.json")
    del config["model_type"]
    return make_model(folder, kind, "llama3", **config | changes)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model with tied embeddings."""
    return variant(tmp_path_factory.mktemp("tied") / "llama3", tie_word_embeddings=True)


def start(ranks: Ranks, processes: int, out: Path, data: Path, *flags: object, **more: str) -> tuple[list[int], str]:
    """Exit codes and stderr of a training over two epochs."""
    fixed = ("--train_file", data, "--output_dir", out, "--model_name", MODEL, "--learning_rate", "1e-3")
    return ranks(processes, *fixed, "--num_epochs", 2, *flags, **more)


def train(ranks: Ranks, processes: int, out: Path, data: Path, *flags: object) -> Path:
    codes, errors = start(ranks, processes, out, data, *flags)
    assert codes == [0] * processes, errors
    return out


def sizes(processes: int, batch: int = 1) -> tuple[object, ...]:
    """Flags for 8 examples per step."""
    return "--batch_size", batch, "--grad_accum", 8 // batch // processes


def same_run(one: Path, other: Path) -> None:
    """Asserts equal losses, gradients and weights, up to the order of sums."""
    for key in ("loss", "lm_loss", "jepa_loss", "nitp_loss", "sigreg_loss"):
        assert column(other, key) == pytest.approx(column(one, key), rel=1e-5)
    assert column(other, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-4)
    for key in ("tokens", "label_tokens", "pairs"):
        assert column(other, key) == column(one, key)
    assert len(column(one, "loss")) == STEPS
    same_weights(one, other, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("flags", "count", "batch", "more"),
    [((*JEPA, "--jepa_ratio", 0.3, "--stp", "geodesic"), 8, 1, ()),
     (("--regular", "--nitp", "--nitp_layer", 1), 2, 1, ()),
     (JEPA, 2, 1, ("--sharding", "ddp")),
     # Each pair has the same negatives only if the micro-batches of all processes together are the same.
     ((*JEPA, *TERMS, "--jepa_ratio", 0.5), 4, 2, ()),
     ((*JEPA, "--jepa_loss", "vicreg", "--center", "--layout", "additive"), 2, 4, ()),
     ((*JEPA, "--model_name", "tied"), 2, 1, ())],
    ids=["few-pairs", "nitp", "ddp", "clip-sigreg", "vicreg", "tied"],
)  # fmt: skip
def test_several_processes_train_as_one(ranks, tmp_path, data, tied, flags, count, batch, more):
    flags = tuple(tied if flag == "tied" else flag for flag in flags)
    one = train(ranks, 1, tmp_path / "one", data, *flags, *sizes(1, 8))
    several = train(ranks, count, tmp_path / "several", data, *flags, *more, *sizes(count, batch))
    same_run(one, several)
    assert column(one, "nitp_loss" if "--nitp" in flags else "jepa_loss")
    for run in (one, several):
        assert ("lm_head.weight" in weights(run)) == (tied not in flags)  # tied embeddings are sharded and saved once


def test_each_process_stores_only_its_shard(ranks, tmp_path, data):
    flags = ("--save_strategy", "steps", "--save_steps", 2, "--keep_checkpoints")
    run = train(ranks, 4, tmp_path / "run", data, *JEPA, *sizes(4), *flags)
    size = sum(w.nbytes for w in weights(run).values())
    for folder, copies in (("pytorch_model_fsdp_0", 1), ("optimizer_0", 2)):  # AdamW has two moments
        shards = [file.stat().st_size for file in (run / "checkpoint-6" / folder).glob("*.distcp")]
        assert len(shards) == 4 and max(shards) < 1.5 * copies * size / 4  # each file also has names and shapes
    assert not list((run / "checkpoint-6").glob("*.safetensors"))


def test_resume_with_half_the_processes(ranks, tmp_path, data):
    flags = (*JEPA, *TERMS, *CHECKPOINTS)
    full = train(ranks, 4, tmp_path / "full", data, *flags, *sizes(4, 2))
    stored = weights(full / "checkpoint-2", "projectors.safetensors")
    assert {name.split(".")[0] for name in stored} == {"nitp", "sigreg"}
    assert not any("projectors" in name for name in weights(full))
    for kept in (2, 6):  # in the first epoch, and at the end, before the model was saved
        cut = interrupted(full, kept, tmp_path / f"cut-{kept}")
        train(ranks, 2, cut, data, *flags, *sizes(2, 4), "--resume")
        same_weights(full, cut, rtol=1e-4, atol=1e-6)
        assert column(cut, "loss") == pytest.approx(column(full, "loss"), rel=1e-5)
        assert read_json(cut / "run.json")["processes"] == 2
        assert column(cut, "tokens") == column(full, "tokens")


@pytest.mark.parametrize(
    ("model", "sharding", "more"),
    [("tied", "ddp", ("--use_rslora", "--lora_alpha", 4)),
     ("llama3", "fsdp2", ("--plain", "--nitp")),
     ("llama3", "fsdp2", ("--use_dora", "--init_lora_weights", "gaussian", "--modules_to_save", "lm_head")),
     ("mixtral", "fsdp2", ())],
    ids=["ddp", "output-rows", "dora", "experts"],
)  # fmt: skip
def test_adapters_of_several_processes_train_as_one(ranks, tmp_path, data, tied, model, sharding, more):
    if model == "mixtral":
        base = variant(tmp_path / "m", model, num_local_experts=4, eos_token_id=0, use_cache=True)
    else:
        base = tied if model == "tied" else MODEL
    flags = (*JEPA, *more, "--lora", "--lora_rank", 4, "--lora_dropout", 0, "--merge", "--model_name", base)
    one = train(ranks, 1, tmp_path / "one", data, *flags, *sizes(1, 8))
    two = train(ranks, 2, tmp_path / "two", data, *flags, *sizes(2))
    assert read_json(two / "args.json")["sharding"] == sharding
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)
    first, second = (weights(run, "adapter_model.safetensors") for run in (one, two))
    assert first.keys() == second.keys() and any("experts" in name for name in first) == (model == "mixtral")
    assert ("base_model.model.lm_head.token_adapter.trainable_tokens_delta" in first) == ("--plain" in more)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=2e-4, msg=name)
        assert weight.any() or model == "mixtral", name
    same_weights(one / "merged", two / "merged", rtol=1e-3, atol=2e-4)
    if model == "mixtral":
        for folder in (one, two, one / "merged", two / "merged"):  # the base's stop token and that of the template
            assert read_json(folder / "generation_config.json")["eos_token_id"] == [0, 4]
        assert read_json(two / "merged" / "config.json")["use_cache"]


def test_four_bit_weights(ranks, tmp_path, data):
    # The CPU kernels require multiples of 32.
    wide = variant(tmp_path / "llama3", hidden_size=64, intermediate_size=128, head_dim=16)
    flags = (*JEPA, "--nitp", "--lora", "--lora_rank", 4, "--lora_dropout", 0, "--model_name", wide)
    one = train(ranks, 1, tmp_path / "one", data, *flags, "--load_in_4bit", "--merge", *sizes(1, 8))
    assert "quantization_config" not in read_json(one / "merged" / "config.json")
    two = train(ranks, 2, tmp_path / "two", data, *flags, "--load_in_4bit", *sizes(2))
    assert read_json(two / "args.json")["sharding"] == "ddp"
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=2e-3)
    full = train(ranks, 1, tmp_path / "full", data, *flags, *sizes(1, 8))
    assert abs(column(one, "lm_loss")[0] - column(full, "lm_loss")[0]) > 1e-4, "the frozen weights are not quantized"
    assert min(column(one, "jepa_loss")) < 0.9 * column(one, "jepa_loss")[0]


@pytest.mark.parametrize(
    ("processes", "flags", "mentioned"),
    [(1, ("--sharding", "ddp"), "--sharding: "),
     (1, ("--param_dtype", "bfloat16", "--dtype", "float32"), "--dtype float32: not with --param_dtype"),
     (2, ("--optim", "adamw_bnb_8bit"), "--optim adamw_bnb_8bit: not with --sharding fsdp2"),
     (2, ("--gradient_stats", 5), "--gradient_stats: not with --sharding fsdp2"),
     (2, ("--lora", "--init_lora_weights", "mica"), "--init_lora_weights mica: not with"),
     (2, ("--lora", "--load_in_4bit", "--sharding", "fsdp2"), "--sharding fsdp2: ")],
)  # fmt: skip
def test_contradictory_flags_are_refused(ranks, tmp_path, data, processes, flags, mentioned):
    codes, errors = start(ranks, processes, tmp_path / "run", data, *flags)
    assert 2 in codes and all(codes) and f"error: {mentioned}" in errors
    assert not (tmp_path / "run").exists()


def test_param_dtype_is_that_of_the_saved_model(ranks, tmp_path, data):
    flags = (*JEPA, "--nitp", "--sigreg", 0.05)
    half = train(ranks, 2, tmp_path / "half", data, *flags, *sizes(2), "--param_dtype", "bfloat16")
    full = train(ranks, 2, tmp_path / "full", data, *flags, *sizes(2), "--dtype", "bfloat16")
    assert {w.dtype for w in weights(half).values()} == {torch.bfloat16}
    assert {w.dtype for w in weights(full).values()} == {torch.float32}
    assert column(half, "lm_loss") == pytest.approx(column(full, "lm_loss"), rel=0.02)


def test_adapter_on_half_precision_resumes_with_float32_projectors(ranks, tmp_path, data):
    flags = (*JEPA, "--nitp", "--lora", "--lora_dropout", 0, "--dtype", "bfloat16", *CHECKPOINTS)
    one = train(ranks, 1, tmp_path / "one", data, *flags, *sizes(1, 8))
    two = train(ranks, 2, tmp_path / "two", data, *flags, *sizes(2))
    assert column(two, "nitp_loss") == pytest.approx(column(one, "nitp_loss"), rel=0.02)
    for run in (one, two):  # an adapter's sharded checkpoint has no other parameters
        stored = weights(run / "checkpoint-2", "projectors.safetensors")
        assert {(w.dtype, w.ndim) for w in stored.values()} == {(torch.float32, 2)} and len(stored) == 3
    cut = interrupted(two, 2, tmp_path / "cut")
    train(ranks, 2, cut, data, *flags, *sizes(2), "--resume")
    assert column(cut, "nitp_loss") == column(two, "nitp_loss")
    same_weights(two, cut)


def test_shard_that_cannot_be_written_is_reported_in_one_line(ranks, tmp_path, data):
    run, limit = tmp_path / "run", "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))\n"
    codes, errors = start(ranks, 2, run, data, *JEPA, *sizes(2), before=limit)
    assert all(codes) and str(run) in errors and "Traceback" not in errors, errors
    assert read_json(run / "run.json")["status"] == "failed"


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_restart_leaves_a_finished_run_unchanged(ranks, tmp_path, data):
    run = train(ranks, 2, tmp_path / "run", data, *JEPA, *sizes(2))
    before = contents(run)
    assert not list(run.glob("checkpoint-*")), "checkpoints of a finished run"
    codes, errors = start(ranks, 2, run, data, *JEPA, *sizes(2), TORCHELASTIC_RESTART_COUNT="1")
    assert codes == [0, 0] and contents(run) == before, errors
    # A restart counted on one node is a restart of all: on the other node the count may be 0.
    count = "import os\nos.environ['TORCHELASTIC_RESTART_COUNT'] = os.environ['RANK']\n"
    codes, errors = start(ranks, 2, run, data, *JEPA, *sizes(2), "--overwrite", before=count)
    assert codes == [0, 0] and contents(run) == before, errors
    # The restart of another job finds the folder occupied, as the first start would.
    again = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "another"}
    codes, errors = start(ranks, 2, run, data, *JEPA, *sizes(2), **again)
    assert codes == [2, 2] and "--resume" in errors and contents(run) == before


def test_restart_does_not_repeat_a_certain_failure(ranks, tmp_path, data):
    run = train(ranks, 2, tmp_path / "run", data, *JEPA, *sizes(2))
    failed = {"status": "failed", "repeats": True, "error": "the loss of step 3 is nan"}
    write_json(run / "run.json", read_json(run / "run.json") | failed)
    codes, errors = start(ranks, 2, run, data, *JEPA, *sizes(2), TORCHELASTIC_RESTART_COUNT="1")
    assert codes == [2, 2] and errors.count("the loss of step 3 is nan") == 1, errors


def torchrun(*options: object, out: Path, data: Path, flags: tuple) -> subprocess.Popen:
    """A job as a user starts it; its output goes to OUT.log."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, ROOT / "finetune8bh200.py"]
    command += ["--train_file", data, "--output_dir", out, "--model_name", MODEL, "--learning_rate", "1e-3", *flags]
    # Without the first, restarted processes may find the addresses of those that died.
    more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = open(out.with_suffix(".log"), "a")
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, env=os.environ | more, stdout=log, stderr=log)


def worker(launcher: int, rank: int) -> int:
    """The id of one of torchrun's processes."""
    children = psutil.Process(launcher).children()
    return next(child.pid for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.parametrize(("count", "restarts"), [(2, 2), (4, 0)])
def test_job_with_a_killed_process_is_restarted_or_ends_and_resumes(ranks, tmp_path, data, count, restarts):
    flags = (*JEPA, *sizes(count), "--num_epochs", 6, "--save_strategy", "steps", "--save_steps", 5)
    calm = train(ranks, count, tmp_path / "calm", data, *flags)
    killed = tmp_path / "killed"
    log = killed.with_suffix(".log")
    options = ("--standalone", "--nproc_per_node", count, "--max-restarts", restarts)
    job = torchrun(*options, out=killed, data=data, flags=flags)
    ends = time.monotonic() + 120
    while not (killed / "checkpoint-5" / "complete.json").exists():
        assert job.poll() is None and time.monotonic() < ends, log.read_text()
        time.sleep(0.02)
    workers = [worker(job.pid, rank) for rank in range(count)]
    os.kill(workers[1], signal.SIGKILL)
    assert (job.wait(timeout=200) == 0) == bool(restarts), log.read_text()
    assert not any(map(psutil.pid_exists, workers))
    if restarts:
        assert "checkpoint-" in log.read_text()
    else:
        assert read_json(killed / "run.json")["status"] != "finished"
        train(ranks, count, killed, data, *flags, "--resume")
    record = read_json(killed / "run.json")
    assert record["status"] == "finished" and len(record["attempts"]) == 2
    same_weights(calm, killed)
    assert column(killed, "lm_loss") == column(calm, "lm_loss")


def test_two_nodes_train_as_one_process(ranks, tmp_path, data):
    """Two launchers on one machine take the part of two nodes."""
    one = train(ranks, 1, tmp_path / "one", data, *JEPA, *sizes(1, 8))
    out, flags = tmp_path / "run", (*JEPA, *sizes(2), "--num_epochs", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port)
    jobs = [torchrun(*options, "--node_rank", i, out=out, data=data, flags=flags) for i in range(2)]
    assert [job.wait(timeout=200) for job in jobs] == [0, 0], out.with_suffix(".log").read_text()
    same_run(one, out)
