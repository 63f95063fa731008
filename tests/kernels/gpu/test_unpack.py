"""The plain statement of the CPU's packed layout is the layout: what the CPU kernels packed comes back."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hybrid.kernels import cpu
from hybrid.kernels.gpu.formats import FORMATS
from hybrid.kernels.gpu.random_matrix import random_blocks
from hybrid.kernels.gpu.unpack import unpack_blocks_torch


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_cpu_packed_comes_back(name):
    fmt = FORMATS[name]
    batch, rows, cols = 2, 19, 512
    blocks = random_blocks(fmt, batch * rows * cols // fmt.block_cols, torch.Generator().manual_seed(2))
    blocks = blocks.reshape(batch, rows, -1, fmt.block_bytes)
    matrix = cpu.PackedMatrix(fmt.ggml_type, batch, rows, cols)
    pool = cpu.ThreadPool(1)
    for index in range(batch):
        matrix.pack_rows(pool, index, 0, rows, blocks[index].data_ptr())
    raw = (ctypes.c_uint8 * matrix.nbytes).from_address(matrix.address)
    packed = torch.from_numpy(np.ctypeslib.as_array(raw).copy())
    assert torch.equal(unpack_blocks_torch(fmt, batch, rows, cols, packed), blocks)
