"""Parsing the metadata of a header: keys and their typed values."""

from __future__ import annotations

import struct
from typing import Any, Final, NoReturn

import numpy as np

from hybrid.gguf.cursor import Cursor
from hybrid.gguf.rules import DTYPES, ValueType, key_problem

MAX_ARRAY_STRINGS: Final = 1 << 24  # the largest published vocabularies are below 2^19
SMALLEST_KEY: Final = 8 + 1 + 4 + 1  # a key of one byte with a one-byte value

_STRUCT_CODES: Final = {
    "u1": "B", "i1": "b", "u2": "H", "i2": "h", "u4": "I", "i4": "i", "u8": "Q", "i8": "q",
    "f4": "f", "f8": "d",
}  # fmt: skip
_FORMATS: Final = {kind: "<" + _STRUCT_CODES[dtype.str[1:]] for kind, dtype in DTYPES.items()}


def read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    """Reads ``count`` entries; arrays of numbers become numpy arrays, arrays of strings lists."""
    metadata: dict[str, Any] = {}
    for _ in range(count):
        start = cursor.pos
        key = cursor.string("a metadata key")
        problem = key_problem(key)
        if problem is not None:
            hint = "The key count may be too large, so that other bytes were read as a key."
            cursor.fail(problem[0], offset=start, expected=problem[1], found=problem[2], hint=hint)
        if key in metadata:
            cursor.fail("duplicate metadata key", key=key, offset=start, expected="one entry", found="two")
        kind = _read_type(cursor, key, "value type")
        if kind is ValueType.ARRAY:
            metadata[key] = _read_array(cursor, key)
        elif kind is ValueType.STRING:
            metadata[key] = cursor.string("a string value", key=key)
        else:
            metadata[key] = _read_scalar(cursor, key, kind)
    return metadata


def _read_type(cursor: Cursor, key: str, what: str) -> ValueType:
    start = cursor.pos
    number = cursor.scalar("<I", f"a {what}", key=key)
    try:
        return ValueType(number)
    except ValueError:
        cursor.fail(f"unknown {what}", key=key, offset=start, expected="0 to 12", found=number)


def _read_scalar(cursor: Cursor, key: str, kind: ValueType) -> Any:
    start = cursor.pos
    value = cursor.scalar(_FORMATS[kind], "a value", key=key)
    if kind is not ValueType.BOOL:
        return value
    if value > 1:
        _bad_boolean(cursor, key, start, value)
    return bool(value)


def _bad_boolean(cursor: Cursor, key: str, offset: int, value: int) -> NoReturn:
    cursor.fail("a boolean is neither 0 nor 1", key=key, offset=offset, expected="0 or 1", found=value)


def _read_array(cursor: Cursor, key: str) -> Any:
    start = cursor.pos
    kind = _read_type(cursor, key, "array element type")
    if kind is ValueType.ARRAY:
        expected, found = "an array of numbers or strings", "an array of arrays"
        cursor.fail("nested arrays are not supported", key=key, offset=start, expected=expected, found=found)
    count = cursor.scalar("<Q", "an array's length", key=key)
    is_string = kind is ValueType.STRING
    element_bytes = 8 if is_string else DTYPES[kind].itemsize
    room = cursor.left // element_bytes
    if is_string:
        room = min(room, MAX_ARRAY_STRINGS)
    if count > room:
        cursor.fail(
            "impossible array length",
            key=key,
            offset=start + 4,
            expected=f"at most {room} elements",
            found=count,
        )
    return _read_strings(cursor, key, count) if is_string else _read_numbers(cursor, key, kind, count)


def _read_numbers(cursor: Cursor, key: str, kind: ValueType, count: int) -> np.ndarray[Any, Any]:
    dtype = DTYPES[kind]
    cursor.require(count * dtype.itemsize, "an array", key=key)
    values = np.frombuffer(cursor.buffer, dtype=dtype, count=count, offset=cursor.pos)
    if kind is ValueType.BOOL:
        wrong = np.flatnonzero(values > 1)
        if wrong.size:
            _bad_boolean(cursor, key, cursor.pos + int(wrong[0]), int(values[wrong[0]]))
        values = values.astype(np.bool_)
    else:
        values = values.copy()
    values.flags.writeable = False
    cursor.pos += count * dtype.itemsize
    return values


def _read_strings(cursor: Cursor, key: str, count: int) -> list[str]:
    """The hot loop of opening a file: vocabularies have 130,000 strings and as many merges."""
    strings: list[str] = []
    append = strings.append
    length_at = struct.Struct("<Q").unpack_from
    while len(strings) < count:
        buffer, pos = cursor.buffer, cursor.pos
        buffered = len(buffer)
        try:
            for _ in range(count - len(strings)):
                text = pos + 8
                if text > buffered:
                    break
                end = text + length_at(buffer, pos)[0]
                if end > buffered:
                    break
                append(buffer[text:end].decode())
                pos = end
        except UnicodeDecodeError:
            pass  # read again below, for the error with its place
        cursor.pos = pos
        if len(strings) < count:
            append(cursor.string(f"string {len(strings)} of an array", key=key))
    return strings
