"""What a well-formed file may contain: value types, limits and names, for reader and writer alike."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

SUPPORTED_VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes, terminator included
MAX_KEY_BYTES = 65535  # GGUF specification
MAX_HEADER_BYTES = 1 << 30  # the largest published header takes about 20 MB
MAX_SHARDS = 9999
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT = 8  # GGUF specification: a multiple of 8
MAX_ALIGNMENT = 1 << 20
MAX_I64 = (1 << 63) - 1


class ValueType(IntEnum):
    """Types of metadata values as files store them."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: dict[ValueType, np.dtype[Any]] = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("u1"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
"""Storage of fixed-size values; a BOOL is a byte of 0 or 1."""


def key_problem(key: str) -> tuple[str, str, str] | None:
    """What is wrong with a metadata key (problem, expected, found), or None."""
    if not key:
        return "empty metadata key", "a name", "''"
    if len(key.encode()) > MAX_KEY_BYTES:
        return "metadata key is too long", f"at most {MAX_KEY_BYTES} bytes", f"{len(key.encode())}"
    if not key.isprintable():
        return "control character in a metadata key", "printable text", repr(key[:80])
    return None


def name_problem(name: str) -> tuple[str, str, str] | None:
    """What is wrong with a tensor name (problem, expected, found), or None."""
    if not name:
        return "empty tensor name", "a name", "''"
    if len(name.encode()) > MAX_NAME_BYTES:
        return "tensor name is too long", f"at most {MAX_NAME_BYTES} bytes", f"{len(name.encode())}"
    if not name.isprintable():
        return "control character in a tensor name", "printable text", repr(name)
    return None


def alignment_problem(value: object) -> tuple[str, str, str] | None:
    """What is wrong with `general.alignment` (problem, expected, found), or None."""
    if isinstance(value, bool) or not isinstance(value, int):
        return "wrong type of alignment", "an unsigned integer", type(value).__name__
    if not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
        return "impossible alignment", f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}", f"{value}"
    return None


def padded(size: int, alignment: int) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // alignment) * alignment
