"""Helpers of finetune.py, finetune8bh200.py and evaluate.py. Importing the package loads neither torch nor models."""

import importlib.util
import sys

PACKAGES = ("torch", "transformers", "accelerate", "peft", "scipy", "pandas")
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]
if (MISSING or sys.version_info < (3, 11)) and sys.argv[0] != "-c":  # -c: the sandbox's child process, which needs none
    lacks = f"has no {', '.join(MISSING)}" if MISSING else "is older than 3.11"
    hint = "run `bash setup.sh` once, then `source .venv/bin/activate`"
    print(f"error: {sys.executable} {lacks}: {hint} in the project's folder", file=sys.stderr)
    raise SystemExit(2)
