"""Environment variables that look like misspelled settings of a shell script.

python llm_jepa/variables.py SCRIPT NAME… is for setup.sh, before the packages are there: exit code 2 if there is one.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping


def misspelled(script: str, names: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that is not in `names` and differs little from one of them.

    Little is another case, a plural, the same letters in another order, or a similarity of at least 0.85: one letter
    more or less in four. Variables of other programs hardly ever come so close.
    """
    names, found = list(names), []
    for given in sorted(set(environment) - {*names, "MODE"}):  # MODE: a word that other programs do use
        word = given.upper()
        near = [n for n in names if sorted(n) == sorted(word) or f"{n}S" == word]
        near = near or difflib.get_close_matches(word, names, 1, 0.85)
        if near and environment[given]:
            hint = f"did you mean {near[0]}? If it belongs to another program: env -u {given} bash {script} …"
            found.append(f"{given} is not a variable of {script}; {hint}")
    return found


if __name__ == "__main__":
    lines = misspelled(sys.argv[1], sys.argv[2:], os.environ)
    for line in lines:
        print(f"{sys.argv[1]}: error: {line}", file=sys.stderr)
    sys.exit(2 if lines else 0)
