"""The endpoints that tell and generate nothing: models, health, metrics, version, tokens."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hybrid.server.chat_prompt import checked_options, encode_chat
from hybrid.server.context import Phase, ServerContext
from hybrid.server.errors import ApiError, refuse
from hybrid.server.json_response import json_response
from hybrid.server.metrics import CONTENT_TYPE
from hybrid.server.openapi import json_body
from hybrid.server.protocol import DetokenizeBody, TokenizeBody


def info_routes(context: ServerContext) -> APIRouter:
    """The routes, for the state in ``context``."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        phase = context.phase
        if phase is Phase.READY and context.engine is not None and context.engine.errored is not None:
            phase = Phase.FAILED
        if phase is Phase.READY:
            return json_response({"status": "ok"})
        error = ApiError(503, f"not ready: {phase}", type="unavailable_error", code=phase.value)
        body = {"status": phase.value, "progress": round(context.progress, 4), **error.body()}
        return json_response(body, 503, {"retry-after": "1"})

    @router.get("/version")
    async def show_version() -> Response:
        return json_response({"version": version("hybrid-moe")})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(context.metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/v1/models")
    async def models() -> Response:
        _, card = context.check_ready()
        return json_response({"object": "list", "data": [card.json()]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        context.check_model(name)
        return json_response(context.check_ready()[1].json())

    @router.post("/tokenize", openapi_extra=json_body(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await context.bodies.read(request, TokenizeBody)
        return json_response(await context.in_thread(lambda: _tokenize(context, body)))

    @router.post("/detokenize", openapi_extra=json_body(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await context.bodies.read(request, DetokenizeBody)
        tokenizer = context.check_ready()[0].tokenizer
        text = await context.in_thread(lambda: tokenizer.decode(body.tokens))
        return json_response({"prompt": text, "content": text})

    return router


def _tokenize(context: ServerContext, body: TokenizeBody) -> dict[str, Any]:
    engine, card = context.check_ready()
    text = body.prompt if body.prompt is not None else body.content
    if (text is None) == (body.messages is None):
        refuse("expected prompt (or content), or messages", "prompt")
    if body.messages is not None:
        options = checked_options(body.chat_template_kwargs, None)
        ids = encode_chat(
            engine, body.messages, tools=body.tools, options=options,
            add_generation_prompt=body.add_generation_prompt,
        )  # fmt: skip
    else:
        add_special = body.add_special_tokens if body.add_special is None else body.add_special
        ids = engine.tokenizer.encode(text or "", add_special=add_special)
    found = {"count": len(ids), "max_model_len": card.max_model_len, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [engine.tokenizer.token_text(token_id) for token_id in ids]
    return found
