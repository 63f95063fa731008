"""The thread pool through operations that use it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import GGMLType, random_blocks

ROWS, COLS = 2000, 512


@pytest.fixture(scope="module")
def product(pack: Callable[[int, np.ndarray, int], cpu.PackedMatrix]) -> Callable[[cpu.ThreadPool], bytes]:
    """A product of many units of work on a given pool, as bytes."""
    raw = random_blocks(GGMLType.Q8_0, ROWS, COLS, np.random.default_rng(0))
    matrix = pack(GGMLType.Q8_0, raw, COLS)
    x = np.random.default_rng(1).standard_normal((40, COLS)).astype(np.float32)

    def run(pool: cpu.ThreadPool) -> bytes:
        out = np.full((40, ROWS), np.nan, np.float32)
        cpu.linear(pool, matrix, x.ctypes.data, 40, COLS, out.ctypes.data, ROWS)
        return out.tobytes()

    return run


@pytest.mark.parametrize("threads", [1, 2, 3, 17])
def test_every_unit_is_done_once(threads: int, product: Callable[[cpu.ThreadPool], bytes]) -> None:
    pool = cpu.ThreadPool(threads)
    assert pool.num_threads == threads
    expected = product(cpu.ThreadPool(1))
    for _ in range(5):
        assert product(pool) == expected


def test_pinned_workers(product: Callable[[cpu.ThreadPool], bytes]) -> None:
    cores = cpu.physical_cores()
    assert product(cpu.ThreadPool(len(cores), cores)) == product(cpu.ThreadPool(1))
    assert os.sched_getaffinity(0) >= set(cores)  # the calling thread is left alone


def bound_workers() -> dict[int, list[int]]:
    """Number of a worker -> the CPUs it may run on; workers name themselves when they start."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("hybrid-cpu-"):
            found[int(name.removeprefix("hybrid-cpu-"))] = sorted(os.sched_getaffinity(int(task.name)))
    return found


def test_workers_are_where_they_were_put() -> None:
    cpus = cpu.physical_cores() * 3
    pool = cpu.ThreadPool(len(cpus), cpus)
    expected = {index: [cpus[index]] for index in range(1, pool.num_threads)}
    deadline = time.monotonic() + 5
    while (found := bound_workers()) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == expected


def test_sleeping_workers_wake(product: Callable[[cpu.ThreadPool], bytes]) -> None:
    pool = cpu.ThreadPool(4)
    expected = product(pool)
    for pause in (0.0, 0.0001, 0.02):
        time.sleep(pause)
        assert product(pool) == expected


def test_idle_workers_take_no_time() -> None:
    pool = cpu.ThreadPool(4)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    assert pool.num_threads == 4


def test_callers_take_turns(product: Callable[[cpu.ThreadPool], bytes]) -> None:
    pool = cpu.ThreadPool(2)
    expected = product(pool)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(product(pool))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 6


def num_threads_of_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_pools_come_and_go() -> None:
    before = num_threads_of_process()
    for _ in range(30):
        cpu.ThreadPool(8)
    deadline = time.monotonic() + 10  # the kernel lists a joined thread a moment longer
    while num_threads_of_process() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_threads_of_process() <= before


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_is_told(product: Callable[[cpu.ThreadPool], bytes]) -> None:
    pool = cpu.ThreadPool(2)
    product(pool)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            product(pool)
        except RuntimeError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            del pool
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("threads", "cpus", "message"),
    [
        (0, [], "between 1 and"),
        (-3, [], "between 1 and"),
        (100000, [], "between 1 and"),
        (2, [0], "one CPU for each thread"),
        (1, [99999], "CPU 99999"),
        (1, [-1], "CPU -1"),
    ],
)
def test_bad_arguments(threads: int, cpus: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.ThreadPool(threads, cpus)
