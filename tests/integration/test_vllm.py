"""evaluate.py --engine vllm: with a substitute that speaks vllm_worker.py's protocol, and with vLLM if installed."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MODEL, ROOT, call, changed_copy, half_token, is_running, message_row, read_lines, write_rows

import evaluate
from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.evaluation import generation, vllm_engine
from llm_jepa.evaluation.settings import EvaluationSettings
from llm_jepa.files import read_json

STEPS = 12
USERS = [f"lines with the number {i}" + " or a vowel" * (i * 5 % 7) for i in range(11)]
# Replaces the Python of vLLM's environment and vllm_worker.py: replies to each prompt with the tokens in tokens.json,
# the last prompt first; `STUB=what:n` misbehaves at the n-th prompt.
STUB = r"""
import json, os, pathlib, subprocess, sys, time

here = pathlib.Path(os.environ["STUB_FOLDER"])
what, _, n = os.environ.get("STUB", "").partition(":")
if sys.argv[3:] == ["--versions"]:
    if what == "no vllm":
        sys.exit("ModuleNotFoundError")
    print(json.dumps({"vllm": "9.9", "torch": "2.0", "transformers": "5.0", "numpy": "1"}))
    sys.exit()
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
(here / "pids.json").write_text(json.dumps([os.getpid(), child.pid]))

def receive():
    line = sys.stdin.readline()
    with open(here / "received.jsonl", "a") as file:
        file.write(line)
    return json.loads(line)

receive()
if what == "does not load":
    sys.exit("ValueError: no such architecture")
print(json.dumps({"ready": True}), flush=True)
request, replies = receive(), json.loads((here / "tokens.json").read_text())
stops = request["stop_token_ids"]
for k, (id_, prompt, most) in enumerate(reversed(request["prompts"])):
    if what and k == int(n):
        if what == "dies":
            os._exit(3)
        if what == "hangs":
            time.sleep(60)
        print("INFO 11-25 loading took 3 s", flush=True)
    tokens = replies[json.dumps(prompt)]
    end = next((t + 1 for t, token in enumerate(tokens) if token in stops), len(tokens))
    print(json.dumps({"id": id_, "tokens": tokens[: min(end, most)]}), flush=True)
child.kill()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [message_row(user, "a" if i % 2 else "something else") for i, user in enumerate(USERS)]
    return write_rows(tmp_path_factory.mktemp("data") / "synth_test.jsonl", rows)


@pytest.fixture(scope="module")
def replies(data) -> dict[str, list[int]]:
    """The tokens that the model generates after each prompt, without a stop token."""
    model, encoder = evaluate.load(str(MODEL), EvaluationSettings(dtype="float32"))
    examples = read_examples(str(data), Problems())
    _, prompts = generation.encode_prompts(model.config, encoder.renderer, examples, Problems())
    rows = generation.generate_tokens(model, 0, [], prompts, STEPS, generation.Plan())
    return {json.dumps(prompt): tokens for prompt, tokens in zip(prompts, rows, strict=True)}


@pytest.fixture(scope="module")
def model(replies, tmp_path_factory) -> Path:
    """A model with a stop token that about half of its responses contain."""
    config = {"eos_token_id": [4, half_token(list(replies.values()))]}
    target = tmp_path_factory.mktemp("models") / "stops"
    return changed_copy(MODEL, target, generation_config=config)


@pytest.fixture
def stub(replies, tmp_path, monkeypatch) -> Path:
    """The folder of the substitute, which VLLM_PYTHON names."""
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "tokens.json").write_text(json.dumps(replies))
    (folder / "python").write_text(f"#!{sys.executable}\n{STUB}")
    (folder / "python").chmod(0o755)
    monkeypatch.setenv("VLLM_PYTHON", str(folder / "python"))
    monkeypatch.setenv("STUB_FOLDER", str(folder))
    monkeypatch.setattr(vllm_engine, "SECONDS_TO_END", 5)
    return folder


def score(model: object, data: object, output: object, *flags: object):
    return call("evaluate", "--model_name", model, "--input_file", data, "--output_file", output, "--max_new_tokens",
                STEPS, "--dtype", "float32", *flags)  # fmt: skip


def vllm(model: object, data: object, output: object, *flags: object):
    return score(model, data, output, "--engine", "vllm", *flags)


def all_ended(stub: Path) -> bool:
    """Whether the substitute and the process that it started have ended."""
    pids, deadline = read_json(stub / "pids.json"), time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def test_predictions_and_scores_equal_those_of_the_transformers_engine(model, data, stub, tmp_path):
    assert score(model, data, tmp_path / "t" / "p.jsonl").code == 0
    done = vllm(model, data, tmp_path / "v" / "p.jsonl")
    assert done.code == 0, done.err
    assert (tmp_path / "v" / "p.jsonl").read_bytes() == (tmp_path / "t" / "p.jsonl").read_bytes()
    assert {row["stop_reason"] for row in read_lines(tmp_path / "v" / "p.jsonl")} == {"stop", "length"}
    theirs, ours = (read_json(tmp_path / name / "metrics.json") for name in "tv")
    same = ours.keys() - {"argv", "settings", "versions", "notes", "retrieval"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert ours["versions"] == theirs["versions"] | {"vllm": "9.9", "vllm_torch": "2.0", "vllm_transformers": "5.0"}
    assert all_ended(stub)


def test_vllm_gets_the_limits_and_stop_tokens_of_the_transformers_engine(model, data, stub, replies, tmp_path):
    longest = max(len(json.loads(prompt)) for prompt in replies)
    folder = changed_copy(model, tmp_path / "short", config={"max_position_embeddings": longest + 2})
    assert score(folder, data, tmp_path / "t" / "p.jsonl", "--max_new_tokens", 5).code == 0
    flags = ("--max_new_tokens", 5, "--tensor_parallel_size", 2)
    assert vllm(folder, data, tmp_path / "v" / "p.jsonl", *flags).code == 0
    assert (tmp_path / "v" / "p.jsonl").read_bytes() == (tmp_path / "t" / "p.jsonl").read_bytes()
    arguments, request = read_lines(stub / "received.jsonl")
    assert arguments["max_model_len"] == longest + 2
    assert (arguments["model"], arguments["dtype"], arguments["tensor_parallel_size"]) == (str(folder), "float32", 2)
    rooms = [min(5, longest + 2 - len(json.loads(prompt))) for prompt in replies]
    want = [[i, json.loads(prompt), room] for i, (prompt, room) in enumerate(zip(replies, rooms, strict=True), 1)]
    assert request["prompts"] == want
    loaded, encoder = evaluate.load(str(folder), EvaluationSettings(dtype="float32"))
    assert request["stop_token_ids"] == generation.stop_ids(loaded.generation_config, encoder.renderer)


@pytest.mark.parametrize("trouble, kept", [("dies:4", 4), ("prints:2", 2)])
def test_failure_keeps_the_responses_and_is_resumed(trouble, kept, model, data, stub, tmp_path, monkeypatch):
    path = tmp_path / "v" / "p.jsonl"
    monkeypatch.setenv("STUB", trouble)
    done = vllm(model, data, path)
    assert done.code == 1 and "vLLM" in done.err and done.err.count("evaluate.py: error:") == 1, done.err
    assert [row["id"] for row in read_lines(path)] == list(range(11, 11 - kept, -1))
    assert not path.with_name("metrics.json").exists() and all_ended(stub)
    monkeypatch.delenv("STUB")
    refused = score(model, data, path)
    assert refused.code == 2 and "--engine vllm, now transformers" in refused.err
    assert vllm(model, data, path).code == 0
    assert [prompt[0] for prompt in read_lines(stub / "received.jsonl")[-1]["prompts"]] == list(range(1, 12 - kept))
    assert score(model, data, tmp_path / "t" / "p.jsonl").code == 0
    assert path.read_bytes() == (tmp_path / "t" / "p.jsonl").read_bytes()


def test_interrupt_ends_vllm_and_its_processes(model, data, stub, tmp_path, monkeypatch):
    path, scored_row = tmp_path / "p.jsonl", evaluate.scored_row

    def interrupt(example, response, score):
        if example.id == 8:
            raise KeyboardInterrupt
        return scored_row(example, response, score)

    monkeypatch.setenv("STUB", "hangs:5")
    monkeypatch.setattr(evaluate, "scored_row", interrupt)
    assert vllm(model, data, path).code == 130
    assert all_ended(stub) and [row["id"] for row in read_lines(path)] == [11, 10, 9]


def test_model_that_vllm_cannot_load_loses_no_results(model, data, stub, tmp_path, monkeypatch):
    path = tmp_path / "out" / "p.jsonl"
    assert vllm(model, data, path).code == 0
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    monkeypatch.setenv("STUB", "does not load")
    done = vllm(model, data, path, "--overwrite")
    assert done.code == 2 and f"--model_name {model}" in done.err
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("python", ["stub/nowhere", "stub/python", "/bin/echo"])
def test_missing_vllm_is_reported_with_the_command_that_installs_it(python, model, data, stub, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PYTHON", str(tmp_path / python))
    monkeypatch.setenv("STUB", "no vllm")
    done = vllm(model, data, tmp_path / "out" / "p.jsonl")
    assert done.code == 2 and str(tmp_path / python) in done.err and "setup.sh --vllm" in done.err
    assert not (tmp_path / "out").exists()
    command = [sys.executable, "-I", vllm_engine.WORKER, "--versions"]
    assert "torch" in json.loads(subprocess.run(command, capture_output=True, text=True).stdout)


def test_adapter_is_refused(model, data, stub, tmp_path):
    shutil.copytree(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    done = vllm(tmp_path / "adapter", data, tmp_path / "out" / "p.jsonl")
    assert done.code == 2 and "export merged" in done.err
    assert not (tmp_path / "out").exists() and not (stub / "pids.json").exists()


# -------------------------------------------------------------------------------------------------------- vLLM itself


def vllm_is_installed() -> bool:
    try:
        return bool(vllm_engine.versions())
    except UsageError:
        return False


@pytest.mark.timeout(900)
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed (bash setup.sh --vllm)")
def test_vllm_gives_the_predictions_of_the_transformers_engine(tmp_path):
    words = "dog cat ring blue truck number vowel letter string dogs x rings".split()
    train = write_rows(tmp_path / "train.jsonl", [message_row(f"lines with {w}", f".*{w}.*") for w in words * 4])
    call("finetune", "--model_name", ROOT / "models" / "tiny", "--pretrain", "--train_file", train,
         "--predictors", 1, "--learning_rate", 1e-3, "--num_epochs", 12, "--grad_accum", 1,
         "--save_strategy", "no", "--output_dir", tmp_path / "run", code=0)  # fmt: skip
    rows = [message_row(f"lines with {w}" + " or a vowel" * (i % 4), f".*{w}.*") for i, w in enumerate(words)]
    data = write_rows(tmp_path / "synth_test.jsonl", rows)
    for engine in ("transformers", "vllm"):
        done = score(tmp_path / "run", data, tmp_path / engine / "p.jsonl", "--engine", engine, "--max_new_tokens", 6)
        assert done.code == 0, done.err
    theirs, ours = (read_lines(tmp_path / engine / "p.jsonl") for engine in ("transformers", "vllm"))
    assert ours == theirs
    assert {row["stop_reason"] for row in ours} == {"stop", "length"} and len({r["prediction"] for r in ours}) > 5
