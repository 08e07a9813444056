r"""Whether two regular expressions of SYNTH and TURK (arXiv 1608.03000) describe the same language.

The syntax is the one that the datasets' own metric used, that of the Java library dk.brics.automaton. Loosest first:

    x|y   x&y   xy                      union, intersection, concatenation
    x* x+ x? x{2} x{2,} x{2,4}          repetition, by numbers of at most nine digits
    ~x                                  complement, so that ~(x)* is (~(x))*
    a . [abc] [a-z] [^a] (x) () \b \.   character, any symbol, class, group, empty string, `\b`, quoted character

An expression is matched against whole strings of symbols. A symbol is a character, or `\b`, which stands for itself and
is no place between characters; `.` and `[^a]` match it too, so that `.*` is every string there is. `^` and `$` are
characters like any other. A backslash quotes whatever is no letter and no digit.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

import automata.base.config
from automata.fa.dfa import DFA
from automata.fa.nfa import NFA

from llm_jepa.scoring.sandbox import Failure

automata.base.config.allow_mutable_automata = True  # freezing would double the time, and nothing here changes one

Symbols = tuple[range, ...]  # a set of symbols, as their code points
BOUNDARY, END = 0x110000, 0x110001  # `\b` is the code point behind Unicode's last
BINDING = {"(": 0, "|": 1, "&": 2, "concatenate": 3, "~": 4}
QUOTED = r"\\b | \\[\W_]"
TOKEN = re.compile(
    rf"""(?P<operand> {QUOTED} | \. | \(\) | \[\^?+(?: {QUOTED} | [^][\\])+\] | [^][(){{}}|&~*+?.\\] )
       | (?P<repeat> [*+?] | \{{ [0-9]{{1,9}} (?:,[0-9]{{0,9}})? \}} ) | (?P<join> [|&] ) | (?P<other> [()~] )""",
    re.VERBOSE | re.DOTALL,
)
CLASS_ITEM = re.compile(rf"( {QUOTED} | . ) (?: - ( {QUOTED} | . ) )?", re.VERBOSE | re.DOTALL)


def dfa_equal(prediction: str, answer: str, states: int) -> bool:
    """Whether both describe the same language: DFA-equality, the metric of arXiv 1608.03000.

    Raises Failure: `syntax` where the prediction is no expression, `states` where an automaton on the way would have
    more than `states` of them; `gold_syntax` and `gold_states` where that is so for the answer.
    """
    with _gold():
        gold = parse(answer)
    guess = parse(prediction)
    alphabet, names = partition({step[1] for step in gold + guess if step[0] == "symbols"})
    with _gold():
        right = automaton(gold, alphabet, names, states)
    return automaton(guess, alphabet, names, states) == right


@contextlib.contextmanager
def _gold() -> Iterator[None]:
    """Failures within are the answer's."""
    try:
        yield
    except Failure as failure:
        raise Failure(f"gold_{failure.reason}") from None


# ------------------------------------------------------------------------------------------------------------- parse


def parse(text: str) -> list[tuple]:
    """The expression in postfix order, which no depth of nesting makes hard to work on.

    Its steps: ("symbols", Symbols), ("empty",), ("repeat", least, most or None), and with the number of their operands
    ("concatenate", n), ("|", n), ("&", n), ("~", 1). Raises Failure("syntax").
    """
    steps: list[tuple] = []
    pending: list[list] = []  # groups and operators whose last operand is not complete, the innermost last
    at, complete = 0, False  # complete: an operand ends here

    def close(binding: int) -> None:
        """Everything that binds more tightly has its last operand."""
        while pending and BINDING[pending[-1][0]] > binding:
            steps.append(tuple(pending.pop()))

    def join(operator: str) -> None:
        close(BINDING[operator])
        if pending and pending[-1][0] == operator:
            pending[-1][1] += 1
        else:
            pending.append([operator, 2])

    while at < len(text):
        token = TOKEN.match(text, at)
        word, kind = (token[0], token.lastgroup) if token else ("", "")
        begins = kind == "operand" or word in ("(", "~")
        if not token or not (begins or complete):
            raise Failure("syntax")
        if begins and complete:
            join("concatenate")
        if kind == "operand":
            steps.append(("empty",) if word == "()" else ("symbols", _symbols(word)))
        elif kind == "repeat":
            steps.append(_repeat(word))
        elif kind == "join":
            join(word)
        elif begins:
            pending.append([word, 1])
        else:
            close(BINDING["("])
            if not pending:
                raise Failure("syntax")
            pending.pop()
        at, complete = token.end(), kind in ("operand", "repeat") or word == ")"
        if complete:
            close(BINDING["concatenate"])
    close(BINDING["("])
    if pending or not complete:
        raise Failure("syntax")
    return steps


def _repeat(word: str) -> tuple[str, int, int | None]:
    """The step of `*`, `+`, `?` or a number in braces."""
    least, comma, most = {"*": "0,", "+": "1,", "?": "0,1"}.get(word, word.strip("{}")).partition(",")
    high = int(most) if most else None if comma else int(least)
    if high is not None and high < int(least):
        raise Failure("syntax")
    return "repeat", int(least), high


def _symbols(word: str) -> Symbols:
    """The symbols that a character, `.` or class stands for."""
    if word == ".":
        return (range(END),)
    if not word.startswith("["):
        return (range(_code(word), _code(word) + 1),)
    negated = word.startswith("[^")
    ranges = [range(_code(a), _code(b or a) + 1) for a, b in CLASS_ITEM.findall(word[1 + negated : -1])]
    if any(not r or r.stop == END > r.start + 1 for r in ranges):  # backwards, or from a character to `\b`
        raise Failure("syntax")
    if not negated:
        return tuple(ranges)
    ranges = sorted([range(0), *ranges, range(END, END)], key=lambda r: r.start)
    stops = accumulate((r.stop for r in ranges), max)
    return tuple(range(stop, after.start) for stop, after in zip(stops, ranges[1:], strict=False) if stop < after.start)


def _code(word: str) -> int:
    return BOUNDARY if word == r"\b" else ord(word[-1])


# ---------------------------------------------------------------------------------------------------------- automata


def partition(sets: set[Symbols]) -> tuple[frozenset[str], dict[Symbols, list[str]]]:
    """(names of the groups of symbols that all the sets treat alike, the groups in each set): a finite alphabet."""
    cuts = sorted({0} | {cut for ranges in sets for r in ranges for cut in (r.start, r.stop) if cut < END})
    members = [0] * len(cuts)  # bit i: the symbols from this cut to the next are in set i
    for i, ranges in enumerate(sets):
        for r in ranges:
            for k in range(bisect_left(cuts, r.start), bisect_left(cuts, r.stop)):
                members[k] |= 1 << i
    groups = {group: str(number) for number, group in enumerate(dict.fromkeys(members))}
    names = {ranges: [name for group, name in groups.items() if group >> i & 1] for i, ranges in enumerate(sets)}
    return frozenset(groups.values()), names


def automaton(steps: list[tuple], alphabet: frozenset[str], names: dict[Symbols, list[str]], states: int) -> DFA:
    """The complete DFA of an expression in postfix order. Raises Failure("states")."""
    empty = _one_symbol(alphabet, []).option()
    stack: list[NFA] = []
    for operation, *arguments in steps:
        if operation == "symbols":
            stack.append(_one_symbol(alphabet, names[arguments[0]]))
        elif operation == "empty":
            stack.append(empty)
        elif operation == "repeat":
            x, (least, most) = stack.pop(), arguments
            _check((most or least + 1) * (len(x.states) + 1), states)
            rest = [x.kleene_star()] if most is None else [x.option()] * (most - least)
            stack.append(_fold(NFA.concatenate, [x] * least + rest or [empty]))
        else:
            operands = [stack.pop() for _ in range(arguments[0])][::-1]
            _check(sum(len(x.states) + 1 for x in operands), states)
            if operation in "~&":  # x & y is ~(~x | ~y)
                operands = [_complement(x, states) for x in operands]
            x = _fold(NFA.concatenate if operation == "concatenate" else NFA.union, operands)
            stack.append(_complement(x, states) if operation == "&" else x)
    return _determinise(stack.pop(), states)


def _one_symbol(alphabet: frozenset[str], names: list[str]) -> NFA:
    """One symbol, of any of the groups named."""
    paths = {0: {name: {1} for name in names}}
    return NFA(states={0, 1}, input_symbols=alphabet, transitions=paths, initial_state=0, final_states={1})


def _fold(operation: Callable[[NFA, NFA], NFA], operands: list[NFA]) -> NFA:
    """Joins neighbours, then the results: joining copies both operands, and so each of a long row is copied seldom."""
    while len(operands) > 1:
        pairs = zip(operands[::2], operands[1::2], strict=False)
        operands = [operation(x, y) for x, y in pairs] + operands[len(operands) // 2 * 2 :]
    return operands[0]


def _complement(nfa: NFA, states: int) -> NFA:
    return NFA.from_dfa(_determinise(nfa, states).complement())


def _determinise(nfa: NFA, states: int) -> DFA:
    """The complete DFA by subset construction, with a bound that the library's own has not."""
    nfa = nfa.eliminate_lambda()
    start = frozenset([nfa.initial_state])
    numbers, paths, subsets = {start: 0}, {}, [start]
    for subset in subsets:  # which grows meanwhile
        ways = [nfa.transitions[state] for state in subset if state in nfa.transitions]
        paths[numbers[subset]] = path = {}
        for symbol in nfa.input_symbols:
            target = frozenset().union(*(way[symbol] for way in ways if symbol in way))
            if target not in numbers:
                _check(len(numbers) + 1, states)
                numbers[target] = len(numbers)
                subsets.append(target)
            path[symbol] = numbers[target]
    final = {number for subset, number in numbers.items() if subset & nfa.final_states}
    return DFA(
        states=set(paths), input_symbols=nfa.input_symbols, transitions=paths, initial_state=0, final_states=final
    )


def _check(count: int, states: int) -> None:
    """Raises Failure("states")."""
    if count > states:
        raise Failure("states")
