"""Answers prompts with a model: greedily, each on its own, rendered as in training. The answer is shown as it grows.

    python -m llm_jepa.chat runs/mine                                              one prompt after the other
    python -m llm_jepa.chat runs/mine --input_file mine_test.jsonl --task text     also scores known prompts
    python -m llm_jepa.chat runs/mine < prompt.txt                                 the complete input is one prompt

A prompt is entered with Return; pasted text can have several lines. Ctrl-C stops an answer, Ctrl-D ends the program. A
prompt that is the user turn of an example in --input_file is answered with that example's system turn. Its scores and
its answer follow on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from llm_jepa.cli import FlagParser, Refusals, UsageError, run_command
from llm_jepa.data.examples import Example, ExampleError, Problems, check_text, read_examples
from llm_jepa.evaluation.settings import EvaluationSettings, check_task
from llm_jepa.run_folder import run_settings


def prompts() -> Iterator[str]:
    """What is entered at the terminal, or else all of stdin."""
    if not sys.stdin.isatty():
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError:
            raise UsageError("stdin is not UTF-8") from None
        yield text.removesuffix("\n")
        return
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # otherwise each line of a paste would be a prompt
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if text.strip():
            yield text


def answer(model: Any, renderer: Any, example: Example, limit: int) -> Any:
    """The Generation for an example's prompt, printed as it grows. Raises ExampleError if it cannot be encoded."""
    from transformers import TextStreamer

    from llm_jepa.evaluation import generation

    pad_id, stops = renderer.tokenizer.pad_token_id, generation.stop_ids(model.generation_config, renderer)
    ids = generation.encode_prompts(model.config, renderer, [example], Problems())[1]  # of one prompt
    plan, (room,) = generation.make_plan(model, ids, pad_id), generation.max_lengths(model.config, ids, limit)
    shown = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    streamer = TextStreamer(renderer.tokenizer, skip_prompt=True, **shown)
    inputs = generation.prompt_inputs(model, ids, pad_id, None)
    out = generation.greedy(model, inputs, room, pad_id, plan.cache, streamer, eos_token_id=stops).sequences
    return generation.to_generation(renderer, out[0, len(ids[0]) :].tolist(), stops)


def to_example(text: str, system: str | None) -> Example:
    """A prompt without an answer. Raises ExampleError for text that no tokenizer accepts."""
    try:
        if system is not None:
            check_text(system, "the system turn", blank=True)
        return Example(system, check_text(text, "it"), "", "the prompt", 0)
    except ValueError as error:
        raise ExampleError(f"the prompt: {error}") from None


def chat(run: str, system: str | None, **flags: Any) -> None:
    """Answers prompts until the input ends. Raises UsageError for bad flags, and for a bad prompt from a file."""
    record, trained = run_settings(run) or ({}, {})
    names = ("plain", "trust_remote_code", "text_field", "code_field", "system")
    trained = {name: trained[name] for name in names if name in trained}
    s = EvaluationSettings(model_name=run, nosplit_data=True, **flags, **trained)
    refusals = Refusals({"allow_code_execution"} if s.allow_code_execution else set())
    task = check_task(s, refusals)
    refusals.refuse(bool(s.task) and not s.input_file, "--task: only with --input_file")
    if refusals:
        raise UsageError("\n".join(refusals))
    examples = read_examples(s.input_file, Problems(), s.fields) if s.input_file else []
    examples = [example for example in examples if example.has_chat]
    known = {example.user.strip(): example for example in reversed(examples)}  # the first one of each
    system = record.get("system_turn") if system is None else system
    from transformers.utils import logging as transformers_logging  # here, so that wrong flags are reported at once

    from llm_jepa.evaluation.generation import answer_limit
    from llm_jepa.evaluation.model import load
    from llm_jepa.evaluation.scores import scored_row, scorer, verdicts

    transformers_logging.disable_progress_bar()
    with scorer(task, s.spider_path, examples, s.allow_code_execution) if task else contextlib.nullcontext() as score:
        model, encoder = load(run, s)
        limit = s.max_new_tokens or answer_limit(encoder.renderer, examples)
        if at_terminal := sys.stdin.isatty():
            print(f"chat: {run}, system turn: {system!r}; Ctrl-D ends", file=sys.stderr)
        for text in prompts():
            try:
                example = known.get(text.strip()) or to_example(text, system)
                found = answer(model, encoder.renderer, example, limit)
            except (KeyboardInterrupt, ExampleError) as error:
                if not at_terminal:
                    raise
                print(f"\nchat: {str(error) or 'stopped'}", file=sys.stderr)
                continue
            if example.id:
                scores = verdicts(scored_row(example, found, score), task)
                print(f"chat: {scores}; the answer is {example.assistant!r}", file=sys.stderr)
            elif found.stop_reason == "length":
                print("chat: cut at the maximum length (--max_new_tokens)", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 answered, 1 failed, 2 wrong usage or data, 130 interrupted."""
    parser = FlagParser(prog="chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder, or another model's folder or hub name")
    parser.add_argument(
        "--system", metavar="TEXT", help="system turn; default: the run's, if all examples had the same"
    )
    parser.add_argument("--input_file", metavar="FILE", help="examples whose prompts are scored")
    parser.add_argument("--task", help="how they are scored, as evaluate.py's flag")
    parser.add_argument("--spider_path", default="spider_data.zip", help="task spider: as evaluate.py's flag")
    parser.add_argument("--allow_code_execution", action="store_true", help="task mbpp: as evaluate.py's flag")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="maximum length of an answer (default 128)")
    return run_command("chat", lambda: chat(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
