"""Renders an example's chat and views as text with the tokenizer's chat template, and locates each content in it.

Labels and views are found by these character offsets, never by searching for tokens.
"""

import dataclasses
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from llm_jepa.cli import UsageError, first_line
from llm_jepa.data.examples import Example

CONTENT = "\ue000\ue001\ue002"  # replaces a turn's content to find where the template puts it
PERCEPTION, END_OF_TURN = "<|perception|>", "<|eot_id|>"
PINNED_DATE = datetime(2024, 7, 26)  # the fallback date of Llama-3.x's template
# A call of transformers' function for templates, with a literal format.
TODAY = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
MARK = "{# What the prompt depends on is fixed here, as LLM-JEPA trained the model. #}\n"
THINKING, NO_THINKING = ("{% set enable_thinking = " + value + " %}\n" for value in ("true", "false"))
PLAIN = f"{{{{ m.content + ('{PERCEPTION}' if m.role == 'user' else '{END_OF_TURN}') }}}}"
PLAIN = "{% for m in messages if m.role != 'system' %}" + PLAIN + "{% endfor %}"
FOLD = (
    "{% if messages[0].role == 'system' %}{% set messages = [{'role': 'user', 'content': "
    "messages[0].content + '\\n\\n' + messages[1].content}] + messages[2:] %}{% endif %}\n"
)


def predictor_token(i: int) -> str:
    """The i-th predictor token, counted from 1."""
    return f"<|predictor_{i}|>"


@dataclass(frozen=True)
class Rendered:
    """A text as the model sees it; `start` and `end` are the character offsets of its content.

    `user` and `earlier` hold the offsets of a chat's last user turn and of its earlier answers, if requested.
    """

    text: str
    start: int
    end: int
    user: tuple[int, int] | None = None
    earlier: tuple[tuple[int, int], ...] = ()


@dataclass
class Renderer:
    """Renders chats and views with the tokenizer's chat template, or with `plain` with one of this project.

    The template decides, not the model's name. What its prompts depend on besides the messages is fixed in it: the
    date, thinking, where a refused or dropped system text goes (before the user text), and how an answer begins. The
    result replaces the tokenizer's template and is saved with the model, so transformers renders the same prompts. If
    a template cannot begin with an assistant turn, the Code view is rendered as a user turn, as the reference
    implementation does for Gemma. The fields after `tokenizer` are flags of finetune.py.

    Raises UsageError if there is no chat template or it does not show a turn's content.
    """

    tokenizer: Any
    plain: bool = False
    train_all: bool = False
    predictors: int = 0
    front_pred: bool = False
    reverse_pred: bool = False

    def __post_init__(self) -> None:
        tokenizer, template = self.tokenizer, self.tokenizer.chat_template
        # What the tokenizer puts before bare text; templates write it themselves.
        bos = tokenizer.bos_token_id
        self.prefix = tokenizer.bos_token if bos is not None and tokenizer("a").input_ids[:1] == [bos] else ""
        special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids = {*special, *tokenizer.all_special_ids}
        texts = sorted(t for t in {*special.values(), *tokenizer.all_special_tokens} if t.strip())
        self.special = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self.template = template.get("default") if isinstance(template, dict) else template
        if self.plain:
            self.template = ("{{ bos_token }}" if self.prefix else "") + PLAIN
        self.fix_template()

    def fix_template(self, thinking: bool = False) -> None:
        """Sets the tokenizer's template. With `thinking`, prompts leave thinking to the answers; else it is off."""
        template, templates = self.template or "", self.tokenizer.chat_template
        if template.startswith(MARK):
            template = template.replace(NO_THINKING, THINKING) if thinking else template
        elif not self.plain:
            try:
                template = self._fixed(template, thinking)
            except (TemplateError, ValueError) as error:
                what = f"{self.tokenizer.name_or_path}: the chat template cannot be used ({first_line(error)})"
                raise UsageError(f"{what}; give --plain or another --chat_template") from None
        self.tokenizer.chat_template = templates | {"default": template} if isinstance(templates, dict) else template
        self.around_views: dict[str, tuple[str, str]] = {}  # role → what the template shows before and after a view
        self.folds, self.assistant_first = FOLD in template, self._shows([{"role": "assistant", "content": CONTENT}])

    def _fixed(self, template: str, thinking: bool) -> str:
        """The template with everything fixed that a prompt depends on besides the messages."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": CONTENT}
        head, tail = "", ""
        if "enable_thinking" in template:
            head += THINKING if thinking else NO_THINKING
        if "date_string" in template:
            head += f"{{% set date_string = '{PINNED_DATE:%d %b %Y}' %}}\n"
        template = TODAY.sub(lambda call: call[1] + PINNED_DATE.strftime(call[2]) + call[1], template)
        if re.search(r"strftime_now(?!\s+is\b)", template):
            raise ValueError("it uses strftime_now in another way than strftime_now('FORMAT')")
        if not self._shows([user | {"content": CONTENT}, answer | {"content": "b"}], head + template):
            raise ValueError("it does not show the user turn" if template else "the tokenizer has none")
        if not self._shows([{"role": "system", "content": CONTENT}, user, answer | {"content": "b"}], head + template):
            head += FOLD
        before = self._render([user, answer], head + template).partition(CONTENT)[0]
        prompt = self._render([user], head + template, add_generation_prompt=True)
        header = before[len(prompt) :].strip(" ")
        if not before.startswith(prompt) or header and not (thinking and "</think>" in header):
            closed = self._render([user], head + template)
            if not before.startswith(closed):
                raise ValueError("it shows a user turn in another way if no answer follows")
            head += "{% set generation_prompt, add_generation_prompt = add_generation_prompt, false %}\n"
            tail = f"{{%+ if generation_prompt %}}{{{{ {before[len(closed) :].rstrip(' ')!r} }}}}{{% endif %}}"
        return MARK + head + template.removesuffix("\n") + tail if head else template

    def _render(self, messages: list[dict], template: str | None = None, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=template, add_generation_prompt=add_generation_prompt
        )

    def _shows(self, messages: list[dict], template: str | None = None) -> bool:
        try:
            return CONTENT in self._render(messages, template)
        except TemplateSyntaxError:
            raise
        except TemplateError:
            return False

    def _locate(self, messages: list[dict], turn: int = -1, before: str | None = None) -> Rendered:
        """Renders messages and finds the content of a turn, or all that follows `before` up to its end.

        Templates may change white space in the content and open a thinking block before it. Raises ValueError if it
        cannot be located.
        """
        role, content = messages[turn]["role"], messages[turn]["content"]
        text, around = self._render(messages), self.around_views if len(messages) == 1 else {}
        if role not in around:
            other = list(messages)
            other[turn] = messages[turn] | {"content": CONTENT}
            around[role] = self._render(other).partition(CONTENT)[::2]
        front, after = around[role]
        before = front if before is None else before
        start, end = len(before), len(text) - len(after)
        shown = "".join(text[start:end].split()).endswith("".join(content.split()).removeprefix("<think>"))
        if not (shown and text.startswith(before) and text.endswith(after)):
            raise ValueError("the content cannot be located in the rendered chat template")
        return Rendered(text, start, end)

    def _messages(self, example: Example) -> list[dict]:
        """The turns of an example. Raises ValueError if a text contains a special token."""
        messages = example.messages
        for text in (*(m["content"] for m in messages), example.text, example.code):
            if text is not None and (found := self.special.search(text)):
                raise ValueError(f"the text {found[0]!r} in it would become that special token")
        return messages

    def _plain(self, content: str, after: str = "") -> Rendered:
        start = len(self.prefix)
        return Rendered(self.prefix + content + after, start, start + len(content))

    def chat(self, example: Example, locate_user: bool = False, locate_earlier: bool = False) -> Rendered:
        """The complete chat. Its content is the last answer, or with `plain` and `train_all` the user text.

        What follows the prompt counts as part of the answer. That may be a space of the template's.
        """
        messages = self._messages(example)
        if self.plain and self.train_all:
            return self._plain(example.user, END_OF_TURN)
        chat = self._locate(messages, before=self.prompt(example))
        if locate_user:
            question = self._locate(messages, turn=-2)
            folded = self.folds and not example.history  # else the system text is in the first user turn
            start = self._locate(messages, turn=0).start if folded else question.start
            chat = dataclasses.replace(chat, user=(start, question.end))
        if locate_earlier:
            earlier = [self._locate(messages, turn=-1 - i) for i in range(len(example.history), 0, -2)]
            for i, answer in zip(range(len(example.history), 0, -2), earlier, strict=True):
                front = messages[: -1 - i]
                prompt = self._render(front, add_generation_prompt=True)[len(self._render(front)) :]
                if not chat.text[: answer.start].endswith(prompt):  # no thinking block, for example
                    raise ValueError("the chat template begins earlier answers in another way; give --lm_turns last")
            chat = dataclasses.replace(chat, earlier=tuple((answer.start, answer.end) for answer in earlier))
        return chat

    def views(self, example: Example) -> tuple[Rendered, Rendered]:
        """(first, second): the Text and the Code view, with `reverse_pred` in the other order.

        The Code view of an answer with a thinking block is what follows the block.
        """
        self._messages(example)  # checks the texts
        code = example.code or example.assistant.rpartition("</think>")[2]
        if not code.strip():
            raise ValueError("nothing follows the thinking block of the answer, so the Code view is empty")
        views = [("user", example.text or example.user), ("assistant", code)]
        (role, content), (other_role, other_content) = views[::-1] if self.reverse_pred else views
        k = self.predictors
        if self.front_pred:
            content = "".join(predictor_token(i) for i in range(1, k + 1)) + content
        else:
            content += "".join(predictor_token(i) for i in range(k, 0, -1))
        return self._view(role, content), self._view(other_role, other_content)

    def _view(self, role: str, content: str) -> Rendered:
        if self.plain:
            return self._plain(content)
        return self._locate([{"role": role if self.assistant_first else "user", "content": content}])

    def prompt(self, example: Example) -> str:
        """The text that generation continues: the turns before the last answer, as transformers renders them."""
        return self._render(self._messages(example)[:-1], add_generation_prompt=True)
