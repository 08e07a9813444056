"""prepare.py check: repeats, leaks between train and test, answers in prompts, long chats, changed files."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import ROOT, call, message_row, write_rows
from transformers import AutoTokenizer

TINY = ROOT / "models" / "tiny"
sys.path.insert(0, str(ROOT / "datasets"))


def run(*argv):
    """`prepare.py check` in this process, with its findings as (leak, count, lines) by text."""
    done = call("prepare", "check", *argv)
    found = re.findall(r"^  (LEAK|    ) +(\d+) of \d+ +(.*?)(?:: lines (.*))?$", done.out, re.MULTILINE)
    done.findings = {what: (leak == "LEAK", int(count), lines) for leak, count, what, lines in found}
    return done


def write_parts(folder, train, test):
    for part, pairs in (("train", train), ("test", test)):
        write_rows(folder / f"mine_{part}.jsonl", [message_row(*pair) for pair in pairs])
    return folder / "mine"


def test_clean_examples_have_no_findings_and_line_numbers_count_blank_lines(tmp_path):
    train, test = [("q1", "a", "Do this."), ("q2", "b")], [("q3", "c"), ("q1", "a", "Do that.")]
    done = run(write_parts(tmp_path, train, test))
    assert done.code == 0 and len(done.findings) == 10
    assert {count for _, count, _ in done.findings.values()} == {0}
    path = write_rows(tmp_path / "a.jsonl", [message_row("q", "a")] * 9)
    path.write_text("\n" + path.read_text())
    assert run(path).findings["train: repeated prompt and answer"] == (False, 8, "3, 4, 5, 6, 7 …")


def test_repeats_several_answers_and_answers_in_prompts_are_no_leaks(tmp_path):
    train = [("q1", "a"), ("q2", "b"), ("q1", "a"), ("q2", "c"), ("q1", "a")]
    test = [("a good film", "Good"), ("goodness", "Good"), ("say (x)* now", "(x)*"), ("x)* now", "(x)*")]
    done = run(write_parts(tmp_path, train, test))
    assert done.code == 0
    assert done.findings["train: repeated prompt and answer"] == (False, 2, "3, 5")
    assert done.findings["train: prompt with several answers"] == (False, 2, "2, 4")
    assert done.findings["test: answer in its own prompt"] == (False, 2, "1, 3")
    path = write_rows(tmp_path / "a.jsonl", [message_row("who is bob", "Al; Bob") | {"answers": ["Al", "Bob"]}])
    assert run(path).findings["train: answer in its own prompt"][1] == 1


def test_prompts_and_pairs_of_train_in_test_are_leaks(tmp_path):
    train = [("What is it?", "Two  words"), ("caf\u00e9", "\ufb01ne"), ("same", "same"), ("STRASSE", "a"), ("q", "b")]
    test = [
        ("what  is\nit? ", "two words"),  # 1
        ("cafe\u0301", "fine"),  # 2: decomposed, and without the ligature
        ("same", "same"),  # 3: identical, so not counted again
        ("stra\u00dfe", "other"),  # 4: only the prompt
        ("q", "B"),  # 5: the prompt is identical, the pair nearly
        ("q!", "b"),
    ]
    prefix = write_parts(tmp_path, train, test)
    done = run(prefix)
    assert done.code == 1 and run(prefix, "--allow").code == 0
    pair, prompt = "test: prompt and answer in train", "test: prompt in train"
    (loose,) = {what.removeprefix(f"{pair}, ") for what in done.findings if what.startswith(f"{pair}, ")}
    assert done.findings[pair] == (True, 1, "3") and done.findings[f"{pair}, {loose}"] == (True, 3, "1, 2, 5")
    assert done.findings[prompt] == (True, 2, "3, 5") and done.findings[f"{prompt}, {loose}"] == (True, 3, "1, 2, 4")


def sql(database, question, query):
    return f"For db_id:[{database}]\n\n{question}", query


def test_spider_databases_in_both_parts_are_leaks_in_any_case(tmp_path):
    train = [sql("Farm", "How many?", "SELECT 1"), sql("pets", "Who?", "SELECT 2"), ("what?", "4")]
    test = [sql("farm", "How much?", "SELECT 1"), sql("farm", "Which?", "SELECT 2"), sql("zoo", "Who?", "SELECT 2")]
    done = run(write_parts(tmp_path, train, test))
    assert done.code == 1
    assert done.findings["test: database and SQL in train"] == (True, 1, "1")
    assert done.findings["test: database in train"] == (True, 2, "1, 2")
    assert run(write_parts(tmp_path, train, test[2:])).code == 0


def test_chats_are_counted_in_tokens_of_the_rendered_chat(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [message_row("lines with a vowel", "x" * n, None) for n in (1, 9, 40)])
    text = f"<|user|>lines with a vowel<|eot_id|><|assistant|>{'x' * 9}<|eot_id|>"
    length = len(AutoTokenizer.from_pretrained(TINY)(text, add_special_tokens=False)["input_ids"])
    for limit, lines in ((length, "3"), (length - 1, "2, 3")):
        done = run(path, "--tokenizer", TINY, "--max_tokens", limit)
        assert done.code == 0 and done.findings[f"train: chat over {limit} tokens"][2] == lines


def test_file_that_differs_from_the_manifest_is_exit_code_1(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [message_row("q", "a")])
    call("prepare", "own", "--name", "m", "--train_file", path, "--out_dir", tmp_path)
    made = tmp_path / "m_train.jsonl"
    assert run(tmp_path / "m").code == 0
    made.write_text(made.read_text() + json.dumps(message_row("r", "b")) + "\n")
    for given in (tmp_path / "m", made):
        done = run(given, "--allow")
        assert done.code == 1 and f"{made}: " in done.out and "manifest.json" in done.out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["none"], "none_train.jsonl"),
        (["bad.jsonl"], "bad.jsonl:2: "),
        (["bad.jsonl"] * 3, "check"),
        (["good.jsonl", "--max_tokens", "10"], "--tokenizer"),
        (["good.jsonl", "--tokenizer", "./none"], "--tokenizer ./none"),
    ],
)
def test_wrong_usage_or_data_is_exit_code_2(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "good.jsonl", [message_row("q", "a")])
    write_rows(tmp_path / "bad.jsonl", [message_row("q", "a"), {"messages": []}])
    done = run(*argv)
    assert done.code == 2 and message in done.err
