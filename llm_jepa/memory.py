"""Command line: python -m llm_jepa.memory --help."""

import sys

from llm_jepa.large.memory import main

if __name__ == "__main__":
    sys.exit(main())
