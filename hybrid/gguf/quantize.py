"""float32 to quantised bytes in plain numpy: round to nearest after a small search for each scale.

Meant for tests, the demo model and small tools; no importance weights, no code-book search. An
encoder takes ``float32`` [n, block_size] and returns ``uint8`` [n, block_bytes]; layouts are those of
the decoders in `dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hybrid.gguf.codebooks import MXFP4_VALUES
from hybrid.gguf.dequantize_codebook import half_e8m0
from hybrid.gguf.fields import F32, U8, f16_bytes, pack_fields
from hybrid.gguf.fit import IQ4_NL_GRID, f16_round, fit_affine, fit_grid, fit_integers, inverse, round_clip
from hybrid.gguf.quantize_k import K_ENCODERS
from hybrid.gguf.types import TRAITS, GGMLType

_CASTS = {GGMLType.F32: np.float32, GGMLType.F16: np.float16, GGMLType.F64: np.float64}
_WEIGHTS_AT_ONCE = 1 << 18
# No float16 scale of scales times its codes reaches this; larger values would overflow the search.
_FAR_TOO_LARGE = 65504.0 * 128 * 128


def quantize(values: npt.NDArray[np.floating], type: GGMLType) -> U8:
    """A tensor's bytes.

    Args:
        values: [..., cols], finite; converted to float32 first.
        type: one of `QUANTIZABLE`.

    Returns:
        ``uint8`` [..., row_bytes].

    Raises:
        ValueError: a value is not finite or too large, or ``cols`` does not fit the block size.
        NotImplementedError: no encoder for ``type``; the message names it.
    """
    if type not in QUANTIZABLE:
        raise NotImplementedError(f"no numpy encoder for tensor type {type.name}")
    rows = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(rows).all():
        raise ValueError(f"values that are not finite cannot be stored as {type.name}")
    traits = TRAITS[type]
    if rows.ndim == 0 or rows.shape[-1] % traits.block_size:
        raise ValueError(
            f"rows of shape {rows.shape} do not fill {traits.name}'s blocks of {traits.block_size}"
        )
    shape = (*rows.shape[:-1], rows.shape[-1] // traits.block_size * traits.block_bytes)
    if type in _CASTS:
        with np.errstate(over="ignore"):
            stored = rows.astype(_CASTS[type])
        if not np.isfinite(stored).all():
            raise ValueError(f"{np.abs(rows).max():g} is too large for {type.name}")
        return stored.view(np.uint8).reshape(shape)
    peak = np.abs(rows).max(initial=0)
    if peak > _FAR_TOO_LARGE and type not in (GGMLType.BF16, GGMLType.MXFP4):
        raise ValueError(f"{peak:g} is too large for {type.name}")
    blocks, encode = rows.reshape(-1, traits.block_size), _ENCODERS[type]
    out = np.empty((len(blocks), traits.block_bytes), dtype=np.uint8)
    step = max(1, _WEIGHTS_AT_ONCE // traits.block_size)
    for start in range(0, len(blocks), step):
        out[start : start + step] = encode(blocks[start : start + step])
    return out.reshape(shape)


def _bf16(x: F32) -> U8:
    """Round to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise ValueError(f"{np.abs(x).max():g} is too large for BF16")
    return rounded.astype(np.uint16).view(np.uint8)


def _q4_0(x: F32) -> U8:
    d = f16_round(fit_integers(x, -8, 7))
    q = round_clip(x * inverse(d), -8, 7) + 8
    return np.hstack([f16_bytes(d), pack_fields(q.astype(np.uint8).reshape(-1, 2, 16), 4)])


def _q4_1(x: F32) -> U8:
    d, low, q = _affine(x, 15)
    return np.hstack([f16_bytes(d), f16_bytes(low), pack_fields(q.reshape(-1, 2, 16), 4)])


def _five_bits(q: U8) -> U8:
    """qh[4], qs[16]."""
    high = np.packbits(q >> np.uint8(4), axis=-1, bitorder="little")
    return np.hstack([high, pack_fields((q & np.uint8(15)).reshape(-1, 2, 16), 4)])


def _q5_0(x: F32) -> U8:
    d = f16_round(fit_integers(x, -16, 15))
    q = round_clip(x * inverse(d), -16, 15) + 16
    return np.hstack([f16_bytes(d), _five_bits(q.astype(np.uint8))])


def _q5_1(x: F32) -> U8:
    d, low, q = _affine(x, 31)
    return np.hstack([f16_bytes(d), f16_bytes(low), _five_bits(q)])


def _affine(x: F32, high: int) -> tuple[F32, F32, U8]:
    d, low = fit_affine(x, high)
    d, low = f16_round(d), f16_round(low)
    return d, low, round_clip((x - low) * inverse(d), 0, high).astype(np.uint8)


def _q8_0(x: F32) -> U8:
    d = f16_round(np.abs(x).max(axis=1, keepdims=True) / np.float32(127))
    q = round_clip(x * inverse(d), -127, 127).astype(np.int8)
    return np.hstack([f16_bytes(d), q.view(np.uint8)])


def _iq4_nl(x: F32) -> U8:
    d = f16_round(fit_grid(x, IQ4_NL_GRID))
    return np.hstack([f16_bytes(d), pack_fields(IQ4_NL_GRID.nearest(x * inverse(d)).reshape(-1, 2, 16), 4)])


def _mxfp4(x: F32) -> U8:
    """The better of the two exponents between which the largest value meets the largest code."""
    peak = np.abs(x).max(axis=1, keepdims=True)
    exponent = np.floor(np.log2(np.maximum(peak, np.float32(1e-38)))).astype(np.int64) + 125
    middles = (MXFP4_VALUES[1:8] + MXFP4_VALUES[:7]) * np.float32(0.5)
    encoded = [_mxfp4_codes(x, exponent + more, middles) for more in (0, 1)]
    better = encoded[1][2] < encoded[0][2]
    e, q = (np.where(better, encoded[1][i], encoded[0][i]) for i in (0, 1))
    return np.hstack([e, pack_fields(q.reshape(-1, 2, 16), 4)]).astype(np.uint8)


def _mxfp4_codes(x: F32, exponent: npt.NDArray[np.int64], middles: F32) -> tuple[U8, U8, F32]:
    """Stored exponents [n, 1], codes [n, 32] and squared errors [n, 1]."""
    e = np.clip(exponent, 0, 254).astype(np.uint8)
    d = half_e8m0(e)
    q = np.searchsorted(middles, np.abs(x) / d).astype(np.uint8) | ((x < 0).astype(np.uint8) << 3)
    error: F32 = np.square(x - d * MXFP4_VALUES[q]).sum(axis=1, keepdims=True)
    return e, q.astype(np.uint8), error


_ENCODERS: dict[GGMLType, Callable[[F32], U8]] = {
    GGMLType.BF16: _bf16,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.MXFP4: _mxfp4,
    **K_ENCODERS,
}

QUANTIZABLE: frozenset[GGMLType] = frozenset(_ENCODERS) | frozenset(_CASTS)
"""Types `quantize` accepts."""
