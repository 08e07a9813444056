"""Evaluations during a training: the task's scores, samples, the best model, early stopping, trackers."""

import json
from pathlib import Path

import pytest
from conftest import call, column, interrupted, message_row, metrics, read_lines, same_weights, start, train, write_rows

import finetune
from llm_jepa.files import read_json
from llm_jepa.run_folder import complete_checkpoints

NO_CHECKPOINTS = ("--save_strategy", "no")


def samples(run: Path) -> list[dict]:
    """The lines of generations.jsonl."""
    return read_lines(run / "generations.jsonl")


# Trained answers, and those to score by: the first two are right, but only as a language or only at the start.
ANSWERS = {"synth": ("a|b", "b|a"), "text": ("abc", "ab"), "hellaswag": ("A", "B")}


@pytest.mark.parametrize("task", ANSWERS)
def test_scores_and_samples_are_those_of_evaluate(task, tmp_path):
    learned, other = ANSWERS[task]
    data = write_rows(tmp_path / "data.jsonl", [message_row(q, learned) for q in ("one", "two")])
    rows = [message_row("one", learned), message_row("two", other), message_row("three " * 9, other)]
    held_out = write_rows(tmp_path / f"{task}_test.jsonl", rows)
    run = tmp_path / "run"
    done = start(data, run, "--regular", "--learning_rate", "1e-2", "--max_steps", 30, "--batch_size", 2,
                 "--grad_accum", 1, "--eval_file", held_out, "--eval_generate", 3, "--sample_generations", 2,
                 "--eval_strategy", "steps", "--eval_steps", 30, *NO_CHECKPOINTS, code=0)  # fmt: skip
    assert call("evaluate", "--model_name", run, "--input_file", held_out, "--task", task).code == 0
    want = read_json(run / "eval" / task / "metrics.json")
    (line,), primary = metrics(run, "eval_exact"), want["score"]
    names = [n for n in (*want["scores"], "exact", "startswith", "stop_rate") if want[n] is not None]
    assert {name: line[f"eval_{name}"] for name in names} == {name: want[name] for name in names}
    assert [line[f"eval_{primary}_{end}"] for end in ("low", "high")] == want["ci95"][primary]
    apart = ("step", "prompt", "answer", "log_likelihoods")
    own, predicted = ([{k: v for k, v in row.items() if k not in apart} for row in rows]
                      for rows in (samples(run), read_lines(run / "eval" / task / "predictions.jsonl")))  # fmt: skip
    assert own == predicted[:2]
    assert [(x["step"], x["prompt"], x["answer"]) for x in samples(run)] == [(30, "one", learned), (30, "two", other)]
    assert len({want["exact"], want["startswith"], want[primary]}) == (1 if task == "hellaswag" else 2)
    shown = [f"{100 * value:.2f}" for value in (want[primary], *want["ci95"][primary])]
    assert f"{primary} {shown[0]} % [{shown[1]}, {shown[2]}]" in done.err
    assert all(f"{key} {x[name]!r}" in done.err for x in samples(run)
               for key, name in (("prompt", "prompt"), ("answer", "answer"), ("output", "prediction")))  # fmt: skip


SCORES = {0: 0.9, 2: 0.1, 4: 0.5, 6: 0.3, 8: 0.4}  # by step: 4 is the best of the trained models, 8 the last
STOPS = ("--eval_generate", 1, "--sample_generations", 1, "--eval_on_start", "--eval_strategy", "steps", "--eval_steps",
         2, "--max_steps", 20, "--logging_steps", 3, "--save_best", "--early_stopping_patience", 2, "--val_fraction",
         0.25, "--keep_checkpoints")  # fmt: skip


def untimed(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without times."""
    lines = [line for line in metrics(run, "step") if "train_loss" not in line]
    return [{k: v for k, v in line.items() if "second" not in k and "runtime" not in k} for line in lines]


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations find the exact match of SCORES."""
    real = finetune.JepaTrainer.evaluation_loop

    def evaluation_loop(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.metrics[self.args.metric_for_best_model] = SCORES[self.state.global_step]
        return output

    monkeypatch.setattr(finetune.JepaTrainer, "evaluation_loop", evaluation_loop)


@pytest.mark.parametrize("flags", [("--predictors", 2, "--nitp"), ("--regular", "--lora")], ids=["projector", "lora"])
def test_best_model_is_saved_and_training_stops_early_also_if_resumed(flags, scripted, data, tmp_path):
    run = train(data, tmp_path / "run", *flags, *STOPS, "--save_total_limit", 9)
    record = read_json(run / "run.json")
    assert record["steps"] == 8 and record["best"] == {"step": 4, "eval_exact": 0.5}
    same_weights(run, run / "checkpoint-4")
    assert [p.name for p in complete_checkpoints(run)] == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    assert [line["step"] for line in metrics(run, "eval_loss")] == [x["step"] for x in samples(run)] == [0, 2, 4, 6, 8]
    assert sum(column(run, "tokens")) == record["tokens"]

    few = train(data, tmp_path / "few", *flags, *STOPS)  # --save_total_limit 1
    assert [p.name for p in complete_checkpoints(few)] == ["checkpoint-4", "checkpoint-8"]
    same_weights(run, few)
    for step in (6, 8):  # in the middle, and after the last step
        resumed = interrupted(run, step, tmp_path / f"from-{step}")
        train(data, resumed, *flags, *STOPS, "--save_total_limit", 9, "--resume")
        same_weights(run, resumed)
        assert samples(run) == samples(resumed)
        assert untimed(run) == untimed(resumed)
        assert read_json(resumed / "run.json")["best"] == record["best"]


def test_best_model_by_the_score_of_a_task_file(scripted, data, tmp_path):
    """The Trainer would minimize a value whose name ends in "loss"."""
    task = tmp_path / "my_loss.py"
    task.write_text("def score(generation, example):\n    return 0.5\n")
    run = train(data, tmp_path / "run", "--regular", *STOPS, "--task", task)
    record = read_json(run / "run.json")
    assert record["best"] == {"step": 4, "eval_my_loss": 0.5} and record["final"]["eval_my_loss"] == 0.5
    again = train(data, interrupted(run, 0, tmp_path / "again"), "--regular", *STOPS, "--task", task, "--resume")
    assert untimed(again) == untimed(run) and samples(again) == samples(run)


def test_of_equal_scores_the_lowest_loss_is_the_best(scripted, data, tmp_path, monkeypatch):
    for step in SCORES:
        monkeypatch.setitem(SCORES, step, 0.0)
    flags = [*STOPS[: STOPS.index("--early_stopping_patience")], "--val_fraction", 0.25, "--max_steps", 8]
    for rate in (1e-3, 1):  # the loss falls, or rises after the first evaluations
        run = train(data, tmp_path / f"run{rate}", "--regular", *flags, "--learning_rate", rate)
        losses = {line["step"]: line["eval_lm_loss"] for line in metrics(run, "eval_lm_loss") if line["step"] > 0}
        assert read_json(run / "run.json")["best"] == {"step": min(losses, key=losses.get), "eval_exact": 0.0}


def test_best_model_without_generations_is_that_of_the_lowest_loss(data, tmp_path):
    flags = ("--regular", "--eval_file", data, "--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 9,
             "--learning_rate", 1, "--early_stopping_patience", 1)  # fmt: skip
    run, last = (train(data, tmp_path / f"run{x}", *flags, x) for x in ("--save_best", "--no-save_best"))
    losses = column(run, "eval_lm_loss")
    assert len(losses) < 9 and losses[-1] >= losses[-2] == min(losses)
    assert column(last, "eval_lm_loss") == losses and "best" not in read_json(last / "run.json")
    assert read_json(run / "run.json")["best"] == {"step": len(losses) - 1, "eval_lm_loss": losses[-2]}
    assert not complete_checkpoints(run)


def test_examples_that_the_task_cannot_score_are_reported_before_anything_is_written(data, tmp_path):
    flags = ("--regular", "--eval_file", data, "--eval_generate", 2, "--task", "spider")
    assert f"{data}:1: " in start(data, tmp_path / "run", *flags, code=2).err and not (tmp_path / "run").exists()


def test_trackers_get_settings_curves_and_tables_of_generations(data, tmp_path, monkeypatch):
    import mlflow
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, value in {
        "WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_PROJECT": "other", "MLFLOW_EXPERIMENT_NAME": "other",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    (tmp_path / "mixed.py").write_text("def score(generation, example):\n    return example.id == 1 or 0.5\n")
    run = train(data, tmp_path / "run", "--predictors", 2, "--lbd", 1, "--max_steps", 2, "--eval_file", data,
                "--eval_strategy", "steps", "--eval_steps", 1, "--sample_generations", 2, "--report_to",
                "tensorboard,wandb,mlflow", "--run_name", "mine", "--project", "shop", "--task", "mixed.py",
                *NO_CHECKPOINTS)  # fmt: skip
    wandb.finish()
    wandb.teardown()  # another run reads the environment again
    curves = {key: column(run, key) for key in ("jepa_loss", "cosine_shuffled", "eval_cosine")}
    table = [[row[key] for key in ("step", "answer", "prediction", "exact")] for row in samples(run)]
    assert len(table) == 4

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    log = file.read_bytes()
    log = b"".join(log[at + 7 : at + 32768] for at in range(0, len(log), 32768))  # each block begins with a header
    for text in '\4shop \4mine llm_jepa/lbd llm_jepa/jepa_loss "cosine" llm_jepa/task train/jepa_loss'.split():
        assert text.encode() in log, text  # a name follows its length
    tables = [json.loads(p.read_text()) for p in sorted(file.parent.glob("files/media/table/*.json"))]
    found = [dict(zip(t["columns"], row, strict=True)) for t in tables for row in t["data"]]
    assert sorted([x["step"], x["answer"], x["prediction"], x["exact"]] for x in found) == sorted(table)

    (experiment,) = [x for x in mlflow.search_experiments() if x.name != "Default"]
    (tracked,) = mlflow.search_runs([experiment.experiment_id], output_format="list")
    assert (experiment.name, tracked.info.run_name, tracked.info.status) == ("shop", "mine", "FINISHED")
    assert tracked.data.params["llm_jepa/lbd"] == "1.0" and tracked.data.params["llm_jepa/predictors"] == "2"
    for key, values in curves.items():
        assert [m.value for m in mlflow.MlflowClient().get_metric_history(tracked.info.run_id, key)] == values
    found = mlflow.load_table("generations.json", [tracked.info.run_id])
    assert found[["step", "answer", "prediction", "exact"]].values.tolist() == table

    (folder,) = {p.parent for p in (run / "runs").rglob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    for key, values in curves.items():
        key = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
        assert [x.value for x in events.Scalars(key)] == pytest.approx(values)
    text = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"llm_jepa/lbd": 1.0' in text
    assert [x.step for x in events.Tensors("generations/text_summary")] == [1, 2]
    assert table[0][1] in str(events.Tensors("generations/text_summary")[0].tensor_proto)


def test_tracker_that_does_not_start_is_an_error_before_anything_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    done = start(data, tmp_path / "run", "--regular", "--max_steps", 1, "--report_to", "wandb")
    assert done.code == 2 and "--report_to wandb: " in done.err and "Traceback" not in done.err
    assert not any((tmp_path / "run").iterdir())
