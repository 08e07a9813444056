"""Where segments go in rows, and what a batch says about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import finetune
from finetune import Collator, Segment


def items(lengths: list[tuple[int, int, int]]) -> list[tuple[Segment, ...]]:
    """Examples whose token ids tell segment and position: 1000 · segment number + position."""
    out, number = [], 0
    for chat, text, code in lengths:
        segments = []
        for kind, n in (("chat", chat), ("text_view", text), ("code_view", code)):
            labels = np.zeros(n, dtype=bool)
            labels[n // 2 :] = kind == "chat"
            view = None if kind == "chat" else n - 1
            segments.append(Segment(kind, 1000 * number + np.arange(n), labels, view))
            number += 1
        out.append(tuple(segments))
    return out


LENGTHS = [(9, 4, 3), (7, 2, 5), (1, 1, 1), (12, 6, 2)]


@pytest.mark.parametrize("layout", sorted(finetune.LAYOUTS))
@pytest.mark.parametrize("tokens_per_row", [1, 5, 16, 1000])
def test_every_layout_holds_the_same_segments_labels_and_views(layout, tokens_per_row):
    examples = items(LENGTHS)
    batch = Collator(layout, pad_id=-7, tokens_per_row=tokens_per_row)(examples)
    ids, positions = batch["input_ids"], batch["position_ids"]
    assert batch["tokens"].tolist()[:3] == [29, 13, 11]
    assert (ids == -7).sum() == batch["tokens"][3] == ids.numel() - 53
    for item in examples:
        for segment in item:
            place = (ids == segment.ids[0]).nonzero()
            (row, column), n = place[0].tolist(), len(segment.ids)
            assert ids[row, column : column + n].tolist() == segment.ids.tolist()
            assert positions[row, column : column + n].tolist() == list(range(n))
    label_ids = [int(t) for item in examples for t in item[0].ids[item[0].labels] if t % 1000]
    assert sorted(batch["label_ids"].tolist()) == sorted(label_ids)
    assert (ids[tuple(batch["label_at"])] + 1).tolist() == batch["label_ids"].tolist()
    for kind, at in zip((1, 2), batch["view_at"].transpose(0, 1), strict=True):
        assert ids[tuple(at)].tolist() == [int(item[kind].ids[-1]) for item in examples]


def test_packed_rows_are_few_and_within_the_budget():
    rows = finetune.packed_rows(items(LENGTHS), tokens_per_row=16)
    assert all(sum(len(s.ids) for s in row) <= 16 for row in rows)
    assert len(rows) == 4  # 53 tokens in rows of 16
    alone = finetune.packed_rows(items([(30, 2, 2)]), tokens_per_row=16)
    assert [len(s.ids) for s in alone[0]] == [30]


def test_packed_padding_is_a_segment_of_its_own_and_there_is_no_mask():
    batch = Collator("packed", pad_id=0, tokens_per_row=16)(items([(9, 4, 3), (5, 1, 1)]))
    assert batch["attention_mask"] is None
    row, padding = batch["position_ids"][-1].tolist(), int((batch["input_ids"][-1] == 0).sum())
    assert padding == 9 and row[-9:] == list(range(9))


def test_additive_mask_is_block_diagonal_and_causal():
    batch = Collator("additive", pad_id=-7, tokens_per_row=0)(items([(5, 2, 3)]))
    mask = batch["attention_mask"][:, 0] == 0  # (R, T, T)
    assert mask[0].equal(torch.ones(5, 5).tril().bool())
    two, three = torch.ones(2, 2).tril().bool(), torch.ones(3, 3).tril().bool()
    assert mask[1].equal(torch.block_diag(two, three).bool())


def test_an_empty_micro_batch_still_has_a_row():
    for layout in finetune.LAYOUTS:
        batch = Collator(layout, pad_id=3, tokens_per_row=16)([(), ()])
        assert batch["input_ids"].shape == (1, 1)
        assert batch["label_ids"].shape == (0,) and batch["view_at"].shape == (2, 2, 0)


def test_sampler_is_seeded_by_epoch_and_fills_up_whole_batches():
    sampler = finetune.EpochSampler(size=10, multiple=4, seed=1, shuffle=True)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert len(first) == len(sampler) == 12
    assert sorted(i for _, i in first) == sorted(i for _, i in second) == [-1, -1, *range(10)]
    assert [i for _, i in first] != [i for _, i in second]
    assert {e for e, _ in second} == {1}
    again = finetune.EpochSampler(size=10, multiple=4, seed=1, shuffle=True)
    assert list(again) == first
    assert list(finetune.EpochSampler(10, 4, 2, True)) != first
