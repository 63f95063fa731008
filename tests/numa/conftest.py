"""Tests that need two NUMA nodes: `pytest -m numa`. On a machine with one node they skip and say so."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

import pytest
from hybrid.kernels import cpu

SYS_MOVE_PAGES = 279  # x86-64


@pytest.fixture(scope="session")
def nodes() -> list[int]:
    """The first two nodes with CPUs and memory."""
    found = [n["node"] for n in cpu.numa_nodes() if n["cores"] and n["memory_allowed"] and n["total_bytes"]]
    if len(found) < 2:
        pytest.skip(f"needs two NUMA nodes with CPUs and memory, this machine has {len(found)}")
    return found[:2]


@pytest.fixture(scope="session")
def first_cpus(nodes: list[int]) -> list[int]:
    """A CPU of each of the two nodes."""
    by_node = {n["node"]: n["cores"][0] for n in cpu.numa_nodes() if n["cores"]}
    return [by_node[node] for node in nodes]


@pytest.fixture(scope="session")
def pool(first_cpus: list[int]) -> cpu.ThreadPool:
    """One worker on each node."""
    return cpu.ThreadPool(2, first_cpus, [0, 1])


PageNodes = Callable[[int, int], list[int]]


@pytest.fixture(scope="session")
def page_nodes() -> PageNodes:
    """(address, bytes) -> the node of each page of a range, by a move_pages call of the tests' own."""
    return ask


def ask(address: int, n_bytes: int) -> list[int]:
    size = os.sysconf("SC_PAGESIZE")
    first = address // size * size
    starts = range(first, address + n_bytes, size)
    pages = (ctypes.c_void_p * len(starts))(*starts)
    status = (ctypes.c_int * len(starts))()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(SYS_MOVE_PAGES, 0, ctypes.c_ulong(len(starts)), pages, None, status, 0) != 0:
        error = ctypes.get_errno()
        if error in (errno.EPERM, errno.ENOSYS):
            pytest.skip(f"the system forbids move_pages: {os.strerror(error)}")
        raise OSError(error, os.strerror(error))
    return list(status)
