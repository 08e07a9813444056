"""evaluate.py --engine vllm: with a stand-in for vLLM that speaks its part, and with vLLM where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, MODELS, ROOT, call, message_row, write_rows

import evaluate
import finetune
from llm_jepa import report
from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.evaluation import generation, vllm_engine
from llm_jepa.files import read_json
from llm_jepa.model import load_tokenizer

STEPS = 12
MODEL = GOLDEN / "models" / "llama3"
USERS = [f"lines with the number {i}" + " or a vowel" * (i * 5 % 7) for i in range(11)]
# Stands for the Python of vLLM's environment and for vllm_worker.py: says for each prompt the tokens that it finds in
# sayings.json, the last prompt first, up to a stop token or as many as are asked for; makes trouble on request.
STUB = r"""
import json, os, pathlib, subprocess, sys, time

here = pathlib.Path(os.environ["STUB_FOLDER"])
trouble, _, after = os.environ.get("STUB", "").partition(":")
after = int(after or 0)
assert sys.argv[1] == "-I" and sys.argv[2].endswith("vllm_worker.py"), sys.argv
if sys.argv[3:] == ["--versions"]:
    if trouble == "no vllm":
        sys.exit("ModuleNotFoundError")
    print(json.dumps({"vllm": "9.9", "torch": "2.0"}))
    sys.exit()
child = subprocess.Popen(["sleep", "60"])
(here / "pids.json").write_text(json.dumps([os.getpid(), child.pid]))

def log(line):
    with open(here / "calls.jsonl", "a") as file:
        file.write(line)
    return json.loads(line)

def say(reply):
    print(reply if isinstance(reply, str) else json.dumps(reply), flush=True)

log(sys.stdin.readline())
print("loading", file=sys.stderr)
if trouble == "does not load":
    sys.exit("ValueError: no such architecture\n")
say({"ready": True})
request, sayings = log(sys.stdin.readline()), json.loads((here / "sayings.json").read_text())
stops = request["stop_token_ids"]
for n, (id_, prompt, most) in enumerate(reversed(request["prompts"])):
    said = sayings[json.dumps(prompt)]
    end = next((t + 1 for t, token in enumerate(said) if token in stops), len(said))
    tokens = said[: min(end, most)]
    reason = "stop" if tokens[-1] in stops else "length"
    reply = {"id": id_, "tokens": tokens, "finish_reason": reason}
    if trouble and n == after:
        if trouble == "dies":
            print("RuntimeError: out of memory", file=sys.stderr, flush=True)
            os._exit(3)
        if trouble == "ends":
            sys.exit(0)
        if trouble == "hangs":
            time.sleep(60)
        say({
            "garbage": "INFO 11-25 loading took 3 s", "half": '{"id": 3', "list": [id_, tokens],
            "unknown id": reply | {"id": 99}, "no tokens": {"id": id_, "finish_reason": reason},
            "empty": reply | {"tokens": []}, "text": reply | {"tokens": ["a"]},
            "aborted": reply | {"finish_reason": "abort"},
            "too short": reply | {"tokens": said[:1], "finish_reason": "length"},
            "too long": reply | {"tokens": [t for t in said if t not in stops] * 2, "finish_reason": "length"},
            "not stopped": reply | {"tokens": stops[:1] * 2, "finish_reason": "stop"},
        }.get(trouble, reply))
    say(reply)
child.kill()
"""


def examples_of(data: Path) -> list:
    return read_examples(str(data), Problems())


@pytest.fixture(scope="module")
def said() -> dict[str, list[int]]:
    """What the model says behind each prompt, stop token or not, by the plainest way there is."""
    settings = evaluate.Settings(dtype="float32")
    model, renderer = evaluate.load(str(MODEL), settings)
    found = {}
    for user in USERS:
        example = evaluate.Example("Write the regular expression.", user, "a", "rows:1", 1)
        prompt = renderer.tokenizer(renderer.prompt(example), add_special_tokens=False)["input_ids"]
        ids = list(prompt)
        for _ in range(STEPS):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found[json.dumps(prompt)] = ids[len(prompt) :]
    return found


@pytest.fixture(scope="module")
def model(said, tmp_path_factory) -> Path:
    """A model that ends its turn at a token that about half of its answers have in them."""
    counts = {t: sum(t in tokens for tokens in said.values()) for tokens in said.values() for t in tokens}
    stop = min(counts, key=lambda t: (abs(2 * counts[t] - len(said)), t))
    folder = tmp_path_factory.mktemp("models") / "stops"
    shutil.copytree(MODEL, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(read_json(path) | {"eos_token_id": [4, stop]}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [message_row(user, "a" if i % 2 else "something else") for i, user in enumerate(USERS)]
    return write_rows(tmp_path_factory.mktemp("data") / "synth_test.jsonl", rows)


@pytest.fixture
def stub(said, tmp_path, monkeypatch) -> Path:
    """The stand-in is what VLLM_PYTHON names; its folder."""
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "sayings.json").write_text(json.dumps(said))
    (folder / "python").write_text(f"#!{sys.executable}\n{STUB}")
    (folder / "python").chmod(0o755)
    monkeypatch.setenv("VLLM_PYTHON", str(folder / "python"))
    monkeypatch.setenv("STUB_FOLDER", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(vllm_engine.tempfile, "tempdir", None)  # asked for anew
    monkeypatch.setattr(vllm_engine, "PATIENCE", 5)
    return folder


def score(model: object, data: object, output: object, *flags: object):
    return call("evaluate", "--model_name", model, "--input_file", data, "--output_file", output, "--max_new_tokens",
                STEPS, "--dtype", "float32", *flags)  # fmt: skip


def vllm(model: object, data: object, output: object, *flags: object):
    return score(model, data, output, "--engine", "vllm", *flags)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(stub: Path) -> list[dict]:
    """What the stand-in was told, oldest first, from now on anew."""
    found = lines(stub / "calls.jsonl")
    (stub / "calls.jsonl").unlink()
    return found


def logs(stub: Path) -> list[Path]:
    return list(stub.glob("vllm-*.log"))


def all_gone(stub: Path) -> bool:
    """Whether the stand-in and the process that it started have ended."""

    def runs(pid: int) -> bool:
        status = Path(f"/proc/{pid}/stat")
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"

    deadline = time.monotonic() + 5
    while any(map(runs, read_json(stub / "pids.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(runs, read_json(stub / "pids.json")))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------------- answers


def test_predictions_and_scores_are_those_of_the_transformers_engine(model, data, stub, tmp_path):
    assert score(model, data, tmp_path / "t" / "p.jsonl").code == 0
    done = vllm(model, data, tmp_path / "v" / "p.jsonl")
    assert done.code == 0, done.err
    assert (tmp_path / "v" / "p.jsonl").read_bytes() == (tmp_path / "t" / "p.jsonl").read_bytes()
    rows = lines(tmp_path / "v" / "p.jsonl")
    assert {row["stop_reason"] for row in rows} == {"stop", "length"} and len({r["prediction"] for r in rows}) > 5
    theirs, ours = (read_json(tmp_path / name / "metrics.json") for name in "tv")
    made = ("argv", "settings", "versions")
    assert {k: v for k, v in ours.items() if k not in made} == {k: v for k, v in theirs.items() if k not in made}
    assert (theirs["settings"]["engine"], ours["settings"]["engine"]) == ("transformers", "vllm")
    assert ours["versions"] == theirs["versions"] | {"vllm": "9.9", "vllm_torch": "2.0"}
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == ["metrics.json", "p.jsonl"]
    assert not logs(stub) and all_gone(stub)


@pytest.mark.parametrize("max_new_tokens", [3, 1, -1])
def test_vllm_is_told_what_the_transformers_engine_would_do(max_new_tokens, model, data, stub, said, tmp_path):
    longest = max(len(json.loads(prompt)) for prompt in said)
    folder = tmp_path / "short"
    shutil.copytree(model, folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": longest + 2}))
    flags = ("--max_new_tokens", max_new_tokens, "--tensor_parallel_size", 2)
    assert score(folder, data, tmp_path / "t" / "p.jsonl", *flags[:2]).code == 0
    rooms = [longest + 2 - len(json.loads(prompt)) for prompt in said]
    rooms = [min(room, max_new_tokens) if max_new_tokens > 0 else room for room in rooms]
    if max_new_tokens == -1:  # longer than what is known to be said
        (stub / "sayings.json").write_text(
            json.dumps({p: (tokens * 20)[:room] for (p, tokens), room in zip(said.items(), rooms, strict=True)})
        )
    done = vllm(folder, data, tmp_path / "v" / "p.jsonl", *flags)
    assert done.code == 0, done.err
    arguments, request = told(stub)
    lengths = [len(json.loads(prompt)) + room for prompt, room in zip(said, rooms, strict=True)]
    assert arguments["max_model_len"] == max(lengths) <= longest + 2
    assert (arguments["model"], arguments["dtype"], arguments["tensor_parallel_size"]) == (str(folder), "float32", 2)
    loaded, renderer = evaluate.load(str(folder), evaluate.Settings(dtype="float32"))
    assert request["stop_token_ids"] == generation.stop_ids(loaded, renderer)
    examples, prompts = generation.tokenise(loaded, renderer, examples_of(data))
    assert request["prompts"] == [[e.id, p, r] for e, p, r in zip(examples, prompts, rooms, strict=True)]
    if max_new_tokens > 0:
        assert (tmp_path / "v" / "p.jsonl").read_bytes() == (tmp_path / "t" / "p.jsonl").read_bytes()


@pytest.mark.parametrize("generation_config", ["own", "none", "none, and the configuration says more"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_described_as_it_is_loaded(name, generation_config, tmp_path):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / "models" / name, folder)
    if generation_config != "own":
        (folder / "generation_config.json").unlink()
    if "more" in generation_config:
        path = folder / "config.json"
        path.write_text(json.dumps(read_json(path) | {"eos_token_id": [3, 7], "max_position_embeddings": 99}))
    settings = evaluate.Settings(dtype="float32")
    (model, renderer), (described, _) = evaluate.load(str(folder), settings), evaluate.describe(str(folder), settings)
    assert generation.stop_ids(described, renderer) == generation.stop_ids(model, renderer)
    assert generation.context(described) == generation.context(model)
    assert (described.dtype, described.name) == ("float32", str(folder))


# ------------------------------------------------------------------------------------------------ continued and kept


@pytest.mark.parametrize("answered", [0, 4])
def test_an_evaluation_goes_on_behind_a_death_and_asks_only_for_what_is_left(
    answered, model, data, stub, tmp_path, monkeypatch
):
    path = tmp_path / "v" / "p.jsonl"
    monkeypatch.setenv("STUB", f"dies:{answered}")
    done = vllm(model, data, path)
    assert done.code == 1 and "ended with code 3; it printed last: RuntimeError: out of memory" in done.err
    assert [row["id"] for row in lines(path)] == list(range(11, 11 - answered, -1))
    assert not (path.with_name("metrics.json")).exists() and all_gone(stub)
    (log,) = logs(stub)
    assert str(log) in done.err and log.read_text() == "loading\nRuntimeError: out of memory\n"
    told(stub)
    monkeypatch.delenv("STUB")
    refused = score(model, data, path)
    assert refused.code == 2 and "was made otherwise" in refused.err
    assert vllm(model, data, path).code == 0
    assert [prompt[0] for prompt in told(stub)[1]["prompts"]] == list(range(1, 12 - answered))
    assert score(model, data, tmp_path / "t" / "p.jsonl").code == 0
    assert path.read_bytes() == (tmp_path / "t" / "p.jsonl").read_bytes()


def test_an_interrupt_ends_vllm_and_all_it_started(model, data, stub, tmp_path, monkeypatch):
    path, true = tmp_path / "p.jsonl", evaluate.scored_row

    def interrupted(example, answer, score):
        if example.id == 8:
            raise KeyboardInterrupt
        return true(example, answer, score)

    monkeypatch.setenv("STUB", "hangs:5")
    monkeypatch.setattr(evaluate, "scored_row", interrupted)
    begin = time.monotonic()
    done = vllm(model, data, path)
    assert done.code == 130 and "the same command goes on from here" in done.err
    assert all_gone(stub) and time.monotonic() - begin < 30 and not logs(stub)
    assert [row["id"] for row in lines(path)] == [11, 10, 9]


@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        ("garbage", "it said 'INFO 11-25 loading took 3 s', which is no JSON object"),
        ("half", "it said '{\"id\": 3', which is no JSON object"),
        ("list", "which is no JSON object"),
        ("ends", "it ended with code 0"),
        ("unknown id", 'it said {"id": 99, '),
        ("twice", "which answers no prompt that is left"),
        *((name, "which answers no prompt that is left") for name in
          ("no tokens", "empty", "text", "aborted", "too short", "too long", "not stopped")),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error_and_keeps_the_answers_before_it(
    trouble, named, model, data, stub, tmp_path, monkeypatch
):
    monkeypatch.setenv("STUB", f"{trouble}:2")
    done = vllm(model, data, tmp_path / "p.jsonl")
    assert done.code == 1 and named in done.err and done.err.count("evaluate.py: error:") == 1, done.err
    assert [row["id"] for row in lines(tmp_path / "p.jsonl")] == [11, 10, *([9] if trouble == "twice" else [])]
    assert not (tmp_path / "metrics.json").exists() and all_gone(stub)


def test_a_model_that_vllm_cannot_load_costs_no_results(model, data, stub, tmp_path, monkeypatch):
    assert vllm(model, data, tmp_path / "out" / "p.jsonl").code == 0
    before = snapshot(tmp_path / "out")
    monkeypatch.setenv("STUB", "does not load")
    done = vllm(model, data, tmp_path / "out" / "p.jsonl", "--overwrite")
    assert done.code == 2 and f"--model_name {model} cannot be loaded by vLLM" in done.err
    assert "ValueError: no such architecture" in done.err and snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("how", ["no interpreter", "no vllm", "another program"])
def test_without_vllm_it_says_how_to_install_it_and_writes_nothing(how, model, data, stub, tmp_path, monkeypatch):
    there = {"no interpreter": stub / "nowhere", "no vllm": stub / "python", "another program": Path("/bin/echo")}
    monkeypatch.setenv("VLLM_PYTHON", str(there[how]))
    monkeypatch.setenv("STUB", "no vllm")
    done = vllm(model, data, tmp_path / "out" / "p.jsonl")
    assert done.code == 2 and f"--engine vllm: {there[how]} has no vLLM; run `bash setup.sh --vllm`" in done.err
    assert not (tmp_path / "out").exists()
    monkeypatch.delenv("VLLM_PYTHON")
    monkeypatch.setattr(vllm_engine, "HERE", tmp_path)
    assert f"{tmp_path / '.venv-vllm' / 'bin' / 'python'} has no vLLM" in vllm(model, data, tmp_path / "p.jsonl").err


def test_the_worker_names_its_versions_without_vllm_too():
    command = [sys.executable, "-I", ROOT / "llm_jepa/evaluation/vllm_worker.py", "--versions"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (1, "{}\n", "")


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "flags",
    [
        ("--load_in_8bit",), ("--load_in_4bit",), ("--device_map", "auto"), ("--attn_implementation", "sdpa"),
        ("--batch_size", 2), ("--tokens_per_batch", 100), ("--similarity",), ("--t_sne",),
        ("--export_embeddings", "e.safetensors"),
    ],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_flags_that_vllm_has_not_are_refused(flags, model, data, stub, tmp_path):
    done = call("evaluate", "--model_name", model, "--input_file", data, "--output_file", tmp_path / "out" / "p.jsonl",
                "--engine", "vllm", *flags)  # fmt: skip
    assert done.code == 2 and f"{flags[0]}: not with --engine vllm" in done.err
    assert not (tmp_path / "out").exists() and not (stub / "pids.json").exists()


def test_other_combinations_that_cannot_be_are_refused(model, data, stub, tmp_path):
    base = ("--input_file", data, "--output_file", tmp_path / "out" / "p.jsonl")
    for flags, named in (
        (("--model_name", model, "--tensor_parallel_size", 2), "--tensor_parallel_size: only with --engine vllm"),
        (("--model_name", model, "--engine", "vllm", "--tensor_parallel_size", 0), "0 is not positive"),
        (("--score_only", data, "--engine", "vllm"), "--engine: not with --score_only"),
        (("--model_name", model, "--engine", "vllm", "--task", "hellaswag"), "task hellaswag compares likelihoods"),
    ):
        done = call("evaluate", *base, *flags)
        assert done.code == 2 and named in done.err, done.err
    settings = evaluate.Settings(model_name=str(model), input_file=str(data), output_file="p", engine="vllm")
    with pytest.raises(evaluate.UsageError, match="--engine vllm: not under torchrun"):
        evaluate.check_settings(settings, {"engine"}, processes=2)
    assert not (tmp_path / "out").exists() and not (stub / "pids.json").exists()


def test_an_adapter_and_a_model_without_the_tokens_are_refused(model, data, stub, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    done = vllm(adapter, data, tmp_path / "out" / "p.jsonl")
    assert done.code == 2 and f"{adapter} is an adapter; give it merged" in done.err
    short = tmp_path / "short"
    shutil.copytree(model, short)
    tokens = len(load_tokenizer(finetune.Settings(model_name=str(short)), predictors=False))
    (short / "config.json").write_text(json.dumps(read_json(short / "config.json") | {"vocab_size": tokens - 1}))
    done = vllm(short, data, tmp_path / "out" / "p.jsonl")
    assert done.code == 2 and f"{short} has {tokens - 1} embeddings for {tokens} tokens" in done.err
    assert not (tmp_path / "out").exists() and not (stub / "pids.json").exists()


# ---------------------------------------------------------------------------------------------------------- report


def test_a_report_never_averages_engines_and_knows_evaluations_from_before_there_were_two(tmp_path, capsys):
    def run(seed: int, **settings: object) -> str:
        folder = tmp_path / str(seed)
        (folder / "eval" / "synth").mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"model_name": "m", "regular": True, "finetune_seed": seed}))
        record = {"status": "finished", "wall_seconds": 1.0, "data_sha256": {"train.jsonl": "a"}}
        (folder / "run.json").write_text(json.dumps(record))
        metrics = {"task": "synth", "n": 2, "exact": 0.5, "startswith": 0.5, "stop_rate": 1.0, "scores": []}
        metrics |= {"data_sha256": "b", "settings": settings}
        (folder / "eval" / "synth" / "metrics.json").write_text(json.dumps(metrics))
        return str(folder)

    old, new = run(1), run(2, engine="transformers", tensor_parallel_size=1)
    served = [run(3 + size, engine="vllm", tensor_parallel_size=size) for size in (1, 8)]
    assert report.main([old, new]) == 0
    assert "mean ± sd (n = 2)" in capsys.readouterr().out
    assert report.main([old, new, *served]) == 0
    assert capsys.readouterr().out.count("mean ± sd (n = 2)") == 2


# -------------------------------------------------------------------------------------------------------- vLLM itself


def vllm_is_there() -> bool:
    try:
        return bool(vllm_engine.versions())
    except evaluate.UsageError:
        return False


@pytest.mark.timeout(900)
@pytest.mark.skipif(not vllm_is_there(), reason="vLLM is not installed (bash setup.sh --vllm)")
def test_vllm_itself_gives_the_predictions_of_the_transformers_engine(tmp_path):
    """With a model that this trains, predictor tokens and all; its heads are of a size that vLLM's CPU kernels have."""
    train = write_rows(tmp_path / "train.jsonl", [message_row(f"lines with {w}", f".*{w}.*") for w in WORDS * 4])
    done = call("finetune", "--model_name", ROOT / "models" / "tiny", "--pretrain", "--train_file", train,
                "--predictors", 1, "--learning_rate", 1e-3, "--num_epochs", 12, "--grad_accum", 1,
                "--save_strategy", "no", "--output_dir", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    rows = [message_row(f"lines with {w}" + " or a vowel" * (i % 4), f".*{w}.*") for i, w in enumerate(WORDS)]
    data = write_rows(tmp_path / "synth_test.jsonl", rows)
    for engine in ("transformers", "vllm"):
        done = score(tmp_path / "run", data, tmp_path / engine / "p.jsonl", "--engine", engine, "--max_new_tokens", 8)
        assert done.code == 0, done.err
    theirs, ours = (lines(tmp_path / engine / "p.jsonl") for engine in ("transformers", "vllm"))
    assert ours == theirs
    assert {row["stop_reason"] for row in ours} == {"stop", "length"} and len({r["prediction"] for r in ours}) > 5


WORDS = ["dog", "cat", "ring", "blue", "truck", "number", "vowel", "letter", "string", "dogs and cats", "x", "a ring"]
