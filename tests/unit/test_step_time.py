"""benchmarks/step_time.py: the formulas by hand."""

import importlib
from collections.abc import Callable

import pytest
from conftest import MODEL, ROOT, call

from llm_jepa.large import memory
from llm_jepa.large.settings import LargeSettings

SHAPE = {"parameters": 8e9, "in_layers": 7e9, "in_head": 5e8, "layers": 32, "size": 4096, "labels": 0.5}


@pytest.fixture
def step_time(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("step_time").step_time


def test_parts_of_the_step_time_by_hand(step_time):
    one = step_time(1, **SHAPE, tokens=1000, pairs=0)
    assert one["step"] == one["compute"] == pytest.approx(8 * 7.25e12 / (0.5 * 989.4e12))
    assert one["network"] == one["negatives"] == 0
    two_nodes = step_time(16, **SHAPE, tokens=1000, pairs=3, ports=2)
    assert two_nodes["reduce-scatter"] == pytest.approx(32e9 * 15 / 16 / 80e9) == two_nodes["all-gather"]
    assert two_nodes["latency"] == pytest.approx(96 * 1e-5)
    assert two_nodes["negatives"] == pytest.approx(16 * 3 * 4096 * 15 / 80e9, rel=0.01)


def test_network_limits_small_micro_batches_only(step_time):
    few, many = (step_time(64, **SHAPE, tokens=n, pairs=0, ports=1) for n in (4096, 32768))
    assert few["step"] == few["network"] == many["network"] and many["step"] == many["compute"] > many["network"]
    assert many["tokens/s"] == pytest.approx(64 * 32768 / many["step"])


def test_command_prints_the_step_time_for_each_number_of_gpus(step_time):
    done = call("step_time", "--model_name", MODEL, "--gpus", "8,64")
    assert done.code == 0 and [line.split()[0] for line in done.out.splitlines()[-2:]] == ["8", "64"]
    tokens = memory.plan(LargeSettings(model_name=MODEL), [1])["tokens"]
    assert f"{tokens} tokens" in done.out
    assert call("step_time", "--gpus", "8,x").code == 2


def test_step_time_of_an_adapter_is_refused(step_time):
    done = call("step_time", "--model_name", MODEL, "--lora")
    assert done.code == 2 and "--lora" in done.err
