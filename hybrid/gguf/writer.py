"""Writing GGUF files of any size with nothing of them kept in memory.

Declare metadata and tensors, then write the tensors' bytes in the declared order:

    with GGUFWriter("model.gguf") as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        writer.add_tensor("output.weight", (rows, cols), GGMLType.Q8_0)
        writer.write_tensor("output.weight", chunks)

Bytes go to a hidden file beside the target, which `close` renames; whatever goes wrong before that
leaves the target as it was and removes the hidden file.
"""

from __future__ import annotations

import contextlib
import os
import struct
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from hybrid.errors import GGUFError
from hybrid.gguf.encode import encode_key_value, encode_tensor
from hybrid.gguf.rules import (
    DEFAULT_ALIGNMENT,
    MAX_DIMS,
    MAX_SHARDS,
    ValueType,
    alignment_problem,
    key_problem,
    name_problem,
    padded,
)
from hybrid.gguf.types import GGMLType, tensor_bytes

BytesLike = bytes | bytearray | memoryview | npt.NDArray[Any]
_RESERVED_KEYS = frozenset({"split.no", "split.count", "split.tensors.count"})


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    type: GGMLType
    n_bytes: int


class GGUFWriter:
    """A file, or a split one, being written.

    Args:
        path: the file to make. A split model's shards are named ``<stem>-00001-of-0000N.gguf`` after it.
        split_max_bytes: begin a new shard before a tensor that would make the shard's data larger than this.
        header_only: write headers and no tensor data; such a file opens with ``header_only=True`` alone.

    Attributes:
        paths: the finished files; known once the first tensor is written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        split_max_bytes: int | None = None,
        header_only: bool = False,
    ) -> None:
        self.path = Path(path)
        self.paths: list[Path] = []
        self._split_max_bytes = split_max_bytes
        self._header_only = header_only
        self._metadata: dict[str, bytes] = {}
        self._alignment = DEFAULT_ALIGNMENT
        self._tensors: dict[str, _Tensor] = {}
        self._shards: list[list[_Tensor]] = []
        self._pending: Iterator[tuple[int, _Tensor]] = iter(())
        self._next: tuple[int, _Tensor] | None = None
        self._files: dict[int, FileIO] = {}
        self._state = "declaring"
        self._hidden: list[Path] = []
        self._remove_hidden = weakref.finalize(self, _remove_all, self._hidden)

    def add_metadata(self, key: str, value: Any, type: ValueType | None = None) -> None:
        """Adds a key; see `encode_key_value` for how a value without ``type`` is stored.

        Raises:
            GGUFError: the key is malformed or known already, or the value cannot be stored.
        """
        self._require("declaring", "metadata comes before tensor data", key=key)
        problem = key_problem(key)
        if problem is None and key in self._metadata:
            problem = "duplicate metadata key", "one entry", "two"
        if problem is None and key in _RESERVED_KEYS:
            problem = "the writer itself sets this key", "another key", repr(key)
        if problem is None and key == "general.alignment":
            problem = alignment_problem(value)
            type, self._alignment = ValueType.UINT32, value
        if problem is not None:
            self._fail(problem[0], key=key, expected=problem[1], found=problem[2])
        try:
            self._metadata[key] = encode_key_value(key, value, type)
        except (ValueError, OverflowError) as error:
            self._fail(f"metadata cannot be stored: {error}", key=key)

    def add_tensor(self, name: str, shape: tuple[int, ...], type: GGMLType) -> None:
        """Declares a tensor; ``shape`` is (..., rows, cols).

        Raises:
            GGUFError: the name is malformed or known already, or the shape does not fit the type.
        """
        self._require("declaring", "all tensors are declared before the first is written", tensor=name)
        problem = name_problem(name)
        if problem is None and name in self._tensors:
            problem = "duplicate tensor name", "one entry", "two"
        if problem is None and not (1 <= len(shape) <= MAX_DIMS and all(dim >= 1 for dim in shape)):
            problem = "impossible shape", f"1 to {MAX_DIMS} dimensions of at least 1", f"{shape}"
        if problem is not None:
            self._fail(problem[0], tensor=name, expected=problem[1], found=problem[2])
        try:
            n_bytes = tensor_bytes(type, shape)
        except ValueError as error:
            self._fail(f"shape does not fit the type: {error}", tensor=name, expected=type.name, found=shape)
        self._tensors[name] = _Tensor(name, tuple(shape), type, n_bytes)

    def write_tensor(self, name: str, data: BytesLike | Iterable[BytesLike]) -> None:
        """Writes all bytes of the next declared tensor, given at once or in chunks of any size.

        Raises:
            GGUFError: another tensor is next, the file is to have no data, the number of bytes is wrong, or
                the disk is full. Once bytes of the tensor may be in the file, an error drops the file.
        """
        if self._header_only:
            self._fail("a header-only file holds no tensor data", tensor=name)
        if self._state == "declaring":
            self._begin()
        self._require("writing", "no tensor can be written any more", tensor=name)
        if self._next is None or self._next[1].name != name:
            wanted = "no more tensors" if self._next is None else repr(self._next[1].name)
            self._fail("tensors must be written in the declared order", expected=wanted, found=repr(name))
        chunks = [data] if isinstance(data, bytes | bytearray | memoryview | np.ndarray) else data
        try:
            self._write_chunks(*self._next, chunks)
        except BaseException:
            self.abort()
            self._state = "failed"
            raise
        self._next = next(self._pending, None)

    def _write_chunks(self, shard: int, tensor: _Tensor, chunks: Iterable[BytesLike]) -> None:
        """The bytes of a tensor and its padding."""
        written = 0
        for chunk in chunks:
            view = np.ascontiguousarray(chunk).data if isinstance(chunk, np.ndarray) else memoryview(chunk)
            written += view.nbytes
            if written > tensor.n_bytes:
                self._wrong_size(tensor, f"at least {written}")
            self._write(shard, view.cast("B") if view.nbytes else b"")
        if written != tensor.n_bytes:
            self._wrong_size(tensor, str(written))
        self._write(shard, bytes(padded(written, self._alignment) - written))

    def close(self) -> None:
        """Finishes the file and gives it its name. Does nothing after `close` or `abort`.

        Raises:
            GGUFError: tensors are missing, one of them failed, or the disk is full. Nothing is left on disk
                then.
        """
        if self._state in ("closed", "aborted"):
            return
        if self._state == "failed":
            self._fail("a tensor could not be written, so there is no file")
        try:
            if self._state == "declaring":
                self._begin()
            if self._next is not None and not self._header_only:
                self._fail("tensor was never written", tensor=self._next[1].name)
            with self._disk():
                for file in self._files.values():
                    os.fsync(file.fileno())  # a crash after the rename must not leave an empty file
                    file.close()
                for hidden, path in zip(self._hidden, self.paths, strict=True):
                    hidden.replace(path)
        except BaseException:
            self.abort()
            raise
        self._remove_hidden.detach()
        self._state = "closed"

    def abort(self) -> None:
        """Drops everything written so far. Does nothing after `close`."""
        if self._state in ("closed", "failed"):
            return
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._remove_hidden()
        self._state = "aborted"

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _begin(self) -> None:
        """Divides the tensors into shards and writes every header."""
        self._shards = _divide(list(self._tensors.values()), self._split_max_bytes, self._alignment)
        count = len(self._shards)
        if count > MAX_SHARDS:
            self._fail("too many shards", expected=f"at most {MAX_SHARDS}", found=count)
        self.paths = [self.path]
        if count > 1:
            stem = self.path.name.removesuffix(".gguf")
            names = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
            self.paths = [self.path.with_name(name) for name in names]
        for index, path in enumerate(self.paths):
            hidden = path.with_name(f".{path.name}.{os.getpid()}.partial")
            with self._disk():
                self._files[index] = FileIO(hidden, "wb")
            self._hidden.append(hidden)
            self._write(index, self._header(index))
        self._pending = ((index, tensor) for index, shard in enumerate(self._shards) for tensor in shard)
        self._next = next(self._pending, None)
        self._state = "writing"

    def _header(self, index: int) -> bytes:
        entries = list(self._metadata.values()) if index == 0 else []
        if index and self._alignment != DEFAULT_ALIGNMENT:
            entries.append(self._metadata["general.alignment"])
        if len(self._shards) > 1:
            entries.append(encode_key_value("split.no", index, ValueType.UINT16))
            entries.append(encode_key_value("split.count", len(self._shards), ValueType.UINT16))
            entries.append(encode_key_value("split.tensors.count", len(self._tensors), ValueType.INT32))
        tensors, offset = self._shards[index], 0
        header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(entries)), *entries]
        for tensor in tensors:
            header.append(encode_tensor(tensor.name, tensor.shape, tensor.type, offset))
            offset = padded(offset + tensor.n_bytes, self._alignment)
        raw = b"".join(header)
        return raw if self._header_only else raw.ljust(padded(len(raw), self._alignment), b"\0")

    def _write(self, shard: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._disk():
            while view.nbytes:
                view = view[self._files[shard].write(view) :]

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._fail(f"cannot write the file: {error.strerror}")

    def _require(self, state: str, problem: str, **details: Any) -> None:
        if self._state != state:
            self._fail(problem, expected=state, found=self._state, **details)

    def _wrong_size(self, tensor: _Tensor, found: str) -> None:
        self._fail("wrong number of bytes", tensor=tensor.name, expected=tensor.n_bytes, found=found)

    def _fail(self, problem: str, **details: Any) -> NoReturn:
        raise GGUFError(problem, file=self.path, **details) from None


def _divide(tensors: list[_Tensor], limit: int | None, alignment: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = padded(tensor.n_bytes, alignment)
        if limit is not None and shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _remove_all(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
