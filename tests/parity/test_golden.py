"""Losses, gradients and texts against numbers computed with the reference implementation (tests/golden/README.md)."""

import json

import pytest
from conftest import GOLDEN, dry_run

CASES = json.loads((GOLDEN / "cases.json").read_text())


def name(case: dict) -> str:
    flags = "+".join(f"{k}={v}" for k, v in case["flags"].items()) or "default"
    mask = "additive" if case["additive_mask"] else "separate"
    return f"{case['model']}-{case['file'].split('_')[0]}-k{case['predictors']}-{flags}-{mask}"


@pytest.mark.parametrize("layout", ["separate", "additive", "packed"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_dry_run_gives_the_reference_numbers_in_every_layout(case, layout):
    scopes = [scope for scope in ("reference", "answer_text") if f"lm_labels={scope}" in case]
    assert scopes
    for scope in scopes:
        flags = {"lbd": 1, "gamma": 1} | case["flags"]
        argv = [x for k, v in flags.items() for x in ([f"--{k}"] if v is True else [f"--{k}", v])]
        got = dry_run("--model_name", GOLDEN / "models" / case["model"], "--train_file", GOLDEN / case["file"],
                      "--dry_run", case["rows"], "--predictors", case["predictors"], "--last_token",
                      case["last_token"], "--lm_labels", scope, "--layout", layout, *argv)  # fmt: skip
        want = case[f"lm_labels={scope}"]
        assert got["jepa_loss"] == pytest.approx(case["jepa_loss"], rel=1e-4)
        for key, stored in (("lm_loss", "lm_loss"), ("total_loss", "total"), ("grad_norm", "grad_norm")):
            assert got[key] == pytest.approx(want[stored], rel=1e-4)
        assert (got["label_tokens"], got["pairs"]) == (want["label_tokens"], case["rows"])
        assert {k: got["first_row"][k] for k in case["first_row"]} == case["first_row"]
