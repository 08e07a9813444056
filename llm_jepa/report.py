"""Command line: python -m llm_jepa.report --help."""

import sys

from llm_jepa.reports.results import main

if __name__ == "__main__":
    sys.exit(main())
