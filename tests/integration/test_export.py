"""python -m llm_jepa.export: embeddings in sentence-transformers, scores in lm_eval's format, adapters merged."""

import hashlib
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, JEPA, MODEL, call, changed_copy, read_lines, snapshot, weights, write_rows

from llm_jepa.files import read_json

FLAGS = {
    "reverse": (*JEPA, "--reverse_pred"),
    "front": (*JEPA, "--front_pred"),
    "in_chat": (*JEPA, "--text_view", "in_chat"),
    "plain": ("--predictors", 0, "--lbd", 1, "--plain"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_retriever_gives_the_embeddings_of_the_run(name, trained, data, tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    run, plain = trained(*FLAGS[name]), ["--plain"] if name == "plain" else []
    done = call("llm_jepa.export", "retriever", run, tmp_path / "out", code=0)
    assert done.out.split() == [str(tmp_path / "out" / side) for side in ("text", "code")]
    flags = ("--input_file", data, "--export_embeddings", tmp_path / "v.safetensors", *plain)
    call("evaluate", "--model_name", run, *flags, code=0)
    for side, turn in (("text", 1), ("code", 2)):
        model = st.SentenceTransformer(str(tmp_path / "out" / side), device="cpu")
        for encode in (model.encode, model.encode_query, model.encode_document):
            got = encode([row["messages"][turn]["content"] for row in EXAMPLES], convert_to_tensor=True)
            torch.testing.assert_close(got, weights(tmp_path, "v.safetensors")[side], rtol=1e-4, atol=1e-4)
    again = call("llm_jepa.export", "retriever", run, tmp_path / "out", code=2)
    assert str(tmp_path / "out" / "text") in again.err


def test_adapter_and_folder_without_evaluation_are_refused(trained, tmp_path):
    run = trained(*JEPA, "--lora")
    for what, mentioned in (("retriever", f"export merged {run}"), ("lm_eval", "metrics.json")):
        done = call("llm_jepa.export", what, run, tmp_path / "out")
        assert done.code == 2 and mentioned in done.err and not (tmp_path / "out").exists()


def test_exported_merged_model_is_that_of_merge(trained, tmp_path):
    run, out = trained(*JEPA, "--plain", "--lora", "--merge", "--max_steps", 2), tmp_path / "out"
    assert call("llm_jepa.export", "merged", run, out, code=0).out.split() == [str(out)]
    assert snapshot(out) == snapshot(run / "merged")
    for refused, folder in ((run, out), (run / "merged", tmp_path / "no"), (MODEL, tmp_path / "no")):
        done = call("llm_jepa.export", "merged", refused, folder, code=2)
        assert str(out if folder == out else refused) in done.err and done.err.count("\n") == 1
    # A run of finetune8bh200.py whose frozen parameters were in bfloat16.
    half = changed_copy(run, tmp_path / "half", args={"sharding": None}, run={"computation": {"autocast": "bfloat16"}})
    call("llm_jepa.export", "merged", half, tmp_path / "b", code=0)
    assert {w.dtype for w in weights(tmp_path / "b").values()} == {torch.bfloat16}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_results_have_the_scores_and_samples_in_the_format_of_lm_eval(data, tmp_path):
    flags = ("--input_file", data, "--task", "synth", "--max_new_tokens", 3, "--max_examples", 20)
    folder, model = tmp_path / "base", MODEL  # the task has the name of the data
    assert call("evaluate", "--model_name", model, "--output_file", folder / "p.jsonl", *flags).code == 0
    metrics, rows = read_json(folder / "metrics.json"), read_lines(folder / "p.jsonl")
    file, sample_file = map(Path, call("llm_jepa.export", "lm_eval", folder, tmp_path / "out", code=0).out.split())
    date = file.name.removeprefix("results_").removesuffix(".json")
    assert sample_file.name == f"samples_words_{date}.jsonl" and file.parent.name == str(model).replace("/", "__")
    found, samples = read_json(file), read_lines(sample_file)
    scores = ("dfa_equal", "exact", "startswith", "stop_rate")
    assert {name: found["results"]["words"][f"{name},none"] for name in scores} == {n: metrics[n] for n in scores}
    p = metrics["stop_rate"]
    assert found["results"]["words"]["stop_rate_stderr,none"] == pytest.approx((p * (1 - p) / 19) ** 0.5)
    assert found["n-samples"] == {"words": {"original": 24, "effective": 20}}
    assert (found["versions"], found["n-shot"]) == ({"words": 1}, {"words": 0})
    assert found["higher_is_better"]["words"] == dict.fromkeys(scores, True)
    assert found["configs"]["words"]["output_type"] == "generate_until"
    assert found["config"]["model_args"]["pretrained"] == found["model_name"] == str(model)
    assert found["git_hash"] == metrics["git_commit"] and found["date"] == (folder / "metrics.json").stat().st_mtime
    for sample, row, example in zip(samples, rows, EXAMPLES, strict=False):
        system, user, answer = (turn["content"] for turn in example["messages"])
        assert sample["doc"] == {"system": system, "history": [], "user": user, "assistant": answer}
        assert (sample["doc_id"], sample["target"], sample["filter"]) == (row["id"] - 1, answer, "none")
        assert sample["resps"] == [[row["prediction"]]] and sample["filtered_resps"] == [row["prediction"]]
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
        assert system in prompt and user in prompt and answer not in prompt.rpartition(user)[2]
        assert sample["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == 3
        values = [row[name] for name in scores[:3]] + [row["stop_reason"] == "stop"]
        assert [sample[name] for name in sample["metrics"]] == values
        doc = json.dumps(sample["doc"], indent=2, ensure_ascii=False)
        assert [sample[f"{n}_hash"] for n in ("doc", "prompt", "target")] == [sha256(x) for x in (doc, prompt, answer)]
    together = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    assert len(samples) == 20 and found["task_hashes"] == {"words": sha256(together)}
    changed = shutil.copy(data, tmp_path / "words_test.jsonl")
    record = metrics["settings"] | {"input_file": str(changed)}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"settings": record, "data_sha256": "other"}))
    assert str(changed) in call("llm_jepa.export", "lm_eval", folder, tmp_path / "out", code=2).err


def test_results_of_a_task_file_are_exported_from_a_moved_run(trained, data, tmp_path):
    task = tmp_path / "half.py"
    task.write_text("def score(generation, example):\n    return example.id % 3 / 2\n")
    run, data = trained(*JEPA), tmp_path / "words_test.jsonl"
    write_rows(data, [x for row in EXAMPLES for x in ({"text": "t", "code": "c"}, row)])  # half of them without a chat
    flags = ("--input_file", data, "--task", task, "--max_new_tokens", 2, "--process_split", "test", "--test_size", 0.5)
    call("evaluate", "--model_name", run, *flags, code=0)
    done = call("llm_jepa.export", "lm_eval", run.rename(tmp_path / "moved"), tmp_path / "out", code=0)
    file, samples = map(Path, done.out.split())
    (found,), values = read_json(file)["results"].values(), [row["half"] for row in read_lines(samples)]
    assert found["half,none"] == pytest.approx(statistics.fmean(values)) and len({*values}) == 3
    assert found["half_stderr,none"] == pytest.approx(statistics.stdev(values) / len(values) ** 0.5)
    assert read_json(file)["n-samples"] == {"words": {"original": len(values), "effective": len(values)}}
    task.write_text("def score(generation, example):\n    return 1\n")
    assert str(task) in call("llm_jepa.export", "lm_eval", tmp_path / "moved", tmp_path / "out", code=2).err
