"""Requests made from the server's own OpenAPI document, valid and not: none may get a 5xx."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

EXAMPLES = 60  # of each operation and kind


def operations(server):
    schema = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    return [result.ok() for result in schema.get_all_operations()]


@pytest.fixture(scope="module")
def quick_server(start_server):
    return start_server(max_queue=1000)


def test_the_document_names_every_endpoint(quick_server):
    document = httpx.get(f"{quick_server.url}/openapi.json").json()
    found = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert found >= {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/v1/models"),
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/version"),
    }
    for item in document["paths"].values():
        for operation in item.values():
            assert "422" not in operation["responses"]
    assert set(document["components"]["schemas"]) >= {"ChatBody", "CompletionBody", "Error"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_made_up_request_gets_a_5xx(quick_server, mode):
    tried = {}
    with httpx.Client(base_url=quick_server.url, timeout=30) as client:
        for operation in operations(quick_server):
            run_operation(operation, mode, client, tried)
        assert client.get("/health").status_code == 200
    assert sum(tried.values()) > 200
    assert not quick_server.engine.running


def run_operation(operation, mode, client, tried):
    cases = operation.as_strategy(generation_mode=mode)

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def send(case):
        name = f"{case.method} {case.path}"
        keywords = case.as_transport_kwargs(base_url=str(client.base_url))
        answer = client.request(
            keywords["method"], keywords["url"], json=keywords.get("json"), params=keywords.get("params"),
            headers={k: v for k, v in (keywords.get("headers") or {}).items() if k.lower() != "content-type"},
        )  # fmt: skip
        tried[name] = tried.get(name, 0) + 1
        assert answer.status_code < 500, (name, keywords.get("json"), answer.text)

    try:
        send()
    except Unsatisfiable:  # nothing can be wrong with an operation that takes nothing
        assert operation.method == "get"
