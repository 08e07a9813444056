"""Segments: an example's chat and views as tokens, which of them are labels, and where a view is read.

Examples are tokenised once, in several processes where there are many, and kept on disk for the next run; a data set
too large for that is tokenised as it is read (`SegmentStream`). Both give micro-batches: tuples of segments an example.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from llm_jepa.data.examples import Example
from llm_jepa.data.rendering import Rendered, Renderer, predictor_token


@dataclass(frozen=True)
class Segment:
    """A chat or a view as tokens. `ids` and `labels` are (T,); `view` is where the view is read.

    A chat has no view, or with --text_view in_chat the Text view. Its predictor tokens then stand at the chat's end
    (the last `branch` tokens) but branch off behind its first `stem` tokens: they have the positions that follow those,
    see nothing else of the chat, and nothing else sees them.

    Of a chat `answer` is the [first, stop) of its answer's content, `user` that of its user turn's where the settings
    ask for it, and `path` (S, K) are the tokens at which --stp reads each of S spans, once they are drawn.
    """

    kind: Literal["chat", "text_view", "code_view"]
    ids: np.ndarray
    labels: np.ndarray
    view: int | None = None
    stem: int = 0
    branch: int = 0
    user: tuple[int, int] = (0, 0)
    answer: tuple[int, int] = (0, 0)
    path: np.ndarray | None = None

    @property
    def positions(self) -> np.ndarray:
        """Position ids (T,)."""
        trunk = np.arange(len(self.ids) - self.branch)
        return np.concatenate([trunk, self.stem + np.arange(self.branch)])

    @property
    def without_view(self) -> Segment:
        """The chat as regular fine-tuning has it."""
        end = len(self.ids) - self.branch
        rest = {"view": None, "stem": 0, "branch": 0}
        return dataclasses.replace(self, ids=self.ids[:end], labels=self.labels[:end], **rest)

    @property
    def text_view(self) -> Segment:
        """The Text view of a chat with one, as a segment of its own: what the view sees and no more."""
        end = len(self.ids) - self.branch
        ids = np.concatenate([self.ids[: self.stem], self.ids[end:]])
        return Segment("text_view", ids, np.zeros(len(ids), dtype=bool), len(ids) - 1)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (T,) and character offsets (T, 2) of texts that already hold their special tokens."""
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return [
        (np.asarray(i, dtype=np.int64), np.asarray(o, dtype=np.int64).reshape(-1, 2))
        for i, o in zip(out["input_ids"], out["offset_mapping"], strict=True)
    ]


def content_tokens(offsets: np.ndarray, r: Rendered) -> tuple[int, int]:
    """[first, stop): the tokens of a rendered text's content, by offsets (T, 2).

    Byte-level tokenizers trim white space off their offsets, so a token of spaces has no width; it belongs to what
    stands before it. Raises ValueError where a token holds both content and the template's own text.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside, behind = ends > r.start, (starts >= r.end) & (ends > starts)
    first = int(inside.argmax()) if inside.any() else len(starts)
    stop = int(behind.argmax()) if behind.any() else len(starts)
    if first >= stop:
        raise ValueError("no token of the content can be located")
    if r.text[starts[first] : r.start].strip() or r.text[r.end : max(ends[first:stop])].strip():
        raise ValueError("a token joins the content with the chat template's text, so it cannot be located")
    return first, stop


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens."""
    return set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def label_tokens(tokenizer: Any, scope: str, ids: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Which tokens (T,) are labels: --lm_labels. Raises ValueError where no special token ends the answer."""
    labels = np.zeros(len(ids), dtype=bool)
    if scope == "all":
        return ~labels
    if scope == "reference":
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return ids != pad
    if scope == "answer":
        special = special_ids(tokenizer)
        ends = [t for t in range(stop, len(ids)) if int(ids[t]) in special]
        if not ends:
            raise ValueError(
                "the chat template ends the answer without a special token, so a model could not learn to stop; "
                "mend the template or give --lm_labels answer_text"
            )
        stop = ends[0] + 1
    labels[first:stop] = True
    return labels


def encode_chats(renderer: Renderer, examples: list[Example]) -> list[Segment | ValueError]:
    """The chat segment of each example, or why there is none."""
    return _encode(renderer, "chat", [_try(renderer.chat, e) for e in examples])


def encode_views(renderer: Renderer, examples: list[Example]) -> list[tuple[Segment | ValueError, ...]]:
    """The two view segments of each example, or why there are none."""
    views = [_try(renderer.views, e) for e in examples]
    first, second = ([v if isinstance(v, ValueError) else v[i] for v in views] for i in (0, 1))
    return list(zip(_encode(renderer, "text_view", first), _encode(renderer, "code_view", second), strict=True))


def _try(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        return error
    except TemplateError as error:
        return ValueError(f"the chat template refuses the example ({error})")


def _encode(renderer: Renderer, kind: str, texts: list[Rendered | ValueError]) -> list[Segment | ValueError]:
    s, tokenizer = renderer.s, renderer.tokenizer
    tokens = iter(_tokenize(tokenizer, [r.text for r in texts if isinstance(r, Rendered)] or [""]))

    def segment(rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> Segment:
        if len(ids) > s.max_length:
            raise ValueError(f"the {kind.replace('_', ' ')} has {len(ids)} tokens, over --max_length {s.max_length}")
        first, stop = content_tokens(offsets, rendered)
        if kind == "chat":
            labels = label_tokens(tokenizer, s.lm_labels, ids, first, stop)
            turns = {"answer": (first, stop)}
            if rendered.user is not None:
                turns["user"] = content_tokens(offsets, Rendered(rendered.text, *rendered.user))
            if s.text_view == "alone":
                return Segment("chat", ids, labels, **turns)
            stem = turns["user"][1]
            branch = tokenizer.convert_tokens_to_ids([predictor_token(i) for i in range(s.predictors, 0, -1)])
            ids = np.concatenate([ids, np.asarray(branch, dtype=np.int64)])
            labels = np.concatenate([labels, np.zeros(len(branch), dtype=bool)])
            return Segment("chat", ids, labels, len(ids) - 1 if branch else stem - 1, stem, len(branch), **turns)
        view = stop - 1 if s.last_token is None else len(ids) + s.last_token
        if view < 0:
            raise ValueError(f"the {kind.replace('_', ' ')} has {len(ids)} tokens, no --last_token {s.last_token}")
        return Segment(kind, ids, np.zeros(len(ids), dtype=bool), view)

    return [r if isinstance(r, ValueError) else _try(segment, r, *next(tokens)) for r in texts]


def end_of_turn(renderer: Renderer) -> int | None:
    """Id of the special token that ends the assistant turn, None where the template has none."""
    s = dataclasses.replace(renderer.s, train_all=False, lm_labels="answer", text_view="alone", stp=None)
    segment = encode_chats(Renderer(renderer.tokenizer, s), [Example(None, "a", "b", "the chat template", 0)])[0]
    return None if isinstance(segment, ValueError) else int(segment.ids[segment.labels][-1])


# ---------------------------------------------------------------------------------------------------------- store

TEXTS = ("system", "user", "assistant", "text", "code")  # what of an example is encoded
ENCODING_FLAGS = ("plain", "train_all", "predictors", "front_pred", "reverse_pred", "text_view", "lm_labels",
                  "max_length", "last_token", "jepa", "locates_user")  # fmt: skip
KINDS = ("chat", "text_view", "code_view")


def encode(renderer: Renderer, examples: list[Example]) -> list[tuple[Segment, ...] | ValueError]:
    """Each example's segments, or why there are none.

    (chat,), (chat, text view, code view), or with --text_view in_chat (chat with a view, code view).
    """
    s, items = renderer.s, []
    chats = encode_chats(renderer, examples)
    views = encode_views(renderer, examples) if s.jepa else [()] * len(examples)
    for example, chat, pair in zip(examples, chats, views, strict=True):
        pair = pair[1:] if s.text_view == "in_chat" else pair
        bad = next((x for x in (chat, *pair) if isinstance(x, ValueError)), None)
        if bad is None and s.text_view == "in_chat" and example.text is not None:
            bad = ValueError("its Text view is no part of the chat, which --text_view in_chat needs")
        items.append(bad or ((chat, *pair) if pair else (chat.without_view,)))
    return items


# ------------------------------------------------------------------------------------------------------- data sets
