"""Renders an example's chat and views as text with the tokenizer's chat template, and locates each content in it.

Labels and views are found by these character offsets, never by searching for tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from llm_jepa.cli import UsageError
from llm_jepa.data.examples import Example

CONTENT = "\ue000\ue001\ue002"  # replaces a turn's content to find where the template puts it
PERCEPTION, END_OF_TURN = "<|perception|>", "<|eot_id|>"
PINNED_DATE = datetime(2024, 7, 26)  # the fallback date of Llama-3.x's template
# Prepended to a template, this macro hides transformers' strftime_now, which returns today's date.
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
    """A text as the model sees it; `start` and `end` are the character offsets of its content.

    `user` holds the offsets of a chat's user turn if they were requested.
    """

    text: str
    start: int
    end: int
    user: tuple[int, int] | None = None


@dataclass
class Renderer:
    """Renders chats and views with the tokenizer's chat template, or with `plain` without one.

    The template decides, not the model's name. If it refuses or drops a system turn, the system text is put before the
    user text, separated by a blank line. If it cannot begin with an assistant turn, the Code view is rendered as a user
    turn, as the reference implementation does for Gemma. The fields after `tokenizer` are flags of finetune.py.

    Raises UsageError if there is no chat template or it does not show a turn's content.
    """

    tokenizer: Any
    plain: bool = False
    train_all: bool = False
    predictors: int = 0
    front_pred: bool = False
    reverse_pred: bool = False

    def __post_init__(self) -> None:
        tokenizer, name = self.tokenizer, self.tokenizer.name_or_path
        # What the tokenizer puts before bare text; templates write it themselves.
        bos = tokenizer.bos_token_id
        self.prefix = tokenizer.bos_token if bos is not None and tokenizer("a").input_ids[:1] == [bos] else ""
        if self.plain:
            return
        if not tokenizer.chat_template:
            raise UsageError(f"--model_name {name}: its tokenizer has no chat template; give --plain or add one")
        user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        self.system_turn = self._shows([{"role": "system", "content": CONTENT}, user, assistant])
        self.assistant_first = self._shows([{"role": "assistant", "content": CONTENT}])
        if not self._shows([{"role": "user", "content": CONTENT}, assistant]):
            raise UsageError(f"--model_name {name}: the chat template does not show the user turn")

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

    def _locate(self, messages: list[dict], turn: int = -1) -> Rendered:
        """Renders messages and finds the content of a turn. Raises ValueError if it cannot be located."""
        content = messages[turn]["content"]
        text, other = self._render(messages), list(messages)
        other[turn] = messages[turn] | {"content": CONTENT}
        before, _, after = self._render(other).partition(CONTENT)
        start, end = len(before), len(text) - len(after)
        if not (text.startswith(before) and text.endswith(after) and text[start:end].strip() == content.strip()):
            raise ValueError("the content cannot be located in the rendered chat template")
        return Rendered(text, start, end)

    def _plain(self, before: str, content: str, after: str) -> Rendered:
        before = self.prefix + before
        return Rendered(before + content + after, len(before), len(before) + len(content))

    def chat(self, example: Example, locate_user: bool = False) -> Rendered:
        """The complete chat. Its content is the answer, or with `plain` and `train_all` the user text."""
        if self.plain and self.train_all:
            return self._plain("", example.user, END_OF_TURN)
        if self.plain:
            chat = self._plain(example.user + PERCEPTION, example.assistant, END_OF_TURN)
            user = (len(self.prefix), len(self.prefix) + len(example.user))
            return dataclasses.replace(chat, user=user) if locate_user else chat
        system, user = [], example.user
        if example.system is not None and self.system_turn:
            system = [{"role": "system", "content": example.system}]
        elif example.system is not None:
            user = f"{example.system}\n\n{user}"
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": example.assistant}]
        chat = self._locate([*system, *turns])
        if locate_user:
            question = self._locate([*system, *turns], turn=-2)
            chat = dataclasses.replace(chat, user=(question.start, question.end))
        # A template's space before the answer counts as part of the answer: tokenizers join the two, and a prompt that
        # ends with the space would be a context that never occurs in training.
        return dataclasses.replace(chat, start=len(chat.text[: chat.start].rstrip(" ")))

    def views(self, example: Example) -> tuple[Rendered, Rendered]:
        """(first, second): the Text and the Code view, with `reverse_pred` in the other order."""
        views = [("user", example.text or example.user), ("assistant", example.code or example.assistant)]
        (role, content), (other_role, other_content) = views[::-1] if self.reverse_pred else views
        k = self.predictors
        if self.front_pred:
            content = "".join(predictor_token(i) for i in range(1, k + 1)) + content
        else:
            content += "".join(predictor_token(i) for i in range(k, 0, -1))
        return self._view(role, content), self._view(other_role, other_content)

    def _view(self, role: str, content: str) -> Rendered:
        if self.plain:
            return self._plain("", content, "")
        return self._locate([{"role": role if self.assistant_first else "user", "content": content}])

    def prompt(self, example: Example) -> str:
        """The text that generation continues: the chat as in training, up to the answer."""
        if self.plain:
            return self.prefix + example.user + PERCEPTION
        chat = self.chat(dataclasses.replace(example, assistant="a"))
        return chat.text[: chat.start]
