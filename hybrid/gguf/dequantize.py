"""Quantised bytes to float32, in plain numpy: the reference for every kernel.

Bit-equal to the gguf package's `quants` module, whose order of float operations is kept. A decoder
takes blocks, ``uint8`` [n, block_bytes], and returns ``float32`` [n, block_size].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hybrid.gguf.dequantize_codebook import CODEBOOK_DECODERS
from hybrid.gguf.dequantize_k import K_DECODERS
from hybrid.gguf.fields import F32, U8, bit_fields, f16_at, flat
from hybrid.gguf.types import TRAITS, GGMLType, tensor_bytes

_PLAIN_DTYPES = {
    GGMLType.F32: "<f4",
    GGMLType.F16: "<f2",
    GGMLType.F64: "<f8",
    GGMLType.I8: "i1",
    GGMLType.I16: "<i2",
    GGMLType.I32: "<i4",
    GGMLType.I64: "<i8",
}
_WEIGHTS_AT_ONCE = 1 << 18  # about what the caches hold


def dequantize(data: U8, type: GGMLType, shape: tuple[int, ...]) -> F32:
    """The weights of a tensor.

    Args:
        data: the tensor's bytes, of any shape.
        type: a mainline type.
        shape: (..., rows, cols).

    Returns:
        ``float32`` of ``shape``, newly allocated.

    Raises:
        ValueError: ``data`` and ``shape`` do not match.
        NotImplementedError: no decoder for ``type``; the message names it.
    """
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    expected = tensor_bytes(type, shape)
    if raw.size != expected:
        raise ValueError(f"{type.name} of shape {shape} takes {expected} bytes, found {raw.size}")
    if type in _PLAIN_DTYPES:
        with np.errstate(over="ignore"):
            return raw.view(_PLAIN_DTYPES[type]).astype(np.float32).reshape(shape)
    if type not in DECODERS:
        raise NotImplementedError(f"no numpy decoder for tensor type {type.name}")
    traits, decode = TRAITS[type], DECODERS[type]
    blocks = raw.reshape(-1, traits.block_bytes)
    out = np.empty((len(blocks), traits.block_size), dtype=np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // traits.block_size)
    # Scales may be infinite or NaN in a damaged file; the result then says so without a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(shape)


def _bf16(blocks: U8) -> F32:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: U8) -> F32:
    q = flat(bit_fields(blocks[:, 2:], 4)).astype(np.int8) - np.int8(8)
    return f16_at(blocks, 0) * q.astype(np.float32)


def _q4_1(blocks: U8) -> F32:
    q = flat(bit_fields(blocks[:, 4:], 4)).astype(np.float32)
    return f16_at(blocks, 0) * q + f16_at(blocks, 2)


def _five_bits(high: U8, low: U8) -> U8:
    bits = np.unpackbits(high, axis=-1, bitorder="little")
    return flat(bit_fields(low, 4)) | (bits << np.uint8(4))


def _q5_0(blocks: U8) -> F32:
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:]).astype(np.int8) - np.int8(16)
    return f16_at(blocks, 0) * q.astype(np.float32)


def _q5_1(blocks: U8) -> F32:
    q = _five_bits(blocks[:, 4:8], blocks[:, 8:]).astype(np.float32)
    return f16_at(blocks, 0) * q + f16_at(blocks, 2)


def _q8_0(blocks: U8) -> F32:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * f16_at(blocks, 0)


DECODERS: dict[GGMLType, Callable[[U8], F32]] = {
    GGMLType.BF16: _bf16,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    **K_DECODERS,
    **CODEBOOK_DECODERS,
}

DEQUANTIZABLE: frozenset[GGMLType] = frozenset(DECODERS) | frozenset(_PLAIN_DTYPES)
"""Types `dequantize` accepts."""
