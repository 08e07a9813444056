"""Command line: python -m llm_jepa.reports is python -m llm_jepa.report."""

import sys

from llm_jepa.report import main

if __name__ == "__main__":
    sys.exit(main())
