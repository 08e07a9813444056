"""The check of rows: repeats, leaks between train and test, answers in prompts, long rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import message_row, write_rows
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))

import check
import prepare

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def run(capsys, *argv):
    """prepare.main check in this process: its exit code, output, errors, and the findings of the report by text."""
    try:
        code = prepare.main(["check", *(str(a) for a in argv)])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    found = re.findall(r"^  (LEAK|    ) +(\d+) of (\d+) +(.*?)(?:: lines (.*))?$", out, re.MULTILINE)
    findings = {what: (leak.strip(), int(n), int(of), lines) for leak, n, of, what, lines in found}
    return SimpleNamespace(code=code, out=out, err=err, findings=findings)


def write_parts(folder, train, test, name="mine"):
    write_rows(folder / f"{name}_train.jsonl", [message_row(*pair) for pair in train])
    write_rows(folder / f"{name}_test.jsonl", [message_row(*pair) for pair in test])
    return folder / name


def test_clean_rows_have_no_findings(tmp_path, capsys):
    done = run(capsys, write_parts(tmp_path, [("q1", "a"), ("q2", "b")], [("q3", "c")]))
    assert done.code == 0 and f"{tmp_path}/mine_train.jsonl: 2 rows" in done.out
    assert len(done.findings) == 10 and {count for _, count, _, _ in done.findings.values()} == {0}
    assert "LEAK" not in done.out and "--tokenizer" in done.out


def test_repeats_and_several_answers_inside_a_part_are_no_leaks(tmp_path, capsys):
    train = [("q1", "a"), ("q2", "b"), ("q1", "a"), ("q2", "c"), ("q1", "a")]
    done = run(capsys, write_parts(tmp_path, train, [("q3", "d"), ("q3", "d")]))
    assert done.code == 0
    assert done.findings["train: prompt and answer stand there before"] == ("", 2, 5, "3, 5")
    assert done.findings["train: prompt stands there with another answer"] == ("", 2, 5, "2, 4")
    assert done.findings["test: prompt and answer stand there before"] == ("", 1, 2, "2")


def test_a_prompt_of_train_in_test_is_a_leak(tmp_path, capsys):
    prefix = write_parts(tmp_path, [("q1", "a"), ("q2", "b")], [("q0", "a"), ("q1", "a"), ("q2", "other")])
    done = run(capsys, prefix)
    assert done.code == 1
    assert done.findings["test: prompt in train"] == ("LEAK", 2, 3, "2, 3")
    assert done.findings["test: prompt and answer in train"] == ("LEAK", 1, 3, "2")
    assert run(capsys, prefix, "--allow").code == 0


def test_the_system_turn_is_part_of_the_prompt(tmp_path, capsys):
    train = write_rows(tmp_path / "a.jsonl", [message_row("q", "a", "Do this.")])
    test = write_rows(tmp_path / "b.jsonl", [message_row("q", "a", "Do that.")])
    assert run(capsys, train, test).code == 0


def sql(database, question, query):
    return f"For db_id:[{database}]\n\n{question}", query


def test_databases_and_queries_of_spider_in_both_parts_are_leaks(tmp_path, capsys):
    train = [sql("farm", "How many?", "SELECT 1"), sql("pets", "Who?", "SELECT 2")]
    test = [sql("farm", "How much?", "SELECT 1"), sql("farm", "Which?", "SELECT 2"), sql("zoo", "Who?", "SELECT 2")]
    done = run(capsys, write_parts(tmp_path, train, test))
    assert done.code == 1
    assert done.findings["test: database and SQL in train"] == ("LEAK", 1, 3, "1")
    assert done.findings["test: database in train"] == ("LEAK", 2, 3, "1, 2")
    assert done.findings["test: prompt in train"] == ("", 0, 3, "")
    assert "2 databases in train, 2 in test, 1 in both" in done.out


def test_the_same_query_on_unseen_databases_is_no_leak(tmp_path, capsys):
    train, test = [sql("farm", "How many?", "SELECT 1")], [sql("zoo", "How many?", "SELECT 1")]
    assert run(capsys, write_parts(tmp_path, train, test)).code == 0


def test_an_answer_in_its_prompt_is_told_but_no_leak(tmp_path, capsys):
    rows = [("a good film", "Good"), ("goodness", "Good"), ("say (x)* now", "(x)*"), ("x)* now", "(x)*"), ("c", "abc")]
    done = run(capsys, write_parts(tmp_path, rows, [("z", "y")]))
    assert done.code == 0
    assert done.findings["train: answer stands in its own prompt"] == ("", 2, 5, "1, 3")


def test_each_of_several_answers_is_looked_for(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [message_row("who is bob", "Al; Bob") | {"answers": ["Al", "Bob"]}])
    assert run(capsys, path).findings["train: answer stands in its own prompt"][1] == 1


def test_lines_are_those_of_the_file(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [message_row("q", "a")] * 9)
    path.write_text("\n" + path.read_text())  # a blank line is no row, but a line
    done = run(capsys, path)
    lines = "3, 4, 5, 6, 7 …"
    assert done.findings["train: prompt and answer stand there before"] == ("", 8, 9, lines)


def test_chats_over_the_token_budget_are_counted_as_they_are_trained(tmp_path, capsys):
    folder = ROOT / "models" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = write_rows(tmp_path / "a.jsonl", [message_row("lines with a vowel", "x" * n) for n in (1, 9, 40)])
    system = message_row("", "")["messages"][0]["content"]
    text = f"<|system|>{system}<|eot_id|><|user|>lines with a vowel<|eot_id|><|assistant|>{'x' * 9}<|eot_id|>"
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    what = "train: chat over {} tokens"
    for budget, lines in ((length, "3"), (length - 1, "2, 3")):
        done = run(capsys, path, "--tokenizer", folder, "--max_tokens", budget)
        assert done.code == 0 and done.findings[what.format(budget)][3] == lines
        assert "left out" not in done.out


@pytest.mark.parametrize("kind", ["missing", "no template"])
def test_a_tokenizer_that_cannot_be_used_is_named(kind, tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [message_row("q", "a")])
    folder = tmp_path / "tokenizer"
    if kind == "no template":
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny")
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
    done = run(capsys, path, "--tokenizer", folder)
    assert done.code == 2 and f"--tokenizer {folder}" in done.err and "Traceback" not in done.err


def test_one_part_alone_and_names_in_the_folder_of_datasets(tmp_path, capsys, monkeypatch):
    write_rows(tmp_path / "solo_test.jsonl", [message_row("q", "a")])
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    done = run(capsys, "solo")
    assert done.code == 0 and all(what.startswith("test: ") for what in done.findings)


def test_what_cannot_be_checked_is_one_error(tmp_path, capsys):
    done = run(capsys, tmp_path / "none")
    assert done.code == 2 and f"{tmp_path}/none_train.jsonl" in done.err
    bad = write_rows(tmp_path / "bad.jsonl", [message_row("q", "a"), {"messages": []}])
    done = run(capsys, bad)
    assert done.code == 2 and f"{bad}:2: " in done.err
    foreign = write_rows(tmp_path / "foreign.jsonl", [{"ask": "q", "sql": "a"}])
    done = run(capsys, foreign)
    assert done.code == 2 and f"{foreign}:1: " in done.err
    assert "rows of another kind: `prepare.py own` makes them message rows" in done.err and "--text" not in done.err
    done = run(capsys, bad, bad, bad)
    assert done.code == 2 and "a train and a test file" in done.err


def test_the_projects_own_rows_have_no_leak(capsys):
    done = run(capsys, "synth")
    assert done.code == 0 and done.findings["test: prompt in train"] == ("", 0, 2000, "")
    assert done.findings["train: prompt and answer stand there before"][1] == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published rows are not here (shared/data)")
@pytest.mark.parametrize(
    "name, expected, databases",
    [
        ("spider", {"database and SQL": 1040, "database": 1447}, "159 in test, 159 in both"),
        ("synth", {"prompt and answer": 39, "prompt": 39}, ""),
        ("turk", {"prompt and answer": 0, "prompt": 68}, ""),
    ],
)
def test_leaks_of_the_published_rows_are_found(name, expected, databases, capsys):
    done = run(capsys, SHARED / name)
    assert done.code == 1 and databases in done.out
    for what, count in expected.items():
        assert done.findings[f"test: {what} in train"][:2] == ("LEAK" if count else "", count)


def test_find_parts_prefers_the_path_over_the_folder_of_datasets(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for folder in (tmp_path, other):
        write_rows(folder / "a_train.jsonl", [message_row("q", "a")])
    assert check.find_parts(str(tmp_path / "a"), other) == {"train": tmp_path / "a_train.jsonl"}
    assert check.find_parts("a", other) == {"train": other / "a_train.jsonl"}


def test_a_token_budget_without_a_tokenizer_is_refused(tmp_path, capsys):
    write_parts(tmp_path, [("a?", "b")], [("c?", "d")])
    done = run(capsys, "check", tmp_path / "mine", "--max_tokens", 10)
    assert done.code == 2 and "--max_tokens: only with --tokenizer" in done.err


# ---- what differs trivially ----

LOOSE = "in train, the same but for case, spaces and Unicode form"


def test_pairs_that_differ_in_case_spaces_or_unicode_form_are_leaks_of_their_own(tmp_path, capsys):
    train = [("What is it?", "Two  words"), ("caf\u00e9", "\ufb01ne"), ("same", "same"), ("STRASSE", "a"), ("q", "b")]
    test = [
        ("what  is\nit? ", "two words"),  # 1
        ("cafe\u0301", "fine"),  # 2: composed and decomposed, a ligature
        ("same", "same"),  # 3: identical, so not counted again
        ("stra\u00dfe", "other"),  # 4: the prompt alone
        ("q", "B"),  # 5: the prompt is identical, the pair nearly
        ("q!", "b"),
    ]
    done = run(capsys, write_parts(tmp_path, train, test))
    assert done.code == 1
    assert done.findings["test: prompt and answer in train"] == ("LEAK", 1, 6, "3")
    assert done.findings[f"test: prompt and answer {LOOSE}"] == ("LEAK", 3, 6, "1, 2, 5")
    assert done.findings["test: prompt in train"] == ("LEAK", 2, 6, "3, 5")
    assert done.findings[f"test: prompt {LOOSE}"] == ("LEAK", 3, 6, "1, 2, 4")


def test_one_loose_pair_is_enough_for_exit_code_1(tmp_path, capsys):
    prefix = write_parts(tmp_path, [("Q1", "a")], [("q1", "A")])
    assert run(capsys, prefix).code == 1 and run(capsys, prefix, "--allow").code == 0


def test_databases_are_compared_without_case(tmp_path, capsys):
    done = run(capsys, write_parts(tmp_path, [sql("Farm", "a?", "SELECT 1")], [sql("farm", "b?", "SELECT 1")]))
    assert done.code == 1 and "1 databases in train, 1 in test, 1 in both" in done.out
    assert done.findings["test: database and SQL in train"] == ("LEAK", 1, 1, "1")
    assert done.findings["test: database in train"] == ("LEAK", 1, 1, "1")


def test_a_row_of_another_kind_does_not_switch_the_test_of_databases_off(tmp_path, capsys):
    train = [sql("farm", "a?", "SELECT 1"), ("what?", "4")]
    test = [("why?", "5"), sql("farm", "b?", "SELECT 2"), ("how?", "6")]
    done = run(capsys, write_parts(tmp_path, train, test))
    assert done.code == 1 and done.findings["test: database in train"] == ("LEAK", 1, 3, "2")
    assert "1 databases in train, 1 in test, 1 in both" in done.out
    assert "3 rows name no database (1 in train, 2 in test)" in done.out
    done = run(capsys, write_parts(tmp_path, [("q", "a")], [("r", "b")], "other"))
    assert "database" not in done.out
