"""Random quantised matrices: every byte of a block random, its float16 fields finite and of one size."""

from __future__ import annotations

import torch
from hybrid.kernels.gpu.formats import FORMATS, Format, QuantizedMatrix, plane_starts, split_planes
from hybrid.kernels.gpu.op import Make
from hybrid.kernels.gpu.rearrange import REARRANGED

_HEADS = dict.fromkeys(REARRANGED, (0, 2))  # d of these blocks in the file


def random_blocks(fmt: Format, num_blocks: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 ``[num_blocks, block_bytes]``."""
    shape = (num_blocks, fmt.block_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    at, size = _HEADS.get(fmt.name, (fmt.planes[3].offset, fmt.planes[3].num_bytes))
    if size == 1:  # an exponent
        blocks[:, at] = torch.randint(118, 124, (num_blocks,), dtype=torch.uint8, generator=generator)
        return blocks
    halves = (torch.randn(num_blocks, size // 2, generator=generator) * 0.01).half().view(torch.uint8)
    if fmt.name == "IQ1_M":  # a nibble of d is the highest of each of four words
        nibbles = torch.stack((halves & 15, halves >> 4), -1).reshape(num_blocks, 4)
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | nibbles << 4
    else:
        blocks[:, at : at + size] = halves
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
