"""Answers of a model: generated greedily, or the most likely of given choices."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig

import finetune
from examples import Example, ExampleError, Renderer


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
    return sorted((known | {finetune.end_of_turn(renderer), renderer.tokenizer.eos_token_id}) - {None})


def context(model: Any) -> int | None:
    """The longest text of the model in tokens, None where its configuration does not tell."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def next_tokens(model: Any, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy tokens behind each prompt, up to and with the first stop token; arguments as in generate_batch."""
    pad, stops, width = renderer.tokenizer.pad_token_id, stop_ids(model, renderer), max(map(len, prompts))
    limit, most = context(model), sys.maxsize if max_new_tokens == -1 else max_new_tokens
    room = [min(most, limit - len(p)) if limit else min(most, 8192) for p in prompts]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)  # (B, T)
    greedy = GenerationConfig(do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=min(room),
                              eos_token_id=stops, pad_token_id=pad, use_cache=True)  # fmt: skip
    # Whatever `generate` is not told it would take from the model's own settings (suppressed tokens, a least length …).
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)[:, width:].tolist()
    finally:
        model.generation_config = own
    ends = [next((t + 1 for t, token in enumerate(row) if token in stops), None) for row in rows]
    rows = [row[:end] for row, end in zip(rows, ends, strict=True)]
    # At the end of the context the longest prompt has the least room; the others go on without it.
    more = [i for i, end in enumerate(ends) if end is None and room[i] > min(room)]
    if more:
        left = -1 if max_new_tokens == -1 else max_new_tokens - min(room)
        for i, rest in zip(more, next_tokens(model, renderer, [prompts[i] + rows[i] for i in more], left), strict=True):
            rows[i] += rest
    return rows


def generate_batch(model: Any, renderer: Renderer, prompts: list[list[int]], max_new_tokens: int) -> list[Generation]:
    """Greedy answers to a batch of tokenised prompts, padded on the left.

    Each is at most max_new_tokens long (−1: any length) and ends with the model's context.
    """
    stops, answers = stop_ids(model, renderer), []
    for row in next_tokens(model, renderer, prompts, max_new_tokens):
        stopped = row[-1] in stops
        text = row[:-1] if stopped else row
        text = renderer.tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append(Generation(text, "stop" if stopped else "length"))
    return answers


def tokenise(model: Any, renderer: Renderer, examples: list[Example]) -> list[list[int]]:
    """The prompts as token ids. Raises ExampleError for one the template refuses or that fills the model's context."""
    texts = []
    for example in examples:
        try:
            texts.append(renderer.prompt(example))
        except (ValueError, TemplateError) as error:
            raise ExampleError(f"{example.source}: {error}") from None
    prompts = renderer.tokenizer(texts, add_special_tokens=False)["input_ids"]
    limit = context(model) or sys.maxsize
    for example, tokens in zip(examples, map(len, prompts), strict=True):
        if tokens >= limit:
            raise ExampleError(f"{example.source}: the prompt's {tokens} tokens fill the model's context of {limit}")
    return prompts


def batches(examples: list[Example], lengths: list[int], size: int, done: set[int]) -> Iterator[list[int]]:
    """Indices of the examples by batch: like lengths together, the longest first; a batch wholly in `done` is left out.

    Batches are the same whatever is done already, so that a continued evaluation computes what one sitting would have.
    """
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        if not all(examples[i].id in done for i in batch):
            yield batch


def generate(
    model: Any, renderer: Renderer, examples: list[Example], batch_size: int, max_new_tokens: int,
    done: set[int] = frozenset(), prompts: list[list[int]] | None = None,
) -> Iterator[list[tuple[Example, Generation]]]:  # fmt: skip
    """Answers batch by batch; leaves out ids in `done`.

    Raises ExampleError for a prompt that fills the model's context, unless `prompts` are given.
    """
    prompts = prompts or tokenise(model, renderer, examples)
    for batch in batches(examples, [len(p) for p in prompts], batch_size, done):
        answers = generate_batch(model, renderer, [prompts[i] for i in batch], max_new_tokens)
        yield [(examples[i], a) for i, a in zip(batch, answers, strict=True) if examples[i].id not in done]


# --------------------------------------------------------------------------------------------------------- choose


def encode_choices(
    model: Any, renderer: Renderer, examples: list[Example], choices: tuple[str, ...]
) -> list[list[finetune.Segment]]:
    """Each example's chat with each choice for its answer, cut behind that; `renderer` labels the answer's text.

    Raises ExampleError for one the template refuses or that is longer than the model's context.
    """
    limit, encoded = context(model) or sys.maxsize, []
    for example in examples:
        chats = finetune.encode_chats(renderer, [dataclasses.replace(example, assistant=c) for c in choices])
        for chat in chats:
            if isinstance(chat, ValueError):
                raise ExampleError(f"{example.source}: {chat}")
            if len(chat.ids) > limit:
                raise ExampleError(f"{example.source}: {len(chat.ids)} tokens, over the model's context of {limit}")
        ends = [int(chat.labels.nonzero()[0][-1]) + 1 for chat in chats]
        encoded.append([finetune.Segment("chat", c.ids[:e], c.labels[:e]) for c, e in zip(chats, ends, strict=True)])
    return encoded


def share_prompt(chats: list[finetune.Segment]) -> bool:
    """Whether the choices are single tokens behind the same prompt, so that one forward pass of it tells them all."""
    return all(c.labels.sum() == 1 for c in chats) and len({c.ids[:-1].tobytes() for c in chats}) == 1


@torch.no_grad()
def choose(
    model: Any, renderer: Renderer, examples: list[Example], choices: tuple[str, ...], batch_size: int,
    done: set[int] = frozenset(), encoded: list[list[finetune.Segment]] | None = None,
) -> Iterator[list[tuple[Example, Generation]]]:  # fmt: skip
    """The most likely of the choices for each example, batch by batch; leaves out ids in `done`.

    A choice's log-likelihood is Σ log p(token | all before it) over its tokens behind the whole prompt, in nats.
    """
    encoded = encoded or encode_choices(model, renderer, examples, choices)
    collator = finetune.Collator("separate", renderer.tokenizer.pad_token_id, sys.maxsize)
    with contextlib.closing(finetune.HeadInput(model)) as head:
        for batch in batches(examples, [len(e[0].ids) for e in encoded], batch_size, done):
            items = [tuple(encoded[i][:1] if share_prompt(encoded[i]) else encoded[i]) for i in batch]
            logits, _ = head.read(model, finetune.on_device(collator(items), model.device))
            rows = iter(logits.float().log_softmax(-1).cpu())  # N × (V,), labels in the order of items
            answers = []
            for i in batch:
                if share_prompt(encoded[i]):
                    row = next(rows)
                    sums = [float(row[c.ids[-1]]) for c in encoded[i]]
                else:
                    sums = [sum(float(next(rows)[t]) for t in c.ids[c.labels]) for c in encoded[i]]
                likelihoods = dict(zip(choices, sums, strict=True))
                answers.append(Generation(max(likelihoods, key=likelihoods.__getitem__), None, likelihoods))
            yield [(examples[i], a) for i, a in zip(batch, answers, strict=True) if examples[i].id not in done]
