"""The planner's table of formats against the kernels' own."""

from __future__ import annotations

import pytest
from hybrid.kernels import cpu
from hybrid.kernels.gpu.formats import FORMATS, plane_starts

from hybrid.gguf import GGMLType
from hybrid.placement import capabilities

ROWS = cpu.kernel_rows()
SHAPES = [(1, 16, 256), (1, 1, 512), (3, 17, 256), (2, 4096, 7168), (5, 31, 768)]


def test_formats_and_isas_are_those_of_the_kernel_table():
    types = {row["ggml_type"] for row in ROWS}
    table = {(type_, isa) for type_ in types for isa in cpu.isas() if cpu.has_kernel(type_, isa)}
    claimed = {
        (int(format_), isa)
        for format_ in GGMLType
        for isa in capabilities.ISAS
        if capabilities.can_multiply(format_, "cpu", isa)
    }
    assert claimed == table
    assert set(capabilities.ISAS) == set(cpu.isas())


def test_float_formats_and_blocks_are_those_of_the_kernel_table():
    for row in ROWS:
        format_ = GGMLType(row["ggml_type"])
        assert (format_ in capabilities.FLOAT_FORMATS) == (row["activation"] == "f32")
        assert capabilities.block_cols(format_) == row["block_cols"], format_.name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format_", sorted(capabilities.CPU_FORMATS), ids=lambda f: f.name)
def test_bytes_are_those_of_packed_matrices(format_, shape):
    packed = cpu.PackedMatrix(int(format_), *shape)
    assert capabilities.matrix_bytes(format_, "cpu", shape) == packed.nbytes


# Kernels multiply them, and loading does not make their planes yet, some of which have bits in another order.
NOT_LOADED = {
    *("Q4_1", "Q5_1", "MXFP4", "TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
}


def test_formats_of_gpus_are_those_of_their_kernels():
    assert {f.name for f in capabilities.CUDA_FORMATS} == {*FORMATS, "F32", "F16", "BF16"} - NOT_LOADED
    for name in FORMATS.keys() - NOT_LOADED:
        fmt = FORMATS[name]
        format_ = GGMLType[name]
        planes = tuple(field.num_bytes for field in fmt.planes if field is not None)
        assert capabilities.CUDA_PLANES[format_] == planes, name
        multiple = max(fmt.block_cols, fmt.unit_cols)
        assert capabilities.columns_problem(format_, "cuda", multiple) is None
        fits = capabilities.columns_problem(format_, "cuda", fmt.block_cols) is None
        assert fits == (fmt.block_cols == multiple), name
        for batch, rows, blocks in ((1, 1, 1), (3, 17, 5), (2, 4096, 28)):
            n_bytes = capabilities.matrix_bytes(format_, "cuda", (batch, rows, blocks * fmt.block_cols))
            assert n_bytes == plane_starts(fmt, batch * rows * blocks)[-1]


def test_bytes_elsewhere():
    assert capabilities.matrix_bytes(GGMLType.F16, "cuda", (2, 17, 255)) == 2 * 17 * 255 * 2 + 4
    assert capabilities.matrix_bytes(GGMLType.Q4_K, "fake", (2, 17, 256)) == 2 * 17 * 256 * 4
    assert capabilities.can_multiply(GGMLType.Q4_K, "cuda")
    assert not capabilities.can_multiply(GGMLType.IQ1_S, "cuda")
    assert not capabilities.can_multiply(GGMLType.IQ4_KS, "cpu", "avx2")
    assert not capabilities.can_multiply(GGMLType.Q4_K, "cpu", "neon")


@pytest.mark.parametrize("format_, n_bytes", [("f32", 2304), ("f16", 1152), ("bf16", 1152), ("q8_0", 612)])
def test_a_latent_cache_row(format_, n_bytes):
    assert capabilities.cache_row_bytes(576, format_) == n_bytes
