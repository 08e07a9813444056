"""python -m llm_jepa.chat: prompts as in training, known examples, a terminal with pasted text, errors."""

import contextlib
import functools
import io
import json
import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import EXAMPLES, JEPA, ROOT, call, message_row, train, write_rows
from transformers import LlamaForCausalLM

from llm_jepa import chat

LONG = "the first line\n\nand the third"
# Two prompts that a model can keep apart, one of several lines.
ROWS = [message_row(q, a, "Write.") for q, a in (("short", "one"), (LONG, "two\n  lines"))]


def run_chat(*argv: object, stdin: bytes = b"", terminal: bool = False) -> SimpleNamespace:
    """Runs chat.main in this process; `terminal`: stdin is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.setattr("sys.stdin.isatty", lambda: terminal)
        return call("llm_jepa.chat", *argv)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data_train.jsonl", ROWS)


@pytest.fixture(scope="module")
def memorized(rows, tmp_path_factory):
    """A run that has memorized ROWS."""
    return train(rows, tmp_path_factory.mktemp("runs") / "run", "--regular", "--learning_rate", "1e-2", "--batch_size",
                 2, "--grad_accum", 1, "--max_steps", 80, "--save_strategy", "no")  # fmt: skip


@pytest.mark.parametrize("flags", [JEPA, ("--regular", "--plain"), (*JEPA, "--lora")], ids=["run", "plain", "adapter"])
def test_answer_is_that_of_evaluate(flags, trained, data):
    run = trained(*flags, "--max_steps", 3)
    plain = ["--plain"] if "--plain" in flags else []
    evaluated = ("--input_file", data, "--task", "text", "--max_new_tokens", 9, "--overwrite")
    assert call("evaluate", "--model_name", run, *evaluated, *plain).code == 0
    first = json.loads((run / "eval" / "words" / "predictions.jsonl").read_text().splitlines()[5])
    known = run_chat(run, "--input_file", data, "--task", "text", "--max_new_tokens", 9,
                     stdin=EXAMPLES[5]["messages"][1]["content"].encode())  # fmt: skip
    assert known.code == 0 and known.out == first["prediction"] + "\n", known.err
    assert ("cut at the maximum length" in known.err) == (first["stop_reason"] == "length")
    new = run_chat(run, "--max_new_tokens", 9, stdin=EXAMPLES[5]["messages"][1]["content"].encode())
    assert new.out == known.out, "the run's own system turn"


def test_known_example_is_scored_and_another_prompt_is_not(memorized, rows, tmp_path):
    flags = (memorized, "--input_file", rows, "--task", "text")
    right = run_chat(*flags, stdin=f"\n{LONG}\n".encode())  # white space at the ends does not matter
    assert (right.code, right.out) == (0, "two\n  lines\n"), right.err
    assert "exact yes" in right.err and repr("two\n  lines") in right.err
    other = write_rows(tmp_path / "x.jsonl", [message_row("short", "on", "Write."), {"text": "a", "code": "b"}])
    wrong = run_chat(memorized, "--input_file", other, "--task", "text", stdin=b"short")
    assert wrong.out == "one\n" and "exact no, startswith yes" in wrong.err
    unknown = run_chat(*flags, stdin=b"shorter")
    assert unknown.code == 0 and "exact" not in unknown.err


def test_answer_is_shown_while_it_is_generated(memorized, monkeypatch):
    forward, shown = LlamaForCausalLM.forward, []

    @functools.wraps(forward)
    def before_each_token(*args, **kwargs):
        shown.append(sys.stdout.getvalue())
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", before_each_token)
    assert run_chat(memorized, stdin=LONG.encode()).out == "two\n  lines\n"
    assert shown[0] == "" and shown[-1].startswith("two\n"), shown


def test_terminal_takes_a_pasted_text_as_one_prompt(memorized, rows):
    """In a pseudo-terminal: a prompt, a paste of several lines, one that cannot be used, the end."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "llm_jepa.chat", memorized, "--input_file", rows, "--task", "text"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=end, stdout=end, stderr=end, env=os.environ | {"TERM": "xterm"})
    os.close(end)
    shown = b""

    def until(text: bytes, count: int = 1) -> None:
        nonlocal shown
        while shown.count(text) < count:
            shown += os.read(terminal, 4096)

    until(b"> ")
    os.write(terminal, b"short\r")
    until(b"the answer is", 1)
    until(b"> ", 2)
    assert b"\x1b[?2004h" in shown, "a terminal marks the ends of a paste only if the program asks for it"
    os.write(terminal, b"\x1b[200~" + LONG.encode() + b"\x1b[201~\r")
    until(b"the answer is", 2)
    until(b"> ", 3)
    os.write(terminal, b"<|eot_id|>\r")
    until(b"would become that special token")
    until(b"> ", 4)  # before the prompt, the terminal would drop Ctrl-D
    os.write(terminal, b"\x04")
    with contextlib.suppress(OSError):  # the terminal is closed
        while more := os.read(terminal, 4096):
            shown += more
    assert process.wait(timeout=60) == 0, shown
    assert shown.count(b"exact yes") == 2 and b"two\r\n  lines\r\n" in shown


def test_interrupt_stops_an_answer_and_not_the_program(memorized, monkeypatch):
    real, asked = chat.answer, []

    def answer(model, renderer, example, limit):
        asked.append(example)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return real(model, renderer, example, limit)

    monkeypatch.setattr(chat, "answer", answer)
    monkeypatch.setattr(chat, "prompts", lambda: iter(["short", "short"]))
    done = run_chat(memorized, terminal=True)
    assert (done.code, done.out, len(asked)) == (0, "one\n", 2)


def test_run_trained_on_csv_knows_the_examples_of_a_csv(tmp_path):
    data = tmp_path / "pairs.csv"
    data.write_text("ask,sql\na question,an answer\nanother,a second\n")
    run = train(data, tmp_path / "run", "--regular", "--text_field", "ask", "--code_field", "sql", "--max_steps", 1)
    done = run_chat(run, "--input_file", data, "--task", "text", "--max_new_tokens", 2, stdin=b"another")
    assert done.code == 0 and "'a second'" in done.err


@pytest.mark.parametrize(
    ("flags", "stdin", "said"),
    [(("--task", "text"), b"a", "--input_file"),
     (("--input_file", "ROWS", "--task", "texts"), b"a", "--task texts"),
     (("--input_file", "ROWS", "--task", "text", "--allow_code_execution"), b"a", "--allow_code_execution"),
     (("--input_file", "missing.jsonl", "--task", "text"), b"a", "missing.jsonl"),
     (("--max_new_tokens", 0), b"a", "--max_new_tokens 0"),
     (("--system", "\udcff"), b"a", "the system turn"),
     ((), b"\n", "the prompt"),
     ((), b"\xff", "UTF-8"),
     ((), b"a <|eot_id|>", "<|eot_id|>"),
     ((), b"word " * 3000, "context")],
)  # fmt: skip
def test_bad_input_is_one_line_with_exit_code_2(memorized, rows, flags, stdin, said):
    done = run_chat(memorized, *(rows if f == "ROWS" else f for f in flags), stdin=stdin)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err
    assert run_chat(memorized / "missing", stdin=b"a").code == 2
