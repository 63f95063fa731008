"""Encoders of the formats with 256 weights a block: scales of groups are themselves quantised.

Each group gets its best scale first; the block's float16 follows from the largest of them; the codes
are rounded last, against the scale as stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hybrid.gguf.fields import F32, U8, f16_bytes, flat, pack_fields, pack_k_scales
from hybrid.gguf.fit import IQ4_NL_GRID, f16_round, fit_affine, fit_grid, fit_integers, inverse, round_clip
from hybrid.gguf.types import GGMLType


def _signed_scales(scales: F32, low: int, high: int) -> tuple[F32, F32]:
    """Block scale [n, 1] and integers [n, groups] for the scales of the groups."""
    peak = np.take_along_axis(scales, np.abs(scales).argmax(axis=1, keepdims=True), axis=1)
    d = f16_round(peak / np.float32(low))
    return d, round_clip(scales * inverse(d), low, high)


def _scales_and_mins(x: F32, groups: int, code_max: int, scale_max: int) -> tuple[F32, F32, U8, U8, U8]:
    """d, dmin [n, 1]; scales, mins [n, groups]; codes [n, groups, width] of x ~ d*scale*q - dmin*min."""
    n = len(x)
    rows = x.reshape(n * groups, -1)
    d_group, low = fit_affine(rows, code_max, max_low=0.0)
    d_group, min_group = d_group.reshape(n, groups), -low.reshape(n, groups)
    d = f16_round(d_group.max(axis=1, keepdims=True) / np.float32(scale_max))
    dmin = f16_round(min_group.max(axis=1, keepdims=True) / np.float32(scale_max))
    scales = round_clip(d_group * inverse(d), 0, scale_max)
    mins = round_clip(min_group * inverse(dmin), 0, scale_max)
    step, offset = (d * scales)[..., None], (dmin * mins)[..., None]
    q = round_clip((x.reshape(n, groups, -1) + offset) * inverse(step), 0, code_max)
    return d, dmin, scales.astype(np.uint8), mins.astype(np.uint8), q.astype(np.uint8)


def _q2_k(x: F32) -> U8:
    d, dmin, scales, mins, q = _scales_and_mins(x, 16, 3, 15)
    codes = pack_fields(q.reshape(-1, 2, 4, 32), 2)
    return np.hstack([scales | (mins << np.uint8(4)), codes, f16_bytes(d), f16_bytes(dmin)])


def _q3_k(x: F32) -> U8:
    n = len(x)
    d, scales = _signed_scales(fit_integers(x.reshape(n * 16, 16), -4, 3).reshape(n, 16), -32, 31)
    step = (d * scales)[..., None]
    q = (round_clip(x.reshape(n, 16, 16) * inverse(step), -4, 3) + 4).astype(np.uint8)
    six = (scales + 32).astype(np.uint8)
    low = pack_fields((six & np.uint8(15)).reshape(n, 2, 8), 4)
    high = pack_fields((six >> np.uint8(4)).reshape(n, 4, 4), 2)
    mask = pack_fields((q >> np.uint8(2)).reshape(n, 8, 32), 1)
    codes = pack_fields((q & np.uint8(3)).reshape(n, 2, 4, 32), 2)
    return np.hstack([mask, codes, low, high, f16_bytes(d)])


def _q4_k(x: F32) -> U8:
    d, dmin, scales, mins, q = _scales_and_mins(x, 8, 15, 63)
    codes = pack_fields(q.reshape(-1, 4, 2, 32), 4)
    return np.hstack([f16_bytes(d), f16_bytes(dmin), pack_k_scales(scales, mins), codes])


def _q5_k(x: F32) -> U8:
    d, dmin, scales, mins, q = _scales_and_mins(x, 8, 31, 63)
    high = pack_fields(q >> np.uint8(4), 1)
    codes = pack_fields((q & np.uint8(15)).reshape(-1, 4, 2, 32), 4)
    return np.hstack([f16_bytes(d), f16_bytes(dmin), pack_k_scales(scales, mins), high, codes])


def _q6_k(x: F32) -> U8:
    n = len(x)
    d, scales = _signed_scales(fit_integers(x.reshape(n * 16, 16), -32, 31).reshape(n, 16), -128, 127)
    step = (d * scales)[..., None]
    q = (round_clip(x.reshape(n, 16, 16) * inverse(step), -32, 31) + 32).astype(np.uint8)
    low = pack_fields((q & np.uint8(15)).reshape(n, 2, 2, 64), 4)
    high = pack_fields((q >> np.uint8(4)).reshape(n, 2, 4, 32), 2)
    return np.hstack([low, high, scales.astype(np.int8).view(np.uint8), f16_bytes(d)])


def _iq4_xs(x: F32) -> U8:
    n = len(x)
    d, scales = _signed_scales(fit_grid(x.reshape(n * 8, 32), IQ4_NL_GRID).reshape(n, 8), -32, 31)
    step = (d * scales)[..., None]
    q = IQ4_NL_GRID.nearest(x.reshape(n, 8, 32) * inverse(step))
    six = (scales + 32).astype(np.uint8)
    low = (six[:, 0::2] & np.uint8(15)) | (six[:, 1::2] << np.uint8(4))
    tops = (six >> np.uint8(4)).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    high = np.bitwise_or.reduce(tops, axis=1, keepdims=True).view(np.uint8)
    return np.hstack([f16_bytes(d), high, low, pack_fields(q.reshape(n, 8, 2, 16), 4)])


def _trits(x: F32) -> tuple[F32, U8]:
    d = f16_round(np.abs(fit_integers(x, -1, 1)))
    return d, (round_clip(x * inverse(d), -1, 1) + 1).astype(np.uint8)


def _tq1_0(x: F32) -> U8:
    d, q = _trits(x)
    packed = []
    for start, digits, width in ((0, 5, 32), (160, 5, 16), (240, 4, 4)):
        trits = q[:, start : start + digits * width].reshape(-1, digits, width)
        powers = np.array([81, 27, 9, 3, 1], dtype=np.uint16)[:digits, None]
        number = (trits * powers).sum(axis=1, dtype=np.uint16)
        packed.append(((number * 256 + 242) // 243).astype(np.uint8))
    return np.hstack([*packed, f16_bytes(d)])


def _tq2_0(x: F32) -> U8:
    d, q = _trits(x)
    return np.hstack([flat(pack_fields(q.reshape(-1, 2, 4, 32), 2)), f16_bytes(d)])


K_ENCODERS: dict[GGMLType, Callable[[F32], U8]] = {
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
}
