"""Anthropic's messages and OpenAI's responses: the same work in other words."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from hybrid.server import chat
from hybrid.server.parsers import ParsedDelta, ToolCallDelta

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
ASKED = {"model": "demo", "max_tokens": 20, "messages": [{"role": "user", "content": "Tell a story."}]}


class Thinking:
    """A parser: "Hm" is reasoning, a star calls a tool."""

    def feed(self, text):
        if text == "*":
            first = ToolCallDelta(0, "call_1", "look", '{"at":')
            return [
                ParsedDelta(tool_call=first),
                ParsedDelta(tool_call=ToolCallDelta(0, None, None, '"it"}')),
            ]
        return [ParsedDelta(reasoning=text) if text == "Hm" else ParsedDelta(content=text)]

    def finish(self):
        return []


@pytest.fixture
def thinking(serve, monkeypatch):
    monkeypatch.setattr(chat, "parser_for", lambda template, architecture, **options: Thinking())
    return serve(pieces=["Hm", "I", " see", "*"], num_cached_tokens=2)


def post(server, path, body):
    answer = httpx.post(server.url + path, json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer


def events(answer):
    """(name, data) of each event of a stream."""
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in found)
    return found


def test_a_message(serve):
    server = serve(num_cached_tokens=2)
    assert post(server, MESSAGES, ASKED).json() == {
        "id": "msg_0",
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [{"type": "text", "text": "Once upon a time"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 6,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 4,
        },
    }


def test_a_streamed_message(serve):
    server = serve(pieces=["Ünder", " it"])
    usage = (
        '"usage":{"input_tokens":8,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,'
        '"output_tokens":%d}'
    )
    assert post(server, MESSAGES, {**ASKED, "stream": True}).content.decode() == (
        'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_0","type":"message",'
        '"role":"assistant","model":"demo","content":[],"stop_reason":null,"stop_sequence":null,'
        + usage
        % 1
        + '}}\n\nevent: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":""}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"Ünder"}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":" it"}}\n\n'
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        'event: message_delta\ndata: {"type":"message_delta",'
        '"delta":{"stop_reason":"end_turn","stop_sequence":null},'
        + usage % 2
        + '}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


def test_thinking_and_tools_in_a_message(thinking):
    answer = post(thinking, MESSAGES, ASKED).json()
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"] == [
        {"type": "thinking", "thinking": "Hm", "signature": ""},
        {"type": "text", "text": "I see"},
        {"type": "tool_use", "id": "call_1", "name": "look", "input": {"at": "it"}},
    ]
    streamed = events(post(thinking, MESSAGES, {**ASKED, "stream": True}))
    deltas = [data["delta"] for name, data in streamed if name == "content_block_delta"]
    assert [delta["type"] for delta in deltas] == [
        "thinking_delta",
        "text_delta",
        "text_delta",
        "input_json_delta",
        "input_json_delta",
    ]
    assert "".join(delta["partial_json"] for delta in deltas[3:]) == '{"at":"it"}'
    assert [data["index"] for name, data in streamed if name == "content_block_stop"] == [0, 1, 2]
    assert streamed[-2][1]["delta"]["stop_reason"] == "tool_use"


def test_a_conversation_with_tools_reaches_the_template(serve, monkeypatch):
    server = serve()
    seen = {}

    def watch(messages, **options):
        seen.update(messages=messages, **options)
        return [0, 300]

    monkeypatch.setattr(server.engine.chat_template, "encode", watch)
    body = {
        **ASKED,
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "x"},
                    {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": "it"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "a fox"}]},
        ],
    }
    post(server, MESSAGES, body)
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at":"it"}'}}
    function = {"name": "look", "parameters": {"type": "object"}, "description": "Looks."}
    assert seen["tools"] == [{"type": "function", "function": function}]
    assert seen["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "a fox"},
    ]


def test_tokens_of_a_message(shared_server):
    body = {"messages": ASKED["messages"]}
    assert post(shared_server, f"{MESSAGES}/count_tokens", body).json() == {"input_tokens": 8}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        {"max_tokens": None},
        {"max_tokens": 0},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"name": 5}]},
        {"tools": [{"name": "f"}], "tool_choice": {"type": "any"}},
        {"system": 5},
        {"model": "claude"},
    ],
)
def test_messages_that_are_wrong(shared_server, fields):
    answer = httpx.post(shared_server.url + MESSAGES, json={**ASKED, **fields})
    assert answer.status_code == (404 if "model" in fields else 400)
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["message"]


def test_a_message_that_fails_in_the_middle(serve):
    server = serve(fail_at={1: ValueError()})
    found = events(post(server, MESSAGES, {**ASKED, "stream": True}))
    assert found[-1][0] == "error"
    assert found[-1][1]["error"]["type"] == "server_error"


@pytest.fixture
def client():
    def of(server):
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    return of


def test_a_response(serve, client):
    server = serve(num_cached_tokens=2)
    answer = client(server).responses.create(model="demo", input="Tell a story.", instructions="Be brief.")
    assert answer.output_text == "Once upon a time"
    assert (answer.id, answer.status, answer.created_at) == ("resp_0", "completed", 1_700_000_000)
    assert answer.usage.input_tokens_details.cached_tokens == 2
    assert answer.usage.output_tokens == 4
    short = client(server).responses.create(model="demo", input="A", max_output_tokens=2)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_streamed_response(thinking, client):
    with client(thinking).responses.create(model="demo", input="Tell a story.", stream=True) as stream:
        found = list(stream)
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert [event.type.removeprefix("response.") for event in found] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    reasoning, message, call = found[-1].response.output
    assert reasoning.content[0].text == "Hm"
    assert message.content[0].text == "I see"
    assert (call.name, call.call_id, json.loads(call.arguments)) == ("look", "call_1", {"at": "it"})


def test_what_a_response_is_told(serve, monkeypatch):
    server = serve()
    seen = {}

    def watch(messages, **options):
        seen.update(messages=messages, **options)
        return [0, 300]

    monkeypatch.setattr(server.engine.chat_template, "encode", watch)
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is it?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "a fox"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "a hen"}],
        },
    ]
    tools = [{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}]
    post(server, RESPONSES, {"input": items, "tools": tools})
    assert [message["role"] for message in seen["messages"]] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in seen["messages"][1]["tool_calls"]] == ["c1", "c2"]
    assert seen["messages"][3]["content"] == "a hen"
    function = {"name": "look", "parameters": {"type": "object"}}
    assert seen["tools"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": ""},
        {"input": []},
        {"input": [{"type": "reasoning"}]},
        {"input": [{"type": "file_search_call"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        {"input": [{"role": "nobody", "content": "x"}]},
        {"input": "A", "previous_response_id": "resp_1"},
        {"input": "A", "background": True},
        {"input": "A", "tools": [{"type": "web_search"}]},
        {"input": "A", "text": {"format": {"type": "xml"}}},
        {"input": "A", "text": {"format": 5}},
        {"input": "A", "max_output_tokens": 0},
    ],
)
def test_responses_that_are_wrong(shared_server, body):
    answer = httpx.post(shared_server.url + RESPONSES, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
