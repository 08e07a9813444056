r"""Decides whether two regular expressions of SYNTH and TURK (arXiv 1608.03000) describe the same language.

The syntax is that of the datasets' original metric, which used the Java library dk.brics.automaton. Operators from the
lowest to the highest precedence:

    x|y   x&y   xy                      union, intersection, concatenation
    x* x+ x? x{2} x{2,} x{2,4}          repetition; counts have at most nine digits
    ~x                                  complement; ~(x)* is (~(x))*
    a . [abc] [a-z] [^a] (x) () \b \.   character, any symbol, class, group, empty string, `\b`, escaped character

An expression describes complete strings of symbols. A symbol is a character or `\b`, which is a symbol of its own and
not a word boundary; `.` and `[^a]` match it too, so `.*` describes every string. `^` and `$` are ordinary characters.
A backslash escapes any character except letters and digits.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate

import automata.base.config
from automata.fa.dfa import DFA
from automata.fa.nfa import NFA

from llm_jepa.scoring.sandbox import Failure

automata.base.config.allow_mutable_automata = True  # freezing them doubles the time

Symbols = tuple[range, ...]  # a set of symbols, as ranges of code points
BOUNDARY, END = 0x110000, 0x110001  # `\b` gets the code point after Unicode's last
PRECEDENCE = {"(": 0, "|": 1, "&": 2, "concatenate": 3, "~": 4}
ESCAPED = r"\\b | \\[\W_]"
TOKEN = re.compile(
    rf"""(?P<operand> {ESCAPED} | \. | \(\) | \[\^?+(?: {ESCAPED} | [^][\\])+\] | [^][(){{}}|&~*+?.\\] )
       | (?P<repeat> [*+?] | \{{ [0-9]{{1,9}} (?:,[0-9]{{0,9}})? \}} ) | (?P<join> [|&] ) | (?P<other> [()~] )""",
    re.VERBOSE | re.DOTALL,
)
CLASS_ITEM = re.compile(rf"( {ESCAPED} | . ) (?: - ( {ESCAPED} | . ) )?", re.VERBOSE | re.DOTALL)


def dfa_equal(prediction: str, answer: str, max_states: int) -> bool:
    """Whether both expressions describe the same language: the DFA-equality metric of arXiv 1608.03000.

    Raises Failure: `syntax` if a text is not an expression, `states` if an automaton, intermediate ones included, has
    more than `max_states` states.
    """
    a, b = parse(prediction), parse(answer)
    alphabet, names = partition({step[1] for step in a + b if step[0] == "symbols"})
    return automaton(a, alphabet, names, max_states) == automaton(b, alphabet, names, max_states)


# ------------------------------------------------------------------------------------------------------------- parse


def parse(text: str) -> list[tuple]:
    """The expression's steps in postfix order, so that deep nesting needs no recursion.

    The steps are ("symbols", Symbols), ("empty",), ("repeat", least, most or None), and with the number of operands
    ("concatenate", n), ("|", n), ("&", n), ("~", 1). Raises Failure("syntax").
    """
    steps: list[tuple] = []
    pending: list[list] = []  # [operator or "(", operands] that lack their last operand, the innermost last
    at, complete = 0, False  # complete: an operand ends here

    def close(precedence: int) -> None:
        """Moves all pending operators of a higher precedence to the steps."""
        while pending and PRECEDENCE[pending[-1][0]] > precedence:
            steps.append(tuple(pending.pop()))

    def join(operator: str) -> None:
        close(PRECEDENCE[operator])
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
            close(PRECEDENCE["("])
            if not pending:
                raise Failure("syntax")
            pending.pop()
        at, complete = token.end(), kind in ("operand", "repeat") or word == ")"
        if complete:
            close(PRECEDENCE["concatenate"])
    close(PRECEDENCE["("])
    if pending or not complete:
        raise Failure("syntax")
    return steps


def _repeat(word: str) -> tuple[str, int, int | None]:
    """The step of `*`, `+`, `?` or counts in braces."""
    least, comma, most = {"*": "0,", "+": "1,", "?": "0,1"}.get(word, word.strip("{}")).partition(",")
    high = int(most) if most else None if comma else int(least)
    if high is not None and high < int(least):
        raise Failure("syntax")
    return "repeat", int(least), high


def _symbols(word: str) -> Symbols:
    """The symbols that a character, `.` or class matches."""
    if word == ".":
        return (range(END),)
    if not word.startswith("["):
        return (range(_code(word), _code(word) + 1),)
    negated = word.startswith("[^")
    ranges = [range(_code(a), _code(b or a) + 1) for a, b in CLASS_ITEM.findall(word[1 + negated : -1])]
    if any(not r or r.stop == END > r.start + 1 for r in ranges):  # in descending order, or from a character to `\b`
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
    """A finite alphabet: symbols that all sets treat alike form one letter.

    Returns (names of the letters, the letters in each set).
    """
    cuts = sorted({0} | {cut for ranges in sets for r in ranges for cut in (r.start, r.stop) if cut < END})
    members = [0] * len(cuts)  # bit i: the symbols from this cut to the next are in set i
    for i, ranges in enumerate(sets):
        for r in ranges:
            for k in range(bisect_left(cuts, r.start), bisect_left(cuts, r.stop)):
                members[k] |= 1 << i
    letters = {group: str(number) for number, group in enumerate(dict.fromkeys(members))}
    names = {ranges: [name for group, name in letters.items() if group >> i & 1] for i, ranges in enumerate(sets)}
    return frozenset(letters.values()), names


def automaton(steps: list[tuple], alphabet: frozenset[str], names: dict[Symbols, list[str]], max_states: int) -> DFA:
    """The complete DFA of the steps of an expression. Raises Failure("states")."""
    empty = _one_symbol(alphabet, []).option()
    stack: list[NFA] = []
    for operation, *arguments in steps:
        if operation == "symbols":
            stack.append(_one_symbol(alphabet, names[arguments[0]]))
        elif operation == "empty":
            stack.append(empty)
        elif operation == "repeat":
            x, (least, most) = stack.pop(), arguments
            if (most or least + 1) * (len(x.states) + 1) > max_states:
                raise Failure("states")
            rest = [x.kleene_star()] if most is None else [x.option()] * (most - least)
            stack.append(_join(NFA.concatenate, [x] * least + rest or [empty]))
        else:
            operands = [stack.pop() for _ in range(arguments[0])][::-1]
            if sum(len(x.states) + 1 for x in operands) > max_states:
                raise Failure("states")
            if operation in "~&":  # x & y is ~(~x | ~y)
                operands = [_complement(x, max_states) for x in operands]
            x = _join(NFA.concatenate if operation == "concatenate" else NFA.union, operands)
            stack.append(_complement(x, max_states) if operation == "&" else x)
    return _determinize(stack.pop(), max_states)


def _one_symbol(alphabet: frozenset[str], names: list[str]) -> NFA:
    """The NFA of one symbol, which is any of the letters."""
    paths = {0: {name: {1} for name in names}}
    return NFA(states={0, 1}, input_symbols=alphabet, transitions=paths, initial_state=0, final_states={1})


def _join(operation: Callable[[NFA, NFA], NFA], operands: list[NFA]) -> NFA:
    """Joins neighbors, then the results: joining copies both operands, so a long list must not grow one by one."""
    while len(operands) > 1:
        pairs = zip(operands[::2], operands[1::2], strict=False)
        operands = [operation(x, y) for x, y in pairs] + operands[len(operands) // 2 * 2 :]
    return operands[0]


def _complement(nfa: NFA, max_states: int) -> NFA:
    return NFA.from_dfa(_determinize(nfa, max_states).complement())


def _determinize(nfa: NFA, max_states: int) -> DFA:
    """The complete DFA by subset construction. Unlike the library's own, it has a limit on the states."""
    nfa = nfa.eliminate_lambda()
    start = frozenset([nfa.initial_state])
    numbers, paths, subsets = {start: 0}, {}, [start]
    for subset in subsets:  # the loop appends to it
        ways = [nfa.transitions[state] for state in subset if state in nfa.transitions]
        paths[numbers[subset]] = path = {}
        for symbol in nfa.input_symbols:
            target = frozenset().union(*(way[symbol] for way in ways if symbol in way))
            if target not in numbers:
                if len(numbers) == max_states:
                    raise Failure("states")
                numbers[target] = len(numbers)
                subsets.append(target)
            path[symbol] = numbers[target]
    final = {number for subset, number in numbers.items() if subset & nfa.final_states}
    return DFA(
        states=set(paths), input_symbols=nfa.input_symbols, transitions=paths, initial_state=0, final_states=final
    )
