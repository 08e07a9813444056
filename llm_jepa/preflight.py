"""Command line: python -m llm_jepa.preflight --help."""

import sys

from llm_jepa.large.preflight import main

if __name__ == "__main__":
    sys.exit(main())
