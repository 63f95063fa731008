"""Log-probabilities of a model on a text, kept in a file to compare other models with.

Layout, little-endian:

    byte  0  magic "HYBRIDLP"
          8  u32 version (1), u32 vocabulary, u32 window length, u32 first scored position
         24  u64 windows
         32  SHA-256 of the windows' token ids as i32
         64  f32 log-probabilities [windows, window length - 1 - first, vocabulary]

They are stored as float32, four bytes a token of the vocabulary: comparing a model with itself gives
a divergence of exactly zero, so that any other figure means a difference.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from hybrid.errors import CapacityError, ConfigError

_HEADER = struct.Struct("<8sIIIIQ32s")
_MAGIC = b"HYBRIDLP"
_VERSION = 1

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LogprobKey:
    """What two runs must share to be comparable."""

    vocab_size: int
    window: int
    first_scored: int
    num_windows: int
    token_hash: bytes

    @classmethod
    def of(cls, windows: npt.NDArray[np.int32], first_scored: int, vocab_size: int) -> LogprobKey:
        """``windows`` are the token ids as the model is given them, ``[num_windows, window]``."""
        digest = hashlib.sha256(np.ascontiguousarray(windows, dtype="<i4").tobytes()).digest()
        num_windows, window = windows.shape
        return cls(vocab_size, window, first_scored, num_windows, digest)

    @property
    def rows(self) -> int:
        """Scored positions in all."""
        return self.num_windows * (self.window - 1 - self.first_scored)

    @property
    def file_bytes(self) -> int:
        return _HEADER.size + 4 * self.rows * self.vocab_size


class LogprobWriter:
    """Writes rows in order; the file gets its name in `close`, and nothing is left without it.

    Raises:
        CapacityError: the disk lacks the room.
    """

    def __init__(self, path: str | os.PathLike[str], key: LogprobKey) -> None:
        self.path, self.key = Path(path), key
        self._rows = 0
        free = shutil.disk_usage(self.path.resolve().parent).free
        if key.file_bytes > free:
            raise CapacityError(
                f"{self.path}: the file takes {key.file_bytes} bytes but the disk has {free} left;"
                " take fewer --chunks or a smaller context"
            )
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._file = self._partial.open("wb")
        header = (key.vocab_size, key.window, key.first_scored, key.num_windows, key.token_hash)
        self._file.write(_HEADER.pack(_MAGIC, _VERSION, *header))

    def write(self, rows: Array) -> None:
        """Adds rows ``[n, vocab_size]``."""
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").data)
        self._rows += len(rows)

    def close(self) -> None:
        if self._rows != self.key.rows:
            raise RuntimeError(f"{self._rows} of {self.key.rows} rows written")
        self._file.close()
        self._partial.replace(self.path)

    def abort(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> LogprobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


class LogprobReader:
    """Reads rows in order.

    Raises:
        ConfigError: no such file, another kind of file, or one made with other tokens or options.
    """

    def __init__(self, path: str | os.PathLike[str], key: LogprobKey) -> None:
        self.path, self.key = Path(path), key
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot open the log-probabilities: {error.strerror}") from None
        try:
            self._check()
        except BaseException:
            self._file.close()
            raise

    def _check(self) -> None:
        header = self._file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            self._fail("no file of log-probabilities", f"magic {_MAGIC!r}", repr(header[:8]))
        _, version, vocab_size, window, first, num_windows, token_hash = _HEADER.unpack(header)
        if version != _VERSION:
            self._fail("unknown version of the file", _VERSION, version)
        found = LogprobKey(vocab_size, window, first, num_windows, token_hash)
        comparisons = (
            (
                "vocabulary size",
                found.vocab_size,
                self.key.vocab_size,
                "it was made with another model family",
            ),
            ("context", found.window, self.key.window, f"run again with -c {found.window}"),
            ("first scored position", found.first_scored, self.key.first_scored, "make the file anew"),
            (
                "number of chunks",
                found.num_windows,
                self.key.num_windows,
                f"use --chunks {found.num_windows}",
            ),
            (
                "tokens",
                found.token_hash.hex()[:12],
                self.key.token_hash.hex()[:12],
                "same text and tokeniser?",
            ),
        )
        for what, theirs, ours, hint in comparisons:
            if theirs != ours:
                self._fail(f"the {what} differs ({hint})", f"{ours} in this run", f"{theirs} in the file")
        size = os.fstat(self._file.fileno()).st_size
        if size != self.key.file_bytes:
            self._fail("the file is incomplete", f"{self.key.file_bytes} bytes", size)

    def _fail(self, problem: str, expected: object, found: object) -> NoReturn:
        raise ConfigError(f"{self.path}: {problem}: expected {expected}, found {found}")

    def read(self, num_rows: int) -> Array:
        """The next rows, ``[num_rows, vocab_size]``."""
        values = np.empty((num_rows, self.key.vocab_size), dtype="<f4")
        if self._file.readinto(values.view(np.uint8).reshape(-1).data) != values.nbytes:
            self._fail("the file has become shorter", f"{values.nbytes} more bytes", "its end")
        return values

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LogprobReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
