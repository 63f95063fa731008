"""Encoding metadata values and header entries to bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrid.gguf.rules import DTYPES, ValueType
from hybrid.gguf.types import GGMLType

_ACCEPTED: dict[str, tuple[type, ...]] = {
    "b": (bool, np.bool_),
    "i": (int, np.integer),
    "u": (int, np.integer),
    "f": (int, float, np.integer, np.floating),
}
_OF_DTYPE = {dtype: kind for kind, dtype in DTYPES.items() if kind is not ValueType.BOOL}


def encode_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def encode_tensor(name: str, shape: tuple[int, ...], type_: GGMLType, offset: int) -> bytes:
    """An entry of the tensor index."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return encode_string(name) + dims + struct.pack("<IQ", type_, offset)


def encode_key_value(key: str, value: Any, type_: ValueType | None = None) -> bytes:
    """A metadata entry.

    Args:
        type_: how to store ``value``, or the elements of a sequence. Without it: ``bool`` as BOOL, ``int`` as
            the first of UINT32, INT32, UINT64, INT64 that holds it (sequences: INT32 first), ``float`` as
            FLOAT32, ``str`` as STRING, numpy arrays and scalars by their dtype.

    Raises:
        ValueError: the value does not fit the type, or no type follows from it.
    """
    if isinstance(value, str):
        if type_ not in (None, ValueType.STRING):
            raise ValueError(f"a str cannot be stored as {type_.name}")
        return encode_string(key) + struct.pack("<I", ValueType.STRING) + encode_string(value)
    if isinstance(value, np.ndarray | list | tuple):
        body = _encode_array(value, type_)
        return encode_string(key) + struct.pack("<I", ValueType.ARRAY) + body
    kind = _scalar_type(value) if type_ is None else type_
    return encode_string(key) + struct.pack("<I", kind) + _encode_scalars([value], kind)


def _scalar_type(value: Any) -> ValueType:
    if isinstance(value, bool | np.bool_):
        return ValueType.BOOL
    if isinstance(value, np.generic):
        return _type_of_dtype(value.dtype)
    if isinstance(value, int):
        kinds = ValueType.UINT32, ValueType.INT32, ValueType.UINT64, ValueType.INT64
        return _first_that_holds([value], kinds)
    if isinstance(value, float):
        return ValueType.FLOAT32
    raise ValueError(f"a value of type {type(value).__name__} cannot be stored")


def _type_of_dtype(dtype: np.dtype[Any]) -> ValueType:
    if dtype == np.bool_:
        return ValueType.BOOL
    kind = _OF_DTYPE.get(dtype.newbyteorder("<"))
    if kind is None:
        raise ValueError(f"values of dtype {dtype} cannot be stored")
    return kind


def _first_that_holds(values: Sequence[int], kinds: Sequence[ValueType]) -> ValueType:
    low, high = min(values), max(values)
    for kind in kinds:
        info = np.iinfo(DTYPES[kind])
        if info.min <= low and high <= info.max:
            return kind
    raise ValueError(f"{low} to {high} does not fit {' or '.join(kind.name for kind in kinds)}")


def _encode_array(values: Any, type_: ValueType | None) -> bytes:
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise ValueError(f"an array must have one dimension, found {values.ndim}")
    kind = _element_type(values) if type_ is None else type_
    if kind is ValueType.ARRAY:
        raise ValueError("nested arrays cannot be stored")
    if kind is ValueType.STRING:
        if not all(isinstance(value, str) for value in values):
            raise ValueError("an array of strings may hold nothing else")
        body = b"".join(map(encode_string, values))
    else:
        body = _encode_scalars(values, kind)
    return struct.pack("<IQ", kind, len(values)) + body


def _element_type(values: Any) -> ValueType:
    if isinstance(values, np.ndarray):
        return _type_of_dtype(values.dtype)
    if not values:
        raise ValueError("an empty list needs a type")
    kinds = {type(value) for value in values}
    if kinds == {str}:
        return ValueType.STRING
    if kinds == {bool}:
        return ValueType.BOOL
    if kinds == {int}:
        return _first_that_holds(
            values, (ValueType.INT32, ValueType.UINT32, ValueType.INT64, ValueType.UINT64)
        )
    if kinds <= {int, float}:
        return ValueType.FLOAT32
    raise ValueError(f"a list of {sorted(k.__name__ for k in kinds)} cannot be stored")


def _encode_scalars(values: Any, kind: ValueType) -> bytes:
    if kind in (ValueType.STRING, ValueType.ARRAY):
        raise ValueError(f"{values!r} cannot be stored as {kind.name}")
    elements = values.tolist() if isinstance(values, np.ndarray) else list(values)
    accepted = _ACCEPTED[DTYPES[kind].kind if kind is not ValueType.BOOL else "b"]
    for element in elements:
        is_bool = isinstance(element, bool | np.bool_)
        if not isinstance(element, accepted) or is_bool != (kind is ValueType.BOOL):
            raise ValueError(f"{element!r} cannot be stored as {kind.name}")
    dtype = DTYPES[kind]
    if dtype.kind in "iu" and elements:
        _first_that_holds(elements, (kind,))
    with np.errstate(over="ignore"):
        stored = np.array(elements, dtype=dtype)
    if dtype.kind == "f" and np.isinf(stored).sum() != sum(map(math.isinf, elements)):
        raise ValueError(f"a value does not fit {kind.name}")
    return stored.tobytes()
