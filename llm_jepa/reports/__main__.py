"""python -m llm_jepa.reports: the same as python -m llm_jepa.report."""

from llm_jepa.report import main

raise SystemExit(main())
