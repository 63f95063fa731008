"""Packed weights kept in a file, so that the next start need not pack them.

A cache file belongs to one model file in one state: it names the sizes, times and header hashes of all its
shards, and the version of the packed layout. It is checked to be whole, and one that fails is never used.

    "HYBRIDPK", u64 length of the index, the index (JSON), zeros up to a page; then each matrix in one piece
    (the layout of `kernels/cpu/block_formats.h`) from a page on; then "HYBRIDPK" once more, the last bytes

It is written under another name, flushed to the disk and renamed: what bears its name is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hybrid.backends.source import TensorSource
from hybrid.errors import CapacityError, GGUFError
from hybrid.gguf import GGUFFile
from hybrid.log import get_logger
from hybrid.placement.capabilities import matrix_bytes

logger = get_logger(__name__)

LAYOUT_VERSION = 1  # of block_formats.h; another layout is another version
_MAGIC = b"HYBRIDPK"
_PAGE = 4096


def entry_key(source: TensorSource) -> str:
    """What a matrix is, among those of its model."""
    chosen = "all" if source.selected is None else ",".join(map(str, source.selected))
    rows = f"{source.row_start}:{source.row_start + source.num_rows}"
    shape = f"[{len(source.matrices)},{source.rows},{source.cols}]"
    return f"{source.info.name} {source.type.name} {shape} {rows} {chosen}"


def packed_bytes(source: TensorSource) -> int:
    """Bytes of a matrix in the packed layout."""
    return matrix_bytes(source.type, "cpu", (len(source.matrices), source.num_rows, source.cols))


def identity(file: GGUFFile) -> dict[str, Any]:
    """The model file a cache is of, as plain JSON values."""
    shards = [
        {
            "bytes": shard.size,
            "modified_ns": shard.modified_ns,
            "header": _header_hash(shard.fd, shard.header.data_start),
        }
        for shard in file.shards
    ]
    return {"layout": LAYOUT_VERSION, "shards": shards}


def _header_hash(fd: int, n_bytes: int) -> str:
    found, done = hashlib.sha256(), 0
    while done < n_bytes and (piece := os.pread(fd, min(1 << 20, n_bytes - done), done)):
        found.update(piece)
        done += len(piece)
    return found.hexdigest()


def cache_path(file: GGUFFile, folder: Path) -> Path:
    """Where the cache of a model file is."""
    digest = hashlib.sha256(json.dumps(identity(file), sort_keys=True).encode()).hexdigest()
    return folder / f"{file.path.stem}-{digest[:16]}.packed"


@dataclass(frozen=True)
class PackedFile:
    """An open cache file. ``entries``: `entry_key` -> first byte and length."""

    path: Path
    fd: int
    n_bytes: int
    modified_ns: int
    entries: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path, file: GGUFFile) -> PackedFile | None:
        """The cache of ``file``, ``None`` where there is none that can be used; why is logged."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(fd)
            entries = _read_index(fd, status.st_size, identity(file))
            return cls(path, fd, status.st_size, status.st_mtime_ns, entries)
        except (OSError, ValueError, KeyError, TypeError) as error:
            os.close(fd)
            logger.warning(
                "%s: this cache of packed weights cannot be used: %s; it is made anew", path, error
            )
            return None

    def check_unchanged(self) -> None:
        """Raises `GGUFError` if the file is not what it was when it was opened."""
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != (self.n_bytes, self.modified_ns):
            raise GGUFError("the cache of packed weights has changed since it was opened", file=self.path,
                            expected=f"{self.n_bytes} bytes", found=f"{status.st_size} bytes",
                            hint="Start again.")  # fmt: skip

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_index(fd: int, size: int, wanted: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Entries of a cache file. Raises ValueError where it is not whole, or of another model or layout."""
    head = os.pread(fd, 16, 0)
    if head[:8] != _MAGIC or len(head) < 16:
        raise ValueError("it is no such file")
    length = int.from_bytes(head[8:], "little")
    if length > size:
        raise ValueError("it is cut short")
    index = json.loads(os.pread(fd, length, 16))
    if index["model"] != wanted:
        raise ValueError("it is of another model file, or of another version of this program")
    if size != index["bytes"] or os.pread(fd, 8, size - 8) != _MAGIC:
        raise ValueError("it is cut short")
    entries = {str(key): (int(start), int(n_bytes)) for key, (start, n_bytes) in index["entries"].items()}
    for start, n_bytes in entries.values():
        if start % _PAGE or start < 0 or n_bytes < 0 or start + n_bytes > size:
            raise ValueError("its index points outside")
    return entries


class PackedWriter:
    """Writes a cache file; `finish` gives it its name, leaving otherwise removes it."""

    def __init__(self, path: Path, file: GGUFFile, sources: Sequence[TensorSource]) -> None:
        """
        Raises:
            CapacityError: the disk has too little room.
            OSError: the folder cannot be written, or (BlockingIOError) another process is at it.
        """
        self.path, self._partial = path, path.with_name(f".{path.name}.partial")
        sizes = {entry_key(source): packed_bytes(source) for source in sources}
        index, self.n_bytes = _index(identity(file), sizes)
        self.entries: dict[str, tuple[int, int]] = index["entries"]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("ab")
        try:
            # Who holds the lock writes; what a killed process left is written over.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            free = shutil.disk_usage(path.parent).free
            if free < self.n_bytes:
                self._partial.unlink()
                raise CapacityError(
                    f"{path.parent}: the packed weights take {self.n_bytes} bytes, and {free} are free; "
                    "name another folder, or do without --packed-cache"
                )
            text = json.dumps(index).encode()
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CLOEXEC)
        except BaseException:
            self._file.close()
            raise
        os.pwrite(self._fd, _MAGIC + len(text).to_bytes(8, "little") + text, 0)

    def write(self, key: str, data: memoryview) -> None:
        """All bytes of an entry."""
        start, n_bytes = self.entries[key]
        assert data.nbytes == n_bytes
        done = 0
        while done < n_bytes:
            done += os.pwrite(self._fd, data[done : done + (64 << 20)], start + done)
        # Written out now and not kept: the model itself needs the memory.
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, start, n_bytes, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """Makes the file appear under its name."""
        os.pwrite(self._fd, _MAGIC, self.n_bytes - 8)
        os.fsync(self._fd)
        self._partial.rename(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        os.close(self._fd)
        if kind is not None:
            with contextlib.suppress(OSError):
                self._partial.unlink()
        self._file.close()


def _index(model: dict[str, Any], sizes: dict[str, int]) -> tuple[dict[str, Any], int]:
    """The index of a file, and the bytes of the whole."""
    # Numbers only become shorter than these.
    room = 64 + len(json.dumps(model)) + sum(len(json.dumps(key)) + 48 for key in sizes)
    position = -(-(16 + room) // _PAGE) * _PAGE
    entries: dict[str, tuple[int, int]] = {}
    for key, n_bytes in sizes.items():
        entries[key] = position, n_bytes
        position += -(-n_bytes // _PAGE) * _PAGE
    total = position + _PAGE
    return {"model": model, "bytes": total, "entries": entries}, total
