"""The kernels of avxvnni with its instructions written out in AVX2: hosts without them test the rest."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hybrid.kernels import cpu

HERE = Path(__file__).parent / "vnni256"
SOURCES = Path(__file__).parents[3] / "kernels" / "cpu"


def test_every_row_gives_the_bits_of_scalar(build_program: Callable[..., Path]) -> None:
    if "avx2" not in cpu.supported_isas():
        pytest.skip("this host lacks avx2, in which the instructions are written out")
    kernels = [SOURCES / f"{name}.cc" for name in ("kernels_avxvnni", "kernels_scalar", "codebooks")]
    program = build_program("check", dict.fromkeys([*kernels, HERE / "check.cc"], ()))
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) == sum(row["isa"] == "avxvnni" for row in cpu.kernel_rows())
