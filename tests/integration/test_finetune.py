"""Runs of finetune.py: the saved parameters, metrics.jsonl, run folders and exit codes."""

import errno
import json
import os
import resource
import select
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    EXAMPLES,
    GOLDEN,
    JEPA,
    MODEL,
    call,
    column,
    dry_run,
    interrupted,
    make_model,
    message_row,
    metrics,
    predictions,
    same_weights,
    snapshot,
    start,
    train,
    weights,
    write_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from llm_jepa import forward
from llm_jepa.files import read_json, sha256, write_json
from llm_jepa.run_folder import complete_checkpoints


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A model whose output layer is tied to its embeddings, as in small published models."""
    sizes = {"vocab_size": 531, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    return make_model(tmp_path_factory.mktemp("tied"), "llama", **sizes, tie_word_embeddings=True)


# ------------------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize(
    ("base", "zero"),
    [(("--regular",), ("--predictors", 2, "--lbd", 0)),
     (("--regular", "--lora"), ("--predictors", 2, "--lbd", 0, "--lora")),
     (("--regular",), (*JEPA, "--jepa_ratio", 0)),
     (("--regular",), (*JEPA, "--jepa_ratio", 0, "--text_view", "in_chat")),
     (("--regular",), ("--lbd", 0, "--jepa_loss", "clip", "--negatives_queue", 8)),
     (("--regular",), ("--lbd", 0, "--sigreg", 0.1)),
     (("--regular",), ("--lbd", 0, "--shuffle_pairs", "--center", "--stop_gradient", "text")),
     (("--regular",), ("--regular", "--nitp", "--nitp_lbd", 0, "--stp", "patch", "--stp_lbd", 0)),
     (JEPA, (*JEPA, "--stp", "patch", "--stp_lbd", 0))],
)  # fmt: skip
def test_zero_weight_or_ratio_changes_nothing_bit_for_bit(trained, tied, base, zero):
    model = {"model": tied} if "--lora" in base else {}
    usual, other = (trained(*flags, "--max_steps", 3, **model) for flags in (base, zero))
    same_weights(usual, other)
    assert metrics(other)[0].keys() == metrics(usual)[0].keys()
    for key in ("loss", "tokens"):
        assert column(other, key) == column(usual, key)


@pytest.mark.parametrize(
    "flags",
    [(*JEPA, "--jepa_ratio", 0.5, "--stp", "geodesic", "--stp_lbd", 0.5, "--stp_spans", 2, "--nitp"),
     (*JEPA, "--sigreg", 0.3, "--nitp", "--nitp_layer", 1)],
    ids=["dropout-stp-nitp", "sigreg-nitp"],
)  # fmt: skip
@pytest.mark.parametrize(
    "size",
    [("--batch_size", 5, "--grad_accum", 5), ("--batch_size", 1, "--grad_accum", 24),
     ("--batch_size", 2, "--grad_accum", 12, "--streaming"), ("--tokens_per_batch", 400, "--grad_accum", 99)],
)  # fmt: skip
def test_micro_batches_of_a_step_change_nothing(trained, flags, size):
    flags = (*flags, "--max_steps", 3, *(["--streaming"] if "--streaming" in size else []))
    one, other = trained(*flags, "--batch_size", 24, "--grad_accum", 1), trained(*flags, *size)
    same_weights(one, other, rtol=1e-3, atol=5e-5)
    for key in ("loss", "lm_loss", "jepa_loss", "sigreg_loss", "nitp_loss", "stp_loss", "grad_norm", "nitp_cosine"):
        assert column(other, key) == pytest.approx(column(one, key), rel=1e-4), key
    for key in ("tokens", "pairs", "spans", "next_tokens"):
        assert column(other, key) == column(one, key)
    assert column(one, "nitp_loss") and column(one, "next_tokens")


def test_mean_of_nothing_is_not_logged(tmp_path):
    """Steps without pairs or without chats, and chats that are too short for a span, in training and held out."""
    rows = [message_row("a", "b") for _ in range(8)] + [{"text": "a", "code": "b"} for _ in range(4)]
    data = write_rows(tmp_path / "short.jsonl", rows)
    flags = (*JEPA, "--jepa_ratio", 0.25, "--stp", "geodesic", "--batch_size", 1, "--grad_accum", 1)
    run = train(data, tmp_path / "run", *flags, "--num_epochs", 1, "--eval_file", data)
    lines = metrics(run, "label_tokens")
    with_pairs = [line for line in lines if line["pairs"]]
    assert 0 < len(with_pairs) < len(lines) == 12
    with_labels = [line for line in lines if line["label_tokens"]]
    assert metrics(run, "lm_loss") == with_labels and len(with_labels) == 8
    assert [line for line in lines if "jepa_loss" in line] == with_pairs
    final = read_json(run / "run.json")["final"]
    assert final["jepa_loss"] == with_pairs[-1]["jepa_loss"] and "stp_loss" not in final
    assert not metrics(run, "stp_loss") and not metrics(run, "eval_stp_loss") and metrics(run, "eval_jepa_loss")
    got = json.loads(start(data, tmp_path / "dry", *flags, "--dry_run", 1, "--jepa_ratio", 1e-9).out)
    assert (got["pairs"], got["jepa_loss"], got["stp_loss"]) == (0, None, None)


def test_lines_add_up_to_the_run_also_at_a_resume(data, trained, tmp_path):
    """7 steps, checkpoints after 2, 4, 6."""
    flags = (*JEPA, "--max_steps", 7, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 9)
    every, flags = trained(*flags), (*flags, "--logging_steps", 3)
    straight = trained(*flags)
    run = train(data, interrupted(straight, 4, tmp_path / "run"), *flags, "--resume")
    for key in ("tokens", "pairs", "label_tokens"):
        assert sum(column(straight, key)) == sum(column(every, key)) and column(run, key) == column(straight, key)
    record = read_json(run / "run.json")
    assert sum(column(run, "tokens")) == record["tokens"] and column(run, "step")[-1] == 7
    assert record["final"]["lm_loss"] == metrics(run, "lm_loss")[-1]["lm_loss"]


def test_loss_dropout_depends_on_seed_and_epoch_and_saves_tokens(trained):
    flags = (*JEPA, "--jepa_ratio", 0.5, "--num_epochs", 2)
    half = trained(*flags)
    pairs = column(half, "pairs")
    assert 10 < sum(pairs) < 38 and pairs[:3] != pairs[3:]
    assert sum(column(half, "tokens")) < sum(column(trained(*JEPA, "--num_epochs", 2), "tokens"))
    assert column(trained(*flags, "--finetune_seed", 7), "pairs") != pairs


# ---------------------------------------------------------------------------------------------------------- resume

SAVED = ("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 9, "--keep_checkpoints")
DROPOUT = ("--lora", "--lora_dropout", 0.3, "--jepa_ratio", 0.5, "--stp", "patch", "--stp_warmup", 0.9)
STATES = ("projectors.safetensors", "queue.safetensors")  # besides those of the model and the optimizer


@pytest.mark.parametrize(
    ("flags", "step", "files"),
    [(JEPA, 6, 0),  # interrupted between the last checkpoint and the final model
     ((*JEPA, *DROPOUT, "--sigreg", 0.3, "--nitp"), 2, 1),
     ((*JEPA, "--jepa_loss", "clip", "--negatives_queue", 20, "--nitp", "--streaming"), 4, 2)],
    ids=["last-step", "dropout-stp-sigreg", "queue-streaming"],
)  # fmt: skip
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(data, trained, tmp_path, flags, step, files):
    """Evaluations turn dropout off until the next step."""
    flags = (*flags, *SAVED, "--eval_file", data, "--eval_strategy", "steps", "--eval_steps", 2)
    straight = trained(*flags)
    run = train(data, interrupted(straight, step, tmp_path / "moved"), *flags, "--resume")
    same_weights(straight, run)
    assert [line["step"] for line in metrics(run)] == list(range(1, 7))
    for key in ("loss", "grad_norm", "jepa_loss", "nitp_loss", "tokens"):
        assert column(run, key) == column(straight, key)
    record, first = read_json(run / "run.json"), read_json(straight / "run.json")
    assert record["status"] == "finished" and len(record["attempts"]) == 2
    assert [record[key] for key in ("steps", "tokens")] == [first[key] for key in ("steps", "tokens")]
    for name in STATES[:files]:
        early, want, got = (weights(x, name) for x in (straight / "checkpoint-2", *(
            folder / "checkpoint-6" for folder in (straight, run))))  # fmt: skip
        assert got.keys() == want.keys() and all(got[k].equal(want[k]) for k in want)
        assert not all(early[k].equal(x) for k, x in got.items())


def test_run_is_resumed_from_its_last_complete_checkpoint_with_the_same_settings_and_data_only(data, trained, tmp_path):
    straight = trained(*JEPA, *SAVED, "--jepa_ratio", 0.5)
    run = interrupted(straight, 4, tmp_path / "moved run")
    record, args, other = read_json(run / "run.json"), (run / "args.json").read_bytes(), tmp_path / "other"
    assert "--resume" in start(data, run, *JEPA, *SAVED, "--jepa_ratio", 0.5).err
    write_json(run / "run.json", record | {"data_sha256": {str(data): "0" * 64}})
    call("finetune", "--resume", run, code=2)  # the data has changed
    write_json(run / "run.json", record)
    for flags, mentioned in (
        (["--resume", run, "--lbd", 0.1], "--lbd 1.0 (now 0.1)"),  # the default is a given value too
        (["--resume", run, "--lbd", 1, "--learning_rate", 2e-3], "--learning_rate 0.001 (now 0.002)"),
        (["--resume", run, "--output_dir", other], str(other)),
        (["--resume", run, "--overwrite"], "--overwrite"),
        (["--resume", run / "checkpoint-4"], "checkpoint-4"),
        (["--resume", data], str(data)),
    ):
        done = call("finetune", *flags)
        assert done.code == 2 and mentioned in done.err and done.err.count("\n") == 1, flags
    assert (run / "args.json").read_bytes() == args and not other.exists()
    torn = run / "checkpoint-4" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    same = ("--lbd", 1, "--train_file", data, "--logging_steps", 1, "--save_total_limit", 1)
    done = call("finetune", "--resume", run, *same, code=0)
    assert "checkpoint-4" in done.err and "resuming from checkpoint-2" in done.err
    same_weights(straight, run)
    assert column(run, "loss") == column(straight, "loss")
    call("finetune", "--resume", run, code=2)  # it is finished


def test_finished_run_keeps_only_model_and_records(data, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("socket.gethostname", lambda: "name-of-the-host")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir()
    run = train(data, tmp_path / "link", *JEPA, *SAVED[:-1])
    assert not list(tmp_path.glob(".*")), "a lock file"
    for file in run.rglob("*"):
        assert not file.match("checkpoint-*/*") and file.suffix not in (".bin", ".pt", ".tmp")
        assert not file.name.startswith(("optimizer", "scheduler", "rng_state"))
        assert file.is_dir() or b"name-of-the-host" not in file.read_bytes(), file
    same_weights(run, trained(*JEPA, *SAVED))
    train(data, run, *JEPA, *SAVED, "--overwrite")
    assert run.is_symlink() and len(complete_checkpoints(tmp_path / "target")) == 3


def test_refused_write_is_one_line_and_leaves_the_last_checkpoint(data, trained, tmp_path, monkeypatch):
    run, real = tmp_path / "run", finetune.JepaTrainer._save

    def save(self, folder, *args, **kwargs):
        real(self, folder, *args, **kwargs)
        if "checkpoint-4" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finetune.JepaTrainer, "_save", save)
        done = start(data, run, *JEPA, *SAVED)
    last = done.err.splitlines()[-1]
    assert done.code == 1 and str(run) in last and "Traceback" not in done.err, done.err
    assert read_json(run / "run.json")["status"] == "failed"
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert call("finetune", "--resume", run).code == 0
    same_weights(trained(*JEPA, *SAVED), run)


def test_place_of_other_files_is_refused_and_kept(data, tmp_path):
    file = tmp_path / "mine" / "thesis.txt"
    file.parent.mkdir()
    file.write_text("mine")
    for out in (file.parent, file, file / "run"):
        assert f"--output_dir {out}" in start(data, out, "--regular", "--overwrite", code=2).err
    assert file.read_text() == "mine"


# ------------------------------------------------------------------------------------------------- kinds of models


def test_adapter_of_a_tied_model_trains_predictor_tokens_and_merges_to_the_same_model(trained, tied, tmp_path):
    run = trained(*JEPA, "--lora", "--lora_rank", 4, "--merge", "--max_steps", 3, model=tied)
    rows = next(v for k, v in weights(run, "adapter_model.safetensors").items() if "trainable_tokens" in k)
    ids = AutoTokenizer.from_pretrained(run).convert_tokens_to_ids(["<|predictor_1|>", "<|predictor_2|>"])
    assert rows.shape[0] == 2 and not torch.allclose(rows, weights(tied)["model.embed_tokens.weight"][ids])
    torch.testing.assert_close(weights(run / "merged")["model.embed_tokens.weight"][sorted(ids)], rows)
    test = write_rows(tmp_path / "test.jsonl", EXAMPLES[:4])
    assert predictions(run, test, tmp_path / "adapter") == predictions(run / "merged", test, tmp_path / "merged")


def test_plain_adapter_trains_exactly_the_added_tokens(trained):
    run = trained("--plain", "--lora", *JEPA, "--merge", "--max_steps", 3)
    tokenizer = AutoTokenizer.from_pretrained(run)
    base, merged = weights(MODEL), weights(run / "merged")
    labels = tokenizer.convert_tokens_to_ids(["<|perception|>", "<|eot_id|>"])
    inputs = tokenizer.convert_tokens_to_ids(["<|perception|>", "<|predictor_1|>", "<|predictor_2|>"])
    for name, expected in (("lm_head.weight", labels), ("model.embed_tokens.weight", inputs)):
        changed = (base[name] != merged[name][: len(base[name])]).any(dim=1).nonzero()[:, 0].tolist()
        assert set(changed) == set(expected), name


def test_generation_config_is_corrected_or_refused_before_training(data, tmp_path):
    model = shutil.copytree(GOLDEN / "models" / "chatml", tmp_path / "model")
    config, flags = model / "generation_config.json", ("--regular", "--max_steps", 1)
    write_json(config, {"eos_token_id": 2, "do_sample": False, "temperature": 0.6, "top_k": 20})
    run = train(data, tmp_path / "run", *flags, model=model)
    saved = read_json(run / "generation_config.json")
    assert not {"temperature", "top_k"} & saved.keys()  # transformers refuses to save them with greedy decoding
    assert AutoTokenizer.from_pretrained(run).convert_tokens_to_ids("<|im_end|>") in saved["eos_token_id"]
    write_json(config, {"eos_token_id": 2, "pad_token_id": -1})
    assert config.name in start(data, tmp_path / "refused", *flags, model=model, code=2).err
    assert not (tmp_path / "refused").exists()


# ---------------------------------------------------------------------------------------------- held-out examples


def test_held_out_examples_are_scored_at_each_epoch(trained):
    run = trained(*JEPA, "--val_fraction", 0.25, "--num_epochs", 2, "--eval_generate", 3)
    exact = column(run, "eval_exact")
    assert len(exact) == 2 and len(metrics(run)) == 6  # 18 of 24 examples, 8 in a step
    assert {*exact} <= {0, 1 / 3, 2 / 3, 1}


def test_held_out_loss_is_that_of_one_batch_without_dropout_and_warmup(data, trained):
    stp = (*JEPA, "--stp", "patch", "--stp_lbd", 2, "--stp_part", "chat", "--stp_max_length", 4)
    run = trained(*stp, "--eval_file", data, "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2,
                  "--batch_size", 5, "--stp_warmup", 100, "--jepa_ratio", 0.5)  # fmt: skip
    (line,) = metrics(run, "eval_loss")
    one = dry_run("--train_file", data, "--model_name", run, "--dry_run", len(EXAMPLES), *stp)
    for key in ("lm_loss", "jepa_loss", "stp_loss"):
        assert line[f"eval_{key}"] == pytest.approx(one[key], rel=1e-5)
    assert line["eval_loss"] == pytest.approx(one["total_loss"], rel=1e-5)
    assert {"stp_loss", "eval_stp_loss"} <= read_json(run / "run.json")["final"].keys()


SEPARATE = ("--layout", "separate", "--batch_size", 2, "--grad_accum", 2)


@pytest.mark.parametrize(
    ("flags", "regular"),
    [(("--nitp", "--stp", "patch"), ()), ((*SEPARATE, "--sigreg", 0.05, "--jepa_ratio", 0.4), SEPARATE)],
    ids=["nitp-stp", "sigreg-dropout"],
)
def test_same_flop_spends_the_flops_of_regular_fine_tuning(trained, flags, regular):
    common = ("--batch_size", 4, "--grad_accum", 1, "--num_epochs", 3, "--track_flop")
    one, same = (trained(*JEPA, *common, *flags, *more) for more in ((), ("--same_flop",)))
    flops = [column(run, "flops")[-1] for run in (one, same, trained("--regular", *common, *regular))]
    assert flops[0] > 1.15 * flops[2] and flops[1] == pytest.approx(flops[2], rel=0.08)
    assert read_json(same / "run.json")["steps"] == len(metrics(same)) < len(metrics(one)) == 18


@pytest.mark.parametrize("scope", ["answer", "reference"])
def test_memorized_answer_stops_only_if_the_end_of_turn_is_a_label(tmp_path, scope):
    """With the published labels (pad = eos) the answer is followed by more text."""
    data = write_rows(tmp_path / "two.jsonl", EXAMPLES[:2])
    run = train(data, tmp_path / "run", *JEPA, "--lm_labels", scope, "--learning_rate", "1e-2", "--num_epochs", 60,
                "--batch_size", 2, "--grad_accum", 1, "--eval_file", data, "--eval_generate", 2,
                "--eval_strategy", "steps", "--eval_steps", 60, "--save_strategy", "no")  # fmt: skip
    call("evaluate", "--model_name", run, "--input_file", data, "--task", "text", "--max_new_tokens", 40, code=0)
    scores, stops = read_json(run / "eval" / "two" / "metrics.json"), float(scope == "answer")
    assert [scores[k] for k in ("exact", "startswith", "stop_rate")] == [stops, 1, stops]
    assert column(run, "eval_exact") == [stops]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    *prompt, answer = EXAMPLES[1]["messages"]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert (tokenizer.decode(ids, skip_special_tokens=True) == answer["content"]) == (scope == "answer")


# ------------------------------------------------------------------------------------------------------ the run


def test_run_and_evaluation_work_without_linux_only_calls(data, tmp_path, monkeypatch):
    """macOS has none of these."""
    names = {os: "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate memfd_create copy_file_range "
                 "splice process_cpu_count O_DIRECT", resource: "prlimit", select: "epoll"}  # fmt: skip
    for module, unavailable in names.items():
        for name in unavailable.split():
            monkeypatch.delattr(module, name, raising=False)
    run = train(data, tmp_path / "run", *JEPA, "--max_steps", 1)
    assert len(predictions(run, data, tmp_path / "out")) == len(EXAMPLES)


def test_run_folder_records_settings_and_provenance(data, trained):
    run = trained(*JEPA, "--max_steps", 3)
    record, args = read_json(run / "run.json"), read_json(run / "args.json")
    assert record["status"] == "finished" and record["steps"] == 3 and record["wall_seconds"] > 0
    assert record["data_sha256"] == {str(data): sha256(data)} and record["versions"]["torch"] == torch.__version__
    assert record["system_turn"] == "Write the regular expression."
    assert [args[k] for k in ("lbd", "lm_labels", "layout", "finetune_seed")] == [1.0, "answer", "packed", 42]


def test_existing_folder_is_kept_unless_overwritten(data, tmp_path):
    run = train(data, tmp_path / "run", "--regular", "--max_steps", 1)
    before = snapshot(run)
    train(data, run, "--regular", "--max_steps", 2, code=2)
    bad = write_rows(tmp_path / "bad.jsonl", [*EXAMPLES[:2], {"messages": []}])
    train(bad, run, "--regular", "--overwrite", code=2)  # found before anything is lost
    assert snapshot(run) == before
    inside = write_rows(run / "rows.jsonl", EXAMPLES)
    assert str(inside) in start(tmp_path / "*" / "rows.jsonl", run, "--regular", "--overwrite", code=2).err
    train(data, run, "--regular", "--max_steps", 2, "--overwrite")
    assert read_json(run / "run.json")["steps"] == 2
    train(data, tmp_path / "typo", "--regular", "--resume", code=2)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(("what", "norm"), [("loss", 1), ("gradient norm", 0)])
def test_step_that_is_not_finite_stops_training(data, tmp_path, monkeypatch, what, norm):
    real, calls = forward.lm_loss, []

    def broken(logits, label_ids):
        calls.append(1)
        total, count = real(logits, label_ids)
        if len(calls) != 6:
            return total, count
        root = (total - total.detach()).abs().sqrt()  # 0 with an infinite slope
        return total * float("nan") if what == "loss" else total + root, count

    monkeypatch.setattr(forward, "lm_loss", broken)
    flags = ("--regular", "--num_epochs", 1, "--save_strategy", "steps", "--save_steps", 2, "--max_grad_norm", norm)
    run = train(data, tmp_path / "run", *flags, code=1)
    record = read_json(run / "run.json")
    assert record["status"] == "failed" and f"{what} of step 3 is nan" in record["error"]
    assert not (run / "model.safetensors").exists()
    assert all(torch.isfinite(v).all() for v in weights(complete_checkpoints(run)[-1]).values())


def test_dry_run_prints_one_object_and_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = dry_run("--train_file", data, "--model_name", MODEL, "--dry_run", 3, "--predictors", 1)
    assert not list(tmp_path.rglob("*"))
    assert row["tokens"].keys() == {"chat", "text_view", "code_view", "padding"} and row["pairs"] == 3


def test_bfloat16_changes_little_and_is_recorded(trained):
    float32, other = (trained(*JEPA, "--max_steps", 3, *more) for more in ((), ("--dtype", "bfloat16")))
    assert column(float32, "loss") != column(other, "loss") == pytest.approx(column(float32, "loss"), rel=0.05)
    assert weights(other)["lm_head.weight"].dtype == torch.float32
    usual = {"parameters": ["float32"], "autocast": None, "compiled": False, "sharding": None}
    found = [read_json(run / "run.json")["computation"] for run in (float32, other)]
    assert found == [usual, usual | {"autocast": "bfloat16"}]


def test_example_over_the_context_is_reported_by_line_or_skipped_and_counted(tmp_path):
    gpt2 = make_model(tmp_path / "gpt2", "gpt2", vocab_size=531, n_positions=96, n_embd=16, n_layer=1, n_head=2)
    data = write_rows(tmp_path / "data.jsonl", [*EXAMPLES[:4], message_row("long " * 60, "x")])
    done = start(data, tmp_path / "run", *JEPA, model=gpt2)
    assert done.code == 2 and f"{data}:5: " in done.err and "--max_length 96" in done.err
    assert not (tmp_path / "run").exists()
    run = train(data, tmp_path / "run", *JEPA, "--max_steps", 1, "--skip_bad_examples", model=gpt2)
    assert read_json(run / "run.json")["skipped_examples"] == 1


REFUSED = ("--lr_scheduler_type cosine_with_min_lr", "--stp patch --stp_layer 3", "--nitp --nitp_layer -4")


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_trainer_or_model_refuse_are_reported_before_anything_is_written(data, tmp_path, flags):
    done = start(data, tmp_path / "run", *flags.split())
    assert done.code == 2 and "Traceback" not in done.err and not (tmp_path / "run").exists()
    assert any(flag in done.err for flag in flags.split() if flag.startswith("--"))
