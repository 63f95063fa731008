"""The kernel table: what it must hold, and that the lookups agree with it."""

from __future__ import annotations

from collections import Counter

import pytest
from hybrid.kernels import cpu

from hybrid.gguf import TRAITS, GGMLType

ISAS = ["scalar", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx"]
# Formats with kernels of their own on avx512vbmi.
VBMI = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0"]
# fmt: off
FORMATS = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
]
# fmt: on


FLOATS = ["F32", "F16", "BF16"]
OWN = {"avx512vbmi": VBMI, "amx": [name for name in FORMATS if name not in FLOATS]}


def test_every_format_has_a_kernel_on_every_isa() -> None:
    rows = Counter((row["format"], row["isa"]) for row in cpu.kernel_rows())
    expected = [(name, isa) for isa in ISAS for name in OWN.get(isa, FORMATS)]
    assert rows == Counter(expected)
    for name in FORMATS:
        for isa in ISAS:
            assert cpu.has_kernel(GGMLType[name], isa)


@pytest.mark.parametrize("name", FORMATS)
def test_what_an_isa_lacks_is_left_to_the_one_it_extends(name: str) -> None:
    activation = "f32" if name in FLOATS else "q8"
    isa = "avx512vbmi" if name in VBMI else "avx512vnni"
    assert cpu.kernel_name(GGMLType[name], "avx512vbmi") == f"dot_{name}_{activation}_16x8_{isa}"
    products = f"gemm_{name}_q8_16x16_amx"
    assert cpu.kernel_name(GGMLType[name], "amx") == (
        f"dot_{name}_f32_16x8_avx512vnni" if name in FLOATS else products
    )
    assert cpu.kernel_name(GGMLType[name], "avx2") == f"dot_{name}_{activation}_16x4_avx2"


def test_rows_describe_their_kernel() -> None:
    rows = cpu.kernel_rows()
    assert len({row["name"] for row in rows}) == len(rows) > 0
    for row in rows:
        kind = GGMLType(row["ggml_type"])
        assert kind.name == row["format"]
        floats = kind in (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
        assert row["activation"] == ("f32" if floats else "q8")
        assert floats or row["block_cols"] == TRAITS[kind].block_size
        kernel = "gemm" if row["isa"] == "amx" else "dot"
        assert row["name"] == f"{kernel}_{row['format']}_{row['activation']}_16x{row['tile']}_{row['isa']}"
        assert row["supported"] == (row["isa"] in cpu.supported_isas())
        assert cpu.has_kernel(row["ggml_type"], row["isa"])


def test_types_without_kernels() -> None:
    for kind in set(GGMLType) - {GGMLType[name] for name in FORMATS}:
        assert not any(cpu.has_kernel(int(kind), isa) for isa in ISAS), kind.name
        assert all(cpu.kernel_name(int(kind), isa) is None for isa in ISAS), kind.name
    with pytest.raises(ValueError, match="unknown"):
        cpu.has_kernel(0, "sse9")
