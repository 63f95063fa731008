"""ISA detection and choice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hybrid.kernels import cpu

pytestmark = pytest.mark.usefixtures("restored_isa")

KNOWN = ["scalar", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx"]
AVX2 = ["avx2", "fma", "f16c", "bmi2"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"]
NEEDS = {
    "scalar": [],
    "avx2": AVX2,
    "avxvnni": [*AVX2, "avxvnni"],
    "avx512vnni": AVX512,
    "avx512vbmi": [*AVX512, "avx512vbmi", "gfni"],
    "amx": [*AVX512, "avx512vbmi", "gfni", "amx_tile", "amx_int8"],
}


def cpuinfo_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())


def test_detection_agrees_with_the_kernel() -> None:
    flags = cpuinfo_flags()
    spelling = {"avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni", "avx512bf16": "avx512_bf16"}
    for name, present in cpu.cpu_features().items():
        assert present == (spelling.get(name, name) in flags), name


def test_supported_isas_follow_from_features() -> None:
    features = cpu.cpu_features()
    expected = [isa for isa in KNOWN if all(features[f] for f in NEEDS[isa])]
    assert cpu.supported_isas() == expected


def test_none_selects_the_best() -> None:
    cpu.select_isa("scalar")
    assert cpu.current_isa() == "scalar"
    assert cpu.select_isa(None) == cpu.current_isa() == cpu.supported_isas()[-1]


def test_every_supported_isa_can_be_selected() -> None:
    for isa in cpu.supported_isas():
        assert cpu.select_isa(isa) == cpu.current_isa() == isa


@pytest.mark.parametrize("name", ["", "AVX2", "avx512", "neon"])
def test_unknown_names_are_refused(name: str) -> None:
    before = cpu.current_isa()
    with pytest.raises(ValueError, match=r"unknown.*scalar"):
        cpu.select_isa(name)
    assert cpu.current_isa() == before


def test_unsupported_isas_are_refused() -> None:
    missing = [isa for isa in KNOWN if isa not in cpu.supported_isas()]
    if not missing:
        pytest.skip("this host supports every ISA")
    for isa in missing:
        with pytest.raises(ValueError, match="lacks"):
            cpu.select_isa(isa)


def test_physical_cores_are_usable() -> None:
    cores = cpu.physical_cores()
    assert cores == sorted(set(cores))
    assert cores
    assert set(cores) <= os.sched_getaffinity(0)
