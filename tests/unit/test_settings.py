"""Flags: names people know, defaults, and refusals that name everything at once."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import GOLDEN, ROOT, call

import evaluate
import finetune
from llm_jepa.cli import UsageError, build_parser, parse_flags

OLD_FLAGS = """train_file eval_file data_file eval_split split_seed model_name output_dir max_length batch_size
grad_accum learning_rate num_epochs finetune_seed regular predictors lbd gamma last_token lora lora_rank pretrain plain
train_all trainall additive_mask jepa_l2 jepa_mse infonce front_pred reverse_pred
jepa_ratio track_flop same_flop""".split()


def resolve(*argv: object) -> finetune.Settings:
    base = ["--train_file", "t.jsonl", "--model_name", "m"]
    s, given = parse_flags(finetune.Settings, "", base + [str(a) for a in argv])
    return finetune.check_settings(s, given)


def test_old_flags_keep_their_names():
    options = build_parser(finetune.Settings, "").format_help()
    assert [f for f in OLD_FLAGS if f"--{f}" not in options] == []
    options = build_parser(evaluate.Settings, "").format_help()
    for name in "model_name original_model_name input_file output_file nosplit_data split_tune_untune max_new_tokens " \
                "max_examples plain startswith statswith test_size split_seed process_split".split():  # fmt: skip
        assert f"--{name}" in options


def test_defaults_are_those_people_know():
    s = resolve()
    assert (s.eval_split, s.split_seed, s.max_length, s.batch_size, s.grad_accum) == (0.2, 42, 512, 4, 4)
    assert (s.learning_rate, s.lbd, s.gamma, s.predictors, s.lora_rank) == (2e-5, 0.1, 1.0, 0, 16)
    assert (s.lm_labels, s.layout, s.eval_strategy) == ("answer", "packed", "no")
    assert s.output_dir == "runs/t-m-jepa-lbd0.1-k0-lr2e-05-s42"


def test_two_settings_never_share_a_default_folder():
    seen = {}
    for flags in ((), ("--regular",), ("--lbd", 1), ("--predictors", 2), ("--learning_rate", 1), ("--lm_labels", "all"),
                  ("--num_epochs", 9), ("--infonce",), ("--lora",), ("--plain",), ("--finetune_seed", 3),
                  ("--batch_size", 9), ("--jepa_ratio", 0.5), ("--last_token", -1), ("--pretrain",)):  # fmt: skip
        folder = resolve(*flags).output_dir
        assert folder not in seen, (flags, seen[folder])
        seen[folder] = flags


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--regular", "--lbd", 1, "--infonce"), ["--lbd, --infonce", "--regular"]),
        (("--jepa_l2", "--jepa_mse"), ["--jepa_l2"]),
        (("--predictors", 11), ["--predictors 11"]),
        (("--predictors", -1), ["--predictors -1"]),
        (("--front_pred",), ["--front_pred", "--predictors"]),
        (("--lora_rank", 4, "--merge"), ["--lora_rank, --merge", "--lora"]),
        (("--lora", "--pretrain"), ["--lora"]),
        (("--additive_mask", "--layout", "packed"), ["--additive_mask", "--layout packed"]),
        (("--additive_mask", "--regular"), ["--additive_mask"]),
        (("--layout", "additive", "--regular"), ["--layout additive"]),
        (("--tokens_per_row", 9, "--layout", "separate"), ["--tokens_per_row"]),
        (("--data_file", "x"), ["--train_file", "--data_file"]),
        (("--eval_split", 0.1), ["--eval_split"]),
        (("--eval_generate", 5), ["--eval_generate", "held-out"]),
        (("--eval_steps", 5, "--eval_file", "e"), ["--eval_steps"]),
        (("--max_steps", 5, "--num_epochs", 1), ["--max_steps"]),
        (("--train_all", "--lm_labels", "answer"), ["--lm_labels answer"]),
        (("--last_token", 0), ["--last_token 0"]),
        (("--jepa_ratio", 1.5), ["--jepa_ratio 1.5"]),
        (("--learning_rate", "nan"), ["--learning_rate nan"]),
        (("--lbd", "inf"), ["--lbd"]),
        (("--lbd", -1), ["--lbd -1"]),
        (("--batch_size", 0), ["--batch_size 0"]),
        (("--resume", "--overwrite"), ["--resume"]),
        (("--regular", "--gamma", 0), ["--gamma 0"]),
        (("--model_name", ROOT, "--revision", "abc"), ["--revision"]),
        (("--dry_run", 2, "--overwrite"), ["--overwrite", "--dry_run"]),
        (("--report_to", "excel"), ["--report_to excel"]),
        (("--lr_scheduler_type", "stairs"), ["--lr_scheduler_type stairs"]),
        (("--optim", "magic"), ["--optim magic"]),
        (("--val_fraction", 0.1, "--eval_file", "e"), ["--val_fraction"]),
        (("--track_flop", "--torch_compile"), ["--track_flop"]),
        (("--max_steps", 0), ["--max_steps 0"]),
        (("--finetune_seed", -1), ["--finetune_seed -1"]),
        (("--split_seed", -1, "--val_fraction", 0.1), ["--split_seed -1"]),
        (("--eval_split", 1.5), ["--eval_split 1.5"]),
        (("--adam_beta2", 2), ["--adam_beta2 2"]),
        (("--warmup_steps", "inf"), ["--warmup_steps"]),
        (("--infonce", "--batch_size", 1), ["--infonce", "--batch_size 1"]),
        (("--eval_generate", 3, "--eval_strategy", "no", "--eval_file", "e"), ["--eval_generate"]),
        (("--tokens_per_row", 64, "--attn_implementation", "flash_attention_2"), ["--tokens_per_row"]),
        (("--attn_implementation", "flash_attention_2", "--additive_mask"), ["--attn_implementation"]),
        (("--reference_grad_scale", "--regular"), ["--reference_grad_scale", "--regular"]),
        (("--reference_grad_scale", "--grad_accum", 1), ["--reference_grad_scale", "--grad_accum 1"]),
    ],
)
def test_wrong_and_inapplicable_flags_are_refused_by_name(flags, named):
    with pytest.raises(UsageError) as error:
        resolve(*flags)
    assert all(name in str(error.value) for name in named), str(error.value)


def test_everything_wrong_is_named_at_once_and_exit_code_is_2(tmp_path):
    done = call("finetune", "--predictors", 12, "--regular", "--lbd", 1, "--merge", "--output_dir", tmp_path / "run")
    assert done.code == 2 and done.out == "" and not (tmp_path / "run").exists()
    for name in ("--model_name is missing", "--train_file", "--predictors 12", "--lbd", "--merge"):
        assert name in done.err


def test_an_unknown_flag_or_an_abbreviation_is_refused():
    for flag in ("--lamda", "--model"):
        done = call("finetune", flag, 1)
        assert done.code == 2 and flag in done.err


@pytest.mark.parametrize("kind", ["missing", "empty", "no tokenizer", "no template", "no weights"])
def test_a_model_folder_that_lacks_something_says_what(tmp_path, kind):
    import shutil

    model = tmp_path / "model"
    if kind != "missing":
        model.mkdir()
    if kind in ("no tokenizer", "no template", "no weights"):
        shutil.copytree(GOLDEN / "models" / "llama3", model, dirs_exist_ok=True)
    patterns = {"no tokenizer": "tokenizer*", "no template": "chat_template.jinja", "no weights": "*.safetensors"}
    for path in model.glob(patterns.get(kind, "nothing")):
        path.unlink()
    if kind == "no tokenizer":
        (model / "special_tokens_map.json").unlink()
    done = call("finetune", "--train_file", GOLDEN / "regex_rows.jsonl", "--model_name", model, "--output_dir",
                tmp_path / "run")  # fmt: skip
    assert done.code == 2 and str(model) in done.err and not (tmp_path / "run").exists()
    expected = {"missing": "no such folder", "empty": "tokenizer", "no tokenizer": "tokenizer",
                "no template": "--plain", "no weights": "--pretrain"}  # fmt: skip
    assert expected[kind] in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("settings", [finetune.Settings, evaluate.Settings])
def test_every_flag_is_explained(settings):
    assert all(len(f.metadata["help"]) > 8 for f in dataclasses.fields(settings))


@pytest.mark.parametrize("kind", ["missing", "cut short"])
def test_weights_that_are_missing_or_damaged_are_refused_and_never_made_up(tmp_path, kind):
    import shutil

    from safetensors.torch import load_file, save_file

    model = shutil.copytree(GOLDEN / "models" / "llama3", tmp_path / "model")
    path = model / "model.safetensors"
    if kind == "missing":
        kept = {k: v for k, v in load_file(path).items() if "layers.1.mlp" not in k}
        save_file(kept, path, metadata={"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:1000])
    done = call("finetune", "--train_file", GOLDEN / "regex_rows.jsonl", "--model_name", model, "--output_dir",
                tmp_path / "run")  # fmt: skip
    assert done.code == 2 and f"--model_name {model}" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_spellings_of_one_setting_share_a_default_folder():
    assert resolve("--additive_mask").output_dir == resolve("--layout", "additive").output_dir
    assert (
        resolve("--lm_labels", "answer").output_dir == resolve("--layout", "packed").output_dir == resolve().output_dir
    )


def test_flash_kernels_get_one_row():
    """Packed segments are told apart by flash attention in a batch of one row alone."""
    assert finetune.is_flash(resolve("--attn_implementation", "flash_attention_2"))
    assert not finetune.is_flash(resolve("--attn_implementation", "sdpa"))


@pytest.mark.parametrize("flag", ["--finetune_seed", "--split_seed"])
def test_a_seed_must_fit_into_32_bits(flag):
    held_out = ["--val_fraction", "0.1"] if flag == "--split_seed" else []
    resolve(flag, 2**32 - 1, *held_out)
    with pytest.raises(UsageError, match=rf"{flag} 4294967296 is not below 2\*\*32"):
        resolve(flag, 2**32, *held_out)


@pytest.mark.parametrize(
    ("flags", "name"),
    [(("--model_name", "runs/own"), "model_name"), (("--train_file", "runs/own/../own/rows.jsonl"), "train_file"),
     (("--eval_file", "runs/own/eval/rows.jsonl"), "eval_file")],
)  # fmt: skip
def test_overwrite_keeps_what_is_read(flags, name):
    resolve(*flags, "--output_dir", "runs/other", "--overwrite")
    resolve(*flags, "--output_dir", "runs/own")
    with pytest.raises(UsageError, match=f"--overwrite would remove --{name} runs/own"):
        resolve(*flags, "--output_dir", "runs/own", "--overwrite")


def test_an_adapter_is_no_model_to_train(tmp_path, regex_rows):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(GOLDEN / "models" / "llama3").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    done = call("finetune", "--train_file", regex_rows, "--model_name", tmp_path, "--dry_run", 1)
    assert done.code == 2 and "is an adapter; train from its merged model (--merge)" in done.err


def test_one_label_does_not_show_that_logits_can_be_sliced():
    import torch

    class Head:
        slices = False

        def losses(self, *args):
            raise AssertionError("there is nothing to compare")

    head = Head()
    finetune.check_slices(torch.nn.Linear(1, 1), head, {"label_ids": torch.zeros(1)})
    assert head.slices is False
