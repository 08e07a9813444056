"""evaluate.py from the command line: scores, files, resume, refusals, run folders."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import MODEL, call, changed_copy, half_token, message_row, read_lines, snapshot, weights, write_rows
from safetensors.torch import save_file

import evaluate
from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Problems, read_examples, split_examples
from llm_jepa.evaluation import embeddings, generation
from llm_jepa.evaluation.settings import EvaluationSettings, check_evaluation_settings
from llm_jepa.files import read_json, sha256, write_json
from llm_jepa.model import check_name
from llm_jepa.scoring.tasks import interval

STEPS = 16
USERS = ["strings with a vowel", "x", "any character or a vowel, 6 times or more, " * 6, "naïve café — 你好 🙂",
         "words that hold a number", "strings that start with the word 'cat'", "  spaces around  ", "a", "two\nlines",
         "lines with [0-9]+ and (a|b)*", "strings with at least 2 of the word 'blue'"]  # fmt: skip


def score(model: object, data: object, output: object, *flags: object, code: int | None = None):
    """evaluate.py with a model, three examples in a batch unless `flags` say otherwise."""
    sizes = () if "--tokens_per_batch" in flags else ("--batch_size", 3)
    return call("evaluate", "--model_name", model, "--input_file", data, "--output_file", output, "--max_new_tokens",
                STEPS, "--dtype", "float32", *sizes, *flags, code=code)  # fmt: skip


def score_file(predictions: object, data: object, *flags: object, code: int = 0):
    return call("evaluate", "--score_only", predictions, "--input_file", data, *flags, code=code)


def metrics_of(folder: Path) -> dict:
    return read_json(folder / "metrics.json")


def gold_predictions(path: Path, data: Path, ids: list[int] | None = None) -> Path:
    """A file of the data's own answers as predictions."""
    rows = [{"id": e.id, "prediction": e.assistant} for e in read_examples(str(data), Problems())]
    return write_rows(path, [r for r in rows if ids is None or r["id"] in ids])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model some of whose responses stop: its stop token is one that half of the golden model's responses contain."""
    folder = tmp_path_factory.mktemp("model")
    data = write_rows(folder / "synth_test.jsonl", [message_row(user, "a", "Write.") for user in USERS])
    loaded, encoder = evaluate.load(str(MODEL), EvaluationSettings(dtype="float32"))
    examples = read_examples(str(data), Problems())
    _, prompts = generation.encode_prompts(loaded.config, encoder.renderer, examples, Problems())
    responses = generation.generate_tokens(loaded, 0, [], prompts, STEPS, generation.Plan())
    return changed_copy(MODEL, folder / "stops", generation_config={"eos_token_id": [4, half_token(responses)]})


@pytest.fixture(scope="module")
def data(tmp_path_factory, model) -> Path:
    """Examples whose answer is the model's response, or its beginning, or something else, in turn."""
    folder = tmp_path_factory.mktemp("data")
    path = write_rows(folder / "synth_test.jsonl", [message_row(user, "a", "Write.") for user in USERS])
    assert score(model, path, folder / "first" / "p.jsonl").code == 0
    rows = []
    for i, row in enumerate(read_lines(folder / "first" / "p.jsonl")):
        responses = row["prediction"].strip()
        answer = [responses or "?", responses[:2].strip() or "?", "something else"][i % 3]
        rows.append(message_row(USERS[i], answer, "Write."))
    return write_rows(path, rows)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> tuple[Path, object]:
    """(folder of an uninterrupted evaluation, what it printed)"""
    folder = tmp_path_factory.mktemp("finished")
    return folder, score(model, data, folder / "p.jsonl", code=0)


# ----------------------------------------------------------------------------------------------------------- scores


def test_metrics_and_table_summarize_the_predictions(model, data, finished):
    folder, done = finished
    examples, rows, metrics = read_examples(str(data), Problems()), read_lines(folder / "p.jsonl"), metrics_of(folder)
    assert [row["id"] for row in rows] == list(range(1, len(USERS) + 1))
    for row, example in zip(rows, examples, strict=True):
        responses, answer = row["prediction"].strip(), example.assistant.strip()
        assert (row["exact"], row["startswith"]) == (responses == answer, responses.startswith(answer))
        assert row["dfa_equal"] == (responses == answer)  # these answers are no regular expressions
    n, hits = len(rows), {name: sum(row[name] for row in rows) for name in ("dfa_equal", "exact", "startswith")}
    hits["stop_rate"] = sum(row["stop_reason"] == "stop" for row in rows)
    assert 0 < hits["exact"] < hits["startswith"] < n and 0 < hits["stop_rate"] < n
    shown = [line.split() for line in done.out.splitlines()]
    assert shown[0] == ["synth,", "n", "=", str(n)] and [words[0] for words in shown[2:6]] == list(hits)
    for words, (name, count) in zip(shown[2:6], hits.items(), strict=True):
        low, high = interval([True] * count + [False] * (n - count))
        assert metrics[name] == count / n and metrics["ci95"][name] == pytest.approx([low, high])
        assert words[1:] == [f"{100 * count / n:.2f}", f"[{100 * low:.2f},", f"{100 * high:.2f}]"]
    assert (metrics["task"], metrics["n"], metrics["score"]) == ("synth", n, "dfa_equal")
    assert metrics["data_sha256"] == sha256(data)
    assert metrics["settings"]["max_new_tokens"] == STEPS and metrics["settings"]["model_name"] == str(model)
    assert metrics["versions"]["torch"] == torch.__version__ and "git_commit" in metrics
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.json", "p.jsonl"]
    assert str(folder / "p.jsonl") in done.err


def test_score_only_gives_the_scores_of_the_evaluation(data, finished, tmp_path):
    folder, _ = finished
    score_file(folder / "p.jsonl", data, "--output_file", tmp_path / "p.jsonl")
    ours, theirs = metrics_of(tmp_path), metrics_of(folder)
    for name in ("task", "n", "score", "exact", "startswith", "stop_rate", "ci95", "data_sha256"):
        assert ours[name] == theirs[name]
    assert read_lines(tmp_path / "p.jsonl") == read_lines(folder / "p.jsonl")


def test_stop_rate_needs_a_stop_reason_in_every_row(data, tmp_path):
    rows = read_lines(gold_predictions(tmp_path / "p.jsonl", data))
    rows = [row | {"stop_reason": "stop" if i else None} for i, row in enumerate(rows)]
    score_file(write_rows(tmp_path / "p.jsonl", rows), data)
    assert metrics_of(tmp_path)["stop_rate"] is None


@pytest.mark.parametrize(
    "bad, expected",
    [(b'{"prediction": "x"}', "p.jsonl:3"),
     (b'{"id": true, "prediction": "x"}', "p.jsonl:3"),
     (b'{"id": 3, "prediction": "\\ud800"}', "p.jsonl:3"),
     (b'{"id": 3, "prediction": "x", "stop_reason": "eos"}', "p.jsonl:3"),
     (b'{"id": 3, "prediction": "\xff"}', "p.jsonl:3"),
     (b'{"id": 2, "prediction": "x"}', "p.jsonl:3"),
     (b"", ": 3 …"),
     (b'{"id": 3, "prediction": "x"}\n{"id": 99, "prediction": "x"}', ": 99 …")],
)  # fmt: skip
def test_score_only_refuses_predictions_for_other_examples(bad, expected, data, tmp_path):
    given = gold_predictions(tmp_path / "p.jsonl", data)
    rows = given.read_bytes().splitlines()
    given.write_bytes(b"\n".join([*rows[:2], bad, *rows[3:]]) + b"\n")
    before = snapshot(tmp_path)
    done = score_file(given, data, code=2)
    assert expected in done.err and str(given) in done.err
    assert snapshot(tmp_path) == before


def test_score_gold_refuses_data_of_another_task(tmp_path):
    good = write_rows(tmp_path / "synth_test.jsonl", [message_row("a", "x&y"), message_row("b", ".*")])
    assert "100.00" in call("evaluate", "--score_gold", "--input_file", good, code=0).out
    assert str(good) in call("evaluate", "--score_gold", "--input_file", good, "--task", "gsm8k", code=2).err
    assert [p.name for p in tmp_path.iterdir()] == [good.name]


def test_scores_of_sql_have_the_checksum_of_the_databases(tmp_path):
    data = write_rows(tmp_path / "spider_test.jsonl", [message_row("For db_id:[town_library]\n\nWhich?", "SELECT 1")])
    score_file(gold_predictions(tmp_path / "p.jsonl", data), data)
    assert (metrics_of(tmp_path)["exact"], len(metrics_of(tmp_path)["databases_sha256"])) == (1, 64)


@pytest.mark.parametrize("flags", [(), ("--predictors", 1, "--text_view", "in_chat")], ids=str)
def test_retrieval_is_that_of_the_views_as_training_reads_them(flags, data, tmp_path):
    run = trained(tmp_path / "run", "--train_file", data, *flags) if flags else MODEL
    done = score(run, data, tmp_path / "p.jsonl", "--max_new_tokens", 1, "--max_examples", 8, code=0)
    views = ("--similarity", "--dtype", "float32", "--max_examples", 8, "--output_file", tmp_path / "s.json")
    call("evaluate", "--model_name", run, "--input_file", data, *views, code=0)
    figures, found = read_json(tmp_path / "s.json"), metrics_of(tmp_path)["retrieval"]
    assert found["n"] == 8 and found["chance"]["r1"] == 1 / 8 and "retrieval, n = 8\n" in done.out
    for name in ("text_to_code", "code_to_text", "chance", "cosine", "cosine_shuffled"):
        assert found[name] == pytest.approx(figures[name], abs=1e-6), name
    shown = [line.split() for line in done.out.splitlines() if line.startswith("text to code")]
    assert shown[0][3:] == [f"{100 * value:.2f}" for value in found["text_to_code"].values()]


@pytest.mark.parametrize("why", ["long view", "overflow", "choices"])
def test_scores_without_retrieval_have_a_note_that_says_why(why, model, data, tmp_path, monkeypatch):
    rows = read_lines(data)[:4]
    if why == "long view":
        rows[2]["code"] = [{"role": "assistant", "content": "[0-9] " * 3000}]
    if why == "overflow":
        nan = lambda hidden, mask, view_at: hidden[:, 0] * torch.nan  # noqa: E731
        monkeypatch.setitem(embeddings.POOLINGS, "last", nan)
    file = write_rows(tmp_path / f"{'hellaswag' if why == 'choices' else 'synth'}_test.jsonl", rows)
    flags = ("--model_name", model, "--input_file", file, "--output_file", tmp_path / "p.jsonl")
    done, metrics = call("evaluate", *flags, code=0), metrics_of(tmp_path)
    place = {"long view": f"{file}:3:", "overflow": "float32", "choices": "hellaswag"}[why]
    assert place in metrics["notes"][0] and metrics["notes"][0] in done.err
    assert "retrieval" not in metrics and metrics["n"] == len(read_lines(tmp_path / "p.jsonl")) == 4
    if why == "long view":
        call("evaluate", *flags, "--skip_bad_examples", "--overwrite", code=0)
        assert (metrics_of(tmp_path)["n"], metrics_of(tmp_path)["retrieval"]["n"]) == (4, 3)


# ------------------------------------------------------------------------------------------------ resume, overwrite


def watch_batches(monkeypatch, batches: int = -1) -> list[int]:
    """The size of each batch that is generated from now on; an interrupt after some `batches`."""
    sizes, true = [], generation.generate_batch

    def watch(*arguments):
        if len(sizes) == batches:
            raise KeyboardInterrupt
        sizes.append(len(arguments[-1]))
        return true(*arguments)

    monkeypatch.setattr(generation, "generate_batch", watch)
    return sizes


def interrupted(model, data, path, monkeypatch, batches: int = 2, *flags: object) -> None:
    with monkeypatch.context() as patch:
        watch_batches(patch, batches)
        score(model, data, path, *flags, code=130)


@pytest.mark.parametrize(("batches", "cut"), [(0, 0), (3, 0), (2, 1), (2, 9)])
def test_interrupted_evaluation_resumes(batches, cut, model, data, finished, tmp_path, monkeypatch):
    """Also if the end of the last line was not written (`cut` bytes)."""
    path = tmp_path / "p.jsonl"
    interrupted(model, data, path, monkeypatch, batches)
    assert len(read_lines(path)) == 3 * batches and not (tmp_path / "metrics.json").exists()
    path.write_bytes(path.read_bytes()[: -cut or None])
    sizes = watch_batches(monkeypatch)
    assert score(model, data, path).code == 0
    assert sum(sizes) == len(USERS) - 3 * (batches - (cut > 0)), "complete batches are kept"
    assert path.read_bytes() == (finished[0] / "p.jsonl").read_bytes()
    for name in ("ci95", "retrieval"):
        assert metrics_of(tmp_path)[name] == metrics_of(finished[0])[name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "p.jsonl"]


def test_token_budget_changes_no_response(model, data, finished, tmp_path, monkeypatch):
    sizes = watch_batches(monkeypatch)
    assert score(model, data, tmp_path / "p.jsonl", "--tokens_per_batch", 150).code == 0
    assert (tmp_path / "p.jsonl").read_bytes() == (finished[0] / "p.jsonl").read_bytes()
    assert 1 < len(sizes) < len(USERS)


@pytest.mark.parametrize("change", ["--max_new_tokens", "--max_examples", "data", "weights", "no settings"])
def test_evaluation_with_other_settings_does_not_resume(change, model, data, tmp_path, monkeypatch):
    folder, rows, path = tmp_path / "model", tmp_path / "synth_test.jsonl", tmp_path / "out" / "p.jsonl"
    shutil.copytree(model, folder)
    shutil.copy(data, rows)
    interrupted(folder, rows, path, monkeypatch)
    value = {"--max_new_tokens": STEPS + 1, "--max_examples": 9}.get(change)
    if change == "data":
        rows.write_bytes(rows.read_bytes().replace(b"cat", b"dog"))
    elif change == "weights":
        save_file({k: v * 1.01 for k, v in weights(folder).items()}, folder / "model.safetensors", {"format": "pt"})
    elif change == "no settings":
        path.with_name("p.jsonl.settings.json").unlink()
    before = snapshot(path.parent)
    flags = (change, value) if value else ()
    done = score(folder, rows, path, *flags)
    assert done.code == 2 and str(path) in done.err and "--overwrite" in done.err
    assert value is None or change in done.err
    assert snapshot(path.parent) == before
    assert score(folder, rows, path, *flags, "--overwrite").code == 0
    assert metrics_of(path.parent)["n"] == len(read_lines(path)) == (9 if change == "--max_examples" else len(USERS))


def test_finished_evaluation_is_replaced_only_with_overwrite(model, data, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    assert score(model, data, path, "--max_examples", 2).code == 0
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load", None)  # refused before the model is loaded
        assert [score(model, data, path, *flags).code for flags in ((), ("--max_examples", 2))] == [2, 2]
    done = score(model, data, tmp_path / "other.jsonl", "--overwrite")
    assert done.code == 2 and "metrics.json" in done.err and "p.jsonl" in done.err, "one metrics.json in a folder"
    assert snapshot(tmp_path) == before
    assert score(model, data, path, "--overwrite").code == 0
    assert len(read_lines(path)) == metrics_of(tmp_path)["n"] == len(USERS)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", ["data", "database", "model", "untuned model"])
def test_bad_input_is_reported_and_loses_no_results(bad, model, data, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "old")
    flags, place = (), f"{data}:"
    if bad == "data":
        rows, data = data.read_bytes(), tmp_path / "synth_test.jsonl"
        data.write_bytes(rows.split(b"\n")[0] + b"\n{\n")
        place = f"{data}:2:"
    elif bad == "database":
        data = write_rows(tmp_path / "spider_test.jsonl", [message_row("For db_id:[nowhere]\n\nWhich?", "SELECT 1")])
        place = f"{data}:1: db_id 'nowhere'"
    elif bad == "model":
        model = shutil.copytree(MODEL, tmp_path / "model")
        (model / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:50_000])
        place = str(model)
    else:  # found before the tuned model generates
        base = changed_copy(MODEL, tmp_path / "base", config={"max_position_embeddings": 50})
        flags = ("--split_tune_untune", "--original_model_name", base)
    before = snapshot(tmp_path)
    for out, more in (("new", ()), ("old", ("--overwrite",))):
        done = score(model, data, tmp_path / out / "p.jsonl", *flags, *more)
        assert done.code == 2 and place in done.err and "Traceback" not in done.err and not done.out
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["generate", "choose", "embed"])
def test_examples_over_the_context_are_skipped_on_request(kind, model, tmp_path):
    folder = changed_copy(model, tmp_path / "short", config={"max_position_embeddings": 120})
    rows = [message_row(user, "B") for user in ("short?", "long " * 300)]
    data = write_rows(tmp_path / ("hellaswag_test.jsonl" if kind == "choose" else "synth_test.jsonl"), rows)
    flags = ["--model_name", folder, "--input_file", data, "--output_file", tmp_path / "out" / "p.jsonl"]
    flags += {"embed": ["--similarity"], "generate": ["--max_new_tokens", 2], "choose": []}[kind]
    assert f"{data.name}:2:" in call("evaluate", *flags, code=2).err and not (tmp_path / "out").exists()
    assert f"{data}:2:" in call("evaluate", *flags, "--skip_bad_examples", code=0).err
    written = read_json(tmp_path / "out" / ("p.jsonl" if kind == "embed" else "metrics.json"))
    assert (written["n"], written["skipped_examples"]) == (1, 1)


@pytest.mark.parametrize("flag", ["--model_name", "--original_model_name"])
def test_model_that_does_not_exist_is_refused_by_flag(flag, model, data, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    others = () if flag == "--model_name" else ("--model_name", model)
    done = call("evaluate", flag, "runs/mien", "--input_file", data, "--output_file", "p.jsonl", *others)
    assert done.code == 2 and f"{flag} runs/mien" in done.err
    monkeypatch.chdir("runs")
    check_name("gpt2")  # a hub name even beside runs


WRONG_FLAGS = [  # the settings besides the input file, the number of processes, and what the error mentions
    ({"model_name": "m", "score_only": "p", "batch_size": 0, "max_new_tokens": 0, "max_examples": -1,
      "nosplit_data": True, "process_split": "test", "task": "nothing", "split_tune_untune": True}, 1,
     ["--score_only", "--batch_size 0", "--max_new_tokens 0", "--max_examples -1", "--nosplit_data", "--task nothing",
      "--original_model_name"]),
    ({"score_only": "p", "process_split": "test", "split_seed": -1}, 1, ["--split_seed -1"]),
    ({"input_file": None, "test_size": 0.5, "split_seed": 3}, 1,
     ["--input_file", "--model_name", "--test_size, --split_seed"]),
    ({"model_name": str(MODEL)}, 1, ["--output_file"]),
    ({"batch_size": 3, "tokens_per_batch": -1}, 1, ["--batch_size", "--tokens_per_batch -1"]),
    ({"score_only": "p", "plain": True, "dtype": "float32"}, 1, ["--plain, --dtype"]),
    ({"load_in_8bit": True, "load_in_4bit": True, "text_field": "a", "system": "b", "embedding_layer": 1}, 1,
     ["--load_in_8bit and --load_in_4bit", "--code_field", "--embedding_layer"]),
    ({"model_name": str(MODEL), "similarity": True, "export_embeddings": "o", "output_file": "o", "task": "text"}, 1,
     ["--export_embeddings must", "--task"]),
    ({"device_map": "auto", "score_only": "p", "similarity": True, "t_sne": True}, 2,
     ["--device_map, --score_only, --similarity, --t_sne: not under torchrun"]),
    ({"score_only": "p", "spider_path": "x", "output_file": "a/metrics.json"}, 1,
     ["--spider_path", "--output_file a/metrics.json"]),
    ({"score_only": "p", "output_file": "./synth_test.jsonl"}, 1, ["--output_file"]),
    ({"input_file": str(MODEL), "score_only": str(MODEL)}, 1, [f"--input_file {MODEL}", f"--score_only {MODEL}"]),
    ({"input_file": "a/synth/rows.jsonl", "score_only": "p"}, 1, ["--task"]),  # the base name decides
    ({"model_name": str(MODEL), "output_file": "p", "engine": "vllm", "load_in_8bit": True, "batch_size": 2,
      "tensor_parallel_size": 0}, 2,
     ["--load_in_8bit, --batch_size: not with --engine vllm", "torchrun", "--tensor_parallel_size 0"]),
    ({"model_name": str(MODEL), "output_file": "p", "engine": "vllm", "task": "hellaswag"}, 1, ["hellaswag"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "processes", "mentioned"), WRONG_FLAGS)
def test_wrong_flags_are_refused_together(flags, processes, mentioned):
    with pytest.raises(UsageError) as error:
        check_evaluation_settings(EvaluationSettings(**{"input_file": "synth_test.jsonl"} | flags), processes)
    assert [name for name in mentioned if name not in str(error.value)] == []


# ------------------------------------------------------------------------------------------------- run folders, splits


def trained(folder: Path, *flags: object) -> Path:
    method = () if "--predictors" in flags else ("--regular",)
    call("finetune", "--model_name", MODEL, *method, "--max_steps", 1, "--grad_accum", 1, "--learning_rate", 0.05,
         "--save_strategy", "no", "--output_dir", folder, *flags, code=0)  # fmt: skip
    return folder


def test_split_tune_untune_scores_by_the_untuned_models_result(model, data, finished, tmp_path, monkeypatch):
    assert score(MODEL, data, tmp_path / "golden" / "p.jsonl").code == 0
    rows, responses = read_lines(data), read_lines(tmp_path / "golden" / "p.jsonl")
    for i in (2, 5, 8):  # examples that the model gets wrong
        rows[i]["messages"][2]["content"] = responses[i]["prediction"]
    data = write_rows(tmp_path / "synth_test.jsonl", rows)
    out, flags = tmp_path / "out", ("--split_tune_untune", "--original_model_name", MODEL)
    interrupted(model, data, out / "p.jsonl", monkeypatch, 5, *flags)  # four batches each
    assert len(read_lines(out / "untuned" / "p.jsonl")) == 3
    with monkeypatch.context() as patch:
        sizes = watch_batches(patch)
        done = score(model, data, out / "p.jsonl", *flags, code=0)
    assert sum(sizes) == len(USERS) - 3
    metrics, tuned, untuned = metrics_of(out), read_lines(out / "p.jsonl"), read_lines(out / "untuned" / "p.jsonl")
    assert [row["prediction"] for row in untuned] == [row["prediction"] for row in responses]
    assert [row["prediction"] for row in tuned] == [row["prediction"] for row in read_lines(finished[0] / "p.jsonl")]
    right = {row["id"] for row in untuned if row["exact"]}
    assert {3, 6, 9} <= right and len(right) < len(USERS) and metrics["untuned"]["exact"] == len(right) / len(USERS)
    assert metrics["untuned"]["retrieval"] == metrics["retrieval"], "models that differ in their stop token only"
    for part, ids in (("right", right), ("wrong", {row["id"] for row in untuned} - right)):
        got = metrics["by_untuned"][part]
        assert got["n"] == len(ids) and f"{part}: synth, n = {len(ids)}\n" in done.out
        assert got["exact"] == sum(row["exact"] for row in tuned if row["id"] in ids) / len(ids)
    assert sorted(snapshot(out)) == ["metrics.json", "p.jsonl", "untuned/p.jsonl"]


def test_untuned_model_is_not_the_base_of_the_adapter(eight, tmp_path):
    adapter, other = trained(tmp_path / "adapter", "--train_file", eight, "--lora"), tmp_path / "other"
    base = weights(MODEL)
    halved = base | {"lm_head.weight": base["lm_head.weight"] / 2}
    save_file(halved, shutil.copytree(MODEL, other) / "model.safetensors", {"format": "pt"})
    for untuned, expected in ((True, base), (False, halved)):  # without --split_tune_untune the base has moved
        s = EvaluationSettings(original_model_name=str(other), split_tune_untune=untuned)
        assert evaluate.load(str(adapter), s)[0].get_output_embeddings().weight.equal(expected["lm_head.weight"])


def test_run_and_its_checkpoint_are_evaluated_in_their_own_format_and_part(data, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "synth_train.jsonl", [message_row(f"q{i}", f"a{i}") for i in range(10)])
    flags = ("--plain", "--data_file", rows, "--predictors", 2, "--save_strategy", "steps", "--keep_checkpoints")
    run = trained(tmp_path / "run", *flags, "--save_steps", 1)
    checkpoint, results = run / "checkpoint-1", []
    for folder in (run, checkpoint):
        done = score(folder, data, tmp_path / "no" / "p.jsonl", code=2)
        assert str(folder) in done.err and "--plain" in done.err
        done = score(folder, rows, tmp_path / "no" / "p.jsonl", "--plain", code=2)
        assert "--process_split test" in done.err and "--nosplit_data" in done.err
        out = tmp_path / folder.name
        score(folder, rows, out / "p.jsonl", "--plain", "--process_split", "test", code=0)
        results.append([(out / "p.jsonl").read_text(), *(metrics_of(out)[name] for name in ("notes", "retrieval"))])
    assert results[0] == results[1] and not (tmp_path / "no").exists()
    assert score(run, rows, tmp_path / "all" / "p.jsonl", "--plain", "--nosplit_data").code == 0
    assert (metrics_of(out)["n"], metrics_of(tmp_path / "all")["n"]) == (2, 10)
    chat = changed_copy(run, tmp_path / "chat", args={"plain": False})
    assert "--plain" in score(chat, data, tmp_path / "no" / "p.jsonl", "--plain", code=2).err
    write_json(run / "run.json", read_json(run / "run.json") | {"status": "interrupted"})
    monkeypatch.chdir(checkpoint)  # the folder is known by whatever name
    score(".", data, tmp_path / "here" / "p.jsonl", "--plain", "--max_examples", 1, code=0)
    (run / "config.json").unlink()  # it is saved at the end
    assert "interrupted" in score("..", data, tmp_path / "there" / "p.jsonl", "--plain", code=2).err
    assert not (tmp_path / "there").exists()


def test_note_counts_the_examples_that_the_run_was_trained_on(tmp_path, monkeypatch):
    data = write_rows(tmp_path / "synth_train.jsonl", [message_row(f"q{i}", f"a{i}") for i in range(10)])
    flags = ("--train_file", data, "--val_fraction", 0.3, "--split_seed", 5, "--eval_strategy", "no")
    run = trained(tmp_path / "run", *flags)
    held_out = [e.id for e in split_examples(read_examples(str(data), Problems()), 0.3, 5)[1]]
    parts = {"all": ["--nosplit_data"], **{name: ["--process_split", name] for name in ("test", "train")}}
    for name, part in parts.items():  # by the run's own split
        score(run, data, tmp_path / name / "p.jsonl", *part, code=0)
    found = {name: metrics_of(tmp_path / name) for name in parts}
    assert [row["id"] for row in read_lines(tmp_path / "test" / "p.jsonl")] == sorted(held_out)
    assert [found["test"]["settings"][name] for name in ("test_size", "split_seed")] == [0.3, 5]
    assert found["test"]["notes"] == [] and "7 of these 7" in found["train"]["notes"][0]
    assert "7 of these 10" in found["all"]["notes"][0]
    done = score(run, data, tmp_path / "other" / "p.jsonl", *parts["test"], "--test_size", 0.5, code=2)
    assert "--test_size 0.3 --split_seed 5" in done.err
    same = ("--test_size", 0.3, "--split_seed", 5)  # as finetune.py splits, without a run
    score_file(gold_predictions(tmp_path / "gold.jsonl", data, held_out), data, *parts["test"], *same)
    assert metrics_of(tmp_path)["n"] == 3
    monkeypatch.chdir(run)  # predictions without a model are not those of a run that happens to be here
    score_file(gold_predictions(tmp_path / "gold.jsonl", data), data, "--overwrite")
    assert metrics_of(tmp_path)["notes"] == []


@pytest.mark.parametrize("flag", ["--output_file", "--export_embeddings"])
def test_places_that_no_file_can_be_written_to_are_refused_first(flag, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *a: 1 / 0)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "p.jsonl", tmp_path / "folder", Path("/dev/stdout")):
        done = call("evaluate", "--model_name", model, "--input_file", data, flag, place, "--overwrite")
        assert done.code == 2 and str(place.parent) in done.err and done.err.count("\n") == 1, place
    matched = ("--input_file", tmp_path / "fi*", "--task", "text", flag, tmp_path / "file", "--overwrite")
    assert "--input_file" in call("evaluate", "--model_name", model, *matched, code=2).err
    assert (tmp_path / "file").read_text() == "mine"


def test_default_length_fits_the_longest_answer_and_cut_responses_are_counted(finished, data, tmp_path):
    rows = read_lines(data)
    rows[0]["messages"][2]["content"] = "a word " * 200
    long = write_rows(tmp_path / "synth_test.jsonl", rows)
    output = ("--output_file", tmp_path / "p.jsonl", "--max_examples", 3)
    call("evaluate", "--model_name", MODEL, "--input_file", long, *output, code=0)
    tokenizer = evaluate.load(str(MODEL), EvaluationSettings())[1].renderer.tokenizer
    length = len(tokenizer("a word " * 200).input_ids)
    assert 128 < length < metrics_of(tmp_path)["settings"]["max_new_tokens"] < length + 128
    metrics, predicted = metrics_of(finished[0]), read_lines(finished[0] / "p.jsonl")
    assert metrics["cut_at_limit"] == sum(row["stop_reason"] == "length" for row in predicted) > 0
    assert f"{metrics['cut_at_limit']} of {len(predicted)}" in finished[1].out
