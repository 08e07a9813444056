"""--reference_grad_scale: each micro-batch is normalised by itself, as in the published trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, call, message_row, same_weights, weights, write_rows
from safetensors.torch import load_file
from transformers import set_seed

import finetune
from llm_jepa.data import batching, rendering
from llm_jepa.data.examples import Problems, read_examples
from llm_jepa.model import load_model, load_tokenizer

MODEL = GOLDEN / "models" / "llama3"
RATE, LBD = 1e-2, 2.0
LONG = [message_row(f"lines with {'a letter and ' * (i % 5)}{i}", f"({i}){'.*' * (i % 4)}") for i in range(10)]
ALIKE = [message_row(f"lines with the letter {c}", f"({c})") for c in "abcdefghijklmnop"]


def train(data: Path, out: Path, *flags: object) -> Path:
    """SGD at a constant rate: the weights say what the gradients were."""
    done = call("finetune", "--train_file", data, "--model_name", MODEL, "--output_dir", out, "--lbd", LBD,
                "--batch_size", 2, "--grad_accum", 4, "--optim", "sgd", "--learning_rate", RATE,
                "--lr_scheduler_type", "constant", "--save_strategy", "no", *flags)  # fmt: skip
    assert done.code == 0, done.err
    return out


def lines(run: Path) -> list[dict]:
    return [x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "total" in x]


def by_hand(data: Path, lm_labels: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """(weights, gradient norm of each step, loss of each step): the sum of the micro-batches' own mean losses."""
    s = finetune.Settings(model_name=str(MODEL), lbd=LBD, lm_labels=lm_labels)
    tokenizer = load_tokenizer(s)
    set_seed(42)  # rows of added tokens are drawn at random
    model = load_model(s, tokenizer).train()
    head = finetune.HeadInput(model)
    examples = read_examples(str(data), Problems())
    items = batching.SegmentDataset(examples, rendering.Renderer(tokenizer, s), Problems()).items
    micro_batches = [part for _, part in batching.MicroBatches(items.lengths, 42, True, batch_size=2)]
    collator, norms, totals = finetune.Collator("packed", tokenizer.pad_token_id, 256), [], []
    for step in (micro_batches[:4], micro_batches[4:]):
        total = 0.0
        for part in step:
            batch = collator([items[i] for i in part])
            logits, (text, code) = head.read(model, batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch["label_ids"])
            loss = loss + LBD * (1 - torch.nn.functional.cosine_similarity(text, code)).mean()
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        totals.append(total)
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad if p.grad is not None else 0
        model.zero_grad()
    return model.state_dict(), norms, totals


@pytest.mark.parametrize("lm_labels", ["answer", "reference"])
def test_weights_gradients_and_loss_are_those_of_the_summed_micro_batches(tmp_path, lm_labels):
    """10 rows of unlike length in micro-batches of 2: a step of four of them and one of a single one."""
    data = write_rows(tmp_path / "rows.jsonl", LONG)
    run = train(
        data,
        tmp_path / "run",
        "--num_epochs",
        1,
        "--max_grad_norm",
        0,
        "--reference_grad_scale",
        "--lm_labels",
        lm_labels,
    )
    expected, norms, totals = by_hand(data, lm_labels)
    begin, moved = load_file(MODEL / "model.safetensors"), 0.0
    for name, value in weights(run).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        moved = max(moved, (value - begin[name]).abs().max().item()) if value.shape == begin[name].shape else moved
    assert moved > 1e-3, "an update far above the tolerance"
    assert [m["total"] for m in lines(run)] == pytest.approx(totals, rel=1e-4)
    assert [m["grad_norm"] for m in lines(run)] == pytest.approx(norms, rel=1e-3)


def test_micro_batches_that_are_alike_give_grad_accum_times_the_gradient_and_clipping_sees_it(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ALIKE)
    usual = train(data, tmp_path / "usual", "--max_grad_norm", 0, "--max_steps", 1)
    scaled = train(data, tmp_path / "scaled", "--max_grad_norm", 0, "--max_steps", 1, "--reference_grad_scale")
    (one,), (four,) = lines(usual), lines(scaled)
    assert four["grad_norm"] == pytest.approx(4 * one["grad_norm"], rel=1e-4)
    assert four["total"] == pytest.approx(4 * one["total"], rel=1e-4)
    assert four["lm_loss"] == pytest.approx(one["lm_loss"], rel=1e-5), "the losses shown stay means"
    quarter = train(data, tmp_path / "quarter", "--max_grad_norm", 0, "--max_steps", 1, "--reference_grad_scale",
                    "--learning_rate", RATE / 4)  # fmt: skip
    same_weights(quarter, usual, rtol=1e-5, atol=1e-7)
    between = 2 * one["grad_norm"]  # clips the scaled gradient alone
    clipped = train(data, tmp_path / "clipped", "--max_grad_norm", between, "--max_steps", 1, "--reference_grad_scale",
                    "--learning_rate", RATE / 2)  # fmt: skip
    same_weights(clipped, usual, rtol=1e-4, atol=1e-6)


def test_lambda_zero_with_the_published_scale_is_not_the_regular_arm(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ALIKE)
    regular, zero = (
        train(data, tmp_path / name, "--max_steps", 1, "--max_grad_norm", 0, *flags)
        for name, flags in (("plain", ("--lbd", 0)), ("zero", ("--lbd", 0, "--reference_grad_scale")))
    )
    assert [m["total"] for m in lines(zero)] == pytest.approx([4 * m["total"] for m in lines(regular)], rel=1e-4)
