"""Reading JSONL in the project's own format: bad lines are reported by file and line."""

import dataclasses
import json

import pytest
from conftest import message_row, write_rows

from llm_jepa.data.examples import Example, ExampleError, Problems, read_examples, split_examples

GOOD = json.dumps(message_row("one", "1")).encode()


def turns(*pairs) -> bytes:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}).encode()


def with_extra(**extra) -> bytes:
    return json.dumps(message_row("u", "a") | extra).encode()


# Each bad line, and the word that its message must contain.
BAD = {
    "not JSON": (b'{"messages": [', "JSON"),
    "nested too deeply": (b"[" * 100_000, "JSON"),
    "truncated UTF-8": (GOOD.replace(b"one", b"on\xc3"), "UTF-8"),
    "no messages": (b'{"text": "a"}', "messages"),
    "prompt without completion": (b'{"prompt": "a"}', "completion"),
    "two answers in succession": (turns(("user", "a"), ("assistant", "b"), ("assistant", "c")), "roles"),
    "ShareGPT without an answer": (b'{"conversations": [{"from": "human", "value": "a"}]}', "roles"),
    "pair a number": (with_extra(pair=1), '"pair"'),
    "views that are no pair": (b'{"text": "t", "code": "c", "pair": false}', '"pair"'),
    "chat without turns": (b'{"messages": [], "text": "t", "code": "c"}', "no turns"),
    "turn not an object": (b'{"messages": ["user", "assistant"]}', "roles"),
    "no assistant": (turns(("system", "s"), ("user", "a")), "roles"),
    "system second": (turns(("user", "a"), ("system", "s"), ("assistant", "b")), "roles"),
    "assistant blank": (turns(("user", "a"), ("assistant", " \n\t")), "assistant"),
    "content a number": (turns(("user", "a"), ("assistant", 7)), "int"),
    "lone surrogate": (turns(("user", "a\ud800"), ("assistant", "b")), "surrogate"),
    "view with a wrong role": (with_extra(text=[{"role": "assistant", "content": "x"}]), '"text"'),
    "answer a number": (with_extra(answers=["A", 1]), '"answers"'),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_line_is_reported_by_file_and_line_or_skipped(kind, tmp_path):
    line, word = BAD[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD, *[line] * 4]))
    with pytest.raises(ExampleError, match=f"^{path}:3: ") as caught:
        read_examples(str(path), Problems())
    assert word in str(caught.value)
    problems = Problems(skip=True)
    assert [e.id for e in read_examples(str(path), problems)] == [1, 4]
    places = [f"{path}:{number}" for number in (3, 5, 6, 7, 8)]
    assert list(problems.found) == places and word in problems.report()
    assert [place in problems.report() for place in places] == [True] * 3 + [False] * 2  # three are shown


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("content", [b"", b" \n\r\n\t\n", b"\xef\xbb\xbf\n", b"{\n{\n", None])
def test_file_without_examples_is_an_error(content, skip, tmp_path):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExampleError, match=str(path)):
        read_examples(str(path), Problems(skip))


def test_contents_source_and_line_number_are_kept_exactly(tmp_path):
    named = message_row("a", "b") | {"id": 5, "text": "not a view"}
    named["messages"][0]["name"] = "x"
    row = message_row("Which? A) x B) y", "A", "Choose.") | {
        "text": [{"role": "user", "content": "the context"}],
        "code": [{"role": "assistant", "content": "the ending"}],
        "answers": ["A", "the first"],
    }
    rows = [message_row(" a\n", "b ", "s"), message_row("ünï 🙂", "c\u2028\x85d", None), named, row]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    system = named["messages"][0]["content"]
    assert read_examples(str(path), Problems()) == [
        Example("s", " a\n", "b ", f"{path}:1", 1),
        Example(None, "ünï 🙂", "c\u2028\x85d", f"{path}:2", 2),
        Example(system, "a", "b", f"{path}:3", 3),
        Example("Choose.", "Which? A) x B) y", "A", f"{path}:4", 4, "the context", "the ending", ("A", "the first")),
    ]


def test_chats_of_other_formats_and_examples_of_views_only(tmp_path):
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, "sabcd", strict=True)]
    names = ("system", "human", "gpt", "human", "gpt")
    sharegpt = [{"from": name, "value": text} for name, text in zip(names, "sabcd", strict=True)]
    views = {"text": [{"role": "user", "content": "t"}], "code": [{"role": "assistant", "content": "c"}]}
    rows = [
        {"messages": messages}, {"conversations": sharegpt, "messages": None},
        {"prompt": messages[:-1], "completion": messages[-1:]}, {"prompt": messages[:-1], "completion": "d"},
        {"prompt": "q", "completion": " a"}, {"messages": messages, "pair": False},
        views, {"text": "t", "code": "c", "group": "1"}, {"messages": messages} | views,
    ]  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", rows)
    got = read_examples(str(path), Problems())
    chat = Example("s", "c", "d", f"{path}:1", 1, history=("a", "b"))
    assert got[0] == chat and got[0].messages == messages
    for i, changes in enumerate(
        [{}, {}, {}, {"system": None, "user": "q", "assistant": " a", "history": ()}, {"pair": False},
         {"system": None, "user": None, "assistant": None, "history": (), "text": "t", "code": "c"},
         {"system": None, "user": None, "assistant": None, "history": (), "text": "t", "code": "c", "group": "1"},
         {"text": "t", "code": "c"}], start=2,
    ):  # fmt: skip
        assert got[i - 1] == dataclasses.replace(chat, source=f"{path}:{i}", id=i, **changes)
    assert [e.has_chat for e in got] == [True] * 6 + [False] * 2 + [True]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_bom_line_ends_and_blank_lines_are_ignored(end, tmp_path):
    lines = [json.dumps(message_row(f"u{i}", f"a{i}")).encode() for i in range(3)]
    content = end.join([lines[0], b"", lines[1], b"  ", lines[2]])
    path = tmp_path / "rows.jsonl"
    for before, after in ((b"", b""), (b"\xef\xbb\xbf", end)):
        path.write_bytes(before + content + after)
        got = read_examples(str(path), Problems())
        assert [(e.user, e.assistant, e.id) for e in got] == [("u0", "a0", 1), ("u1", "a1", 3), ("u2", "a2", 5)]


@pytest.mark.parametrize(("n", "share"), [(1, 0.5), (2, 0.6), (5, 0.0), (5, 1.0), (5, -0.1), (5, float("nan"))])
def test_split_with_an_empty_part_is_refused(n, share):
    with pytest.raises(ExampleError, match=f"{share}.* {n} "):
        split_examples([Example(None, "u", "a", f"rows:{i}", i) for i in range(n)], share, 42)
