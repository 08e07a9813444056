"""The encoded data of a run."""

import dataclasses

from accelerate import PartialState

from llm_jepa.cli import UsageError
from llm_jepa.data.batching import SegmentDataset
from llm_jepa.data.examples import Problems, read_examples, split_examples
from llm_jepa.data.segments import Encoder
from llm_jepa.data.spans import Draws
from llm_jepa.data.streaming import SegmentStream
from llm_jepa.settings import Settings

Data = tuple[SegmentDataset, SegmentStream | None, SegmentDataset | None, Problems]


def load_data(s: Settings, encoder: Encoder, state: PartialState) -> Data:
    """(training set, stream, held-out set, problems) of the examples that the flags name. Raises UsageError.

    With --streaming the training set has only the first examples.
    """
    problems, stream = Problems(s.skip_bad_examples), None
    draws = Draws(s.finetune_seed, s.jepa_ratio, s.stp_variant, s.stp_part, s.stp_spans, s.stp_max_length)
    if s.streaming:
        stream = SegmentStream(
            s.train_file, encoder, draws, fields=s.fields, seed=s.finetune_seed, skip=s.skip_bad_examples,
            batch_size=s.batch_size, tokens=s.tokens_per_batch, process=state.process_index,
            processes=state.num_processes,
        )  # fmt: skip
        train = stream.first(s.dry_run or 4 * s.batch_size)
    else:
        train = read_examples(s.train_file or s.data_file, problems, s.fields)
        encoder.renderer.fix_template(thinking=any("</think>" in (e.assistant or "") for e in train))
    if share := s.eval_split if s.data_file else s.val_fraction:
        train, held_out = split_examples(train, share, s.split_seed)
    else:
        held_out = read_examples(s.eval_file, problems, s.fields) if s.eval_file else []
    train_set = SegmentDataset(train[: s.dry_run or None], encoder, problems, draws, s.preprocessing_num_workers)
    if s.dry_run or not held_out:
        return train_set, stream, None, problems
    if not any(example.has_chat for example in held_out):
        raise UsageError("no held-out example has a chat, so there is no eval_lm_loss")
    draws = dataclasses.replace(draws, jepa_ratio=1.0)  # held-out examples always have their views
    held_out_set = SegmentDataset(held_out, encoder, problems, draws, s.preprocessing_num_workers)
    return train_set, stream, held_out_set, problems
