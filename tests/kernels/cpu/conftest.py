"""What several tests of the CPU kernels share."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


SOURCES = Path(__file__).parents[3] / "kernels" / "cpu"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "vbmi")), "-mgfni"]
ISA_OPTIONS = {
    "kernels_avxvnni.cc": [*AVX2, '-DKERNEL_VNNI256="vnni256_avx2.h"'],
    "kernels_amx.cc": [*AVX512, '-DKERNEL_AMX_TILES="emulated_tiles.h"'],
}
BuildProgram = Callable[[str, Mapping[Path, Sequence[str]]], Path]


@pytest.fixture
def build_program(tmp_path: Path) -> BuildProgram:
    """Builds a program in C++ from sources, each with options of its own."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not found:
        pytest.skip("there is no C++ compiler: name one by CXX")
    command = [*found.split(), "-std=c++20", "-O1", "-ffp-contract=off", f"-I{SOURCES}"]
    command.append(f"-I{Path(__file__).parent}")

    def compile_source(source: Path, options: Sequence[str]) -> Path:
        target = tmp_path / f"{source.stem}.o"
        options = [*ISA_OPTIONS.get(source.name, []), *options]
        subprocess.run([*command, *options, "-c", source, "-o", target], check=True)
        return target

    def build(name: str, sources: Mapping[Path, Sequence[str]]) -> Path:
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_source, sources.keys(), sources.values()))
        program = tmp_path / name
        subprocess.run([*command, *objects, "-o", program], check=True)
        return program

    return build
