"""What a server tells of itself: metrics, and one line for each request."""

from __future__ import annotations

import logging
import socket

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

TEXT = "/v1/completions"


def metrics(server):
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(serve, eventually):
    server = serve()
    assert httpx.post(server.url + TEXT, json={"prompt": "A"}).status_code == 200
    assert httpx.post(server.url + TEXT, json={"prompt": "A", "max_tokens": 2}).status_code == 200
    assert httpx.post(server.url + TEXT, json={"prompt": [9999]}).status_code == 400
    found = metrics(server)
    expected = {
        ("hybrid:num_requests_running",): 0,
        ("hybrid:num_requests_waiting",): 0,
        ("hybrid:kv_cache_usage_perc",): 0.25,
        ("hybrid:prefix_cache_queries_total",): 100,
        ("hybrid:prefix_cache_hits_total",): 40,
        ("hybrid:prompt_tokens_total",): 4,
        ("hybrid:generation_tokens_total",): 6,
        ("hybrid:request_success_total", "stop"): 1,
        ("hybrid:request_success_total", "length"): 1,
        ("hybrid:request_errors_total", "invalid_request_error"): 1,
        ("hybrid:time_to_first_token_seconds_count",): 2,
        ("hybrid:time_to_first_token_seconds_bucket", "2621.44"): 2,
        ("hybrid:inter_token_latency_seconds_count",): 4,
        ("hybrid:e2e_request_latency_seconds_count",): 2,
        ("hybrid:request_queue_time_seconds_sum",): 1.0,
        ("hybrid:request_prefill_time_seconds_sum",): 4.0,
        ("hybrid:request_decode_time_seconds_sum",): 8.0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not any("expert_cpu" in key[0] for key in found)  # what is not counted is not shown


@pytest.fixture
def log(caplog):
    """The messages of the request log."""
    caplog.set_level(logging.INFO, "hybrid.server.request_log")
    return lambda: [r.message for r in caplog.records if r.name == "hybrid.server.request_log"]


def test_one_line_for_a_request(serve, log, eventually):
    server = serve(num_cached_tokens=1)
    httpx.post(server.url + TEXT, json={"prompt": "the secret word"})
    httpx.get(f"{server.url}/health")
    httpx.get(f"{server.url}/v1/models%0aINJECTED")
    eventually(lambda: len(log()) == 2)
    first, second = log()
    assert first.startswith("127.0.0.1 POST /v1/completions 200 ")
    counts, times = "prompt=7 cached=1 generated=4", "queue=0.500s prefill=2.000s decode=4.000s"
    assert first.endswith(f"cmpl-0 stop {counts} {times}")
    assert "secret" not in first
    assert second.startswith("127.0.0.1 GET /v1/models\\nINJECTED 404 ")


def test_the_line_of_a_client_that_left(serve, log, eventually, wire):
    server = serve(prefill_s=60.0)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(wire.request(TEXT, b'{"prompt": "A"}'))
        eventually(lambda: server.engine.running)
    eventually(log)
    assert " 499 " in log()[0]
    assert "cmpl-0 gone prompt=0 cached=0 generated=0" in log()[0]
    assert metrics(server)[("hybrid:request_errors_total", "gone")] == 1


def test_prompts_are_logged_if_that_is_asked_for(serve, log, eventually):
    server = serve(settings={"log_prompts": True})
    httpx.post(server.url + TEXT, json={"prompt": "the secret word"})
    eventually(log)
    assert log()[0].endswith('prompt: "the secret word"')
