"""Group results into arms and compare each dataset's arms with a reference arm, seed by seed.

Runs that differ in more than their seed are different arms. Two arms are compared if only the method differs
(METHOD_SETTINGS), or if the user allows the other differences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_jepa.cli import UsageError
from llm_jepa.reports.results import Result, method_name
from llm_jepa.reports.stats import Comparison, compare, conclude
from llm_jepa.settings import CHAT_FLAGS, JEPA_FLAGS, chosen_losses

METHOD_SETTINGS = {*JEPA_FLAGS, "regular", "layout", "additive_mask"}.union(*CHAT_FLAGS.values())
# In every arm's label: `method_name`.
NAMED = {f for name, flags in CHAT_FLAGS.items() for f in (flags[0], f"{name}_lbd")}
NAMED |= set("regular lbd predictors jepa_loss shuffle_pairs additive_mask".split())
UNKNOWN_CODE = {"git_commit": None, "git_dirty": True}  # without a checksum the code may have been another


@dataclass
class Table:
    """The arms of a dataset by label, the reference first, and their comparisons with the reference."""

    dataset: str
    arms: dict[str, list[Result]]
    reference: str | None = None  # None if there is only one arm
    comparisons: list[Comparison] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # arms that were not compared, and why
    allowed: dict[str, list[str]] = field(default_factory=dict)  # differences accepted by --allow, by arm
    placebos: list[Comparison] = field(default_factory=list)  # of arms with their placebo, primary score

    @property
    def first(self) -> Result:
        """A result of the first arm."""
        return self.runs[0][1]

    @property
    def runs(self) -> list[tuple[str, Result]]:
        """All results with the labels of their arms."""
        return [(label, result) for label, arm in self.arms.items() for result in arm]


def arms_by_dataset(results: list[Result]) -> dict[str, dict[str, list[Result]]]:
    """The arms of each dataset by label, in the order of their first results."""
    datasets: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        datasets.setdefault(result.dataset, {}).setdefault(result.arm(), []).append(result)
    return {dataset: label_arms(list(arms.values())) for dataset, arms in datasets.items()}


def label_arms(arms: list[list[Result]]) -> dict[str, list[Result]]:
    """The arms of a dataset by a short label: `method_name`, and other values that at most half of the arms have."""
    described, labels = [arm[0].settings for arm in arms], []
    for own in described:
        hidden, shown = NAMED | {"scores", *(JEPA_FLAGS if own["regular"] else ())}, [method_name(own)]
        for name, value in sorted(own.items()):
            same = sum(other.get(name, value) == value for other in described)
            if name in hidden or same > len(described) / 2 or value is None or value is False:
                continue
            text = " ".join(str(value).strip("[']").split())[: 8 if "data" in name else 40]
            shown.append(name if value is True else f"{name}={text}")
        labels.append(", ".join(shown))
    return {
        label if labels.count(label) == 1 else f"{label} ({arm[0].run.name})": arm
        for label, arm in zip(labels, arms, strict=True)
    }


def differences(reference: list[Result], arm: list[Result]) -> dict[str, str]:
    """What the results differ in apart from the method: name → both values and their runs.

    An unknown commit or one with uncommitted changes counts as a difference if no checksum tells what the code was.
    """
    first, found = reference[0], {}
    expected = first.settings | first.environment
    for result in [*reference, *arm]:
        own = result.settings | result.environment
        for name in expected | own:
            if name.startswith("pretraining.") and own["pretrained"] != expected["pretrained"]:
                continue  # `pretrained` already shows the difference
            value, other, last = own.get(name), expected.get(name), name.rsplit(".", 1)[-1]
            checksum = own.get(name.removesuffix(last) + "code_sha256")
            unknown = last in UNKNOWN_CODE and value == UNKNOWN_CODE[last] and checksum is None
            is_method = name.replace("pretraining.", "") in METHOD_SETTINGS
            is_method |= name == "steps" and bool(own.get("same_flop") or expected.get("same_flop"))
            if not is_method and (unknown or value != other):
                found.setdefault(name, f"{name} {other!r} in {first.run} and {value!r} in {result.run}")
    return found


def is_regular(settings: dict[str, Any]) -> bool:
    """Whether neither training nor pretraining had an auxiliary loss."""
    stages = [name.removesuffix("pretrained") for name in settings if name.endswith("pretrained")]
    return all(settings.get(f"{s}regular") and not chosen_losses(settings, s) for s in stages)


def find_reference(table: Table, against: str | None) -> str | None:
    """Label of the reference arm: the regular one, or the one that `against` selects by run folder or part of its name.

    None if there is only one arm. Raises UsageError if not exactly one arm matches.
    """
    if len(table.arms) == 1 and not against:
        return None
    if against:
        rule = f"--against {against} matches"
        runs = {label: [r.run for r in arm] for label, arm in table.arms.items()}
        same = Path(against).resolve()  # a folder wins over a part
        found = [label for label, folders in runs.items() if same in (folder.resolve() for folder in folders)]
        found = found or [a for a in runs if against in a or any(against in r.name for r in runs[a])]
    else:
        rule = "the reference is the regular arm, and there are"
        found = [label for label, arm in table.arms.items() if is_regular(arm[0].settings)]
    if len(found) != 1:
        raise UsageError(
            f"{table.dataset}: {rule} {len(found)} of its arms ({'; '.join(found or table.arms)}); "
            "select one with --against, by its run folder or a part of its name"
        )
    return found[0]


def compare_arm(table: Table, label: str, allow: set[str]) -> None:
    """Adds an arm's comparisons with the reference to the table, or why it is not compared."""
    theirs, ours = ({r.seed: r for r in table.arms[name]} for name in (table.reference, label))
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        table.refused[label] = f"no seed is in both {label} and {table.reference}"
        return
    found = differences([theirs[s] for s in seeds], [ours[s] for s in seeds])
    allowed = [name for name in found if any(f"{name}.".startswith(f"{a}.") for a in allow)]
    if len(found) > len(allowed):
        table.refused[label] = "; ".join(text for name, text in found.items() if name not in allowed)
        return
    if allowed:
        table.allowed[label] = [found[name] for name in allowed]
    for score in table.first.scores:
        if score in table.arms[label][0].scores:
            values = ({seed: r.columns[f"{score} %"] for seed, r in side.items()} for side in (ours, theirs))
            table.comparisons.append(compare(label, table.reference, score, *values))


def compare_placebos(table: Table) -> None:
    """Compares each arm with the one that differs only in --shuffle_pairs: descriptive, in no correction."""
    score, compared = table.first.scores[0], [item for item in table.arms.items() if item[0] not in table.refused]
    for (label, arm), (placebo, shuffled) in itertools.permutations(compared, 2):
        own, theirs = arm[0], shuffled[0]
        if own.model == theirs.model and own.settings | {"shuffle_pairs": True} == theirs.settings:
            values = [{r.seed: r.columns[f"{score} %"] for r in side} for side in (arm, shuffled)]
            if values[0].keys() & values[1].keys():
                table.placebos.append(compare(label, placebo, score, *values))
    conclude(table.placebos, "")


def compare_arms(results: list[Result], against: str | None, allow: set[str]) -> tuple[list[Table], list[str]]:
    """A table per dataset, and why arms are not compared or datasets have no table.

    Raises UsageError if no dataset has a table or if a name in `allow` is unknown.
    """
    known = {name for r in results for name in (*r.settings, *r.environment)}
    known |= {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    if allow - known:
        raise UsageError(f"--allow {' '.join(sorted(allow - known))}: these runs have no such setting")
    tables, problems = [], []
    for dataset, arms in arms_by_dataset(results).items():
        table = Table(dataset, arms)
        try:
            table.reference = find_reference(table, against)
        except UsageError as error:
            problems.append(str(error))
            continue
        if table.reference:
            table.arms = {table.reference: arms.pop(table.reference)} | arms
        for label in list(table.arms)[1:]:
            compare_arm(table, label, allow)
        conclude(table.comparisons, table.first.scores[0])
        compare_placebos(table)
        tables.append(table)
    if not tables:
        raise UsageError("\n".join(problems))
    problems += [f"{t.dataset}: {label} is not compared: {why}" for t in tables for label, why in t.refused.items()]
    return tables, problems
