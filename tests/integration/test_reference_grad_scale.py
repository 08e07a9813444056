"""--reference_grad_scale: each micro-batch is normalized by its own counts, as in the published trainer."""

from pathlib import Path

import pytest
import torch
from conftest import column, message_row, train, weights, write_rows
from test_terms import prepared

from llm_jepa.data.batching import MicroBatches

RATE, LBD = 1e-2, 2.0
LONG = [message_row(f"lines with {'a letter and ' * (i % 5)}{i}", f"({i}){'.*' * (i % 4)}") for i in range(10)]
# SGD at a constant rate: the parameters show the gradients.
SGD = ("--lbd", LBD, "--batch_size", 2, "--grad_accum", 4, "--optim", "sgd", "--learning_rate", RATE,
       "--lr_scheduler_type", "constant", "--save_strategy", "no")  # fmt: skip


def by_hand(data: Path, lm_labels: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """(parameters, gradient norm of each step, loss of each step) for the sum of the micro-batches' mean losses."""
    parts, norms, totals = prepared(data, lbd=LBD, lm_labels=lm_labels), [], []
    model, items = parts.model.train(), parts.train_set.items
    micro_batches = [part for _, part in MicroBatches(items.lengths, 42, True, batch_size=2)]
    for step in (micro_batches[:4], micro_batches[4:]):
        totals.append(0.0)
        for part in step:
            batch = parts.collator([items[i] for i in part])
            states = parts.selector.read(model, batch)
            loss = torch.nn.functional.cross_entropy(states.logits.float(), batch["label_ids"])
            loss = loss + LBD * (1 - torch.nn.functional.cosine_similarity(*states.views)).mean()
            loss.backward()
            totals[-1] += loss.item()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad if p.grad is not None else 0
        model.zero_grad()
    return model.state_dict(), norms, totals


@pytest.mark.parametrize("lm_labels", ["answer", "reference"])
def test_step_sums_the_means_of_its_micro_batches(tmp_path, lm_labels):
    """10 examples of different length in micro-batches of 2: a step of four micro-batches and a step of one."""
    data = write_rows(tmp_path / "rows.jsonl", LONG)
    flags = ("--num_epochs", 1, "--max_grad_norm", 0, "--reference_grad_scale", "--lm_labels", lm_labels)
    run = train(data, tmp_path / "run", *SGD, *flags)
    expected, norms, totals = by_hand(data, lm_labels)
    for name, value in weights(run).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert column(run, "loss") == pytest.approx(totals, rel=1e-4)
    assert column(run, "grad_norm") == pytest.approx(norms, rel=1e-3)
