"""The OpenAPI document: bodies are read by `body`, so their schemas are put in by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from hybrid.server import protocol
from hybrid.server.protocol import Body

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def json_body(kind: type[Body]) -> dict[str, Any]:
    """``openapi_extra`` of an endpoint that takes ``kind``."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document(app: FastAPI) -> dict[str, Any]:
    """The document of ``app``, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        kinds = [
            each
            for each in vars(protocol).values()
            if isinstance(each, type) and issubclass(each, Body) and each.__module__ == protocol.__name__
        ]
        _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
        components = found.setdefault("components", {}).setdefault("schemas", {})
        components.update(schemas.get("$defs", {}), Error=_ERROR)
        failed = {"content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}}
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # ours is 400
                operation["responses"]["default"] = {"description": "an error", **failed}
        app.openapi_schema = found
    return app.openapi_schema
