"""The measured read bandwidth: its arguments, and that the figure is that of a read."""

from __future__ import annotations

import pytest
from hybrid.kernels import cpu


@pytest.mark.parametrize("num_threads", [0, 1])
def test_measures_something_plausible(isa: str, num_threads: int) -> None:
    rate = cpu.measure_read_bandwidth(cpu.ThreadPool(2, []), 64 << 20, 0.05, num_threads)
    # A loop that is optimised away or reads the zero page would pass 2 TB/s on two threads.
    assert 1e8 < rate < 2e12


@pytest.mark.parametrize(
    "arguments",
    [
        (1 << 20, 0.1, 0),
        (64 << 20, 0.0, 0),
        (64 << 20, float("nan"), 0),
        (64 << 20, 0.1, 3),
        (64 << 20, 0.1, -1),
    ],
)
def test_refuses_arguments_out_of_range(arguments: tuple[int, float, int]) -> None:
    with pytest.raises(ValueError, match="at least 4194304 bytes, a positive time and 0 to 2 threads"):
        cpu.measure_read_bandwidth(cpu.ThreadPool(2, []), *arguments)
