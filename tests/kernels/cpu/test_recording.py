"""Recorded operations run again as if they were called again."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import GGMLType


def address(a: np.ndarray) -> int:
    return a.ctypes.data


class Program:
    """sums += norm(table[ids]), recorded at the first run."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.pool = cpu.ThreadPool(2)
        self.values = rng.standard_normal((32, 64), dtype=np.float32)
        self.table = cpu.PackedMatrix(int(GGMLType.F32), 1, 32, 64)
        self.table.pack_rows(self.pool, 0, 0, 32, address(self.values))
        self.ids = np.zeros(3, np.int32)
        self.weight = rng.standard_normal(64, dtype=np.float32)
        self.rows, self.normed, self.sums = (np.zeros((3, 64), np.float32) for _ in range(3))

    def call(self) -> None:
        cpu.gather_rows(self.pool, self.table, address(self.ids), 3, address(self.rows))
        cpu.rms_norm(
            self.pool, address(self.rows), 3, 64, address(self.weight), 1e-6, 0, address(self.normed)
        )
        cpu.add(self.pool, address(self.normed), 3, 64, address(self.sums))

    def record(self) -> cpu.Recording:
        recording = cpu.Recording()
        recording.start()
        self.call()
        recording.stop()
        return recording


def test_a_run_repeats_the_calls_on_new_inputs():
    recorded, called = Program(), Program()
    recording = recorded.record()
    called.call()
    assert len(recording) == 3
    for ids in ([1, 5, 31], [2, 2, 2]):
        recorded.ids[:] = called.ids[:] = ids
        recording.run()
        called.call()
        np.testing.assert_array_equal(recorded.sums, called.sums)
    assert np.abs(recorded.sums).max() > 0
    assert len(recording) == 3


def test_only_the_recording_thread_is_recorded():
    program, recording = Program(), cpu.Recording()
    recording.start()
    other = threading.Thread(target=program.call)
    other.start()
    other.join()
    recording.stop()
    assert len(recording) == 0


def test_an_error_ends_the_run():
    program = Program()
    recording = program.record()
    before = program.sums.copy()
    program.ids[1] = 32
    with pytest.raises(ValueError, match="id 32 at position 1 is outside the table of 32 rows"):
        recording.run()
    np.testing.assert_array_equal(program.sums, before)


def test_a_refused_operation_is_not_kept():
    program, recording = Program(), cpu.Recording()
    program.ids[0] = -1
    recording.start()
    with pytest.raises(ValueError, match="id -1"):
        program.call()
    recording.stop()
    assert len(recording) == 0


def test_starts_and_stops_must_pair():
    first, second = cpu.Recording(), cpu.Recording()
    first.start()
    with pytest.raises(RuntimeError, match="records already"):
        second.start()
    with pytest.raises(RuntimeError, match="does not record into it"):
        second.stop()
    with pytest.raises(RuntimeError, match="a thread that records"):
        first.run()
    first.stop()
    with pytest.raises(RuntimeError, match="does not record into it"):
        first.stop()


def test_a_recording_that_is_dropped_records_no_more():
    recording = cpu.Recording()
    recording.start()
    del recording
    Program().record()
