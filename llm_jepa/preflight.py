"""Command line: python -m llm_jepa.preflight --help."""

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints a C++ stack for each connection it tries again

from llm_jepa.large.preflight import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
