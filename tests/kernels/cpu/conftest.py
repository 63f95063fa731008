"""What several tests of the CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import GGMLType


@pytest.fixture
def restored_isa() -> Iterator[None]:
    """Puts the process's ISA back after a test that selects others."""
    before = cpu.current_isa()
    yield
    cpu.select_isa(before)


@pytest.fixture(params=cpu.isas())
def isa(request: pytest.FixtureRequest, restored_isa: None) -> str:
    """Every ISA of the build in turn, chosen."""
    if request.param not in cpu.supported_isas():
        pytest.skip(f"this host lacks {request.param}")
    cpu.select_isa(request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def pool() -> cpu.ThreadPool:
    return cpu.ThreadPool(2)


class Packer:
    """Packed matrices from GGUF bytes ``[batch, rows, row_bytes]``."""

    def __init__(self, pool: cpu.ThreadPool) -> None:
        self.pool = pool

    def __call__(self, ggml_type: int, raw: np.ndarray, cols: int) -> cpu.PackedMatrix:
        raw = np.ascontiguousarray(raw if raw.ndim == 3 else raw[None])
        matrix = cpu.PackedMatrix(int(GGMLType(ggml_type)), raw.shape[0], raw.shape[1], cols)
        for b in range(raw.shape[0]):
            matrix.pack_rows(self.pool, b, 0, raw.shape[1], raw[b].ctypes.data)
        return matrix


@pytest.fixture(scope="session")
def pack(pool: cpu.ThreadPool) -> Packer:
    return Packer(pool)
