"""Two gloo processes answer and score as one process does, and an interrupted evaluation goes on with any number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, call, message_row, write_rows
from ranks import Ranks

from llm_jepa.evaluation import generation

USERS = [f"lines with the number {i}" + " or a vowel" * (i * 5 % 7) for i in range(11)]
FLAGS = ("--model_name", GOLDEN / "models" / "llama3", "--batch_size", 2, "--max_new_tokens", 6, "--dtype", "float32")
MAIN = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport evaluate\ncode = evaluate.main()\n"
# Process 0 is killed in its third batch when process 1, which gets no further, has written its first one.
KILLED = """
import os, signal, time
import generation
answer, rank, answered = generation.generate_batch, int(os.environ["RANK"]), []
other = sys.argv[sys.argv.index("--output_file") + 1] + ".rank1"
def stop(*args):
    while len(answered) == 2 - rank:
        if rank == 0 and os.path.exists(other) and os.path.getsize(other):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
    answered.append(1)
    return answer(*args)
generation.generate_batch = stop
"""
# A thread of the process group, caught at work by the end of the interpreter, would abort the process.
NO_THREADS = """
import glob
threads = [open(name).read().strip() for name in glob.glob('/proc/self/task/*/comm')]
assert not [t for t in threads if 'gloo' in t], threads
"""


@pytest.fixture(scope="module")
def ranks():
    started = Ranks("evaluate")
    yield started
    started.close()


def flags_of(data: Path, folder: Path) -> tuple[object, ...]:
    return (*FLAGS, "--input_file", data, "--output_file", folder / "p.jsonl")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path) -> dict:
    """What metrics.json says, but for the command and the place."""
    found = json.loads((folder / "metrics.json").read_text())
    found["settings"].pop("output_file")
    return {name: value for name, value in found.items() if name not in ("argv", "processes", "threads")}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, Path]:
    """(rows, every other one answered as the model does; the folder that one process made of them)"""
    folder = tmp_path_factory.mktemp("one")
    data = write_rows(folder / "synth_test.jsonl", [message_row(user, "a") for user in USERS])
    assert call("evaluate", *flags_of(data, folder / "first")).code == 0
    said = [row["prediction"].strip() or "?" for row in lines(folder / "first" / "p.jsonl")]
    write_rows(data, [message_row(user, said[i] if i % 2 else "a") for i, user in enumerate(USERS)])
    assert call("evaluate", *flags_of(data, folder / "out")).code == 0
    assert 0 < metrics(folder / "out")["exact"] < 1
    return data, folder / "out"


def same(folder: Path, other: Path, *names: str) -> None:
    """Asserts that two folders hold the same results, and the first one files of these names alone."""
    assert (folder / "p.jsonl").read_bytes() == (other / "p.jsonl").read_bytes()
    assert "metrics.json" not in names or metrics(folder) == metrics(other)
    assert sorted(p.name for p in folder.iterdir()) == list(names)


def test_two_processes_answer_as_one(ranks, one, tmp_path):
    data, _ = one
    flags = ("--split_tune_untune", "--original_model_name", GOLDEN / "models" / "chatml")
    assert call("evaluate", *flags_of(data, tmp_path / "alone"), *flags).code == 0
    out, rows = tmp_path / "out", tmp_path / "rows"
    count = (  # a word for each batch: its rows by the process that answers them
        "import generation, os\nanswer = generation.generate_batch\n"
        f"say = lambda batch: open({str(rows)!r}, 'a').write(os.environ['RANK'] * len(batch) + ' ')\n"
        "generation.generate_batch = lambda *a: say(a[2]) and answer(*a)\n"
    )
    codes, errors = ranks(2, *flags_of(data, out), *flags, before=count)
    assert codes == [0, 0], errors
    assert sorted(rows.read_text().split()) == ["00"] * 6 + ["1"] * 2 + ["11"] * 4
    same(out / "untuned", tmp_path / "alone" / "untuned", "p.jsonl")
    same(out, tmp_path / "alone", "metrics.json", "p.jsonl", "untuned")
    assert json.loads((out / "metrics.json").read_text())["processes"] == 2
    said = ranks.out
    assert said.count("\n\nrows the untuned model got wrong: synth") == said.startswith("synth, n = 11\n") == 1
    assert errors.count("2 processes, judged by the first: 100%") >= 2 and " 11/11 " in errors


def test_torchrun_answers_as_one(one, tmp_path):
    data, alone = one
    script = tmp_path / "watched.py"
    script.write_text(MAIN + NO_THREADS + "sys.exit(code)\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command = [str(c) for c in (sys.executable, *torchrun, script, *flags_of(data, tmp_path / "out"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(tmp_path / "out", alone, "metrics.json", "p.jsonl")


@pytest.mark.parametrize("processes", [1, 2])
def test_what_two_interrupted_processes_left_is_taken_up(ranks, processes, one, tmp_path, monkeypatch):
    data, alone = one
    out = tmp_path / "out"
    codes, errors = ranks(2, *flags_of(data, out), before=KILLED)
    assert -9 in codes, errors
    left = {path.name: len(lines(path)) for path in out.glob("p.jsonl*") if "settings" not in path.name}
    assert left == {"p.jsonl": 4, "p.jsonl.rank1": 2}
    if processes == 2:
        codes, errors = ranks(2, *flags_of(data, out))
        assert codes == [0, 0], errors
    else:
        asked, answer = [], generation.generate_batch
        monkeypatch.setattr(generation, "generate_batch", lambda *a: asked.extend(a[2]) or answer(*a))
        assert call("evaluate", *flags_of(data, out)).code == 0
        assert len(asked) == len(USERS) - 6
    same(out, alone, "metrics.json", "p.jsonl")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--no_such_flag",), "unrecognized arguments: --no_such_flag"),
        (("--device_map", "auto"), "--device_map: not under torchrun"),
        (("--max_new_tokens", 7), "was made otherwise"),  # which the main process alone finds
    ],
    ids=["parser", "flag of one process", "another evaluation's output"],
)
def test_a_mistake_ends_all_processes_with_one_message(ranks, flags, message, one, tmp_path):
    data, _ = one
    out = tmp_path / "out"
    out.mkdir()
    (out / "p.jsonl").write_text('{"id": 1, "prediction": "mine"}\n')
    codes, errors = ranks(2, *flags_of(data, out), *flags)
    assert codes == [2, 2], errors
    assert errors.count(message) == 1 and ranks.out == "" and "Traceback" not in errors
    assert [p.name for p in out.iterdir()] == ["p.jsonl"]
