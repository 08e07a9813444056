"""Reading and checking data: every kind of bad line is named by file and line; splits are the same every time."""

from __future__ import annotations

import json

import pytest
from conftest import message_row, write_rows

from llm_jepa.data.examples import Example, ExampleError, Problems, read_examples, split_examples

GOOD = json.dumps(message_row("one", "1")).encode()


def turns(*pairs) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}).encode()


BAD = {
    "not JSON": (b'{"messages": [', "not JSON"),
    "no JSON at all": (b"plain text", "not JSON"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "raw control character": (GOOD.replace(b"one", b"o\tne"), "not JSON"),
    "nested too deeply": (b"[" * 100_000, "not JSON"),
    "half a UTF-8 character": (GOOD.replace(b"one", b"on\xc3"), "not UTF-8"),
    "Latin-1": (GOOD.replace(b"one", "é".encode("latin-1")), "not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8"),
    "a list": (b"[]", 'no "messages" list'),
    "a number": (b"17", 'no "messages" list'),
    "null": (b"null", 'no "messages" list'),
    "no messages": (b'{"text": "a"}', 'no "messages" list'),
    "messages null": (b'{"messages": null}', 'no "messages" list'),
    "messages empty": (b'{"messages": []}', 'no "messages" list'),
    "messages a string": (b'{"messages": "user"}', 'no "messages" list'),
    "a turn that is no object": (b'{"messages": ["user", "assistant"]}', "roles"),
    "a turn without role": (b'{"messages": [{"content": "a"}, {"content": "b"}]}', "roles"),
    "a role that is a list": (turns((["user"], "a"), ("assistant", "b")), "roles"),
    "no user": (turns(("system", "s"), ("assistant", "b")), "roles"),
    "no assistant": (turns(("system", "s"), ("user", "a")), "roles"),
    "the wrong way round": (turns(("assistant", "b"), ("user", "a")), "roles"),
    "system second": (turns(("user", "a"), ("system", "s"), ("assistant", "b")), "roles"),
    "two exchanges": (turns(("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "b")), "roles"),
    "another role": (turns(("human", "a"), ("gpt", "b")), "roles"),
    "user empty": (turns(("user", ""), ("assistant", "b")), "content of the user turn is empty"),
    "assistant blank": (turns(("user", "a"), ("assistant", " \n\t")), "content of the assistant turn is empty"),
    "system empty": (turns(("system", ""), ("user", "a"), ("assistant", "b")), "content of the system turn is empty"),
    "content a number": (turns(("user", "a"), ("assistant", 7)), "content of the assistant turn is int"),
    "content null": (turns(("user", None), ("assistant", "b")), "content of the user turn is NoneType"),
    "content a list": (turns(("user", ["a"]), ("assistant", "b")), "content of the user turn is list"),
    "content missing": (
        b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
        "user turn is None",
    ),
    "half a surrogate pair": (turns(("user", "a\ud800"), ("assistant", "b")), "half a surrogate pair"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_line_is_named_by_file_and_line(kind, tmp_path):
    line, reason = BAD[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(ExampleError) as caught:
        read_examples(str(path), Problems())
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", BAD)
def test_skipped_bad_line_is_counted_and_the_others_keep_their_numbers(kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, BAD[kind][0], GOOD, BAD[kind][0]]))
    problems = Problems(skip=True)
    assert [e.id for e in read_examples(str(path), problems)] == [1, 3]
    assert [m.split(": ")[0] for m in problems.messages] == [f"{path}:2", f"{path}:4"]
    assert problems.report().startswith(f"skipped 2 bad examples: {path}:2: ")
    assert BAD[kind][1] in problems.report()


def test_report_counts_all_and_shows_three():
    problems = Problems(skip=True)
    assert problems.report() is None
    for i in range(5):
        problems.add(f"rows:{i}", "bad")
    assert problems.report() == "skipped 5 bad examples: rows:0: bad; rows:1: bad; rows:2: bad (and 2 more)"


def test_file_of_bad_lines_alone_tells_why_it_is_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n{\n")
    with pytest.raises(
        ExampleError, match=r"no examples in the file \(skipped 2 bad examples: .*rows.jsonl:1: not JSON"
    ):
        read_examples(str(path), Problems(skip=True))


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("skip", [False, True])
def test_empty_file_is_an_error_even_when_bad_examples_are_skipped(content, skip, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ExampleError, match="no examples") as caught:
        read_examples(str(path), Problems(skip))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("skip", [False, True])
def test_missing_file_and_folder_are_errors_that_name_them(skip, tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(ExampleError) as caught:
            read_examples(str(path), Problems(skip))
        assert str(caught.value).startswith(f"{path}: cannot be read")


def test_turns_source_and_line_number_are_kept_as_they_stand(tmp_path):
    rows = [message_row(" a\n", "b ", "s"), message_row("ünï 🙂", "c", None)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert read_examples(str(path), Problems()) == [
        Example("s", " a\n", "b ", f"{path}:1", 1),
        Example(None, "ünï 🙂", "c", f"{path}:2", 2),
    ]


def test_extra_keys_do_no_harm(tmp_path):
    row = message_row("a", "b") | {"text": "…", "id": 5}
    row["messages"][0]["name"] = "x"
    path = write_rows(tmp_path / "rows.jsonl", [row])
    assert [(e.user, e.assistant) for e in read_examples(str(path), Problems())] == [("a", "b")]


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [True, False], ids=["newline at the end", "none"])
def test_bom_line_ends_and_blank_lines_do_not_matter(before, end, last, tmp_path):
    lines = [json.dumps(message_row(f"u{i}", f"a{i}")).encode() for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(before + end.join([lines[0], b"", lines[1], b"  ", lines[2]]) + (end if last else b""))
    got = read_examples(str(path), Problems())
    assert [(e.user, e.assistant, e.id) for e in got] == [("u0", "a0", 1), ("u1", "a1", 3), ("u2", "a2", 5)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1e"])
def test_unicode_line_separators_inside_a_string_do_not_end_the_line(separator, tmp_path):
    row = message_row(f"a{separator}b", f"c{separator}d")
    escaped = separator < " "  # as JSON wants it
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=escaped) + "\n" + GOOD.decode() + "\n", encoding="utf-8")
    got = read_examples(str(path), Problems())
    assert [(e.user, e.id) for e in got] == [(f"a{separator}b", 1), ("one", 2)]


# ---------------------------------------------------------------------------------------------------------- splits


def some(n: int) -> list[Example]:
    return [Example(None, f"u{i}", "a", f"rows:{i + 1}", i + 1) for i in range(n)]


@pytest.mark.parametrize("n, share, held_out", [(10, 0.2, 2), (11, 0.2, 3), (50, 0.5, 25), (2, 0.2, 1), (7, 0.1, 1)])
def test_split_is_disjoint_whole_and_as_large_as_the_share(n, share, held_out):
    train, test = split_examples(some(n), share, 42)
    assert len(test) == held_out
    assert sorted(e.id for e in train + test) == list(range(1, n + 1))


def test_split_is_the_same_for_a_seed_and_another_for_another():
    rows = some(40)
    assert split_examples(rows, 0.2, 42) == split_examples(some(40), 0.2, 42)
    held_out = {tuple(e.id for e in split_examples(rows, 0.2, seed)[1]) for seed in range(5)}
    assert len(held_out) == 5
    assert {e.id for e in split_examples(rows, 0.2, 42)[1]} != set(range(33, 41))


def test_split_does_not_depend_on_what_the_rows_say():
    other = [Example("s", "x", "y", "other", e.id) for e in some(40)]
    assert [e.id for e in split_examples(other, 0.2, 42)[1]] == [e.id for e in split_examples(some(40), 0.2, 42)[1]]


def test_split_is_the_one_published_runs_were_made_with():
    """`datasets.train_test_split(test_size=0.2, seed=42)`, the reference's own split."""
    from datasets import Dataset

    want = Dataset.from_list([{"id": e.id} for e in some(30)]).train_test_split(test_size=0.2, seed=42)
    train, test = split_examples(some(30), 0.2, 42)
    assert ([e.id for e in train], [e.id for e in test]) == (list(want["train"]["id"]), list(want["test"]["id"]))


@pytest.mark.parametrize(
    "n, share", [(1, 0.5), (2, 0.6), (3, 0.8), (5, 0.0), (5, 1.0), (5, -0.1), (5, 1.5), (5, float("nan"))]
)
def test_split_with_an_empty_part_is_refused(n, share):
    with pytest.raises(ExampleError, match=f"rows:1: a share of {share} cannot be held out of {n} examples"):
        split_examples(some(n), share, 42)
