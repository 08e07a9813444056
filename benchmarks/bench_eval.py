"""Times generation for the same prompts: one at a time, in padded batches, with transformers' continuous batching, as
evaluate.py does it, and with vLLM, whose start does not count, if `setup.sh --vllm` has installed it.

    python benchmarks/bench_eval.py --model_name runs/RUN --input_file datasets/synth_test.jsonl --json eval.json

Use a trained model; one that never stops only measures --max_new_tokens. The exit code is 1 if the responses differ.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from timing import flag_parser, interleave, percentiles, report
from transformers import ContinuousBatchingConfig, GenerationConfig

import evaluate
from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.evaluation import generation, vllm_engine
from llm_jepa.evaluation.settings import EvaluationSettings

Texts = dict[int, str]  # responses by the id of their example


def main() -> int:
    """Returns 1 if the responses of the arms differ."""
    parser = flag_parser(__doc__)
    parser.add_argument("--model_name", required=True, help="trained model or run folder")
    parser.add_argument("--input_file", required=True, help="examples with the prompts")
    names = ("one at a time", "padded batches", "continuous batching", "evaluate.py", "vLLM")
    parser.add_argument("--arms", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--rows", type=int, default=256, help="number of examples (default 256)")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts per batch (default 64)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of the longest response (default 128)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each arm is timed (default 5)")
    args = parser.parse_args()
    settings = EvaluationSettings(model_name=args.model_name, input_file=args.input_file, task="text")
    model, encoder = evaluate.load(args.model_name, settings)
    examples = read_examples(args.input_file, Problems())[: args.rows]
    examples, prompts = generation.encode_prompts(model.config, encoder.renderer, examples, Problems())
    stops, pad = generation.stop_ids(model.generation_config, encoder.renderer), encoder.renderer.tokenizer.pad_token_id
    greedy = GenerationConfig(do_sample=False, max_new_tokens=args.max_new_tokens, eos_token_id=stops, pad_token_id=pad)

    def texts(rows: list[list[int]]) -> Texts:
        """The responses with these tokens, each up to its first stop token."""
        answers = {}
        for example, row in zip(examples, rows, strict=True):
            end = next((t + 1 for t, token in enumerate(row) if token in stops), len(row))
            answers[example.id] = generation.to_generation(encoder.renderer, row[:end], stops).text
        return answers

    def padded_batches(batch_size: int) -> Texts:
        """`generate` on left-padded batches in file order."""
        rows = []
        for begin in range(0, len(prompts), batch_size):
            inputs = generation.prompt_inputs(model, prompts[begin : begin + batch_size], pad, None)
            out = generation.greedy(model, inputs, args.max_new_tokens, pad, True, eos_token_id=stops).sequences
            rows += out[:, inputs["input_ids"].shape[1] :].tolist()
        return texts(rows)

    def continuous_batching() -> Texts:
        """transformers' continuous batching, with batch_size tokens per step on a CPU."""
        # On a CPU the default cache uses 60 % of all memory, and 128 examples took 7 to 43 s instead of 1.2 s.
        blocks = -(-(max(map(len, prompts)) + args.max_new_tokens) // ContinuousBatchingConfig().page_size)
        small = {"num_blocks": args.batch_size * blocks, "max_batch_tokens": args.batch_size}
        sizes = ContinuousBatchingConfig(**(small if model.device.type == "cpu" else {}))
        # Its thread is not in the caller's inference mode and cannot change tensors created there.
        with torch.inference_mode(False), mock.patch.object(model, "generation_config", GenerationConfig()):
            found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=sizes)
        return texts([answer.generated_tokens for answer in found.values()])

    def ours() -> Texts:
        """evaluate.py's generation."""
        sizes = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
        batches = generation.generate(model, encoder.renderer, examples, **sizes)
        return {example.id: answer.text for batch in batches for example, answer in batch}

    def vllm() -> Texts:
        """evaluate.py --engine vllm, which starts a process each time."""
        described = vllm_engine.describe(args.model_name, None, "float32" if model.device.type == "cpu" else "auto")
        with vllm_engine.started(described, encoder.renderer, examples, prompts, args.max_new_tokens, 1) as respond:
            begin = time.perf_counter()
            answers = {example.id: answer.text for batch in respond(set(), (0, 1)) for example, answer in batch}
            vllm_seconds.append(time.perf_counter() - begin)
        return answers

    vllm_seconds: list[float] = []
    every = (lambda: padded_batches(1), lambda: padded_batches(args.batch_size), continuous_batching, ours, vllm)
    arms: dict[str, Callable[[], Texts]] = {n: arm for n, arm in zip(names, every, strict=True) if n in args.arms}
    skipped = []
    if "vLLM" in arms:
        try:
            vllm_engine.versions()
        except UsageError as error:
            del arms["vLLM"]
            skipped.append({"arm": "vLLM", "skipped": str(error)})
    if not arms:
        report(args, args.input_file, skipped)
        return 0
    answers: dict[str, Texts] = {}

    def respond(name: str) -> None:
        answers[name] = arms[name]()

    with torch.inference_mode():
        times = interleave({name: partial(respond, name) for name in arms}, args.repeats, warm=("vLLM",))
    if vllm_seconds:
        times["vLLM"] = vllm_seconds  # without its start, in which it runs the model
    seconds = {name: percentiles(own) for name, own in times.items()}
    first = next(iter(arms))  # one at a time, if it is timed
    expected, one = answers[first], seconds[first]["p50"]
    results = [
        {
            "arm": name, "examples/s": len(examples) / times["p50"], f"× {first}": one / times["p50"], **times,
            "characters": len("".join(answers[name].values())),
            "differ": sum(answers[name][i] != text for i, text in expected.items()),
        }
        for name, times in seconds.items()
    ]  # fmt: skip
    report(args, args.input_file, [*results, *skipped], parameters=model.num_parameters(), dtype=str(model.dtype))
    # Other kernels and lower precision change some tokens.
    return int(model.dtype == torch.float32 and any(row["differ"] for row in results if row["arm"] != "vLLM"))


if __name__ == "__main__":
    sys.exit(main())
