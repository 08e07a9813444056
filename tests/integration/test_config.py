"""--config: YAML files, run folders, bad files, and the recipes."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import EXAMPLES, MODEL, ROOT, call, read_json, train, write_rows

import finetune
from llm_jepa.cli import parse_flags
from llm_jepa.evaluation.settings import EvaluationSettings
from llm_jepa.large.settings import LargeSettings, check_large_settings
from llm_jepa.settings import check_settings

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def resolve(*argv: object) -> dict:
    """The settings that args.json would have."""
    return dataclasses.asdict(check_settings(*parse_flags(finetune.Settings, "", [str(a) for a in argv])))


def test_file_gives_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "train_file: t.jsonl\nmodel_name: 'no'  # text\nlearning_rate: 2e-4\neval_file: e\neval_strategy: no\n"
        "lora: true\npredictors: 2\ntrainall: true\nadditive_mask: false\nsystem: null\nrevision:\n"
    )
    flags = "--train_file t.jsonl --model_name no --eval_file e --eval_strategy no --predictors 2 --train_all"
    found = resolve("--config", file, "--learning_rate", "1e-3", "--no-lora", "--lbd", 2)
    assert found == resolve(*shlex.split(flags), "--learning_rate", "1e-3", "--lbd", 2)
    assert resolve("--config", file) == resolve(*shlex.split(flags), "--learning_rate", "2e-4", "--lora")


RUNS = [
    "--jepa_loss clip --predictors 2 --lm_labels all --layout separate --nitp --nitp_lbd 0.5",
    "--additive_mask --jepa_l2 --eval_file e --save_best",
    "--eval_file e --eval_strategy no --save_strategy steps --streaming --max_steps 3 --text_field a --code_field b",
    "--lora --merge --unmask_assistant_special_tokens --last_token -2 --tokens_per_batch 9",
    "--val_fraction 0.1 --eval_strategy steps --stp patch --stp_warmup 0.1 --plain --keep_checkpoints",
]


@pytest.mark.parametrize("flags", RUNS)
def test_settings_of_a_run_folder_are_those_of_its_resume_and_defaults_of_another_run(flags, tmp_path):
    usual = ("--train_file", "t.jsonl", "--model_name", "m")
    first = resolve(*usual, *flags.split(), "--output_dir", tmp_path, "--overwrite")
    (tmp_path / "args.json").write_text(json.dumps(first | {"of_another_version": 1}))
    assert resolve("--resume", tmp_path) == first | {"resume": True, "overwrite": False}
    for path in (tmp_path, tmp_path / "args.json"):
        assert resolve("--config", path) == resolve(*usual, *flags.split())
    changes = ("--regular", "--lm_labels", "answer", "--layout", "packed")
    changed = resolve("--config", tmp_path, *changes)
    assert {name for name in first if first[name] != changed[name]} <= {
        "regular", "lm_labels", "layout", "additive_mask", "output_dir", "overwrite"}  # fmt: skip
    if "eval_" not in flags:  # a run without held-out examples had no evaluations
        assert resolve("--config", tmp_path, "--val_fraction", 0.1)["eval_strategy"] == "epoch"


@pytest.mark.parametrize("script", ["finetune", "finetune8bh200", "evaluate"])
@pytest.mark.parametrize(
    ("line", "parts"),
    [("modelname: m", "run.yaml:2 modelname model_name"),
     ("attn_implementation: [a, b]", "run.yaml:2 attn_implementation"),
     ("batch_size: two", "run.yaml:2 batch_size two"),
     ("batch_size: 1.5", "run.yaml:2 batch_size 1.5"),
     ("plain: 5", "run.yaml:2 plain 5"),
     ("dtype: int8", "run.yaml:2 dtype int8"),
     ("config: other.yaml", "run.yaml:2 config"),
     ("batch_size: 2\nbatch_size: 3", "run.yaml:3 batch_size"),
     ("- batch_size", "run.yaml"),
     ("batch_size: {", "run.yaml")],
    ids=str,
)  # fmt: skip
def test_error_names_file_line_and_key(script, line, parts, tmp_path):
    (tmp_path / "run.yaml").write_text(f"# a run\n{line}\n")
    done = call(script, "--config", tmp_path / "run.yaml")
    assert done.code == 2 and all(part in done.err for part in parts.split()), done.err
    assert done.err.count("\n") == 1


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "args.json", tmp_path / "none.yaml"):
        done = call("finetune", "--config", path)
        assert done.code == 2 and str(path) in done.err and done.err.count("\n") == 1


def test_a_run_folder_is_evaluated_as_it_was_trained(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"ask": "a", "sql": "b"}, {"ask": "c", "sql": "dd"}])
    fields = ("--text_field", "ask", "--code_field", "sql", "--system", "Write SQL.")
    run = train(rows, tmp_path / "run", *fields, "--regular", "--max_steps", 1)
    found, _ = parse_flags(EvaluationSettings, "", ["--config", str(run), "--system", "Write."])
    assert (found.model_name, found.text_field, found.code_field, found.system) == (str(run), "ask", "sql", "Write.")
    done = call("evaluate", "--config", run, "--input_file", rows, "--task", "text", "--max_new_tokens", 2)
    assert done.code == 0 and read_json(run / "eval" / "rows" / "metrics.json")["settings"]["model_name"] == str(run)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(recipe: Path, tmp_path):
    run, rows = tmp_path / "run", write_rows(tmp_path / "rows.jsonl", EXAMPLES)
    script = re.search(r"(\S+)\.py --config", recipe.read_text())[1]
    call(script, "--config", recipe, "--train_file", rows, "--model_name", MODEL, "--output_dir", run, "--max_steps", 2,
         code=0)  # fmt: skip
    recorded, given = read_json(run / "args.json"), parse_flags(finetune.Settings, "", ["--config", str(recipe)])[0]
    own = {"train_file", "model_name"}
    for line in recipe.read_text().splitlines():
        name = line.partition(":")[0]
        assert line[0] == "#" or name in own or recorded[name] == getattr(given, name), line
    assert read_json(run / "run.json")["steps"] == 2


def test_optimizer_that_one_gpu_resolved_is_resolved_again(tmp_path):
    given = LargeSettings(model_name=str(ROOT / "models/tiny"), train_file="a.jsonl", optim="adamw_bnb_8bit")
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(given)))
    settings, names = parse_flags(LargeSettings, "", ["--config", str(tmp_path)])
    assert check_large_settings(settings, names, several=True).optim == "adamw_torch_fused"
