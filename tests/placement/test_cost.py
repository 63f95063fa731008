"""Predicted speed: arithmetic on given rates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid.config import model_path
from hybrid.gguf import GGUFFile
from hybrid.placement import cost
from hybrid.placement.machine import Device, Machine, Rates
from hybrid.placement.memory import RunSize, read_model
from hybrid.placement.planner import plan

FORMATS = ("F32", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def demo():
    with GGUFFile.open(model_path(None)) as file:
        yield file


def rates(weight_s: float) -> Rates:
    return Rates(
        read_bandwidth=20e9,
        call_s=0.0,
        attention_macs=1e15,
        weight_s={name: {1: weight_s, 16: 2 * weight_s, 128: 9 * weight_s} for name in FORMATS},
        num_threads=1,
    )


def test_decoding_takes_the_active_weights_at_the_measured_rate(demo):
    model = read_model(demo)
    active = sum(t.info.n_elements * t.share for t in model.tensors if t.role != "embedding")
    found = plan(demo, machine=Machine(rates=rates(1e-10)), size=RunSize(512)).prediction
    assert found is not None and found.measured
    assert found.decode_tps == pytest.approx(1 / (active * 1e-10), rel=1e-3)


def test_a_prompt_takes_each_expert_with_its_share_of_the_tokens(demo):
    model, machine, size = read_model(demo), Machine(rates=rates(1e-10)), RunSize(512)
    placed = plan(demo, machine=machine, size=size).placements
    seconds = cost.step_seconds(model, placed, machine, size, 128, 0)
    expected = 0.0
    for tensor in model.tensors:
        weights = tensor.info.n_elements
        if tensor.role == "routed_experts":  # 16 experts, 4 for a token: 32 tokens each
            expected += weights * (2 + 7 * (32 - 16) / (128 - 16)) * 1e-10
        elif tensor.role == "output":
            expected += weights * 1e-10
        elif tensor.role != "embedding":
            expected += weights * 9e-10
    assert seconds == pytest.approx(expected, rel=1e-3)


def test_without_rates_bandwidth_decides_and_formats_are_alike(demo):
    machine = Machine((Device("cpu", None, 40e9),), num_threads=64, isa="avx512vnni")
    found = plan(demo, machine=machine, size=RunSize(2)).prediction
    assert found is not None and not found.measured
    twice = replace(machine, devices=(Device("cpu", None, 80e9),))
    faster = plan(demo, machine=twice, size=RunSize(2)).prediction
    calls = 4 * cost.CALLS_PER_LAYER * cost.CALL_S
    assert 1 / faster.decode_tps - calls == pytest.approx((1 / found.decode_tps - calls) / 2, rel=0.01)


@pytest.mark.parametrize(
    "num_nodes, numa, expected", [(1, False, 30e9), (2, True, 60e9), (2, False, 30e9), (4, True, 120e9)]
)
def test_nodes_add_up_where_each_reads_its_own(num_nodes, numa, expected):
    machine = Machine((Device("cpu", None, 30e9),), num_nodes, numa=numa)
    assert cost.ram_bandwidth(machine) == expected


@pytest.mark.parametrize(
    "tokens, seconds", [(0.3, 1.0), (1, 1.0), (8.5, 1.5), (16, 2.0), (72, 5.5), (128, 9.0), (240, 16.0)]
)
def test_interpolation(tokens, seconds):
    assert cost.interpolate({1: 1.0, 16: 2.0, 128: 9.0}, tokens) == pytest.approx(seconds)
