"""Helpers of finetune.py, finetune8bh200.py and evaluate.py. Importing the package loads neither torch nor models."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version

if "OMP_WAIT_POLICY" not in os.environ:
    # libgomp reads this when torch is imported: threads that wait spin for a moment and then sleep. By default they
    # spin so long that a step takes many times as long if another process needs a core. If they sleep at once
    # (OMP_WAIT_POLICY=PASSIVE), small models lose a fifth of their speed on two cores (benchmarks/README.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# On GPUs like the H100 torch prefers cuDNN's attention, which compiles itself for each new shape of a batch. Others
# lost 1 s in one step of six (github.com/modelscope/FunASR/issues/3704, a B200). Not measured with this project yet.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

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
