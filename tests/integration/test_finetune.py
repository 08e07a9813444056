"""finetune.py as a user runs it: whole small runs, their weights, logs and run folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, ROOT, call, dry_run, message_row, same_weights, weights, write_rows
from safetensors import SafetensorError
from safetensors.torch import save_file

import finetune
from llm_jepa.files import read_json, sha256
from llm_jepa.model import load_tokenizer
from llm_jepa.run_folder import whole_checkpoints

ROWS = [message_row(f"lines with the number {i} and word {i * i}", f"({i}).*[{i * i}]") for i in range(24)]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "words_train.jsonl", ROWS)


def train_to_the_end(data: Path, out: Path, *flags: object, model: str = "llama3") -> SimpleNamespace:
    return call("finetune", "--train_file", data, "--model_name", GOLDEN / "models" / model, "--output_dir", out,
                "--batch_size", 4, "--grad_accum", 2, "--learning_rate", "1e-3", *flags)  # fmt: skip


def train(data: Path, out: Path, *flags: object, model: str = "llama3", code: int = 0) -> Path:
    done = train_to_the_end(data, out, *flags, model=model)
    assert done.code == code, done.err
    return out


def metrics(run: Path, key: str = "total") -> list[dict]:
    return [x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in x]


JEPA = ("--predictors", 2, "--lbd", 1)


def test_lambda_zero_and_ratio_zero_are_regular_bit_for_bit_and_cost_no_tokens(data, tmp_path):
    regular = train(data, tmp_path / "regular", "--regular", "--num_epochs", 1)
    zero = train(data, tmp_path / "zero", "--predictors", 2, "--lbd", 0, "--num_epochs", 1)
    never = train(data, tmp_path / "never", *JEPA, "--jepa_ratio", 0, "--num_epochs", 1)
    jepa = train(data, tmp_path / "jepa", *JEPA, "--num_epochs", 1)
    for other in (zero, never):
        same_weights(regular, other)
        assert [m["tokens"] for m in metrics(other)] == [m["tokens"] for m in metrics(regular)]
        assert [m["total"] for m in metrics(other)] == [m["total"] for m in metrics(regular)]
    assert not weights(jepa)["lm_head.weight"].equal(weights(regular)["lm_head.weight"])


@pytest.mark.parametrize("flags", [("--regular",), JEPA, (*JEPA, "--jepa_ratio", 0.5)], ids=["regular", "jepa", "ld"])
def test_micro_batches_and_accumulation_do_not_change_loss_or_weights(data, tmp_path, flags):
    runs_ = [
        train(data, tmp_path / f"{b}x{a}", *flags, "--max_steps", 4, "--batch_size", b, "--grad_accum", a)
        for b, a in ((8, 1), (4, 2), (1, 8))
    ]
    for other in runs_[1:]:
        same_weights(runs_[0], other, rtol=1e-3, atol=2e-5)
        for x, y in zip(metrics(runs_[0]), metrics(other), strict=True):
            assert x["total"] == pytest.approx(y["total"], rel=1e-5)
            assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
            assert (x["tokens"], x.get("pairs")) == (y["tokens"], y.get("pairs"))


def test_the_last_short_batch_counts_its_examples_once(tmp_path):
    """10 rows in batches of 4 × 2: two steps an epoch, of 8 and of 2 rows, each normalised by its own counts."""
    data = write_rows(tmp_path / "ten.jsonl", ROWS[:10])
    run = train(data, tmp_path / "run", *JEPA, "--num_epochs", 2)
    assert [m["pairs"] for m in metrics(run)] == [8, 2, 8, 2]


def test_every_epoch_takes_every_row_once_in_another_order(tmp_path):
    data = write_rows(tmp_path / "growing.jsonl", [message_row("a", "b " * (1 + i)) for i in range(24)])
    run = train(data, tmp_path / "run", "--regular", "--num_epochs", 2)
    labels = [m["label_tokens"] for m in metrics(run)]
    assert sum(labels[:3]) == sum(labels[3:]) and labels[:3] != labels[3:]


@pytest.mark.parametrize("layout", ["separate", "additive"])
def test_layouts_train_to_the_same_weights(data, tmp_path, layout):
    packed = train(data, tmp_path / "packed", *JEPA, "--max_steps", 3)
    other = train(data, tmp_path / layout, *JEPA, "--max_steps", 3, "--layout", layout)
    same_weights(packed, other, rtol=1e-3, atol=2e-5)


def test_logged_loss_is_the_formula(data, tmp_path):
    run = train(data, tmp_path / "run", *JEPA, "--gamma", 0.5, "--lbd", 2, "--max_steps", 2)
    for m in metrics(run):
        assert m["total"] == pytest.approx(0.5 * m["lm_loss"] + 2 * m["jepa_loss"], rel=1e-5)
        assert m["jepa_loss"] == pytest.approx(1 - m["cosine"], abs=1e-5)
        assert {"spread", "tokens", "padding", "pairs", "tokens_per_second", "grad_norm", "learning_rate"} <= m.keys()


def test_loss_dropout_skips_pairs_by_seed_epoch_and_row(data, tmp_path):
    half = train(data, tmp_path / "half", *JEPA, "--jepa_ratio", 0.5, "--num_epochs", 2)
    full = train(data, tmp_path / "full", *JEPA, "--num_epochs", 2)
    pairs = [m["pairs"] for m in metrics(half)]
    assert 10 < sum(pairs) < 38 and sum(pairs[:3]) != 24
    assert sum(m["tokens"] for m in metrics(half)) < sum(m["tokens"] for m in metrics(full))
    again = train(data, tmp_path / "again", *JEPA, "--jepa_ratio", 0.5, "--num_epochs", 2, "--batch_size", 8,
                  "--grad_accum", 1)  # fmt: skip
    assert [m["pairs"] for m in metrics(again)] == pairs
    other = train(data, tmp_path / "other", *JEPA, "--jepa_ratio", 0.5, "--num_epochs", 2, "--finetune_seed", 7)
    assert [m["pairs"] for m in metrics(other)] != pairs


# ---------------------------------------------------------------------------------------------- resuming


def stop_at(monkeypatch, step: int) -> None:
    """Makes training end like a kill: an error right behind the given step's checkpoint."""
    real = finetune.Watch.on_log

    def on_log(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == step + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune.Watch, "on_log", on_log)


@pytest.mark.parametrize(
    "flags",
    [JEPA, (*JEPA, "--lora", "--jepa_ratio", 0.5), ("--regular", "--stp", "patch", "--stp_warmup", 0.9)],
    ids=["full", "lora", "stp"],
)
def test_six_steps_stop_and_resume_to_eight_equal_eight_straight(data, tmp_path, monkeypatch, flags):
    flags = (*flags, "--max_steps", 8, "--save_strategy", "steps", "--save_steps", 6)
    straight = train(data, tmp_path / "straight", *flags)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        stopped = train(data, tmp_path / "stopped", *flags, code=130)
    assert read_json(stopped / "run.json")["status"] == "interrupted"
    train(data, stopped, *flags, "--resume")
    name = "adapter_model.safetensors" if "--lora" in flags else "model.safetensors"
    first, second = weights(straight, name), weights(stopped, name)
    assert all(first[k].equal(second[k]) for k in first)
    assert [m["step"] for m in metrics(stopped)] == list(range(1, 9))
    assert [m["total"] for m in metrics(stopped)] == [m["total"] for m in metrics(straight)]
    record = read_json(stopped / "run.json")
    assert record["status"] == "finished" and len(record["attempts"]) == 2
    assert record["tokens"] == read_json(straight / "run.json")["tokens"]


def test_resume_takes_the_last_whole_checkpoint(data, tmp_path, monkeypatch):
    flags = (*JEPA, "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2)
    straight = train(data, tmp_path / "straight", *flags)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        run = train(data, tmp_path / "run", *flags, code=130)
    assert [p.name for p in whole_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    # As a kill in the middle of saving leaves it: a file cut short.
    torn = run / "checkpoint-4" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert [p.name for p in whole_checkpoints(run)] == ["checkpoint-2"]
    done = train_to_the_end(data, run, *flags, "--resume")
    assert done.code == 0 and "not whole, left aside: checkpoint-4" in done.err
    assert "resuming from checkpoint-2" in done.err
    same_weights(straight, run)


def test_a_disk_that_fills_up_while_saving_leaves_the_last_checkpoint(data, tmp_path, monkeypatch):
    flags = (*JEPA, "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2)
    straight = train(data, tmp_path / "straight", *flags)
    real = finetune.JepaTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if "checkpoint-4" in folder:
            raise OSError(28, "No space left on device")
        real(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.JepaTrainer, "_save_optimizer_and_scheduler", full)
        done = train_to_the_end(data, tmp_path / "run", *flags)
    assert done.code == 1 and "No space left" in done.err
    run = tmp_path / "run"
    assert read_json(run / "run.json")["status"] == "failed"
    assert [p.name for p in whole_checkpoints(run)] == ["checkpoint-2"]
    train(data, run, *flags, "--resume")
    same_weights(straight, run)


def test_kill_minus_nine_and_resume(data, tmp_path):
    flags = ["--train_file", data, "--model_name", GOLDEN / "models" / "llama3", "--lbd", 1, "--predictors", 1,
             "--grad_accum", 1, "--max_steps", 30, "--save_strategy", "steps", "--save_steps", 1]  # fmt: skip
    command = [sys.executable, ROOT / "finetune.py", *flags, "--output_dir", tmp_path / "run"]
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.time() + 120
    while not whole_checkpoints(tmp_path / "run") and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_json(tmp_path / "run" / "run.json")["status"] == "running"
    refused = call("finetune", *flags, "--output_dir", tmp_path / "run")
    assert refused.code == 2 and "--resume" in refused.err
    assert call("finetune", *flags, "--output_dir", tmp_path / "run", "--resume").code == 0
    assert call("finetune", *flags, "--output_dir", tmp_path / "straight").code == 0
    same_weights(tmp_path / "straight", tmp_path / "run")


def test_resume_with_other_settings_names_them(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        run = train(data, tmp_path / "run", *JEPA, "--max_steps", 6, code=130)
    before = (run / "args.json").read_bytes()
    other = ("--learning_rate", "2e-3", "--predictors", 2, "--lbd", 4, "--max_steps", 6, "--resume")
    done = train_to_the_end(data, run, *other)
    assert done.code == 2 and "--lbd 1.0 (now 4.0)" in done.err and "--learning_rate 0.001 (now 0.002)" in done.err
    assert "--predictors" not in done.err and (run / "args.json").read_bytes() == before
    data.write_text(data.read_text().replace("number", "figure"))
    done = train_to_the_end(data, run, *JEPA, "--max_steps", 6, "--resume")
    assert done.code == 2 and "data" in done.err


def test_a_run_killed_in_its_last_save_is_finished_without_another_step(data, tmp_path, monkeypatch):
    flags = (*JEPA, "--max_steps", 8, "--save_strategy", "steps", "--save_steps", 4, "--lr_scheduler_type", "constant")
    straight = train(data, tmp_path / "straight", *flags)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            finetune.JepaTrainer,
            "save_model",
            lambda self, folder=None, _internal_call=False: (
                killed(self) if folder is None else super(finetune.JepaTrainer, self).save_model(folder, _internal_call)
            ),
        )
        run = train(data, tmp_path / "run", *flags, code=130)
    train(data, run, *flags, "--resume")
    same_weights(straight, run)
    first, second = (read_json(r / "run.json") for r in (straight, run))
    assert (second["steps"], second["tokens"]) == (first["steps"], first["tokens"]) == (8, first["tokens"])
    assert [m["step"] for m in metrics(run)] == list(range(1, 9))


def test_resume_needs_a_run_folder(data, tmp_path):
    done = train_to_the_end(data, tmp_path / "typo", *JEPA, "--resume")
    assert done.code == 2 and "typo" in done.err and not (tmp_path / "typo").exists()


def test_a_run_resumes_under_another_spelling_of_its_folder(data, tmp_path, monkeypatch):
    flags = (*JEPA, "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        run = train(data, tmp_path / "run", *flags, code=130)
    moved = run.rename(tmp_path / "moved")
    train(data, f"{tmp_path}/./moved", *flags, "--resume")
    assert read_json(moved / "run.json")["steps"] == 4


def test_tokens_are_counted_whatever_the_log_interval_and_over_a_resume(data, tmp_path, monkeypatch):
    flags = (*JEPA, "--max_steps", 8, "--save_strategy", "steps", "--save_steps", 4)
    every = train(data, tmp_path / "every", *flags)
    some = train(data, tmp_path / "some", *flags, "--logging_steps", 5)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        stopped = train(data, tmp_path / "stopped", *flags, code=130)
    train(data, stopped, *flags, "--resume", "--logging_steps", 3)
    counted = [read_json(r / "run.json")["tokens"] for r in (every, some, stopped)]
    assert counted == [sum(m["tokens"] for m in metrics(every))] * 3


# ------------------------------------------------------------------------------------------- kinds of models


def tied(tmp_path: Path) -> Path:
    """The llama3 model with its output layer tied to its embeddings, as small published models are."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = GOLDEN / "models" / "llama3"
    config = AutoConfig.from_pretrained(source, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_lambda_zero_is_regular_bit_for_bit_under_lora_with_tied_embeddings(data, tmp_path):
    flags = ("--model_name", tied(tmp_path), "--lora", "--max_steps", 3)
    regular = train(data, tmp_path / "regular", *flags, "--regular")
    zero = train(data, tmp_path / "zero", *flags, "--predictors", 2, "--lbd", 0)
    first, second = (weights(r, "adapter_model.safetensors") for r in (regular, zero))
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    assert [m["total"] for m in metrics(zero)] == [m["total"] for m in metrics(regular)]


def test_lora_with_tied_embeddings_merges_to_what_it_was(data, tmp_path):
    run = train(data, tmp_path / "run", *JEPA, "--lora", "--merge", "--max_steps", 3, "--model_name", tied(tmp_path))
    scores = []
    for model in (run, run / "merged"):
        out = tmp_path / f"{model.name}-answers" / "predictions.jsonl"
        done = call("evaluate", "--model_name", model, "--input_file", data, "--task", "text", "--output_file", out,
                    "--max_new_tokens", 8)  # fmt: skip
        assert done.code == 0, done.err
        scores.append(out.read_text())
    assert scores[0] == scores[1]


def test_lora_reaches_joined_projections(data, tmp_path):
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    AutoTokenizer.from_pretrained(GOLDEN / "models" / "chatml").save_pretrained(tmp_path / "phi")
    config = Phi3Config(vocab_size=531, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=10)  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi")
    run = train(data, tmp_path / "run", *JEPA, "--lora", "--max_steps", 1, "--model_name", tmp_path / "phi")
    names = " ".join(weights(run, "adapter_model.safetensors"))
    assert all(part in names for part in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))


@pytest.mark.parametrize("model", ["llama3", "chatml", "google_gemma"])
def test_lora_trains_the_predictor_rows_and_merges(data, tmp_path, model):
    run = train(data, tmp_path / "run", *JEPA, "--lora", "--lora_rank", 4, "--merge", "--max_steps", 3, model=model)
    adapter = weights(run, "adapter_model.safetensors")
    rows = next(v for k, v in adapter.items() if "trainable_tokens" in k)
    base = weights(GOLDEN / "models" / model)["model.embed_tokens.weight"]
    ids = load_tokenizer(finetune.Settings(model_name=str(run))).convert_tokens_to_ids(
        ["<|predictor_1|>", "<|predictor_2|>"]
    )
    assert rows.shape[0] == 2 and not torch.allclose(rows, base[ids])
    merged = weights(run / "merged")["model.embed_tokens.weight"]
    torch.testing.assert_close(merged[sorted(ids)], rows)
    test = write_rows(tmp_path / "test.jsonl", ROWS[:4])
    answers = []
    for name in (run, run / "merged"):
        out = tmp_path / f"answers-{name.name}" / "predictions.jsonl"
        done = call("evaluate", "--model_name", name, "--input_file", test, "--task", "text", "--output_file", out,
                    "--max_new_tokens", 8)  # fmt: skip
        assert done.code == 0, done.err
        answers.append([json.loads(line)["prediction"] for line in out.read_text().splitlines()])
    assert answers[0] == answers[1]


def test_pretrain_starts_from_random_weights_of_the_seed(data, tmp_path):
    flags = ("--pretrain", "--regular", "--max_steps", 1, "--learning_rate", "1e-9")
    one = weights(train(data, tmp_path / "one", *flags, "--finetune_seed", 1))
    two = weights(train(data, tmp_path / "two", *flags, "--finetune_seed", 2))
    base = weights(GOLDEN / "models" / "llama3")
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(one[key], two[key]) and not torch.allclose(one[key], base[key])


@pytest.mark.parametrize("flags", [(), ("--trainall",)])
def test_plain_runs_and_evaluates(data, tmp_path, flags):
    run = train(data, tmp_path / "run", "--plain", *flags, "--lbd", 1, "--max_steps", 2)
    test = write_rows(tmp_path / "words_test.jsonl", ROWS[:3])
    done = call("evaluate", "--model_name", run, "--input_file", test, "--task", "text", "--plain", "--statswith",
                "--max_new_tokens", 4)  # fmt: skip
    assert done.code == 0, done.err
    assert read_json(run / "eval" / "words" / "metrics.json")["score"] == "startswith"


def test_an_adapter_without_chat_format_trains_what_an_output_layer_has_for_the_added_tokens(data, tmp_path):
    from transformers import AutoTokenizer

    run = train(data, tmp_path / "run", "--plain", "--lora", *JEPA, "--merge", "--max_steps", 3)
    tokenizer = AutoTokenizer.from_pretrained(run)
    base, merged = weights(GOLDEN / "models" / "llama3"), weights(run / "merged")
    labels = tokenizer.convert_tokens_to_ids(["<|perception|>", "<|eot_id|>"])
    predictors = tokenizer.convert_tokens_to_ids(["<|predictor_1|>", "<|predictor_2|>"])
    inputs = [labels[0], *predictors]  # nothing comes behind the end-of-turn token
    for name, trained in (("lm_head.weight", labels), ("model.embed_tokens.weight", inputs)):
        changed = (base[name] != merged[name][: len(base[name])]).any(dim=1).nonzero()[:, 0].tolist()
        assert set(changed) == set(trained), name
    test = write_rows(tmp_path / "words_test.jsonl", ROWS[:3])
    answers = []
    for model in (run, run / "merged"):
        out = tmp_path / model.name / "p.jsonl"
        done = call("evaluate", "--model_name", model, "--input_file", test, "--task", "text", "--plain",
                    "--output_file", out, "--max_new_tokens", 8)  # fmt: skip
        assert done.code == 0, done.err
        answers.append([json.loads(line)["prediction"] for line in out.read_text().splitlines()])
    assert answers[0] == answers[1]


def test_an_output_layer_with_a_bias_takes_no_rows_of_an_adapter(data, tmp_path):
    from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models" / "llama3")
    tokenizer.save_pretrained(tmp_path / "phi")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "phi")
    where = ("--train_file", data, "--model_name", tmp_path / "phi", "--output_dir", tmp_path / "run")
    done = call("finetune", *where, "--lora", "--plain", *JEPA)
    assert done.code == 2 and "--lora: not with --plain for a model whose output layer has a bias" in done.err
    assert call("finetune", *where, "--lora", *JEPA, "--max_steps", 1).code == 0


def test_a_model_without_room_for_the_new_tokens_grows(data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = GOLDEN / "models" / "llama3"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    small = tmp_path / "small"
    raw = json.loads((source / "tokenizer.json").read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["id"] < 520]
    tokenizer.save_pretrained(small)
    (small / "tokenizer.json").write_text(json.dumps(raw))
    config = json.loads((small / "tokenizer_config.json").read_text())
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        config.pop(key, None)
    (small / "tokenizer_config.json").write_text(json.dumps(config))
    model.resize_token_embeddings(520)
    model.save_pretrained(small)
    done = call("finetune", "--train_file", data, "--model_name", small, "--output_dir", tmp_path / "run", *JEPA,
                "--max_steps", 1)  # fmt: skip
    assert done.code == 0, done.err
    assert weights(tmp_path / "run")["model.embed_tokens.weight"].shape[0] == 530


def test_the_saved_model_stops_where_it_was_trained_to(data, tmp_path):
    run = train(data, tmp_path / "run", "--regular", "--max_steps", 1, model="chatml")
    end = load_tokenizer(finetune.Settings(model_name=str(run))).convert_tokens_to_ids("<|im_end|>")
    assert end in json.loads((run / "generation_config.json").read_text())["eos_token_id"]


def test_a_model_with_unusual_generation_settings_is_saved_or_refused_before_training(data, tmp_path):
    model = shutil.copytree(GOLDEN / "models" / "chatml", tmp_path / "model")
    settings = {"eos_token_id": 2}
    unused = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    (model / "generation_config.json").write_text(json.dumps(settings | unused | {"do_sample": False}))
    run = train(data, tmp_path / "run", "--regular", "--max_steps", 1, model=model)
    assert not unused.keys() & json.loads((run / "generation_config.json").read_text()).keys()
    (model / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True, "temperature": 0.6}))
    run = train(data, tmp_path / "sampled", "--regular", "--max_steps", 1, model=model)
    assert json.loads((run / "generation_config.json").read_text())["temperature"] == 0.6

    (model / "generation_config.json").write_text(json.dumps(settings | {"pad_token_id": -1}))
    done = train_to_the_end(data, tmp_path / "refused", "--regular", "--max_steps", 1, model=model)
    assert done.code == 2 and "its generation_config.json cannot be saved (- `pad_token_id`" in done.err
    assert not (tmp_path / "refused").exists()


@pytest.fixture(scope="module")
def mamba(tmp_path_factory) -> Path:
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    folder = tmp_path_factory.mktemp("mamba")
    AutoTokenizer.from_pretrained(GOLDEN / "models" / "chatml").save_pretrained(folder)
    torch.manual_seed(2)  # a seed whose random states leak little from segment to segment
    config = MambaConfig(vocab_size=531, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=10)
    MambaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", [JEPA, ("--regular",), (*JEPA, "--dry_run", 3)], ids=["jepa", "regular", "dry run"])
def test_a_model_that_cannot_be_packed_is_refused(data, tmp_path, mamba, flags):
    output = () if "--dry_run" in flags else ("--output_dir", tmp_path / "run")
    done = call("finetune", "--train_file", data, "--model_name", mamba, "--max_steps", 1, *flags, *output)
    assert done.code == 2 and "--layout separate" in done.err and done.out == "" and not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_packed_trains_separate(data, tmp_path, mamba):
    train(
        data,
        tmp_path / "run",
        *JEPA,
        "--max_steps",
        1,
        "--batch_size",
        2,
        "--layout",
        "separate",
        "--model_name",
        mamba,
    )


def test_additive_mask_is_refused_where_it_would_hide_a_sliding_window(data, tmp_path):
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    AutoTokenizer.from_pretrained(GOLDEN / "models" / "chatml").save_pretrained(tmp_path / "model")
    config = MistralConfig(vocab_size=531, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, sliding_window=8, pad_token_id=10)  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    flags = ("--train_file", data, "--model_name", tmp_path / "model", "--dry_run", 4, *JEPA)
    done = call("finetune", *flags, "--additive_mask")
    assert done.code == 2 and "sliding window of 8" in done.err
    packed, separate = dry_run(*flags), dry_run(*flags, "--layout", "separate")
    for key in ("lm_loss", "jepa_loss", "grad_norm"):
        assert packed[key] == pytest.approx(separate[key], rel=1e-4)


# ------------------------------------------------------------------------------------------ held-out rows


def test_held_out_losses_and_exact_match_at_each_epoch(data, tmp_path):
    run = train(data, tmp_path / "run", *JEPA, "--val_fraction", 0.25, "--num_epochs", 2, "--eval_generate", 3)
    lines = metrics(run, "eval_loss")
    assert len(lines) == 2
    for line in lines:
        assert line["eval_loss"] == pytest.approx(line["eval_lm_loss"] + line["eval_jepa_loss"], rel=1e-5)
        assert line["eval_exact"] in (0, 1 / 3, 2 / 3, 1)
    assert len(metrics(run)) == 6  # 18 of 24 rows, 8 a step, 2 epochs


def test_held_out_loss_is_that_of_the_rows_in_one_batch(data, tmp_path):
    run = train(data, tmp_path / "run", *JEPA, "--eval_file", data, "--max_steps", 2, "--eval_strategy", "steps",
                "--eval_steps", 2, "--batch_size", 5)  # fmt: skip
    line = metrics(run, "eval_loss")[0]
    whole = dry_run("--train_file", data, "--model_name", run, "--dry_run", len(ROWS), *JEPA)
    assert line["eval_lm_loss"] == pytest.approx(whole["lm_loss"], rel=1e-5)
    assert line["eval_jepa_loss"] == pytest.approx(whole["jepa_loss"], rel=1e-5)


def test_held_out_rows_keep_their_views_under_loss_dropout(data, tmp_path):
    flags = (*JEPA, "--eval_file", data, "--max_steps", 1, "--learning_rate", "1e-9", "--eval_strategy", "steps",
             "--eval_steps", 1)  # fmt: skip
    full = train(data, tmp_path / "full", *flags)
    half = train(data, tmp_path / "half", *flags, "--jepa_ratio", 0.5)
    first, second = (metrics(r, "eval_loss")[0]["eval_jepa_loss"] for r in (full, half))
    assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [("--lr_scheduler_type", "cosine_with_min_lr"), ("--optim", "galore_adamw"), ("--adam_beta2", 2)],
    ids=["scheduler", "optimiser", "beta"],
)
def test_what_the_trainer_refuses_is_said_before_anything_is_written(data, tmp_path, flags):
    done = train_to_the_end(data, tmp_path / "run", "--regular", *flags)
    assert done.code == 2 and "Traceback" not in done.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "usual"),
    [
        ((), ()),
        (("--layout", "separate"), ("--layout", "separate")),
        (("--layout", "additive"), ("--layout", "separate")),
        (("--text_view", "in_chat"), ()),
        (("--jepa_ratio", 0.4), ()),
        (("--layout", "separate", "--jepa_ratio", 0.4), ("--layout", "separate")),
    ],
    ids=["packed", "separate", "additive", "in_chat", "packed-ld", "separate-ld"],
)
def test_same_flop_spends_what_regular_fine_tuning_in_that_layout_spends(data, tmp_path, flags, usual):
    one = train(data, tmp_path / "one", *JEPA, *flags, "--num_epochs", 6, "--track_flop")
    same = train(data, tmp_path / "same", *JEPA, *flags, "--num_epochs", 6, "--same_flop", "--track_flop")
    regular = train(data, tmp_path / "regular", "--regular", *usual, "--num_epochs", 6, "--track_flop")
    spent = {r.name: metrics(r)[-1]["flops"] for r in (one, same, regular)}
    assert spent["one"] > 1.15 * spent["regular"]
    assert spent["same"] == pytest.approx(spent["regular"], rel=0.08)
    assert read_json(same / "run.json")["steps"] < read_json(one / "run.json")["steps"]
    assert len(metrics(same)) < len(metrics(one)) == len(metrics(regular))


# ------------------------------------------------------------------------------------------------ the run


def test_run_folder_tells_where_it_came_from(data, tmp_path):
    run = train(data, tmp_path / "run", *JEPA, "--max_steps", 2)
    record, args = read_json(run / "run.json"), read_json(run / "args.json")
    assert record["status"] == "finished" and record["steps"] == 2
    assert record["data_sha256"] == {str(data): sha256(data)}
    assert record["versions"]["torch"] == torch.__version__
    assert record["tokens"] == sum(m["tokens"] for m in metrics(run)) and record["wall_seconds"] > 0
    assert (args["lbd"], args["lm_labels"], args["layout"], args["finetune_seed"]) == (1.0, "answer", "packed", 42)


def test_an_existing_folder_is_refused_and_overwritten_only_when_asked(data, tmp_path):
    run = train(data, tmp_path / "run", "--regular", "--max_steps", 1)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    train(data, run, "--regular", "--max_steps", 2, code=2)
    train(data, run, "--regular", "--max_steps", 2, "--resume", code=2)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    bad = write_rows(tmp_path / "bad.jsonl", [*ROWS[:2], {"messages": []}])
    train(bad, run, "--regular", "--overwrite", code=2)  # the mistake is found before anything is lost
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    train(data, run, "--regular", "--max_steps", 2, "--overwrite")
    assert read_json(run / "run.json")["steps"] == 2
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    train(data, mine, "--regular", "--overwrite", code=2)
    assert (mine / "thesis.txt").read_text() == "mine"


def test_a_loss_that_is_not_finite_stops_before_the_step(data, tmp_path, monkeypatch):
    real = finetune.lm_loss
    calls = []

    def broken(logits, label_ids):
        calls.append(1)
        total, count = real(logits, label_ids)
        return (total * float("nan") if len(calls) == 6 else total), count

    monkeypatch.setattr(finetune, "lm_loss", broken)
    flags = ("--regular", "--num_epochs", 1, "--save_strategy", "steps", "--save_steps", 2)
    run = train(data, tmp_path / "run", *flags, code=1)
    record = read_json(run / "run.json")
    assert record["status"] == "failed" and "step 3 is nan" in record["error"]
    assert record["system_turn"] == "Write the regular expression."
    assert not (run / "model.safetensors").exists()
    kept = weights(whole_checkpoints(run)[-1])
    assert all(torch.isfinite(v).all() for v in kept.values())


@pytest.mark.parametrize("flags", [(), ("--max_grad_norm", 0)], ids=["clipped", "unclipped"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(data, tmp_path, monkeypatch, flags):
    real = finetune.lm_loss
    calls = []

    def broken(logits, label_ids):
        calls.append(1)
        total, count = real(logits, label_ids)
        # The root of 0 is 0, its slope infinite.
        return (total + (total - total.detach()).abs().sqrt() if len(calls) == 6 else total), count

    monkeypatch.setattr(finetune, "lm_loss", broken)
    steps = ("--num_epochs", 1, "--save_strategy", "steps", "--save_steps", 2)
    run = train(data, tmp_path / "run", "--regular", *steps, *flags, code=1)
    record = read_json(run / "run.json")
    assert record["status"] == "failed" and "the gradient norm of step 3 is nan" in record["error"]
    kept = weights(whole_checkpoints(run)[-1])
    assert all(torch.isfinite(v).all() for v in kept.values())


@pytest.mark.parametrize("layout", ["packed", "separate"])
def test_damaged_weights_are_no_loss_to_train_on(data, tmp_path, layout):
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "models" / "llama3", model)
    tensors = weights(model)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    done = call(
        "finetune", "--train_file", data, "--model_name", model, "--regular", "--layout", layout, "--dry_run", 2
    )
    said = {"packed": (2, "its weights are damaged"), "separate": (1, "the loss is nan")}[layout]
    assert (done.code, done.out) == (said[0], "") and said[1] in done.err


@pytest.mark.parametrize("flags", [("--regular",), (*JEPA[:2], "--lbd", 0)])
def test_one_row_is_enough(tmp_path, flags):
    data = write_rows(tmp_path / "one.jsonl", ROWS[:1])
    found = dry_run("--train_file", data, "--model_name", GOLDEN / "models" / "llama3", *flags, "--dry_run", 1)
    assert found["lm_loss"] > 0 and found["label_tokens"] > 0
    assert metrics(train(data, tmp_path / "run", *flags, "--max_steps", 1))


def test_a_row_longer_than_the_models_context_is_named(tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    model = tmp_path / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models" / "llama3")
    tokenizer.save_pretrained(model)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(model)
    data = write_rows(tmp_path / "words_train.jsonl", [*ROWS[:4], message_row("long " * 60, "x")])
    done = call("finetune", "--train_file", data, "--model_name", model, "--output_dir", tmp_path / "run", *JEPA)
    assert done.code == 2 and f"{data}:5: the chat has" in done.err and "over --max_length 96" in done.err
    assert "--max_length 96, the model's context, instead of 512" in done.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "its disk full?",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "its disk full?"),
        (OSError(28, "No space left on device"), "(--output_dir "),
    ],
)
def test_a_full_disk_is_said_to_be_that_whatever_library_finds_it(data, tmp_path, monkeypatch, error, said):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(finetune.JepaTrainer, "_save_checkpoint", full)
    done = call("finetune", "--train_file", data, "--model_name", GOLDEN / "models" / "llama3", "--output_dir",
                tmp_path / "run", "--regular", "--max_steps", 1)  # fmt: skip
    assert done.code == 1 and said in done.err and str(tmp_path / "run") in done.err and "Traceback" not in done.err


def test_dry_run_prints_one_object_and_writes_nothing(data, tmp_path):
    before = set(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, ROOT / "finetune.py", "--train_file", data, "--model_name", GOLDEN / "models" / "llama3",
         "--dry_run", "3", "--predictors", "1"],
        capture_output=True, text=True, cwd=tmp_path, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert set(tmp_path.rglob("*")) == before
    row = json.loads(done.stdout)
    assert set(row) == {
        "lm_loss",
        "jepa_loss",
        "total_loss",
        "grad_norm",
        "label_tokens",
        "pairs",
        "tokens",
        "first_row",
    }
    assert set(row["tokens"]) == {"chat", "text_view", "code_view", "padding"}
    assert row["first_row"]["label_text"] == "(0).*[0]<|eot_id|>" and row["pairs"] == 3
    assert row["total_loss"] == pytest.approx(row["lm_loss"] + 0.1 * row["jepa_loss"], rel=1e-6)


def test_tensorboard_gets_the_method_s_figures(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(data, tmp_path / "run", *JEPA, "--max_steps", 2, "--report_to", "tensorboard")
    events = EventAccumulator(str(next(run.rglob("events.out*")).parent))
    events.Reload()
    assert {"train/jepa_loss", "train/lm_loss", "train/cosine"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--dtype=bfloat16"])
def test_memory_and_precision_flags_train_to_about_the_same(data, tmp_path, flag):
    plain = train(data, tmp_path / "plain", *JEPA, "--max_steps", 2, "--dtype", "float32")
    other = train(data, tmp_path / "other", *JEPA, "--max_steps", 2, flag)
    tolerance = 0.05 if "bfloat16" in flag else 1e-5
    for x, y in zip(metrics(plain), metrics(other), strict=True):
        assert x["total"] == pytest.approx(y["total"], rel=tolerance)
    assert ("bfloat16" in flag) == (metrics(plain)[0]["total"] != metrics(other)[0]["total"])
    assert weights(other)["lm_head.weight"].dtype == torch.float32


# ----------------------------------------------------------------------------------- what a model learns


@pytest.mark.parametrize("scope", ["answer", "reference"])
def test_a_memorised_answer_is_exact_with_a_stop_token_and_only_startswith_without(tmp_path, scope):
    """The published label scope (pad = eos) never teaches the end of a turn: the answer comes, and text behind it."""
    data = write_rows(tmp_path / "two.jsonl", ROWS[:2])
    run = train(data, tmp_path / "run", *JEPA, "--lm_labels", scope, "--learning_rate", "1e-2", "--num_epochs", 60,
                "--batch_size", 2, "--grad_accum", 1, "--eval_file", data, "--eval_generate", 2,
                "--eval_strategy", "steps", "--eval_steps", 60, "--save_strategy", "no")  # fmt: skip
    done = call("evaluate", "--model_name", run, "--input_file", data, "--task", "text", "--max_new_tokens", 40)
    assert done.code == 0, done.err
    scores = read_json(run / "eval" / "two" / "metrics.json")
    stops = float(scope == "answer")
    assert (scores["exact"], scores["startswith"], scores["stop_rate"]) == (stops, 1.0, stops)
    assert metrics(run, "eval_exact")[-1]["eval_exact"] == stops


# ----------------------------------------------------------------------------------------------- bad data

BAD_LINES = {
    "not JSON": b'{"messages": [',
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "no messages": b'{"text": "a"}',
    "wrong roles": b'{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
    "empty content": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "  "}]}',
    "no string": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 5}]}',
    "too long": json.dumps(message_row("a", "b " * 600)).encode(),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_written_or_it_is_skipped_and_counted(data, tmp_path, bad):
    with open(data, "ab") as file:
        file.write(BAD_LINES[bad] + b"\n")
    done = train_to_the_end(data, tmp_path / "run", "--regular", "--max_steps", 1)
    assert done.code == 2 and f"{data}:25" in done.err and not (tmp_path / "run").exists()
    run = train(data, tmp_path / "run", "--regular", "--max_steps", 1, "--skip_bad_examples")
    assert read_json(run / "run.json")["skipped_examples"] == 1


@pytest.mark.parametrize("kind", ["missing", "empty", "a folder"])
def test_a_file_without_examples_is_named(tmp_path, kind):
    data = tmp_path / "rows.jsonl"
    if kind == "empty":
        data.touch()
    elif kind == "a folder":
        data.mkdir()
    done = train_to_the_end(data, tmp_path / "run", "--regular")
    assert done.code == 2 and str(data) in done.err and "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_data_file_is_split_by_share_and_seed(data, tmp_path):
    common = ("--data_file", data, "--model_name", GOLDEN / "models" / "llama3", "--regular", "--max_steps", 1)
    done = call("finetune", *common, "--output_dir", tmp_path / "run", "--eval_split", 0.25)
    assert done.code == 0 and "18 examples, 6 held out" in done.err
    s = finetune.Settings(data_file=str(data), eval_split=0.25)
    parts = finetune.load_examples(s, finetune.Problems())
    assert parts == finetune.load_examples(s, finetune.Problems())
    assert sorted(e.id for part in parts for e in part) == list(range(1, 25))
    assert parts[1] != finetune.load_examples(finetune.Settings(data_file=str(data), eval_split=0.25, split_seed=1),
                                              finetune.Problems())[1]  # fmt: skip


def test_a_dry_run_of_nothing_trains_nothing(data, tmp_path):
    done = train_to_the_end(data, tmp_path / "run", "--regular", "--dry_run", 0)
    assert done.code == 2 and "--dry_run 0 would score nothing" in done.err and not (tmp_path / "run").exists()
