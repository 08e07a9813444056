"""Times execution match on a file of gold queries: lines of query, tab and db_id, each query scored against itself.

    python benchmarks/bench_scoring.py --spider_path spider_data --gold spider_data/dev_gold.sql --json scoring.json

Each query runs twice, once as the gold query and once as a prediction with another text, so that no result is cached.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from timing import ROOT, flag_parser, interleave, percentiles, report

from llm_jepa.data.examples import Example, ExampleError
from llm_jepa.scoring.sql import execution_match, spider_databases


def score_all(databases: Path, lines: list[str]) -> int:
    """The number of queries that match themselves; a comment makes the prediction another text."""
    equal = 0
    with execution_match(databases) as match:
        for number, line in enumerate(lines, start=1):
            query, db_id = line.split("\t")
            example = Example(None, f"For db_id:[{db_id}]\n\nWhich?", query, f"line {number}", number)
            try:
                equal += bool(match(query + " --", example)["execution"])
            except ExampleError:  # a missing database
                continue
    return equal


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = flag_parser(__doc__)
    parser.add_argument("--spider_path", type=Path, default=ROOT / "spider_data.zip", help="folder or zip of Spider")
    parser.add_argument("--gold", type=Path, required=True, help="file of gold queries")
    parser.add_argument("--repeats", type=int, default=5, help="how often each arm is timed (default 5)")
    args = parser.parse_args()
    databases = spider_databases(args.spider_path, ROOT / "datasets" / "spider_databases")
    lines = args.gold.read_text(encoding="utf-8").splitlines()
    score = partial(score_all, databases, lines)
    seconds = interleave({"execution match": score}, args.repeats)["execution match"]
    report(args, args.gold, [{"queries": len(lines), "equal": score(), **percentiles(seconds)}])


if __name__ == "__main__":
    main()
