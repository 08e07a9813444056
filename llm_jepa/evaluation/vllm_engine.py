"""Generation with vLLM: this side renders prompts and reads responses, vllm_worker.py generates the tokens.

vLLM needs other versions of torch and transformers than this project, so it has its own environment
(`bash setup.sh --vllm`) and runs in its own process. Only token ids are exchanged: prompts, stop tokens and decoding
are those of the transformers engine.
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example
from llm_jepa.data.rendering import Renderer
from llm_jepa.evaluation.generation import Responses, max_lengths, stop_ids, to_generation
from llm_jepa.model import load_config

HERE = Path(__file__).resolve().parent
WORKER = HERE / "vllm_worker.py"
SECONDS_TO_END = 15


def interpreter() -> str:
    """The Python of the environment that has vLLM."""
    return os.environ.get("VLLM_PYTHON") or str(HERE.parents[1] / ".venv-vllm" / "bin" / "python")


def versions() -> dict[str, str]:
    """Versions of vllm, vllm_torch and vllm_transformers. Raises UsageError if vLLM is not installed."""
    try:
        command = [interpreter(), "-I", str(WORKER), "--versions"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found = json.loads(done.stdout)
        return {"vllm": found["vllm"]} | {f"vllm_{name}": found[name] for name in ("torch", "transformers")}
    except (OSError, ValueError, KeyError):
        how = "run `bash setup.sh --vllm`, or set VLLM_PYTHON to the Python of an environment that has it"
        raise UsageError(f"--engine vllm: {interpreter()} has no vLLM; {how}") from None


def describe(name: str, revision: str | None, dtype: str) -> SimpleNamespace:
    """A model that vLLM loads: its name, revision, dtype, config and generation_config.

    Raises UsageError if it has no config, as adapters: vLLM would load them without the embeddings of added tokens.
    """
    config = load_config(name, revision)
    try:
        generation = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # there is no such file; transformers does the same
        generation = GenerationConfig.from_model_config(config)
    return SimpleNamespace(name=name, revision=revision, dtype=dtype, config=config, generation_config=generation)


@contextlib.contextmanager
def start_worker() -> Iterator[subprocess.Popen]:
    """The process of vllm_worker.py, which exchanges one JSON value per line. It ends with the block."""
    # With its own session, an interrupt reaches only this process, which then ends the worker's process group.
    process = subprocess.Popen(
        [interpreter(), "-I", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        yield process
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(SECONDS_TO_END)


def send(process: subprocess.Popen, value: Any) -> None:
    """Sends a line. If the worker has ended, `receive` raises."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(value) + "\n")
        process.stdin.flush()


def receive(process: subprocess.Popen) -> dict[str, Any]:
    """The next line's object. Raises OSError if the worker has ended or printed something else."""
    line = process.stdout.readline()
    try:
        return json.loads(line)
    except ValueError:
        reason = f"unexpected output {line.strip()[:80]!r}" if line else "it ended; its messages are above"
        raise OSError(f"vLLM failed: {reason}") from None


@contextlib.contextmanager
def started(
    model: SimpleNamespace, renderer: Renderer, examples: list[Example], prompts: list[list[int]],
    max_new_tokens: int, tensor_parallel_size: int,
) -> Iterator[Callable[..., Responses]]:  # fmt: skip
    """Starts vLLM and loads the model. Yields a function of `done` and `share` as in `generation.respond`.

    Raises UsageError if vLLM cannot load the model; the function raises OSError if vLLM fails later.
    """
    rooms, stops = max_lengths(model.config, prompts, max_new_tokens), stop_ids(model.generation_config, renderer)
    arguments = {
        "model": model.name, "revision": model.revision, "dtype": model.dtype,
        "tensor_parallel_size": tensor_parallel_size,
        "max_model_len": max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True)),
        "skip_tokenizer_init": True, "generation_config": "vllm",  # not the model's own settings
        "enforce_eager": not torch.cuda.is_available(),  # compiling on a CPU costs more than it gains
    }  # fmt: skip
    with start_worker() as worker:
        send(worker, arguments)
        try:
            receive(worker)
        except OSError as error:
            raise UsageError(f"--model_name {model.name} cannot be loaded by vLLM: {error}") from None

        def responses(done: set[int], share: tuple[int, int]) -> Responses:
            left = {e.id: (e, p, room) for e, p, room in zip(examples, prompts, rooms, strict=True) if e.id not in done}
            send(worker, {"stop_token_ids": stops, "prompts": [(i, p, room) for i, (_, p, room) in left.items()]})
            while left:
                reply = receive(worker)
                example, _, _ = left.pop(reply["id"])
                yield [(example, to_generation(renderer, reply["tokens"], stops))]

        yield responses
