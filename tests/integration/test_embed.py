"""Embeddings of views are what training reads, whatever the model, the template, the batch or the order."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, MODELS, ROOT, call, message_row, write_rows
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from sklearn.manifold import TSNE
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from llm_jepa.cli import UsageError
from llm_jepa.data import batching, segments
from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.rendering import Renderer
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
EXAMPLES = [
    Example("Write it.", user, f"(.*{user[::-1]}.*)" * (1 + i % 3), f"rows:{i}", i)
    for i, user in enumerate(WORDS, start=1)
]
PLACES = {
    "k=0": {},
    "k=3": {"predictors": 3},
    "front_pred": {"predictors": 2, "front_pred": True},
    "last_token": {"predictors": 1, "last_token": -1},
    "plain": {"predictors": 2, "plain": True},
}


def settings(name: str, **flags: object) -> finetune.Settings:
    folder = ROOT / "models" / "tiny" if name == TINY else GOLDEN / "models" / name
    return finetune.Settings(model_name=str(folder), pretrain=name == TINY, lm_labels="answer", max_length=900, **flags)


@cache
def loaded(name: str):
    """(model, HeadInput, tokenizer), tiny with random weights."""
    s = settings(name, plain=True)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(s)
    model = load_model(s, tokenizer).eval()
    return model, finetune.HeadInput(model), tokenizer


def renderer(name: str, **flags: object) -> Renderer:
    return Renderer(loaded(name)[2], settings(name, **flags))


@torch.no_grad()
def training_reads(name: str, layout: str = "separate", model=None, head=None, **flags: object) -> torch.Tensor:
    """The views (2, P, D) that the JEPA loss gets."""
    r = renderer(name, **flags)
    items = batching.SegmentDataset(EXAMPLES, r, Problems()).items
    batch = finetune.Collator(layout, r.tokenizer.pad_token_id, 256)(items)
    return (head or loaded(name)[1]).read(model or loaded(name)[0], batch)[1]


@torch.no_grad()
def one_at_a_time(name: str, layer: int, read, **flags: object) -> torch.Tensor:
    """`read` of each view's own hidden states (T, D) and its view token, without a batch: (2, P, D)."""
    model, _, tokenizer = loaded(name)
    pairs = segments.encode_views(renderer(name, **flags), EXAMPLES)
    states = [
        [
            read(model(torch.tensor(v.ids)[None], output_hidden_states=True).hidden_states[layer][0], v.view)
            for v in pair
        ]
        for pair in pairs
    ]
    return torch.stack([torch.stack(side) for side in zip(*states, strict=True)])


def close(some: tuple[torch.Tensor, ...], others: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("name", [*MODELS, TINY])
def test_the_last_layer_at_the_view_token_is_what_training_reads(name, place):
    views = embeddings.embed(loaded(name)[0], renderer(name, **PLACES[place]), EXAMPLES, batch_size=4)
    close(views, training_reads(name, **PLACES[place]))
    close(views, training_reads(name, "packed", **PLACES[place]))
    assert not torch.allclose(views[0], views[1], atol=1e-2)


def test_reverse_pred_keeps_text_and_code_apart():
    flags = {"predictors": 2, "reverse_pred": True}
    text, code = embeddings.embed(loaded(TINY)[0], renderer(TINY, **flags), EXAMPLES, batch_size=4)
    close((code, text), training_reads(TINY, **flags))
    plain = embeddings.embed(loaded(TINY)[0], renderer(TINY), EXAMPLES, batch_size=4)
    torch.testing.assert_close(text, plain[0], rtol=1e-5, atol=1e-5)  # the user turn, which has no predictors here
    assert not torch.allclose(code, plain[1], atol=1e-2)


@pytest.mark.parametrize("layer", [0, 1, 3, 4, -1, -2, -5])
def test_every_layer_and_pooling_is_that_of_a_view_alone(layer):
    pools = {"last": lambda hidden, at: hidden[at], "mean": lambda h, at: h.mean(dim=0), "cls": lambda h, at: h[0]}
    assert pools.keys() == embeddings.POOLINGS.keys()
    for pooling, read in pools.items():
        views = embeddings.embed(loaded(TINY)[0], renderer(TINY, predictors=1), EXAMPLES, 3, layer, pooling)
        close(views, one_at_a_time(TINY, layer, read, predictors=1))


def test_layer_zero_is_the_embedding_of_the_view_token_and_the_last_has_its_norm():
    model, _, tokenizer = loaded(TINY)
    text, _ = embeddings.embed(model, renderer(TINY, predictors=2), EXAMPLES, 4, layer=0)
    predictor = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<|predictor_1|>")]
    close((text,), predictor.detach().expand(1, len(EXAMPLES), -1))
    last, fourth = (embeddings.embed(model, renderer(TINY), EXAMPLES, 4, layer)[0] for layer in (-1, 4))
    assert last.equal(fourth)  # four layers and the embedding layer
    torch.testing.assert_close(last.square().mean(dim=1), torch.ones(len(EXAMPLES)), rtol=1e-3, atol=1e-3)


def test_batches_and_order_do_not_matter():
    model, r = loaded(TINY)[0], renderer(TINY, predictors=1)
    for pooling in embeddings.POOLINGS:
        views = embeddings.embed(model, r, EXAMPLES, 1, pooling=pooling)
        for batch_size in (2, 5, 100):
            close(views, embeddings.embed(model, r, EXAMPLES, batch_size, pooling=pooling))
        for tokens in (1, 200):
            close(views, embeddings.embed(model, r, EXAMPLES, 64, pooling=pooling, tokens_per_batch=tokens))
        turned = embeddings.embed(model, r, EXAMPLES[::-1], 3, pooling=pooling)
        close(views, [side.flip(0) for side in turned])


@pytest.mark.parametrize("tokens", [0, 200])
def test_batches_are_of_like_lengths_and_neither_logits_nor_other_layers_are_kept(tokens):
    model = loaded(TINY)[0]
    rows, heads = [], []
    hooks = [
        model.get_decoder().register_forward_pre_hook(lambda m, a, k: rows.append(k), with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(lambda m, a: heads.append(a)),
    ]
    try:
        embeddings.embed(model, renderer(TINY), EXAMPLES, 4, tokens_per_batch=tokens)
    finally:
        for hook in hooks:
            hook.remove()
    assert not heads and not any(k["output_hidden_states"] for k in rows)
    rows = [k["attention_mask"] for k in rows]
    lengths = [row.sum(dim=1).tolist() for row in rows]
    if tokens:
        assert all(len(batch) * batch[0] <= tokens < (len(batch) + 1) * batch[0] for batch in lengths[:-1])
    else:
        assert [len(batch) for batch in lengths] == [4, 4, 4, 2]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)
    assert [row.shape[1] for row in rows] == [batch[0] for batch in lengths]


def test_embeddings_are_float32_without_gradients_and_without_dropout(capsys):
    s = settings("llama3", lora=True)
    tokenizer = load_tokenizer(s)
    model = load_model(s, tokenizer).train()
    shake(model)
    r = Renderer(tokenizer, s)
    first, second = (embeddings.embed(model.train(), r, EXAMPLES, 4) for _ in range(2))
    assert first[0].equal(second[0]) and first[1].equal(second[1])
    assert not first[0].requires_grad and not first[0].is_inference()
    assert capsys.readouterr().err.count("14/14") == 2  # one bar each
    half = embeddings.embed(model.to(torch.bfloat16), r, EXAMPLES, 4)
    mean = embeddings.embed(model, r, EXAMPLES, 4, pooling="mean")
    assert max((a - b).abs().mean() for a, b in zip(half, first, strict=True)) < 0.05
    assert {x.dtype for x in (*first, *half, *mean)} == {torch.float32}
    assert {x.device.type for x in first} == {"cpu"}


def shake(model: torch.nn.Module) -> None:
    """Gives an adapter, which starts as nothing, an effect."""
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_B:
            weight = module.lora_B["default"].weight
            weight.data = torch.randn(weight.shape, generator=draw) / 5


def test_an_adapter_is_part_of_the_model():
    flags = {"predictors": 2, "lora": True}
    s = settings("llama3", **flags)
    torch.manual_seed(0)
    model = load_model(s, loaded("llama3")[2])
    shake(model)
    r = renderer("llama3", **flags)
    views = embeddings.embed(model, r, EXAMPLES, 4)
    close(views, training_reads("llama3", model=model.eval(), head=finetune.HeadInput(model), **flags))
    with torch.no_grad(), model.disable_adapter():
        bare = embeddings.embed(model, r, EXAMPLES, 4)
    merged = embeddings.embed(model.merge_and_unload(), r, EXAMPLES, 4)
    assert not torch.allclose(views[0], bare[0], atol=1e-2)
    for a, b in zip(views, merged, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_views_of_their_own_are_embedded_instead_of_the_turns():
    model, r = loaded(TINY)[0], renderer(TINY)
    turns = [dataclasses.replace(e, user=f"Which? {e.user}", assistant="B") for e in EXAMPLES]
    own = [dataclasses.replace(t, text=e.user, code=e.assistant) for t, e in zip(turns, EXAMPLES, strict=True)]
    close(embeddings.embed(model, r, own, 4), embeddings.embed(model, r, EXAMPLES, 4))


@pytest.mark.parametrize("layer", [5, -6, 100])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(UsageError, match=f"--embedding_layer {layer} is not in -5 to 4"):
        embeddings.embed(loaded(TINY)[0], renderer(TINY), EXAMPLES, 4, layer)


def test_a_view_that_cannot_be_encoded_is_named():
    model = loaded(TINY)[0]
    with pytest.raises(ExampleError, match=r"rows:\d: the text view has \d+ tokens, no --last_token -40"):
        embeddings.embed(model, renderer(TINY, last_token=-40), EXAMPLES, 4)
    long = dataclasses.replace(EXAMPLES[2], assistant="[0-9] " * 1000)
    r = renderer(TINY)
    r = Renderer(r.tokenizer, dataclasses.replace(r.s, max_length=sys.maxsize))
    with pytest.raises(ExampleError, match=r"rows:3: a view has \d+ tokens, the model's context 1024"):
        embeddings.embed(model, r, [EXAMPLES[0], long], 4)


def test_embeddings_that_overflow_are_refused():
    model = copy.deepcopy(loaded("chatml")[0])
    model.get_decoder().norm.weight.data.fill_(torch.inf)
    with pytest.raises(UsageError, match="not finite.*--dtype float32"):
        embeddings.embed(model, renderer("chatml"), EXAMPLES, 4)


def test_embed_measure_export_and_draw_together(tmp_path: Path):
    text, code = embeddings.embed(loaded(TINY)[0], renderer(TINY, predictors=1), EXAMPLES, 4)
    said = embeddings.similarity(text, code, seed=1)
    loss, pairs = finetune.jepa_loss(*training_reads(TINY, predictors=1))
    assert said["cosine"] == pytest.approx(1 - loss.item() / pairs, abs=1e-5)
    embeddings.export(tmp_path / "v.safetensors", text, code, [e.id for e in EXAMPLES], {"layer": -1})
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert file.get_tensor("code").equal(code)
    groups = embeddings.t_sne_groups("in_n_out", text, code, EXAMPLES)
    drawn = embeddings.t_sne(tmp_path / "v.png", groups, seed=1, title="tiny")
    assert [len(xy) for xy in drawn.values()] == [7, 7]


# ------------------------------------------------------------------------------------------- from the command line

ROWS = ROOT / "datasets" / "synth_test.jsonl"
PAIRS = 80  # all different, and more than the model's 48 dimensions, which the least-squares error needs
RUNS = {
    "k=2": ["--predictors", 2],
    "front_pred": ["--predictors", 2, "--front_pred"],
    "reverse_pred": ["--predictors", 2, "--reverse_pred"],
    "last_token": ["--predictors", 1, "--last_token", -2],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a name: the golden model itself or a run of one step, trained when it is first asked for."""
    made = {"no run": GOLDEN / "models" / "chatml"}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name.replace("=", "")
            base = ["--model_name", made["no run"], "--train_file", GOLDEN / "regex_rows.jsonl"]
            base += ["--max_steps", 1, "--batch_size", 2]
            done = call("finetune", *base, *RUNS[name], "--output_dir", made[name])
            assert done.code == 0, done.err
        return made[name]

    return run


def view(tokenizer, role: str, content: str, name: str, predicts: bool) -> tuple[list[int], int]:
    """A view's tokens and its view token, written down without the project's renderer."""
    flags = RUNS.get(name, [])
    k = flags[flags.index("--predictors") + 1] if "--predictors" in flags and predicts else 0
    if "--front_pred" in flags:
        content = "".join(f"<|predictor_{i}|>" for i in range(1, k + 1)) + content
    else:
        content += "".join(f"<|predictor_{i}|>" for i in range(k, 0, -1))
    text = tokenizer.apply_chat_template([{"role": role, "content": content}], tokenize=False)
    ids, upto = (
        tokenizer(part, add_special_tokens=False).input_ids for part in (text, text[: text.rindex("<|im_end|>")])
    )
    assert ids[: len(upto)] == upto
    at = len(ids) + flags[flags.index("--last_token") + 1] if "--last_token" in flags else len(upto) - 1
    return ids, at


@cache
def states_of(folder: Path, name: str) -> tuple[list[tuple[torch.Tensor, int]], ...]:
    """(Text, Code) of the first rows: each view's states of every layer (L, T, D), encoded alone; its view token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line)["messages"] for line in ROWS.read_text(encoding="utf-8").splitlines()[:PAIRS]]
    reverse, sides = "--reverse_pred" in RUNS.get(name, []), []
    for turn, role in ((-2, "user"), (-1, "assistant")):
        side = []
        for row in rows:
            ids, at = view(tokenizer, role, row[turn]["content"], name, predicts=reverse == (role == "assistant"))
            with torch.no_grad():
                layers = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            side.append((torch.cat(layers), at))
        sides.append(side)
    return tuple(sides)


def expected_vectors(folder: Path, name: str, layer: int, pooling: str) -> list[np.ndarray]:
    """The Text and the Code views' embeddings (P, D)."""
    pools = {"last": lambda h, at: h[at], "mean": lambda h, at: h.mean(axis=0), "cls": lambda h, at: h[0]}
    sides = states_of(folder, name)
    return [np.stack([pools[pooling](states[layer].numpy(), at) for states, at in side]) for side in sides]


def expected_figures(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """What `similarity` says of texts and codes (P, D), computed one by one."""
    x, y, n = x.astype(np.float64), y.astype(np.float64), len(x)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    def found(k: int) -> float:
        shares = []
        for i, own in enumerate(cosine(x[i], y[i]) for i in range(n)):
            others = [cosine(x[i], y[j]) - own for j in range(n) if j != i]
            nearer, level = sum(d > 1e-12 for d in others), sum(abs(d) <= 1e-12 for d in others)
            shares.append(min(max(k - nearer, 0) / (1 + level), 1))  # those as near as the own one share their places
        return float(np.mean(shares))

    partner = embeddings.derangement(n, 42)
    projection = x @ np.linalg.pinv(x, rcond=1e-10)  # (P, P), onto what a linear map of the texts can give
    fit, shuffled = (float(np.square(codes - projection @ codes).sum()) for codes in (y, y[partner]))
    top = np.sqrt(np.linalg.eigvalsh((x - y).T @ (x - y)).clip(0))
    return {
        "n": n,
        "dims": x.shape[1],
        "cosine": np.mean([cosine(x[i], y[i]) for i in range(n)]),
        "cosine_shuffled": np.mean([cosine(x[i], y[partner[i]]) for i in range(n)]),
        "retrieval_at_1": found(1),
        "retrieval_at_10": found(10),
        "least_squares_error": fit,
        "least_squares_relative": fit / np.square(y).sum(),
        "least_squares_relative_shuffled": shuffled / np.square(y).sum(),
        "singular_value_mean": top.mean(),
    }


def evaluated(folder: Path, output: Path, *flags: object) -> tuple[list[np.ndarray], dict]:
    """(exported Text and Code vectors, similarity.json) of a call of evaluate.py."""
    files = ["--output_file", output / "similarity.json", "--export_embeddings", output / "v.safetensors"]
    rows = ["--input_file", ROWS, "--max_examples", PAIRS, "--similarity"]
    done = call("evaluate", "--model_name", folder, *rows, "--dtype", "float32", *files, *flags, "--overwrite")
    assert done.code == 0, done.err
    with safe_open(output / "v.safetensors", "np") as file:
        assert file.get_tensor("ids").tolist() == list(range(1, PAIRS + 1))
        vectors = [file.get_tensor(name) for name in ("text", "code")]
    return vectors, json.loads((output / "similarity.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("layer", [-1, 1, 0])
@pytest.mark.parametrize("name", ["no run", "k=2"])
def test_layer_and_pooling_of_the_flags_are_what_is_exported_and_measured(name, layer, pooling, runs, tmp_path):
    flags = ("--embedding_layer", layer, "--embedding_pooling", pooling)
    vectors, said = evaluated(runs(name), tmp_path, *flags)
    for ours, theirs in zip(vectors, expected_vectors(runs(name), name, layer, pooling), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (said["layer"], said["pooling"], said["n"], said["dims"]) == (layer, pooling, PAIRS, 48)
    expected = expected_figures(*vectors)
    assert {key: said[key] for key in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["no run", *RUNS])
def test_views_are_exported_as_the_run_was_trained(name, runs, tmp_path):
    vectors, _ = evaluated(runs(name), tmp_path)
    expected = expected_vectors(runs(name), name, -1, "last")
    for ours, theirs in zip(vectors, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    if name in RUNS:
        others = expected_vectors(runs(name), "no run", -1, "last")
        assert not all(np.allclose(a, b, atol=1e-2) for a, b in zip(expected, others, strict=True))


@pytest.mark.parametrize("name", ["k=2", "reverse_pred"])
def test_retrieval_and_the_fit_go_from_texts_to_codes(name, runs, tmp_path):
    vectors, said = evaluated(runs(name), tmp_path)
    expected, turned = expected_figures(*vectors), expected_figures(*vectors[::-1])
    for key in ("retrieval_at_10", "least_squares_error", "least_squares_relative"):
        assert said[key] == pytest.approx(expected[key], rel=1e-6)
        assert said[key] != pytest.approx(turned[key], rel=1e-2)


# A row has what each kind of picture tells apart: its answer is a class.
CLASSES = [
    message_row(f"the {word} film", ("Good", "Bad")[i % 2]) | {"group": f"{i % 3}"}
    for i, word in enumerate("abcdefghijklmn")
]


def drawn(output: Path, rows: Path, kind: str) -> tuple[bytes, dict]:
    """(picture, what stands beside it) of a call of evaluate.py."""
    model = GOLDEN / "models" / "chatml"
    files = ["--input_file", rows, "--output_file", output / "similarity.json"]
    done = call("evaluate", "--model_name", model, *files, "--t_sne", "--t_sne_type", kind, "--dtype", "float32")
    assert done.code == 0, done.err
    picture = output / f"t_sne_{kind}.png"
    return picture.read_bytes(), json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))


def test_a_picture_is_the_same_in_every_call_and_another_for_another_type(tmp_path):
    rows, pictures = write_rows(tmp_path / "rows.jsonl", CLASSES), {}
    for kind in ("in_n_out", "paraphrase", "rotten_tomatoes"):
        (picture, record), again = (drawn(tmp_path / call_, rows, kind) for call_ in ("first", "second"))
        assert (picture, record) == again and record["seed"] == 42
        pictures[picture] = record["groups"]
    assert [{name: len(xy) for name, xy in groups.items()} for groups in pictures.values()] == [
        {"Text": 14, "Code": 14},
        {"set 0": 5, "set 1": 5, "set 2": 4},
        {"Good": 7, "Bad": 7},
    ]


def test_a_picture_is_t_sne_of_the_exported_vectors_drawn_with_seed_42(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", CLASSES)
    _, record = drawn(tmp_path, rows, "rotten_tomatoes")
    model, output = GOLDEN / "models" / "chatml", tmp_path / "v.safetensors"
    flags = ["--input_file", rows, "--export_embeddings", output, "--dtype", "float32"]
    assert call("evaluate", "--model_name", model, *flags).code == 0
    with safe_open(output, "np") as file:
        text = file.get_tensor("text")
    points = np.concatenate([text[0::2], text[1::2]])  # the good films first
    plane = TSNE(perplexity=13 / 3, init="pca", random_state=42).fit_transform(points)
    assert plane.tolist() == record["groups"]["Good"] + record["groups"]["Bad"]


def test_rows_without_a_set_are_refused_by_line(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [*CLASSES, message_row("a film", "Good") | {"group": 3}])
    files = ["--input_file", rows, "--output_file", tmp_path / "similarity.json"]
    model = GOLDEN / "models" / "chatml"
    done = call("evaluate", "--model_name", model, *files, "--t_sne", "--t_sne_type", "paraphrase")
    assert done.code == 2 and not (tmp_path / "t_sne_paraphrase.png").exists()
    assert (
        'rows.jsonl:15: --t_sne_type paraphrase needs each row\'s set of paraphrases, a text under "group"' in done.err
    )
