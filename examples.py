"""Examples: one line of data each, read, checked, named by file and line, and rendered by a chat template.

An example is a pair of views with an optional system turn, stored as one JSON object a line:

    {"messages": [{"role": "system", "content": "…"},
                  {"role": "user", "content": "…"},
                  {"role": "assistant", "content": "…"}]}
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from runs import UsageError

ROLES = (["system", "user", "assistant"], ["user", "assistant"])


class ExampleError(ValueError):
    """Something is wrong with the data; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Example:
    """One line of data: `user` is the Text view's content, `assistant` the Code view's."""

    system: str | None
    user: str
    assistant: str
    source: str  # "path:line", for messages
    id: int  # line number in the file, counted from 1


@dataclass
class Problems:
    """What is wrong with the data: raised at the first one, or with `skip` collected to be counted and reported."""

    skip: bool = False
    messages: list[str] = field(default_factory=list)

    def add(self, source: str, reason: str) -> None:
        """Raises ExampleError unless bad examples are skipped."""
        message = f"{source}: {reason}"
        if not self.skip:
            raise ExampleError(message)
        self.messages.append(message)

    def report(self) -> str | None:
        """A line for the reader, or None where nothing was skipped."""
        if not self.messages:
            return None
        more = f" (and {len(self.messages) - 3} more)" if len(self.messages) > 3 else ""
        return f"skipped {len(self.messages)} bad examples: " + "; ".join(self.messages[:3]) + more


def parse_example(line: bytes, source: str, number: int) -> Example:
    """One line of a JSONL file → Example. Raises ValueError with the reason, without the place."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise ValueError('no "messages" list')
    messages = row["messages"]
    roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
    if roles not in ROLES:
        raise ValueError(f"roles are {roles}, not system (optional), user, assistant")
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"content of the {message['role']} turn is {type(content).__name__}, not a string")
        if not content.strip():
            raise ValueError(f"content of the {message['role']} turn is empty")
        if any(0xD800 <= ord(c) <= 0xDFFF for c in content):
            raise ValueError(f"content of the {message['role']} turn holds half a surrogate pair")
    system = messages[0]["content"] if len(messages) == 3 else None
    return Example(system, messages[-2]["content"], messages[-1]["content"], source, number)


def read_examples(path: str, problems: Problems) -> list[Example]:
    """All examples of a JSONL file, in order; blank lines do not count as lines of data.

    Raises ExampleError for a missing, unreadable or empty file, and for a bad line unless `problems` skips those.
    """
    try:
        # Split on the newline byte alone: str.splitlines would also break at U+2028 inside a JSON string.
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ExampleError(f"{path}: cannot be read ({error.strerror})") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            examples.append(parse_example(line, source, number))
        except ValueError as error:
            problems.add(source, str(error))
    if not examples:
        skipped = f" ({problems.report()})" if problems.report() else ""
        raise ExampleError(f"{path}: no examples in the file{skipped}")
    return examples


def split_examples(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out): a random `share` of the examples held out, the same one for the same seed and number of rows.

    Raises ExampleError where either part would be empty.
    """
    from datasets import Dataset

    # Dataset.train_test_split rounds the held-out part up.
    if not 0 < share < 1 or math.ceil(share * len(examples)) >= len(examples):
        raise ExampleError(f"{examples[0].source}: a share of {share} cannot be held out of {len(examples)} examples")
    parts = Dataset.from_dict({"i": range(len(examples))}).train_test_split(test_size=share, seed=seed)
    return [examples[i] for i in parts["train"]["i"]], [examples[i] for i in parts["test"]["i"]]


def dataset_name(path: str) -> str:
    """A data file's base name without its part: datasets/synth_test.jsonl → synth."""
    stem = Path(path).stem
    return next((stem.removesuffix(p) for p in ("_train", "_test", "_dev", "_val") if stem.endswith(p)), stem)


# ------------------------------------------------------------------------------------------------------ rendering

CONTENT = "\ue000\ue001\ue002"  # stands in for a turn's content to find where the template puts it
PERCEPTION, END_OF_TURN = "<|perception|>", "<|eot_id|>"
PINNED_DATE = datetime(2024, 7, 26)  # the date that Llama-3.x's own template falls back to
# Stands in front of a template and hides transformers' strftime_now, which is today's date.
DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{c}', '{PINNED_DATE.strftime('%' + c)}')" for c in "aAbBcdHIjmMpSxXyY")
    + " }}{%- endmacro -%}"
)


def predictor_token(i: int) -> str:
    """The i-th predictor token, counted from 1."""
    return f"<|predictor_{i}|>"


@dataclass(frozen=True)
class Rendered:
    """A text as the model sees it; `start` and `end` are the character offsets of its content."""

    text: str
    start: int
    end: int


class Renderer:
    """Renders chats and views with the tokenizer's own chat template, or with --plain without one.

    The template is asked, not the model's name: one that refuses or drops the system turn gets the system text in front
    of the user's, separated by a blank line; one that cannot begin with an assistant turn gets the Code view as a user
    turn (as the reference implementation does for Gemma).
    """

    def __init__(self, tokenizer: Any, s: Any):
        """`s`: settings with model_name, plain, train_all, predictors, front_pred and reverse_pred.

        Raises UsageError where there is no chat template or it does not show a turn's content.
        """
        self.tokenizer, self.s = tokenizer, s
        # What the tokenizer puts in front of bare text; templates write it themselves.
        bos = tokenizer.bos_token_id
        self.prefix = tokenizer.bos_token if bos is not None and tokenizer("a").input_ids[:1] == [bos] else ""
        if s.plain:
            return
        if not tokenizer.chat_template:
            raise UsageError(
                f"--model_name {s.model_name}: its tokenizer has no chat template; give --plain or add one"
            )
        user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        self.system_turn = self._shows([{"role": "system", "content": CONTENT}, user, assistant])
        self.assistant_first = self._shows([{"role": "assistant", "content": CONTENT}])
        if not self._shows([{"role": "user", "content": CONTENT}, assistant]):
            raise UsageError(f"--model_name {s.model_name}: the chat template does not show the user turn")

    def _render(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            enable_thinking=False,
            date_string=PINNED_DATE.strftime("%d %b %Y"),
            chat_template=DATE_MACRO + self.tokenizer.chat_template,
        )

    def _shows(self, messages: list[dict]) -> bool:
        try:
            return CONTENT in self._render(messages)
        except TemplateError:
            return False

    def _place(self, messages: list[dict]) -> Rendered:
        """Renders messages and finds the last one's content. Raises ValueError where it cannot be located."""
        content = messages[-1]["content"]
        text = self._render(messages)
        before, _, after = self._render([*messages[:-1], messages[-1] | {"content": CONTENT}]).partition(CONTENT)
        start, end = len(before), len(text) - len(after)
        if not (text.startswith(before) and text.endswith(after) and text[start:end].strip() == content.strip()):
            raise ValueError("the content cannot be located in the rendered chat template")
        return Rendered(text, start, end)

    def _plain(self, before: str, content: str, after: str) -> Rendered:
        before = self.prefix + before
        return Rendered(before + content + after, len(before), len(before) + len(content))

    def chat(self, example: Example) -> Rendered:
        """The whole chat; its content is the answer (with --plain --train_all the user text)."""
        if self.s.plain and self.s.train_all:
            return self._plain("", example.user, END_OF_TURN)
        if self.s.plain:
            return self._plain(example.user + PERCEPTION, example.assistant, END_OF_TURN)
        system, user = [], example.user
        if example.system is not None and self.system_turn:
            system = [{"role": "system", "content": example.system}]
        elif example.system is not None:
            user = f"{example.system}\n\n{user}"
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": example.assistant}]
        chat = self._place([*system, *turns])
        # A template's space in front of the answer belongs to the answer: tokenizers join the two, and a prompt that
        # ended with it would be a context no training example has.
        return dataclasses.replace(chat, start=len(chat.text[: chat.start].rstrip(" ")))

    def views(self, example: Example) -> tuple[Rendered, Rendered]:
        """(first, second): the Text and the Code view, or with --reverse_pred the other way round."""
        views = [("user", example.user), ("assistant", example.assistant)]
        (role, content), (other_role, other_content) = views[::-1] if self.s.reverse_pred else views
        k = self.s.predictors
        if self.s.front_pred:
            content = "".join(predictor_token(i) for i in range(1, k + 1)) + content
        else:
            content += "".join(predictor_token(i) for i in range(k, 0, -1))
        return self._view(role, content), self._view(other_role, other_content)

    def _view(self, role: str, content: str) -> Rendered:
        if self.s.plain:
            return self._plain("", content, "")
        return self._place([{"role": role if self.assistant_first else "user", "content": content}])

    def prompt(self, example: Example) -> str:
        """What a model is asked with: the chat as it was trained, up to the answer."""
        if self.s.plain:
            return self.prefix + example.user + PERCEPTION
        chat = self.chat(dataclasses.replace(example, assistant="a"))
        return chat.text[: chat.start]
