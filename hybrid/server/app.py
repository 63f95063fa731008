"""All endpoints and middleware of a server as one ASGI application."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from hybrid.server import errors, openapi
from hybrid.server.chat import ChatAnswer
from hybrid.server.completions import CompletionAnswer
from hybrid.server.context import ServerContext
from hybrid.server.guard import Guard
from hybrid.server.info import info_routes
from hybrid.server.json_response import json_response
from hybrid.server.messages import MessagesAnswer
from hybrid.server.protocol import ChatBody, CompletionBody, CountTokensBody, MessagesBody, ResponsesBody
from hybrid.server.request_log import RequestLog
from hybrid.server.respond import Reply
from hybrid.server.responses import ResponsesAnswer

PAGES = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(context: ServerContext) -> ASGIApp:
    """The application. From outside in: log, key and origin, browsers, errors, endpoints."""
    app = FastAPI(title="hybrid", version=version("hybrid-moe"), docs_url=None, redoc_url=None)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    errors.add_handlers(app)
    app.include_router(info_routes(context))
    app.include_router(_generation_routes(context))
    app.include_router(_page_routes())
    app.add_middleware(errors.Unexpected)
    inner: ASGIApp = app
    settings = context.settings
    if settings.cors_origins:
        inner = CORSMiddleware(
            inner, allow_origins=settings.cors_origins, allow_methods=("GET", "POST"), allow_headers=("*",)
        )
    return RequestLog(Guard(inner, settings))


def _generation_routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=openapi.json_body(ChatBody))
    async def chat_completions(request: Request) -> Response:
        body = await context.bodies.read(request, ChatBody)
        context.check_model(body.model)
        return Reply(context, ChatAnswer(context, body))

    @router.post("/v1/completions", openapi_extra=openapi.json_body(CompletionBody))
    async def completions(request: Request) -> Response:
        body = await context.bodies.read(request, CompletionBody)
        context.check_model(body.model)
        return Reply(context, CompletionAnswer(context, body))

    @router.post("/v1/responses", openapi_extra=openapi.json_body(ResponsesBody))
    async def responses(request: Request) -> Response:
        body = await context.bodies.read(request, ResponsesBody)
        context.check_model(body.model)
        return Reply(context, ResponsesAnswer(context, body))

    @router.post("/v1/messages", openapi_extra=openapi.json_body(MessagesBody))
    async def messages(request: Request) -> Response:
        body = await context.bodies.read(request, MessagesBody)
        context.check_model(body.model)
        return Reply(context, MessagesAnswer(context, body))

    @router.post("/v1/messages/count_tokens", openapi_extra=openapi.json_body(CountTokensBody))
    async def count_tokens(request: Request) -> Response:
        body = await context.bodies.read(request, CountTokensBody)
        context.check_model(body.model)
        jobs = await context.in_thread(MessagesAnswer(context, body).jobs)
        return json_response({"input_tokens": len(jobs[0].prompt["prompt_token_ids"])})

    return router


def _page_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def conversations() -> Response:
        return _page("index.html")

    @router.get("/status")
    async def status() -> Response:
        return _page("status.html")

    return router


def _page(name: str) -> Response:
    path = PAGES / name
    if not path.is_file():
        raise errors.not_found("this build has no web page; the API is under /v1")
    return Response(path.read_bytes(), media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)
