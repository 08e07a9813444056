"""Helpers of finetune.py, finetune8bh200.py and evaluate.py. Importing the package loads neither torch nor models."""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    for name in ("torch", "transformers", "accelerate", "peft", "datasets", "scipy", "pandas"):
        version(name)
    LACKS = "is older than 3.11" if sys.version_info < (3, 11) else None
except PackageNotFoundError:
    LACKS = f"has no {name}"
if LACKS and sys.argv[0] != "-c":  # -c: the sandbox's child process, which needs none of them
    hint = "run `bash setup.sh` once in the project's folder, then `source .venv/bin/activate`"
    print(f"error: {sys.executable} {LACKS}: {hint}", file=sys.stderr)
    raise SystemExit(2)
