"""Rounds of generation and the shared prefix change no answer, whatever the kind of model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from llm_jepa.evaluation import generation

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA_LIKE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA_LIKE | {"head_dim": 8}),
    "sliding window": ("MistralForCausalLM", "MistralConfig", LLAMA_LIKE | {"sliding_window": 6}),
    "learned positions": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "ALiBi by mask": ("BloomForCausalLM", "BloomConfig", SMALL | {"n_head": 4, "n_layer": 2}),
    "ALiBi by entry": (
        "MptForCausalLM", "MptConfig",
        {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    ),
    "recurrent": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}),
}  # fmt: skip
STOP, PAD, PREFIX = 7, 0, [11, 12, 13, 14, 15, 16]
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=STOP)


def build(kind: str) -> torch.nn.Module:
    """A random model whose answers differ in length."""
    model, config, options = KINDS[kind]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():  # small weights make every answer one token over and over
        for parameter in built.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return built


def prompts(n: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [PREFIX + torch.randint(20, 90, (3 + 2 * i,), generator=rng).tolist() for i in range(n)]


def alone(model: torch.nn.Module, prompt: list[int], steps: int, stops: set[int]) -> list[int]:
    """Greedy tokens by whole forward passes, without cache, padding or batch."""
    tokens: list[int] = []
    while len(tokens) < steps and not (tokens and tokens[-1] in stops):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.fixture(autouse=True)
def _stop_token(monkeypatch):
    monkeypatch.setattr(generation, "stop_ids", lambda model, renderer: [STOP, *range(40, 46)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_round", [1, 3, 8])
def test_answers_are_those_of_each_prompt_alone(kind, first_round, monkeypatch):
    monkeypatch.setattr(generation, "ROUND", first_round)
    model, asked = build(kind), prompts(6)
    prefix = generation.shared_prefix(model, asked, PAD)
    got = generation.next_tokens(model, SimpleNamespace(tokenizer=TOKENIZER), asked, 24, prefix)
    want = [alone(model, p, 24, {STOP, *range(40, 46)}) for p in asked]
    assert got == want
    if kind == "llama":
        assert len({len(row) for row in want}) > 2, "the rows should leave the batch at different times"


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_reused_where_that_changes_nothing(kind):
    model, asked = build(kind), prompts(4)
    prefix = generation.shared_prefix(model, asked, PAD)
    reusable = kind not in ("sliding window", "ALiBi by entry", "recurrent")
    assert (prefix is not None) == reusable
    if prefix:
        assert prefix.ids == PREFIX
        plain, reused = (generation.last_logits(model, asked, PAD, p) for p in (None, prefix))
        torch.testing.assert_close(reused, plain, rtol=1e-4, atol=1e-4)
        assert prefix.cache.get_seq_length() == len(PREFIX), "the cache is copied, never grown"


def test_no_prefix_where_the_prompts_share_too_little_or_one_is_the_prefix():
    model = build("llama")
    assert generation.shared_prefix(model, [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9, 9]], PAD) is None
    assert generation.shared_prefix(model, [PREFIX], PAD) is None
    short = generation.shared_prefix(model, [PREFIX, [*PREFIX, 30]], PAD)
    assert short.ids == PREFIX[:-1], "a token of each prompt is left to encode"


def test_rows_that_are_done_leave_the_batch(monkeypatch):
    monkeypatch.setattr(generation, "ROUND", 2)
    model, asked, sizes = build("llama"), prompts(6), []
    true = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: sizes.append(len(k["input_ids"])) or true(**k))
    rows = generation.next_tokens(model, SimpleNamespace(tokenizer=TOKENIZER), asked, 24)
    ends, reached = sorted(len(row) for row in rows), 0
    for i, size in enumerate(sizes):
        assert size == sum(end > reached for end in ends)
        reached += 2 * 2**i
    assert sizes[0] == 6 and sizes[-1] < 6


def test_a_prompt_near_the_end_of_the_context_does_not_end_the_others(monkeypatch):
    monkeypatch.setattr(generation, "stop_ids", lambda model, renderer: [STOP])
    model = build("llama")
    asked = [[*PREFIX, *range(20, 20 + n)] for n in (2, 60, 68)]
    longest = [*PREFIX, *([30] * 118)]  # 124 of 128 tokens
    got = generation.next_tokens(model, SimpleNamespace(tokenizer=TOKENIZER), [*asked, longest], 20)
    assert got == [alone(model, p, 20, {STOP}) for p in asked] + [alone(model, longest, 4, {STOP})]


LENGTHS = [5, 40, 7, 7, 100, 1, 12, 30, 7]


@pytest.mark.parametrize("tokens", [1, 30, 60, 99, 100, 101, 10_000])
def test_a_batch_takes_as_many_rows_as_fit_the_tokens_padded(tokens):
    batches = list(generation.batches(LENGTHS, 64, tokens))
    assert sorted(sum(batches, [])) == list(range(len(LENGTHS)))
    flat = [LENGTHS[i] for i in sum(batches, [])]
    assert flat == sorted(LENGTHS, reverse=True)
    for batch in batches:
        assert len(batch) * LENGTHS[batch[0]] <= tokens or len(batch) == 1
    for batch in batches[:-1]:
        assert (len(batch) + 1) * LENGTHS[batch[0]] > tokens


def test_without_tokens_a_batch_has_so_many_rows():
    assert [len(batch) for batch in generation.batches(LENGTHS, 4)] == [4, 4, 1]
    assert list(generation.batches([], 4)) == list(generation.batches([], 4, 100)) == []


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_the_batches_that_are_left(processes):
    examples = [SimpleNamespace(id=i) for i in range(len(LENGTHS))]
    batches = list(generation.batches(LENGTHS, 2))
    done = {*batches[1], batches[2][0]}  # a whole batch and half of another
    shares = [list(generation.unanswered(iter(batches), examples, done, (n, processes))) for n in range(processes)]
    left = [b for b in batches if b != batches[1]]
    assert sorted(sum(shares, [])) == sorted(left)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("kind", ["llama", "learned positions"])
def test_choices_are_compared_by_logits_of_float32(kind):
    model = build(kind).bfloat16()
    layer, ids = model.get_output_embeddings(), torch.tensor([PREFIX])
    with torch.no_grad(), generation.float32_logits(model):
        hidden = (model(ids, output_hidden_states=True)).hidden_states[-1]
        logits = model(ids).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, hidden.float() @ layer.weight.float().T)
    assert model.get_output_embeddings() is layer and model(ids).logits.dtype == torch.bfloat16
