"""The calculated step time: by hand, and what limits it."""

from __future__ import annotations

import pytest
from conftest import GOLDEN, call

from llm_jepa.large.step_time import step_time

SHAPE = {"parameters": 8e9, "in_layers": 7e9, "in_head": 5e8, "layers": 32, "size": 4096, "labels": 0.5}


def test_parts_by_hand():
    one = step_time(1, **SHAPE, tokens=1000, pairs=0)
    assert one["step"] == one["compute"] == pytest.approx(8 * 7.25e12 / (0.5 * 989.4e12))
    assert one["network"] == one["negatives"] == 0
    two_nodes = step_time(16, **SHAPE, tokens=1000, pairs=3, ports=2)
    assert two_nodes["reduce-scatter"] == pytest.approx(32e9 * 15 / 16 / 80e9) == two_nodes["all-gather"]
    assert two_nodes["latency"] == pytest.approx(96 * 1e-5)
    assert two_nodes["negatives"] == pytest.approx(16 * 3 * 4096 * 15 / 80e9, rel=0.01)


def test_network_limits_small_micro_batches_only():
    few, many = (step_time(64, **SHAPE, tokens=n, pairs=0, ports=1) for n in (4096, 32768))
    assert few["step"] == few["network"] == many["network"] and many["step"] == many["compute"] > many["network"]
    assert many["tokens/s"] == pytest.approx(64 * 32768 / many["step"])


def test_command_prints_a_row_per_number_of_gpus():
    done = call("llm_jepa.large.step_time", "--model_name", GOLDEN / "models" / "llama3", "--gpus", "8,64")
    assert done.code == 0 and [line.split()[0] for line in done.out.splitlines()[-2:]] == ["8", "64"]
    assert call("llm_jepa.large.step_time", "--gpus", "8,x").code == 2
