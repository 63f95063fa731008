"""Reading ranges of tensors ahead of their use, in their order, by several threads.

Reads bypass the page cache (O_DIRECT on the pages around a range) where the file system can, so that loading
leaves no second copy of a model in memory; where it cannot (tmpfs, 9p) what was read is dropped from the
cache afterwards.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from hybrid.errors import GGUFError

PIECE_BYTES = 8 << 20
NUM_BUFFERS = 8
NUM_THREADS = 4
_PAGE = 4096  # no disk wants coarser alignment


class OpenFile(Protocol):
    """A file that ranges are read from."""

    @property
    def path(self) -> Path: ...
    @property
    def fd(self) -> int: ...
    def check_unchanged(self) -> None:
        """Raises `GGUFError` if the file is not what it was when it was opened."""


@dataclass(frozen=True)
class Request:
    """Bytes of a file. ``tensor`` is for messages."""

    file: OpenFile
    offset: int
    n_bytes: int
    tensor: str


class ReadAhead:
    """Gives the bytes of ranges in their order, while threads read those that follow.

    Close it, or use it as a context manager: after that no thread is left.

    Args:
        requests: what will be asked for; `NUM_BUFFERS` buffers are as long as the longest.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._direct: dict[int, int | None] = {}  # shard's descriptor -> one that bypasses the cache
        count = min(NUM_BUFFERS, max(len(requests), 1))
        size = max((entry.n_bytes for entry in requests), default=1)
        self._size = -(-size // _PAGE) * _PAGE + _PAGE
        self._memory = mmap.mmap(-1, count * self._size)
        with contextlib.suppress(OSError):  # fewer pages to be looked up for each read
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._free = list(range(count))
        self._ready: dict[int, tuple[int, int] | BaseException] = {}  # range -> buffer, start in it
        self._next_read = self._next_given = 0
        self._given: int | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read_all, name=f"hybrid-read-{i}", daemon=True)
            for i in range(min(NUM_THREADS, len(requests)))
        ]
        for entry in requests:
            if entry.file.fd not in self._direct:
                self._direct[entry.file.fd] = open_direct(entry.file.fd)
        for thread in self._threads:
            thread.start()

    @property
    def bypasses_cache(self) -> bool:
        """Whether all files are read past the page cache."""
        return all(fd is not None for fd in self._direct.values())

    def next(self) -> memoryview:
        """The bytes of the next range, valid until the next call.

        Raises:
            GGUFError: the disk failed, or the file has changed since it was opened.
        """
        with self._changed:
            if self._given is not None:
                self._free.append(self._given)
                self._given = None
                self._changed.notify_all()
            index = self._next_given
            # With a limit: a wait without one holds Ctrl-C back on some systems.
            while index not in self._ready:
                self._changed.wait(0.1)
            found = self._ready.pop(index)
            self._next_given += 1
            if isinstance(found, BaseException):
                raise found
            self._given, start = found
        first = self._given * self._size + start
        return memoryview(self._memory)[first : first + self._requests[index].n_bytes]

    def close(self) -> None:
        """Ends the threads after the reads they are in. Views given must not be used any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for fd in self._direct.values():
            if fd is not None:
                os.close(fd)
        self._direct.clear()
        with contextlib.suppress(BufferError):  # somebody still holds a view
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_all(self) -> None:
        while True:
            with self._changed:
                # Buffers go to ranges in order: the one waited for is never without.
                while not self._free and not self._stopped and self._next_read < len(self._requests):
                    self._changed.wait()
                if self._stopped or self._next_read == len(self._requests):
                    return
                index, buffer = self._next_read, self._free.pop()
                self._next_read += 1
            result: tuple[int, int] | BaseException
            try:
                result = buffer, self._read(index, buffer)
            except OSError as error:
                entry = self._requests[index]
                problem = f"cannot read the file: {error.strerror}"
                result = GGUFError(problem, file=entry.file.path, tensor=entry.tensor)
            except BaseException as error:
                result = error
            with self._changed:
                self._ready[index] = result
                self._changed.notify_all()

    def _read(self, index: int, buffer: int) -> int:
        """Reads a range; where it begins in the buffer."""
        entry = self._requests[index]
        fd, start = entry.file.fd, entry.offset
        entry.file.check_unchanged()
        first = start // _PAGE * _PAGE
        wanted = start - first + entry.n_bytes
        view = memoryview(self._memory)[buffer * self._size : (buffer + 1) * self._size]
        direct = self._direct[fd]
        if direct is not None:
            rounded = -(-wanted // _PAGE) * _PAGE
            done = _read_until(direct, view[:rounded], first, wanted)
        else:
            done = _read_until(fd, view[:wanted], first, wanted)
            os.posix_fadvise(fd, first, wanted, os.POSIX_FADV_DONTNEED)
        if done < wanted:
            raise GGUFError("the file has become shorter since it was opened", file=entry.file.path,
                            tensor=entry.tensor, offset=first + done, expected=f"{wanted - done} more bytes",
                            found="none")  # fmt: skip
        return start - first


def _read_until(fd: int, view: memoryview, offset: int, wanted: int) -> int:
    """Bytes read, fewer than wanted at the end of the file alone."""
    done = 0
    while done < wanted:
        # Direct reads that stop in the middle of a page are at the end of the file.
        if done % _PAGE and len(view) % _PAGE == 0:
            return done
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def open_direct(fd: int) -> int | None:
    """The same file, read past the page cache; ``None`` where the file system cannot."""
    probe = mmap.mmap(-1, _PAGE)
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.preadv(direct, [probe], 0)
    except OSError:
        os.close(direct)
        return None
    return direct
