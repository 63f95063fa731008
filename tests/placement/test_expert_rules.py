"""Rules that divide stacks of experts, quantise anew and choose NUMA modes: placements and exact bytes."""

from __future__ import annotations

import math

import pytest

from hybrid.config import ExpertUse
from hybrid.errors import CapacityError, PlacementError
from hybrid.gguf import TRAITS, GGMLType, GGUFFile
from hybrid.placement.llamacpp import flags
from hybrid.placement.machine import GIB, Device, Machine
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import Planner, plan
from hybrid.placement.report import as_json, by_layers, by_role, by_rule
from hybrid.synth import resolve_shape, synthesise

GATE = "blk.1.ffn_gate_exps.weight"
EXPERT = 256 * 256 // 256 * 144  # bytes of a Q4_K matrix of 256 rows and columns


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Layers 0-2, of which 1 and 2 have 8 experts of 256 × 256 in Q4_K."""
    path = tmp_path_factory.mktemp("experts") / "tiny.gguf"
    synthesise(path, resolve_shape("tiny", num_layers=3, num_experts=8), header_only=True)
    with GGUFFile.open(path, header_only=True) as file:
        yield file


def rules(*entries, **sections):
    listed = [{"select": select, "place": place} for select, place in entries]
    return {"version": 1, "rules": listed, **sections}


def on(device, **more):
    return {"device": device, **more}


SPLIT = rules(
    ({"experts": "0-2"}, on("fake:0")),
    ({"experts": [2, "5-6"], "layers": 1}, on("cuda:0")),
    ({"role": "routed_experts"}, on("cpu")),
)
MACHINE = Machine((Device("cpu", GIB), Device("cuda:0", GIB)), num_threads=2)


def test_every_expert_goes_where_the_first_rule_that_fits_it_says(tiny):
    found = plan(tiny, SPLIT, machine=MACHINE).placements
    shares = found[GATE].shares
    assert [(s.device, s.experts, s.rule) for s in shares] == [
        ("fake:0", (0, 1, 2), "<rules>.rules[0]"),
        ("cuda:0", (5, 6), "<rules>.rules[1]"),
        ("cpu", (3, 4, 7), "<rules>.rules[2]"),
    ]
    assert [s.n_bytes for s in shares] == [3 * 256 * 256 * 4, 2 * EXPERT, 3 * EXPERT]
    assert found[GATE].n_bytes == sum(s.n_bytes for s in shares)
    assert [s.device for s in found["blk.2.ffn_up_exps.weight"].shares] == ["fake:0", "cpu"]
    assert found["blk.1.attn_output.weight"].shares == ()


def test_memory_counts_shares_where_they_lie(tiny):
    found = plan(tiny, SPLIT, machine=MACHINE)
    for device in ("cpu", "cuda:0", "fake:0"):
        assert found.memory[device].weights_bytes == found.bytes_on(device)
    assert found.memory["fake:0"].weights_bytes == 2 * 3 * 3 * 256 * 256 * 4


def test_shares_of_all_experts_are_no_shares(tiny):
    whole = plan(tiny, rules(({"experts": "0-7"}, on("fake:0")), ({"layers": "0-"}, on("cpu"))))
    placement = whole.placements[GATE]
    assert (placement.device, placement.shares, placement.n_bytes) == ("fake:0", (), 8 * 256 * 256 * 4)


def test_shares_that_are_alike_are_one(tiny):
    two = plan(tiny, rules(({"experts": "0-2"}, on("cpu")), ({"experts": "3-"}, on("cpu"))))
    assert two.placements[GATE].shares == ()
    assert two.placements[GATE].rule == "<rules>.rules[0], <rules>.rules[1]"
    assert two.digest() == plan(tiny).digest()


def test_auto_places_the_experts_that_are_left(tiny):
    some = rules(({"experts": "0-2"}, on("cpu")))
    left = plan(tiny, some, machine=MACHINE).placements[GATE]
    assert [(s.device, s.experts, s.rule) for s in left.shares] == [
        ("cpu", (0, 1, 2), "<rules>.rules[0]"),
        ("cuda:0", (3, 4, 5, 6, 7), "auto"),
    ]
    full = Machine((Device("cpu", GIB), Device("cuda:0", 1)), num_threads=2)
    assert plan(tiny, some, machine=full).placements[GATE].shares == ()


def test_what_is_fixed_leaves_less_room_for_auto(tiny):
    def machine(n_bytes):
        return Machine((Device("cpu", GIB), Device("cuda:0", n_bytes)), num_threads=2)

    everything = plan(tiny, machine=MACHINE).memory["cuda:0"].total_bytes
    pinned = rules(({"experts": "0-3", "layers": 1}, on("cuda:0")))
    for missing in (0, 1, 3 * EXPERT, 20 * EXPERT, 24 * EXPERT + 1):
        found = plan(tiny, pinned, machine=machine(everything - missing))
        assert found.memory["cuda:0"].total_bytes <= everything - missing
        assert "cuda:0" in found.placements[GATE].devices
    assert plan(tiny, pinned, machine=machine(everything)).placements[GATE].shares == ()


def test_reports_show_the_parts(tiny):
    planner = Planner(tiny, SPLIT, MACHINE)
    found = planner.plan(RunSize(512))
    roles = {share.device: share for share in by_role(planner.model, found) if share.role == "routed_experts"}
    assert {device: share.n_bytes for device, share in roles.items()} == {
        "fake:0": 6 * 3 * 256 * 256 * 4,
        "cuda:0": 2 * 3 * EXPERT,
        "cpu": (3 + 5) * 3 * EXPERT,
    }
    assert math.isclose(sum(s.active_bytes for s in roles.values()), 2 * 3 * 4 * EXPERT)
    layers = {entry.label: entry.devices.get("routed_experts") for entry in by_layers(planner.model, found)}
    assert layers == {"0": None, "1": "fake:0+cuda:0+cpu", "2": "fake:0+cpu", "-": None}
    by_origin = {share.rule: share.num_tensors for share in by_rule(planner.model, found)}
    assert [by_origin[f"<rules>.rules[{i}]"] for i in range(3)] == [6, 3, 6]
    entry = next(t for t in as_json(planner.model, found)["tensors"] if t["name"] == GATE)
    assert entry["shares"][1] == {
        "device": "cuda:0", "experts": [5, 6], "bytes": 2 * EXPERT, "rule": "<rules>.rules[1]",
        "numa": "none", "format": None,
    }  # fmt: skip
    lines = planner.explain(GATE, RunSize(512))
    assert lines[1] == "  <rules>.rules[0]: matches: fake:0, experts 0-2"
    assert lines[2] == "  <rules>.rules[1]: matches: cuda:0, experts 5-6"
    assert lines[4] == f"  fake:0 experts=0-2 by <rules>.rules[0], {3 * 256 * 256 * 4} bytes there"


def test_a_split_is_predicted_between_its_ends(tiny):
    slow, fast = Device("cpu", GIB, 1e9), Device("cuda:0", GIB, 900e9)
    machine = Machine((slow, fast), num_threads=2, isa="avx512vnni")

    def speed(*entries):
        others = ({"layers": "0-"}, on("cpu")), ({"name": "*"}, on("cpu"))
        return plan(tiny, rules(*entries, *others), machine=machine).prediction.decode_tps

    none = plan(tiny, rules(({"name": "*"}, on("cpu"))), machine=machine).prediction.decode_tps
    half = speed(({"experts": "0-3"}, on("cuda:0")))
    whole = speed(({"role": "routed_experts"}, on("cuda:0")))
    assert none < half < whole
    assert math.isclose(1 / half, (1 / none + 1 / whole) / 2, rel_tol=1e-6)


def test_llama_cpp_has_no_flags_for_it(tiny):
    for wanted in (SPLIT, rules(({"role": "output"}, on("cuda:0", format="Q8_0")))):
        planner = Planner(tiny, wanted, MACHINE)
        with pytest.raises(PlacementError, match=r"llama\.cpp has no flag for .* by <rules>\.rules"):
            flags(planner.model, planner.plan(RunSize(512)))


def packed(shape, format_):
    """Bytes of a matrix on the CPU: rows in groups of 16."""
    traits = TRAITS[format_]
    *batch, rows, cols = shape
    return math.prod(batch) * -(-rows // 16) * 16 * cols // traits.block_size * traits.block_bytes


def test_formats_change_matrices_and_leave_vectors(tiny):
    found = plan(tiny, rules(({"role": ["attention", "norm"]}, on("cpu", format="Q8_0")))).placements
    for name, placement in found.items():
        info = tiny.tensors[name]
        if ".attn_" in name and len(info.shape) > 1:
            assert placement.format == (None if info.type is GGMLType.Q8_0 else "Q8_0")
            assert placement.n_bytes == packed(info.shape, GGMLType.Q8_0)
        else:
            assert placement.format is None
    same = plan(tiny, rules(({"role": "output"}, on("cpu", format=tiny.tensors["output.weight"].type.name))))
    assert same.placements["output.weight"].format is None


def test_experts_may_have_several_formats(tiny):
    wanted = rules(({"experts": "0-3"}, on("cpu", format="Q2_K")), ({"name": "*"}, on("cpu")))
    shares = plan(tiny, wanted).placements[GATE].shares
    assert [(s.format, len(s.experts)) for s in shares] == [("Q2_K", 4), (None, 4)]
    assert [s.n_bytes for s in shares] == [4 * 256 * 84, 4 * EXPERT]


NODES = Machine((Device("cpu", GIB),), num_nodes=2, num_threads=2)


@pytest.mark.parametrize("mode, copies", [("replicate", 2), ("interleave", 1), ("node:1", 1)])
def test_numa_modes(tiny, mode, copies):
    wanted = rules(({"role": "routed_experts"}, on("cpu", numa=mode)))
    found = plan(tiny, wanted, machine=NODES)
    assert found.placements[GATE].numa == mode
    assert found.placements[GATE].n_bytes == 8 * EXPERT * copies
    assert found.placements["output.weight"].numa == "none"


def test_one_node_needs_no_mode(tiny):
    wanted = rules(({"role": "routed_experts"}, on("cpu", numa="replicate")))
    found = plan(tiny, wanted)
    assert found.placements[GATE].numa == "none" and found.placements[GATE].n_bytes == 8 * EXPERT
    assert not found.warnings


def test_numa_is_left_to_the_machine_unless_a_rule_says(tiny):
    both = Machine((Device("cpu", GIB),), num_nodes=2, num_threads=2, numa=True)
    wanted = rules(({"role": "routed_experts"}, on("cpu", numa="none")), ({"layers": 0}, on("cpu")))
    found = plan(tiny, wanted, machine=both).placements
    assert found[GATE].numa == "none" and found["blk.0.attn_output.weight"].numa == "replicate"


def budget(**sizes):
    return {"version": 1, "budget": {name.replace("_", ":"): size for name, size in sizes.items()}}


def test_budgets_of_rules(tiny):
    def of(machine, wanted):
        return {d.name: d.budget_bytes for d in Planner(tiny, wanted, machine).machine.devices}

    free = Machine((Device("cpu", 10 * GIB),))
    assert of(free, budget(cpu="4GiB")) == {"cpu": 4 * GIB}
    assert of(free, budget(cpu="40GiB")) == {"cpu": 10 * GIB}  # no more than is free
    assert of(free.with_budget("cpu", 6 * GIB), budget(cpu="4GiB")) == {"cpu": 6 * GIB}  # said for this run
    assert of(Machine(), budget(cpu="4GiB")) == {"cpu": 4 * GIB}
    assert of(free, budget(cuda_0="24GiB")) == {"cpu": 10 * GIB, "cuda:0": 24 * GIB}
    assert Planner(tiny, budget(cuda_0="24GiB"), free).machine.imagined
    with pytest.raises(CapacityError, match="does not fit on cpu"):
        plan(tiny, budget(cpu="1MiB"), machine=free)


CACHE = {"device": "cuda:0", "bytes": "fill"}


def test_an_expert_cache_takes_what_is_left_in_whole_experts(tiny):
    found = plan(tiny, {"version": 1, "experts": {"cache": CACHE}}, machine=MACHINE)
    gpu = found.memory["cuda:0"]
    assert gpu.scratch_parts["expert cache"] % (3 * EXPERT) == 0
    assert GIB - 3 * EXPERT < gpu.total_bytes <= GIB
    assert found.placements[GATE].device == "cpu"  # the cache has the room that whole layers would take
    assert found.expert_cache.chosen.n_bytes <= gpu.scratch_parts["expert cache"]


def test_an_expert_cache_of_a_stated_size(tiny):
    wanted = {"version": 1, "experts": {"cache": {**CACHE, "bytes": "1MiB"}}}
    found = plan(tiny, wanted, machine=MACHINE)
    assert found.memory["cuda:0"].scratch_parts["expert cache"] == (1 << 20) // (3 * EXPERT) * 3 * EXPERT
    larger = {"version": 1, "experts": {"cache": {**CACHE, "bytes": "2GiB"}}}
    with pytest.raises(CapacityError, match="does not fit on cuda:0"):
        plan(tiny, larger, machine=MACHINE)
    unknown = Machine((Device("cpu", GIB), Device("cuda:0")))
    with pytest.raises(PlacementError, match=r"cache\.bytes: bytes: fill needs a budget of cuda:0; give it"):
        plan(tiny, {"version": 1, "experts": {"cache": CACHE}}, machine=unknown)


def test_fewer_experts_for_a_token(tiny):
    few = Planner(tiny, {"version": 1, "experts": {"per_token": 2, "threshold": 0.5}}, MACHINE)
    assert (few.experts.per_token, few.experts.threshold) == (2, 0.5)
    share = next(t.share for t in few.model.tensors if t.name == GATE)
    assert share == 2 / 8
    fewer = Planner(tiny, {"version": 1, "experts": {"per_token": 2}}, MACHINE, ExpertUse(1))
    assert fewer.experts.per_token == 1  # what is asked for wins
