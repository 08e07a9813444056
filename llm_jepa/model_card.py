"""Command line: python -m llm_jepa.model_card --help."""

import sys

from llm_jepa.reports.model_card import main

if __name__ == "__main__":
    sys.exit(main())
