"""Random quantised matrices: every byte of a block random, its float16 fields finite and of one size."""

from __future__ import annotations

import torch
from hybrid.kernels.gpu.formats import FORMATS, Format, QuantizedMatrix, plane_starts, split_planes
from hybrid.kernels.gpu.op import Make


def random_blocks(fmt: Format, num_blocks: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 ``[num_blocks, block_bytes]``."""
    shape = (num_blocks, fmt.block_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    head = fmt.planes[3]
    halves = torch.randn(num_blocks, head.num_bytes // 2, generator=generator) * 0.01
    blocks[:, head.offset : head.offset + head.num_bytes] = halves.half().view(torch.uint8)
    return blocks


def random_matrix(make: Make, name: str, batch: int, rows: int, cols: int) -> QuantizedMatrix:
    """On ``meta`` a matrix without numbers."""
    fmt = FORMATS[name]
    num_blocks = batch * rows * cols // fmt.block_cols
    if not make.real:
        size = plane_starts(fmt, num_blocks)[-1]
        return QuantizedMatrix(
            fmt, batch, rows, cols, torch.empty(size, dtype=torch.uint8, device=make.device)
        )
    data = split_planes(fmt, random_blocks(fmt, num_blocks, make.generator))
    return QuantizedMatrix(fmt, batch, rows, cols, data.to(make.device))
