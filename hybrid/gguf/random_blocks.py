"""Random weights written straight as quantised blocks, for model files of any size.

Codes are random bits; scales are set so that the weights have mean zero and a wanted standard
deviation. Large requests repeat a pool of random bytes, which costs no more than copying it.
"""

from __future__ import annotations

import functools

import numpy as np

from hybrid.gguf.codebooks import MXFP4_VALUES
from hybrid.gguf.dequantize import dequantize
from hybrid.gguf.dequantize_codebook import half_e8m0, half_ue4m3
from hybrid.gguf.fields import F16_FIELDS, F32, U8, set_iq1_m_scale
from hybrid.gguf.types import TRAITS, GGMLType, row_bytes

_POOL_BYTES = 16 << 20
_POOL_NORMALS = 1 << 20
_POOL_SCALES = 1 << 16
_CALIBRATION_BLOCKS = 2048

# A second float16 field is this multiple of the first, so that random codes give mean zero: an added
# offset is minus half the code range, a minimum scale is half the code range (its 6 bits are as random).
_SECOND_FIELD = {
    GGMLType.Q4_1: -7.5,
    GGMLType.Q5_1: -15.5,
    GGMLType.Q2_K: 1.5,
    GGMLType.Q4_K: 7.5,
    GGMLType.Q5_K: 15.5,
}
_FLOATS = {GGMLType.F32, GGMLType.F16, GGMLType.BF16}
_BYTE_SCALES = {GGMLType.MXFP4: (1, 255, half_e8m0), GGMLType.NVFP4: (4, 127, half_ue4m3)}

RANDOM_TYPES: frozenset[GGMLType] = (
    frozenset(F16_FIELDS) | frozenset(_FLOATS) | frozenset(_BYTE_SCALES) | {GGMLType.IQ1_M}
)
"""Types `random_blocks` accepts."""


def random_blocks(
    type: GGMLType, n_rows: int, row_cols: int, rng: np.random.Generator, scale: float = 0.02
) -> U8:
    """Valid random rows of a tensor.

    Args:
        n_rows, row_cols: the rows and the weights in each.
        scale: standard deviation of the weights.

    Returns:
        ``uint8`` [n_rows, row_bytes].

    Raises:
        ValueError: ``row_cols`` does not fit the block size, or the scale does not fit the type.
        NotImplementedError: a type outside `RANDOM_TYPES`; the message names it.
    """
    if type not in RANDOM_TYPES:
        raise NotImplementedError(f"no random blocks for tensor type {type.name}")
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"the scale must be positive and finite, found {scale}")
    width = row_bytes(type, row_cols)
    if type in _FLOATS:
        return _random_floats(type, n_rows * row_cols, rng, scale).reshape(n_rows, width)
    blocks = _random_bytes(type, n_rows * width, rng).reshape(-1, TRAITS[type].block_bytes)
    if type in _BYTE_SCALES:
        _set_byte_scales(type, blocks, rng, scale)
    else:
        _set_f16_scales(type, blocks, rng, scale / _deviation(type))
    return blocks.reshape(n_rows, width)


def _random_bytes(type: GGMLType, size: int, rng: np.random.Generator) -> U8:
    words = -(-min(size, _POOL_BYTES) // 8)
    pool = rng.integers(0, 1 << 64, words, dtype=np.uint64).view(np.uint8)
    if type is GGMLType.TQ1_0:  # a byte of five trits is ceil(v * 256 / 243)
        pool = ((np.arange(256) % 243 * 256 + 242) // 243).astype(np.uint8)[pool]
    elif type is GGMLType.TQ2_0:  # four trits of two bits, none of them 3
        trits = np.arange(256)[:, None] >> np.array([0, 2, 4, 6]) & 3
        pool = ((trits % 3) << np.array([0, 2, 4, 6])).sum(axis=1).astype(np.uint8)[pool]
    return _tiled(pool, size, rng)


def _tiled(pool: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """``size`` elements of the pool, repeated; each repetition starts at a random place in it."""
    if size <= pool.size:
        return pool[:size]
    out = np.empty(size, dtype=pool.dtype)
    for start in range(0, size, pool.size):
        count = min(pool.size, size - start)
        turn = int(rng.integers(0, pool.size))
        head = min(count, pool.size - turn)
        out[start : start + head] = pool[turn : turn + head]
        out[start + head : start + count] = pool[: count - head]
    return out


def _random_floats(type: GGMLType, size: int, rng: np.random.Generator, scale: float) -> U8:
    values = rng.standard_normal(min(size, _POOL_NORMALS), dtype=np.float32) * np.float32(scale)
    if type is GGMLType.F32:
        return _tiled(values, size, rng).view(np.uint8)
    if type is GGMLType.F16:
        return _tiled(values.astype(np.float16), size, rng).view(np.uint8)
    return _tiled((values.view(np.uint32) >> 16).astype(np.uint16), size, rng).view(np.uint8)


def _set_f16_scales(type: GGMLType, blocks: U8, rng: np.random.Generator, unit: float) -> None:
    """Sets each block's scale to about ``unit``, of either sign where the format has no minimum."""
    second = _SECOND_FIELD.get(type)
    pool = rng.uniform(0.8, 1.25, min(len(blocks), _POOL_SCALES)) * unit
    if second is None or second < 0:
        pool *= rng.choice((-1.0, 1.0), pool.size)
    largest = np.abs(pool).max(initial=0) * max(1, abs(second or 1))
    if largest >= 65504 or (pool.size and np.abs(pool).min() < 2**-20):
        raise ValueError(f"{type.name} cannot hold block scales of about {unit:g}")
    first = _tiled(pool.astype(np.float16), len(blocks), rng)
    if type is GGMLType.IQ1_M:
        set_iq1_m_scale(blocks, first.view(np.uint16))
        return
    offsets = F16_FIELDS[type]
    blocks[:, offsets[0] : offsets[0] + 2].view(np.float16)[:, 0] = first
    if second is not None:
        blocks[:, offsets[1] : offsets[1] + 2].view(np.float16)[:, 0] = first * np.float16(second)


@functools.cache
def _deviation(type: GGMLType) -> float:
    """Standard deviation of the weights of random blocks whose scales are about 1."""
    rng = np.random.default_rng(0)
    traits = TRAITS[type]
    blocks = _random_bytes(type, _CALIBRATION_BLOCKS * traits.block_bytes, rng).reshape(
        -1, traits.block_bytes
    )
    _set_f16_scales(type, blocks, rng, 1.0)
    weights: F32 = dequantize(blocks, type, (_CALIBRATION_BLOCKS, traits.block_size))
    return float(np.sqrt(np.mean(np.square(weights, dtype=np.float64))))


def _set_byte_scales(type: GGMLType, blocks: U8, rng: np.random.Generator, scale: float) -> None:
    """Mixes the two neighbouring scale codes whose mean square is the wanted one."""
    count, codes, decode = _BYTE_SCALES[type]
    squares = np.square(decode(np.arange(codes, dtype=np.uint8)), dtype=np.float64)
    wanted = scale**2 / np.mean(np.square(MXFP4_VALUES, dtype=np.float64))
    upper = int(np.searchsorted(squares, wanted))
    if not 1 < upper < codes:  # code 0 is zero or next to it
        raise ValueError(f"{type.name} cannot hold weights of standard deviation {scale:g}")
    share = (wanted - squares[upper - 1]) / (squares[upper] - squares[upper - 1])
    pool = (upper - 1 + (rng.random(min(len(blocks) * count, _POOL_SCALES)) < share)).astype(np.uint8)
    blocks[:, :count] = _tiled(pool, len(blocks) * count, rng).reshape(-1, count)
