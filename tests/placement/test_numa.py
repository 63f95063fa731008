"""Modes for several NUMA nodes: who gets which threads, where slices are cut, what fits, what auto takes."""

from __future__ import annotations

import pytest

from hybrid.errors import CapacityError, ConfigError, PlacementError
from hybrid.gguf import GGUFFile
from hybrid.placement.machine import Device, Machine, Node
from hybrid.placement.memory import RunSize
from hybrid.placement.numa import Layout, bandwidth_share, cuts, layout, spread
from hybrid.placement.planner import plan
from hybrid.synth import resolve_shape, synthesise

GIB = 1 << 30
MIB = 1 << 20
GATE, DENSE, ROUTER = "blk.1.ffn_gate_exps.weight", "blk.0.ffn_gate.weight", "blk.1.ffn_gate_inp.weight"
CORES = {0: [0, 1], 1: [2, 3]}
CPUS = {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}


def header(tmp_path_factory, width):
    path = tmp_path_factory.mktemp("numa") / f"{width}.gguf"
    shape = resolve_shape("tiny", num_layers=3, num_experts=8, moe_intermediate_size=width)
    synthesise(path, shape, header_only=True)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Experts of 768: three blocks."""
    with GGUFFile.open(header(tmp_path_factory, 768), header_only=True) as file:
        yield file


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Experts of 256: one block."""
    with GGUFFile.open(header(tmp_path_factory, 256), header_only=True) as file:
        yield file


def machine(*budgets, num_nodes=None, total=64 * GIB):
    nodes = tuple(Node(index, n_bytes) for index, n_bytes in enumerate(budgets))
    return Machine(
        (Device("cpu", total),), num_nodes=num_nodes or len(nodes), num_threads=4, numa=True, nodes=nodes
    )


def experts(mode):
    select = {"role": "routed_experts"}
    return {"version": 1, "rules": [{"select": select, "place": {"device": "cpu", "numa": mode}}]}


@pytest.mark.parametrize(
    "threads, cpus, groups, nodes",
    [
        (1, [0], [0], [0]),
        (2, [0, 2], [0, 1], [0, 1]),
        (3, [0, 1, 2], [0, 0, 1], [0, 1]),
        (4, [0, 1, 2, 3], [0, 0, 1, 1], [0, 1]),
        (5, [0, 1, 4, 2, 3], [0, 0, 0, 1, 1], [0, 1]),  # hyperthreads, cores first
        (8, [0, 1, 4, 5, 2, 3, 6, 7], [0, 0, 0, 0, 1, 1, 1, 1], [0, 1]),
        (9, [], [], []),  # left to the system
    ],
)
def test_threads_are_spread_over_nodes(threads, cpus, groups, nodes):
    found = spread(CORES, CPUS, threads)
    assert (found.cpus, found.groups, found.nodes) == (cpus, groups, nodes)


def test_uneven_nodes_and_memory_without_cpus():
    found = spread({0: [0, 1, 2], 8: [3], 252: []}, {0: [0, 1, 2], 8: [3], 252: []}, 4)
    assert (found.cpus, found.groups, found.nodes) == ([0, 1, 2, 3], [0, 0, 0, 1], [0, 8])


@pytest.mark.parametrize(
    "length, parts, step, found",
    [
        (768, 2, 256, [0, 512, 768]),
        (1408, 2, 256, [0, 768, 1408]),
        (2048, 2, 256, [0, 1024, 2048]),
        (768, 3, 256, [0, 256, 512, 768]),
        (768, 4, 256, None),
        (256, 2, 256, None),
        (50, 2, 16, [0, 32, 50]),
    ],
)
def test_cuts(length, parts, step, found):
    assert cuts(length, parts, step) == found


@pytest.mark.parametrize(
    "mode, side, shape, found",
    [
        ("none", "rows", (1, 64, 64), Layout()),
        ("interleave", "rows", (1, 64, 64), Layout("none", (0, 8))),
        ("node:8", "rows", (1, 64, 64), Layout("none", (8,))),
        ("replicate", "rows", (1, 64, 64), Layout("copies", (0, 8))),
        ("shard", "rows", (1, 72, 64), Layout("rows", (0, 8), (0, 48, 72))),
        ("shard", "heads", (5, 64, 64), Layout("batch", (0, 8), (0, 3, 5))),
        ("shard", "heads", (1, 64, 64), Layout("rows", (0, 8), (0, 32, 64))),
        ("shard", "hidden_rows", (4, 768, 64), Layout("rows", (0, 8), (0, 512, 768))),
        ("shard", "hidden_cols", (4, 64, 768), Layout("cols", (0, 8), (0, 512, 768))),
        ("shard", "rows", (1, 16, 64), Layout("none", (0,))),
    ],
)
def test_layouts(mode, side, shape, found):
    assert layout(mode, side, shape, (0, 8)) == found


def test_one_node_is_never_divided():
    assert (
        layout("replicate", "rows", (1, 64, 64), (0,)) == layout("shard", "rows", (1, 64, 64), ()) == Layout()
    )


def test_auto_copies_where_every_node_has_room(wide):
    found = plan(wide, machine=machine(GIB, GIB))
    assert found.numa == "replicate" and "room for a copy" in found.numa_reason
    assert "expected to be read at 134 GB/s, with interleave at 89" in found.numa_reason
    weights = found.bytes_on("cpu")
    assert sum(found.node_bytes.values()) == pytest.approx(weights, rel=0.01)
    assert found.node_bytes[0] == found.node_bytes[1]


def test_auto_tries_what_is_read_faster_first():
    for nodes in (2, 4, 8):
        shares = [
            bandwidth_share(mode, nodes) for mode in ("replicate", "shard", "interleave", "none", "node:0")
        ]
        assert shares == sorted(shares, reverse=True) and shares[0] == 1
    # Of two nodes half of the reads are from the other one, at half the speed: 1 / (0.5 + 0.5 / 0.5).
    assert bandwidth_share("interleave", 2) == pytest.approx(2 / 3)
    assert bandwidth_share("none", 1) == bandwidth_share("node:0", 1) == 1


def test_auto_cuts_where_copies_do_not_fit(wide):
    one = plan(wide, machine=machine(GIB, GIB), numa="none").bytes_on("cpu")
    found = plan(wide, machine=machine(one * 3 // 4, one * 3 // 4))
    assert found.numa == "shard" and "does not fit" in found.numa_reason
    assert found.placements[GATE].numa == "shard" and found.bytes_on("cpu") == one
    # 768 = 3 blocks: the first node has two of them.
    assert found.node_bytes[0] > found.node_bytes[1]


def test_auto_alternates_where_nothing_can_be_cut(narrow):
    one = plan(narrow, machine=machine(GIB, GIB), numa="none").bytes_on("cpu")
    found = plan(narrow, machine=machine(one * 3 // 4, one * 3 // 4))
    assert found.numa == "interleave" and "blocks of 256" in found.numa_reason


def test_auto_alternates_where_slices_do_not_fit(wide):
    one = plan(wide, machine=machine(GIB, GIB), numa="none").bytes_on("cpu")
    found = plan(wide, machine=machine(one * 11 // 20, one * 11 // 20))
    assert found.numa == "interleave" and "nor do slices" in found.numa_reason


def test_auto_leaves_pages_alone_where_a_node_is_full(wide):
    assert plan(wide, machine=machine(GIB, MIB)).numa == "none"


def test_copies_that_do_not_fit_in_all_are_not_made(wide):
    small = RunSize(256)
    whole = plan(wide, machine=machine(GIB, GIB), numa="none", size=small)
    total = whole.memory["cpu"].total_bytes + whole.bytes_on("cpu") // 2
    assert plan(wide, machine=machine(GIB, GIB, total=total), size=small).numa == "shard"


def test_a_node_without_room_is_refused(wide):
    with pytest.raises(
        CapacityError, match=r"NUMA node 1: node 0: .* node 1: .* 1\.0 MiB there .*--numa auto"
    ):
        plan(wide, machine=machine(GIB, MIB), numa="replicate")


def test_cut_of_one_block_is_refused(narrow):
    with pytest.raises(
        PlacementError, match=r"--numa: blk\.1\.ffn_gate_exps.* blocks of 256.* have 1 for 2 nodes"
    ):
        plan(narrow, machine=machine(GIB, GIB), numa="shard")
    with pytest.raises(PlacementError, match=r"numa: numa: blk\.1\.ffn_gate_exps.* cannot be divided"):
        plan(narrow, experts("shard"), machine=machine(GIB, GIB))


def test_rules_win_and_the_rest_follows_the_mode(wide):
    found = plan(wide, experts("node:1"), machine=machine(GIB, GIB), numa="interleave").placements
    assert (found[GATE].numa, found[DENSE].numa) == ("node:1", "interleave")
    assert found["output_norm.weight"].numa == "none"  # a vector


def test_modes_that_mean_nothing(wide):
    with pytest.raises(ConfigError, match="--numa: expected auto, none"):
        plan(wide, machine=machine(GIB, GIB), numa="off")
    with pytest.raises(PlacementError, match="no NUMA node 2 on this machine, which has 0, 1"):
        plan(wide, machine=machine(GIB, GIB), numa="node:2")


def test_one_node_has_no_modes(wide):
    found = plan(wide, machine=Machine((Device("cpu", GIB),)), numa="replicate")
    assert {p.numa for p in found.placements.values()} == {"none"} and not found.node_bytes


def test_memory_without_workers_can_be_named(wide):
    nodes = (Node(0, GIB), Node(4, GIB, has_workers=False))
    both = Machine((Device("cpu", GIB),), num_nodes=1, nodes=nodes)
    found = plan(wide, experts("node:4"), machine=both)
    assert found.placements[GATE].numa == "node:4" and set(found.node_bytes) == {4}
