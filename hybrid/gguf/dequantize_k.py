"""Decoders of the K formats and the ternary formats: 256 weights a block.

Layouts: `block_q2_K` to `block_q6_K`, `block_tq1_0`, `block_tq2_0` in llama.cpp's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hybrid.gguf.fields import F32, U8, bit_fields, f16_at, flat, k_scales
from hybrid.gguf.types import GGMLType


def _q2_k(blocks: U8) -> F32:
    """scales[16] (scale and minimum nibbles), qs[64], d, dmin."""
    n = len(blocks)
    scales = f16_at(blocks, 80) * (blocks[:, :16] & np.uint8(15)).astype(np.float32)
    mins = f16_at(blocks, 82) * (blocks[:, :16] >> np.uint8(4)).astype(np.float32)
    q = bit_fields(blocks[:, 16:80].reshape(n, 2, 32), 2).reshape(n, 16, 16).astype(np.float32)
    return (scales[..., None] * q - mins[..., None]).reshape(n, 256)


def _q3_k(blocks: U8) -> F32:
    """hmask[32], qs[64], scales[12] (16 of 6 bits), d. A clear mask bit subtracts 4."""
    n = len(blocks)
    packed = blocks[:, 96:108]
    low = flat(bit_fields(packed[:, :8], 4))
    high = flat(bit_fields(packed[:, 8:], 2))
    six = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    scales = f16_at(blocks, 108) * six.astype(np.float32)
    q = bit_fields(blocks[:, 32:96].reshape(n, 2, 32), 2).reshape(n, 16, 16).astype(np.int8)
    mask = bit_fields(blocks[:, :32], 1).reshape(n, 16, 16).astype(np.int8)
    q = q + mask * np.int8(4) - np.int8(4)
    return (scales[..., None] * q.astype(np.float32)).reshape(n, 256)


def _q4_k(blocks: U8) -> F32:
    """d, dmin, scales[12], qs[128]."""
    q = bit_fields(blocks[:, 16:].reshape(-1, 4, 32), 4)
    return _scale_and_min(blocks, q.reshape(-1, 8, 32))


def _q5_k(blocks: U8) -> F32:
    """d, dmin, scales[12], qh[32], qs[128]."""
    low = bit_fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    high = bit_fields(blocks[:, 16:48], 1)
    return _scale_and_min(blocks, low | (high << np.uint8(4)))


def _scale_and_min(blocks: U8, q: U8) -> F32:
    scales, mins = k_scales(blocks[:, 4:16])
    d = (f16_at(blocks, 0) * scales.astype(np.float32))[..., None]
    dmin = (f16_at(blocks, 2) * mins.astype(np.float32))[..., None]
    return (d * q.astype(np.float32) - dmin).reshape(len(blocks), 256)


def _q6_k(blocks: U8) -> F32:
    """ql[128], qh[64], scales int8[16], d."""
    n = len(blocks)
    scales = f16_at(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    low = bit_fields(blocks[:, :128].reshape(n, 2, 64), 4).reshape(n, 8, 32)
    high = bit_fields(blocks[:, 128:192].reshape(n, 2, 32), 2).reshape(n, 8, 32)
    q = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    return (scales[..., None] * q.reshape(n, 16, 16).astype(np.float32)).reshape(n, 256)


_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], dtype=np.uint8)[:, None]


def _tq1_0(blocks: U8) -> F32:
    """qs[48] (five trits a byte: 32 bytes, then 16), qh[4] (four trits a byte), d.

    A byte is ceil(v * 256 / 243) for a five-digit ternary v: multiplied by 3^k modulo 256, its top
    digit is the k-th.
    """
    pieces = (blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)
    bytes_ = np.hstack([flat(codes[:, None, :] * _POWERS_OF_3[:digits]) for codes, digits in pieces])
    q = ((bytes_.astype(np.uint16) * 3) >> 8).astype(np.int8) - np.int8(1)
    return f16_at(blocks, 52) * q.astype(np.float32)


def _tq2_0(blocks: U8) -> F32:
    """qs[64], d."""
    q = flat(bit_fields(blocks[:, :64].reshape(-1, 2, 32), 2)).astype(np.int8) - np.int8(1)
    return f16_at(blocks, 64) * q.astype(np.float32)


K_DECODERS: dict[GGMLType, Callable[[U8], F32]] = {
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
}
