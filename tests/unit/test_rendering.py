"""Chats, views, label scopes and view tokens, for every kind of chat template."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, MODELS, ROOT

import finetune
from llm_jepa.data import batching, rendering, segments
from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.model import load_tokenizer

REAL = ROOT.parent / "shared" / "tokenizers"
REAL_NAMES = ("deepseek_v3", "gemma3", "llama3_2", "mistral_nemo", "qwen3")
END_OF_TURN = {
    "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "google_gemma": "<end_of_turn>", "tiny": "<|eot_id|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>", "gemma3": "<end_of_turn>", "llama3_2": "<|eot_id|>",
    "mistral_nemo": "</s>", "qwen3": "<|im_end|>",
}  # fmt: skip
ALL = (*MODELS, "tiny", *REAL_NAMES)
EXAMPLES = [
    Example("Answer Good or Bad.", "Is it Good or Bad: a Good film", "Good", "rows:1", 1),
    Example("Answer Good or Bad.", "naïve, café — 你好 🙂", "Bad ☃ naïve", "rows:2", 2),
    Example("Convert.", "  spaces around  ", "  SELECT  a\nFROM b;  ", "rows:3", 3),
    Example(None, "no system turn", "ok", "rows:4", 4),
    Example("System.", "assistant\n\nuser", "x", "rows:5", 5),
]


def folder(name: str) -> Path:
    if name in MODELS:
        return GOLDEN / "models" / name
    return ROOT / "models" / "tiny" if name == "tiny" else REAL / name


@cache
def tokenizer(name: str):
    if not folder(name).exists():
        pytest.skip(f"the tokenizer {name} is not at hand")
    return load_tokenizer(finetune.Settings(model_name=str(folder(name))))


def renderer(name: str, **settings) -> rendering.Renderer:
    s = finetune.Settings(model_name=str(folder(name)), **({"lm_labels": "answer"} | settings))
    return rendering.Renderer(tokenizer(name), s)


def decode(r: rendering.Renderer, ids) -> str:
    return r.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ALL)
def test_labels_are_the_answer_and_its_end_of_turn_token(name):
    r = renderer(name)
    for example, chat in zip(EXAMPLES, segments.encode_chats(r, EXAMPLES), strict=True):
        text, label_ids = r.chat(example).text, chat.ids[chat.labels]
        assert decode(r, label_ids[-1:]) == END_OF_TURN[name]
        assert decode(r, label_ids[:-1]).strip() == example.assistant.strip()
        # Labels are one run behind the prompt, and no prompt token is among them.
        first = int(np.flatnonzero(chat.labels)[0])
        assert np.flatnonzero(chat.labels).tolist() == list(range(first, first + len(label_ids)))
        assert decode(r, chat.ids[:first]).rstrip() == text[: r.chat(example).start].rstrip()
        assert segments.end_of_turn(r) == label_ids[-1]


@pytest.mark.parametrize("name", ALL)
def test_answer_text_leaves_the_end_of_turn_token_out(name):
    with_end = segments.encode_chats(renderer(name), EXAMPLES)
    without = segments.encode_chats(renderer(name, lm_labels="answer_text"), EXAMPLES)
    for a, b in zip(with_end, without, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert np.flatnonzero(a.labels)[:-1].tolist() == np.flatnonzero(b.labels).tolist()


def test_scope_all_is_every_token_and_reference_all_but_the_pad_id():
    chats = segments.encode_chats(renderer("llama3", lm_labels="all"), EXAMPLES)
    assert all(c.labels.all() for c in chats)
    chats = segments.encode_chats(renderer("llama3", lm_labels="reference"), EXAMPLES)
    pad = tokenizer("llama3").pad_token_id  # the end-of-turn token: the published protocol never learns to stop
    assert all((c.labels == (c.ids != pad)).all() and not c.labels.all() for c in chats)


@pytest.mark.parametrize("name", ALL)
def test_system_text_stands_in_the_chat_and_in_no_view(name):
    r = renderer(name, predictors=1)
    for example in EXAMPLES[:3]:
        assert example.system in r.chat(example).text
        assert all(example.system not in view.text for view in r.views(example))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_views_are_read_at_the_last_content_or_predictor_token(name, k):
    r = renderer(name, predictors=k)
    predictors = [f"<|predictor_{i}|>" for i in range(k, 0, -1)]
    for example, (text, code) in zip(EXAMPLES, segments.encode_views(r, EXAMPLES), strict=True):
        if k:
            assert r.tokenizer.convert_ids_to_tokens(text.ids[: text.view + 1])[-k:] == predictors
        for segment, content in ((text, example.user), (code, example.assistant)):
            read = segment.view - k if segment is text else segment.view
            assert decode(r, segment.ids[: read + 1]).strip().endswith(content.strip())
            if content == content.strip():
                assert not decode(r, segment.ids[:read]).endswith(content)


@pytest.mark.parametrize("name", ALL)
def test_prompt_is_the_chat_up_to_the_answer_token_by_token(name):
    r = renderer(name)
    for example, chat in zip(EXAMPLES, segments.encode_chats(r, EXAMPLES), strict=True):
        prompt = r.tokenizer(r.prompt(example), add_special_tokens=False).input_ids
        first = int(np.flatnonzero(chat.labels)[0])
        assert chat.ids[:first].tolist() == prompt
        turns = [{"role": "user", "content": example.user}]
        if example.system is None:
            generation = r.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024"
            )
            assert r.prompt(example) == generation


@pytest.mark.parametrize("name", ALL)
def test_one_bos_token_at_most(name):
    r = renderer(name)
    bos = r.tokenizer.bos_token_id
    for chat in segments.encode_chats(r, EXAMPLES):
        assert bos is None or bos in special_only(name) or (chat.ids == bos).sum() <= 1


def special_only(name: str) -> set[int]:
    """Models whose beginning and end token are one (none here): a bos may then stand at the end as well."""
    return {tokenizer(name).bos_token_id} & {tokenizer(name).eos_token_id}


@pytest.mark.parametrize("name", ["llama3", "google_gemma", "chatml"])
def test_reverse_and_front_predictors(name):
    text, code = renderer(name, predictors=2, reverse_pred=True).views(EXAMPLES[0])
    assert "Good<|predictor_2|><|predictor_1|>" in text.text and "film" in code.text
    text, code = renderer(name, predictors=2, front_pred=True).views(EXAMPLES[0])
    assert "<|predictor_1|><|predictor_2|>Is it" in text.text and "predictor" not in code.text
    first, _ = segments.encode_views(renderer(name, predictors=2, front_pred=True), EXAMPLES[:1])[0]
    assert decode(renderer(name), first.ids[: first.view + 1]).endswith("a Good film")


def test_explicit_last_token_wins():
    text, code = segments.encode_views(renderer("llama3", last_token=-1), EXAMPLES[:1])[0]
    assert text.view == len(text.ids) - 1 and code.view == len(code.ids) - 1
    bad = segments.encode_views(renderer("llama3", last_token=-99), EXAMPLES[:1])[0]
    assert all(isinstance(x, ValueError) and "-99" in str(x) for x in bad)


def test_a_template_that_refuses_or_drops_the_system_turn_gets_it_in_front_of_the_user_text():
    assert "<start_of_turn>user\nAnswer Good or Bad.\n\nIs it" in renderer("google_gemma").chat(EXAMPLES[0]).text
    dropping = renderer("chatml")
    dropping.tokenizer = dataclasses.replace(_Stub(dropping.tokenizer)).tokenizer
    r = rendering.Renderer(dropping.tokenizer, dropping.s)
    assert not r.system_turn
    assert "Answer Good or Bad.\n\nIs it" in r.chat(EXAMPLES[0]).text


@dataclasses.dataclass
class _Stub:
    """A chatml tokenizer whose template shows no system turn."""

    source: object

    def __post_init__(self):
        import copy

        self.tokenizer = copy.deepcopy(self.source)
        self.tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
            "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        )


def with_template(template: str, **settings) -> rendering.Renderer:
    stub = _Stub(tokenizer("chatml"))
    stub.tokenizer.chat_template = template
    s = finetune.Settings(model_name="stub", **({"lm_labels": "answer"} | settings))
    return rendering.Renderer(stub.tokenizer, s)


def test_dates_are_pinned_whatever_the_template_asks():
    r = with_template(
        "{{ strftime_now('%Y-%m-%d') }} {{ date_string }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    assert r.chat(EXAMPLES[0]).text.startswith("2024-07-26 26 Jul 2024")


def test_a_template_without_an_end_of_turn_token_is_refused_for_answers_only():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    chat = segments.encode_chats(with_template(template), EXAMPLES[:1])[0]
    assert isinstance(chat, ValueError) and "learn to stop" in str(chat)
    chat = segments.encode_chats(with_template(template, lm_labels="answer_text"), EXAMPLES[:1])[0]
    assert decode(renderer("chatml"), chat.ids[chat.labels]).strip() == "Good"


def test_content_that_the_template_changes_cannot_be_located():
    r = with_template("{% for m in messages %}<|im_start|>{{ m['content'] | upper }}<|im_end|>{% endfor %}")
    with pytest.raises(ExampleError, match=r"rows:1: the content cannot be located"):
        batching.SegmentDataset(EXAMPLES[:1], r, Problems())


def test_a_token_that_joins_answer_and_template_is_refused():
    r = with_template("{% for m in messages %}<|im_start|>{{ m['role'] }}:a{{ m['content'] }}<|im_end|>{% endfor %}")
    joined = Example(None, "q", "nd more", "rows:9", 9)
    tokens = r.tokenizer.tokenize("a" + joined.assistant)
    assert tokens[0] not in ("a",), "the tokenizer no longer joins the two; choose another text"
    chat = segments.encode_chats(r, [joined])[0]
    assert isinstance(chat, ValueError) and "joins" in str(chat)


def test_plain_format():
    r = renderer("llama3", plain=True)
    assert r.chat(EXAMPLES[0]).text == "Is it Good or Bad: a Good film<|perception|>Good<|eot_id|>"
    chat = segments.encode_chats(r, EXAMPLES[:1])[0]
    assert decode(r, chat.ids[chat.labels]) == "Good<|eot_id|>"
    assert [v.text for v in r.views(EXAMPLES[0])] == ["Is it Good or Bad: a Good film", "Good"]
    both = renderer("llama3", plain=True, train_all=True, lm_labels="all")
    assert both.chat(EXAMPLES[0]).text == "Is it Good or Bad: a Good film<|eot_id|>"
    assert segments.encode_chats(both, EXAMPLES[:1])[0].labels.all()


def test_an_example_over_max_length_is_named_or_skipped_and_counted():
    long = dataclasses.replace(EXAMPLES[0], assistant="Good " * 200, source="rows:7")
    r = renderer("llama3", max_length=100)
    with pytest.raises(ExampleError, match=r"rows:7: the chat has \d+ tokens, over --max_length 100"):
        batching.SegmentDataset([EXAMPLES[0], long], r, Problems())
    problems = Problems(skip=True)
    assert len(batching.SegmentDataset([EXAMPLES[0], long], r, problems)) == 1
    assert "skipped 1 bad examples" in problems.report()


def test_a_template_s_space_before_the_answer_is_no_part_of_the_prompt():
    """Tokenizers join the space with the answer: a prompt that ended with it would be one that training never saw."""
    r = with_template("{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}")
    for answer in ("the word", "(a|b)", "7"):
        example = Example(None, "q", answer, "rows:1", 1)
        chat = segments.encode_chats(r, [example])[0]
        prompt = r.tokenizer(r.prompt(example), add_special_tokens=False).input_ids
        assert chat.ids[: int(np.flatnonzero(chat.labels)[0])].tolist() == prompt
        assert decode(r, chat.ids[chat.labels]) == f" {answer}<|im_end|>"


@pytest.mark.parametrize("name", REAL_NAMES)
@pytest.mark.parametrize("plain", [False, True])
def test_real_tokenizers_score_the_same_packed_and_separate_with_a_small_model(name, plain):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    r = renderer(name, predictors=2, plain=plain)
    if plain:
        r.tokenizer = load_tokenizer(r.s)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(r.tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1)
    ).eval()  # fmt: skip
    head = finetune.HeadInput(model)
    items = batching.SegmentDataset(EXAMPLES, r, Problems()).items
    found = []
    for layout in ("packed", "separate", "additive"):
        with torch.no_grad():
            batch = finetune.Collator(layout, r.tokenizer.pad_token_id, 128)(items)
            logits, (text, code) = head.read(model, batch)
        found.append((finetune.lm_loss(logits, batch["label_ids"])[0].item(), finetune.jepa_loss(text, code)[0].item()))
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 2
    assert found[0][1] > 0
