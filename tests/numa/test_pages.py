"""Memory and threads on two nodes, as the system tells it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import GGMLType, random_blocks

PageNodes = Callable[[int, int], list[int]]

pytestmark = pytest.mark.numa

Q4_K = GGMLType.Q4_K
ROWS, COLS = 4096, 1024  # 2.3 MiB: more than one huge page


def packed(pool: cpu.ThreadPool, division: str, nodes: list[int], cuts: list[int]) -> cpu.PackedMatrix:
    matrix = cpu.PackedMatrix(int(Q4_K), 1, ROWS, COLS, division, nodes, cuts)
    rows = random_blocks(Q4_K, ROWS, COLS, np.random.default_rng(0))
    matrix.pack_rows(pool, 0, 0, ROWS, rows.ctypes.data)
    return matrix


@pytest.mark.parametrize(
    ("division", "cuts"), [("copies", []), ("rows", [0, 2048, 4096]), ("cols", [0, 512, 1024])]
)
def test_every_page_of_a_part_is_on_its_node(
    pool: cpu.ThreadPool, nodes: list[int], page_nodes: PageNodes, division: str, cuts: list[int]
) -> None:
    matrix = packed(pool, division, nodes, cuts)
    for part, node in zip(matrix.parts, nodes, strict=True):
        assert part["problem"] == "" and part["node"] == node
        assert set(page_nodes(part["address"], part["nbytes"])) == {node}
        count = cpu.count_pages(part["address"], part["nbytes"])
        assert (count["method"], set(count["pages"]), count["absent"]) == ("move_pages", {node}, 0)


def test_a_matrix_may_be_on_one_node(pool: cpu.ThreadPool, nodes: list[int], page_nodes: PageNodes) -> None:
    for node in nodes:
        matrix = packed(pool, "none", [node], [])
        (part,) = matrix.parts
        assert set(page_nodes(part["address"], part["nbytes"])) == {node}


def test_alternating_pages_are_on_both(pool: cpu.ThreadPool, nodes: list[int], page_nodes: PageNodes) -> None:
    matrix = packed(pool, "none", nodes, [])
    (part,) = matrix.parts
    found = page_nodes(part["address"], part["nbytes"])
    # Huge pages alternate as a whole: this matrix has two of them.
    assert set(found) == set(nodes)


def test_workers_are_bound_to_the_node_of_their_group(pool: cpu.ThreadPool, first_cpus: list[int]) -> None:
    found = [
        int(line.split()[1])
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text().startswith("hybrid-cpu-")
        for line in (task / "status").read_text().splitlines()
        if line.startswith("Cpus_allowed_list")
    ]
    assert first_cpus[1] in found


def test_the_calling_thread_works_on_its_node(
    pool: cpu.ThreadPool, nodes: list[int], first_cpus: list[int]
) -> None:
    """It is a worker of the first group: called from the second node, it goes home, and may leave again."""
    before = os.sched_getaffinity(0)
    x, out = np.ones((1, COLS), np.float32), np.empty((1, ROWS), np.float32)
    matrix = packed(pool, "copies", nodes, [])
    try:
        os.sched_setaffinity(0, {first_cpus[1]})
        cpu.linear(pool, matrix, x.ctypes.data, 1, COLS, out.ctypes.data, ROWS)
        assert os.sched_getaffinity(0) == {first_cpus[1]}
    finally:
        os.sched_setaffinity(0, before)
    assert np.isfinite(out).all()
