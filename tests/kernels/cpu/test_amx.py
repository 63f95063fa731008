"""The kernels of amx with its tile instructions as functions: hosts with AVX-512 test the rest."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hybrid.kernels import cpu

HERE = Path(__file__).parent / "amx"
SOURCES = Path(__file__).parents[3] / "kernels" / "cpu"
# Cases of misuse.cc, and what is said of each.
MISUSE = {
    "palette": "ldtilecfg: the palette must be 1",
    "start_row": "ldtilecfg: start_row",
    "reserved": "ldtilecfg: reserved bytes",
    "rows": "ldtilecfg: a tile has up to 16 rows",
    "row_bytes": "ldtilecfg: a row has up to 64 bytes",
    "wide_row_bytes": "ldtilecfg: a row has up to 64 bytes",
    "half_configured": "ldtilecfg: rows and bytes",
    "ninth_tile": "ldtilecfg: palette 1 has eight tiles",
    "unconfigured": "tilezero: no tiles are configured",
    "released": "tilezero: no tiles are configured",
    "no_rows": "tilezero: the tile has no rows",
    "load": "tileloadd: there is no such tile",
    "store": "tilestored: there is no such tile",
    "same": "tdpbssd: the three tiles must differ",
    "sums_and_left": "tdpbssd: the first factor and the sums",
    "sums_and_right": "tdpbssd: the second factor and the sums",
    "left_and_right": "tdpbssd: the first factor must have a dword",
    "no_dwords": "tdpbssd: rows must be whole dwords",
}


def test_every_row_gives_the_bits_of_scalar(build_program: Callable[..., Path]) -> None:
    if "avx512vbmi" not in cpu.supported_isas():
        pytest.skip("this host lacks avx512vbmi, which the kernels of amx use beside tiles")
    kernels = [SOURCES / f"{name}.cc" for name in ("kernels_amx", "kernels_scalar", "codebooks")]
    sources = {**dict.fromkeys(kernels, (f"-I{HERE}",)), HERE / "check.cc": ()}
    result = subprocess.run([build_program("check", sources)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) == sum(row["isa"] == "amx" for row in cpu.kernel_rows())


def test_the_emulation_refuses_what_the_processor_does(build_program: Callable[..., Path]) -> None:
    program = build_program("misuse", {HERE / "misuse.cc": ()})
    assert subprocess.run([program, "good"]).returncode == 0
    for name, message in MISUSE.items():
        result = subprocess.run([program, name], capture_output=True, text=True)
        assert result.returncode == -signal.SIGABRT, (name, result.returncode)
        assert result.stderr.startswith(message), (name, result.stderr)
