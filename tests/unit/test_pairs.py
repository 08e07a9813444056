"""What pairs are contrasted with in one process: the micro-batch and the queue of earlier pairs."""

from __future__ import annotations

import torch

from llm_jepa.training.pairs import Contrast


def micro_batch(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(views, ids): pair i has views full of i and the ids i, 100 + i and 100 + i."""
    numbers = torch.arange(first, first + count)
    views = numbers[:, None].expand(2, count, 3).float().clone().requires_grad_()
    return views, torch.stack([numbers, 100 + numbers, 100 + numbers])


def test_without_a_queue_pairs_are_contrasted_with_their_micro_batch_only():
    contrast = Contrast(0)
    for first in (0, 3):
        views, ids = micro_batch(first, 3)
        others = contrast(views, ids, training=True)
        assert others.views is views and others.not_negatives.equal(torch.eye(3, dtype=torch.bool))


def test_queue_has_the_newest_pairs_first_without_gradient():
    contrast = Contrast(5)
    for first, count, queue in ((0, 2, []), (2, 2, [0, 1]), (4, 3, [2, 3, 0, 1]), (7, 6, [4, 5, 6, 2, 3]), (
        13, 1, [7, 8, 9, 10, 11])):  # fmt: skip
        views, ids = micro_batch(first, count)
        others = contrast(views, ids, training=True)
        assert others.not_negatives.shape == (count, count + len(queue))
        assert others.views[0, :, 0].tolist() == [*range(first, first + count), *queue]
        (gradient,) = torch.autograd.grad(others.views.sum(), views)
        assert gradient.equal(torch.ones_like(views))
    assert contrast.queue["views"][1, :, 0].tolist() == [13, 7, 8, 9, 10]
    assert not contrast.queue["views"].requires_grad


def test_an_evaluation_neither_reads_nor_changes_the_queue():
    contrast = Contrast(5)
    contrast(*micro_batch(0, 2), training=True)
    others = contrast(*micro_batch(2, 2), training=False)
    assert others.views[0, :, 0].tolist() == [2, 3] and others.not_negatives.shape == (2, 2)
    assert contrast.queue["ids"].tolist() == [[0, 1], [100, 101], [100, 101]]


def test_queued_pairs_of_the_same_text_or_code_are_no_negatives():
    contrast = Contrast(9)
    views, ids = micro_batch(0, 4)
    contrast(views, ids, training=True)
    ids = torch.tensor([[2, 7], [107, 100], [107, 100]])  # the Text of pair 2, the Code of pair 0
    others = contrast(views[:, :2], ids, training=True)
    assert others.not_negatives[:, 2:].tolist() == [[False, False, True, False], [True, False, False, False]]
