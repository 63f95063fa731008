"""Parsing a GGUF header: magic, counts, metadata, tensor index.

The format is little-endian and unpadded (GGUF specification, versions 2 and 3):

    magic "GGUF", u32 version, u64 tensor count, u64 key count,
    keys:    string key, u32 value type, value
    tensors: string name, u32 dims, u64 extent of each (innermost first), u32 type, u64 offset
    zeros to a multiple of `general.alignment`, then tensor data; offsets count from there
    string = u64 bytes, UTF-8;  array = u32 element type, u64 count, elements
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hybrid.gguf.cursor import DAMAGED, Cursor
from hybrid.gguf.metadata import SMALLEST_KEY, read_metadata
from hybrid.gguf.rules import (
    DEFAULT_ALIGNMENT,
    MAX_DIMS,
    MAX_I64,
    SUPPORTED_VERSIONS,
    alignment_problem,
    name_problem,
    padded,
)
from hybrid.gguf.types import UNUSABLE_IDS, GGMLType, tensor_bytes

_FIXED_BYTES: Final = 24
_SMALLEST_TENSOR: Final = 8 + 1 + 4 + 8 + 4 + 8

_OTHER_FILES: Final = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint; convert it to GGUF first"),
    (b"GGML", "an old GGML file; convert it to GGUF first"),
    (b"ggml", "an old GGML file; convert it to GGUF first"),
    (b"lmgg", "an old GGML file; convert it to GGUF first"),
    (b"fmgg", "an old GGMF file; convert it to GGUF first"),
    (b"tjgg", "an old GGJT file; convert it to GGUF first"),
    (b"algg", "an old GGLA adapter; convert it to GGUF first"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"(\xb5/\xfd", "a zstd file; unpack it first"),
    (b"\x80\x02", "a Python pickle, perhaps a PyTorch checkpoint; convert it to GGUF first"),
    (b"\x89HDF", "an HDF5 file; convert it to GGUF first"),
    (b"<", "a web page or XML; the download went wrong"),
    (b"{", "a JSON file"),
    (b"\0\0\0\0", "zeros, as of a download that has not finished"),
)


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
    """A parsed header. Tensor data lies in the file from ``data_start`` to ``data_end``, less padding."""

    version: int
    metadata: dict[str, Any]
    tensors: list[RawTensor]
    data_start: int
    data_end: int


def parse_header(fd: int, path: Path, size: int, *, header_only: bool = False) -> Header:
    """Parses the header of an open file of ``size`` bytes; with ``header_only`` the data may be missing.

    Raises:
        GGUFError: with file, key or tensor, offset, expected and found.
    """
    cursor = Cursor(fd, path, size)
    version = _read_version(cursor)
    num_tensors = _read_count(cursor, "tensor count", _SMALLEST_TENSOR)
    num_keys = _read_count(cursor, "key count", SMALLEST_KEY)
    metadata = read_metadata(cursor, num_keys)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    problem = alignment_problem(alignment)
    if problem is not None:
        cursor.fail(problem[0], key="general.alignment", expected=problem[1], found=problem[2])
    tensors = _read_tensors(cursor, num_tensors)
    data_start = padded(cursor.pos, alignment)
    if tensors and not header_only:
        _check_padding(cursor, data_start)
    data_end = _check_offsets(cursor, tensors, alignment, data_start)
    if not header_only:
        _check_size(cursor, tensors, data_start)
    return Header(version, metadata, tensors, data_start, data_end)


def _read_version(cursor: Cursor) -> int:
    if cursor.size == 0:
        cursor.fail("the file is empty", expected="a GGUF file", found="0 bytes")
    cursor.require(min(cursor.size, _FIXED_BYTES), "the header")
    start = cursor.buffer[:_FIXED_BYTES]
    if start[:4] != b"GGUF"[: len(start)]:
        kind = next((kind for magic, kind in _OTHER_FILES if start.startswith(magic)), "not a GGUF file")
        if start[8:9] == b"{":
            kind = "a safetensors file; convert it to GGUF first"
        cursor.fail("wrong magic", expected=b"GGUF", found=start[:4], hint=f"This is {kind}.")
    cursor.require(_FIXED_BYTES, "the header")
    cursor.pos = 4
    version: int = cursor.scalar("<I", "the version")
    if version not in SUPPORTED_VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = "Convert it again with current software."
        if swapped in (1, *SUPPORTED_VERSIONS):
            hint = "This is a big-endian file; convert it to little-endian."
        cursor.fail("unsupported GGUF version", offset=4, expected="2 or 3", found=version, hint=hint)
    return version


def _read_count(cursor: Cursor, what: str, smallest: int) -> int:
    start = cursor.pos
    count: int = cursor.scalar("<Q", f"the {what}")
    room = cursor.left // smallest
    if count > room:
        expected = f"at most {room}, which is all that the file has room for"
        cursor.fail(f"impossible {what}", offset=start, expected=expected, found=count, hint=DAMAGED)
    return count


def _read_tensors(cursor: Cursor, count: int) -> list[RawTensor]:
    tensors: dict[str, RawTensor] = {}
    for _ in range(count):
        start = cursor.pos
        name = cursor.string("a tensor name")
        problem = name_problem(name)
        if problem is None and name in tensors:
            problem = "duplicate tensor name", "one entry", "two"
        if problem is not None:
            hint = None if name else "The tensor count may be too large: padding was read as a tensor."
            where = {"tensor": name[:80]} if name else {}
            cursor.fail(problem[0], offset=start, expected=problem[1], found=problem[2], hint=hint, **where)
        tensors[name] = _read_tensor(cursor, name)
    return list(tensors.values())


def _read_tensor(cursor: Cursor, name: str) -> RawTensor:
    start = cursor.pos
    num_dims = cursor.scalar("<I", "the number of dimensions", tensor=name)
    if not 1 <= num_dims <= MAX_DIMS:
        expected = f"1 to {MAX_DIMS}"
        cursor.fail(
            "impossible number of dimensions", tensor=name, offset=start, expected=expected, found=num_dims
        )
    start = cursor.pos
    dims = [cursor.scalar("<Q", "a dimension", tensor=name) for _ in range(num_dims)]
    if any(not 1 <= dim <= MAX_I64 for dim in dims):
        cursor.fail("impossible dimension", tensor=name, offset=start, expected="1 to 2^63 - 1", found=dims)
    if math.prod(dims) > MAX_I64:
        cursor.fail("too many elements", tensor=name, offset=start, expected="at most 2^63 - 1", found=dims)
    type_ = _read_type(cursor, name)
    shape = tuple(reversed(dims))
    try:
        n_bytes = tensor_bytes(type_, shape)
    except ValueError as error:
        cursor.fail(
            f"shape does not fit the type: {error}",
            tensor=name,
            offset=start,
            expected=f"whole blocks of {type_.name}",
            found=shape,
        )
    return RawTensor(name, shape, type_, n_bytes, cursor.scalar("<Q", "a tensor offset", tensor=name))


def _read_type(cursor: Cursor, name: str) -> GGMLType:
    start = cursor.pos
    number = cursor.scalar("<I", "a tensor type", tensor=name)
    try:
        return GGMLType(number)
    except ValueError:
        if number in UNUSABLE_IDS:
            hint = f"It is {UNUSABLE_IDS[number]}; quantise the model again with current software."
        else:
            hint = "The file was made by newer or other software, or is damaged."
        expected = "a type this version knows"
        cursor.fail(
            "unknown tensor type", tensor=name, offset=start, expected=expected, found=number, hint=hint
        )


def _check_padding(cursor: Cursor, data_start: int) -> None:
    """Catches a tensor count that is too small: the next entry would stand where zeros must be."""
    count = min(data_start, cursor.size) - cursor.pos
    cursor.require(count, "the padding")
    padding = cursor.buffer[cursor.pos : cursor.pos + count]
    if padding.strip(b"\0"):
        at = len(padding) - len(padding.lstrip(b"\0"))
        found, hint = repr(padding[at : at + 16]), "The tensor count may be too small."
        cursor.fail(
            "the padding before the tensor data is not zero",
            offset=cursor.pos + at,
            expected="zeros",
            found=found,
            hint=hint,
        )


def _check_offsets(cursor: Cursor, tensors: list[RawTensor], alignment: int, data_start: int) -> int:
    """Tensor data is contiguous in header order, each tensor padded to the alignment. Returns its end."""
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            problem = "tensor data leaves a gap after the tensor before"
            if tensor.offset % alignment:
                problem = f"tensor data is not aligned to {alignment} bytes"
            elif tensor.offset < expected:
                problem = "tensor data overlaps the tensor before"
            cursor.fail(
                problem,
                tensor=tensor.name,
                offset=data_start + tensor.offset,
                expected=f"tensor offset {expected}",
                found=tensor.offset,
            )
        expected = padded(tensor.offset + tensor.n_bytes, alignment)
    return data_start + expected


def _check_size(cursor: Cursor, tensors: list[RawTensor], data_start: int) -> None:
    for tensor in tensors:
        if data_start + tensor.offset + tensor.n_bytes > cursor.size:
            needed = data_start + tensors[-1].offset + tensors[-1].n_bytes
            hint = "The download is incomplete; resume it."
            if cursor.size <= data_start:
                hint = "It is a header without weights, for `hybrid plan` and `hybrid inspect`; "
                hint += "to run the model, take the whole file."
            cursor.fail(
                "the file ends before the tensor's data does",
                tensor=tensor.name,
                offset=data_start + tensor.offset,
                expected=f"a file of {needed} bytes",
                found=f"{cursor.size}: {needed - cursor.size} bytes are missing",
                hint=hint,
            )
