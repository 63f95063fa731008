"""Downloading model files: from a Hugging Face repository or a plain URL, resumed, checked, all shards.

A file is written as ``NAME.partial`` and gets its name when its size and, where the server tells one, its
SHA-256 are right. What was downloaded before is kept and checked with the rest.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid import env
from hybrid.errors import CapacityError, ConfigError, DownloadError

DEFAULT_ENDPOINT = "https://huggingface.co"
TRIES = 5
TIMEOUT_S = 30.0
_PIECE = 1 << 20
_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<quant>[\w.-]+)")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server. ``n_bytes`` and ``sha256`` are ``None`` where the server does not tell."""

    url: str
    name: str
    n_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Pulled:
    """A file on disk. ``verified``: the server told its hash, and it is right."""

    path: Path
    sha256: str
    verified: bool


def find(source: str) -> list[RemoteFile]:
    """The files that ``user/repo:QUANT`` or a URL means, shards in order.

    Raises:
        ConfigError: it is neither, or the repository has no such quantisation, or several.
        DownloadError: the server does not answer.
    """
    if source.startswith(("http://", "https://")):
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(source).path)).name
        if not name:
            raise ConfigError(f"pull: {source} names no file")
        return _all_shards(source, name)
    match = _REPOSITORY.fullmatch(source)
    if match is None:
        raise ConfigError(
            f"pull: expected user/repo:QUANT, as in user/model-GGUF:Q4_K_M, or a URL, found {source!r}"
        )
    return _of_repository(match["repo"], match["quant"])


def _all_shards(url: str, name: str) -> list[RemoteFile]:
    """All files of a split model, given the URL of one."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return [RemoteFile(url, name)]
    count = int(match["count"])
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    quoted = urllib.parse.quote(name)
    at = url.rindex(quoted) if quoted in url else url.rindex(name)
    end = at + len(quoted if quoted in url else name)
    return [RemoteFile(url[:at] + urllib.parse.quote(each) + url[end:], each) for each in names]


def _of_repository(repo: str, quant: str) -> list[RemoteFile]:
    endpoint = (env.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    with _open(f"{endpoint}/api/models/{repo}/tree/main?recursive=true") as response:
        listed: list[dict[str, Any]] = json.loads(response.read())
    files = {entry["path"]: entry for entry in listed if str(entry.get("path", "")).endswith(".gguf")}
    # A quantisation's name stands alone in the file's: Q4_K_M is not in Q4_K_M_XL.
    alone = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = {path: entry for path, entry in files.items() if alone.search(path)}
    stems = sorted(
        {m["stem"] if (m := _SHARD.fullmatch(path)) else path.removesuffix(".gguf") for path in found}
    )
    if len(stems) != 1:
        have = ", ".join(sorted(files)) or "no .gguf files"
        problem = f"has no {quant}" if not stems else f"has several: {', '.join(stems)}"
        raise ConfigError(f"pull: {repo} {problem}; it has {have}. A file's URL can be given too")
    remote = []
    for path, entry in sorted(found.items()):
        lfs = entry.get("lfs") or {}
        sha256 = lfs.get("oid", "").removeprefix("sha256:")
        remote.append(
            RemoteFile(
                f"{endpoint}/{repo}/resolve/main/{urllib.parse.quote(path)}",
                Path(path).name,
                int(lfs.get("size", entry.get("size", 0))) or None,
                sha256 if _SHA256.fullmatch(sha256) else None,
            )
        )
    last = _SHARD.fullmatch(remote[-1].name)
    if last is not None and len(remote) != int(last["count"]):
        raise ConfigError(f"pull: {repo} has {len(remote)} of the {int(last['count'])} shards of {quant}")
    return remote


def pull(files: list[RemoteFile], folder: Path, progress: Progress | None = None) -> list[Pulled]:
    """Downloads files that are not there yet.

    Args:
        progress: called with (bytes there, bytes in all) of all files together.

    Raises:
        CapacityError: the disk has too little room; nothing is downloaded.
        DownloadError: a server fails `TRIES` times in a row, or what it sends is wrong. What is there is kept
            for the next try, unless its hash is wrong.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [_with_size(file) for file in files]
    total = sum(file.n_bytes or 0 for file in files)
    there = {file.name: _bytes_there(folder, file) for file in files}
    needed, free = total - sum(there.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise CapacityError(f"{folder}: {needed} more bytes are to be downloaded, and {free} are free")
    done = 0
    pulled = []
    for file in files:
        before = done

        def advance(n_bytes: int, before: int = before) -> None:
            if progress is not None:
                progress(before + n_bytes, total)

        pulled.append(_pull_one(file, folder, advance))
        done += file.n_bytes or pulled[-1].path.stat().st_size
    return pulled


def _bytes_there(folder: Path, file: RemoteFile) -> int:
    for name in (file.name, f"{file.name}.partial"):
        if (folder / name).is_file():
            return (folder / name).stat().st_size
    return 0


def _with_size(file: RemoteFile) -> RemoteFile:
    """What the server tells of size and hash before anything is sent."""
    if file.n_bytes is not None:
        return file
    with _open(file.url, method="HEAD") as response:
        length = response.headers.get("Content-Length")
        tag = (response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or "").strip('"')
    sha256 = file.sha256 or (tag if _SHA256.fullmatch(tag) else None)
    return RemoteFile(file.url, file.name, int(length) if length else None, sha256)


def _pull_one(file: RemoteFile, folder: Path, advance: Callable[[int], None]) -> Pulled:
    path, partial = folder / file.name, folder / f"{file.name}.partial"
    if path.is_file() and (file.n_bytes is None or path.stat().st_size == file.n_bytes):
        found = _hash_of(path, advance)
        if file.sha256 is None or found.hexdigest() == file.sha256:
            return Pulled(path, found.hexdigest(), file.sha256 is not None)
        raise DownloadError(
            f"{path}: this file is not the server's: expected SHA-256 {file.sha256}, "
            f"found {found.hexdigest()}; remove it to download it anew"
        )
    found = _hash_of(partial, advance) if partial.is_file() else hashlib.sha256()
    _receive(file, partial, found, advance)
    if file.sha256 is not None and found.hexdigest() != file.sha256:
        partial.unlink()
        raise DownloadError(
            f"{file.url}: what was sent is damaged: expected SHA-256 {file.sha256}, "
            f"found {found.hexdigest()}; it is removed, try again"
        )
    partial.rename(path)
    return Pulled(path, found.hexdigest(), file.sha256 is not None)


def _receive(file: RemoteFile, partial: Path, found: Any, advance: Callable[[int], None]) -> None:
    """Fetches what is missing of a file, and hashes it."""
    failures = 0
    with partial.open("ab") as out:
        while file.n_bytes is None or out.tell() < file.n_bytes:
            start = out.tell()
            try:
                whole = _receive_some(file, out, found, advance)
            except (OSError, http.client.HTTPException, DownloadError) as error:
                failures = 0 if out.tell() > start else failures + 1
                if failures >= TRIES or (isinstance(error, DownloadError) and not error.passing):
                    raise DownloadError(
                        f"{file.url}: the download failed after {out.tell()} bytes: {error}"
                    ) from error
                time.sleep(min(2.0**failures / 10, 5))
                continue
            if whole and file.n_bytes is None:
                return
            failures = 0 if out.tell() > start else failures + 1
            if failures >= TRIES:
                raise DownloadError(f"{file.url}: the server sends nothing after {out.tell()} bytes")
        if file.n_bytes is not None and out.tell() > file.n_bytes:
            raise DownloadError(f"{partial}: expected {file.n_bytes} bytes, found {out.tell()}; remove it")


def _receive_some(file: RemoteFile, out: Any, found: Any, advance: Callable[[int], None]) -> bool:
    """Appends what one answer brings; whether it came to its end."""
    start = out.tell()
    with _open(file.url, headers={"Range": f"bytes={start}-"} if start else {}) as response:
        if start and response.status != 206:
            raise DownloadError(
                "the server cannot resume; remove the .partial file to start over", passing=False
            )
        while piece := response.read(_PIECE):
            out.write(piece)
            found.update(piece)
            advance(out.tell())
    return True


def _hash_of(path: Path, advance: Callable[[int], None]) -> Any:
    found, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
            done += len(piece)
            advance(done)
    return found


def _open(
    url: str, *, method: str = "GET", headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    """An answer of the server.

    Raises:
        DownloadError: the server refuses; it is ``passing`` where another try may help.
        OSError, http.client.HTTPException: the connection fails.
    """
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "hybrid", **(headers or {})})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        hint = "; is the name right, and the repository public?" if error.code in (401, 403, 404) else ""
        passing = error.code >= 500 or error.code == 429
        raise DownloadError(
            f"{url}: the server answers {error.code} {error.reason}{hint}", passing=passing
        ) from None
    except urllib.error.URLError as error:
        raise DownloadError(f"{url}: {error.reason}", passing=True) from None
    return response
