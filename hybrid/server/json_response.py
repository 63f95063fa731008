"""JSON as it goes over the wire: UTF-8, no spaces, keys in the order they were put in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


def to_json(value: Any) -> str:
    """``value`` as one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    content = to_json(value).encode("utf-8", "replace")
    return Response(content, status, dict(headers or {}), "application/json")
