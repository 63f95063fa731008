"""Who may use the server: API keys, and for a server without one the checks that keep other web pages out.

A page in the user's browser can reach a server on this machine. Without a key, two things give it away: its
`Origin`, and, where it lets a name of its own point to this machine, the `Host` it asks for.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hybrid.server.body import discard_body
from hybrid.server.errors import ApiError
from hybrid.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/", "/status", "/health", "/favicon.ico"})


class Guard:
    """ASGI middleware: an `ApiError` for those who may not."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in settings.api_keys)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.cors_origins)
        named = (*settings.allowed_hosts, settings.host, socket.gethostname(), "localhost")
        self._hosts = frozenset(host.lower().rstrip(".") for host in named)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        await discard_body(receive)
        problem.headers["connection"] = "close"
        await problem.response()(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._keys:
            is_open = scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD")
            return None if is_open or self._is_preflight(scope, headers) else self._check_key(headers)
        return self._check_host(headers) or self._check_origin(headers)

    def _is_preflight(self, scope: Scope, headers: Headers) -> bool:
        return scope["method"] == "OPTIONS" and "access-control-request-method" in headers

    def _check_key(self, headers: Headers) -> ApiError | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        encoded = given.encode("utf-8", "replace")
        # Every key is compared, in constant time, so that the time tells nothing.
        if sum([hmac.compare_digest(encoded, key) for key in self._keys]):
            return None
        message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        return ApiError(
            401, message, type="authentication_error", code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )  # fmt: skip

    def _check_host(self, headers: Headers) -> ApiError | None:
        host = _host_of(f"//{headers.get('host', '')}")
        if host is not None and (host in self._hosts or _is_address(host)):
            return None
        message = f"Host {headers.get('host', '')[:100]!r} is not served here; allow it with --allowed-hosts"
        return ApiError(403, message, type="permission_error", code="host_not_allowed")

    def _check_origin(self, headers: Headers) -> ApiError | None:
        origin = headers.get("origin")
        if origin is None or origin.lower() in self._origins:
            return None
        if origin.partition("://")[2].lower() == headers.get("host", "").lower():
            return None  # our own page
        message = f"web pages of {origin[:100]!r} may not call this server; allow them with --cors-origins"
        return ApiError(403, message, type="permission_error", code="origin_not_allowed")


def _host_of(url: str) -> str | None:
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return None
    return None if host is None else host.rstrip(".")


def _is_address(host: str) -> bool:
    """Whether ``host`` is an IP address: no other page's name can stand for one."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
