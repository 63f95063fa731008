"""Cutting blocks of bytes into their fields, for many blocks at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


def f16_at(blocks: U8, offset: int) -> F32:
    """The float16 at a byte offset of each block, as ``float32`` [n, 1]."""
    return blocks[:, offset : offset + 2].view(np.float16).astype(np.float32)


def bit_fields(codes: U8, bits: int) -> U8:
    """Bytes [..., m] as fields of ``bits`` bits, [..., 8 // bits, m], the lowest bits first.

    That is the order of most formats: the low nibbles of 32 bytes are 32 weights in a row, the high
    nibbles the next 32.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (codes[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def flat(values: U8) -> U8:
    """[n, ...] as [n, everything else]."""
    return values.reshape(len(values), -1)


def k_scales(packed: U8) -> tuple[U8, U8]:
    """The eight 6-bit scales and minimums of Q4_K and Q5_K, each ``uint8`` [n, 8], from bytes [n, 12].

    Bytes 0-3 hold scales 0-3, bytes 4-7 minimums 0-3; the top two bits of each belong to scale or
    minimum 4-7, whose low four bits are the nibbles of bytes 8-11.
    """
    scales, mins, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    high_scales = (low & np.uint8(15)) | ((scales >> np.uint8(2)) & np.uint8(48))
    high_mins = (low >> np.uint8(4)) | ((mins >> np.uint8(2)) & np.uint8(48))
    mask = np.uint8(63)
    return np.hstack([scales & mask, high_scales]), np.hstack([mins & mask, high_mins])


def f16_bytes(values: F32) -> U8:
    """``float32`` [n, 1] as float16 bytes, [n, 2]. The values fit already."""
    return values.astype(np.float16).view(np.uint8)


def pack_fields(codes: U8, bits: int) -> U8:
    """The inverse of `bit_fields`: codes [..., 8 // bits, m] to bytes, flattened to [n, everything else]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return flat(np.bitwise_or.reduce(codes << shifts, axis=-2))


def pack_k_scales(scales: U8, mins: U8) -> U8:
    """The inverse of `k_scales`: two times ``uint8`` [n, 8] to bytes [n, 12]."""
    low = (scales[:, 4:] & np.uint8(15)) | (mins[:, 4:] << np.uint8(4))
    high_scales = (scales[:, 4:] & np.uint8(48)) << np.uint8(2)
    high_mins = (mins[:, 4:] & np.uint8(48)) << np.uint8(2)
    return np.hstack([scales[:, :4] | high_scales, mins[:, :4] | high_mins, low])
