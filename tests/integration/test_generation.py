"""Generation: batches, rounds and the shared prefix change no response, and prompts are those of training."""

from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from conftest import GOLDEN, MODEL, MODELS, changed_copy, half_token, random_model

import evaluate
from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, Problems
from llm_jepa.data.segments import end_of_turn
from llm_jepa.evaluation import generation
from llm_jepa.evaluation.settings import EvaluationSettings
from llm_jepa.settings import Settings
from llm_jepa.training.generations import Generations

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
KINDS = {  # by model_type
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE | {"sliding_window": 6},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4},  # learned positions
    "bloom": SMALL | {"n_head": 4, "n_layer": 2},  # ALiBi by the mask
    "mpt": {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},  # ALiBi by the entry
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
    "rwkv": {"vocab_size": 97, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2},
    "openai-gpt": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},  # no cache
    "minimax": LLAMA_LIKE | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                             "num_local_experts": 2, "block_size": 8},  # a cache of its own
    "bart": {"vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
             "max_position_embeddings": 128, "pad_token_id": 0},  # positions by the entry
}  # fmt: skip
ONE_AT_A_TIME = ("rwkv", "minimax", "bart")
NO_PREFIX = (*ONE_AT_A_TIME, "mistral", "mpt", "mamba", "openai-gpt")
PAD, PREFIX, STOPS = 0, [11, 12, 13, 14, 15, 16], [7, *range(40, 46)]


@cache
def build(kind: str) -> torch.nn.Module:
    """A random model whose responses differ in length."""
    built = random_model(kind, **KINDS[kind]).eval()
    with torch.no_grad():  # with small parameters every response repeats one token
        for parameter in built.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return built


def random_prompts(n: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [PREFIX + torch.randint(20, 90, (3 + 2 * i,), generator=rng).tolist() for i in range(n)]


@torch.no_grad()
def one_by_one(model: torch.nn.Module, prompt: list[int], steps: int, stops: list[int]) -> list[int]:
    """Greedy tokens by complete forward passes, without cache, padding or batch."""
    tokens: list[int] = []
    while len(tokens) < steps and not (tokens and tokens[-1] in stops):
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def in_batches(model: torch.nn.Module, prompts: list[list[int]], steps: int, batch_size: int = 64) -> list[list[int]]:
    """Greedy tokens in the batches that the model's plan allows."""
    plan, rows = generation.make_plan(model, prompts, PAD), {}
    for batch in generation.batches([len(p) for p in prompts], batch_size if plan.batch else 1):
        tokens = generation.generate_tokens(model, PAD, STOPS, [prompts[i] for i in batch], steps, plan)
        rows |= dict(zip(batch, tokens, strict=True))
    return [rows[i] for i in range(len(prompts))]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_rounds_and_prefix_change_no_tokens(kind, monkeypatch):
    monkeypatch.setattr(generation, "FIRST_ROUND", 4)
    model, prompts = build(kind), random_prompts(6)
    want = [one_by_one(model, p, 24, STOPS) for p in prompts]
    assert in_batches(model, prompts, 24) == want
    if kind == "llama":
        assert len(set(map(len, want))) > 2, "the rows leave the batch at different times"


@pytest.mark.parametrize("kind", KINDS)
def test_plan_leaves_out_what_changes_outputs(kind):
    model, prompts = build(kind), random_prompts(4)
    plan = generation.make_plan(model, prompts, PAD)
    assert (plan.batch, plan.prefix is not None) == (kind not in ONE_AT_A_TIME, kind not in NO_PREFIX)
    assert bool(plan.notes(model)) == (kind in ONE_AT_A_TIME)
    if plan.prefix:
        plain, reused = (generation.first_logits(model, prompts, PAD, p, 3) for p in (generation.Plan(), plan))
        torch.testing.assert_close(reused[0], plain[0], rtol=1e-4, atol=1e-4)
        assert plan.prefix.get_seq_length() == len(PREFIX), "the cache is copied, never extended"


def test_model_whose_cache_fails_generates_without(monkeypatch):
    model, prompts = build("llama"), random_prompts(3)
    forward = model.forward

    def fails_with_cache(*args, use_cache=None, **kwargs):
        if use_cache:
            raise AssertionError("no cache")
        return forward(*args, use_cache=use_cache, **kwargs)

    monkeypatch.setattr(model, "forward", fails_with_cache)
    assert in_batches(model, prompts, 12) == [one_by_one(model, p, 12, STOPS) for p in prompts]
    plan = generation.make_plan(model, prompts, PAD)
    assert (plan.cache, plan.batch, plan.prefix, len(plan.notes(model))) == (False, True, None, 1)
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UsageError, match="LlamaForCausalLM"):
        generation.make_plan(model, prompts, PAD)


LENGTHS = [5, 40, 7, 7, 100, 1, 12, 30, 7]


@pytest.mark.parametrize("tokens", [1, 60, 100, 10_000])
def test_token_budget_fills_batches_of_similar_length(tokens):
    batches = list(generation.batches(LENGTHS, 64, tokens))
    assert [LENGTHS[i] for batch in batches for i in batch] == sorted(LENGTHS, reverse=True)
    for batch in batches:
        assert len(batch) * LENGTHS[batch[0]] <= tokens or len(batch) == 1
    for batch in batches[:-1]:
        assert (len(batch) + 1) * LENGTHS[batch[0]] > tokens
    assert [len(batch) for batch in generation.batches(LENGTHS, 4)] == [4, 4, 1]


# ------------------------------------------------------------------------------------------- models with a template

STEPS = 16
USERS = ["strings with a vowel", "x", "any character or a vowel, 6 times or more, " * 6, "naïve café — 你好 🙂",
         "strings that start with the word 'cat'", "  spaces around  ", "a", "two\nlines"]  # fmt: skip
EXAMPLES = [Example("Write.", user, "a", f"data:{i}", i) for i, user in enumerate(USERS, start=1)]


@cache
def load(folder: Path, plain: bool = False):
    model, encoder = evaluate.load(str(folder), EvaluationSettings(dtype="float32", plain=plain))
    return model, encoder.renderer


def prompts_of(folder: Path, examples: list[Example]) -> list[list[int]]:
    model, renderer = load(folder)
    return generation.encode_prompts(model.config, renderer, examples, Problems())[1]


def expected(folder: Path, example: Example, stops: set[int], steps: int = STEPS) -> generation.Generation:
    """The response by complete forward passes, decoded without special tokens."""
    model, renderer = load(folder)
    tokens = one_by_one(model, prompts_of(folder, [example])[0], steps, stops)
    special = {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
    text = renderer.tokenizer.decode([t for t in tokens if t not in special | stops])
    return generation.Generation(text, "stop" if tokens[-1] in stops else "length")


def generated(folder: Path, batch_size: int, steps: int = STEPS, examples=EXAMPLES) -> list[generation.Generation]:
    model, renderer = load(folder)
    batches = generation.generate(model, renderer, examples, batch_size, steps)
    found = {e.id: g for batch in batches for e, g in batch}
    return [found[e.id] for e in examples]


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """Golden models by name with a second stop token, which ends about half of their responses; their stop tokens."""
    folders = {}
    for name in MODELS:
        golden = GOLDEN / "models" / name
        model, renderer = load(golden)
        turn = end_of_turn(renderer)
        said = [one_by_one(model, prompt, STEPS, [turn]) for prompt in prompts_of(golden, EXAMPLES)]
        stop = half_token(said, turn)
        config = {"eos_token_id": [turn, stop]}
        folder = changed_copy(golden, tmp_path_factory.mktemp("models") / name, generation_config=config)
        folders[name] = folder, {turn, stop, renderer.tokenizer.eos_token_id}
    return folders


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_responses_equal_those_of_one_prompt_without_cache(name, batch_size, stopping):
    folder, stops = stopping[name]
    want = [expected(folder, e, stops) for e in EXAMPLES]
    assert generated(folder, batch_size) == want
    assert {g.stop_reason for g in want} == {"stop", "length"} and len({g.text for g in want}) > len(want) / 2


def test_stop_token_counts_within_max_new_tokens(stopping):
    folder, stops = stopping["llama3"]
    model, _ = load(folder)
    rows = [one_by_one(model, prompt, STEPS, stops) for prompt in prompts_of(folder, EXAMPLES)]
    i = next(i for i, row in enumerate(rows) if row[-1] in stops and len(row) > 1)
    for steps, reason in ((len(rows[i]), "stop"), (len(rows[i]) - 1, "length")):
        assert generated(folder, 1, steps, [EXAMPLES[i]])[0].stop_reason == reason


@pytest.mark.parametrize("max_new_tokens", [-1, 12])
def test_response_ends_at_the_context_length(max_new_tokens, stopping, tmp_path):
    folder, stops = stopping["llama3"]
    limit = max(map(len, prompts_of(folder, EXAMPLES))) + 4
    short = changed_copy(folder, tmp_path / "short", config={"max_position_embeddings": limit})
    rooms = [limit - len(prompt) for prompt in prompts_of(folder, EXAMPLES)]
    rooms = rooms if max_new_tokens == -1 else [min(room, max_new_tokens) for room in rooms]
    want = [expected(short, e, stops, room) for e, room in zip(EXAMPLES, rooms, strict=True)]
    assert generated(short, 3, max_new_tokens) == want


@pytest.mark.parametrize(
    "config",
    [{"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.9, "num_return_sequences": 2},
     {"num_beams": 3, "repetition_penalty": 5.0, "suppress_tokens": list(range(100, 400))},
     {"min_new_tokens": STEPS, "max_length": 3, "max_new_tokens": 2}],
    ids=lambda config: next(iter(config)),
)  # fmt: skip
def test_generation_config_of_a_model_does_not_change_greedy_responses(config, stopping, tmp_path):
    folder, _ = stopping["llama3"]
    odd = changed_copy(folder, tmp_path / "odd", generation_config=config)
    assert generated(odd, 4) == generated(folder, 4)


def test_tokenizer_that_adds_bos_adds_no_second_one(tmp_path):
    bos = "<|begin_of_text|>"
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair, special_tokens = [*single, {"Sequence": {"id": "B", "type_id": 1}}], {"id": bos, "ids": [0], "tokens": [bos]}
    processor = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {bos: special_tokens}}
    folder = changed_copy(MODEL, tmp_path / "bos", tokenizer={"post_processor": processor})
    assert load(folder)[1].tokenizer("a").input_ids[0] == 0
    assert [(ids[0], ids.count(0)) for ids in prompts_of(folder, EXAMPLES)] == [(0, 1)] * len(EXAMPLES)


def test_held_out_generations_are_as_long_as_the_longest_answer(monkeypatch):
    model, renderer = load(MODEL)
    s, limits, answer = Settings(train_file="data.jsonl", eval_generate=2), [], "a word " * 200
    examples = [Example(None, "x", text, "data:1", i) for i, text in enumerate(("a", answer))]
    found = [[(example, generation.Generation("", "stop")) for example in examples]]
    monkeypatch.setattr(generation, "generate", lambda *a, max_new_tokens: limits.append(max_new_tokens) or found)
    for some in (examples[:1], examples):
        Generations(s, renderer, some, PartialState())(model)
    assert limits[0] == 128 and len(renderer.tokenizer(answer).input_ids) < limits[1]
