"""--text_view in_chat: the Text view is read in the chat and changes nothing else in it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conftest import GOLDEN, MODELS, call, dry_run, message_row, write_rows

import evaluate
from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.data.rendering import Renderer, predictor_token
from llm_jepa.data.segments import Encoder
from llm_jepa.data.spans import Draws
from llm_jepa.evaluation import embeddings
from llm_jepa.forward import LMHeadSelector, States
from llm_jepa.layouts import LAYOUTS, Collator
from llm_jepa.model import load_model, load_tokenizer

DATA = str(GOLDEN / "regex_rows.jsonl")
EXAMPLES = read_examples(DATA, Problems())[:6]


@cache
def loaded(name: str) -> tuple:
    """(model, LMHeadSelector, tokenizer)"""
    path = str(GOLDEN / "models" / name)
    tokenizer = load_tokenizer(path)
    model = load_model(path, None, tokenizer).eval()
    return model, LMHeadSelector(model), tokenizer


def encoder(name: str, k: int) -> Encoder:
    return Encoder(Renderer(loaded(name)[2], predictors=k), text_view="in_chat")


@torch.no_grad()
def read(name: str, items: list, layout: str = "packed") -> States:
    model, selector, tokenizer = loaded(name)
    return selector.read(model, Collator(layout, tokenizer.pad_token_id, 256)(items))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_chat_is_as_without_view_and_view_is_as_without_answer(name, k, layout):
    items = encoder(name, k)(EXAMPLES)
    states = read(name, items, layout)
    chats = read(name, [(item[0].without_view,) for item in items], "separate")
    torch.testing.assert_close(states.logits, chats.logits, rtol=1e-5, atol=1e-5)
    # The view in a row of its own: the chat up to the end of the user text, and the predictor tokens.
    model, expected = loaded(name)[0], []
    for view in (item[0].text_view for item in items):
        with torch.no_grad():
            out = model(torch.tensor(view.ids)[None], output_hidden_states=True)
        expected.append(out.hidden_states[-1][0, view.view])
    torch.testing.assert_close(states.views[0], torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_view_ends_with_the_user_text_or_the_predictors(name, k, plain):
    tokenizer = load_tokenizer(str(GOLDEN / "models" / name), plain=plain)
    items = Encoder(Renderer(tokenizer, plain, predictors=k), text_view="in_chat")(EXAMPLES)
    for example, (chat, code) in zip(EXAMPLES, items, strict=True):
        text = tokenizer.decode(chat.text_view.ids)
        assert text.endswith(example.user + "".join(predictor_token(i) for i in range(k, 0, -1)))
        assert example.assistant not in text and (chat.branch, code.kind) == (k, "code_view")
        assert "<|predictor_" not in tokenizer.decode(chat.without_view.ids)


@pytest.mark.parametrize("k", [0, 2])
def test_layouts_agree_and_only_code_view_and_predictors_cost_tokens(k):
    flags = ("--train_file", DATA, "--model_name", GOLDEN / "models" / "chatml", "--lbd", 1, "--dry_run", 5)
    flags += ("--predictors", k) if k else ()
    alone = dry_run(*flags)
    in_chat = {layout: dry_run(*flags, "--text_view", "in_chat", "--layout", layout) for layout in LAYOUTS}
    packed = in_chat["packed"]
    for got in in_chat.values():
        assert got["lm_loss"] == pytest.approx(alone["lm_loss"], abs=1e-5)
        for key in ("jepa_loss", "total_loss", "grad_norm"):
            assert got[key] == pytest.approx(packed[key], rel=1e-4), key
        assert got["tokens"]["text_view"] == 5 * k and got["pairs"] == 5
        assert all(got["tokens"][kind] == alone["tokens"][kind] for kind in ("chat", "code_view"))
    assert abs(packed["jepa_loss"] - alone["jepa_loss"]) > 1e-4, "this view also attends to the system turn"
    assert packed["first_row"]["text_view"].startswith(packed["first_row"]["chat"][:20])


def test_dropped_pairs_have_neither_view_nor_predictors():
    data = SegmentDataset(EXAMPLES, encoder("llama3", 2), Problems(), Draws(seed=3, jepa_ratio=0.5))
    drawn = data[0, range(len(data))]
    assert {len(item) for item in drawn} == {1, 2}
    for item, full in zip(drawn, data.items, strict=True):
        keep = len(item) == 2
        assert (item[0].view is not None) == (item[0].branch == 2) == keep
        assert len(item[0].ids) == len(full[0].ids) - (0 if keep else 2)


def test_embeddings_are_the_views_that_training_reads():
    model, _, tokenizer = loaded("llama3")
    with evaluate.layer_states(model, tokenizer.pad_token_id, -1) as states:
        views = embeddings.encode_views(model, encoder("llama3", 2), EXAMPLES, Problems())[1]
        text, code = embeddings.embed(views, states, batch_size=4)
    views = read("llama3", encoder("llama3", 2)(EXAMPLES)).views
    torch.testing.assert_close(torch.stack([text, code]), views, rtol=1e-5, atol=1e-5)


def test_example_with_a_text_view_of_its_own_is_refused_by_line(tmp_path):
    row = message_row("which?", "A") | {"text": [{"role": "user", "content": "the context"}]}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    flags = ("--train_file", data, "--model_name", GOLDEN / "models" / "llama3", "--dry_run", 1)
    done = call("finetune", *flags, "--text_view", "in_chat")
    assert done.code == 2 and f"{data}:1: " in done.err and "--text_view in_chat" in done.err
