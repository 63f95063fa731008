"""Requests that are wrong get a 4xx that says what is wrong, and nothing reaches the engine."""

from __future__ import annotations

import json

import httpx
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]
DEEP = 100_000


@pytest.fixture
def server(shared_server):
    shared_server.engine.requests.clear()
    return shared_server


@pytest.fixture
def post(server):
    with httpx.Client(base_url=server.url, timeout=20, verify=False) as client:

        def post(path, body=None, **options):
            if body is not None:
                options["json"] = body
            answer = client.post(path, **options)
            error = answer.json().get("error", {})
            if answer.status_code >= 400:
                assert set(error) >= {"message", "type", "param", "code"}, answer.text
                assert error["message"]
            return answer.status_code, error

        yield post
        assert client.get("/health").status_code == 200


def chat(**fields):
    return {"messages": USER, **fields}


def text(**fields):
    return {"prompt": "Hello", **fields}


WRONG = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": ["Hello"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user"}]}, None),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, None),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, None),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, None),
    (CHAT, chat(temperature="hot"), "temperature"),
    (CHAT, chat(temperature=-1), "temperature"),
    (CHAT, chat(top_p=0), "top_p"),
    (CHAT, chat(top_p=1.5), "top_p"),
    (CHAT, chat(max_tokens=-1), "max_tokens"),
    (CHAT, chat(max_tokens=0), "max_tokens"),
    (CHAT, chat(max_tokens=1.5), "max_tokens"),
    (CHAT, chat(max_tokens=True), "max_tokens"),
    (CHAT, chat(max_completion_tokens=-1), "max_tokens"),
    (CHAT, chat(n=0), "n"),
    (CHAT, chat(n=17), "n"),
    (CHAT, chat(n=10**9), "n"),
    (CHAT, chat(stop=""), "stop"),
    (CHAT, chat(stop=[""]), "stop"),
    (CHAT, chat(stop=["x"] * 100), "stop"),
    (CHAT, chat(stop=5), "stop"),
    (CHAT, chat(seed=2**63), "seed"),
    (CHAT, chat(seed=10**400), "seed"),
    (CHAT, chat(logit_bias={"x": 1}), "logit_bias"),
    (CHAT, chat(logit_bias={"-1": 1}), "logit_bias"),
    (CHAT, chat(logit_bias={"5": 1000}), "logit_bias"),
    (CHAT, chat(presence_penalty=3), "presence_penalty"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty"),
    (CHAT, chat(top_logprobs=3), "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=-1), "top_logprobs"),
    (CHAT, chat(stream="yes"), "stream"),
    (CHAT, chat(stream_options=5), "stream_options"),
    (CHAT, chat(tools=5), "tools"),
    (CHAT, chat(tools=[{}]), "tools"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "no spaces"}}]), "tools"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f", "parameters": 5}}]), "tools"),
    (CHAT, chat(tool_choice="required"), "tool_choice"),
    (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required"),
        "tool_choice",
    ),
    (CHAT, chat(response_format={"type": "xml"}), "response_format.type"),
    (CHAT, chat(response_format={"type": "json_schema"}), "response_format"),
    (CHAT, chat(structured_outputs={"json": {}, "regex": "x"}), "structured_outputs"),
    (CHAT, chat(structured_outputs={"magic": 1}), "structured_outputs"),
    (CHAT, chat(chat_template="{{ 1 }}"), "chat_template"),
    (CHAT, chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    (CHAT, chat(chat_template_kwargs={"tokenize": False}), "chat_template_kwargs"),
    (CHAT, chat(chat_template_kwargs={"enable_thinking": {}}), "chat_template_kwargs"),
    (CHAT, chat(model=5), "model"),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]] * 2, "max_tokens": 1}, None),
    (TEXT, {"prompt": ["x"] * 65}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [4096]}, "prompt"),
    (TEXT, {"prompt": [2**70]}, "prompt"),
    (TEXT, {"prompt": {"a": 1}}, "prompt"),
    (TEXT, text(logprobs=21), "logprobs"),
    (TEXT, text(suffix="x"), "suffix"),
    (TEXT, text(best_of=2), "best_of"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
    ("/detokenize", {"tokens": [-1]}, None),
    ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_wrong_values(post, server, path, body, param):
    status, error = post(path, body)
    assert (status, error["type"]) == (400, "invalid_request_error")
    if param is not None:
        assert error["param"] == param
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"messages": "\xff"}', "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b'{"messages":' + b"[" * DEEP + b"]" * DEEP + b"}", "invalid_json"),
        (b'{"x":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b', "messages": []}', "invalid_json"),
        (b"[]", None),
        (b"null", None),
        (b'"text"', None),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', None),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', None),
    ],
)
def test_bodies_that_are_no_request(post, content, code):
    status, error = post(CHAT, content=content, headers={"content-type": "application/json"})
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert code is None or error["code"] == code


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_other_content_types(post, headers):
    status, error = post(CHAT, content=json.dumps(chat()), headers=headers)
    assert (status, error["type"]) == (415, "invalid_request_error")


def test_a_hundred_megabytes(post):
    body = b'{"messages": [{"role": "user", "content": "' + b"x" * 100_000_000 + b'"}]}'
    status, error = post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_body_without_an_announced_length(post):
    parts = (b" " * 1_000_000 for _ in range(20))
    status, error = post(CHAT, content=parts, headers={"content-type": "application/json"})
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_body_announced_beyond_reason(server, wire):
    head = wire.request(CHAT, b"").replace(b"Content-Length: 0", b"Content-Length: 99999999999")
    assert wire.send(server.port, head).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n bad: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + b"\x00" * 64,  # TLS
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http(server, wire, data):
    assert wire.send(server.port, data, timeout=3).startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_overlong_prompts_say_by_how_much(post):
    for stream in (False, True):
        status, error = post(TEXT, {"prompt": [300] * 3000, "stream": stream})
        assert (status, error["type"]) == (400, "exceed_context_size_error")
        assert (error["n_prompt_tokens"], error["n_ctx"]) == (3000, 2048)
        assert error["code"] == "context_length_exceeded"


def test_unknown_places(post, server):
    assert post("/v1/nothing", {})[1]["type"] == "not_found_error"
    assert post(CHAT, chat(model="gpt-5"))[1]["code"] == "model_not_found"
    assert post(CHAT, chat(model="demo"))[0] == 200
    answer = httpx.get(server.url + CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert httpx.get(f"{server.url}/v1/models/demo").json()["id"] == "demo"
    assert httpx.get(f"{server.url}/v1/models/x/y").status_code == 404


def test_unknown_fields_are_ignored(post):
    assert post(CHAT, chat(user="me", metadata={"a": 1}, store=True))[0] == 200


def test_what_a_request_asks_for_reaches_the_engine(post, server):
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": "END",
        "max_completion_tokens": 9, "max_tokens": 5, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "repetition_penalty": 1.1, "logit_bias": {"7": -3}, "min_tokens": 1, "ignore_eos": True,
    }  # fmt: skip
    assert post(CHAT, chat(**fields, logprobs=True, top_logprobs=4))[0] == 200
    ((_, params),) = server.engine.requests
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.seed, params.stop, params.max_tokens, params.logprobs) == (3, ("END",), 9, 4)
    assert (params.logit_bias, params.ignore_eos, params.min_tokens) == ({7: -3}, True, 1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)


def test_user_text_never_becomes_a_control_token(post, server):
    tokenizer = server.engine.tokenizer
    bad = "".join(tokenizer.control_texts)
    parts = [{"type": "text", "text": bad}, {"type": "text", "text": "<|assistant|>"}]
    for content in (bad, parts):
        assert post(CHAT, {"messages": [{"role": "user", "content": content}]})[0] == 200
    assert post(TEXT, {"prompt": bad})[0] == 200
    counts = [sum(map(tokenizer.is_control, ids)) for ids, _ in server.engine.requests]
    assert counts == [3, 3, 1]  # bos, user, assistant; bos


def test_several_prompts_and_echo(server):
    body = {"prompt": ["One", "Two"], "echo": True, "max_tokens": 2}
    answer = httpx.post(server.url + TEXT, json=body).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "OneOnce upon"), (1, "TwoOnce upon")]
    assert answer["usage"]["completion_tokens"] == 4


def test_text_log_probabilities(server):
    answer = httpx.post(server.url + TEXT, json={"prompt": "A", "logprobs": 2, "max_tokens": 2}).json()
    tokens = server.engine.tokenizer
    others = [tokens.decode([100]), tokens.decode([101])]
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 4],
        "token_logprobs": [-0.5, -0.5],
        "tokens": ["Once", " upon"],
        "top_logprobs": [{"Once": -0.5, others[0]: -1.5}, {" upon": -0.5, others[0]: -1.5}],
    }


def test_tokens_and_back(server):
    found = httpx.post(
        f"{server.url}/tokenize", json={"content": "Once upon", "return_token_strs": True}
    ).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 2048
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": found["tokens"][1:]}).json()
    assert back == {"prompt": "Once upon", "content": "Once upon"}
    chatted = httpx.post(f"{server.url}/tokenize", json={"messages": USER}).json()
    httpx.post(server.url + CHAT, json=chat())
    assert chatted["tokens"] == server.engine.requests[0][0]
