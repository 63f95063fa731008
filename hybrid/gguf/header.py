"""Parsing a GGUF header: magic, counts, metadata, tensor index.

The format is little-endian and unpadded (GGUF specification, version 2 and 3):

    magic "GGUF", u32 version, u64 tensor count, u64 key count,
    keys:    string key, u32 value type, value
    tensors: string name, u32 dims, u64 extent of each (innermost first), u32 type, u64 offset
    padding to `general.alignment`, then tensor data; offsets count from there
    string = u64 bytes, UTF-8;  array = u32 element type, u64 count, elements

Bytes come by pread, never through a mapping, so that a file cut short while it is read is an error
and not a signal. Every count and length is compared with the bytes that are left before it is used.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hybrid.errors import GGUFError
from hybrid.gguf.types import GGMLType, tensor_bytes

MAX_DIMS = 4
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes, terminator included
MAX_STRING_BYTES = 1 << 30
MAX_KEY_BYTES = 65535
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

_FIRST_READ = 16 << 20
_SMALLEST_KEY = 8 + 1 + 4 + 1  # a key of one byte with a one-byte value
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_MAX_I64 = (1 << 63) - 1

_SCALARS: dict[int, tuple[str, str]] = {
    0: ("<B", "u1"), 1: ("<b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("<B", "u1"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

_OTHER_FILES = {
    b"ggml": "an old GGML file",
    b"GGML": "an old GGML file",
    b"lmgg": "an old GGML file",
    b"ggjt": "an old GGJT file",
    b"tjgg": "an old GGJT file",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint",
    b"vers": "a Git LFS pointer: the file itself was not downloaded (`git lfs pull`)",
    b"FUGG": "a big-endian GGUF file",
}


@dataclass(frozen=True)
class RawTensor:
    """A tensor as the header states it: ``shape`` is (..., rows, cols), ``offset`` counts from the data."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    n_bytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    """A parsed header. ``data_start`` is where tensor data begins in the file."""

    version: int
    metadata: dict[str, Any]
    tensors: list[RawTensor]
    alignment: int
    data_start: int


class _Cursor:
    """Bounded reads from the start of a file, buffered in growing pieces."""

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self.fd, self.path, self.size = fd, path, size
        self.pos = 0
        self.buffer = b""

    def fail(self, problem: str, **details: Any) -> NoReturn:
        details.setdefault("offset", self.pos)
        raise GGUFError(problem, file=self.path, **details)

    def require(self, n: int, what: str, **details: Any) -> None:
        """Makes ``n`` bytes at ``pos`` available in the buffer."""
        end = self.pos + n
        if end > self.size:
            self.fail(
                f"the file ends within {what}",
                expected=f"{n} bytes",
                found=f"{self.size - self.pos} left",
                hint="The download is incomplete or the header is damaged.",
                **details,
            )
        while len(self.buffer) < end:
            wanted = min(self.size, max(end, 2 * len(self.buffer), _FIRST_READ))
            piece = os.pread(self.fd, wanted - len(self.buffer), len(self.buffer))
            if not piece:
                self.fail("the file shrank while it was read", offset=len(self.buffer))
            self.buffer += piece

    def scalar(self, fmt: str, what: str, **details: Any) -> Any:
        n = struct.calcsize(fmt)
        self.require(n, what, **details)
        (value,) = struct.unpack_from(fmt, self.buffer, self.pos)
        self.pos += n
        return value

    def string(self, what: str, limit: int = MAX_STRING_BYTES, **details: Any) -> str:
        start = self.pos
        length = self.scalar("<Q", f"the length of {what}", **details)
        if length > limit or length > self.size - self.pos:
            found = f"{length} bytes, {self.size - self.pos} left in the file"
            self.fail(
                f"{what} is too long", offset=start, expected=f"at most {limit} bytes", found=found, **details
            )
        self.require(length, what, **details)
        raw = self.buffer[self.pos : self.pos + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(
                f"{what} is not UTF-8",
                expected="UTF-8",
                found=repr(raw[error.start : error.start + 8]),
                **details,
            )
        self.pos += length
        return text


def parse_header(fd: int, path: Path, size: int, *, header_only: bool = False) -> Header:
    """Parses the header of an open file of ``size`` bytes; ``header_only`` files may lack the data.

    Raises:
        GGUFError: with file, key or tensor, offset, expected and found.
    """
    cursor = _Cursor(fd, path, size)
    version = _check_magic_and_version(cursor)
    num_tensors = _count(cursor, "tensor count", _SMALLEST_TENSOR)
    num_keys = _count(cursor, "key count", _SMALLEST_KEY)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key, value = _read_key(cursor, metadata)
        metadata[key] = value
    alignment = _alignment(cursor, metadata)
    tensors = _read_tensors(cursor, num_tensors)
    data_start = -(-cursor.pos // alignment) * alignment
    _check_offsets(cursor, tensors, alignment, data_start, None if header_only else size)
    return Header(version, metadata, tensors, alignment, data_start)


def _check_magic_and_version(cursor: _Cursor) -> int:
    if cursor.size == 0:
        cursor.fail("the file is empty", expected="a GGUF file", found="0 bytes")
    cursor.require(min(cursor.size, 24), "the header")
    magic = cursor.buffer[:4]
    if magic != b"GGUF":
        kind = _OTHER_FILES.get(magic) or _OTHER_FILES.get(magic[:4].lower())
        if kind is None and cursor.buffer[8:10] == b'{"':
            kind = "a safetensors file"
        hint = f"This is {kind}." if kind else "This is not a GGUF file."
        cursor.fail("wrong magic", offset=0, expected="b'GGUF'", found=repr(magic), hint=hint)
    cursor.require(24, "the header")
    cursor.pos = 4
    version: int = cursor.scalar("<I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = "This is a big-endian file; convert it to little-endian." if swapped in (1, 2, 3) else None
        cursor.fail("unsupported GGUF version", offset=4, expected="2 or 3", found=version, hint=hint)
    return version


def _count(cursor: _Cursor, what: str, smallest: int) -> int:
    start = cursor.pos
    count: int = cursor.scalar("<Q", f"the {what}")
    room = (cursor.size - cursor.pos) // smallest
    if count > room:
        cursor.fail(
            f"impossible {what}",
            offset=start,
            expected=f"at most {room}, by the size of the file",
            found=count,
        )
    return count


def _read_key(cursor: _Cursor, known: dict[str, Any]) -> tuple[str, Any]:
    start = cursor.pos
    key = cursor.string("a metadata key", MAX_KEY_BYTES)
    if not key:
        hint = "The key count may be too large, so that padding was read as a key."
        cursor.fail("empty metadata key", offset=start, expected="a name", found="''", hint=hint)
    if key in known:
        cursor.fail("duplicate metadata key", key=key, offset=start, expected="one entry", found="two")
    type_offset = cursor.pos
    type_id = cursor.scalar("<I", "a value type", key=key)
    if type_id in _SCALARS:
        return key, _read_scalar(cursor, type_id, key)
    if type_id == _STRING:
        return key, cursor.string("a string value", key=key)
    if type_id == _ARRAY:
        return key, _read_array(cursor, key)
    cursor.fail("unknown value type", key=key, offset=type_offset, expected="0 to 12", found=type_id)


def _read_scalar(cursor: _Cursor, type_id: int, key: str) -> Any:
    start = cursor.pos
    value = cursor.scalar(_SCALARS[type_id][0], "a value", key=key)
    if type_id == _BOOL:
        if value > 1:
            cursor.fail("a boolean is neither 0 nor 1", key=key, offset=start, expected="0 or 1", found=value)
        return bool(value)
    return value


def _read_array(cursor: _Cursor, key: str) -> Any:
    start = cursor.pos
    element = cursor.scalar("<I", "an array's element type", key=key)
    count = cursor.scalar("<Q", "an array's length", key=key)
    if element == _ARRAY:
        cursor.fail(
            "nested arrays are not supported",
            key=key,
            offset=start,
            expected="scalars or strings",
            found="arrays",
        )
    if element != _STRING and element not in _SCALARS:
        cursor.fail("unknown array element type", key=key, offset=start, expected="0 to 12", found=element)
    smallest = 8 if element == _STRING else np.dtype(_SCALARS[element][1]).itemsize
    room = (cursor.size - cursor.pos) // smallest
    if count > room:
        cursor.fail("impossible array length", key=key, offset=start, expected=f"at most {room}", found=count)
    if element == _STRING:
        return _read_strings(cursor, key, count)
    cursor.require(count * smallest, "an array", key=key)
    values = np.frombuffer(cursor.buffer, dtype=_SCALARS[element][1], count=count, offset=cursor.pos)
    cursor.pos += count * smallest
    if element == _BOOL:
        if values.size and values.max() > 1:
            cursor.fail(
                "a boolean is neither 0 nor 1",
                key=key,
                offset=start,
                expected="0 or 1",
                found=int(values.max()),
            )
        return values.astype(bool)
    return values.copy()


def _read_strings(cursor: _Cursor, key: str, count: int) -> list[str]:
    """The hot loop of opening a file: vocabularies have 130,000 strings and as many merges."""
    strings: list[str] = []
    append = strings.append
    unpack = struct.Struct("<Q").unpack_from
    while len(strings) < count:
        buffer, pos = cursor.buffer, cursor.pos
        usable = len(buffer) - 8
        try:
            for _ in range(count - len(strings)):
                if pos > usable:
                    break
                end = pos + 8 + unpack(buffer, pos)[0]
                if end > usable + 8:
                    break
                append(buffer[pos + 8 : end].decode())
                pos = end
        except UnicodeDecodeError:
            pass  # read once more below, for the error with its place
        cursor.pos = pos
        if len(strings) < count:
            append(cursor.string(f"string {len(strings)} of an array", key=key))
    return strings


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    key = "general.alignment"
    value = metadata.get(key, DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int):
        cursor.fail(
            "wrong type of alignment", key=key, expected="an unsigned integer", found=type(value).__name__
        )
    if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        cursor.fail(
            "impossible alignment", key=key, expected=f"a power of two from 8 to {MAX_ALIGNMENT}", found=value
        )
    return value


def _read_tensors(cursor: _Cursor, count: int) -> list[RawTensor]:
    tensors: list[RawTensor] = []
    names: set[str] = set()
    for _ in range(count):
        start = cursor.pos
        tensor = _read_tensor(cursor)
        if tensor.name in names:
            cursor.fail(
                "duplicate tensor name", tensor=tensor.name, offset=start, expected="one entry", found="two"
            )
        names.add(tensor.name)
        tensors.append(tensor)
    return tensors


def _read_tensor(cursor: _Cursor) -> RawTensor:
    start = cursor.pos
    name = cursor.string("a tensor name", MAX_KEY_BYTES)
    fail: Callable[..., NoReturn] = cursor.fail
    if not name:
        hint = "The tensor count may be too large, so that padding was read as a tensor."
        fail("empty tensor name", offset=start, expected="a name", found="''", hint=hint)
    if len(name.encode()) > MAX_NAME_BYTES:
        found = f"{len(name.encode())}"
        fail(
            "tensor name too long",
            tensor=name[:80],
            offset=start,
            expected=f"at most {MAX_NAME_BYTES} bytes",
            found=found,
        )
    if not name.isprintable():
        fail(
            "control character in a tensor name",
            tensor=name,
            offset=start,
            expected="printable text",
            found=repr(name),
        )
    at = cursor.pos
    num_dims = cursor.scalar("<I", "the number of dimensions", tensor=name)
    if not 1 <= num_dims <= MAX_DIMS:
        fail(
            "impossible number of dimensions",
            tensor=name,
            offset=at,
            expected=f"1 to {MAX_DIMS}",
            found=num_dims,
        )
    at = cursor.pos
    dims = [cursor.scalar("<Q", "a dimension", tensor=name) for _ in range(num_dims)]
    if any(not 1 <= dim <= _MAX_I64 for dim in dims):
        fail("impossible dimension", tensor=name, offset=at, expected="1 to 2^63 - 1", found=dims)
    if math.prod(dims) > _MAX_I64:
        fail("too many elements", tensor=name, offset=at, expected="at most 2^63 - 1", found=math.prod(dims))
    at = cursor.pos
    type_id = cursor.scalar("<I", "a tensor type", tensor=name)
    try:
        type_ = GGMLType(type_id)
    except ValueError:
        hint = "The file was made by newer or other software."
        fail(
            "unknown tensor type",
            tensor=name,
            offset=at,
            expected="a known ggml type",
            found=type_id,
            hint=hint,
        )
    shape = tuple(reversed(dims))
    try:
        n_bytes = tensor_bytes(type_, shape)
    except ValueError as error:
        fail(
            f"shape does not fit the type: {error}",
            tensor=name,
            offset=start,
            expected=type_.name,
            found=f"{dims}",
        )
    offset = cursor.scalar("<Q", "a tensor offset", tensor=name)
    return RawTensor(name, shape, type_, n_bytes, offset)


def _check_offsets(
    cursor: _Cursor, tensors: list[RawTensor], alignment: int, data_start: int, size: int | None
) -> None:
    """Tensor data is contiguous in header order, each tensor padded to the alignment."""
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            problem = "tensor data is not where it belongs"
            if tensor.offset % alignment:
                problem = "tensor data is not aligned"
            elif tensor.offset < expected:
                problem = "tensor data overlaps the tensor before"
            cursor.fail(
                problem,
                tensor=tensor.name,
                offset=data_start + tensor.offset,
                expected=expected,
                found=tensor.offset,
            )
        end = data_start + tensor.offset + tensor.n_bytes
        if size is not None and end > size:
            cursor.fail(
                "the file ends before the tensor's data",
                tensor=tensor.name,
                offset=data_start + tensor.offset,
                expected=f"{end} bytes",
                found=f"{size}, {end - size} missing",
                hint="The download is incomplete.",
            )
        expected = -(-(tensor.offset + tensor.n_bytes) // alignment) * alignment
