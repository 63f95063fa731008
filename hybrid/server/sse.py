"""Server-sent events, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import Send

from hybrid.server.json_response import to_json

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must pass each event on at once
)


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event. JSON has no line breaks outside its escapes, so it is one data line."""
    head = b"" if name is None else b"event: %s\n" % name.encode()
    return head + b"data: " + to_json(data).encode("utf-8", "replace") + b"\n\n"


class EventStream:
    """The sending side of one response. Each call returns when the connection has taken the bytes."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def start(self) -> None:
        """Send status 200 and the headers; a second call does nothing."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})

    async def write(self, data: bytes) -> None:
        if data:
            await self.start()
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
