"""benchmarks/check.py names the measures that are worse than their baselines."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from llm_jepa.files import read_json, write_json

MEASURES = {  # name → (better, baseline, now, whether it fails); the tolerance is 0.1
    "faster": ("higher", 2.0, 3.0, False),
    "within": ("higher", 2.0, 1.85, False),
    "slower": ("higher", 2.0, 1.75, True),
    "larger-within": ("lower", 1.0, 1.05, False),
    "larger": ("lower", 1.0, 1.15, True),
    "new": ("lower", None, 9.0, False),
    "skipped": ("higher", 2.0, None, False),
    "failed": ("higher", 2.0, None, True),
}


def test_check_fails_only_for_measures_out_of_their_tolerance(tmp_path: Path) -> None:
    fixed = {"table": "synth", "column": "p50", "arm": "packed", "goal": None, "tolerance": 0.1}
    write_json(tmp_path / "base.json", {n: fixed | {"better": b, "value": v} for n, (b, v, _, _) in MEASURES.items()})
    rows = [{"measure": n, "now": now, "verdict": f"{n}: why"} for n, (_, _, now, _) in MEASURES.items()]
    write_json(tmp_path / "now.json", {"results": rows})

    def check(*only: str) -> int:
        flags = ["--baselines", "base.json", "--results", "now.json", "--json", "out.json", "--only", *only]
        command = [sys.executable, str(ROOT / "benchmarks" / "check.py"), *flags]
        return subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode

    assert check(*MEASURES) == 1
    verdicts = {row["measure"]: row["verdict"] for row in read_json(tmp_path / "out.json")["results"]}
    bad = [n for n, said in verdicts.items() if said.startswith(("worse", "failed"))]
    assert bad == [n for n, (*_, fails) in MEASURES.items() if fails]
    assert check(*(n for n, (*_, fails) in MEASURES.items() if not fails)) == 0


def test_a_failed_arm_fails_its_measures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench_step = importlib.import_module("bench_step")
    spec = importlib.util.spec_from_file_location("benchmark_check", ROOT / "benchmarks" / "check.py")
    check = importlib.util.module_from_spec(spec)  # datasets/ has a module of that name too
    spec.loader.exec_module(check)
    monkeypatch.setitem(bench_step.ARMS, "regular packed", {"torch_compile": True, "track_flop": True})  # is refused
    flags = "bench_step.py --steps 1 --batch_size 2 --repeats 1 --skip_memory --json step.json --arms".split()
    monkeypatch.setattr(sys, "argv", [*flags, "regular packed", "packed"])
    monkeypatch.chdir(tmp_path)
    assert bench_step.main() == 1 and [file.name for file in tmp_path.iterdir()] == ["step.json"]
    rows = {row["arm"]: row for row in read_json(tmp_path / "step.json")["results"]}
    values = [check.value({"arm": arm, "column": "time/tokens"}, rows) for arm in ("regular packed", "packed")]
    assert all(value.startswith("failed") for value in values)
    assert check.value({"arm": "packed", "column": "p50"}, rows) > 0
