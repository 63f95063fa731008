"""Opening the file or files a model consists of, and checking that shards belong together.

A split model's files are named ``<stem>-00001-of-0000N.gguf``. Each states its number from zero
(`split.no`), `split.count`, and the number of tensors in all of them (`split.tensors.count`); the
first carries the metadata. Tools that merge shards leave a `split.count` of 0 behind.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from hybrid.errors import GGUFError
from hybrid.gguf.header import Header, parse_header
from hybrid.gguf.rules import MAX_SHARDS
from hybrid.log import get_logger

logger = get_logger(__name__)

_SHARD_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_DIFFERING_KEYS: Final = {"split.no", "general.alignment"}
_SAME_DOWNLOAD: Final = "Take all shards from the same download."
_KINDS: Final = (
    (stat.S_ISDIR, "a directory; name a .gguf file in it"),
    (stat.S_ISFIFO, "a pipe; a model must be a file on disk"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class Shard:
    """An open file and what its header says."""

    path: Path
    fd: int
    size: int
    modified_ns: int
    header: Header

    def check_unchanged(self) -> None:
        """Raises `GGUFError` if the file was changed or cut short after it was opened."""
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns):
            expected, found = f"{self.size} bytes", f"{status.st_size} bytes, modified at another time"
            hint = "Open the model again when the file is complete."
            raise GGUFError("the file has changed since it was opened", file=self.path, expected=expected,
                            found=found, hint=hint)  # fmt: skip


def open_shards(path: Path, *, header_only: bool) -> list[Shard]:
    """Opens a file, or all shards of a split one given any of them, in order.

    Raises:
        GGUFError: a file cannot be opened or is malformed, or the shards do not fit together.
    """
    shards = [_open_one(path, header_only)]
    try:
        count = _split_value(shards[0], "split.count", 0)
        if count > 1:
            paths = _shard_paths(path, count)
            os.close(shards.pop().fd)
            for shard_path in paths:
                # One by one: if a later one fails, those before it are closed below.
                shards.append(_open_one(shard_path, header_only))  # noqa: PERF401
            _check_belong_together(shards)
    except BaseException:
        for shard in shards:
            os.close(shard.fd)
        raise
    return shards


def _open_one(path: Path, header_only: bool) -> Shard:
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise GGUFError(f"cannot open the file: {reason}", file=path, hint="Check the path.") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            found = next((kind for test, kind in _KINDS if test(status.st_mode)), "no regular file")
            raise GGUFError("this is not a file", file=path, expected="a GGUF file", found=found)
        header = parse_header(fd, path, status.st_size, header_only=header_only)
    except BaseException:
        os.close(fd)
        raise
    if status.st_size > header.data_end and header.tensors:
        excess = status.st_size - header.data_end
        logger.warning("%s: %d bytes after the last tensor's data are ignored", path, excess)
    return Shard(path, fd, status.st_size, status.st_mtime_ns, header)


def _split_value(shard: Shard, key: str, default: int | None = None) -> int:
    value = shard.header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        found = _brief(value)
        raise GGUFError("a shard lacks its split metadata", file=shard.path, key=key,
                        expected="a count", found=found, hint=_SAME_DOWNLOAD)  # fmt: skip
    return value


def _shard_paths(path: Path, count: int) -> list[Path]:
    match = _SHARD_NAME.fullmatch(path.name)
    if count > MAX_SHARDS:
        expected = f"at most {MAX_SHARDS}"
        raise GGUFError("too many shards", file=path, key="split.count", expected=expected, found=count,
                        hint="The header is damaged.")  # fmt: skip
    if match is None or int(match["count"]) != count:
        raise GGUFError(
            "this is one shard of a split model, and its name does not match",
            file=path,
            key="split.count",
            expected=f"a name that ends in -NUMBER-of-{count:05d}.gguf",
            found=path.name,
            hint="Give all shards their original names.",
        )
    names = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not path.with_name(name).exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (" and more" if len(missing) > 5 else "")
        raise GGUFError("shards are missing", file=path, expected=f"{count} files in one folder",
                        found=f"no {shown}", hint="Download the missing files.")  # fmt: skip
    return [path.with_name(name) for name in names]


def _check_belong_together(shards: list[Shard]) -> None:
    first = shards[0].header.metadata
    total = _split_value(shards[0], "split.tensors.count")
    for index, shard in enumerate(shards):
        _expect(
            shard, "split.no", index, _split_value(shard, "split.no"), "the file name and `split.no` differ"
        )
        for key, value in shard.header.metadata.items():
            if key in _DIFFERING_KEYS:
                continue
            if key not in first or not np.array_equal(value, first[key]):
                _expect(shard, key, _brief(first.get(key)), _brief(value), "shards of different models")
    present = sum(len(shard.header.tensors) for shard in shards)
    _expect(shards[0], "split.tensors.count", total, present, "the shards hold another number of tensors")


def _expect(shard: Shard, key: str, expected: Any, found: Any, problem: str) -> None:
    if expected != found:
        raise GGUFError(
            problem, file=shard.path, key=key, expected=expected, found=found, hint=_SAME_DOWNLOAD
        )


def _brief(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
