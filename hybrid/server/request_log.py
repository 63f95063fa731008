"""One line for each request, when it is over. No text of prompts or answers, unless that is asked for."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.log import get_logger
from hybrid.server.record import Record

logger = get_logger(__name__)

_QUIET_PATHS = frozenset({"/health", "/metrics"})  # asked all the time by programs


class RequestLog:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        state = scope.setdefault("state", {})

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
            if logger.isEnabledFor(level):
                text = _line(scope, status, state.get("record"), time.monotonic() - started)
                logger.log(level, "%s%s", text, _prompt(state.get("prompt")))


def _line(scope: Scope, status: int, record: Record | None, total_s: float) -> str:
    client = scope.get("client") or ("-",)
    path = ascii(scope["path"])[1:-1][:200]
    text = f"{client[0]} {scope['method']} {path} {status or '-'} {total_s:.3f}s"
    if record is None:
        return text
    outcome = record.outcome or ",".join(sorted(set(record.finish_reasons))) or "-"
    times = (
        ("queue", record.queue_s),
        ("prefill", record.prompt_s),
        ("decode", record.generation_s),
    )
    shown = " ".join(f"{name}={seconds:.3f}s" for name, seconds in times if seconds is not None)
    return (
        f"{text} {record.request_id} {outcome} prompt={record.num_prompt_tokens} "
        f"cached={record.num_cached_tokens} generated={record.generated_tokens} {shown}".rstrip()
    )


def _prompt(text: str | None) -> str:
    return "" if text is None else f" prompt: {text}"
