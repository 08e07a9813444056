"""The README: its flag tables are the code's, its commands exist. Run as a script, this file rewrites the tables."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import finetune  # noqa: E402
import finetune8bh200  # noqa: E402
from llm_jepa.cli import build_parser, flag_table  # noqa: E402
from llm_jepa.scoring import tasks  # noqa: E402

SETTINGS = {"finetune": finetune.Settings, "evaluate": evaluate.Settings}
LARGE = "finetune8bh200"


def with_tables(text: str) -> str:
    """The README's text with its tables made anew."""
    tables = {name: flag_table(settings) for name, settings in SETTINGS.items()}
    tables[LARGE] = flag_table(finetune8bh200.LargeSettings, beyond=finetune.Settings)
    for name, table in tables.items():
        block = f"<!-- flags: {name} -->\n{table}<!-- end -->"
        text = re.sub(rf"<!-- flags: {name} -->\n.*?<!-- end -->", lambda _: block, text, flags=re.S)  # noqa: B023
    return text


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_flag_tables_are_current():
    assert readme() == with_tables(readme())
    for name, settings in SETTINGS.items():
        shown = readme().split(f"<!-- flags: {name} -->")[1].split("<!-- end -->")[0]
        missing = [o for a in build_parser(settings, "")._actions for o in a.option_strings if f"`{o}`" not in shown]
        assert set(missing) <= {"-h", "--help"}


def test_the_table_of_large_models_is_what_they_have_beyond_the_others():
    shown = readme().split(f"<!-- flags: {LARGE} -->")[1].split("<!-- end -->")[0]
    assert set(re.findall(r"`--(\w+)`", shown)) == {
        "gradient_checkpointing", "param_dtype", "sharding", "load_in_4bit", "optim", "keep_checkpoints"
    }  # fmt: skip


def test_defaults_of_zero_and_ways_to_say_no_are_shown():
    assert "| `--predictors` | `0` |" in readme() and "`--no-gradient_checkpointing`" in readme()
    assert "(default 0)" in build_parser(finetune.Settings, "").format_help()


def test_every_row_of_the_tables_has_three_cells():
    rows = [line for settings in SETTINGS.values() for line in flag_table(settings).splitlines() if line[:3] == "| `"]
    assert rows and all(len(re.split(r"(?<!\\)\|", row)) == 5 for row in rows)


def commands() -> list[list[str]]:
    """The README's indented commands of finetune.py and evaluate.py, line continuations joined."""
    text = re.sub(r"\\\n\s*", "", readme())
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line)[1:] for line in lines if line.startswith(("python finetune.py", "python evaluate.py"))]


def test_the_commands_of_the_scripts_are_accepted():
    found = commands()
    assert {c[0] for c in found} == {"finetune.py", "evaluate.py"}
    for script, *flags in found:
        module = {"finetune.py": finetune, "evaluate.py": evaluate}[script]
        settings, given = module.parse_flags(module.Settings, "", flags)
        if script == "evaluate.py":  # the run folder does not exist here
            given |= {"output_file"}
            settings = dataclasses.replace(settings, output_file="runs/mine/p.jsonl")
        module.check_settings(settings, given)


def test_the_table_of_datasets_is_the_codes():
    sys.path.insert(0, str(ROOT / "datasets"))
    import convert

    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in readme().splitlines() if re.match(r"\| `\w", line)]
    table = {row[0].strip("`"): row[1:] for row in rows if len(row) == 5}
    assert table.keys() == convert.DATASETS.keys()
    for name, (source, counts, scores, command) in table.items():
        for numbers in convert.DATASETS[name].counts.values():
            assert not numbers or " / ".join(map(str, numbers)) in counts, name
        task = tasks.TASKS.get(name)
        assert re.findall(r"`(\w+)`", scores) == list(task.scores if task else ()), name
        assert source and (f"DATASET={name} " in command) == (name not in ("synth", "paraphrase"))


def test_the_two_commands_stand_first():
    first = [line.strip().split("  ")[0] for line in readme().splitlines() if line.startswith("    ")][:2]
    assert first == ["bash run.sh run_jepa", "bash setup.sh --dev && .venv/bin/python -m pytest"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert first[1] in ci


def test_every_file_the_readme_names_exists():
    for name in set(re.findall(r"\b[\w./-]+\.(?:py|sh|md)\b", readme())):
        assert (ROOT / name).exists(), name


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_tables(readme()), encoding="utf-8")
