"""The processes that programs.py starts for one generated program. Imports only the standard library.

    python program_child.py SECONDS UID program            serves the program: calls on stdin, results on stdout
    python program_child.py SECONDS UID tests READ WRITE   tests it over two file descriptors, verdict on stdout

The two processes share only these pipes. The tests run in the second one, where the names that the program must define
are `Remote` objects: only a call's arguments and its result cross, as JSON. The program therefore sees neither the
tests nor the channel of the verdict. Whatever it does, it can pass only by returning the expected values.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO

MEGABYTE = 1 << 20
LIMITS = {"AS": 1024 * MEGABYTE, "FSIZE": 16 * MEGABYTE, "CORE": 0, "NOFILE": 64, "NPROC": 0}
MAX_MESSAGE = 16 * MEGABYTE  # bytes of a call or a result
READY = b"ready\n"  # the first line of the program's process


# --------------------------------------------------------------------------------------------------------- messages

TYPES: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
}  # fmt: skip


def encode(value: Any, refer: Callable[[Any], int | str]) -> Any:
    """The value as JSON. An instance of a subclass counts as one of the class; `refer` names objects of other classes.

    JSON has lists, strings, numbers, booleans and null; anything else is {type: content}.
    """
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, list):
        return [encode(item, refer) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, refer) for item in value]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    return {"complex": [value.real, value.imag]} if isinstance(value, complex) else {"object": refer(value)}


def send(file: BinaryIO, message: Any, refer: Callable[[Any], int | str]) -> None:
    file.write(json.dumps(encode(message, refer)).encode() + b"\n")
    file.flush()


def decode(line: bytes, find: Callable[[int | str], Any]) -> Any:
    """The value of a message; `find` returns the object that `refer` named."""

    def convert(content: dict[str, Any]) -> Any:
        ((kind, value),) = content.items()
        return find(value) if kind == "object" else TYPES[kind](value)

    return json.loads(line, object_hook=convert)


# ------------------------------------------------------------------------------------------------------ the program

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    "getattr": getattr, "setattr": setattr, "bool": bool, "list": list,
}  # fmt: skip


def serve(calls: BinaryIO, results: BinaryIO) -> None:
    """Runs the program, which is the first message, and then the operations on its objects."""
    objects: list[Any] = []
    module = sys.modules["program"] = types.ModuleType("program")  # not __main__, so that no example usage runs

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def find(key: int | str) -> Any:
        return objects[key] if isinstance(key, int) else getattr(module, key)

    results.write(READY)
    results.flush()
    for line in calls:
        try:
            message = decode(line, find)
            if isinstance(message, str):
                result = exec(compile(message, "program", "exec"), module.__dict__)
            else:
                result = OPERATIONS[message[0]](*message[1:])
            reply = [True, encode(result, refer)]
        except BaseException as error:  # also SystemExit
            kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            reply = [False, next(kinds)]
        results.write(json.dumps(reply).encode() + b"\n")
        results.flush()


# -------------------------------------------------------------------------------------------------------- the tests


class Ended(BaseException):
    """The program's process has ended or cannot reply. Not an Exception, so that no test catches it."""


class Remote:
    """An object of the program, by its name or number. Without `__eq__`: it equals nothing that a test expects."""

    def __init__(self, ask: Callable[..., Any], key: int | str):
        vars(self).update(_Remote__ask=ask, _Remote__key=key)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.__ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self.__ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__ask("setattr", self, name, value)

    def __bool__(self) -> bool:
        return self.__ask("bool", self) is True

    def __iter__(self) -> Any:
        return iter(self.__ask("list", self))


def run_tests(program: str, reference: str, tests: str, results: BinaryIO, calls: BinaryIO) -> dict[str, Any]:
    """The verdict of the tests: {"result": passed} or {"failure": reason}.

    The program must define the names of the tests that are not Python's own, and those that the reference defines. The
    imports of the reference are made here too.
    """

    def refer(value: Any) -> int | str:
        if isinstance(value, Remote):
            return vars(value)["_Remote__key"]
        raise TypeError(f"{type(value).__name__} cannot be an argument")

    def ask(*message: Any) -> Any:
        try:
            send(calls, message[0] if message[1:] == () else list(message), refer)
            line = results.readline(MAX_MESSAGE)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise Ended("too_large" if len(line) == MAX_MESSAGE else "crash")
        succeeded, result = decode(line, lambda key: Remote(ask, key))
        if succeeded is True:
            return result
        error = getattr(builtins, result)
        raise error() if issubclass(error, Exception) else RuntimeError(result)

    if results.readline(len(READY)) != READY:
        return {"failure": "start"}
    try:
        code = compile(tests, "tests", "exec")
        used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
        body = ast.parse(reference).body
    except (SyntaxError, ValueError):
        return {"failure": "gold_syntax"}
    own = {getattr(node, "name", None) for node in body}
    namespace = {name: Remote(ask, name) for name in used if name in own or not hasattr(builtins, name)}
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            with contextlib.suppress(ImportError):
                exec(compile(ast.Module([node], []), "reference", "exec"), namespace)
    try:
        try:
            ask(program)
        except SyntaxError:
            return {"failure": "syntax"}
        exec(code, namespace)
    except Ended as ended:
        return {"failure": str(ended)}
    except AssertionError:
        return {"result": False}
    except MemoryError:
        return {"failure": "memory"}
    except Exception:
        return {"failure": "error"}
    return {"result": True}


def main() -> None:
    """Limits this process, then serves or tests the program. Its own output goes nowhere."""
    seconds, uid, role, *descriptors = sys.argv[1:]
    given, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    if uid != "-":  # from root; the limit on processes does not apply to root
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    for limit, value in LIMITS.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
    sys.set_int_max_str_digits(0)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if role == "program":
        serve(given, replies)
    else:
        pipes = (os.fdopen(int(descriptor), mode) for descriptor, mode in zip(descriptors, ("rb", "wb"), strict=True))
        verdict = run_tests(*json.loads(given.read()), *pipes)
        replies.write(json.dumps(verdict).encode())
        replies.flush()


if __name__ == "__main__":
    main()
