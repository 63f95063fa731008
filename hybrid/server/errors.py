"""Errors as the protocol says them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.errors import CapacityError, ContextLengthError, RequestError, TokenizerError
from hybrid.log import get_logger
from hybrid.server.json_response import json_response

logger = get_logger(__name__)

INVALID_REQUEST = "invalid_request_error"
UNAVAILABLE = "unavailable_error"
SERVER_ERROR = "server_error"


class ApiError(Exception):
    """An answer that is an error. ``extra`` joins the error's fields, ``headers`` the response's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code
        self.extra, self.headers = dict(extra or {}), dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        fields = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**fields, **self.extra}}

    def response(self, path: str = "") -> Response:
        """The HTTP response; Anthropic's endpoints have an envelope of their own."""
        envelope = {"type": "error"} if path.startswith("/v1/messages") else {}
        return json_response({**envelope, **self.body()}, self.status, self.headers)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def refuse(message: str, param: str | None = None, code: str | None = None) -> NoReturn:
    """Raise the 400 of a request that is invalid."""
    raise ApiError(400, message, param=param, code=code)


def not_found(message: str, code: str | None = None, param: str | None = None) -> ApiError:
    return ApiError(404, message, type="not_found_error", code=code, param=param)


def busy(message: str, retry_after_s: int) -> ApiError:
    """The 429 of a full queue."""
    headers = {"retry-after": str(retry_after_s)}
    return ApiError(429, message, type="rate_limit_error", code="queue_full", headers=headers)


def unavailable(message: str, code: str, retry_after_s: int = 5) -> ApiError:
    headers = {"retry-after": str(retry_after_s)}
    return ApiError(503, message, type=UNAVAILABLE, code=code, headers=headers)


def from_exception(error: BaseException) -> ApiError:
    """What to tell a client about ``error``; what is no fault of the request is logged with its traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        sizes = {"n_prompt_tokens": error.num_prompt_tokens, "n_ctx": error.max_model_len}
        return ApiError(
            400, str(error), type="exceed_context_size_error", param=error.field,
            code="context_length_exceeded", extra=sizes,
        )  # fmt: skip
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, TokenizerError):
        return ApiError(400, str(error), param="messages")
    logger.error("a request failed", exc_info=error)
    if isinstance(error, MemoryError | CapacityError):
        text = str(error) or "out of memory for this request"
        return ApiError(503, text, type=SERVER_ERROR, code="out_of_memory")
    return ApiError(500, f"internal error: {type(error).__name__}", type=SERVER_ERROR, code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Every error of the framework in the protocol's shape."""

    async def api_error(request: Request, error: Exception) -> Response:
        return from_exception(error).response(request.url.path)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            return not_found(f"{where}: there is no such endpoint").response()
        if error.status_code == 405:
            failed = ApiError(405, f"{where}: the method is not allowed", headers=error.headers)
            return failed.response()
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(400, f"{param}: {first['msg']}", param=param).response()

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # only the log sees it

    app.add_exception_handler(ClientGone, gone)
    for kind in (ApiError, RequestError, TokenizerError):
        app.add_exception_handler(kind, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)


class Unexpected:
    """ASGI middleware: what nobody caught becomes a 500, and is logged once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if started:
                raise  # half a response went out: the connection is cut
            await from_exception(error).response()(scope, receive, send)
