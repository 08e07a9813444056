"""benchmarks/check.py names the measures that are worse than their baselines."""

import subprocess
import sys
from pathlib import Path

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
