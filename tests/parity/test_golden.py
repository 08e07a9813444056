"""Losses, gradients and texts against numbers computed with the reference implementation (tests/golden/README.md)."""

from __future__ import annotations

import json

import pytest
from conftest import GOLDEN, dry_run

CASES = json.loads((GOLDEN / "cases.json").read_text())
SCOPES = ("reference", "answer_text")


def name(case: dict) -> str:
    flags = "+".join(f"{k}={v}" for k, v in case["flags"].items()) or "default"
    mask = "additive" if case["additive_mask"] else "separate"
    return f"{case['model']}-{case['file'].split('_')[0]}-k{case['predictors']}-{flags}-{mask}"


@pytest.mark.parametrize("layout", ["separate", "additive", "packed"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_golden_case_through_every_layout(case, layout):
    scopes = [s for s in SCOPES if f"lm_labels={s}" in case]
    assert scopes
    for scope in scopes:
        flags = {"lbd": 1, "gamma": 1} | case["flags"]
        argv = [x for k, v in flags.items() for x in ([f"--{k}"] if v is True else [f"--{k}", v])]
        got = dry_run("--model_name", GOLDEN / "models" / case["model"], "--train_file", GOLDEN / case["file"],
                      "--dry_run", case["rows"], "--predictors", case["predictors"], "--last_token",
                      case["last_token"], "--lm_labels", scope, "--layout", layout, *argv)  # fmt: skip
        want = case[f"lm_labels={scope}"]
        assert got["jepa_loss"] == pytest.approx(case["jepa_loss"], rel=1e-4)
        assert got["lm_loss"] == pytest.approx(want["lm_loss"], rel=1e-4)
        assert got["total_loss"] == pytest.approx(want["total"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert got["label_tokens"] == want["label_tokens"]
        assert got["pairs"] == case["rows"]
        assert {k: got["first_row"][k] for k in case["first_row"]} == case["first_row"]
