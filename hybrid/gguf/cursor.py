"""Bounded reads from the start of a file.

Bytes come by pread, never through a mapping, so that a file cut short while it is read is an error and
not a signal. Every length is compared with the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NoReturn

from hybrid.errors import GGUFError
from hybrid.gguf.rules import MAX_HEADER_BYTES

_FIRST_READ = 1 << 20
DAMAGED = "The download is incomplete or the header is damaged."


class Cursor:
    """A place in the header of an open file of ``size`` bytes, buffered in growing pieces."""

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.pos = 0
        self.buffer = b""
        self._fd = fd

    @property
    def left(self) -> int:
        """Bytes from here to the end of the file."""
        return self.size - self.pos

    def fail(self, problem: str, **details: Any) -> NoReturn:
        """Raises `GGUFError` for this file, at the present offset unless another is given."""
        details.setdefault("offset", self.pos)
        raise GGUFError(problem, file=self.path, **details)

    def require(self, n: int, what: str, **details: Any) -> None:
        """Makes the next ``n`` bytes available in the buffer."""
        if n > self.left:
            expected, found = f"{n} bytes", f"{self.left} left"
            self.fail(f"the file ends within {what}", expected=expected, found=found, hint=DAMAGED, **details)
        end = self.pos + n
        if end > MAX_HEADER_BYTES:
            self.fail(f"{what} is too long", expected=f"a header of at most {MAX_HEADER_BYTES} bytes",
                      found=f"more than {end}", **details)  # fmt: skip
        while len(self.buffer) < end:
            wanted = min(self.size, max(end, 2 * len(self.buffer), _FIRST_READ))
            try:
                piece = os.pread(self._fd, wanted - len(self.buffer), len(self.buffer))
            except OSError as error:
                self.fail(f"cannot read the file: {error.strerror}", offset=len(self.buffer))
            if not piece:
                self.fail("the file became shorter while it was read", offset=len(self.buffer))
            self.buffer += piece

    def scalar(self, fmt: str, what: str, **details: Any) -> Any:
        """Reads one value of a `struct` format."""
        n = struct.calcsize(fmt)
        self.require(n, what, **details)
        (value,) = struct.unpack_from(fmt, self.buffer, self.pos)
        self.pos += n
        return value

    def string(self, what: str, **details: Any) -> str:
        """Reads a length and as many bytes of UTF-8."""
        start = self.pos
        length = self.scalar("<Q", f"the length of {what}", **details)
        if length > min(self.left, MAX_HEADER_BYTES):
            expected = f"at most {min(self.left, MAX_HEADER_BYTES)} bytes"
            self.fail(f"{what} is too long", offset=start, expected=expected, found=length,
                      hint=DAMAGED, **details)  # fmt: skip
        self.require(length, what, **details)
        raw = self.buffer[self.pos : self.pos + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at, found = self.pos + error.start, repr(raw[error.start : error.start + 8])
            self.fail(f"{what} is not UTF-8", offset=at, expected="UTF-8", found=found, **details)
        self.pos += length
        return text
