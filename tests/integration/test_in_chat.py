"""--text_view in_chat: the Text view is read in the chat and changes nothing else in it."""

import pytest
import torch
from conftest import GOLDEN, MODELS, dry_run
from templates import encoder, model, tokenizer

from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.data.rendering import predictor_token
from llm_jepa.forward import States
from llm_jepa.layouts import LAYOUTS, Collator

DATA = str(GOLDEN / "regex_rows.jsonl")
EXAMPLES = read_examples(DATA, Problems())[:6]


@torch.no_grad()
def read(name: str, items: list, layout: str = "packed") -> States:
    network, selector = model(name)
    return selector.read(network, Collator(layout, tokenizer(name).pad_token_id, 256)(items))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_chat_is_as_without_view_and_view_is_as_without_answer(name, k, layout):
    items = encoder(name, predictors=k, text_view="in_chat")(EXAMPLES)
    states = read(name, items, layout)
    chats = read(name, [(item[0].without_view,) for item in items], "separate")
    torch.testing.assert_close(states.logits, chats.logits, rtol=1e-5, atol=1e-5)
    # The view in a row of its own: the chat up to the end of the user text, and the predictor tokens.
    network, expected = model(name)[0], []
    for view in (item[0].text_view for item in items):
        with torch.no_grad():
            out = network(torch.tensor(view.ids)[None], output_hidden_states=True)
        expected.append(out.hidden_states[-1][0, view.view])
    torch.testing.assert_close(states.views[0], torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_view_ends_with_the_user_text_or_the_predictors(name, k, plain):
    decode = tokenizer(name, plain).decode
    items = encoder(name, plain=plain, predictors=k, text_view="in_chat")(EXAMPLES)
    for example, (chat, code) in zip(EXAMPLES, items, strict=True):
        text = decode(chat.text_view.ids)
        assert text.endswith(example.user + "".join(predictor_token(i) for i in range(k, 0, -1)))
        assert example.assistant not in text and (chat.branch, code.kind) == (k, "code_view")
        assert "<|predictor_" not in decode(chat.without_view.ids)


@pytest.mark.parametrize("k", [0, 2])
def test_only_code_view_and_predictors_cost_tokens(k):
    flags = ("--train_file", DATA, "--model_name", GOLDEN / "models" / "chatml", "--lbd", 1, "--dry_run", 5)
    flags += ("--predictors", k) if k else ()
    alone, in_chat = dry_run(*flags), dry_run(*flags, "--text_view", "in_chat")
    assert in_chat["tokens"]["text_view"] == 5 * k and in_chat["pairs"] == 5
    assert all(in_chat["tokens"][kind] == alone["tokens"][kind] for kind in ("chat", "code_view"))
    assert abs(in_chat["jepa_loss"] - alone["jepa_loss"]) > 1e-4, "this view also attends to the system turn"
