"""Answers of a model: generated greedily, or the most likely of given choices."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example, Problems
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder, Segment, end_of_turn
from llm_jepa.model import context_length
from llm_jepa.scoring.tasks import score_text


@dataclass(frozen=True)
class Generation:
    """What a model answered: the text without special tokens, and why it ended there.

    An answer that was chosen did not end, and carries the log-likelihood of each choice in nats.
    """

    text: str
    stop_reason: Literal["stop", "length"] | None
    log_likelihoods: dict[str, float] | None = None


def stop_ids(model: Any, renderer: Renderer) -> list[int]:
    """The template's end-of-turn token and every other token that ends generation."""
    eos = model.generation_config.eos_token_id
    known = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return sorted((known | {end_of_turn(renderer), renderer.tokenizer.eos_token_id}) - {None})


def longest_answers(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """Most tokens that may follow each prompt: max_new_tokens (−1: any number), within the model's context."""
    limit, most = context_length(model.config), sys.maxsize if max_new_tokens == -1 else max_new_tokens
    return [min(most, limit - len(p)) if limit else min(most, 8192) for p in prompts]


def answer_of(renderer: Renderer, tokens: list[int], stops: list[int]) -> Generation:
    """The answer that generated tokens are, up to and with the first stop token."""
    stopped = tokens[-1] in stops
    text = tokens[:-1] if stopped else tokens
    text = renderer.tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generation(text, "stop" if stopped else "length")


@dataclass(frozen=True)
class Prefix:
    """Tokens that all prompts begin with (the system turn, mostly), and the cache that a model has behind them."""

    ids: list[int]
    cache: DynamicCache  # of one row

    def repeated(self, rows: int) -> DynamicCache:
        """A cache of so many rows, to go on from."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


WORTHWHILE = 4  # tokens; a shorter prefix costs as much to copy as to compute
ROUND = 8  # tokens of the first round of generation


@torch.no_grad()
def shared_prefix(model: Any, prompts: list[list[int]], pad: int) -> Prefix | None:
    """What all prompts begin with, encoded once, where that is worth it and the model can go on from there.

    Shorter prompts are then padded behind the prefix. That is no matter where attention looks at the mask and the
    positions alone, and changes the outputs where it counts cache entries (sliding windows, some ALiBi) or where layers
    carry a state along the row: the model is asked, with the longest and the shortest prompt.
    """
    ids = os.path.commonprefix([prompt[:-1] for prompt in prompts])  # at least one token is left to encode
    if len(ids) < WORTHWHILE or len(prompts) < 2:
        return None
    cache = DynamicCache(config=model.config)
    cache = model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    cache = getattr(cache, "past_key_values", None)
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    prefix = Prefix(ids, cache)
    probe = [max(prompts, key=len), min(prompts, key=len)]
    plain, reused = (last_logits(model, probe, pad, p) for p in (None, prefix))  # (2, V)
    differ = ((reused - plain).norm(dim=-1) / plain.norm(dim=-1)).max().item()
    return prefix if differ < (1e-4 if model.dtype == torch.float32 else 5e-2) else None


def padded(prompts: list[list[int]], pad: int, prefix: Prefix | None, device: Any) -> dict[str, Any]:
    """Prompts as input_ids and attention_mask (B, T), padded on the left, or between the prefix and what follows."""
    width, shared = max(map(len, prompts)), len(prefix.ids) if prefix else 0
    gaps = [width - len(p) for p in prompts]
    ids = [p[:shared] + [pad] * gap + p[shared:] for p, gap in zip(prompts, gaps, strict=True)]
    mask = [[1] * shared + [0] * gap + [1] * (width - gap - shared) for gap in gaps]
    inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
    return inputs | ({"past_key_values": prefix.repeated(len(prompts))} if prefix else {})


def last_logits(model: Any, prompts: list[list[int]], pad: int, prefix: Prefix | None) -> torch.Tensor:
    """Logits (B, V) of the first token behind each prompt."""
    # The tokens are asked of `generate`, so that positions and masks are those of every later step.
    one = GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=pad, use_cache=True,
                           output_logits=True, return_dict_in_generate=True)  # fmt: skip
    with own_settings_aside(model):
        return model.generate(**padded(prompts, pad, prefix, model.device), generation_config=one).logits[0].float()


@contextlib.contextmanager
def own_settings_aside(model: Any) -> Iterator[None]:
    """Whatever `generate` is not told it would take from the model's own settings (suppressed tokens, …)."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def next_tokens(
    model: Any, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int, prefix: Prefix | None = None
) -> list[list[int]]:
    """Greedy tokens behind each prompt, up to and with the first stop token; arguments as in generate_batch.

    Generation goes in rounds, each twice as long as the one before. Between them the rows that are done leave the
    batch, so that a long answer does not keep the short ones in it.
    """
    pad, stops = renderer.tokenizer.pad_token_id, stop_ids(model, renderer)
    room = longest_answers(model, prompts, max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    live, inputs, length = list(range(len(prompts))), padded(prompts, pad, prefix, model.device), ROUND
    while live:
        width, least = inputs["input_ids"].shape[1], min(room[i] - len(rows[i]) for i in live)
        # A model whose cache cannot be thinned out goes on as far as it can: it would encode all anew.
        steps = min(length, least) if can_select(inputs.get("past_key_values")) or not rows[live[0]] else least
        greedy = GenerationConfig(
            do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=steps, eos_token_id=stops,
            pad_token_id=pad, use_cache=True, return_dict_in_generate=True,
        )  # fmt: skip
        with own_settings_aside(model):
            out = model.generate(**inputs, generation_config=greedy)
        for i, tokens in zip(live, out.sequences[:, width:].tolist(), strict=True):
            end = next((t + 1 for t, token in enumerate(tokens) if token in stops), None)
            rows[i] += tokens[:end]
        going = [k for k, i in enumerate(live) if rows[i][-1] not in stops and len(rows[i]) < room[i]]
        live, length = [live[k] for k in going], 2 * length
        if live and can_select(out.past_key_values):
            inputs = thinned(inputs["attention_mask"], out, torch.tensor(going, device=model.device))
        elif live:
            inputs = padded([prompts[i] + rows[i] for i in live], pad, prefix, model.device)
    return rows


def can_select(cache: Any) -> bool:
    """Whether rows of a cache can be left out, so that generation goes on with the others."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in kinds for layer in cache.layers)


def thinned(mask: torch.Tensor, out: Any, rows: torch.Tensor) -> dict[str, Any]:
    """What `generate` takes to go on with some `rows` of a batch: mask (B, T), `out` what it gave for that batch."""
    out.past_key_values.batch_select_indices(rows)
    ids = out.sequences[rows]  # (B', T')
    mask = F.pad(mask[rows], (0, ids.shape[1] - mask.shape[1]), value=1)  # (B', T')
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": out.past_key_values}


def generate_batch(
    model: Any, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int, prefix: Prefix | None = None
) -> list[Generation]:
    """Greedy answers to a batch of tokenised prompts, which begin with the prefix where there is one.

    Each is at most max_new_tokens long (−1: any length) and ends with the model's context.
    """
    stops = stop_ids(model, renderer)
    rows = next_tokens(model, renderer, prompts, max_new_tokens, prefix)
    return [answer_of(renderer, row, stops) for row in rows]


def tokenise(
    model: Any, renderer: Renderer, examples: list[Example], problems: Problems | None = None
) -> tuple[list[Example], list[list[int]]]:
    """(examples, their prompts as token ids), without those the template refuses or that fill the model's context.

    Raises ExampleError for such a one unless `problems` skips them.
    """
    problems = problems or Problems()
    good, texts = [], []
    for example in examples:
        try:
            texts.append(renderer.prompt(example))
            good.append(example)
        except (ValueError, TemplateError) as error:
            problems.add(example.source, str(error))
    prompts = renderer.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    limit, fitting = context_length(model.config) or sys.maxsize, []
    for example, prompt in zip(good, prompts, strict=True):
        if len(prompt) < limit:
            fitting.append((example, prompt))
        else:
            problems.add(example.source, f"the prompt's {len(prompt)} tokens fill the model's context of {limit}")
    return [example for example, _ in fitting], [prompt for _, prompt in fitting]


def batches(
    lengths: list[int], batch_size: int, tokens_per_batch: int = 0, rows: list[int] | None = None
) -> Iterator[list[int]]:
    """Indices of `lengths` by batch: like lengths together, the longest first.

    A batch has batch_size of them, or with tokens_per_batch one and as many more as keep rows × longest within that;
    `rows` says how many rows each of them is, by default one.
    """
    batch: list[int] = []
    taken = 0  # rows of the batch, which are padded to its first, the longest
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        more = rows[i] if rows else 1
        full = (taken + more) * lengths[batch[0] if batch else i] > tokens_per_batch
        if batch and (full if tokens_per_batch else len(batch) == batch_size):
            yield batch
            batch, taken = [], 0
        batch.append(i)
        taken += more
    if batch:
        yield batch


def unanswered(
    batches: Iterator[list[int]], examples: list[Example], done: set[int], share: tuple[int, int]
) -> Iterator[list[int]]:
    """The batches not wholly in `done` that fall to process n of N, where `share` is (n, N): every N-th of them.

    Batches are the same whatever is done already, so that a continued evaluation computes what one sitting would have.
    """
    left = (batch for batch in batches if not all(examples[i].id in done for i in batch))
    return itertools.islice(left, share[0], None, share[1])


def generate(
    model: Any, renderer: Renderer, examples: list[Example], batch_size: int, max_new_tokens: int,
    done: set[int] = frozenset(), prompts: list[list[int]] | None = None,
    *, tokens_per_batch: int = 0, share: tuple[int, int] = (0, 1),
) -> Iterator[list[tuple[Example, Generation]]]:  # fmt: skip
    """Answers batch by batch, those of this process's share; leaves out ids in `done`. Batches as in `batches`.

    Raises ExampleError for a prompt that fills the model's context, unless `prompts` are given.
    """
    if prompts is None:
        examples, prompts = tokenise(model, renderer, examples)
    prefix = shared_prefix(model, prompts, renderer.tokenizer.pad_token_id)
    by_length = batches([len(p) for p in prompts], batch_size, tokens_per_batch)
    for batch in unanswered(by_length, examples, done, share):
        answers = generate_batch(model, renderer, [prompts[i] for i in batch], max_new_tokens, prefix)
        yield [(examples[i], a) for i, a in zip(batch, answers, strict=True) if examples[i].id not in done]


# --------------------------------------------------------------------------------------------------------- choose


def encode_choices(
    model: Any, encoder: Encoder, examples: list[Example], choices: tuple[str, ...], problems: Problems | None = None
) -> tuple[list[Example], list[list[Segment]]]:
    """(examples, each example's chat with each choice as its answer, cut after it). `encoder` must label answer texts.

    Raises ExampleError for one the template refuses or that is longer than the model's context, unless `problems` skips
    them.
    """
    problems = problems or Problems()
    limit, good, encoded = context_length(model.config) or sys.maxsize, [], []
    for example in examples:
        chats = encoder.chats([dataclasses.replace(example, assistant=c) for c in choices])
        reason = next((str(chat) for chat in chats if isinstance(chat, ValueError)), None)
        if reason is None and (most := max(len(chat.ids) for chat in chats)) > limit:
            reason = f"{most} tokens, over the model's context of {limit}"
        if reason is not None:
            problems.add(example.source, reason)
            continue
        good.append(example)
        ends = [int(chat.labels.nonzero()[0][-1]) + 1 for chat in chats]
        encoded.append([Segment("chat", c.ids[:e], c.labels[:e]) for c, e in zip(chats, ends, strict=True)])
    return good, encoded


def share_prompt(chats: list[Segment]) -> bool:
    """Whether the choices are single tokens behind the same prompt, so that one forward pass of it tells them all."""
    return all(c.labels.sum() == 1 for c in chats) and len({c.ids[:-1].tobytes() for c in chats}) == 1


@contextlib.contextmanager
def float32_logits(model: Any) -> Iterator[None]:
    """The model's output layer in float32: in bfloat16, likelihoods of two choices are often the same number.

    Not of a model that is spread over devices, or whose adapter changes that layer: those are wrapped.
    """
    layer = model.get_output_embeddings()
    half = type(layer) is torch.nn.Linear and layer.weight.dtype in (torch.bfloat16, torch.float16)
    if not half or getattr(model, "hf_device_map", None):
        yield
        return
    exact = copy.deepcopy(layer).float()
    forward = exact.forward
    exact.forward = lambda hidden: forward(hidden.float())
    model.set_output_embeddings(exact)
    try:
        yield
    finally:
        model.set_output_embeddings(layer)


@torch.no_grad()
def choose(
    read: Callable[[list[tuple[Segment, ...]]], torch.Tensor], examples: list[Example], encoded: list[list[Segment]],
    choices: tuple[str, ...], batch_size: int, done: set[int] = frozenset(), *, tokens_per_batch: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[list[tuple[Example, Generation]]]:  # fmt: skip
    """The most likely of the choices for each example, batch by batch as in `generate`; skips ids in `done`.

    `encoded` is the return value of encode_choices. `read(items)` gives the logits (N, V) at the labels of items, in
    their order. A choice's log-likelihood is Σ log p(token | all tokens before it) over its tokens, in nats.

    Raises UsageError if one is not finite.
    """
    rows = [chats[:1] if share_prompt(chats) else chats for chats in encoded]
    lengths, counts = [max(len(chat.ids) for chat in row) for row in rows], [len(row) for row in rows]
    by_length = batches(lengths, batch_size, tokens_per_batch, counts)
    for batch in unanswered(by_length, examples, done, share):
        logits = read([tuple(rows[i]) for i in batch])
        labels = iter(logits.float().log_softmax(-1).cpu())  # N × (V,), labels in the order of items
        answers = []
        for i in batch:
            if len(rows[i]) < len(encoded[i]):
                label = next(labels)
                sums = [float(label[c.ids[-1]]) for c in encoded[i]]
            else:
                sums = [sum(float(next(labels)[t]) for t in c.ids[c.labels]) for c in encoded[i]]
            if not all(map(math.isfinite, sums)):
                what = "the likelihoods of the choices are not finite"
                raise UsageError(f"{examples[i].source}: {what}: the model is damaged, or needs --dtype float32")
            likelihoods = dict(zip(choices, sums, strict=True))
            answers.append(Generation(max(likelihoods, key=likelihoods.__getitem__), None, likelihoods))
        yield [(examples[i], a) for i, a in zip(batch, answers, strict=True) if examples[i].id not in done]


# --------------------------------------------------------------------------------------------------- during training


def exact_match(
    renderer: Renderer, examples: list[Example], process: int = 0, processes: int = 1
) -> Callable[[Any], dict[str, float]]:
    """A function of the model: exact match of its greedy answers, of at most 128 tokens, over all processes."""
    mine = examples[process::processes]

    def exact(model: Any) -> dict[str, float]:
        answers = generate(model, renderer, mine, batch_size=32, max_new_tokens=128) if mine else []
        hits = sum(score_text(g.text, e.assistant)["exact"] for batch in answers for e, g in batch)
        counts = torch.tensor([float(hits), float(len(mine))], device=model.device)
        if processes > 1:
            torch.distributed.all_reduce(counts)
        return {"exact": (counts[0] / counts[1]).item()}

    return exact
