"""Responses of a model: generated greedily, or the most likely of given choices.

Letters: B examples of a batch, R rows, T tokens in a row, V vocabulary, N labels.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.examples import Example, ExampleError, Problems
from llm_jepa.data.rendering import Renderer
from llm_jepa.data.segments import Encoder, Item, Segment, end_of_turn
from llm_jepa.model import context_length, stop_tokens


@dataclass(frozen=True)
class Generation:
    """A model's response: the text without special tokens, and why it ended.

    A response that was chosen has no stop reason, but the log-likelihood of each choice in nats.
    """

    text: str
    stop_reason: Literal["stop", "length"] | None
    log_likelihoods: dict[str, float] | None = None


Responses = Iterator[list[tuple[Example, Generation]]]  # batch by batch

# ---------------------------------------------------------------------------------------------------------- batches


def batches(lengths: list[int], batch_size: int, tokens_per_batch: int = 0) -> Iterator[list[int]]:
    """Batches of indices into `lengths`, sorted by length, the longest first.

    A batch has `batch_size` indices, or with `tokens_per_batch` at least one and as many as fit when padded.
    """
    order, begin = sorted(range(len(lengths)), key=lambda i: -lengths[i]), 0
    while begin < len(order):
        size = max(1, tokens_per_batch // lengths[order[begin]]) if tokens_per_batch else batch_size
        yield order[begin : begin + size]
        begin += size


def respond(
    examples: list[Example], encoded: list[Any], response: Callable[[list[Any]], list[Generation]],
    batches: Iterator[list[int]], done: set[int] = frozenset(), share: tuple[int, int] = (0, 1),
) -> Responses:  # fmt: skip
    """Responses batch by batch, without those whose id is in `done`; `share` (n, N) selects batches n, n + N, n + 2N …

    The batches do not depend on `done`, so a resumed evaluation computes the same as an uninterrupted one.
    """
    left = (batch for batch in batches if not all(examples[i].id in done for i in batch))
    for batch in itertools.islice(left, share[0], None, share[1]):
        pairs = zip(batch, response([encoded[i] for i in batch]), strict=True)
        yield [(examples[i], generation) for i, generation in pairs if examples[i].id not in done]


def encode_usable(
    examples: list[Example], encode: Callable[[Example], Any], problems: Problems
) -> tuple[list[Example], list[Any]]:
    """(examples, the values of `encode` for them), without the examples that it refuses, which `problems` collects.

    Raises ExampleError if no example is left.
    """
    encoded = {}  # by index
    for i, example in enumerate(examples):
        try:
            encoded[i] = encode(example)
        except (ValueError, TemplateError) as error:
            problems.add(example.source, str(error))
    if examples and not encoded:
        raise ExampleError(f"no usable example is left: {problems.report()}")
    return [examples[i] for i in encoded], list(encoded.values())


# --------------------------------------------------------------------------------------------------------- generate


def encode_prompts(
    config: Any, renderer: Renderer, examples: list[Example], problems: Problems
) -> tuple[list[Example], list[list[int]]]:
    """(examples, their prompts as token ids), without those that the chat template refuses or that fill the context."""
    limit = context_length(config) or sys.maxsize

    def encode(example: Example) -> list[int]:
        ids = renderer.tokenizer(renderer.prompt(example), add_special_tokens=False)["input_ids"]
        if len(ids) >= limit:
            raise ValueError(f"the prompt's {len(ids)} tokens fill the model's context of {limit}")
        return ids

    return encode_usable(examples, encode, problems)


def stop_ids(generation_config: GenerationConfig, renderer: Renderer) -> list[int]:
    """Ids of the template's end-of-turn token and of all other tokens that end generation."""
    return stop_tokens(generation_config, end_of_turn(renderer), renderer.tokenizer.eos_token_id)


def answer_limit(renderer: Renderer, examples: list[Example]) -> int:
    """The default of --max_new_tokens: at least 128, more if an answer of the data is longer, a multiple of 64."""
    answers = [example.assistant for example in examples] or [""]
    longest = max(map(len, renderer.tokenizer(answers, add_special_tokens=False)["input_ids"]))
    return max(128, 64 * ((longest + 8) // 64 + 1))  # 8: the stop token, and tokens where the prompt ends


def max_lengths(config: Any, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """The most tokens that may follow each prompt: max_new_tokens (−1: no limit), within the model's context."""
    limit, most = context_length(config), sys.maxsize if max_new_tokens == -1 else max_new_tokens
    return [min(most, limit - len(p)) if limit else min(most, 8192) for p in prompts]


def to_generation(renderer: Renderer, tokens: list[int], stops: list[int]) -> Generation:
    """The response with these tokens, up to and including the first stop token."""
    stopped = tokens[-1] in stops
    text = tokens[:-1] if stopped else tokens
    text = renderer.tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generation(text, "stop" if stopped else "length")


@dataclass(frozen=True)
class Plan:
    """Which optimizations leave a model's responses unchanged: a cache, padded batches, a shared prefix.

    `prefix` is the cache (one row) after the tokens that all prompts begin with, usually the system turn.
    """

    cache: bool = True
    batch: bool = True
    prefix: DynamicCache | None = None

    def notes(self, model: Any) -> list[str]:
        """What a reader of the results should know about how they were computed."""
        notes = [] if self.cache else [f"{class_name(model)} generates without a cache, because it fails with one"]
        one = f"{class_name(model)} generates for one prompt at a time, because padded batches fail or change results"
        return notes if self.batch else [*notes, one]


def class_name(model: Any) -> str:
    """The class of a model, below an adapter if there is one."""
    return type(getattr(model, "get_base_model", lambda: model)()).__name__


MIN_PREFIX = 4  # tokens; copying the cache of a shorter prefix costs as much as computing it
FIRST_ROUND = 8  # tokens
PROBED = 3  # tokens: the prompt's next one, and steps that read the cache


def only_layers(cache: Any, *kinds: type) -> bool:
    """Whether a cache has only layers of these kinds; rows of those below can be repeated and left out."""
    known = type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)
    return known and cache.get_seq_length() > 0  # some models accept a cache and ignore it


@torch.no_grad()
def shared_prefix(model: Any, prompts: list[list[int]]) -> DynamicCache | None:
    """The cache after the tokens that all prompts begin with, None if they are few or it cannot be repeated."""
    ids = os.path.commonprefix([prompt[:-1] for prompt in prompts])  # at least one token remains to encode
    if len(ids) < MIN_PREFIX or len(prompts) < 2:
        return None
    options = {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
    cache = model(input_ids=torch.tensor([ids], device=model.device), **options).past_key_values
    return cache if only_layers(cache, DynamicLayer) else None


def make_plan(model: Any, prompts: list[list[int]], pad_id: int) -> Plan:
    """The fastest plan that gives the longest and the shortest prompt the same first logits as one prompt at a time.

    In a batch shorter prompts are padded, after the prefix if there is one. Outputs do not change if attention depends
    on the mask and the positions only. They change if the model ignores the mask, if its layers carry a state along the
    row, and with a prefix also if it counts cache entries (sliding windows, some ALiBi). What raises an error is not
    used. Raises UsageError if the model cannot generate at all.
    """
    if not prompts:
        return Plan()
    probe = [max(prompts, key=len), min(prompts, key=len)]
    steps = min(max_lengths(model.config, probe, PROBED))

    def logits(plan: Plan) -> torch.Tensor:
        """(S, 2, V) of both prompts."""
        groups = [probe] if plan.batch else [[prompt] for prompt in probe]
        return torch.cat([first_logits(model, group, pad_id, plan, steps) for group in groups], dim=1)

    def same(plan: Plan) -> bool:
        found = logits(plan)
        differences = (found - alone).norm(dim=-1) / alone.norm(dim=-1)  # (S, 2)
        equal = (found.argmax(-1) == alone.argmax(-1)).cumprod(0)  # (S, 2): the tokens up to each step
        known = torch.cat([torch.ones_like(equal[:1]), equal[:-1]]).bool()
        return bool((differences[known] < (1e-4 if model.dtype == torch.float32 else 0.1)).all())

    plan = Plan(batch=False)
    try:
        alone = logits(plan)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        try:
            plan = Plan(cache=False, batch=False)
            alone = logits(plan)
        except Exception as error:
            raise UsageError(f"{class_name(model)} cannot generate ({first_line(error)})") from None
    with contextlib.suppress(Exception):  # what fails is not used, whatever the error
        batch = dataclasses.replace(plan, batch=True)
        if len(prompts) == 1 or same(batch):
            plan = batch
            if plan.cache and (prefix := shared_prefix(model, prompts)) and same(Plan(prefix=prefix)):
                plan = Plan(prefix=prefix)
    return plan


def prompt_inputs(model: Any, prompts: list[list[int]], pad_id: int, prefix: DynamicCache | None) -> dict[str, Any]:
    """Prompts as input_ids and attention_mask (B, T), padded on the left, or between the prefix and what follows."""
    shared, width = prefix.get_seq_length() if prefix else 0, max(map(len, prompts))
    ids = [p[:shared] + [pad_id] * (width - len(p)) + p[shared:] for p in prompts]
    mask = [[1] * shared + [0] * (width - len(p)) + [1] * (len(p) - shared) for p in prompts]
    inputs = {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask).to(model.device),
    }
    if prefix:
        inputs["past_key_values"] = copy.deepcopy(prefix)
        inputs["past_key_values"].batch_repeat_interleave(len(prompts))
    return inputs


def first_logits(model: Any, prompts: list[list[int]], pad_id: int, plan: Plan, steps: int) -> torch.Tensor:
    """Logits (S, B, V) of the first S = `steps` tokens after each prompt."""
    # By `generate`, so that positions and masks are those of every later step.
    inputs = prompt_inputs(model, prompts, pad_id, plan.prefix)
    return torch.stack(greedy(model, inputs, steps, pad_id, plan.cache, output_logits=True).logits).float()


def greedy(
    model: Any, inputs: dict[str, Any], max_new_tokens: int, pad_id: int, cache: bool, streamer: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    """What `model.generate` returns for `prompt_inputs`, without sampling; `options` of GenerationConfig."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad_id, use_cache=cache,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    # `generate` would take from the model's own configuration whatever this one leaves out.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        return model.generate(**inputs, generation_config=config, streamer=streamer)
    finally:
        model.generation_config = own


@torch.no_grad()
def generate_tokens(
    model: Any, pad_id: int, stops: list[int], prompts: list[list[int]], max_new_tokens: int, plan: Plan,
) -> list[list[int]]:  # fmt: skip
    """Greedy tokens after each prompt, up to and including the first of `stops`, at most max_new_tokens (−1: no limit).

    Generation runs in rounds, each twice as long as the one before. Finished rows leave the batch between rounds, so
    that a long response does not keep the short ones in it.
    """
    room = max_lengths(model.config, prompts, max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    live, inputs, length = list(range(len(prompts))), prompt_inputs(model, prompts, pad_id, plan.prefix), FIRST_ROUND
    while live:
        width, least = inputs["input_ids"].shape[1], min(room[i] - len(rows[i]) for i in live)
        out = greedy(model, inputs, min(length, least), pad_id, plan.cache, eos_token_id=stops)
        for i, tokens in zip(live, out.sequences[:, width:].tolist(), strict=True):
            end = next((t + 1 for t, token in enumerate(tokens) if token in stops), None)
            rows[i] += tokens[:end]
        kept = [k for k, i in enumerate(live) if rows[i][-1] not in stops and len(rows[i]) < room[i]]
        live, length = [live[k] for k in kept], 2 * length
        if live and only_layers(out.past_key_values, DynamicLayer, DynamicSlidingWindowLayer):
            index = torch.tensor(kept, device=model.device)
            out.past_key_values.batch_select_indices(index)
            ids, mask = out.sequences[index], inputs["attention_mask"][index]  # (B', T'), (B', T)
            mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)  # (B', T')
            inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": out.past_key_values}
        elif live:  # for example a recurrent state: the rows are encoded again
            inputs = prompt_inputs(model, [prompts[i] + rows[i] for i in live], pad_id, plan.prefix)
    return rows


def generate_batch(
    model: Any, renderer: Renderer, max_new_tokens: int, plan: Plan, prompts: list[list[int]]
) -> list[Generation]:
    """Greedy responses to a batch of prompts."""
    stops = stop_ids(model.generation_config, renderer)
    rows = generate_tokens(model, renderer.tokenizer.pad_token_id, stops, prompts, max_new_tokens, plan)
    return [to_generation(renderer, row, stops) for row in rows]


def generate(
    model: Any, renderer: Renderer, examples: list[Example], batch_size: int, max_new_tokens: int
) -> Responses:
    """Greedy responses batch by batch. Raises ExampleError if an example cannot be encoded."""
    examples, prompts = encode_prompts(model.config, renderer, examples, Problems())
    plan = make_plan(model, prompts, renderer.tokenizer.pad_token_id)
    response = partial(generate_batch, model, renderer, max_new_tokens, plan)
    return respond(examples, prompts, response, batches([len(p) for p in prompts], batch_size if plan.batch else 1))


# ----------------------------------------------------------------------------------------------------------- choose


def encode_choices(
    config: Any, encoder: Encoder, examples: list[Example], choices: tuple[str, ...], problems: Problems
) -> tuple[list[Example], list[list[Segment]]]:
    """(examples, each one's chat with each choice as its answer, cut after it), without those that do not fit.

    `encoder` must label answer texts.
    """
    limit = context_length(config) or sys.maxsize

    def encode(example: Example) -> list[Segment]:
        segments = []
        for chat in encoder.chats([dataclasses.replace(example, assistant=choice) for choice in choices]):
            if isinstance(chat, ValueError):
                raise chat
            if len(chat.ids) > limit:
                raise ValueError(f"{len(chat.ids)} tokens, over the model's context of {limit}")
            end = int(chat.labels.nonzero()[0][-1]) + 1
            segments.append(Segment("chat", chat.ids[:end], chat.labels[:end]))
        return segments

    return encode_usable(examples, encode, problems)


def forward_rows(chats: list[Segment]) -> list[Segment]:
    """The rows that the model must read: one if the choices are single tokens after the same prompt, else all."""
    single = all(c.labels.sum() == 1 for c in chats) and len({c.ids[:-1].tobytes() for c in chats}) == 1
    return chats[:1] if single else chats


def forward_size(chats: list[Segment]) -> int:
    """The number of tokens in these rows when padded."""
    rows = forward_rows(chats)
    return len(rows) * max(len(row.ids) for row in rows)


@contextlib.contextmanager
def float32_logits(model: Any) -> Iterator[None]:
    """Computes logits in float32: in bfloat16, likelihoods of two choices are often the same number.

    Models on several devices and output layers with an adapter are left as they are, because those layers are wrapped.
    """
    layer = model.get_output_embeddings()
    half = type(layer) is torch.nn.Linear and layer.weight.dtype in (torch.bfloat16, torch.float16)
    if not half or getattr(model, "hf_device_map", None):
        yield
        return
    exact = copy.deepcopy(layer).float()
    exact.register_forward_pre_hook(lambda layer, inputs: (inputs[0].float(),))
    model.set_output_embeddings(exact)
    try:
        yield
    finally:
        model.set_output_embeddings(layer)


@torch.no_grad()
def choose(
    read: Callable[[list[Item]], torch.Tensor], choices: tuple[str, ...], batch: list[list[Segment]]
) -> list[Generation]:
    """The most likely of the choices for each example of a batch from `encode_choices`.

    `read(items)` returns the logits (N, V) at the labels of items, in their order. A choice's log-likelihood is
    Σ log p(token | all tokens before it) over its tokens, in nats. Raises UsageError if one is not finite.
    """
    rows = [forward_rows(chats) for chats in batch]
    labels = iter(read([tuple(row) for row in rows]).float().log_softmax(-1).cpu())  # N × (V,)
    generations = []
    for row, chats in zip(rows, batch, strict=True):
        if len(row) < len(chats):
            label = next(labels)
            sums = [float(label[c.ids[-1]]) for c in chats]
        else:
            sums = [sum(float(next(labels)[t]) for t in c.ids[c.labels]) for c in chats]
        if not all(map(math.isfinite, sums)):
            what = "the likelihoods of the choices are not finite"
            raise UsageError(f"{what}: the model is damaged, or needs --dtype float32")
        likelihoods = dict(zip(choices, sums, strict=True))
        generations.append(Generation(max(likelihoods, key=likelihoods.__getitem__), None, likelihoods))
    return generations
