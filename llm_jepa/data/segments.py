"""Segments: an example's chat and views as tokens, which of them are labels, and where a view is read."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from jinja2 import TemplateError

from llm_jepa.data.examples import Example
from llm_jepa.data.rendering import Rendered, Renderer, predictor_token


@dataclass(frozen=True)
class Segment:
    """A chat or a view as tokens. `ids` and `labels` are (T,); `view` is the token at which the view is read.

    A chat has no view, except with --text_view in_chat: then it also holds the Text view. Its last `branch` tokens are
    the predictor tokens. They branch off after the first `stem` tokens: their positions continue the stem's, they
    attend to the stem and to each other only, and no other token attends to them.

    `user` and `answer` are the [first, stop) tokens of a chat's last user turn (if located) and last answer. `path`
    (S, K) holds the tokens at which --stp reads each of S spans, once they are drawn. `paired`: whether the example has
    a pair of views, also if loss dropout has removed it.
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
    paired: bool = True

    @property
    def positions(self) -> np.ndarray:
        """Position ids (T,)."""
        trunk = np.arange(len(self.ids) - self.branch)
        return np.concatenate([trunk, self.stem + np.arange(self.branch)])

    @property
    def without_view(self) -> Self:
        """The chat as in regular fine-tuning."""
        end = len(self.ids) - self.branch
        rest = {"view": None, "stem": 0, "branch": 0}
        return dataclasses.replace(self, ids=self.ids[:end], labels=self.labels[:end], **rest)

    @property
    def text_view(self) -> Self:
        """The Text view inside a chat as a segment of its own: exactly the tokens that the view attends to."""
        end = len(self.ids) - self.branch
        ids = np.concatenate([self.ids[: self.stem], self.ids[end:]])
        return Segment("text_view", ids, np.zeros(len(ids), dtype=bool), len(ids) - 1)

    @property
    def view_id(self) -> int:
        """A number that is equal for views with the same tokens."""
        view = self.text_view if self.kind == "chat" else self
        return int.from_bytes(hashlib.blake2b(view.ids.tobytes(), digest_size=8).digest(), "little", signed=True)


# An example: (chat,), (chat, text view, code view), (chat with a view, code view) or (text view, code view); in regular
# fine-tuning also () if it has no chat.
Item = tuple[Segment, ...]


def without_pair(item: Item) -> Item:
    """The item as in regular fine-tuning."""
    return tuple(segment.without_view for segment in item if segment.kind == "chat")


def _tokenize(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (T,) and character offsets (T, 2) of texts that already contain their special tokens."""
    if not texts:
        return []
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return [
        (np.asarray(i, dtype=np.int32), np.asarray(o, dtype=np.int64).reshape(-1, 2))
        for i, o in zip(out["input_ids"], out["offset_mapping"], strict=True)
    ]


def _tokenize_inside(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of one text that follows another."""
    # After a newline, because some tokenizers put a space before the first word; a newline may join the text's own.
    (newline, _), (ids, offsets), alone = _tokenize(tokenizer, ["\n", "\n" + text, text])
    joins = not np.array_equal(ids[: len(newline)], newline)
    return alone if joins else (ids[len(newline) :], offsets[len(newline) :] - 1)


def _tokenize_chats(tokenizer: Any, chats: list[Rendered]) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Token ids (T,), character offsets (T, 2) and the number of prompt tokens of each chat.

    The prompt's ids are those that generation starts from, also where a token of the complete text would reach from the
    prompt into the answer.
    """
    complete = _tokenize(tokenizer, [chat.text for chat in chats])
    starts = [chat.text[: chat.start] for chat in chats]
    prompts = tokenizer(starts, add_special_tokens=False)["input_ids"] if starts else []
    for start, chat, (ids, offsets), prompt in zip(starts, chats, complete, prompts, strict=True):
        if ids[: len(prompt)].tolist() != prompt:
            [(prompt, places)] = _tokenize(tokenizer, [start])
            rest, after = _tokenize_inside(tokenizer, chat.text[chat.start :])
            ids, offsets = np.concatenate([prompt, rest]), np.concatenate([places, after + chat.start])
        yield ids, offsets, len(prompt)


def content_tokens(offsets: np.ndarray, r: Rendered) -> tuple[int, int]:
    """[first, stop): the tokens of a rendered text's content, from character offsets (T, 2).

    Byte-level tokenizers trim white space from their offsets, so a token of spaces has no width; it belongs to the text
    before it. Raises ValueError if one token holds both content and template text.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside, after = ends > r.start, (starts >= r.end) & (ends > starts)
    first = int(inside.argmax()) if inside.any() else len(starts)
    stop = int(after.argmax()) if after.any() else len(starts)
    if first >= stop:
        raise ValueError("no token of the content can be located")
    if r.text[starts[first] : r.start].strip() or r.text[r.end : max(ends[first:stop])].strip():
        raise ValueError("a token joins the content with the chat template's text, so it cannot be located")
    return first, stop


def label_tokens(renderer: Renderer, scope: str, ids: np.ndarray, answers: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens (T,) are labels, by --lm_labels; `answers` are the [first, stop) tokens of the answers to learn.

    Raises ValueError if no special token ends an answer, or not the same one ends all of them.
    """
    labels = np.zeros(len(ids), dtype=bool)
    if scope == "all":
        return ~labels
    if scope == "reference":
        return ids != renderer.tokenizer.pad_token_id
    ends = []
    for first, stop in answers:
        if scope == "answer":
            end = next((t for t in range(stop, len(ids)) if int(ids[t]) in renderer.special_ids), None)
            if end is None:
                raise ValueError("no special token ends the answer in the chat template; give --lm_labels answer_text")
            ends.append(int(ids[end]))
            stop = end + 1
        labels[first:stop] = True
    if len(set(ends)) > 1:
        raise ValueError("the chat template ends earlier answers in another way; give --lm_turns last")
    return labels


def or_error(function: Callable, *args: Any) -> Any:
    """The function's value, or the ValueError that says why the example cannot be used."""
    try:
        return function(*args)
    except ValueError as error:
        return error
    except TemplateError as error:
        return ValueError(f"the chat template refuses the example ({error})")


@dataclass(frozen=True)
class Encoder:
    """Encodes examples as segments. The fields after `renderer` are flags of finetune.py."""

    renderer: Renderer
    lm_labels: str = "answer"
    max_length: int = 512
    last_token: int | None = None
    jepa: bool = True
    text_view: str = "alone"
    locate_user: bool = False
    lm_turns: str = "last"

    def __call__(self, examples: list[Example]) -> list[Item | ValueError]:
        """Each example's segments (see `Item`), or the reason why there are none."""
        items = []
        in_chat = self.text_view == "in_chat"
        chats = iter(self.chats([example for example in examples if example.has_chat]))
        views = iter(self.views([example for example in examples if example.pair]) if self.jepa else ())
        for example in examples:
            chat = (next(chats),) if example.has_chat else ()
            pair = next(views) if self.jepa and example.pair else ()
            item = (*chat, *(pair[1:] if in_chat else pair))
            error = next((x for x in item if isinstance(x, ValueError)), None)
            if error is None and in_chat and pair and example.text is not None:
                error = ValueError("its Text view is not part of the chat, as --text_view in_chat requires")
            if error is None and not pair:
                item = tuple(dataclasses.replace(x, paired=example.pair) for x in without_pair(item))
            items.append(error or item)
        return items

    def chats(self, examples: list[Example]) -> list[Segment | ValueError]:
        """The chat segment of each example, or the reason why there is none."""
        locate = (self.locate_user or self.text_view == "in_chat", self.lm_turns == "all")
        return self._encode("chat", [or_error(self.renderer.chat, example, *locate) for example in examples])

    def views(self, examples: list[Example]) -> list[tuple[Segment | ValueError, ...]]:
        """The two view segments of each example, or the reason why there are none."""
        pairs = [or_error(self.renderer.views, example) for example in examples]
        first, second = ([p if isinstance(p, ValueError) else p[i] for p in pairs] for i in (0, 1))
        return list(zip(self._encode("text_view", first), self._encode("code_view", second), strict=True))

    def _encode(self, kind: str, texts: list[Rendered | ValueError]) -> list[Segment | ValueError]:
        rendered, tokenizer = [text for text in texts if isinstance(text, Rendered)], self.renderer.tokenizer
        if kind == "chat":
            tokens = _tokenize_chats(tokenizer, rendered)
        else:
            tokens = iter(_tokenize(tokenizer, [text.text for text in rendered]))
        return [t if isinstance(t, ValueError) else or_error(self._segment, kind, t, *next(tokens)) for t in texts]

    def _segment(self, kind: str, rendered: Rendered, ids: np.ndarray, offsets: np.ndarray, prompt: int = 0) -> Segment:
        tokenizer, name = self.renderer.tokenizer, kind.replace("_", " ")
        if len(ids) > self.max_length:
            raise ValueError(f"the {name} has {len(ids)} tokens, more than --max_length {self.max_length}")
        _, stop = content_tokens(offsets, rendered)
        if kind != "chat":
            view = stop - 1 if self.last_token is None else len(ids) + self.last_token
            if view < 0:
                raise ValueError(f"the {name} has {len(ids)} tokens: --last_token {self.last_token} is outside")
            return Segment(kind, ids, np.zeros(len(ids), dtype=bool), view)
        earlier = [content_tokens(offsets, Rendered(rendered.text, *answer)) for answer in rendered.earlier]
        labels = label_tokens(self.renderer, self.lm_labels, ids, [*earlier, (prompt, stop)])
        turns = {"answer": (prompt, stop)}
        if rendered.user is not None:
            turns["user"] = content_tokens(offsets, Rendered(rendered.text, *rendered.user))
        if self.text_view == "alone":
            return Segment("chat", ids, labels, **turns)
        stem = turns["user"][1]
        predictors = [predictor_token(i) for i in range(self.renderer.predictors, 0, -1)]
        branch = tokenizer.convert_tokens_to_ids(predictors)
        ids = np.concatenate([ids, np.asarray(branch, dtype=ids.dtype)])
        labels = np.concatenate([labels, np.zeros(len(branch), dtype=bool)])
        return Segment("chat", ids, labels, len(ids) - 1 if branch else stem - 1, stem, len(branch), **turns)


def end_of_turn(renderer: Renderer) -> int | None:
    """Id of the special token that ends the assistant turn, None if the template has none."""
    encoder = Encoder(dataclasses.replace(renderer, train_all=False), max_length=sys.maxsize, jepa=False)
    segment = encoder.chats([Example(None, "a", "b", "the chat template", 0)])[0]
    return None if isinstance(segment, ValueError) else int(segment.ids[segment.labels][-1])
