"""Write the model card of a run, RUN/README.md, and optionally upload the run.

python -m llm_jepa.model_card runs/RUN                                       the card: training, settings, scores
python -m llm_jepa.model_card runs/RUN --push_to_hub OWNER/NAME --private    also upload the model with its figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llm_jepa.cli import UsageError, run_command
from llm_jepa.reports import hub
from llm_jepa.reports.model_card import write_card


def work(argv: list[str] | None) -> None:
    """Parses the flags, writes the card, uploads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that model_card.py did not write")
    parser.add_argument("--license", metavar="ID", help="license of the model, as the hub spells it (apache-2.0 …)")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="also upload the run to this model repository")
    parser.add_argument("--private", action="store_true", help="--push_to_hub: the repository must be private")
    options = parser.parse_args(argv)
    run, repo = options.run, options.push_to_hub
    if options.private and not repo:
        raise UsageError("--private: only with --push_to_hub")
    if repo and run.is_dir():  # else write_card reports it
        hub.check(run, repo)
    print(write_card(run, options.overwrite, options.license, repo))
    if repo:
        print(hub.push(run, repo, options.private))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 written, 1 the upload failed, 2 wrong usage or run."""
    return run_command("model_card.py", lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
