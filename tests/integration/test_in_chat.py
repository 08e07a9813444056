"""--text_view in_chat: the Text view is read in the chat, which it leaves as it is."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from conftest import GOLDEN, MODELS, call, dry_run, message_row, weights, write_rows

import finetune
from llm_jepa.data import batching, rendering
from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.data.rendering import Renderer
from llm_jepa.evaluation import embeddings
from llm_jepa.model import load_model, load_tokenizer

ROWS = str(GOLDEN / "regex_rows.jsonl")
EXAMPLES = read_examples(ROWS, Problems())[:6]


@cache
def loaded(name: str):
    """(model, HeadInput, tokenizer)"""
    s = finetune.Settings(model_name=str(GOLDEN / "models" / name))
    tokenizer = load_tokenizer(s)
    model = load_model(s, tokenizer).eval()
    return model, finetune.HeadInput(model), tokenizer


def dataset(name: str, k: int, **flags: object) -> batching.SegmentDataset:
    s = finetune.Settings(
        model_name=str(GOLDEN / "models" / name), lm_labels="answer", predictors=k, text_view="in_chat", **flags
    )
    return batching.SegmentDataset(EXAMPLES, Renderer(loaded(name)[2], s), Problems(), dropout=True)


@torch.no_grad()
def read(name: str, items: list, layout: str = "packed") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the labels (N, V), views (2, P, D)."""
    model, head, tokenizer = loaded(name)
    return head.read(model, finetune.Collator(layout, tokenizer.pad_token_id, 256)(items))


@pytest.mark.parametrize("layout", sorted(finetune.LAYOUTS))
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_chat_is_as_without_a_view_and_the_view_as_without_the_answer(name, k, layout):
    items = dataset(name, k).items
    logits, (text, _) = read(name, items, layout)
    plain, _ = read(name, [batching.without_views(item) for item in items], "separate")
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    # The view as a row of its own: what stands in front of it in the chat, and the predictor tokens.
    alone = [item[0].text_view for item in items]
    model = loaded(name)[0]
    with torch.no_grad():
        states = [
            model(torch.tensor(v.ids)[None], output_hidden_states=True).hidden_states[-1][0, v.view] for v in alone
        ]
    torch.testing.assert_close(text, torch.stack(states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_view_ends_with_the_user_turn_s_text_or_the_predictors(name, k):
    tokenizer = loaded(name)[2]
    for example, (chat, code) in zip(EXAMPLES, dataset(name, k).items, strict=True):
        text = tokenizer.decode(chat.text_view.ids)
        predictors = "".join(rendering.predictor_token(i) for i in range(k, 0, -1))
        assert text.endswith(example.user + predictors) and example.assistant not in text
        assert chat.branch == k and code.kind == "code_view"
        assert tokenizer.decode(chat.without_view.ids).count("<|predictor_") == 0


@pytest.mark.parametrize("k", [0, 2])
def test_layouts_agree_and_only_the_code_view_and_the_predictors_cost_tokens(k):
    flags = ("--train_file", ROWS, "--model_name", GOLDEN / "models" / "chatml", "--lbd", 1, "--dry_run", 5)
    flags += ("--predictors", k) if k else ()
    alone = dry_run(*flags)
    got = {layout: dry_run(*flags, "--text_view", "in_chat", "--layout", layout) for layout in finetune.LAYOUTS}
    packed = got["packed"]
    for other in got.values():
        assert other["lm_loss"] == pytest.approx(alone["lm_loss"], abs=1e-5)
        for key in ("jepa_loss", "total_loss", "grad_norm"):
            assert other[key] == pytest.approx(packed[key], rel=1e-4), key
        assert other["tokens"]["text_view"] == 5 * k and other["pairs"] == 5
        assert other["tokens"]["chat"] == alone["tokens"]["chat"]
        assert other["tokens"]["code_view"] == alone["tokens"]["code_view"]
    assert abs(packed["jepa_loss"] - alone["jepa_loss"]) > 1e-4, "it is another view: it sees the system turn"
    assert packed["first_row"]["text_view"].startswith(packed["first_row"]["chat"][:20])


def test_dropped_pairs_have_neither_view_nor_predictors():
    data = dataset("llama3", 2, jepa_ratio=0.5, finetune_seed=3)
    drawn = data[0, range(len(data))]
    kept = [len(item) == 2 for item in drawn]
    assert {True, False} == set(kept)
    for item, keep, whole in zip(drawn, kept, data.items, strict=True):
        assert (item[0].view is not None) == keep and (item[0].branch == 2) == keep
        assert len(item[0].ids) == len(whole[0].ids) - (0 if keep else 2)


def test_embeddings_of_a_run_are_what_training_read():
    data = dataset("llama3", 2)
    text, code = embeddings.embed(loaded("llama3")[0], Renderer(loaded("llama3")[2], data.s), EXAMPLES, batch_size=4)
    _, views = read("llama3", data.items)
    torch.testing.assert_close(torch.stack([text, code]), views, rtol=1e-5, atol=1e-5)


def test_it_trains_and_evaluates_from_the_command_line(tmp_path):
    run = tmp_path / "run"
    flags = ["--train_file", ROWS, "--model_name", GOLDEN / "models" / "llama3", "--max_steps", 2, "--batch_size", 2]
    flags += ["--predictors", 2, "--lbd", 1]
    done = call("finetune", *flags, "--text_view", "in_chat", "--output_dir", run)
    assert done.code == 0, done.err
    assert call("finetune", *flags, "--output_dir", tmp_path / "alone").code == 0
    ours, alone = weights(run), weights(tmp_path / "alone")
    assert any(not torch.equal(ours[key], alone[key]) for key in ours)
    done = call("evaluate", "--model_name", run, "--input_file", ROWS, "--similarity")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--regular"], "--text_view: not with --regular"),
        (["--predictors", 1, "--front_pred"], "--front_pred: not with --text_view in_chat"),
        (["--predictors", 1, "--reverse_pred"], "--reverse_pred: not with --text_view in_chat"),
        (["--last_token", -1], "--last_token: not with --text_view in_chat"),
        (["--plain", "--train_all"], "--text_view in_chat: not with --plain --train_all"),
        (["--predictors", 1, "--attn_implementation", "flash_attention_2"], "need a mask of their own"),
    ],
)
def test_what_does_not_apply_is_refused(flags, named, tmp_path):
    base = ["--train_file", ROWS, "--model_name", GOLDEN / "models" / "llama3", "--output_dir", tmp_path / "run"]
    done = call("finetune", *base, "--text_view", "in_chat", *flags)
    assert done.code == 2 and named in done.err and not (tmp_path / "run").exists()


def test_a_text_view_of_its_own_is_refused_by_line(tmp_path):
    row = message_row("which?", "A") | {"text": [{"role": "user", "content": "the context"}]}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    base = ["--train_file", data, "--model_name", GOLDEN / "models" / "llama3", "--dry_run", 1]
    done = call("finetune", *base, "--text_view", "in_chat")
    assert done.code == 2 and "rows.jsonl:1: its Text view is no part of the chat" in done.err


def test_plain_chats_have_it_too():
    data = dataset("llama3", 1, plain=True)
    tokenizer = load_tokenizer(dataclasses.replace(data.s))
    chat = data.items[0][0]
    assert tokenizer.decode(chat.text_view.ids).endswith(EXAMPLES[0].user + "<|predictor_1|>")
