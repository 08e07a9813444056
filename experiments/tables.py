"""Print the tables of RESULTS.md that experiments/results/ contains, with the tests of experiments/plans/.

    python experiments/tables.py nitp combine terms jobs datasets smollm

Scores are in percent, differences in points with a 95 % t interval; p is two-sided and paired by seed, with Holm's
correction over the comparisons of a family. An experiment without all of its runs is refused.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import scipy.stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the repository's own modules

from llm_jepa.cli import UsageError, run_command  # noqa: E402
from llm_jepa.files import read_jsonl  # noqa: E402
from llm_jepa.reports import stats  # noqa: E402
from llm_jepa.scoring.tasks import TASKS  # noqa: E402

Lines = dict[tuple[str, int], dict[int, dict]]  # (arm, examples) → seed → the run's line


def load(experiment: str, same_seeds: bool = True, data: str | None = None) -> Lines:
    """The lines of an experiment, or of its dataset `data`.

    Raises UsageError if the arms have different seeds, unless `same_seeds` is False.
    """
    lines: Lines = {}
    for _, line in read_jsonl(ROOT / f"experiments/results/{experiment}.jsonl"):
        if data in (None, line.get("data")):
            lines.setdefault((line["arm"], line["examples"]), {})[line["seed"]] = line
    if same_seeds and len({frozenset(by_seed) for by_seed in lines.values()}) > 1:
        raise UsageError(f"the arms of {experiment} have different seeds, so runs are missing")
    return lines


def scores(by_seed: dict[int, dict], score: str = "") -> dict[int, float]:
    """A score of each seed, by default the primary score of the runs' data, in percent."""
    return {seed: 100 * line[score or TASKS[line.get("data", "synth")].primary] for seed, line in by_seed.items()}


def family(lines: Lines, pairs: list[tuple[tuple[str, int], tuple[str, int]]]) -> list[stats.Comparison]:
    """The comparisons of the primary score of each pair (arm, reference), corrected together."""
    comparisons = [stats.compare(a[0], b[0], "", scores(lines[a]), scores(lines[b])) for a, b in pairs]
    for comparison, p in zip(comparisons, stats.holm([c.p_two_sided for c in comparisons]), strict=True):
        comparison.p_holm = p
    return comparisons


def difference(c: stats.Comparison) -> str:
    """Cells: difference with interval, corrected p, smallest detectable difference of a single test."""
    return f"{points(c)} | {stats.format_p(c.p_holm)} | {stats.detectable(c.sd, c.n):.1f}"


def points(c: stats.Comparison) -> str:
    """A difference and its interval."""
    return f"{stats.format_points(c.mean)} {stats.format_interval(c)}"


def table(head: str, rows: list[str]) -> None:
    """Prints a Markdown table."""
    print("", f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {row} |" for row in rows), sep="\n")


def nitp() -> None:
    """NITP at four sizes, and its controls."""
    lines = load("nitp")
    sizes = [500, 1000, 2000, 8000]
    found = family(lines, [(("nitp", n), ("regular", n)) for n in sizes])
    rows = []
    for n, c in zip(sizes, found, strict=True):
        both = " | ".join(stats.mean_sd(list(scores(lines[arm, n]).values())) for arm in ("regular", "nitp"))
        exact = stats.compare("", "", "", scores(lines["nitp", n], "exact"), scores(lines["regular", n], "exact"))
        rows.append(
            f"{n} | {both} | {difference(c)} | {stats.format_points(exact.mean)} {stats.format_interval(exact)}"
        )
    table("examples | regular | NITP | difference | p | MDD | exact match", rows)
    controls = [(arm, 1000) for arm in ("all_labels", "random", "shuffled", "longer")]
    below = family(lines, [(("nitp", 1000), control) for control in controls])
    above = family(lines, [(control, ("regular", 1000)) for control in controls])
    rows = [
        f"{arm} | {stats.mean_sd(list(scores(lines[arm, n]).values()))} | {difference(b)} | {difference(a)}"
        for (arm, n), b, a in zip(controls, below, above, strict=True)
    ]
    table("control | dfa_equal | NITP − control | p | MDD | control − regular | p | MDD", rows)


def combine() -> None:
    """clip + NITP, and STP."""
    lines = load("combine") | {key: value for key, value in load("nitp").items() if key[1] == 1000}
    pairs = [("clip:0.1", "regular"), ("clip_nitp", "regular"), ("stp", "regular"), ("clip_nitp", "nitp")]
    found = family(lines, [((a, 1000), (b, 1000)) for a, b in pairs])
    rows = [f"{arm} | {row(lines[arm, 1000])} | | | |" for arm in ("regular", "nitp")]
    rows += [f"{c.arm} | {row(lines[c.arm, 1000])} | {c.reference} | {difference(c)}" for c in found]
    table("arm | dfa_equal | exact | text to code R@1 | minus | difference | p | MDD", rows)


def row(by_seed: dict[int, dict]) -> str:
    """Cells: primary score, exact match, retrieval@1 from Text to Code."""
    shown = [stats.mean_sd(list(scores(by_seed, score).values())) for score in ("", "exact")]
    return " | ".join([*shown, stats.mean_sd(retrieval(by_seed))])


def retrieval(by_seed: dict[int, dict]) -> list[float]:
    """Retrieval@1 from Text to Code of each seed, in percent."""
    return [100 * line["retrieval"]["text_to_code"]["r1"] for line in by_seed.values()]


def terms() -> None:
    """Losses of pairs: what they learn, what they cost, and the geometry of the views."""
    lines = load("terms")
    regular = ("regular", 1000)
    others = [key for key in lines if key != regular]
    found = dict(zip(others, family(lines, [(key, regular) for key in others]), strict=True))
    rows = []
    for key, by_seed in sorted(lines.items(), key=lambda item: -least_retrieval(item[1])):
        cosines = [statistics.fmean(line["retrieval"][name] for line in by_seed.values()) for name in COSINES]
        verdicts = [line["learned"].get("jepa", {}).get("collapsed") for line in by_seed.values()]
        learned = "" if None in verdicts else f"{verdicts.count(False)} of {len(verdicts)}"
        cells = [key[0], row(by_seed), *(f"{c:.4f}" for c in cosines), learned]
        rows.append(" | ".join([*cells, difference(found[key]) if key in found else " | | "]))
    head = "arm | dfa_equal | exact | text to code R@1 | cosine, true | shuffled | runs that learned"
    table(head + " | difference | p | MDD", rows)
    print("\nLeast retrieval@1 of the runs of an arm:")
    print(", ".join(f"{arm} {least_retrieval(by_seed):.4f}" for (arm, _), by_seed in lines.items()))
    rows = []
    for (arm, _), by_seed in lines.items():
        if all("geometry" in line for line in by_seed.values()):
            values = [statistics.fmean(line["geometry"][name] for line in by_seed.values()) for name in GEOMETRY]
            rows.append(" | ".join([arm, *(f"{value:.3g}" for value in values)]))
    table("arm | " + " | ".join(GEOMETRY), rows)


def jobs() -> None:
    """Generation equivalent to regular fine-tuning (two one-sided tests), and retrieval compared with MNRL."""
    lines = load("jobs", same_seeds=False) | load("mnrl", same_seeds=False)
    both, contrast, mnrl = (lines.get((arm, 8000), {}) for arm in ("both:0.05:0:0.1", "contrast:1:0:0.1", "mnrl"))
    if [len(both), len(contrast), len(mnrl)] != [10, 5, 5]:
        raise UsageError("runs of jobs or mnrl are missing")
    regular = load("nitp")["regular", 8000]
    rows = [
        f"{name} | {row(by_seed)}" for name, by_seed in (("regular", regular), ("both", both), ("contrast", contrast))
    ]
    rows.append(f"all-MiniLM-L6-v2, MNRL | | | {stats.mean_sd(retrieval(mnrl))}")
    table("arm | dfa_equal | exact | text to code R@1", rows)
    c = stats.compare("both", "regular", "dfa_equal", scores(both), scores(regular))
    half = scipy.stats.t.ppf(0.95, c.n - 1) * c.sd / c.n**0.5
    print(f"\nboth − regular: {points(c)}, 90 % interval [{c.mean - half:.2f}, {c.mean + half:.2f}], n = {c.n}")
    test = scipy.stats.ttest_ind(retrieval(both), retrieval(mnrl), equal_var=False)
    mean = statistics.fmean(retrieval(both)) - statistics.fmean(retrieval(mnrl))
    low, high = test.confidence_interval()
    print(f"R@1, both − MNRL: {mean:.2f} [{low:.2f}, {high:.2f}], p = {test.pvalue:.2g}")


def datasets() -> None:
    """NITP on other datasets."""
    lines = load("datasets")
    if {len(by_seed) for by_seed in lines.values()} != {10}:
        raise UsageError("runs of datasets are missing")
    sizes = sorted({examples for _, examples in lines}, reverse=True)
    found = family(lines, [(("nitp", n), ("regular", n)) for n in sizes])
    rows = []
    for n, c in zip(sizes, found, strict=True):
        data, learned = next(iter(lines["regular", n].values()))["data"], (lines[arm, n] for arm in ("regular", "nitp"))
        cells = [stats.mean_sd(list(scores(by_seed).values())) for by_seed in learned]
        rows.append(" | ".join([f"{data}, {TASKS[data].primary}", *cells, difference(c)]))
    table("score | regular | NITP | difference | p | MDD", rows)


def smollm() -> None:
    """Auxiliary losses with a pretrained model, a table per dataset."""
    for data in dict.fromkeys(line["data"] for _, line in read_jsonl(ROOT / "experiments/results/smollm.jsonl")):
        lines = load("smollm", data=data)
        if {len(by_seed) for by_seed in lines.values()} != {5}:
            raise UsageError(f"runs of smollm on {data} are missing")
        regular = next(key for key in lines if key[0] == "regular")
        found = family(lines, [(key, regular) for key in lines if key != regular])
        cells = {c.arm: difference(c) for c in found}
        rows = []
        for (arm, _), by_seed in lines.items():
            rate = next(iter(by_seed.values()))["learning_rate"]
            rows.append(f"{arm} | {rate:g} | {row(by_seed)} | {cells.get(arm, ' | | ')}")
        table(f"{data}, arm | learning rate | {TASKS[data].primary} | exact | R@1 | minus regular | p | MDD", rows)


COSINES = ("cosine", "cosine_shuffled")
GEOMETRY = ("least_squares_error", "least_squares_relative", "least_squares_relative_shuffled", "singular_value_mean",
            "singular_value_relative", "singular_value_relative_shuffled")  # fmt: skip


def least_retrieval(by_seed: dict[int, dict]) -> float:
    """The smallest retrieval@1 from Text to Code of the arm's runs."""
    return min(line["retrieval"]["text_to_code"]["r1"] for line in by_seed.values())


EXPERIMENTS = {"nitp": nitp, "combine": combine, "terms": terms, "jobs": jobs, "datasets": datasets, "smollm": smollm}


def work(argv: list[str] | None) -> None:
    """Parses the flags and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    for experiment in parser.parse_args(argv).experiments:
        EXPERIMENTS[experiment]()


if __name__ == "__main__":
    sys.exit(run_command("tables.py", lambda: work(None)))
