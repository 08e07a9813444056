"""Where segments go in rows, and what a batch says about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import finetune
from finetune import Collator
from llm_jepa.data import batching
from llm_jepa.data.segments import Segment


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


def test_packed_rows_are_few_and_of_like_length():
    rows = finetune.packed_rows(items(LENGTHS), tokens_per_row=16)
    assert sorted(sum(len(s.ids) for s in row) for row in rows) == [13, 13, 13, 14]  # 53 tokens in rows of 16
    longer = finetune.packed_rows(items([(30, 20, 2), (9, 9, 8)]), tokens_per_row=16)
    assert [sum(len(s.ids) for s in row) for row in longer] == [30, 22, 26]  # the longest segment sets the width
    (row,) = finetune.packed_rows(items(LENGTHS), tokens_per_row=10**9)
    assert [len(s.ids) for s in row] == [12, 9, 7, 6, 5, 4, 3, 2, 2, 1, 1, 1]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 200))
def test_packed_rows_hold_every_segment_once_within_the_budget(lengths, tokens_per_row):
    chats = [(Segment("chat", np.arange(n), np.zeros(n, dtype=bool)),) for n in lengths]
    rows = finetune.packed_rows(chats, tokens_per_row)
    assert sorted(id(s) for row in rows for s in row) == sorted(id(s) for (s,) in chats)
    sums = [sum(len(s.ids) for s in row) for row in rows]
    assert max(sums) <= max(tokens_per_row, *lengths) and min(sums) > 0
    assert len(rows) <= 2 * sum(lengths) / max(tokens_per_row, *lengths) + 1


def test_packed_padding_is_a_segment_of_its_own():
    batch = Collator("packed", pad_id=0, tokens_per_row=16)(items([(9, 4, 3), (4, 1, 1)]))
    assert batch["mask"] == "positions"
    assert batch["position_ids"].tolist() == [[*range(9), 0, 0], [*range(4), *range(4), *range(3)]]
    assert batch["boundaries"].tolist() == [0, 9, 10, 11, 15, 19, 22] and batch["longest"] == 9


def test_rows_are_padded_to_a_multiple():
    batch = Collator("packed", pad_id=0, tokens_per_row=16, multiple=12)(items([(9, 4, 3), (5, 1, 1)]))
    assert batch["input_ids"].shape == (2, 12)
    assert batch["tokens"].tolist() == [14, 5, 4, 1]
    assert batch["position_ids"][:, -1].tolist().count(0) >= 1


@pytest.mark.parametrize("layout", ["additive", "packed"])
def test_mask_is_block_diagonal_and_causal(layout):
    batch = Collator(layout, pad_id=-7, tokens_per_row=5)(items([(5, 2, 3)]))
    assert batch["mask"] == {"additive": "dense", "packed": "positions"}[layout]
    seen = finetune.may_see(batch["spans"])  # (R, T, T)
    assert seen[0].equal(torch.ones(5, 5).tril().bool())
    blocks = sorted((2, 3), reverse=layout == "packed")
    assert seen[1].equal(torch.block_diag(*(torch.ones(n, n).tril() for n in blocks)).bool())


def test_what_branches_off_sees_its_stem_and_itself_and_nothing_sees_it():
    chat = Segment("chat", np.arange(6), np.zeros(6, dtype=bool), view=5, stem=2, branch=2)
    other = Segment("code_view", np.arange(3), np.zeros(3, dtype=bool), view=2)
    batch = Collator("packed", pad_id=0, tokens_per_row=10)([(chat, other)])
    expected = torch.block_diag(torch.ones(6, 6).tril(), torch.ones(3, 3).tril()).bool()
    expected[4:6, 2:4] = False  # the chat behind the stem
    assert batch["mask"] == "dense" and finetune.may_see(batch["spans"])[0].equal(expected)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 0, 1, 2]]


def test_an_empty_micro_batch_still_has_a_row():
    for layout in finetune.LAYOUTS:
        batch = Collator(layout, pad_id=3, tokens_per_row=16)([(), ()])
        assert batch["input_ids"].shape == (1, 1)
        assert batch["label_ids"].shape == (0,) and batch["view_at"].shape == (2, 2, 0)


@pytest.mark.parametrize("tokens", [0, 60])
def test_micro_batches_are_seeded_by_epoch_and_as_many_for_each_process(tokens):
    lengths = np.array([8, 9, 30, 4, 5, 6, 17, 8, 12, 3])
    sampler = batching.MicroBatches(lengths, 1, True, processes=2, batch_size=4, tokens=tokens)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert len(first) == len(second) == len(sampler) == (2 if tokens else 4)
    assert sorted(i for _, part in first for i in part) == sorted(i for _, part in second for i in part) == [*range(10)]
    assert first != second and {e for e, _ in second} == {1}
    assert list(batching.MicroBatches(lengths, 1, True, processes=2, batch_size=4, tokens=tokens)) == first
    assert list(batching.MicroBatches(lengths, 2, True, processes=2, batch_size=4, tokens=tokens)) != first
    if not tokens:
        assert [len(part) for _, part in first] == [4, 4, 2, 0]
    ordered = batching.MicroBatches(lengths, 1, False, batch_size=4, tokens=tokens)
    assert [i for _, part in ordered for i in part] == [*range(10)]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=200), st.integers(1, 9), st.integers(2, 8), st.integers(0, 9))
def test_processes_exchange_examples_of_what_they_have_at_the_same_time(lengths, batch_size, processes, seed):
    lengths = np.array(lengths)
    alone = [part for _, part in batching.MicroBatches(lengths, seed, True, batch_size=batch_size)]
    dealt = [part for _, part in batching.MicroBatches(lengths, seed, True, processes, batch_size)]
    assert len(dealt) % processes == 0
    for start in range(0, len(dealt), processes):
        before, after = (part[start : start + processes] for part in (alone, dealt))
        assert sorted(sum(before, [])) == sorted(sum(after, []))
        assert [len(part) for part in after] == [len(part) for part in before] + [0] * (len(after) - len(before))
        tokens = [int(lengths[part].sum()) for part in after if len(part) == batch_size]
        # Who gets the next longest has the fewest tokens among those with room.
        assert not tokens or max(tokens) - min(tokens) <= lengths[sum(after, [])].max() * batch_size


def test_processes_have_about_the_same_tokens():
    lengths = np.random.default_rng(0).lognormal(4, 0.7, 4096).astype(int) + 5

    def slowest(processes):
        parts = [part for _, part in batching.MicroBatches(lengths, 1, True, processes, 8)]
        tokens = np.array([lengths[part].sum() for part in parts]).reshape(-1, 8)
        return (tokens.max(axis=1) / tokens.mean(axis=1)).mean()

    assert slowest(1) > 1.4 and slowest(8) < 1.05  # dealt out as they come, and balanced


@given(st.lists(st.integers(1, 200), min_size=1, max_size=300), st.integers(1, 2000), st.integers(1, 4))
def test_micro_batches_of_a_token_budget_are_of_like_length(lengths, tokens, processes):
    lengths = np.array(lengths)
    parts = list(batching.MicroBatches(lengths, 0, True, processes=processes, tokens=tokens))
    sums = [int(lengths[part].sum()) for _, part in parts]
    mean = lengths.sum() / len(parts)
    assert len(parts) % processes == 0 and sum(sums) == lengths.sum()
    assert mean <= tokens or all(len(part) <= 1 for _, part in parts)
    assert all(abs(n - mean) <= lengths.max() for n in sums if n)
    # Empty ones only fill up the last step of the processes, so none but it has a process without an example.
    empty = [not part for _, part in parts]
    assert sum(empty) < processes and empty == sorted(empty)
    assert sorted(i for _, part in parts for i in part) == [*range(len(lengths))]
