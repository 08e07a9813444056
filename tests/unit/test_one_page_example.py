"""The files in examples/: the method in one page gives the loss of finetune.py, and the Python API works."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, column, dry_run, message_row, read_json, write_rows

sys.path.insert(0, str(ROOT / "examples"))

import llm_jepa_in_one_page as example  # noqa: E402
import python_api  # noqa: E402


def test_one_page_example_has_the_loss_and_gradient_of_finetune(tmp_path: Path):
    model, tokenizer = example.load()
    lm, jepa, total = example.objective(model, tokenizer)
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "pairs.jsonl", [message_row(text, code, None) for text, code in example.PAIRS])
    found = dry_run(
        "--train_file", data, "--model_name", tmp_path / "model", "--predictors", example.PREDICTORS,
        "--lbd", example.LBD, "--gamma", example.GAMMA, "--dry_run", len(example.PAIRS),
    )  # fmt: skip
    expected = {"lm_loss": lm.item(), "jepa_loss": jepa.item(), "total_loss": total.item()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert jepa.item() > 0.01  # random views are apart, so the comparison is not of zeros


def test_python_api_example_trains_scores_and_embeds(tmp_path: Path):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(python_api.TRAIN.read_text().splitlines(keepends=True)[:16]))
    scores, views = python_api.main(str(tmp_path / "run"), data, steps=2, examples=12, max_new_tokens=4)
    assert read_json(tmp_path / "run" / "run.json")["status"] == "finished"
    assert column(tmp_path / "run", "pairs") == [8, 8]
    assert set(scores) == {"dfa_equal", "exact", "startswith", "stop_rate"}
    assert all(0 <= low <= share <= high <= 1 for share, (low, high) in scores.values())
    assert views["n"] == 12 and -1 <= views["cosine"] <= 1
