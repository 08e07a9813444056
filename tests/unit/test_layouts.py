"""Which rows the segments are placed in, what a batch contains, and which examples form micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jepa.data.batching import MicroBatches
from llm_jepa.data.segments import Segment
from llm_jepa.layouts import LAYOUTS, Collator, packed_rows


@pytest.mark.parametrize("codes", [[0], [0, 1, 2, 3], [0, 0, 1, 0], [0, 0, 0]])
def test_shuffled_pairs_have_the_code_of_the_next_pair_if_it_is_another_one(codes):
    """`codes`: equal numbers for equal Code views."""
    texts = [Segment("text_view", 1000 * i + np.arange(3), np.zeros(3, dtype=bool), 2) for i, _ in enumerate(codes, 1)]
    ids = [np.array([7, code]) for code in codes]
    segments = [Segment("code_view", x, np.zeros(2, dtype=bool), 1) for x in ids]
    chat = Segment("chat", np.arange(2), np.zeros(2, dtype=bool), None)
    examples = [(chat, *pair) for pair in zip(texts, segments, strict=True)]
    plain, batch = (Collator("separate", -7, 9, shuffle_pairs=x)(examples) for x in (False, True))
    code_ids = [s.view_id for s in segments]
    assert plain["view_ids"][2].tolist() == plain["view_ids"][1].tolist() == code_ids
    following = [*range(1, len(codes)), 0]
    kept = [i for i, j in enumerate(following) if codes[i] != codes[j]]
    expected = [(texts[i].view_id, code_ids[following[i]], code_ids[i]) for i in kept]
    assert batch["view_ids"].T.tolist() == [list(x) for x in expected]
    first, second = (batch["input_ids"][tuple(at)].tolist() for at in batch["view_at"].unbind(1))
    assert first == [int(texts[i].ids[-1]) for i in kept] and second == [codes[following[i]] for i in kept]
    assert batch["counts"][1] == len(codes)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 200))
def test_packed_rows_contain_every_segment_once_within_the_budget(lengths, tokens_per_row):
    chats = [(Segment("chat", np.arange(n), np.zeros(n, dtype=bool)),) for n in lengths]
    rows = packed_rows(chats, tokens_per_row)
    assert sorted(id(s) for row in rows for s in row) == sorted(id(s) for (s,) in chats)
    sums = [sum(len(s.ids) for s in row) for row in rows]
    assert max(sums) <= max(tokens_per_row, *lengths) and min(sums) > 0
    assert len(rows) <= 2 * sum(lengths) / max(tokens_per_row, *lengths) + 1


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_empty_micro_batch_has_one_row(layout):
    batch = Collator(layout, pad_id=3, tokens_per_row=16)([(), ()])
    assert batch["input_ids"].shape == (1, 1)
    assert batch["label_ids"].shape == (0,) and batch["view_at"].shape == (2, 2, 0)


@pytest.mark.parametrize("tokens", [0, 60])
def test_micro_batches_depend_on_seed_and_epoch_and_contain_every_example_once(tokens):
    lengths = np.array([8, 9, 30, 4, 5, 6, 17, 8, 12, 3])

    def batches(seed: int = 1, epoch: int = 0, shuffle: bool = True, processes: int = 2) -> list:
        sampler = MicroBatches(lengths, seed, shuffle, processes, batch_size=4, tokens=tokens)
        sampler.epoch = epoch
        found = list(sampler)
        assert len(found) == len(sampler) and {e for e, _ in found} == {epoch}
        parts = [part for _, part in found]
        assert sorted(sum(parts, [])) == [*range(10)]
        return parts

    assert len(batches()) == (2 if tokens else 4) and batches() == batches()
    assert batches() != batches(epoch=1) and batches() != batches(seed=2)
    assert sum(batches(shuffle=False, processes=1), []) == [*range(10)]
    if not tokens:
        assert [len(part) for part in batches()] == [4, 4, 2, 0]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=200), st.integers(1, 9), st.integers(2, 8), st.integers(0, 9))
def test_processes_exchange_examples_of_one_step(lengths, batch_size, processes, seed):
    lengths = np.array(lengths)
    drawn = [part for _, part in MicroBatches(lengths, seed, True, batch_size=batch_size)]
    balanced = [part for _, part in MicroBatches(lengths, seed, True, processes, batch_size)]
    assert len(balanced) % processes == 0
    for start in range(0, len(balanced), processes):
        before, after = (part[start : start + processes] for part in (drawn, balanced))
        assert sorted(sum(before, [])) == sorted(sum(after, []))
        assert [len(part) for part in after] == [len(part) for part in before] + [0] * (len(after) - len(before))
        tokens = [int(lengths[part].sum()) for part in after if len(part) == batch_size]
        # The next longest example goes to the process with the fewest tokens among those with room.
        assert not tokens or max(tokens) - min(tokens) <= lengths[sum(after, [])].max() * batch_size


@given(st.lists(st.integers(1, 200), min_size=1, max_size=300), st.integers(1, 2000), st.integers(1, 4))
def test_micro_batches_of_a_token_budget_have_similar_lengths(lengths, tokens, processes):
    lengths = np.array(lengths)
    parts = [part for _, part in MicroBatches(lengths, 0, True, processes, tokens=tokens)]
    sums = [int(lengths[part].sum()) for part in parts]
    mean = lengths.sum() / len(parts)
    assert len(parts) % processes == 0 and sorted(sum(parts, [])) == [*range(len(lengths))]
    assert mean <= tokens or all(len(part) <= 1 for part in parts)
    assert all(abs(n - mean) <= lengths.max() for n in sums if n)
    # Only the last step has processes without examples.
    empty = [not part for part in parts]
    assert sum(empty) < processes and empty == sorted(empty)
