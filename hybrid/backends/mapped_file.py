"""Reading the pages of a mapped file before they are used, in order, by several threads.

Pages that are found missing while a model runs would be read one after another. The mapping asks for huge
pages: file systems that keep files in large pieces give them, others give pages of 4 KiB.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid.errors import GGUFError
from hybrid.kernels import cpu
from hybrid.log import get_logger

logger = get_logger(__name__)

PIECE_BYTES = 16 << 20
NUM_THREADS = 4


class MappedFile:
    """A file mapped to be read, as long as this object is there.

    Attributes:
        address: of its first byte.
    """

    def __init__(self, path: Path, fd: int) -> None:
        mapping = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self.path = path
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        self.address: int = self._bytes.ctypes.data
        self._changed = threading.Condition()
        self._stopped = False
        self._next = 0
        self._left: list[int] = []  # pieces of each range that are not there yet
        self._problem = 0
        self._threads: list[threading.Thread] = []

    def read_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Begins to read ranges (first byte, length), in their order."""
        pieces = [
            (index, start + done, min(PIECE_BYTES, n_bytes - done))
            for index, (start, n_bytes) in enumerate(ranges)
            for done in range(0, n_bytes, PIECE_BYTES)
        ]
        self._left = [-(-n_bytes // PIECE_BYTES) for _, n_bytes in ranges]
        self._threads = [
            threading.Thread(target=self._read, args=(pieces,), name=f"hybrid-map-{i}", daemon=True)
            for i in range(min(NUM_THREADS, len(pieces)))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, index: int) -> None:
        """Returns when a range is in memory.

        Raises:
            GGUFError: its pages cannot be read.
        """
        with self._changed:
            # With a limit: a wait without one holds Ctrl-C back on some systems.
            while self._left[index] and not self._problem:
                self._changed.wait(0.1)
        if self._problem:
            raise GGUFError(
                f"cannot read the cache of packed weights: {os.strerror(self._problem)}",
                file=self.path, hint="Its disk failed, or it was cut short; start again.",
            )  # fmt: skip

    def stop(self) -> None:
        """Ends reading ahead, after the pieces it is in."""
        with self._changed:
            self._stopped = True
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _read(self, pieces: list[tuple[int, int, int]]) -> None:
        while True:
            with self._changed:
                if self._stopped or self._problem or self._next == len(pieces):
                    return
                index, start, n_bytes = pieces[self._next]
                self._next += 1
            problem = cpu.read_mapped(self.address + start, n_bytes)
            with self._changed:
                # Kernels before 5.14 cannot be asked: there pages come when they are used.
                if problem not in (0, errno.EINVAL):
                    self._problem = problem
                self._left[index] -= 1
                self._changed.notify_all()
