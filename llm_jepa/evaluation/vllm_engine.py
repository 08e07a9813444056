"""Generation with vLLM: this side renders prompts and reads responses, vllm_worker.py generates the tokens.

vLLM needs other versions of torch and transformers than this project, so it has its own environment
(`bash setup.sh --vllm`) and runs in its own process. Only token ids are exchanged: prompts, stop tokens and decoding
are those of the transformers engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
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


def describe(name: str, revision: str | None, dtype: str, renderer: Renderer) -> SimpleNamespace:
    """A model that vLLM loads: its name, revision, dtype, config and generation_config.

    Raises UsageError if it is an adapter or has fewer embeddings than its tokenizer has tokens.
    """
    if (Path(name) / "adapter_config.json").is_file():  # vLLM's adapters have no rows of added tokens
        raise UsageError(f"--engine vllm: {name} is an adapter; give it merged (finetune.py --merge: {name}/merged)")
    config = load_config(name, revision)
    try:
        generation = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # there is no such file; transformers does the same
        generation = GenerationConfig.from_model_config(config)
    tokens, rows = len(renderer.tokenizer), config.get_text_config().vocab_size
    if tokens > rows:  # the transformers engine draws them at random
        raise UsageError(f"--engine vllm: {name} has {rows} embeddings for {tokens} tokens of its tokenizer")
    return SimpleNamespace(name=name, revision=revision, dtype=dtype, config=config, generation_config=generation)


class Worker:
    """The process of vllm_worker.py, with one JSON value per line both ways. Ends with the block it is used in."""

    def __enter__(self) -> Worker:
        # With its own session, an interrupt reaches only this process, which then ends the worker's process group.
        self.process = subprocess.Popen(
            [interpreter(), "-I", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._end_children, daemon=True).start()
        return self

    def _end_children(self) -> None:
        # Processes that outlive the worker keep its pipe open, so `receive` would never see its end.
        self.process.wait()
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def __exit__(self, kind: Any, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if kind is not None:
            self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_END)
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def send(self, value: Any) -> None:
        """Sends a line. If nobody reads any more, `receive` raises."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next line's object. Raises OSError if the worker has ended or printed something else."""
        line = self.process.stdout.readline()
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
    with Worker() as worker:
        worker.send(arguments)
        try:
            worker.receive()
        except OSError as error:
            raise UsageError(f"--model_name {model.name} cannot be loaded by vLLM: {error}") from None

        def responses(done: set[int], share: tuple[int, int]) -> Responses:
            left = {e.id: (e, p, room) for e, p, room in zip(examples, prompts, rooms, strict=True) if e.id not in done}
            worker.send({"stop_token_ids": stops, "prompts": [(i, p, room) for i, (_, p, room) in left.items()]})
            while left:
                reply = worker.receive()
                example, _, _ = left.pop(reply["id"])
                yield [(example, to_generation(renderer, reply["tokens"], stops))]

        yield responses
