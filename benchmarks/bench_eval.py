"""Times generation for the same prompts: one at a time, in padded batches, with transformers' continuous batching, and
as evaluate.py does it.

    python benchmarks/bench_eval.py --model_name runs/RUN --input_file datasets/synth_test.jsonl --json eval.json

Use a trained model; one that never stops only measures --max_new_tokens.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import interleave, percentiles, table, write
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
from llm_jepa.data.examples import Example, Problems, read_examples  # noqa: E402
from llm_jepa.evaluation import generation  # noqa: E402
from llm_jepa.evaluation.settings import EvaluationSettings  # noqa: E402
from llm_jepa.files import sha256  # noqa: E402


def padded_batches(
    model: Any, renderer: Any, examples: list[Example], prompts: list[list[int]], batch_size: int, max_new_tokens: int
) -> dict[int, str]:
    """`generate` on left-padded batches in file order. Returns responses by id."""
    tokenizer, stops, answers = renderer.tokenizer, generation.stop_ids(model.generation_config, renderer), {}
    for begin in range(0, len(examples), batch_size):
        inputs = generation.padded(prompts[begin : begin + batch_size], tokenizer.pad_token_id, model.device, "left")
        rows = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for example, row in zip(examples[begin:], rows[:, inputs["input_ids"].shape[1] :].tolist(), strict=False):
            answers[example.id] = text(tokenizer, row, stops)
    return answers


def text(tokenizer: Any, tokens: list[int], stops: list[int]) -> str:
    """A response's text up to the first stop token."""
    end = next((t for t, token in enumerate(tokens) if token in stops), len(tokens))
    return tokenizer.decode(tokens[:end], skip_special_tokens=True)


def continuous_batching(
    model: Any, renderer: Any, examples: list[Example], prompts: list[list[int]], batch_size: int, max_new_tokens: int
) -> dict[int, str]:
    """transformers' continuous batching, with batch_size tokens per step on a CPU. Returns responses by id."""
    tokenizer, stops = renderer.tokenizer, generation.stop_ids(model.generation_config, renderer)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    # On a CPU the default cache takes 60 % of all memory, and 128 examples 7 to 43 s instead of 1.2 s.
    blocks = -(-(max(map(len, prompts)) + max_new_tokens) // ContinuousBatchingConfig().page_size)
    small = {"num_blocks": batch_size * blocks, "max_batch_tokens": batch_size}
    sizes = ContinuousBatchingConfig(**(small if model.device.type == "cpu" else {}))
    # Its thread is not in the caller's inference mode and cannot change tensors created there.
    with torch.inference_mode(False), generation.default_generation_config(model):
        found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=sizes)
    rows = [answer.generated_tokens for answer in found.values()]
    return {example.id: text(tokenizer, row, stops) for example, row in zip(examples, rows, strict=True)}


def ours(model: Any, renderer: Any, examples: list[Example], batch_size: int, max_new_tokens: int) -> dict[int, str]:
    """evaluate.py's generation. Returns responses by id."""
    batches = generation.generate(model, renderer, examples, batch_size, max_new_tokens)
    return {example.id: answer.text for batch in batches for example, answer in batch}


def main() -> int:
    """Returns 1 if the responses of the arms differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True, help="trained model or run folder")
    parser.add_argument("--input_file", required=True, help="examples with the prompts")
    parser.add_argument("--rows", type=int, default=256, help="number of examples (default 256)")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts per batch (default 64)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of the longest response (default 128)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each arm is timed (default 5)")
    parser.add_argument("--json", help="file for the results and their provenance")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    settings = EvaluationSettings(model_name=args.model_name, input_file=args.input_file, task="text")
    model, encoder = evaluate.load(args.model_name, settings)
    renderer = encoder.renderer
    examples = read_examples(args.input_file, Problems())[: args.rows]
    examples, prompts = generation.encode_prompts(model.config, renderer, examples, Problems())
    usual = partial(padded_batches, model, renderer, examples, prompts, max_new_tokens=args.max_new_tokens)
    with torch.inference_mode():
        arms = {
            "one at a time": partial(usual, batch_size=1),
            "padded batches": partial(usual, batch_size=args.batch_size),
            "continuous batching": partial(
                continuous_batching, model, renderer, examples, prompts, args.batch_size, args.max_new_tokens
            ),
            "evaluate.py": partial(ours, model, renderer, examples, args.batch_size, args.max_new_tokens),
        }
        answers = {name: arm() for name, arm in arms.items()}
        seconds = {name: percentiles(times) for name, times in interleave(arms, args.repeats).items()}
    expected, one = answers["one at a time"], seconds["one at a time"]["p50"]
    results = [
        {"arm": name, "examples/s": len(examples) / times["p50"], "× one at a time": one / times["p50"], **times,
         "characters": len("".join(answers[name].values())),
         "differ": sum(answers[name][i] != text for i, text in expected.items())}
        for name, times in seconds.items()
    ]  # fmt: skip
    print(table(results))
    shape = {"parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype), **vars(args)}
    write(args.json, {args.input_file: sha256(args.input_file)}, shape=shape, results=results)
    return int(any(row["differ"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
