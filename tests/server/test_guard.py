"""Keys, hosts, origins."""

from __future__ import annotations

import httpx
import pytest

from hybrid.errors import ConfigError
from hybrid.server.guard import OPEN_PATHS
from hybrid.server.settings import ServerSettings

KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def locked(start_server):
    return start_server(settings={"api_keys": ("other", "secret")}).url


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer secret2"},
        {"authorization": "Bearer"},
        {"authorization": "Basic secret"},
        {"authorization": "secret"},
        {"authorization": "Bearer sécret".encode("latin-1")},
        {"x-api-key": "wrong"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"])
def test_without_the_key(locked, headers, path):
    answer = httpx.get(locked + path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/health", "/"])
def test_posts_need_it_too(locked, path):
    assert httpx.post(locked + path, json={}).status_code == 401


@pytest.mark.parametrize("headers", [KEY, {"x-api-key": "other"}, {"authorization": "bearer secret"}])
def test_with_the_key(locked, headers):
    assert httpx.get(f"{locked}/v1/models", headers=headers).status_code == 200


def test_what_is_open(locked):
    assert httpx.get(f"{locked}/health").json() == {"status": "ok"}
    for path in ("/", "/status"):
        page = httpx.get(locked + path)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["x-frame-options"] == "DENY"
    assert httpx.get(f"{locked}/favicon.ico").status_code == 404
    assert {"/", "/status", "/health", "/favicon.ico"} == OPEN_PATHS


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST.:80", 200),
        ("[::1]:8000", 200),
        ("192.168.1.5", 200),
        ("box.lan", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_hosts_without_a_key(serve, host, status):
    url = serve(settings={"allowed_hosts": ("box.lan",)}).url
    assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("https://chat.example", 200),
        ("https://evil.example", 403),
        ("http://127.0.0.1:9999", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_origins_without_a_key(serve, origin, status):
    url = serve(settings={"cors_origins": ("https://chat.example",)}).url
    headers = {"origin": origin, "host": "127.0.0.1:8000"}
    answer = httpx.post(f"{url}/v1/completions", headers=headers, json={"prompt": "A"})
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://chat.example" else None)


def test_a_preflight(serve):
    url = serve(settings={"cors_origins": ("https://chat.example",), "api_keys": ("secret",)}).url
    headers = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    answer = httpx.options(f"{url}/v1/completions", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"


def test_a_server_with_a_key_does_not_ask_for_the_host(locked):
    headers = {**KEY, "host": "anything.example", "origin": "https://other.example"}
    answer = httpx.get(f"{locked}/v1/models", headers=headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers  # a browser keeps the answer from the page


@pytest.mark.parametrize("settings", [{"api_keys": ("",)}, {"api_keys": (" a",)}, {"cors_origins": ("*",)}])
def test_settings_that_are_refused(settings):
    with pytest.raises(ConfigError):
        ServerSettings(**settings)
