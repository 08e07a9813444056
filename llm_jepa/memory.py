"""Command line of llm_jepa/large/memory.py: python -m llm_jepa.memory --help."""

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from llm_jepa.cli import Refusals, UsageError, flag, parse_flags, run_command
from llm_jepa.large.settings import LargeSettings
from llm_jepa.settings import BATCH

PLAN = "Memory plan"


@dataclass
class MemoryFlags(LargeSettings):
    """The flags of finetune8bh200.py, most of which have no effect on the memory, and those of this command."""

    tokens_per_batch: int = flag(
        0, "tokens in a micro-batch, views included, instead of --batch_size", BATCH, "--tokens"
    )
    gpus: str = flag("1,8,16", "numbers of GPUs, separated by commas", PLAN)
    json: bool = flag(False, "print one JSON object", PLAN)


def work(argv: list[str] | None) -> None:
    """Prints a plan. Raises UsageError for wrong flags, before torch is imported."""
    doc = ast.get_docstring(ast.parse(Path(__file__).with_name("large").joinpath("memory.py").read_text("utf-8")))
    s, given = parse_flags(MemoryFlags, doc or "", argv)
    gpus = [int(n) if n.strip().isdigit() else 0 for n in s.gpus.split(",")]
    wrong = Refusals(given)
    wrong.refuse(not s.model_name, "--model_name is missing")
    for name in ("lora_rank", "batch_size", "max_length", "save_total_limit"):
        wrong.refuse(getattr(s, name) < 1, f"--{name} {getattr(s, name)} is not positive")
    wrong.refuse(s.tokens_per_batch < 0, f"--tokens_per_batch {s.tokens_per_batch} is negative")
    wrong.only_if(s.lora, "load_in_4bit", "only with --lora")
    wrong.refuse(min(gpus) < 1, f"--gpus {s.gpus}: give positive numbers separated by commas")
    if wrong:
        raise UsageError("\n".join(wrong))
    from llm_jepa.large.memory import plan, plan_table

    found = plan(s, gpus)
    print(json.dumps(found) if s.json else plan_table(found))


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, or 2 for a wrong model or flag."""
    return run_command("memory", lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
