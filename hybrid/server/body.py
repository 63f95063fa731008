"""Reading a request's body: so many bytes, in so much time, as JSON of a known shape."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.types import Receive

from hybrid.server.errors import UNAVAILABLE, ApiError, ClientGone
from hybrid.server.protocol import Body
from hybrid.server.settings import ServerSettings

B = TypeVar("B", bound=Body)

_CLOSE = {"connection": "close"}
_MAX_DISCARDED = 256 << 20  # of a body that is too large: read, so that its sender gets to see the answer
_MAX_ON_THEIR_WAY = 256 << 20  # bytes of all bodies that are being read
_INLINE = 64 << 10  # larger bodies are parsed in a thread


class BodyReader:
    """Reads the bodies of a server's requests; those that are on their way share a bounded memory."""

    def __init__(self, settings: ServerSettings) -> None:
        self._limit, self._timeout_s = settings.max_body, settings.body_timeout_s
        self._free = max(_MAX_ON_THEIR_WAY, settings.max_body)

    async def read(self, request: Request, kind: type[B]) -> B:
        """The body as ``kind``.

        Raises:
            ApiError: 415 it is not declared as JSON, 413 too large, 408 too slow, 503 too many large ones at
                once, 400 not what was expected.
            ClientGone: the connection ended first.
        """
        _check_type(request)
        parts: list[bytes] = []
        try:
            await self._receive(request, parts)
            data = b"".join(parts)
            if len(data) <= _INLINE:
                return parse_body(data, kind)
            return await asyncio.to_thread(parse_body, data, kind)
        finally:
            self._free += sum(map(len, parts))

    async def _receive(self, request: Request, parts: list[bytes]) -> None:
        declared = int(request.headers.get("content-length", "0"))
        if declared > self._limit and (declared > _MAX_DISCARDED or "expect" in request.headers):
            raise _too_large(self._limit)
        try:
            async with asyncio.timeout(self._timeout_s):
                size = await self._collect(request.receive, parts)
        except TimeoutError:
            message = f"the body was not there after {self._timeout_s:g} s"
            raise ApiError(408, message, code="body_timeout", headers=_CLOSE) from None
        if size > self._limit:
            raise _too_large(self._limit)

    async def _collect(self, receive: Receive, parts: list[bytes]) -> int:
        """Size of the body; its bytes are in ``parts`` unless it is too large."""
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > _MAX_DISCARDED:
                raise _too_large(self._limit)
            if size <= self._limit:
                if len(part) > self._free:
                    raise ApiError(
                        503, "too many large requests at once", type=UNAVAILABLE, code="busy",
                        headers={**_CLOSE, "retry-after": "1"},
                    )  # fmt: skip
                self._free -= len(part)
                parts.append(part)
            if not message.get("more_body", False):
                return size


def parse_body(data: bytes, kind: type[B]) -> B:
    """``data`` as ``kind``.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = _param(first["loc"])
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not valid JSON: {first['msg']}", code="invalid_json") from None
        where = f"{param}: " if param else ""
        raise ApiError(400, f"{where}{first['msg']}", param=param) from None


def _param(location: tuple[int | str, ...]) -> str | None:
    """``messages[0].role`` of a pydantic location; which member of a union was tried is left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            text += f".{part}" if text else part
    return text or None


def _check_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        found = content_type or "none"
        raise ApiError(415, f"expected Content-Type: application/json, found {found[:80]}", headers=_CLOSE)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, f"Content-Encoding {encoding[:80]!r} is not supported", headers=_CLOSE)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes (--max-body)", code="body_too_large", headers=_CLOSE
    )


async def discard_body(receive: Receive, max_bytes: int = 1 << 20, timeout_s: float = 1.0) -> None:
    """Take what is left of a small body, so that an early answer is not lost in a reset connection."""
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while size <= max_bytes:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
