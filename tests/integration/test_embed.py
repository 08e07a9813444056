"""Embeddings of views are what training reads, for any model, template, batch and order; and evaluate.py's files."""

import contextlib
import copy
import dataclasses
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, MODEL, MODELS, ROOT, call, message_row, train, write_rows
from safetensors import safe_open

import evaluate
import finetune
from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, ExampleError, Problems, read_examples
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder
from llm_jepa.evaluation import embeddings
from llm_jepa.model import load_model, load_tokenizer

TINY = "tiny"
WORDS = (
    "a vowel",
    "x",
    "lines with the word dog 3 times or more, " * 5,
    "naïve 你好 🙂",
    "  spaces  ",
    "two\nlines",
    "a",
)
EXAMPLES = [Example("Write it.", user, f"(.*{user[::-1]}.*)" * (1 + i % 3), f"data:{i}", i)
            for i, user in enumerate(WORDS, start=1)]  # fmt: skip
PLACES = {
    "k=0": {},
    "front_pred": {"predictors": 2, "front_pred": True},
    "plain-last_token": {"predictors": 2, "plain": True, "last_token": -1},
    "in_chat": {"predictors": 2, "text_view": "in_chat"},
}


@cache
def loaded(name: str):
    """(model, tokenizer); tiny has random parameters."""
    folder = str(ROOT / "models" / "tiny" if name == TINY else GOLDEN / "models" / name)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(folder, plain=True)
    return load_model(folder, None, tokenizer, pretrain=name == TINY).eval(), tokenizer


def encoder_of(name: object, last_token: int | None = None, text_view: str = "alone", **flags: object) -> Encoder:
    """The encoder of a loaded model, by its name, or of a tokenizer."""
    renderer = Renderer(loaded(name)[1] if isinstance(name, str) else name, **flags)
    return Encoder(renderer, max_length=sys.maxsize, last_token=last_token, text_view=text_view)


def embed(model, encoder: Encoder, examples: list, batch_size: int, layer: int = -1, pooling: str = "last", **more):
    """As evaluate.py embeds."""
    views = embeddings.encode_views(model, encoder, examples, Problems())[1]
    with evaluate.layer_states(model, encoder.renderer.tokenizer.pad_token_id, layer) as read:
        return embeddings.embed(views, read, batch_size, pooling=pooling, **more)


@torch.no_grad()
def training_reads(model, encoder: Encoder, layout: str = "separate") -> torch.Tensor:
    """The views (2, P, D) that the JEPA loss gets."""
    batch = finetune.Collator(layout, encoder.renderer.tokenizer.pad_token_id, 256)(encoder(EXAMPLES))
    with contextlib.closing(finetune.LMHeadSelector(model)) as selector:
        return selector.read(model, batch).views


def close(some, others, tolerance: float = 1e-5) -> None:
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("name", [*MODELS, TINY])
def test_last_layer_at_the_view_token_is_what_training_reads(name, place):
    (model, _), encoder = loaded(name), encoder_of(name, **PLACES[place])
    views = embed(model, encoder, EXAMPLES, batch_size=4)
    close(views, training_reads(model, encoder))
    if place != "in_chat":
        close(views, training_reads(model, encoder, "packed"))
    assert not torch.allclose(views[0], views[1], atol=1e-2)


def test_reverse_pred_keeps_text_and_code_apart():
    model, encoder = loaded(TINY)[0], encoder_of(TINY, predictors=2, reverse_pred=True)
    text, code = embed(model, encoder, EXAMPLES, batch_size=4)
    close((code, text), training_reads(model, encoder))
    plain = embed(model, encoder_of(TINY), EXAMPLES, batch_size=4)
    close((text,), plain[:1])  # the user turn has no predictors here
    assert not torch.allclose(code, plain[1], atol=1e-2)


@pytest.mark.parametrize("pooling", embeddings.POOLINGS)
@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_layers_and_poolings_equal_those_of_a_view_without_batch(layer, pooling):
    pool = {"last": lambda h, at: h[at], "mean": lambda h, at: h.mean(dim=0), "cls": lambda h, at: h[0]}[pooling]
    model, encoder = loaded(TINY)[0], encoder_of(TINY, predictors=1)

    @torch.no_grad()
    def unbatched(view) -> torch.Tensor:
        states = model(torch.tensor(view.ids)[None], output_hidden_states=True).hidden_states
        return pool(states[layer][0], view.view)

    want = [torch.stack([unbatched(view) for view in side]) for side in zip(*encoder.views(EXAMPLES), strict=True)]
    close(embed(model, encoder, EXAMPLES, 3, layer, pooling), want)
    for sizes in ({"batch_size": 1}, {"batch_size": 100}, {"batch_size": 64, "tokens_per_batch": 200}):
        close(embed(model, encoder, EXAMPLES, layer=layer, pooling=pooling, **sizes), want)
    turned = embed(model, encoder, EXAMPLES[::-1], 3, layer, pooling)
    close([side.flip(0) for side in turned], want)


def test_views_of_their_own_replace_the_turns():
    model, encoder = loaded(TINY)[0], encoder_of(TINY)
    turns = [dataclasses.replace(e, user=f"Which? {e.user}", assistant="B") for e in EXAMPLES]
    own = [dataclasses.replace(t, text=e.user, code=e.assistant) for t, e in zip(turns, EXAMPLES, strict=True)]
    close(embed(model, encoder, own, 4), embed(model, encoder, EXAMPLES, 4))


def test_what_cannot_be_embedded_is_refused():
    model, encoder = loaded(TINY)[0], encoder_of(TINY)
    for layer in (5, -6):
        with pytest.raises(UsageError, match=f"--embedding_layer {layer} "):
            embed(model, encoder, EXAMPLES, 4, layer)
    other = [dataclasses.replace(EXAMPLES[0], text="a text that is not in the chat")]
    with pytest.raises(ExampleError, match="data:1: .*in_chat"):
        embed(model, encoder_of(TINY, text_view="in_chat"), other, 4)
    with pytest.raises(ExampleError, match=r"data:\d: .*--last_token -40"):
        embed(model, encoder_of(TINY, last_token=-40), EXAMPLES, 4)
    broken = copy.deepcopy(loaded("chatml")[0])
    broken.get_decoder().norm.weight.data.fill_(torch.inf)
    with pytest.raises(UsageError, match="--dtype float32"):
        embed(broken, encoder_of("chatml"), EXAMPLES, 4)


# ------------------------------------------------------------------------------------------- from the command line

# "group" is a set of paraphrases.
ROWS = [message_row(f"the {word} film", ("Good", "Bad")[i % 2]) | {"group": f"{i % 3}"}
        for i, word in enumerate("abcdefghijklmn")]  # fmt: skip
RUNS = {"no run": {}, "front_pred": {"predictors": 2, "front_pred": True},
        "reverse_pred": {"predictors": 1, "reverse_pred": True, "last_token": -2}}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def exported(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with safe_open(path, "pt") as file:
        assert file.get_tensor("ids").tolist() == list(range(1, len(ROWS) + 1))
        return file.get_tensor("text"), file.get_tensor("code")


@pytest.mark.parametrize("name", RUNS)
def test_views_are_exported_and_measured_as_the_run_was_trained(name, rows, tmp_path):
    model = base = GOLDEN / "models" / "chatml"
    if RUNS[name]:
        flags = [x for k, v in RUNS[name].items() for x in ([f"--{k}"] if v is True else [f"--{k}", v])]
        model = train(rows, tmp_path / "run", "--max_steps", 1, *flags, model=base)
    flags = ["--dtype", "float32", "--similarity", "--embedding_layer", 1, "--embedding_pooling", "last"]
    files = ["--output_file", tmp_path / "similarity.json", "--export_embeddings", tmp_path / "v.safetensors"]
    call("evaluate", "--model_name", model, "--input_file", rows, *flags, *files, code=0)
    tokenizer = load_tokenizer(str(model), predictors=False)
    encoder = encoder_of(tokenizer, **RUNS[name])
    examples = read_examples(str(rows), Problems())
    want = embed(load_model(str(model), None, tokenizer), encoder, examples, 4, layer=1)
    views = exported(tmp_path / "v.safetensors")
    close(views, want)
    figures = json.loads((tmp_path / "similarity.json").read_text())
    assert (figures["layer"], figures["pooling"], figures["n"], figures["dims"]) == (1, "last", len(ROWS), 48)
    for key, value in embeddings.similarity(*views, seed=42).items():
        assert figures[key] == value, key
    assert "--overwrite" in call("evaluate", "--model_name", model, "--input_file", rows, *flags, *files, code=2).err


def test_t_sne_of_paraphrases_writes_an_image_and_its_groups(rows, tmp_path):
    flags = ["--t_sne", "--t_sne_type", "paraphrase", "--dtype", "float32", "--input_file", rows]
    call("evaluate", "--model_name", MODEL, *flags, "--output_file", tmp_path / "s.json", code=0)
    record = json.loads((tmp_path / "t_sne_paraphrase.json").read_text())
    assert (tmp_path / "t_sne_paraphrase.png").read_bytes()[:4] == b"\x89PNG" and record["seed"] == 42
    assert {name: len(xy) for name, xy in record["groups"].items()} == {"set 0": 5, "set 1": 5, "set 2": 4}


def test_examples_without_a_set_of_paraphrases_are_refused_by_line(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, message_row("a film", "Good") | {"group": 3}])
    flags = ["--input_file", rows, "--output_file", tmp_path / "s.json", "--t_sne", "--t_sne_type", "paraphrase"]
    assert "rows.jsonl:15:" in call("evaluate", "--model_name", MODEL, *flags, code=2).err
    assert not (tmp_path / "t_sne_paraphrase.png").exists()
