"""Finds misspelled environment variables. setup.sh runs this file before it installs packages: SCRIPT NAME…"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping


def misspelled(script: str, names: Iterable[str], environment: Mapping[str, str]) -> str:
    """A line for each variable that is not in `names` and differs in case, a plural, the order or a few letters."""
    names, lines = list(names), []
    for given in sorted({name for name in environment if environment[name]} - {*names, "MODE"}):  # MODE: of others
        word = given.upper()
        near = [n for n in names if sorted(n) == sorted(word) or f"{n}S" == word]
        if near := near or difflib.get_close_matches(word, names, 1, 0.85):  # one letter more or less in four
            hint = f"did you mean {near[0]}? If it belongs to another program: env -u {given} bash {script} …"
            lines.append(f"{given} is not a variable of {script}; {hint}")
    return "\n".join(lines)


if __name__ == "__main__" and (found := misspelled(sys.argv[1], sys.argv[2:], os.environ)):
    print(found.replace("\n", "; "), file=sys.stderr)
    sys.exit(2)
