"""Examples: one line of data each, read, checked, and named by file and line.

An example is a pair of views with an optional system turn, stored as one JSON object a line:

    {"messages": [{"role": "system", "content": "…"},
                  {"role": "user", "content": "…"},
                  {"role": "assistant", "content": "…"}]}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

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
