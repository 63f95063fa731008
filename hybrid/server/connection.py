"""One connection, with deadlines: headers must arrive, and what is sent must be taken.

A client that sends its headers in drips, before its first request or between two, is cut off; so is one
that reads nothing while the server has something to send. What waits for such a client is bounded: the socket
takes `SEND_BUFFER_BYTES`, the transport one message, and then the request behind it waits too.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hybrid.server.json_response import to_json

SEND_BUFFER_BYTES = 256 << 10
_PHRASES = {400: "Bad Request", 408: "Request Timeout"}


class DeadlineConfig(uvicorn.Config):
    """uvicorn's configuration and the two deadlines, in seconds."""

    def __init__(self, app: Any, *, header_timeout_s: float, send_timeout_s: float) -> None:
        super().__init__(
            app, http=DeadlineProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, timeout_graceful_shutdown=2, loop="asyncio",
        )  # fmt: skip
        self.header_timeout_s, self.send_timeout_s = header_timeout_s, send_timeout_s


class DeadlineProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a deadline on each header block and on each pause of the reader."""

    config: DeadlineConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that every byte not yet sent has a deadline
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._between_requests():
            self._expect_headers()
        super().data_received(data)
        if not self._between_requests():
            self._cancel_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_timer()
        self._cancel_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._send_timer is None:
            self._expect_progress()

    def resume_writing(self) -> None:
        self._cancel_send_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.config.header_timeout_s, self._too_slow)

    def _too_slow(self) -> None:
        if not self.conn.trailing_data[0]:  # nothing was asked
            self.transport.close()
            return
        self._refuse(408, f"the headers were not there after {self.config.header_timeout_s:g} s")

    def _expect_progress(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(self.config.send_timeout_s, self._check_progress, unsent)

    def _check_progress(self, unsent_before: int) -> None:
        if self.transport.get_write_buffer_size() < unsent_before:
            self._expect_progress()
        else:
            self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer and close; where a response is under way, only close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or not self._between_requests():
            self.transport.abort()
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = to_json({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _cancel_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
