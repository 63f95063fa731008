"""Decoders of the formats whose codes index a table.

Layouts: `block_iq2_xxs` to `block_iq4_xs`, `block_mxfp4`, `block_nvfp4` and `block_q1_0` in
llama.cpp's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hybrid.gguf import codebooks
from hybrid.gguf.fields import F32, U8, bit_fields, f16_at, flat, iq1_m_scale
from hybrid.gguf.types import GGMLType

_DELTA = np.float32(0.125)
_HALF, _QUARTER = np.float32(0.5), np.float32(0.25)


def _signs(bits: U8) -> F32:
    """Bytes [..., m] as signs [..., m, 8]: a set bit is -1."""
    bit = np.unpackbits(bits[..., None], axis=-1, bitorder="little")
    return np.where(bit == 0, np.float32(1), np.float32(-1))


def _four_sign_indices(words: npt.NDArray[np.uint32]) -> F32:
    """The four 7-bit sign indices of each word [n, m], as signs [n, m, 4, 8]."""
    shifts = np.array([0, 7, 14, 21], dtype=np.uint32)
    index = (words[..., None] >> shifts) & np.uint32(127)
    return _signs(codebooks.SIGN_BITS[index])


def _nibbles_in_turn(scales: U8) -> U8:
    """Bytes [n, m] as nibbles [n, 2 m], low before high of the same byte."""
    return np.stack([scales & np.uint8(15), scales >> np.uint8(4)], axis=-1).reshape(len(scales), -1)


def _iq2_xxs(blocks: U8) -> F32:
    """d, then 8 groups of 32 weights: four grid indices, and a word of four sign indices and a scale."""
    n = len(blocks)
    groups = blocks[:, 2:].reshape(n, 8, 8)
    words = groups[..., 4:].copy().view(np.uint32)[..., 0]
    d = f16_at(blocks, 0) * (_HALF + (words >> 28).astype(np.float32)) * _QUARTER
    grid: F32 = codebooks.IQ2_XXS_GRID[groups[..., :4]]
    return (d[..., None, None] * grid * _four_sign_indices(words)).reshape(n, 256)


def _iq2_xs(blocks: U8) -> F32:
    """d, qs u16[32] (9-bit grid index, 7-bit sign index), scales[8]."""
    n = len(blocks)
    codes = blocks[:, 2:66].view(np.uint16)
    d = f16_at(blocks, 0) * (_HALF + _nibbles_in_turn(blocks[:, 66:])) * _QUARTER
    grid: F32 = codebooks.IQ2_XS_GRID[codes & 511].reshape(n, 16, 2, 8)
    signs = _signs(codebooks.SIGN_BITS[codes >> 9]).reshape(n, 16, 2, 8)
    return (d[..., None, None] * grid * signs).reshape(n, 256)


def _iq2_s(blocks: U8) -> F32:
    """d, qs[32], signs[32], qh[8], scales[8]."""
    n = len(blocks)
    d = f16_at(blocks, 0) * (_HALF + _nibbles_in_turn(blocks[:, 74:])) * _QUARTER
    high = bit_fields(blocks[:, 66:74, None], 2).reshape(n, 32)
    index = blocks[:, 2:34] | (high.astype(np.uint16) << 8)
    grid: F32 = codebooks.IQ2_S_GRID[index].reshape(n, 16, 2, 8)
    return (d[..., None, None] * grid * _signs(blocks[:, 34:66]).reshape(n, 16, 2, 8)).reshape(n, 256)


def _iq3_xxs(blocks: U8) -> F32:
    """d, qs[64], 8 words of four sign indices and a scale."""
    n = len(blocks)
    words = blocks[:, 66:].view(np.uint32)
    d = f16_at(blocks, 0) * (_HALF + (words >> 28).astype(np.float32)) * _HALF
    grid: F32 = codebooks.IQ3_XXS_GRID[blocks[:, 2:66]].reshape(n, 8, 4, 8)
    return (d[..., None, None] * grid * _four_sign_indices(words)).reshape(n, 256)


def _iq3_s(blocks: U8) -> F32:
    """d, qs[64], qh[8], signs[32], scales[4]."""
    n = len(blocks)
    scales = 1 + 2 * _nibbles_in_turn(blocks[:, 106:])
    d = f16_at(blocks, 0) * scales.astype(np.float32)
    high = np.unpackbits(blocks[:, 66:74], axis=-1, bitorder="little")
    index = blocks[:, 2:66] | (high.astype(np.uint16) << 8)
    grid: F32 = codebooks.IQ3_S_GRID[index].reshape(n, 8, 4, 8)
    return (d[..., None, None] * grid * _signs(blocks[:, 74:106]).reshape(n, 8, 4, 8)).reshape(n, 256)


def _iq1_s(blocks: U8) -> F32:
    """d, qs[32], qh u16[8]: per 32 weights four 3-bit index tops, a 3-bit scale, the delta's sign."""
    n = len(blocks)
    high = blocks[:, 34:].view(np.uint16)
    d = f16_at(blocks, 0) * (2 * ((high >> 12) & 7) + 1).astype(np.float32)
    delta = np.where(high & np.uint16(0x8000), -_DELTA, _DELTA)
    tops = (high[..., None] >> np.array([0, 3, 6, 9], dtype=np.uint16)) & np.uint16(7)
    grid: F32 = codebooks.IQ1_S_GRID[blocks[:, 2:34].reshape(n, 8, 4) | (tops << 8)]
    return (d[..., None, None] * (grid + delta[..., None, None])).reshape(n, 256)


def _iq1_m(blocks: U8) -> F32:
    """qs[32], qh[16], scales u16[4]: four 3-bit scales each, the top nibbles together are the float16 d."""
    n = len(blocks)
    scales = blocks[:, 48:56].view(np.uint16)
    d = iq1_m_scale(blocks)[:, None].view(np.float16).astype(np.float32)
    threes = (scales[..., None] >> np.array([0, 3, 6, 9], dtype=np.uint16)) & np.uint16(7)
    dl = d * (2 * threes.reshape(n, 16) + 1).astype(np.float32)
    high = bit_fields(blocks[:, 32:48, None], 4).reshape(n, 32)
    delta = np.where(high & np.uint8(8), -_DELTA, _DELTA).reshape(n, 16, 2, 1)
    index = blocks[:, :32] | ((high & np.uint8(7)).astype(np.uint16) << 8)
    grid: F32 = codebooks.IQ1_S_GRID[index].reshape(n, 16, 2, 8)
    return (dl[..., None, None] * (grid + delta)).reshape(n, 256)


def _iq4_nl(blocks: U8) -> F32:
    """d, qs[16]."""
    return f16_at(blocks, 0) * codebooks.IQ4_NL_VALUES[flat(bit_fields(blocks[:, 2:], 4))]


def _iq4_xs(blocks: U8) -> F32:
    """d, scales_h u16, scales_l[4], qs[128]: 6-bit scales minus 32, one for 32 weights."""
    n = len(blocks)
    high = (blocks[:, 2:4].view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)) & np.uint16(3)
    scales = (_nibbles_in_turn(blocks[:, 4:8]) | (high << 4)).astype(np.int8) - np.int8(32)
    d = f16_at(blocks, 0) * scales.astype(np.float32)
    values = codebooks.IQ4_NL_VALUES[bit_fields(blocks[:, 8:].reshape(n, 8, 16), 4)]
    return (d[..., None, None] * values).reshape(n, 256)


def half_e8m0(exponents: U8) -> F32:
    """2^(e - 128): the scale of MXFP4, halved because its value table is doubled."""
    bits = exponents.astype(np.uint32)
    subnormal = np.uint32(0x00200000) << np.minimum(bits, 1)
    return np.where(bits < 2, subnormal, (bits - 1) << 23).astype(np.uint32).view(np.float32)


def _mxfp4(blocks: U8) -> F32:
    """e8m0 scale, qs[16]."""
    return half_e8m0(blocks[:, :1]) * codebooks.MXFP4_VALUES[flat(bit_fields(blocks[:, 1:], 4))]


def half_ue4m3(codes: U8) -> F32:
    """Unsigned e4m3, halved because the value table is doubled; 0x7f (NaN) counts as zero, as in ggml."""
    exponent = ((codes >> 3) & 15).astype(np.int32)
    mantissa = (codes & 7).astype(np.float32)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), normal) * _HALF
    return np.where(codes == 0x7F, np.float32(0), value).astype(np.float32)


def _nvfp4(blocks: U8) -> F32:
    """Four ue4m3 scales, qs[32]: 16 weights a scale, low nibbles before high."""
    n = len(blocks)
    values = codebooks.MXFP4_VALUES[bit_fields(blocks[:, 4:].reshape(n, 4, 8), 4).reshape(n, 4, 16)]
    return (half_ue4m3(blocks[:, :4])[..., None] * values).reshape(n, 64)


def _q1_0(blocks: U8) -> F32:
    """d, one sign bit a weight: set is +d."""
    return -f16_at(blocks, 0) * _signs(blocks[:, 2:]).reshape(len(blocks), 128)


CODEBOOK_DECODERS: dict[GGMLType, Callable[[U8], F32]] = {
    GGMLType.IQ2_XXS: _iq2_xxs,
    GGMLType.IQ2_XS: _iq2_xs,
    GGMLType.IQ2_S: _iq2_s,
    GGMLType.IQ3_XXS: _iq3_xxs,
    GGMLType.IQ3_S: _iq3_s,
    GGMLType.IQ1_S: _iq1_s,
    GGMLType.IQ1_M: _iq1_m,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.NVFP4: _nvfp4,
    GGMLType.Q1_0: _q1_0,
}
