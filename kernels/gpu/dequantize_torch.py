"""Plain dequantisation of GGUF blocks, the reference of every kernel that reads them.

Each function takes uint8 ``[n, block_bytes]`` and returns float32 ``(scaled, minimum)``, broadcastable to
``[n, block_cols]``: weights are their difference. Formulas and order of rounding: the gguf package's
`quants` module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hybrid.kernels.gpu.dequantize_codebook_torch import CODEBOOK_BLOCKS
from hybrid.kernels.gpu.formats import Format, QuantizedMatrix, join_planes
from hybrid.kernels.gpu.rearrange import trits_of

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice those of e2m1

_Pair = tuple[torch.Tensor, torch.Tensor]


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    return blocks[:, at : at + 2].clone().view(torch.float16).float()


def _shifted(values: torch.Tensor, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """``[n, k] -> [n, len(shifts), k]``, a row for each shift."""
    return (values[:, None].int() >> torch.tensor(shifts, device=values.device)[None, :, None]) & mask


def _plain(values: torch.Tensor) -> _Pair:
    return values, torch.zeros((), device=values.device)


def _q8_0(b: torch.Tensor) -> _Pair:
    return _plain(b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0))


def _q4_0(b: torch.Tensor) -> _Pair:
    return _plain((_shifted(b[:, 2:], (0, 4), 15).flatten(1) - 8).float() * _half(b, 0))


def _q5_0(b: torch.Tensor) -> _Pair:
    fifth = _shifted(b[:, 2:6], tuple(range(8)), 1).transpose(1, 2).flatten(1)
    return _plain((_shifted(b[:, 6:], (0, 4), 15).flatten(1) + 16 * fifth - 16).float() * _half(b, 0))


def _q4_1(b: torch.Tensor) -> _Pair:
    return _shifted(b[:, 4:], (0, 4), 15).flatten(1).float() * _half(b, 0), -_half(b, 2)


def _q5_1(b: torch.Tensor) -> _Pair:
    fifth = _shifted(b[:, 4:8], tuple(range(8)), 1).transpose(1, 2).flatten(1)
    return (_shifted(b[:, 8:], (0, 4), 15).flatten(1) + 16 * fifth).float() * _half(b, 0), -_half(b, 2)


def _mxfp4(b: torch.Tensor) -> _Pair:
    values = torch.tensor(MXFP4_VALUES, dtype=torch.float32, device=b.device)
    return _plain(
        values[_shifted(b[:, 1:], (0, 4), 15).flatten(1).long()] * 2.0 ** (b[:, :1].double() - 128).float()
    )


def _tq1_0(b: torch.Tensor) -> _Pair:
    return _plain((trits_of(b[:, :52])[:, :256].float() - 1) * _half(b, 52))


def _tq2_0(b: torch.Tensor) -> _Pair:
    q = _shifted(b[:, :64].reshape(-1, 32), (0, 2, 4, 6), 3).reshape(len(b), 256)
    return _plain((q.float() - 1) * _half(b, 64))


def _iq4(indices: torch.Tensor) -> torch.Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=indices.device)[indices.long()]


def _iq4_nl(b: torch.Tensor) -> _Pair:
    return _plain(_iq4(_shifted(b[:, 2:], (0, 4), 15).flatten(1)) * _half(b, 0))


def _iq4_xs(b: torch.Tensor) -> _Pair:
    n = len(b)
    low = _shifted(b[:, 4:8], (0, 4), 15).transpose(1, 2).flatten(1)
    high = _shifted(b[:, 2:4], (0, 2, 4, 6), 3).transpose(1, 2).flatten(1)
    scales = _half(b, 0) * (low + 16 * high - 32).float()
    indices = _shifted(b[:, 8:].reshape(n * 8, 16), (0, 4), 15).reshape(n, 8, 32)
    return _plain((scales[..., None] * _iq4(indices)).flatten(1))


def _scales_of_6_bits(b: torch.Tensor) -> _Pair:
    a, m, top = b[:, 4:8].int(), b[:, 8:12].int(), b[:, 12:16].int()
    scales = torch.cat((a & 63, (top & 15) | ((a >> 6) << 4)), 1)
    mins = torch.cat((m & 63, (top >> 4) | ((m >> 6) << 4)), 1)
    return (_half(b, 0) * scales.float())[..., None], (_half(b, 2) * mins.float())[..., None]


def _q4_k(b: torch.Tensor) -> _Pair:
    scales, mins = _scales_of_6_bits(b)
    q = _shifted(b[:, 16:].reshape(-1, 32), (0, 4), 15).reshape(len(b), 8, 32)
    return (scales * q.float()).flatten(1), mins.expand(-1, -1, 32).flatten(1)


def _q5_k(b: torch.Tensor) -> _Pair:
    scales, mins = _scales_of_6_bits(b)
    q = _shifted(b[:, 48:].reshape(-1, 32), (0, 4), 15).reshape(len(b), 8, 32)
    q = q + 16 * _shifted(b[:, 16:48], tuple(range(8)), 1)
    return (scales * q.float()).flatten(1), mins.expand(-1, -1, 32).flatten(1)


def _q6_k(b: torch.Tensor) -> _Pair:
    n = len(b)
    low = _shifted(b[:, :128].reshape(n * 2, 64), (0, 4), 15).reshape(n, 256)
    high = _shifted(b[:, 128:192].reshape(n * 2, 32), (0, 2, 4, 6), 3).reshape(n, 256)
    scales = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float()
    return _plain(((low + 16 * high - 32).reshape(n, 16, 16).float() * scales[..., None]).flatten(1))


def _q2_k(b: torch.Tensor) -> _Pair:
    n = len(b)
    q = _shifted(b[:, 16:80].reshape(n * 2, 32), (0, 2, 4, 6), 3).reshape(n, 16, 16)
    scales = _half(b, 80) * (b[:, :16] & 15).float()
    mins = _half(b, 82) * (b[:, :16] >> 4).float()
    return (scales[..., None] * q.float()).flatten(1), mins.repeat_interleave(16, 1)


def _q3_k(b: torch.Tensor) -> _Pair:
    n = len(b)
    low = _shifted(b[:, 32:96].reshape(n * 2, 32), (0, 2, 4, 6), 3).reshape(n, 256)
    third = _shifted(b[:, :32], tuple(range(8)), 1).reshape(n, 256)
    nibbles = _shifted(b[:, 96:104], (0, 4), 15).flatten(1)
    top = _shifted(b[:, 104:108], (0, 2, 4, 6), 3).flatten(1)
    scales = _half(b, 108) * (nibbles + 16 * top - 32).float()
    return _plain((scales[..., None] * (low + 4 * third - 4).reshape(n, 16, 16).float()).flatten(1))


BLOCKS: dict[str, Callable[[torch.Tensor], _Pair]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "MXFP4": _mxfp4,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    **CODEBOOK_BLOCKS,
}


def dequantize_blocks(fmt: Format, blocks: torch.Tensor) -> torch.Tensor:
    """Weights of uint8 ``[n, block_bytes]``: float32 ``[n, block_cols]``."""
    scaled, minimum = BLOCKS[fmt.name](blocks)
    return scaled - minimum


def magnitudes(fmt: Format, blocks: torch.Tensor) -> torch.Tensor:
    """``|scaled| + |minimum|``: what errors of products with the weights are in proportion to."""
    scaled, minimum = BLOCKS[fmt.name](blocks)
    return scaled.abs() + minimum.abs()


def dense(weight: QuantizedMatrix, *, magnitude: bool = False) -> torch.Tensor:
    """Weights, or `magnitudes` of them, as float32 ``[batch, rows, cols]``."""
    blocks = join_planes(weight.format, weight.data, weight.num_blocks)
    values = (magnitudes if magnitude else dequantize_blocks)(weight.format, blocks)
    return values.reshape(weight.batch, weight.rows, weight.cols)
