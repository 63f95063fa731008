"""Open GGUF files: metadata, tensor index, and the bytes of tensors.

Metadata and tensor index are read and checked when a file is opened. Tensor data is read by
`GGUFFile.read_into` (pread, no mapping) or looked at through `GGUFFile.data` (a lazy read-only
mapping). Where a mapped file is cut short, touching the lost part kills the process with SIGBUS; no
check can prevent that, which is why weights are loaded by `read_into`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar, overload

import numpy as np

from hybrid.errors import GGUFError
from hybrid.gguf.fields import U8
from hybrid.gguf.read_ahead import Request
from hybrid.gguf.shards import Shard, open_shards
from hybrid.gguf.types import GGMLType

MISSING: Final = object()
"""The default of `GGUFFile.get` for a key that must be there."""

T = TypeVar("T")
D = TypeVar("D")

# `general.type` of files that are no language model, and what to do with them.
_NO_MODEL: Final = {
    "adapter": "a LoRA adapter; give the model it adapts",
    "mmproj": "a multimodal projector; give the language model beside it",
    "imatrix": "an importance matrix, which serves to quantise a model",
    "vocab": "a vocabulary without weights",
}


@dataclass(frozen=True)
class Range:
    """Bytes of a tensor."""

    tensor: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are.

    Attributes:
        shape: numpy order, (..., rows, cols): GGUF's dimensions reversed.
        shard: index into ``GGUFFile.paths``.
        offset: first byte in that shard's file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    n_bytes: int
    shard: int
    offset: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; for interleaved types, a row's share of its group."""
        return self.n_bytes // math.prod(self.shape[:-1])


class GGUFFile:
    """An open model file. Close it, or use it as a context manager.

    Attributes:
        paths: the file, or all shards in order.
        version: GGUF version of the first shard.
        metadata: key -> Python scalar, ``str``, list of ``str``, or numpy array.
        tensors: name -> `TensorInfo`, in file order over all shards.
        header_only: whether tensor data may be missing.
    """

    def __init__(self, shards: list[Shard], *, header_only: bool = False) -> None:
        self._shards, self.header_only = shards, header_only
        self._maps: dict[int, mmap.mmap] = {}
        self._closed = False
        self.paths: list[Path] = [shard.path for shard in shards]
        self.version: int = shards[0].header.version
        self.metadata: Mapping[str, Any] = MappingProxyType(shards[0].header.metadata)
        self.tensors: dict[str, TensorInfo] = {}
        for index, shard in enumerate(shards):
            for raw in shard.header.tensors:
                if raw.name in self.tensors:
                    expected, found = "one", f"another in {self.paths[self.tensors[raw.name].shard].name}"
                    raise GGUFError("a tensor is in two shards", file=shard.path, tensor=raw.name,
                                    expected=expected, found=found)  # fmt: skip
                offset = shard.header.data_start + raw.offset
                self.tensors[raw.name] = TensorInfo(raw.name, raw.shape, raw.type, raw.n_bytes, index, offset)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, header_only: bool = False) -> GGUFFile:
        """Opens a file, or every shard of a split file from any one of them.

        Args:
            path: the file.
            header_only: accept files whose tensor data is missing (planning needs headers alone).

        Raises:
            GGUFError: the file cannot be opened, is malformed, or its shards do not fit together.
        """
        shards = open_shards(Path(path), header_only=header_only)
        try:
            return cls(shards, header_only=header_only)
        except BaseException:
            for shard in shards:
                os.close(shard.fd)
            raise

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The open files, in order."""
        return tuple(self._shards)

    @property
    def path(self) -> Path:
        """The file, or the first shard."""
        return self.paths[0]

    @property
    def architecture(self) -> str:
        """`general.architecture`. Raises `GGUFError` where it is missing or no string."""
        return self.get("general.architecture", str)

    def require_model(self) -> None:
        """Raises `GGUFError` if this is an adapter, projector, importance matrix or bare vocabulary."""
        kind = _NO_MODEL.get(self.get("general.type", str, default="model"))
        if kind is None and self.metadata.get("general.architecture") == "clip":
            kind = _NO_MODEL["mmproj"]
        if kind is None and not self.tensors:
            kind = _NO_MODEL["vocab"]
        if kind is not None:
            raise GGUFError("this file is no model", file=self.path, expected="a language model", found=kind)

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], *, default: D) -> T | D: ...
    def get(self, key: str, kind: type[Any], *, default: Any = MISSING) -> Any:
        """A metadata value of a known type.

        Args:
            kind: ``str``, ``int``, ``float``, ``bool``, ``list`` (of ``str``) or ``np.ndarray`` (of numbers).
                An integer is accepted as ``float`` too.

        Raises:
            GGUFError: the key is missing and has no default, or its value has another type.
        """
        value = self.metadata.get(key, MISSING)
        if value is MISSING:
            if default is MISSING:
                raise GGUFError("required metadata is missing", file=self.path, key=key,
                                expected=_describe_kind(kind), found="nothing")  # fmt: skip
            return default
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if kind is float and is_integer:
            return float(value)
        if not isinstance(value, kind) or (kind is int and not is_integer):
            raise GGUFError("metadata has the wrong type", file=self.path, key=key,
                            expected=_describe_kind(kind), found=_describe(value))  # fmt: skip
        return value

    def data(self, name: str) -> U8:
        """The bytes of a tensor, ``uint8`` [n_bytes], read-only, mapped from the file.

        Raises:
            GGUFError: no such tensor, or the file has changed since it was opened.
        """
        info, shard = self.locate(name)
        shard.check_unchanged()
        if info.shard not in self._maps:
            self._maps[info.shard] = mmap.mmap(shard.fd, 0, access=mmap.ACCESS_READ)
        mapping = self._maps[info.shard]
        return np.frombuffer(mapping, dtype=np.uint8, count=info.n_bytes, offset=info.offset)

    def read_into(self, name: str, buffer: Any, offset: int = 0, length: int | None = None) -> None:
        """Reads bytes ``offset : offset + length`` of a tensor to the start of a writable buffer.

        Args:
            length: bytes to read; the rest of the tensor if not given.

        Raises:
            GGUFError: no such tensor, the range is outside it or larger than the buffer, the file has
                changed or become shorter since it was opened, or the disk failed.
        """
        info, shard = self.locate(name)
        length = info.n_bytes - offset if length is None else length
        view = memoryview(buffer).cast("B")
        if not (offset >= 0 and length >= 0 and offset + length <= info.n_bytes and length <= view.nbytes):
            found = f"bytes {offset} to {offset + length} for a buffer of {view.nbytes}"
            expected = f"a range within {info.n_bytes} bytes that the buffer holds"
            raise GGUFError(
                "read outside a tensor", file=shard.path, tensor=name, expected=expected, found=found
            )
        shard.check_unchanged()
        start, done = info.offset + offset, 0
        while done < length:
            problem = "the file has become shorter since it was opened"
            try:
                count = os.preadv(shard.fd, [view[done:length]], start + done)
            except OSError as error:
                problem, count = f"cannot read the file: {error.strerror}", 0
            if count == 0:
                expected = f"{length - done} more bytes"
                raise GGUFError(problem, file=shard.path, tensor=name, offset=start + done, expected=expected,
                                found="none")  # fmt: skip
            done += count

    def request(self, entry: Range) -> Request:
        """The same bytes as a request for `hybrid.gguf.read_ahead.ReadAhead`. Raises as `locate` does."""
        info, shard = self.locate(entry.tensor)
        return Request(shard, info.offset + entry.offset, entry.n_bytes, entry.tensor)

    def close(self) -> None:
        """Closes all shards; twice does no harm. Arrays from `data` keep their mapping alive."""
        for mapping in self._maps.values():
            with contextlib.suppress(BufferError):  # an array still points into it
                mapping.close()
        self._maps.clear()
        if not self._closed:
            for shard in self._shards:
                os.close(shard.fd)
        self._closed = True

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def locate(self, name: str) -> tuple[TensorInfo, Shard]:
        """A tensor's entry, and the open file it is in.

        Raises:
            GGUFError: there is no such tensor, or the file is closed.
        """
        if self._closed:
            raise GGUFError("the file is closed", file=self.path, tensor=name)
        if name not in self.tensors:
            expected = f"one of {len(self.tensors)} tensors"
            raise GGUFError("no such tensor", file=self.path, tensor=name, expected=expected, found="nothing")
        info = self.tensors[name]
        return info, self._shards[info.shard]


def _describe_kind(kind: type[Any]) -> str:
    names: dict[Any, str] = {list: "an array of strings", np.ndarray: "an array of numbers"}
    return names.get(kind, kind.__name__)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} {value.dtype}"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    return f"{type(value).__name__} {value!r}"[:100]
