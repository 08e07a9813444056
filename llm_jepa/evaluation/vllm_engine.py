"""vLLM as the engine of evaluate.py: prompts, stop tokens and scores stay here, vllm_worker.py makes the tokens.

vLLM wants other versions of torch and transformers than this project, so it lives in an environment of its own
(`bash setup.sh --vllm`) and answers from a process of its own. Only token ids go there and come back: prompts are the
same to the bit as with the transformers engine, and so is what is read from an answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.examples import Example
from llm_jepa.data.rendering import Renderer
from llm_jepa.evaluation.generation import Generation, answer_of, longest_answers, stop_ids
from llm_jepa.model import LOADING_ERRORS

HERE = Path(__file__).resolve().parent
WORKER = HERE / "vllm_worker.py"
INSTALL = "run `bash setup.sh --vllm`, or name the Python of an environment that has it in VLLM_PYTHON"
PATIENCE = 15  # seconds in which a worker ends by itself


def python() -> Path:
    """The interpreter of the environment that has vLLM."""
    return Path(os.environ.get("VLLM_PYTHON") or HERE.parents[1] / ".venv-vllm" / "bin" / "python")


def versions() -> dict[str, str]:
    """Versions of vllm, vllm_torch and vllm_transformers. Raises UsageError where vLLM is not installed."""
    try:
        command = [str(python()), "-I", str(WORKER), "--versions"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found = json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, ValueError):
        found = {}
    if "vllm" not in found:
        raise UsageError(f"--engine vllm: {python()} has no vLLM; {INSTALL}")
    return {name if name == "vllm" else f"vllm_{name}": version for name, version in found.items()}


def check_whole(name: str) -> None:
    """Raises UsageError for an adapter: vLLM's own adapters have no rows of added tokens."""
    if (Path(name) / "adapter_config.json").is_file():
        raise UsageError(f"--engine vllm: {name} is an adapter; give it merged (finetune.py --merge: {name}/merged)")


@dataclass(frozen=True)
class Described:
    """A model without its weights: what `generation` asks of one, and what vLLM is told of it."""

    name: str
    revision: str | None
    dtype: str
    config: Any
    generation_config: GenerationConfig

    @classmethod
    def read(cls, name: str, revision: str | None, dtype: str, renderer: Renderer) -> Described:
        """Raises UsageError where the configuration cannot be read or lacks tokens of the tokenizer."""
        try:
            config = AutoConfig.from_pretrained(name, revision=revision)
            try:
                generation = GenerationConfig.from_pretrained(name, revision=revision)
            except OSError:  # no such file: as transformers does
                generation = GenerationConfig.from_model_config(config)
        except LOADING_ERRORS as error:
            raise UsageError(f"--model_name {name} cannot be loaded: {first_line(error)}") from None
        tokens, rows = len(renderer.tokenizer), config.get_text_config().vocab_size
        if tokens > rows:  # the transformers engine draws rows for them at random
            raise UsageError(f"--engine vllm: {name} has {rows} embeddings for {tokens} tokens of its tokenizer")
        return cls(name, revision, dtype.removeprefix("torch."), config, generation)


class Worker:
    """vllm_worker.py, a JSON value a line both ways; as a context manager it ends with the block, however that ends."""

    def __init__(self) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-", suffix=".log", delete=False, errors="replace")
        self._keep_log = False
        try:
            # A session of its own: an interrupt is this process's, which then ends it with all that it has started.
            self._process = subprocess.Popen(
                [str(python()), "-I", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                text=True, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError:
            os.unlink(self._log.name)
            raise

        self._watch = threading.Thread(target=self._end_group, daemon=True)
        self._watch.start()

    def _end_group(self) -> None:
        """Ends what the worker leaves behind when it dies: with its pipe open, `hear` would wait for an end of file."""
        self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        for sent, seconds in ((0, 0 if kind else PATIENCE), (signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        self._watch.join()
        self._log.close()
        if not self._keep_log:
            os.unlink(self._log.name)

    def tell(self, value: Any) -> None:
        """Sends a line. Where nobody reads any more, `hear` says why."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next line's object. Raises OSError where the worker has ended or says something else."""
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
            raise self.failure(f"it ended with code {self._process.poll()}")
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self.failure(f"it said {line.strip()[:80]!r}, which is no JSON object")
        return value

    def failure(self, what: str) -> OSError:
        """An error that says what went wrong, what vLLM printed last, and where the rest of that is."""
        self._keep_log = True
        self._log.seek(0)
        printed = [line.strip() for line in self._log if line.strip()] or ["nothing"]
        return OSError(f"vLLM failed: {what}; it printed last: {printed[-1][:400]} (all of it: {self._log.name})")


@contextlib.contextmanager
def started(
    model: Described, renderer: Renderer, examples: list[Example], prompts: list[list[int]], s: Any
) -> Iterator[Callable[..., Iterator[list[tuple[Example, Generation]]]]]:
    """Starts vLLM for prompts given as token ids, waits until it has the model, and gives what answers them.

    That is a function as `collect` wants it, of the ids that are done and this process's share, which is all. It raises
    OSError where vLLM dies or answers what was not asked. Raises UsageError where vLLM cannot load the model.
    """
    rooms, stops = longest_answers(model, prompts, s.max_new_tokens), stop_ids(model, renderer)
    arguments = {
        "model": model.name, "revision": model.revision, "dtype": model.dtype,
        "tensor_parallel_size": s.tensor_parallel_size,
        "max_model_len": max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True)),
        "skip_tokenizer_init": True, "generation_config": "vllm",  # nothing of the model's own settings
        # On a CPU, which is for trying things, compiling costs more than it gains.
        "enforce_eager": not torch.cuda.is_available(),
    }  # fmt: skip
    with Worker() as worker:
        worker.tell(arguments)
        try:
            worker.hear()
        except OSError as error:
            raise UsageError(f"--model_name {model.name} cannot be loaded by vLLM: {error}") from None

        def answers(done: set[int], share: tuple[int, int]) -> Iterator[list[tuple[Example, Generation]]]:
            asked = list(zip(examples, prompts, rooms, strict=True))
            left = {e.id: (e, room) for e, _, room in asked if e.id not in done}
            wanted = [(e.id, prompt, room) for e, prompt, room in asked if e.id in left]
            worker.tell({"stop_token_ids": stops, "prompts": wanted})
            while left:
                reply = worker.hear()
                example, room = left.pop(reply.get("id"), (None, 0))
                tokens = reply.get("tokens")
                if example is None or not ended(tokens, reply.get("finish_reason"), stops, room):
                    raise worker.failure(f"it said {json.dumps(reply)[:200]}, which answers no prompt that is left")
                yield [(example, answer_of(renderer, tokens, stops))]

        yield answers


def ended(tokens: Any, reason: Any, stops: list[int], room: int) -> bool:
    """Whether tokens are an answer that ended as the transformers engine's do: at its first stop token, or full."""
    if not (isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens)):
        return False
    stopped = [token in stops for token in tokens]
    whole = reason == "stop" and stopped[-1] or reason == "length" and not stopped[-1] and len(tokens) == room
    return whole and not any(stopped[:-1]) and len(tokens) <= room
