"""The plain statement of the CPU's packed layout is the layout: what the CPU kernels packed comes back."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hybrid.kernels import cpu
from hybrid.kernels.gpu.formats import FORMATS
from hybrid.kernels.gpu.random_matrix import random_blocks
from hybrid.kernels.gpu.rearrange import REARRANGED
from hybrid.kernels.gpu.unpack import packed_bytes_of, unpack_blocks_torch
from hybrid.kernels.gpu.unpack_float import unpack_float_torch

FLOATS = {"F32": (0, torch.float32), "F16": (1, torch.float16), "BF16": (30, torch.bfloat16)}


def packed_by_the_cpu(ggml_type, batch, rows, cols, blocks):
    matrix = cpu.PackedMatrix(ggml_type, batch, rows, cols)
    pool = cpu.ThreadPool(1)
    for index in range(batch):
        matrix.pack_rows(pool, index, 0, rows, blocks[index].data_ptr())
    raw = (ctypes.c_uint8 * matrix.nbytes).from_address(matrix.address)
    return torch.from_numpy(np.ctypeslib.as_array(raw).copy())


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_cpu_packed_comes_back(name):
    fmt = FORMATS[name]
    batch, rows, cols = 2, 19, 512
    blocks = random_blocks(fmt, batch * rows * cols // fmt.block_cols, torch.Generator().manual_seed(2))
    blocks = blocks.reshape(batch, rows, -1, fmt.block_bytes)
    packed = packed_by_the_cpu(fmt.ggml_type, batch, rows, cols, blocks)
    assert torch.equal(unpack_blocks_torch(fmt, batch, rows, cols, packed), blocks)


@pytest.mark.parametrize("name", FLOATS)
def test_float_rows_that_the_cpu_packed_come_back(name):
    kind, dtype = FLOATS[name]
    values = torch.randn(2, 19, 70, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed = packed_by_the_cpu(kind, 2, 19, 70, values)
    assert torch.equal(unpack_float_torch(name, 2, 19, 70, packed)[0], values)


@pytest.mark.parametrize("name", sorted(set(REARRANGED) & {"IQ1_S", "IQ1_M"}))
def test_packed_rows_made_for_tests_are_what_the_cpu_packs(name):
    fmt = FORMATS[name]
    packed = packed_bytes_of(name, 1, 32, 512, torch.Generator().manual_seed(5))
    blocks = unpack_blocks_torch(fmt, 1, 32, 512, packed).contiguous()
    assert torch.equal(packed_by_the_cpu(fmt.ggml_type, 1, 32, 512, blocks), packed)
