"""Flags: stable names, defaults, default folders, and refusals that mention every wrong flag at once."""

import json
import shutil

import pytest
from conftest import GOLDEN, MODEL, ROOT, call
from safetensors.torch import load_file, save_file

import finetune
from llm_jepa.cli import UsageError, parse_flags
from llm_jepa.losses import CHAT_LOSSES
from llm_jepa.reports.comparison import METHOD_SETTINGS, is_regular
from llm_jepa.reports.model_card import effective_settings
from llm_jepa.reports.results import describe_method, method_name
from llm_jepa.settings import CHAT_FLAGS

# Flags of the reference implementation, of finetune.py and of evaluate.py.
FINETUNE = """train_file eval_file data_file eval_split split_seed model_name output_dir max_length batch_size
grad_accum learning_rate num_epochs finetune_seed regular predictors lbd gamma last_token lora lora_rank pretrain plain
train_all trainall additive_mask jepa_l2 jepa_mse infonce front_pred reverse_pred
jepa_ratio track_flop same_flop use_default_data_collator unmask_assistant_special_tokens""".split()
EVALUATE = """model_name original_model_name input_file output_file nosplit_data split_tune_untune max_new_tokens
max_examples plain startswith statswith test_size split_seed process_split
unmask_assistant_special_tokens""".split()


def resolve(*argv: object) -> finetune.Settings:
    s, given = parse_flags(finetune.Settings, "", ["--train_file", "t.jsonl", "--model_name", "m", *map(str, argv)])
    return finetune.check_settings(s, given)


@pytest.mark.parametrize(("script", "names"), [("finetune", FINETUNE), ("evaluate", EVALUATE)])
def test_flags_of_the_reference_implementation_exist(script, names):
    shown = call(script, "--help").out
    assert [name for name in names if f"--{name}" not in shown] == []


def test_default_folder_depends_on_every_setting_that_changes_numbers():
    arms = ["", "--regular", "--lbd 1", "--predictors 2", "--learning_rate 1", "--lm_labels all", "--num_epochs 9",
            "--infonce", "--lora", "--plain", "--finetune_seed 3", "--batch_size 9", "--jepa_ratio 0.5",
            "--last_token -1", "--pretrain", "--additive_mask", "--stp patch", "--jepa_loss clip", "--nitp",
            "--nitp --nitp_layer 1", "--center", "--shuffle_pairs", "--stop_gradient code"]  # fmt: skip
    folders = [resolve(*arm.split()).output_dir for arm in arms]
    assert len({*folders}) == len(arms) and folders[0] == "runs/t-m-jepa-lbd0.1-k0-lr2e-05-s42"


SAME = [
    ("--jepa_l2", "--jepa_loss l2"), ("--jepa_mse", "--jepa_loss mse"), ("--infonce", "--jepa_loss infonce"),
    ("--additive_mask", "--layout additive"),
    ("--use_default_data_collator", "--lm_labels answer_text"),
    ("--use_default_data_collator --lm_labels answer_text", "--lm_labels answer_text"),
    ("--unmask_assistant_special_tokens", "--lm_labels reference"),
    ("--unmask_assistant_special_tokens --train_all", "--train_all --lm_labels reference"),
    ("", "--jepa_loss cosine --lm_labels answer --layout packed"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "others"), SAME)
def test_flags_of_the_reference_implementation_are_values_of_other_flags(flags, others):
    assert resolve(*flags.split()) == resolve(*others.split())


def test_description_names_what_changes_the_loss():
    flags = "--jepa_loss clip --center --stop_gradient code --negatives_queue 9 --nitp --nitp_targets random"
    text = describe_method(resolve(*flags.split()))
    for part in ("τ = 0.1", "centered", "Code view", "9 earlier pairs", "random targets"):
        assert part in text and part not in describe_method(resolve())
    assert "0.7 λ for this loss, 0.3 λ for SIGReg" in describe_method(resolve("--sigreg", 0.3))


@pytest.mark.parametrize("name", CHAT_LOSSES)
def test_loss_of_the_chat_counts_as_an_auxiliary_loss_everywhere(name):
    (title, formula), first = CHAT_LOSSES[name], CHAT_FLAGS[name][0]
    value = ["1"] if first == f"{name}_lbd" else [*formula][:1] if isinstance(formula, dict) else []
    s = resolve("--regular", "--gradient_stats", 1, f"--{first}", *value)
    assert [term.name for term in finetune.auxiliary_terms(s)] == [name]
    assert title in describe_method(s) and name.upper() in method_name(vars(s))
    assert f"{name}_lbd" in dict(effective_settings(s)) and f"{name}_lbd" not in dict(effective_settings(resolve()))
    assert not is_regular(vars(s) | {"pretrained": False}) and set(CHAT_FLAGS[name]) <= METHOD_SETTINGS
    assert resolve("--regular", "--gamma", 0, f"--{first}", *value)
    with pytest.raises(UsageError, match="--gamma 0"):
        resolve("--regular", "--gamma", 0, f"--{first}", *value, f"--{name}_lbd", 0)
    with pytest.raises(UsageError, match=f"--{name}_lbd -1"):
        resolve(f"--{name}_lbd", -1)


OUT_OF_RANGE = (
    "--predictors 11 --last_token 0 --jepa_ratio 1.5 --lbd inf --sigreg 1 --max_steps 0 --learning_rate nan "
    "--batch_size 0 --finetune_seed 4294967296 --adam_beta2 2 --temperature 0 --early_stopping_patience 0"
)
# Flags, and the flags that the message must mention (by default the first one).
REFUSED = {
    f"{OUT_OF_RANGE} --jepa_loss clip --eval_file e": OUT_OF_RANGE,
    "--regular --lbd 1 --infonce": "--lbd --infonce --regular",
    "--regular --reference_grad_scale": "--reference_grad_scale --regular",
    "--reference_grad_scale --grad_accum 1": "--reference_grad_scale --grad_accum",
    "--jepa_l2 --jepa_mse": "--jepa_l2 --jepa_mse",
    "--jepa_loss clip --infonce": "--jepa_loss --infonce",
    "--jepa_loss vicreg --batch_size 1": "--jepa_loss --batch_size",
    "--center --batch_size 1": "--center --batch_size",
    "--shuffle_pairs --batch_size 1": "--shuffle_pairs --batch_size",
    "--temperature 0.1": "--temperature --jepa_loss",
    "--negatives_queue 9 --jepa_loss vicreg": "--negatives_queue --jepa_loss",
    "--nitp_layer 1 --nitp_targets random --nitp_lbd 2": "--nitp_layer --nitp_targets --nitp_lbd --nitp",
    "--gamma 0 --lbd 0 --nitp --nitp_lbd 0": "--gamma",
    "--gradient_stats 10 --torch_compile": "--gradient_stats --torch_compile",
    "--gradient_stats 10 --track_flop": "--gradient_stats --track_flop",
    "--gradient_stats 10 --gamma 0": "--gradient_stats",
    "--gradient_stats 10 --regular": "",
    "--front_pred": "--front_pred --predictors",
    "--stp geodesic --stp_max_length 1": "--stp_max_length --stp",
    "--train_all --lm_labels answer": "--lm_labels",
    "--use_default_data_collator --lm_labels reference": "--lm_labels --use_default_data_collator",
    "--additive_mask --layout packed": "--additive_mask --layout",
    "--layout additive --regular": "",
    "--tokens_per_row 9 --layout separate": "",
    "--tokens_per_row 64 --attn_implementation flash_attention_2": "",
    "--attn_implementation flash_attention_2 --additive_mask": "",
    "--lora_rank 4 --merge": "--lora_rank --merge --lora",
    "--lora --pretrain": "--lora --pretrain",
    "--data_file x": "--train_file --data_file",
    "--eval_split 0.1": "",
    "--val_fraction 0.1 --eval_file e": "--val_fraction --eval_file",
    "--eval_generate 3 --eval_strategy no --eval_file e": "",
    "--eval_on_start --sample_generations 1 --save_best --early_stopping_patience 1": "",
    "--eval_file e --save_best --save_strategy steps --save_steps 5": "--save_strategy --save_steps --save_best",
    "--eval_file e --eval_generate 2 --sample_generations 3": "--sample_generations --eval_generate",
    "--eval_file e --eval_generate 2 --task texts": "--task text",
    "--eval_file e --task text --spider_path x": "--task --spider_path --eval_generate",
    "--run_name a --project b": "--run_name --project --report_to",
    "--eval_steps 5 --eval_file e": "",
    "--max_steps 5 --num_epochs 1": "",
    "--resume --overwrite": "--resume --overwrite",
    "--dry_run 2 --overwrite": "--overwrite --dry_run",
    "--track_flop --torch_compile": "--track_flop --torch_compile",
    "--attn_implementation flex_attention": "--attn_implementation flex_attention",
    "--lr_scheduler_type polynomial --learning_rate 1e-8": "--lr_scheduler_type --learning_rate",
    "--report_to excel": "",
    "--optim magic": "",
    f"--model_name {ROOT} --revision abc": "--revision",
    "--output_dir runs/own --overwrite --model_name runs/own": "--overwrite --model_name",
    "--output_dir runs/own --overwrite --train_file runs/own/../own/rows.jsonl": "--overwrite --train_file",
    "--output_dir runs/own --overwrite --eval_file runs/own/eval/rows.jsonl": "--overwrite --eval_file",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_wrong_or_contradictory_flags_are_refused(flags):
    with pytest.raises(UsageError) as error:
        resolve(*flags.split())
    mentioned = REFUSED[flags].split() or flags.split()[:1]
    assert all(name in str(error.value) for name in mentioned), str(error.value)


def test_all_mistakes_are_reported_at_once_with_exit_code_2(tmp_path):
    done = call("finetune", "--predictors", 12, "--regular", "--lbd", 1, "--merge", "--output_dir", tmp_path / "run")
    assert done.code == 2 and done.out == "" and not (tmp_path / "run").exists()
    for name in ("--model_name", "--train_file", "--predictors", "--lbd", "--merge"):
        assert name in done.err


@pytest.mark.parametrize(
    ("flags", "mentioned"),
    [("--learning-rate 1", "--learning-rate --learning_rate"),
     ("--lora_rnk 8 --epochs 2", "--lora_rnk --lora_rank --epochs --num_epochs"),
     ("--zzz", "--zzz --help"),
     ("--layout pakced", "--layout pakced packed")],
)  # fmt: skip
def test_unknown_flag_or_value_is_one_line_with_similar_flags(flags, mentioned):
    done = call("finetune", *flags.split())
    assert done.code == 2 and done.err.count("\n") == 1
    assert all(word in done.err for word in mentioned.split()), done.err


# What is removed from a model folder (or the folder), and what the message must mention.
FOLDERS = {
    "folder": "model",
    "*": "tokenizer",
    "tokenizer* special_tokens_map.json": "tokenizer",
    "chat_template.jinja": "--plain",
    "model.safetensors": "--pretrain",
    "a layer's parameters": "--model_name",
    "all but the adapter": "export merged",
}


@pytest.mark.parametrize("missing", FOLDERS)
def test_incomplete_model_folder_is_refused(missing, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    path = model / "model.safetensors"
    if missing == "folder":
        shutil.rmtree(model)
    elif missing == "a layer's parameters":
        save_file({k: v for k, v in load_file(path).items() if "layers.1.mlp" not in k}, path, {"format": "pt"})
    elif missing == "all but the adapter":
        path.unlink()
        (model / "config.json").unlink()
        (model / "adapter_config.json").write_text(json.dumps({}))
    else:
        for file in (file for pattern in missing.split() for file in model.glob(pattern)):
            file.unlink()
    done = call("finetune", "--train_file", GOLDEN / "regex_rows.jsonl", "--model_name", model, "--output_dir",
                tmp_path / "run")  # fmt: skip
    assert done.code == 2 and str(model) in done.err and FOLDERS[missing] in done.err, done.err
    assert "Traceback" not in done.err and not (tmp_path / "run").exists()
