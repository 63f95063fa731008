"""Planes are a bijection, and the plain dequantisation is the gguf package's, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hybrid.kernels.gpu.dequantize_torch import BLOCKS, dequantize_blocks, magnitudes
from hybrid.kernels.gpu.formats import FORMATS, QuantizedMatrix, join_planes, split_planes
from hybrid.kernels.gpu.random_matrix import random_blocks


@pytest.mark.parametrize("name", FORMATS)
def test_dequantisation_is_that_of_gguf(name):
    fmt = FORMATS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert (fmt.ggml_type, (fmt.block_cols, fmt.block_bytes)) == (int(kind), gguf.GGML_QUANT_SIZES[kind])
    blocks = random_blocks(fmt, 300, torch.Generator().manual_seed(1))
    expected = gguf.quants.dequantize(blocks.numpy(), kind)
    found = dequantize_blocks(fmt, blocks)
    assert found.dtype is torch.float32
    np.testing.assert_array_equal(found.numpy().view(np.uint32), expected.view(np.uint32))
    assert bool((magnitudes(fmt, blocks) >= found.abs()).all())


def test_every_format_has_its_reference():
    assert set(BLOCKS) == set(FORMATS)


@pytest.mark.parametrize("num_blocks", [1, 7, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_planes_are_a_bijection(name, num_blocks):
    fmt = FORMATS[name]
    blocks = torch.randint(0, 256, (num_blocks, fmt.block_bytes), dtype=torch.uint8)
    data = split_planes(fmt, blocks)
    recoded = name.startswith("IQ1")
    assert fmt.block_bytes <= fmt.plane_bytes <= (1.17 if recoded else 1.0) * fmt.block_bytes
    assert num_blocks * fmt.plane_bytes <= len(data) < num_blocks * fmt.plane_bytes + 4 * 16
    assert torch.equal(join_planes(fmt, data, num_blocks), blocks)
    # Every bit of the file shows in the planes, and where nothing is coded anew as one bit.
    for byte in range(fmt.block_bytes):
        changed = blocks.clone()
        changed[-1, byte] ^= 1 << byte % 8
        differ = split_planes(fmt, changed) ^ data
        assert int((differ != 0).sum()) == 1 or recoded
        assert bool((differ != 0).any())


@pytest.mark.parametrize("name", FORMATS)
def test_halves_name_every_column_once(name):
    fmt = FORMATS[name]
    units = 8
    unit, h = torch.arange(units)[:, None], torch.arange(2)[None, :]
    halves = torch.cat([fmt.half.fn(unit, p, h).flatten() for p in range(fmt.parts)])
    assert torch.equal(halves.sort().values, torch.arange(units * fmt.unit_cols // 16))


def test_a_matrix_of_the_wrong_size_is_refused():
    fmt = FORMATS["Q4_K"]
    with pytest.raises(ValueError, match=r"Q4_K: expected a multiple of 256 columns, found 128"):
        QuantizedMatrix(fmt, 1, 2, 128, torch.zeros(144, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"Q4_K: expected 304 bytes, found \(144,\)"):
        QuantizedMatrix(fmt, 1, 2, 256, torch.zeros(144, dtype=torch.uint8))
