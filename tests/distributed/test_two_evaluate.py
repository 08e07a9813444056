"""Two gloo processes write the same predictions as one, and either resumes what the other left."""

import json
from pathlib import Path

import pytest
from conftest import GOLDEN, MODEL, call, message_row, read_lines, write_rows

SCRIPT = "evaluate"
USERS = [f"lines with the number {i}" + " or a vowel" * (i * 5 % 7) for i in range(11)]
FLAGS = ("--model_name", MODEL, "--batch_size", 2, "--max_new_tokens", 6, "--dtype", "float32")
# Process 0 is killed in its second batch, after the first ones of both processes are written.
KILLED = """
import os, signal
from llm_jepa.evaluation import generation
generate, count = generation.generate_batch, []
def stop(*args):
    if os.environ["RANK"] == "0" and count:
        os.kill(os.getpid(), signal.SIGKILL)
    count.append(1)
    return generate(*args)
generation.generate_batch = stop
"""


def flags_of(data: Path, folder: Path) -> tuple[object, ...]:
    return (*FLAGS, "--input_file", data, "--output_file", folder / "p.jsonl")


def same_results(folder: Path, other: Path) -> bool:
    """Whether two folders have the same files; in metrics.json, command, place, processes and code may differ.

    The code differs if files of the repository are edited or committed while the tests run.
    """
    own = ("argv", "processes", "threads", "git_commit", "git_dirty", "code_sha256")

    def metrics(path: Path) -> dict:
        found = json.loads((path / "metrics.json").read_text())
        found["settings"].pop("output_file")
        return {name: value for name, value in found.items() if name not in own}

    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (folder, other)]
    rows = [name for name in files[0] if name.endswith(".jsonl")]
    equal = all((folder / name).read_bytes() == (other / name).read_bytes() for name in rows)
    return files[0] == files[1] and equal and metrics(folder) == metrics(other)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, Path]:
    """(data, half of whose answers are the model's responses; the folder that one process wrote for it)"""
    folder = tmp_path_factory.mktemp("one")
    data = write_rows(folder / "synth_test.jsonl", [message_row(user, "a") for user in USERS])
    assert call("evaluate", *flags_of(data, folder / "first")).code == 0
    responses = [row["prediction"].strip() or "?" for row in read_lines(folder / "first" / "p.jsonl")]
    write_rows(data, [message_row(user, responses[i] if i % 2 else "a") for i, user in enumerate(USERS)])
    assert call("evaluate", *flags_of(data, folder / "out")).code == 0
    assert 0 < json.loads((folder / "out" / "metrics.json").read_text())["exact"] < 1
    return data, folder / "out"


def test_two_processes_write_the_same_files_as_one(ranks, one, tmp_path):
    data, _ = one
    flags = ("--split_tune_untune", "--original_model_name", GOLDEN / "models" / "chatml", "--max_examples", 9)
    assert call("evaluate", *flags_of(data, tmp_path / "one"), *flags).code == 0
    batches = tmp_path / "batches"
    record = (  # one word for each batch: its process, once for each prompt
        "from llm_jepa.evaluation import generation\nimport os\ngenerate = generation.generate_batch\n"
        f"log = lambda batch: open({str(batches)!r}, 'a').write(os.environ['RANK'] * len(batch) + ' ')\n"
        "generation.generate_batch = lambda *a: log(a[-1]) and generate(*a)\n"
    )
    codes, errors = ranks(2, *flags_of(data, tmp_path / "two"), *flags, before=record)
    assert codes == [0, 0], errors
    # Five batches for each of the two models: process 0 has one more than process 1.
    assert sorted(batches.read_text().split()) == ["0", "0"] + ["00"] * 4 + ["11"] * 4
    assert same_results(tmp_path / "two", tmp_path / "one")
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["processes"] == 2
    assert ("\n" + ranks.out).count("\nsynth, n = 9\n") == 1 and " 9/9 " in errors


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_processes_leave_what_any_number_resumes(ranks, processes, one, tmp_path):
    data, single = one
    out = tmp_path / "out"
    codes, errors = ranks(2, *flags_of(data, out), before=KILLED)
    assert -9 in codes, errors
    assert len(read_lines(out / "p.jsonl")) == 4
    codes, errors = ranks(processes, *flags_of(data, out))
    assert codes == [0] * processes, errors
    assert same_results(out, single)


@pytest.mark.parametrize("flags", [("--device_map", "auto"), ("--max_new_tokens", 7)], ids=["flag", "output"])
def test_error_ends_all_processes_with_one_message(ranks, flags, one, tmp_path):
    data, _ = one
    out = tmp_path / "out"
    out.mkdir()
    (out / "p.jsonl").write_text('{"id": 1, "prediction": "mine"}\n')  # found by the main process only
    codes, errors = ranks(2, *flags_of(data, out), *flags)
    assert codes == [2, 2], errors
    assert errors.count("evaluate.py: error:") == 1 and ranks.out == "" and "Traceback" not in errors
    assert [p.name for p in out.iterdir()] == ["p.jsonl"]
