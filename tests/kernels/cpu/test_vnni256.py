"""The kernels of avxvnni with its instructions written out in AVX2: hosts without them test the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hybrid.kernels import cpu

HERE = Path(__file__).parent / "vnni256"
SOURCES = Path(__file__).parents[3] / "kernels" / "cpu"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
OPTIONS = {
    "kernels_avxvnni.cc": [*AVX2, '-DKERNEL_VNNI256="vnni256_avx2.h"'],
    "kernels_scalar.cc": [],
    "codebooks.cc": [],
}


def compiler() -> list[str]:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert found, "the kernels were built, so there is a C++ compiler: name it by CXX"
    return [*found.split(), "-std=c++20", "-O1", "-ffp-contract=off", f"-I{SOURCES}"]


def test_every_row_gives_the_bits_of_scalar(tmp_path: Path) -> None:
    if "avx2" not in cpu.supported_isas():
        pytest.skip("this host lacks avx2, in which the instructions are written out")

    def compile_source(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        options = OPTIONS.get(source.name, [])
        subprocess.run([*compiler(), *options, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, [*(SOURCES / name for name in OPTIONS), HERE / "check.cc"]))
    program = tmp_path / "check"
    subprocess.run([*compiler(), *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) == sum(row["isa"] == "avxvnni" for row in cpu.kernel_rows())
