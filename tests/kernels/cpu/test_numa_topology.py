"""Nodes and cores of machines that are only folders, and where pages are on this one."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest
from hybrid.kernels import cpu

KIB = 1024


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_node(root: Path, node: int, cpus: str, total_kib: int, free_kib: int, cached_kib: int = 0) -> None:
    folder = root / f"sys/devices/system/node/node{node}"
    write(folder / "cpulist", f"{cpus}\n")
    write(
        folder / "meminfo",
        f"Node {node} MemTotal:       {total_kib} kB\nNode {node} MemFree:        {free_kib} kB\n"
        f"Node {node} Inactive(file): {cached_kib} kB\n",
    )


def make_core(root: Path, *cpus: int) -> None:
    for number in cpus:
        write(root / f"sys/devices/system/cpu/cpu{number}/topology/core_cpus_list", ",".join(map(str, cpus)))


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """Eight CPUs on four cores: 0 and 4 share one, 1 and 5 ...; node 0 has cores 0 and 1."""
    make_node(tmp_path, 0, "0-1,4-5", 1000, 400, 100)
    make_node(tmp_path, 1, "2-3,6-7", 2000, 900)
    for core in range(4):
        make_core(tmp_path, core, core + 4)
    return tmp_path


def test_nodes_have_their_cores_and_memory(two_sockets: Path) -> None:
    first, second = cpu.numa_nodes(str(two_sockets), list(range(8)))
    assert (first["node"], first["cpus"], first["cores"]) == (0, [0, 1, 4, 5], [0, 1])
    assert (second["node"], second["cpus"], second["cores"]) == (1, [2, 3, 6, 7], [2, 3])
    assert (first["total_bytes"], first["free_bytes"], first["available_bytes"]) == (
        1000 * KIB,
        400 * KIB,
        500 * KIB,
    )
    assert second["available_bytes"] == 900 * KIB
    assert first["memory_allowed"]


def test_only_cpus_of_the_affinity_count(two_sockets: Path) -> None:
    first, second = cpu.numa_nodes(str(two_sockets), [4, 6, 7])
    assert (first["cpus"], first["cores"]) == ([4], [4])
    assert (second["cpus"], second["cores"]) == ([6, 7], [6, 7])


def test_node_without_allowed_cpus_stays(two_sockets: Path) -> None:
    first, second = cpu.numa_nodes(str(two_sockets), [0, 1])
    assert first["cores"] == [0, 1]
    assert (second["cores"], second["total_bytes"]) == ([], 2000 * KIB)


def test_ids_with_gaps_and_memory_without_cpus(tmp_path: Path) -> None:
    make_node(tmp_path, 8, "2-3", 10, 5)
    make_node(tmp_path, 0, "0-1", 10, 5)
    make_node(tmp_path, 252, "", 4000, 3000)
    nodes = cpu.numa_nodes(str(tmp_path), [0, 1, 2, 3])
    assert [node["node"] for node in nodes] == [0, 8, 252]
    assert [node["cores"] for node in nodes] == [[0, 1], [2, 3], []]
    assert nodes[2]["free_bytes"] == 3000 * KIB


def test_cpuset_may_withhold_memory(two_sockets: Path) -> None:
    write(two_sockets / "proc/self/status", "Name:\tx\nMems_allowed:\t1\nMems_allowed_list:\t1\n")
    assert [n["memory_allowed"] for n in cpu.numa_nodes(str(two_sockets), [0])] == [False, True]


def test_system_without_nodes_is_one_node(tmp_path: Path) -> None:
    (only,) = cpu.numa_nodes(str(tmp_path), [3, 5])
    assert (only["node"], only["cpus"], only["cores"], only["total_bytes"]) == (0, [3, 5], [3, 5], 0)


@pytest.mark.parametrize("text", ["0-", "a", "3-1", "-1", "0-99999999"])
def test_malformed_cpu_list_is_refused(tmp_path: Path, text: str) -> None:
    make_node(tmp_path, 0, text, 10, 5)
    with pytest.raises(ValueError, match="list of numbers"):
        cpu.numa_nodes(str(tmp_path), [0])


def test_this_machine_has_every_allowed_core_once() -> None:
    cores = [core for node in cpu.numa_nodes() for core in node["cores"]]
    assert sorted(cores) == cpu.physical_cores()


def test_pages_are_counted_where_they_are() -> None:
    pages = 16
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(address, 1, 3 * mmap.PAGESIZE)
    found = cpu.count_pages(address, pages * mmap.PAGESIZE)
    if not found["method"]:
        assert found["problem"] and not found["pages"]
        pytest.skip(found["problem"])
    assert sum(found["pages"].values()) >= 3
    if found["method"] == "move_pages":
        assert sum(found["pages"].values()) + found["absent"] == pages


NUMA_MAPS = """7f0000000000 bind:1 anon=512 dirty=512 N1=512 kernelpagesize_kB=4
7f0000400000 default anon=3 dirty=3 N0=1 N1=2 kernelpagesize_kB=4
7f0000800000 default file=/lib/x mapped=4 N0=4 kernelpagesize_kB=4
"""


def test_numa_maps_names_the_mapping_an_address_is_in() -> None:
    assert cpu.parse_numa_maps(NUMA_MAPS, 0x7F0000000000) == {1: 512}
    assert cpu.parse_numa_maps(NUMA_MAPS, 0x7F0000401000) == {0: 1, 1: 2}
    assert cpu.parse_numa_maps(NUMA_MAPS, 0x1000) == {}
