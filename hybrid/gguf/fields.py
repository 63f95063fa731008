"""Cutting blocks of bytes into their fields, for many blocks at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybrid.gguf.types import GGMLType

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]

F16_FIELDS: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
    GGMLType.Q1_0: (0,),
}
"""Byte offsets of the float16 fields of a block: the scale, then the offset or minimum scale if any.
IQ1_M has one too, in pieces (`iq1_m_scale`); MXFP4 and NVFP4 have scales of one byte."""


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


def iq1_m_scale(blocks: U8) -> U16:
    """The bits of IQ1_M's float16 scale, [n]: the top nibbles of the four u16 at byte 48, lowest first."""
    tops = blocks[:, 48:56].view(np.uint16) >> np.uint16(12)
    bits: U16 = np.bitwise_or.reduce(tops << np.array([0, 4, 8, 12], dtype=np.uint16), axis=1)
    return bits


def set_iq1_m_scale(blocks: U8, bits: U16) -> None:
    """Stores float16 bits [n]; the inverse of `iq1_m_scale`."""
    words = blocks[:, 48:56].view(np.uint16)
    nibbles = (bits[:, None] >> np.array([0, 4, 8, 12], dtype=np.uint16)) & np.uint16(15)
    words[...] = (words & np.uint16(0x0FFF)) | (nibbles << np.uint16(12))
