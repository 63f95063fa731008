"""Opening GGUF files: one file or all shards of a split one.

Metadata and tensor index are read and checked at once; tensor data is read by `GGUFFile.read_into`
(pread, no mapping) or looked at through `GGUFFile.data` (a lazy read-only mapping). A mapping of a
file that is cut short while it is in use kills the process with SIGBUS, which is why weights are
loaded by `read_into`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from hybrid.errors import GGUFError
from hybrid.gguf.header import Header, parse_header
from hybrid.gguf.types import GGMLType
from hybrid.log import get_logger

logger = get_logger(__name__)

MISSING: Final = object()
_SHARD_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_MAX_SHARDS = 9999


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
    """

    def __init__(self, paths: list[Path], fds: list[int], headers: list[Header]) -> None:
        self.paths = paths
        self.version = headers[0].version
        self.metadata: Mapping[str, Any] = MappingProxyType(headers[0].metadata)
        self._fds = fds
        self._maps: dict[int, mmap.mmap] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for shard, header in enumerate(headers):
            for raw in header.tensors:
                if raw.name in self.tensors:
                    other = paths[self.tensors[raw.name].shard]
                    raise GGUFError(
                        "tensor is in two shards", file=paths[shard], tensor=raw.name, found=str(other)
                    )
                offset = header.data_start + raw.offset
                self.tensors[raw.name] = TensorInfo(raw.name, raw.shape, raw.type, raw.n_bytes, shard, offset)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, header_only: bool = False) -> GGUFFile:
        """Opens a file, or every shard of a split file from any one of them.

        Args:
            path: the file.
            header_only: accept files whose tensor data is missing (planning needs headers alone).

        Raises:
            GGUFError: the file cannot be opened, is malformed, or its shards do not fit together.
        """
        first = Path(path)
        fds: list[int] = []
        try:
            paths = [first]
            headers = [_open_one(first, fds, header_only)]
            count = headers[0].metadata.get("split.count", 1)
            if isinstance(count, int) and count != 1:
                paths = _shard_paths(first, headers[0], count)
                for fd in fds:
                    os.close(fd)
                fds.clear()
                headers = [_open_one(p, fds, header_only) for p in paths]
                _check_shards(paths, headers)
            return cls(paths, fds, headers)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    @property
    def path(self) -> Path:
        """The file, or the first shard."""
        return self.paths[0]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        value: str = self.get("general.architecture", str)
        return value

    def get(self, key: str, kind: type, *, default: Any = MISSING) -> Any:
        """A metadata value of a known type: ``str``, ``int``, ``float``, ``bool``, ``list`` (of ``str``) or
        ``np.ndarray``. ``float`` accepts an integer too.

        Raises:
            GGUFError: the key is missing and has no default, or its value has another type.
        """
        value = self.metadata.get(key, MISSING)
        if value is MISSING:
            if default is MISSING:
                raise GGUFError(
                    "required metadata is missing", file=self.path, key=key, expected=kind.__name__
                )
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise GGUFError(
                "wrong type of metadata",
                file=self.path,
                key=key,
                expected=kind.__name__,
                found=_kind_of(value),
            )
        return value

    def data(self, name: str) -> np.ndarray:
        """The bytes of a tensor, ``uint8`` [n_bytes], read-only, mapped from the file."""
        info = self.tensors[name]
        if info.shard not in self._maps:
            self._maps[info.shard] = mmap.mmap(self._fds[info.shard], 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[info.shard], dtype=np.uint8, count=info.n_bytes, offset=info.offset)

    def read_into(self, name: str, buffer: Any, offset: int = 0, length: int | None = None) -> None:
        """Reads bytes ``offset : offset + length`` of a tensor to the start of a writable buffer.

        Raises:
            GGUFError: the range is outside the tensor, or the file has become shorter.
            OSError: the disk failed.
        """
        info = self.tensors[name]
        if length is None:
            length = info.n_bytes - offset
        view = memoryview(buffer).cast("B")
        if offset < 0 or length < 0 or offset + length > info.n_bytes or length > view.nbytes:
            found = f"bytes {offset} to {offset + length}, a buffer of {view.nbytes}"
            raise GGUFError(
                "read outside a tensor", file=self.path, tensor=name, expected=info.n_bytes, found=found
            )
        done = 0
        while done < length:
            count = os.preadv(self._fds[info.shard], [view[done:length]], info.offset + offset + done)
            if count == 0:
                raise GGUFError(
                    "the file has become shorter since it was opened",
                    file=self.paths[info.shard],
                    tensor=name,
                    offset=info.offset + offset + done,
                    expected=f"{length - done} more bytes",
                    found="the end of the file",
                )
            done += count

    def close(self) -> None:
        """Closes all shards. Arrays from `data` must not be used afterwards."""
        for mapping in self._maps.values():
            # An array may still point into the mapping, which then goes with that array.
            with contextlib.suppress(BufferError):
                mapping.close()
        self._maps.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_one(path: Path, fds: list[int], header_only: bool) -> Header:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise GGUFError(f"cannot open the file: {error.strerror}", file=path) from None
    fds.append(fd)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise GGUFError("cannot read this as a model", file=path, expected="a GGUF file", found=kind)
    header = parse_header(fd, path, status.st_size, header_only=header_only)
    if header.tensors and not header_only:
        last = header.tensors[-1]
        end = header.data_start + last.offset + last.n_bytes
        if status.st_size > -(-end // header.alignment) * header.alignment:
            logger.warning("%s: %d bytes after the last tensor are ignored", path, status.st_size - end)
    return header


def _shard_paths(path: Path, header: Header, count: int) -> list[Path]:
    match = _SHARD_NAME.match(path.name)
    if match is None or not 1 <= count <= _MAX_SHARDS:
        raise GGUFError(
            "this is one shard of a split model, but its name does not say which",
            file=path,
            key="split.count",
            expected="a name like model-00001-of-00003.gguf",
            found=f"{path.name}, split.count {count}",
        )
    if int(match["count"]) != count:
        found = f"{count}"
        raise GGUFError(
            "split count and file name differ",
            file=path,
            key="split.count",
            expected=match["count"],
            found=found,
        )
    paths = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)
    ]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise GGUFError("shards are missing", file=path, expected=f"{count} files", found=f"no {shown}")
    return paths


def _check_shards(paths: list[Path], headers: list[Header]) -> None:
    for index, (path, header) in enumerate(zip(paths, headers, strict=True)):
        for key, expected in (("split.no", index), ("split.count", len(paths))):
            found = header.metadata.get(key)
            if found != expected:
                raise GGUFError(
                    "shard does not belong here", file=path, key=key, expected=expected, found=found
                )
        for key in ("general.architecture", "general.name"):
            found = header.metadata.get(key)
            if found is not None and found != headers[0].metadata.get(key):
                wanted = headers[0].metadata.get(key)
                raise GGUFError(
                    "shards of different models", file=path, key=key, expected=wanted, found=found
                )
    total = sum(len(header.tensors) for header in headers)
    wanted = headers[0].metadata.get("split.tensors.count", total)
    if wanted != total:
        raise GGUFError(
            "shards lack tensors", file=paths[0], key="split.tensors.count", expected=wanted, found=total
        )


def _kind_of(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array of {value.dtype}"
    return type(value).__name__
