"""Rule files that come with the package, planned for headers of the shapes they are for."""

from __future__ import annotations

import re
import time
from importlib import resources

import pytest

from hybrid.errors import PlacementError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.placement.machine import GIB, Device, Machine
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import Planner
from hybrid.placement.rules import load_rules, shipped_names, shipped_text
from hybrid.placement.sections import EXPERT_CACHE
from hybrid.synth import Formats, resolve_shape, synthesise

SHIPPED = shipped_names()


def formats(*names: str) -> Formats:
    return Formats(*(GGMLType[name] for name in names))


# Experts' gate and up, down, dense blocks, attention, embedding, output.
MIXES = {
    "deepseek-v3": {
        "Q2_K": formats("Q2_K", "Q3_K", "Q4_K", "Q8_0", "Q4_K", "Q6_K"),
        "Q4_K_M": formats("Q4_K", "Q6_K", "Q6_K", "Q8_0", "Q4_K", "Q6_K"),
    },
    "deepseek-v2-lite": {"Q4_K_M": formats("Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q4_K", "Q6_K")},
}
# Name -> shape, mix, NUMA nodes, and GiB of weights expected on each GPU.
PLANS = {
    "default": ("deepseek-v3", "Q4_K_M", 1, {}),
    "all-cpu": ("deepseek-v3", "Q4_K_M", 1, {}),
    "deepseek-v3-24gb": ("deepseek-v3", "Q2_K", 1, {"cuda:0": (18, 21)}),
    "deepseek-v3-48gb": ("deepseek-v3", "Q4_K_M", 1, {"cuda:0": (35, 42)}),
    "deepseek-v3-16gb": ("deepseek-v3", "Q4_K_M", 1, {"cuda:0": (12, 13.5)}),
    "deepseek-v3-64k": ("deepseek-v3", "Q4_K_M", 1, {"cuda:0": (19, 20.5)}),
    "deepseek-v3-2x24gb": ("deepseek-v3", "Q4_K_M", 1, {"cuda:0": (14, 20), "cuda:1": (14, 20)}),
    "deepseek-v2-lite": ("deepseek-v2-lite", "Q4_K_M", 1, {"cuda:0": (4.5, 6)}),
    "dual-socket-replicate": ("deepseek-v3", "Q2_K", 2, {}),
    "dual-socket-shard": ("deepseek-v3", "Q4_K_M", 2, {}),
    "hot-experts": ("deepseek-v3", "Q4_K_M", 1, {"cuda:0": (14.5, 16)}),
}


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for shape, mixes in MIXES.items():
        for name, mix in mixes.items():
            synthesise(folder / f"{shape}-{name}.gguf", resolve_shape(shape), mix, header_only=True)
    return folder


def planned(headers, name):
    shape, mix, nodes, _ = PLANS[name]
    machine = Machine((Device("cpu", 768 * GIB),), nodes, num_threads=64)
    with GGUFFile.open(headers / f"{shape}-{mix}.gguf", header_only=True) as file:
        planner = Planner(file, name, machine)
        tokens = planner.rule_set.kv_cache.max_tokens or 4096
        size = RunSize(tokens, kv_format=planner.rule_set.kv_cache.format or "f16")
        return planner.model, planner.plan(size)


def test_every_shipped_file_is_planned_here():
    assert set(PLANS) | {"deepseek-v3"} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_rules_load_by_name_and_say_what_they_do(name):
    rules = load_rules(name)
    assert rules.source == f"{name}.yaml"
    assert re.match(r"# [A-Z][^\n]{20,108}\.\n", shipped_text(name))


@pytest.mark.parametrize("name", PLANS)
def test_they_fit_what_they_are_for(headers, name):
    model, found = planned(headers, name)
    expected = PLANS[name][3]
    assert {device for device in found.memory if device != "cpu"} == set(expected)
    for device, (low, high) in expected.items():
        memory = found.memory[device]
        assert low * GIB < memory.weights_bytes < high * GIB, memory.weights_bytes / GIB
        assert memory.total_bytes <= memory.budget_bytes
        assert memory.kv_cache_bytes and found.memory["cpu"].kv_cache_bytes == 0
    on = {name: placement.device for name, placement in found.placements.items()}
    if expected:
        assert on["token_embd.weight"] == "cpu" and on["output.weight"] in expected
        assert all(on[t.name] in expected for t in model.tensors if t.role in ("attention", "shared_experts"))


def test_a_base_needs_a_gpu(headers):
    with GGUFFile.open(headers / "deepseek-v3-Q4_K_M.gguf", header_only=True) as file:
        with pytest.raises(PlacementError, match=r"deepseek-v3\.yaml:9:21: device: there is no cuda:0"):
            Planner(file, "deepseek-v3", Machine())
        found = Planner(file, "deepseek-v3", Machine().with_budget("cuda:0", 32 * GIB)).plan(RunSize(4096))
        assert found.memory["cuda:0"].total_bytes > 30 * GIB


def test_no_rule_is_auto(headers):
    with GGUFFile.open(headers / "deepseek-v2-lite-Q4_K_M.gguf", header_only=True) as file:
        machine = Machine().with_budget("cuda:0", 6 * GIB)
        plans = [Planner(file, rules, machine).plan(RunSize(4096)) for rules in ("default", "auto")]
    assert plans[0].digest() == plans[1].digest() and plans[0].devices == ["cpu", "cuda:0"]


def test_smaller_formats_make_room_for_a_long_context(headers):
    _, found = planned(headers, "deepseek-v3-64k")
    assert found.size.max_model_len == 65536
    assert found.memory["cuda:0"].kv_cache_bytes == 61 * 65536 * 612
    assert found.placements["blk.7.attn_output.weight"].format == "Q6_K"
    assert found.placements["blk.7.attn_k_b.weight"].format is None
    assert found.placements["blk.60.ffn_up_exps.weight"].device == "cuda:0"


def test_the_cache_of_hot_experts_takes_the_rest(headers):
    _, found = planned(headers, "hot-experts")
    gpu = found.memory["cuda:0"]
    assert gpu.scratch_parts[EXPERT_CACHE] > 3 * GIB
    assert gpu.budget_bytes - gpu.total_bytes < 64 << 20


@pytest.mark.parametrize("mode, copies", [("replicate", 2), ("shard", 1)])
def test_two_sockets(headers, mode, copies):
    model, found = planned(headers, f"dual-socket-{mode}")
    experts = [found.placements[t.name] for t in model.tensors if t.role == "routed_experts"]
    assert {placement.numa for placement in experts} == {mode}
    one_copy = sum(t.bytes_on("cpu") for t in model.tensors if t.role == "routed_experts")
    assert sum(placement.n_bytes for placement in experts) == copies * one_copy


def test_two_gpus_share_the_layers(headers):
    _, found = planned(headers, "deepseek-v3-2x24gb")
    assert found.placements["blk.30.attn_output.weight"].device == "cuda:0"
    assert found.placements["blk.31.attn_output.weight"].device == "cuda:1"
    caches = [found.memory[gpu].kv_cache_bytes for gpu in ("cuda:0", "cuda:1")]
    assert caches == [31 * 65536 * 1152, 30 * 65536 * 1152]


@pytest.mark.parametrize("name", ["deepseek-v3-24gb", "hot-experts", "deepseek-v3-16gb"])
def test_planning_takes_less_than_a_second(headers, name):
    begin = time.process_time()
    planned(headers, name)
    assert time.process_time() - begin < 1


def test_unknown_name_lists_the_shipped_ones():
    with pytest.raises(PlacementError, match="did you mean 'all-cpu'"):
        load_rules("all-cpus")


def test_a_file_of_that_name_wins(tmp_path, monkeypatch):
    (tmp_path / "all-cpu").write_text("version: 2\nrules: []\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlacementError, match=r"all-cpu:1:10: version: expected 1, found the number 2"):
        load_rules("all-cpu")


def test_the_schema_ships():
    assert (resources.files("hybrid.rules") / "schema.json").is_file()


def test_formats_that_take_more_than_the_file_s_are_named(tmp_path):
    synthesise(tmp_path / "v3.gguf", resolve_shape("deepseek-v3"), formats(*["Q4_K"] * 6), header_only=True)
    machine = Machine((Device("cpu", 512 * GIB), Device("cuda:0", 24 * GIB)), imagined=True)
    with GGUFFile.open(tmp_path / "v3.gguf", header_only=True) as file:
        found = Planner(file, "deepseek-v3-16gb", machine).plan(RunSize(4096))
    assert any(
        "tensors of Q4_K as Q6_K, which takes more and adds nothing" in text for text in found.warnings
    )
