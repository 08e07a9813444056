"""Command line: python -m llm_jepa.sweep --help."""

import sys

from llm_jepa.reports.sweep import main

if __name__ == "__main__":
    sys.exit(main())
