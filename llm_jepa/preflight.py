"""Command line: python -m llm_jepa.preflight --help."""

import os
import sys

from llm_jepa.large.preflight import main

if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints a C++ stack for each failed connection
    sys.exit(main())
