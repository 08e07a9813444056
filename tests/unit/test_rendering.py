"""Chats, views, label scopes and view tokens for every chat template."""

import copy
import dataclasses
import shutil
from datetime import datetime

import numpy as np
import pytest
from conftest import GOLDEN, dry_run, message_row, write_rows
from templates import END_OF_TURN, FOLDERS, dataset, encoder, tokenizer
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from llm_jepa.cli import UsageError
from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.rendering import PINNED_DATE, Renderer
from llm_jepa.data.segments import Encoder, Segment, end_of_turn
from llm_jepa.data.spans import Draws

ALL = tuple(FOLDERS)
EXAMPLES = [
    Example("Answer Good or Bad.", "Is it Good or Bad: a Good film", "Good", "rows:1", 1),
    Example("Answer Good or Bad.", "naïve, café — 你好 🙂", "Bad ☃ naïve", "rows:2", 2),
    Example("Convert.", "  spaces around  ", "  SELECT  a\nFROM b;  ", "rows:3", 3),
    Example(None, "no system turn", "ok", "rows:4", 4),
    Example("System.", "assistant\n\nuser", "x", "rows:5", 5),
]
FIRST = EXAMPLES[0]
CHAT = Example("Be brief.", "and (a|b)?", "c d", "rows:6", 6, history=("one?", "Good", "two?", "x y"))


def decode(e: Encoder, ids: np.ndarray) -> str:
    return e.renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def with_template(template: str | dict[str, str], name: str = "chatml", **flags) -> Encoder:
    """An encoder of a tokenizer with another template."""
    other = copy.deepcopy(tokenizer(name))
    other.chat_template = template
    return Encoder(Renderer(other), **flags)


def turns(content: str) -> str:
    """A template whose turns have this content."""
    return "{% for m in messages %}<|im_start|>{{ m['role'] }}" + content + "<|im_end|>\n{% endfor %}"


def prompt_length(chat) -> int:
    return int(np.flatnonzero(chat.labels)[0])


@pytest.mark.parametrize("name", ALL)
def test_labels_are_answer_and_end_of_turn_token_and_no_prompt_token(name):
    e = encoder(name, locate_user=True)
    for example, chat in zip(EXAMPLES, e.chats(EXAMPLES), strict=True):
        rendered, label_ids, first = e.renderer.chat(example), chat.ids[chat.labels], prompt_length(chat)
        assert decode(e, label_ids[-1:]) == END_OF_TURN[name]
        assert decode(e, label_ids[:-1]).strip() == example.assistant.strip()
        assert np.flatnonzero(chat.labels).tolist() == list(range(first, first + len(label_ids)))
        assert decode(e, chat.ids[:first]).rstrip() == rendered.text[: rendered.start].rstrip()
        assert end_of_turn(e.renderer) == label_ids[-1]
        user = f"{example.system}\n\n{example.user}" if e.renderer.folds and example.system else example.user
        assert decode(e, chat.ids[slice(*chat.user)]).strip() == user.strip()


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
@pytest.mark.parametrize("name", ALL)
def test_last_or_all_answers_of_a_chat_are_labels(name, plain):
    answers = [answer + ("<|eot_id|>" if plain else END_OF_TURN[name]) for answer in ("Good", "x y", "c d")]
    for scope, turns in (("answer", "last"), ("answer", "all"), ("answer_text", "all")):
        e = encoder(name, plain=plain, lm_labels=scope, lm_turns=turns, locate_user=True)
        (chat,) = e.chats([CHAT])
        if (name, plain, turns) == ("qwen3", False, "all"):  # prompts have a thinking block, earlier answers do not
            assert isinstance(chat, ValueError)
            continue
        spans = np.split(np.flatnonzero(chat.labels), np.flatnonzero(np.diff(np.flatnonzero(chat.labels)) > 1) + 1)
        want = answers[-1:] if turns == "last" else answers
        want = [answer.partition("<")[0] for answer in want] if scope == "answer_text" else want
        assert [decode(e, chat.ids[span]).strip() for span in spans] == want
        assert decode(e, chat.ids[slice(*chat.user)]).strip() == CHAT.user
        assert decode(e, chat.ids[slice(*chat.answer)]).strip() == CHAT.assistant
    text, code = e.renderer.views(CHAT)
    assert CHAT.user in text.text and "two?" not in text.text and "c d" in code.text and "x y" not in code.text


def test_chat_whose_last_answer_ends_differently_labels_only_that_one():
    """Qwen3's begins differently: see above."""
    end = "{{ '<|im_end|>' if m.role == 'user' or loop.last }}\n"
    template = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}" + end + "{% endfor %}"
    assert isinstance(with_template(template, lm_turns="all").chats([CHAT])[0], ValueError)
    assert isinstance(with_template(template).chats([CHAT])[0], Segment)


@pytest.mark.parametrize("name", ALL)
def test_system_text_is_in_chat_only_and_text_has_at_most_one_bos(name):
    e = encoder(name, predictors=1)
    for example in EXAMPLES[:3]:
        assert example.system in e.renderer.chat(example).text
        assert all(example.system not in view.text for view in e.renderer.views(example))
    bos = e.renderer.tokenizer.bos_token_id
    assert all((segment.ids == bos).sum() <= 1 for item in e(EXAMPLES) for segment in item)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_view_token_is_last_content_or_predictor_token(name, k):
    e = encoder(name, predictors=k)
    predictors = [f"<|predictor_{i}|>" for i in range(k, 0, -1)]
    for example, (text, code) in zip(EXAMPLES, e.views(EXAMPLES), strict=True):
        if k:
            assert e.renderer.tokenizer.convert_ids_to_tokens(text.ids[: text.view + 1])[-k:] == predictors
        for segment, content in ((text, example.user), (code, example.assistant)):
            last = segment.view - k if segment is text else segment.view
            assert decode(e, segment.ids[: last + 1]).strip().endswith(content.strip())
            if content == content.strip():
                assert not decode(e, segment.ids[:last]).endswith(content)


class In2031(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 3, 9)


def assert_one_prompt(e: Encoder, examples: list[Example], folder, monkeypatch) -> list[str]:
    """The prompts, after asserting that training, evaluation and on another day the saved tokenizer agree on them."""
    e.renderer.tokenizer.save_pretrained(folder)
    with monkeypatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", In2031)
        saved, prompts = AutoTokenizer.from_pretrained(folder), []
        for example, chat in zip(examples, e.chats(examples), strict=True):
            trained = chat.ids[: prompt_length(chat)].tolist()
            turns = example.messages[:-1]
            assert trained == saved.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            assert trained == e.renderer.tokenizer(e.renderer.prompt(example), add_special_tokens=False).input_ids
            prompts.append(e.renderer.tokenizer.decode(trained))
        assert Renderer(saved, plain=e.renderer.plain).prompt(FIRST) == e.renderer.prompt(FIRST)
        assert saved.chat_template == e.renderer.tokenizer.chat_template  # nothing is fixed twice
    return prompts


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
@pytest.mark.parametrize("name", ALL)
def test_training_evaluation_and_saved_tokenizer_have_one_prompt(name, plain, tmp_path, monkeypatch):
    examples = [*EXAMPLES, dataclasses.replace(FIRST, system="", assistant="\n\nGood\n"), CHAT]
    e = encoder(name, plain=plain)
    for example, prompt in zip(examples, assert_one_prompt(e, examples, tmp_path, monkeypatch), strict=True):
        assert example.user.strip() in prompt and "2031" not in prompt
        assert (example.system or "") in prompt or plain
        assert prompt.endswith(f"{example.user}<|perception|>") or not plain


# Templates whose generation prompt is not how an answer begins, and what follows the user text "q" in a prompt.
HEADERS = {
    "ignores generation prompts": (turns(": {{ m['content'] }}"), "<|im_end|>\n<|im_start|>assistant:"),
    "adds a channel": (
        turns("{{ ('<final>' if m.role == 'assistant') ~ m.content }}")
        + "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
        "<|im_end|>\n<|im_start|>assistant<final>",
    ),
    "begins to think": (
        turns(":{{ m.content.split('</think>')[-1] }}")
        + "{% if add_generation_prompt %}<|im_start|>assistant:<think>\n{% endif %}\n",
        "<|im_end|>\n<|im_start|>assistant:",
    ),
}


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
@pytest.mark.parametrize("kind", HEADERS)
def test_prompt_ends_where_the_answer_begins(kind, name, tmp_path, monkeypatch):
    template, end = HEADERS[kind]
    e = with_template(template, name)
    examples = [Example(system, "q", answer, "rows:1", 1) for system in (None, "s") for answer in ("the word", "(a|b)")]
    prompts = assert_one_prompt(e, examples, tmp_path, monkeypatch)
    for example, chat, prompt in zip(examples, e.chats(examples), prompts, strict=True):
        assert prompt.endswith("q" + end) and prompt.count("assistant") == 1
        assert decode(e, chat.ids[chat.labels])[:-10].strip().startswith(example.assistant[:-1])


@pytest.mark.parametrize(
    ("header", "answer"), [("\n", "\nfoo bar"), ("\n", "\n\n  foo"), (": ", " foo"), (": ", "foo"), (":a", "nd more")]
)
@pytest.mark.parametrize("name", ["chatml", "qwen3", "gemma3"])
def test_no_token_reaches_from_the_prompt_into_the_answer(name, header, answer, tmp_path, monkeypatch):
    end = END_OF_TURN[name]
    turn = "{{ m.role + '" + header.replace("\n", "\\n") + "' + m.content + '" + end + "' }}"
    template = "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}assistant"
    e = with_template(template + header.replace("\n", "{{ '\\n' }}") + "{{ '' }}{% endif %}", name, locate_user=True)
    example = Example(None, "(two) words", answer, "rows:1", 1)
    (prompt,) = assert_one_prompt(e, [example], tmp_path, monkeypatch)
    assert prompt.endswith("assistant" + header)
    (chat,) = e.chats([example])
    assert decode(e, chat.ids[chat.labels]) == answer + end
    assert decode(e, chat.ids[slice(*chat.answer)]) == answer
    assert decode(e, chat.ids[slice(*chat.user)]).strip() == "(two) words"


def test_system_text_precedes_user_text_if_template_refuses_or_drops_it():
    dropping = with_template("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}")
    for renderer in (encoder("google_gemma").renderer, encoder("mistral_nemo").renderer, dropping.renderer):
        assert renderer.folds
        assert "Answer Good or Bad.\n\nIs it" in renderer.chat(FIRST).text


@pytest.mark.parametrize(
    "date", ["%Y-%m-%d", "%A, %-d %B %Y", "%e|%F|%D", "100%% on %d", "%%d %j %^a", "%I:%M %p, day %u"]
)
def test_dates_are_those_of_a_fixed_day(date, tmp_path, monkeypatch):
    macro = "{% macro today() %}[{{ strftime_now('" + date + "') }}]{% endmacro %}{{ today() }} {{ date_string }}"
    e = with_template(macro + turns("{{ m['content'] }}"))
    (prompt,) = assert_one_prompt(e, [FIRST], tmp_path, monkeypatch)
    assert prompt.startswith(f"[{PINNED_DATE.strftime(date)}] 26 Jul 2024")
    with pytest.raises(UsageError, match="strftime_now"):
        with_template("{{ strftime_now(format) }}" + turns("{{ m['content'] }}"))


def test_white_space_that_a_template_changes_does_not_hide_the_content():
    normal = "{{ m.content.strip().replace('\\r\\n', '\\n').replace('\\n\\n', '\\n') }}"
    for content, wanted in ((normal, "a, b\nc"), ("{{ m.content.split() | join(' ') }}", "a, b c")):
        e = with_template(turns("\n" + content))
        e = Encoder(dataclasses.replace(e.renderer, predictors=1))
        example = Example(None, " join:\r\n\r\na\r\nb \n", "\r\na, b\r\nc\r\n", "rows:1", 1)
        chat, text, code = e([example])[0]
        assert decode(e, chat.ids[chat.labels]) == f"{wanted}<|im_end|>"
        assert decode(e, code.ids[: code.view + 1]).endswith(f"assistant\n{wanted}")
        assert decode(e, text.ids[: text.view + 1]).endswith("<|predictor_1|>")


@pytest.mark.parametrize("name", ["chatml", "llama3_2", "gemma3"])
def test_text_of_a_special_token_is_refused_in_every_turn_and_view(name):
    e, end = encoder(name, predictors=1), END_OF_TURN[name]
    bad = [
        dataclasses.replace(FIRST, **{field: f"What is {text}?", "source": f"{field} {text}"})
        for field in ("system", "user", "assistant", "text", "code")
        for text in (end, "<|predictor_1|>")
    ]
    problems = Problems(skip=True)
    assert len(SegmentDataset([FIRST, *bad], e, problems, Draws(0))) == 1
    assert list(problems.found) == [example.source for example in bad]
    for example in bad:
        with pytest.raises(ValueError, match="special token"):
            e.renderer.prompt(example)
    thinking = dataclasses.replace(FIRST, user="What is <think>?", assistant="<|predictor_11|> < | >")
    assert not isinstance(encoder("qwen3", predictors=1)([thinking])[0], ValueError)


def test_default_template_of_several_is_used_and_the_others_are_kept(tmp_path, monkeypatch):
    chatml, date = tokenizer("chatml").chat_template, "{{ strftime_now('%Y') }}"
    named = {"default": date + chatml, "tool_use": "TOOLS" + chatml, "rag": date + chatml}
    for flags, start in (({}, "2024<|im_start|>"), ({"plain": True}, "Is it")):
        other = copy.deepcopy(tokenizer("chatml"))
        other.chat_template = dict(named)
        e = Encoder(Renderer(other, **flags), lm_labels="answer_text")
        prompts = assert_one_prompt(e, EXAMPLES[:1], tmp_path, monkeypatch)
        assert prompts[0].startswith(start)
        saved = AutoTokenizer.from_pretrained(tmp_path).chat_template
        assert saved == named | {"default": saved["default"]}
    del named["default"]
    with pytest.raises(UsageError, match="template"):
        with_template(named)


def test_empty_system_turn_is_not_the_same_as_none(tmp_path, monkeypatch):
    turn = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    template = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    e = with_template(template + "{% for m in messages %}" + turn + "{% endfor %}")
    examples = [dataclasses.replace(FIRST, system=system) for system in ("", None, "Short.")]
    prompts = assert_one_prompt(e, examples, tmp_path, monkeypatch)
    wanted = [f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user" for text in ("", "Be helpful.", "Short.")]
    assert [prompt.startswith(start) for prompt, start in zip(prompts, wanted, strict=True)] == [True] * 3


def test_thinking_answers_follow_a_prompt_that_does_not_close_the_thinking(tmp_path, monkeypatch):
    e = Encoder(Renderer(copy.deepcopy(tokenizer("qwen3"))))
    example = dataclasses.replace(FIRST, assistant="<think>\nA film.\n</think>\n\nGood")
    assert isinstance(e.chats([example])[0], ValueError)
    e.renderer.fix_template(thinking=True)
    examples = [example, FIRST, dataclasses.replace(FIRST, assistant="<think>No</think>Good")]
    assert all(p.endswith("assistant\n") for p in assert_one_prompt(e, examples, tmp_path, monkeypatch))
    labels = [decode(e, chat.ids[chat.labels]) for chat in e.chats(examples)]
    blocks = ("A film.", "", "No")
    views = [decode(e, code.ids[: code.view + 1]) for _, code in e.views(examples)]
    assert [view.split("assistant")[1].split() for view in views] == [["Good"]] * 3
    assert labels == [f"<think>\n{block}\n</think>\n\nGood<|im_end|>" for block in blocks]
    again = Renderer(AutoTokenizer.from_pretrained(tmp_path))
    again.fix_template()
    assert again.tokenizer.chat_template == e.renderer.tokenizer.chat_template  # thinking stays on


def test_data_with_thinking_answers_turn_thinking_on(tmp_path):
    model = shutil.copytree(GOLDEN / "models" / "chatml", tmp_path / "model")
    shutil.copy(FOLDERS["qwen3"] / "chat_template.jinja", model)
    rows = [message_row("two words", "foo bar"), message_row("how many", "<think>\none and one\n</think>\n\ntwo")]
    for number, block in ((1, ""), (2, "<think>\n\n</think>\n\n")):
        data = write_rows(tmp_path / f"{number}.jsonl", rows[:number])
        row = dry_run("--train_file", data, "--model_name", model, "--regular", "--dry_run", 2)["first_row"]
        assert row["label_text"] == f"{block}foo bar<|im_end|>" and "<think>\n\n</think>" in row["chat"]


def test_templates_that_cannot_be_used_are_refused():
    no_end = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    assert isinstance(with_template(no_end).chats([FIRST])[0], ValueError)
    chat = with_template(no_end, lm_labels="answer_text").chats([FIRST])[0]
    assert decode(encoder("chatml"), chat.ids[chat.labels]).strip() == "Good"
    with pytest.raises(ExampleError, match="rows:1"):
        dataset([FIRST], with_template(turns("{{ m['content'] | upper }}")))
    for hidden, reason in ((None, "none"), (turns(""), "user turn"), ("{% for m in messages %}{{ m }}", "endfor")):
        with pytest.raises(UsageError, match=f"template.*{reason}"):
            with_template(hidden)


def test_token_that_joins_view_and_template_text_is_refused():
    e = with_template(turns(":a{{ m['content'] }}"))
    joined = dataclasses.replace(FIRST, system=None, user="q", assistant="nd more")
    assert e.renderer.tokenizer.tokenize("a" + joined.assistant)[0] != "a", "choose a text that the tokenizer joins"
    assert isinstance(e.views([joined])[0][1], ValueError) and not isinstance(e.chats([joined])[0], ValueError)
