"""Reading a request's body: so many bytes, in so much time, as JSON of a known shape."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.types import Receive, Scope

from hybrid.server.errors import ApiError, ClientGone
from hybrid.server.protocol import Body
from hybrid.server.settings import ServerSettings

B = TypeVar("B", bound=Body)

_CLOSE = {"connection": "close"}
_MAX_DISCARDED = 256 << 20  # of a body that is too large: read, so that its sender gets to see the answer
_INLINE = 64 << 10  # larger bodies are parsed in a thread


async def read_body(request: Request, kind: type[B], settings: ServerSettings) -> B:
    """The body as ``kind``.

    Raises:
        ApiError: 415 it is not declared as JSON, 413 too large, 408 too slow, 400 not what was expected.
        ClientGone: the connection ended first.
    """
    _check_type(request)
    data = await _read(request.scope, request.receive, settings)
    if len(data) <= _INLINE:
        return parse_body(data, kind)
    return await asyncio.to_thread(parse_body, data, kind)


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


async def _read(scope: Scope, receive: Receive, settings: ServerSettings) -> bytes:
    headers = dict(scope["headers"])
    declared = int(headers.get(b"content-length", b"0"))
    limit = settings.max_body
    if declared > limit and (declared > _MAX_DISCARDED or b"expect" in headers):
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size <= limit:
                    parts.append(part)
                else:
                    parts.clear()
                if size > _MAX_DISCARDED:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        message_ = f"the body was not there after {settings.body_timeout_s:g} s"
        raise ApiError(408, message_, code="body_timeout", headers=_CLOSE) from None
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


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
