"""Generates with vLLM. `evaluate.py --engine vllm` starts it in an environment that has vLLM but not this project.

.venv-vllm/bin/python -I vllm_worker.py --versions      the versions of all installed packages as a JSON object
.venv-vllm/bin/python -I vllm_worker.py                 the protocol below, one JSON value per line

stdin   {"model": …, "dtype": …, …}                     arguments of vllm.LLM
stdout  {"ready": true}                                 when the model is loaded
stdin   {"stop_token_ids": […], "prompts": [[id, tokens, max new tokens], …]}
stdout  {"id": …, "tokens": […]}                        for each prompt when it is finished, in any order
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from typing import Any

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process and ends with it
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; on a CPU vLLM would otherwise take nearly all memory
}


def generate(llm: Any, request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Generates greedily for the request's prompts and sends each response as soon as it is finished."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # Only the given stop tokens end a response, as with the transformers engine.
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
            id_, prompt, _ = request["prompts"][int(output.request_id)]  # vLLM numbers requests in order of arrival
            if output.prompt_token_ids != prompt or output.outputs[0].finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM's request {output.request_id} is not the prompt of id {id_}, or was aborted")
            send({"id": id_, "tokens": list(output.outputs[0].token_ids)})


def main() -> None:
    if sys.argv[1:] == ["--versions"]:
        print(json.dumps({d.name.removesuffix("-cpu"): d.version for d in importlib.metadata.distributions()}))
        return
    # vLLM and its processes print to stdout, which must contain only the protocol's lines.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    arguments = json.loads(sys.stdin.readline())
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    llm = LLM(**arguments)
    send({"ready": True})
    generate(llm, json.loads(sys.stdin.readline()), send)


if __name__ == "__main__":
    main()
