"""What streams look like on the wire, byte for byte."""

from __future__ import annotations

import dataclasses
import json
import re

import httpx
import pytest

from hybrid.errors import RequestError
from hybrid.server import chat
from hybrid.server.parsers import ParsedDelta, ToolCallDelta
from hybrid.server.settings import ServerSettings

USER = [{"role": "user", "content": "Tell a story."}]  # 8 tokens with the template's
TIMINGS = (
    '"timings":{"cache_n":2,"prompt_n":6,"prompt_ms":2000.0,"prompt_per_second":3.0,'
    '"predicted_n":%d,"predicted_ms":4000.0,"predicted_per_second":%s}'
)
USAGE = (
    '"usage":{"prompt_tokens":8,"completion_tokens":%d,"total_tokens":%d,'
    '"prompt_tokens_details":{"cached_tokens":2}}'
)
ERROR = 'data: {"error":{"message":"%s","type":"%s","param":null,"code":%s}}\n\n'
PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"


def event(choices, tail=""):
    return (
        'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1700000000,"model":"demo",'
        f'"choices":[{choices}]{tail}}}\n\n'
    )


def chunk(delta, finish="null", *, index=0, tail="", logprobs="null"):
    choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'
    return event(choice, tail)


def role(index=0, tail=""):
    return chunk('{"role":"assistant","content":""}', index=index, tail=tail)


@pytest.fixture
def stream(serve):
    """``stream(mock, body)`` -> the text of a streamed chat on such a server."""

    def run(mock, path="/v1/chat/completions", settings=None, **body):
        server = serve(settings=settings, num_cached_tokens=2, **mock)
        body = {"stream": True, **({"messages": USER} if "chat" in path else {}), **body}
        answer = httpx.post(server.url + path, json=body, timeout=20)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        return answer.content.decode()

    return run


def test_a_chat(stream):
    assert stream({"pieces": ["Ünder", " the 🌳"]}) == (
        role()
        + chunk('{"content":"Ünder"}')
        + chunk('{"content":" the 🌳"}')
        + chunk("{}", '"stop"', tail="," + TIMINGS % (2, "0.25"))
        + DONE
    )


def test_usage_on_request(stream):
    null = ',"usage":null'
    assert stream({"pieces": ["A", "b", "c"]}, stream_options={"include_usage": True}, max_tokens=1) == (
        role(tail=null)
        + chunk('{"content":"A"}', tail=null)
        + chunk("{}", '"length"', tail=null + "," + TIMINGS % (1, "null"))
        + event("", "," + USAGE % (1, 9))
        + DONE
    )


def test_two_choices(stream):
    assert stream({"pieces": ["A", "b"]}, n=2) == (
        role(0)
        + role(1)
        + chunk('{"content":"A"}')
        + chunk('{"content":"A"}', index=1)
        + chunk('{"content":"b"}')
        + chunk("{}", '"stop"')
        + chunk('{"content":"b"}', index=1)
        + chunk("{}", '"stop"', index=1, tail="," + TIMINGS % (4, "0.5"))
        + DONE
    )


def test_tokens_without_text_say_nothing(stream):
    held_back = stream({"pieces": ["", "ab", ""]})
    assert (
        held_back
        == role() + chunk('{"content":"ab"}') + chunk("{}", '"stop"', tail="," + TIMINGS % (3, "0.5")) + DONE
    )


def test_log_probabilities(stream):
    def token(text, value, spelled):
        return f'{{"token":"{text}","logprob":{value},"bytes":{spelled}}}'

    text = stream({"pieces": [" upon", ""]}, logprobs=True, top_logprobs=1)
    chosen = token(" upon", -0.5, "[32,117,112,111,110]")
    entry = f'{{"content":[{chosen[:-1]},"top_logprobs":[{chosen}]}}]}}'
    assert text == (
        role()
        + chunk('{"content":" upon"}', logprobs=entry)
        + chunk("{}", '"stop"', tail="," + TIMINGS % (2, "0.25"))  # the end token has no entry
        + DONE
    )


def test_pings_while_the_prompt_takes_long(stream):
    text = stream({"pieces": ["A"], "prefill_s": 0.5}, settings={"ping_s": 0.1})
    assert text.count(PING) >= 2
    assert re.sub(f"({PING})+", PING, text) == (
        role()
        + PING
        + chunk('{"content":"A"}')
        + chunk("{}", '"stop"', tail="," + TIMINGS % (1, "null"))
        + DONE
    )


def test_progress_of_the_prompt(stream):
    text = stream({"pieces": ["A"], "prompt_steps": 2}, return_progress=True)
    assert text == (
        role()
        + event("", ',"prompt_progress":{"total":8,"processed":2}')
        + event("", ',"prompt_progress":{"total":8,"processed":5}')
        + chunk('{"content":"A"}')
        + chunk("{}", '"stop"', tail="," + TIMINGS % (1, "null"))
        + DONE
    )


def test_an_error_after_the_first_byte(stream):
    text = stream({"pieces": ["A", "b"], "fail_at": {1: ValueError("secret detail")}})
    error = ERROR % ("internal error: ValueError", "server_error", '"internal_error"')
    assert text == role() + chunk('{"content":"A"}') + error


def test_an_error_after_a_ping(stream):
    text = stream({"prefill_s": 0.3, "fail_at": {-1: RequestError("no")}}, settings={"ping_s": 0.2})
    assert text == role() + PING + ERROR % ("no", "invalid_request_error", "null")


def test_an_error_before_the_first_byte_is_a_status(serve):
    server = serve(fail_at={-1: RequestError("no")})
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": USER, "stream": True})
    assert answer.status_code == 400
    assert answer.text == (
        '{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}'
    )


def test_a_text_completion(stream):
    def part(text, finish, tail=""):
        return (
            'data: {"id":"cmpl-0","object":"text_completion","created":1700000000,"model":"demo",'
            f'"choices":[{{"index":0,"text":"{text}","logprobs":null,"finish_reason":{finish}}}]{tail}}}\n\n'
        )

    text = stream({"pieces": [" time", " ago"]}, "/v1/completions", prompt="A long")
    timings = TIMINGS.replace('"prompt_n":6', '"prompt_n":1').replace("3.0", "0.5") % (2, "0.25")
    assert text == part(" time", "null") + part(" ago", '"stop"', "," + timings) + DONE


class Shouting:
    """A parser: capitals are reasoning, a star calls a tool, the rest is content."""

    def feed(self, text):
        if text == "*":
            return [
                ParsedDelta(tool_call=ToolCallDelta(0, "call_1", "look", "")),
                ParsedDelta(tool_call=ToolCallDelta(0, None, None, '{"a":')),
            ]
        return [ParsedDelta(reasoning=text) if text.isupper() else ParsedDelta(content=text)]

    def finish(self):
        return [ParsedDelta(tool_call=ToolCallDelta(0, None, None, "1}"))]


def test_reasoning_and_tool_calls(stream, monkeypatch):
    monkeypatch.setattr(chat, "parser_for", lambda template, architecture, **options: Shouting())
    call = '{"tool_calls":[{"index":0,%s"function":{%s"arguments":"%s"}}]}'
    assert stream({"pieces": ["HM", "ok", "*"]}) == (
        role()
        + chunk('{"reasoning_content":"HM"}')
        + chunk('{"content":"ok"}')
        + chunk(call % ('"id":"call_1","type":"function",', '"name":"look",', ""))
        + chunk(call % ("", "", '{\\"a\\":'))
        + chunk(call % ("", "", "1}"))
        + chunk("{}", '"tool_calls"', tail="," + TIMINGS % (3, "0.5"))
        + DONE
    )


def test_reasoning_and_tool_calls_as_a_whole(serve, monkeypatch):
    monkeypatch.setattr(chat, "parser_for", lambda template, architecture, **options: Shouting())
    server = serve(pieces=["HM", "*"])
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": USER})
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "HM",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
        ],
    }


def test_a_whole_chat(serve):
    server = serve(num_cached_tokens=2)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": USER})
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == (
        '{"id":"chatcmpl-0","object":"chat.completion","created":1700000000,"model":"demo",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"Once upon a time"},'
        '"logprobs":null,"finish_reason":"stop"}],' + USAGE % (4, 12) + "," + TIMINGS % (4, "0.75") + "}"
    )


def test_a_model_that_thinks_and_calls_tools(serve):
    """The parsers of the package, by the model's template."""
    template = "<think>\n</think> <tool_call>"
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
    server = serve(pieces=["<think>", "Hm", "</think>", "I", " see.\n", *call])
    server.context.card = dataclasses.replace(server.context.card, chat_template_text=template)
    function = {"name": "look", "parameters": {"type": "object"}}
    body = {"messages": USER, "tools": [{"type": "function", "function": function}]}
    (choice,) = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "Hm"
    assert choice["message"]["content"] == "I see."
    (found,) = choice["message"]["tool_calls"]
    assert found["function"]["name"] == "look"
    assert json.loads(found["function"]["arguments"]) == {"at": "it"}
    ((_, params),) = server.engine.requests
    assert not params.skip_special_tokens  # the markers may be special tokens
    text = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "stream": True}).text
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"] for line in text.split("\n") if line.startswith("data: {")
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "I see."
    pieces = [each["function"] for delta in deltas for each in delta.get("tool_calls", ())]
    assert "".join(piece.get("name", "") for piece in pieces) == "look"
    assert json.loads("".join(piece["arguments"] for piece in pieces)) == {"at": "it"}


def test_pings_come_every_fifteen_seconds():
    assert ServerSettings().ping_s == 15
