"""Chats, views, label scopes and view tokens for every chat template."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from templates import END_OF_TURN, FOLDERS, dataset, encoder, tokenizer

from llm_jepa.cli import UsageError
from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder, end_of_turn
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


def decode(e: Encoder, ids: np.ndarray) -> str:
    return e.renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def with_template(template: str, **flags) -> Encoder:
    """An encoder of the chatml tokenizer with another template."""
    other = copy.deepcopy(tokenizer("chatml"))
    other.chat_template = template
    return Encoder(Renderer(other), **flags)


def turns(content: str) -> str:
    """A template whose turns have this content."""
    return "{% for m in messages %}<|im_start|>{{ m['role'] }}" + content + "<|im_end|>\n{% endfor %}"


def prompt_length(chat) -> int:
    return int(np.flatnonzero(chat.labels)[0])


@pytest.mark.parametrize("name", ALL)
def test_labels_are_answer_and_end_of_turn_token_and_no_prompt_token(name):
    e = encoder(name)
    for example, chat in zip(EXAMPLES, e.chats(EXAMPLES), strict=True):
        rendered, label_ids, first = e.renderer.chat(example), chat.ids[chat.labels], prompt_length(chat)
        assert decode(e, label_ids[-1:]) == END_OF_TURN[name]
        assert decode(e, label_ids[:-1]).strip() == example.assistant.strip()
        assert np.flatnonzero(chat.labels).tolist() == list(range(first, first + len(label_ids)))
        assert decode(e, chat.ids[:first]).rstrip() == rendered.text[: rendered.start].rstrip()
        assert end_of_turn(e.renderer) == label_ids[-1]


def test_end_of_turn_is_found_after_a_long_preamble():
    template = tokenizer("chatml").chat_template
    long = with_template("{{ 'word ' * 3000 }}" + template)
    assert end_of_turn(long.renderer) == end_of_turn(with_template(template).renderer) is not None


@pytest.mark.parametrize("name", ALL)
def test_answer_text_excludes_end_of_turn_token(name):
    without = encoder(name, lm_labels="answer_text").chats(EXAMPLES)
    for a, b in zip(encoder(name).chats(EXAMPLES), without, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert np.flatnonzero(a.labels)[:-1].tolist() == np.flatnonzero(b.labels).tolist()


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


@pytest.mark.parametrize("name", ALL)
def test_prompt_equals_chat_up_to_answer(name):
    e = encoder(name)
    for example, chat in zip(EXAMPLES, e.chats(EXAMPLES), strict=True):
        prompt = e.renderer.prompt(example)
        ids = e.renderer.tokenizer(prompt, add_special_tokens=False).input_ids
        assert chat.ids[: prompt_length(chat)].tolist() == ids
        if example.system is None:
            assert prompt == e.renderer.tokenizer.apply_chat_template(
                [{"role": "user", "content": example.user}], tokenize=False, add_generation_prompt=True,
                enable_thinking=False, date_string="26 Jul 2024",
            )  # fmt: skip


def test_last_token_outside_the_view_is_refused():
    assert all(isinstance(x, ValueError) for x in encoder("llama3", last_token=-99).views([FIRST])[0])


def test_system_text_precedes_user_text_if_template_refuses_or_drops_it():
    dropping = with_template("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}")
    for renderer in (encoder("google_gemma").renderer, encoder("mistral_nemo").renderer, dropping.renderer):
        assert not renderer.system_turn
        assert "Answer Good or Bad.\n\nIs it" in renderer.chat(FIRST).text


def test_dates_are_pinned():
    e = with_template("{{ strftime_now('%Y-%m-%d') }} {{ date_string }}" + turns("{{ m['content'] }}"))
    assert e.renderer.chat(FIRST).text.startswith("2024-07-26 26 Jul 2024")


def test_templates_that_cannot_be_used_are_refused():
    no_end = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    assert isinstance(with_template(no_end).chats([FIRST])[0], ValueError)
    chat = with_template(no_end, lm_labels="answer_text").chats([FIRST])[0]
    assert decode(encoder("chatml"), chat.ids[chat.labels]).strip() == "Good"
    with pytest.raises(ExampleError, match="rows:1"):
        dataset([FIRST], with_template(turns("{{ m['content'] | upper }}")))
    for hidden in (None, turns("")):
        with pytest.raises(UsageError, match="template"):
            with_template(hidden)


def test_token_that_joins_answer_and_template_text_is_refused():
    e = with_template(turns(":a{{ m['content'] }}"))
    joined = dataclasses.replace(FIRST, system=None, user="q", assistant="nd more")
    assert e.renderer.tokenizer.tokenize("a" + joined.assistant)[0] != "a", "choose a text that the tokenizer joins"
    assert isinstance(e.chats([joined])[0], ValueError)


def test_space_of_template_before_answer_is_label_not_prompt():
    """Tokenizers join the space with the answer, so a prompt that ends with it would not occur in training."""
    e = with_template(turns(": {{ m['content'] }}"))
    for answer in ("the word", "(a|b)", "7"):
        example = Example(None, "q", answer, "rows:1", 1)
        chat = e.chats([example])[0]
        prompt = e.renderer.tokenizer(e.renderer.prompt(example), add_special_tokens=False).input_ids
        assert chat.ids[: prompt_length(chat)].tolist() == prompt
        assert decode(e, chat.ids[chat.labels]) == f" {answer}<|im_end|>"


def test_plain_chat_ends_with_end_of_turn_label_and_train_all_labels_every_token():
    plain = encoder("llama3", plain=True)
    chat = plain.chats([FIRST])[0]
    assert decode(plain, chat.ids) == "Is it Good or Bad: a Good film<|perception|>Good<|eot_id|>"
    assert decode(plain, chat.ids[chat.labels]) == "Good<|eot_id|>"
    assert encoder("llama3", plain=True, train_all=True, lm_labels="all").chats([FIRST])[0].labels.all()


def test_example_longer_than_max_length_is_an_error_or_skipped():
    long = dataclasses.replace(FIRST, assistant="Good " * 200, source="rows:7")
    e = encoder("llama3", max_length=100)
    with pytest.raises(ExampleError, match="rows:7: .*--max_length 100"):
        dataset([FIRST, long], e)
    problems = Problems(skip=True)
    assert len(SegmentDataset([FIRST, long], e, problems, Draws(0))) == 1
    assert list(problems.found) == ["rows:7"]
