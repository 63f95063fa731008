"""What streams look like on the wire, byte for byte."""

from __future__ import annotations

import json

HEAD = '"object":"chat.completion.chunk","created":1700000000,"model":"demo"'
TIMINGS = (
    '"timings":{"cache_n":2,"prompt_n":4,"prompt_ms":2000.0,"prompt_per_second":2.0,'
    '"predicted_n":2,"predicted_ms":4000.0,"predicted_per_second":0.25}'
)
USER = [{"role": "user", "content": "Tell a story."}]


def chunk(delta, finish="null", *, index=0, usage="", extra="", logprobs="null"):
    choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'
    return f'data: {{"id":"chatcmpl-0",{HEAD},"choices":[{choice}]{usage}{extra}}}\n\n'


def stream(client, path="/v1/chat/completions", **body):
    answer = client.post(path, json={"stream": True, **body})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    return answer.content.decode()


def client_of(server):
    import httpx

    return httpx.Client(base_url=server.url, timeout=20)


def test_a_chat(serve):
    server = serve(pieces=["Ünder", " the 🌳"], num_cached_tokens=2)
    with client_of(server) as client:
        assert stream(client, messages=USER, max_tokens=2) == (
            chunk('{"role":"assistant","content":""}')
            + chunk('{"content":"Ünder"}')
            + chunk('{"content":" the 🌳"}')
            + chunk(
                "{}", '"stop"', extra="," + TIMINGS.replace('"prompt_n":4', f'"prompt_n":{prompt_n(server)}')
            )
            + "data: [DONE]\n\n"
        ).replace(rate(server), actual_rate(server))


def prompt_n(server):
    return len(server.engine.requests[0][0]) - 2


def rate(server):
    return '"prompt_per_second":2.0'


def actual_rate(server):
    return f'"prompt_per_second":{round(prompt_n(server) / 2.0, 3)}'
