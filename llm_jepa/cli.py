"""Flags from dataclasses, contradictions between flags, and the entry wrapper of every command."""

import argparse
import codecs
import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn


class UsageError(Exception):
    """Wrong flags or folders: printed as one message, exit code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def flag(default: Any, help: str, group: str, *aliases: str) -> Any:
    """A field of a settings dataclass: its default, help text, group in `--help` and other spellings."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "aliases": aliases})


def no_default(f: dataclasses.Field) -> bool:
    """Whether there is no default worth showing; 0 is shown."""
    return f.default is None or f.default is False or f.default == ""


def value_type(annotation: Any) -> tuple[Any, tuple | None]:
    """(type, choices) of a flag's annotation: `int | None` → int, Literal["a", "b"] → str and its choices."""
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation)
    options = [a for a in typing.get_args(annotation) if a is not type(None)]
    return value_type(options[0]) if options else (annotation, None)


class FlagParser(argparse.ArgumentParser):
    """Prints an error as one line instead of the usage, with similar flags for an unknown one."""

    def error(self, message: str) -> NoReturn:
        unknown = re.findall(r"(--[\w-]+)", message) if message.startswith("unrecognized") else []
        near = [f for flag in unknown for f in difflib.get_close_matches(flag, self._option_string_actions, 2, 0.7)]
        hint = f" (did you mean {' or '.join(dict.fromkeys(near))}?)" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}; --help lists all flags\n")


def build_parser(settings: type, doc: str) -> FlagParser:
    """The parser of a settings dataclass. It has no defaults, so that given flags can be distinguished."""
    parser = FlagParser(
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    types, groups = typing.get_type_hints(settings), {}
    for f in dataclasses.fields(settings):
        group = groups.setdefault(f.metadata["group"], parser.add_argument_group(f.metadata["group"]))
        kind, choices = value_type(types[f.name])
        shown = "" if no_default(f) else f" (default {f.default})"
        options: dict[str, Any] = {"dest": f.name, "help": (f.metadata["help"] + shown).replace("%", "%%")}
        if kind is bool and str in typing.get_args(types[f.name]):  # a switch that also accepts a value
            options.update(nargs="?", const=True, metavar=f.metadata["group"].upper())
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kind, choices=choices, metavar=None if choices else kind.__name__.upper())
        group.add_argument(f"--{f.name}", *f.metadata["aliases"], **options)
    return parser


def strict_parser(settings: type) -> FlagParser:
    """The same parser, raising ValueError for wrong flags."""

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser = build_parser(settings, "")
    parser.error = refuse
    return parser


def read_config(path: Path, settings: type) -> dict[str, Any]:
    """The flags that a YAML file gives, one `name: value` per line. Raises UsageError naming file, line and key.

    A value is spelled as on the command line and has the type of its flag, so `2e-5` is a number and `no` a choice.
    """
    import yaml

    parser = strict_parser(settings)
    known = {name.removeprefix("--"): action for name, action in parser._option_string_actions.items()}
    known = {name: a for name, a in known.items() if a.dest not in ("help", "config", "resume") and name[:3] != "no-"}
    try:
        with path.open(encoding="utf-8") as file:
            root = yaml.compose(file, yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read ({' '.join(str(error).split())})") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config {path} has no lines `name: value`")
    found: dict[str, Any] = {}
    for key, value in root.value if root else ():
        name, text, place = str(key.value), value.value, f"{path}:{key.start_mark.line + 1}: {key.value}"
        if name not in known:
            near = difflib.get_close_matches(name, known, 2, 0.7)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise UsageError(f"{place} is not a flag{hint}")
        if known[name].dest in found:
            raise UsageError(f"{place} is there twice")
        if not isinstance(text, str):
            raise UsageError(f"{place} has several values; give one, as on the command line")
        if value.style is None and text in ("", "~", "null"):  # no value, unless it is quoted
            continue
        words = [f"--{name}={text}"]
        if known[name].nargs == 0:  # a switch
            if text not in ("true", "false"):
                raise UsageError(f"{place} is neither true nor false: {text}")
            words = [f"--{name}" if text == "true" else f"--no-{name}"]
        try:
            found |= vars(parser.parse_args(words))
        except ValueError as error:
            raise UsageError(f"{place}: {error}") from None
    return found


def parse_flags(settings: type, doc: str, argv: list[str] | None = None) -> tuple[Any, set[str]]:
    """(settings, names of the flags that were given with another value than their default).

    `--resume RUN` and `--config RUN` add the settings that `settings.stored` and `settings.configured` find in the
    run's folder, `--config FILE` gives the flags of a YAML file; flags on the command line win.
    """
    parser = build_parser(settings, doc)
    given, stored = vars(parser.parse_args(argv)), {}
    try:
        if isinstance(given.get("resume"), str):
            if "config" in given:
                raise UsageError("give one of --resume RUN and --config")
            stored, given["resume"] = settings.stored(given), True
        elif "config" in given:
            path = Path(given.pop("config"))
            if path.is_dir() or path.name == "args.json":
                stored = settings.configured(path if path.is_dir() else path.parent)
            else:
                given = read_config(path, settings) | given
    except UsageError as error:
        parser.error(str(error))
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    return settings(**(stored | given)), {name for name, value in given.items() if value != defaults[name]}


class Refusals(list):
    """Messages about wrong or inapplicable flags, collected so that all are printed together."""

    def __init__(self, given: set[str]):
        self.given = given

    def refuse(self, condition: bool, message: str) -> None:
        """Adds the message if the condition holds."""
        if condition:
            self.append(message)

    def only_if(self, applies: bool, names: str, reason: str) -> None:
        """Refuses the listed flags that were given, unless they apply."""
        unused = [f"--{n}" for n in names.split() if n in self.given]
        self.refuse(bool(unused) and not applies, f"{', '.join(unused)}: {reason}")


def _end_at_once(name: str, speaks: Callable[[], bool], *signal_and_frame: Any) -> NoReturn:
    """Handles SIGINT where an exception could appear anywhere: one line, exit code 130."""
    if speaks():
        os.write(2, f"{name}: interrupted\n".encode())
    os._exit(130)


def end_at_interrupts(name: str, speaks: Callable[[], bool]) -> None:
    """Outside of `run_command` Ctrl-C ends this process at once. Processes that it forks ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, partial(_end_at_once, name, speaks))
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))


def run_command(
    name: str, work: Callable[[], int | None], speaks: Callable[[], bool] = lambda: True, hint: str = ""
) -> int:
    """Runs a command's work; an error that the user can fix becomes one line on stderr. Returns the exit code.

    0 finished (or what `work` returns), 1 failed, 2 wrong usage or data, 130 interrupted. Other exceptions are bugs in
    the program and keep their traceback. `speaks`: whether this process prints what every process finds. `hint`: text
    after "interrupted".
    """
    # What the console cannot show becomes a JSON escape, so that JSON keeps its values.
    codecs.register_error("json", lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end))
    for stream in (s for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")):
        stream.reconfigure(errors="json")
    outside = signal.getsignal(signal.SIGINT)
    if isinstance(outside, partial):  # of `end_at_interrupts`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return work() or 0
    except UsageError as error:
        code, lines = 2, [f"error: {line}" for line in str(error).splitlines()]
    except FloatingPointError as error:
        code, lines = 1, [f"error: {error}"]
    except OSError as error:  # of this process only, so it is printed anyway
        code, lines, speaks = 1, [f"error: {first_line(error)}"], lambda: True
    except KeyboardInterrupt:
        code, lines = 130, [f"interrupted{hint}"]
        if isinstance(outside, partial):
            outside = partial(_end_at_once, name, lambda: False)  # a second Ctrl-C prints nothing
    finally:
        if isinstance(outside, partial):
            signal.signal(signal.SIGINT, outside)
    for line in lines if speaks() else ():
        print(f"{name}: {line}", file=sys.stderr, flush=True)
    return code
