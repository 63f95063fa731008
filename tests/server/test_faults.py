"""Clients that leave, queues that are full, engines that die."""

from __future__ import annotations

import json
import random
import socket
import threading
import time

import httpx
import pytest

from hybrid.errors import CapacityError, QueueTimeoutError
from hybrid.server import respond

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MANY = [" word"] * 2000


def texts(lines):
    """Contents of a completion stream's events."""
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [event["choices"][0]["text"] for event in events if event.get("choices")]


class Stream:
    """A streamed completion that is read line by line and may be dropped."""

    def __init__(self, url, **body):
        self.client = httpx.Client(timeout=20, verify=False)
        self.manager = self.client.stream("POST", url + TEXT, json={"prompt": "A", "stream": True, **body})

    def open(self):
        self.answer = self.manager.__enter__()
        self.lines = self.answer.iter_lines()
        return self

    def read(self, count):
        found = []
        while len(found) < count:
            found += [line for line in [next(self.lines)] if line.startswith("data")]
        return found

    def drop(self):
        self.answer.close()
        self.client.close()


def test_a_client_that_leaves_while_it_reads(serve, eventually):
    server = serve(pieces=MANY, step_s=0.002)
    stay = Stream(server.url, max_tokens=300).open()
    leave = Stream(server.url).open()
    leave.read(3)
    leave.drop()
    eventually(lambda: len(server.engine.aborted) == 1)
    assert "".join(texts(stay.lines)) == " word" * 300
    assert server.engine.finished == ["cmpl-0"]
    eventually(lambda: server.context.num_under_way == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "mock", [{"prefill_s": 60.0}, {"pieces": MANY, "step_s": 0.05}], ids=["prefill", "decode"]
)
def test_a_client_that_leaves_while_it_waits(serve, eventually, wire, mock, stream):
    server = serve(**mock)
    body = b'{"prompt": "A", "stream": %s}' % str(stream).lower().encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(wire.request(TEXT, body))
        eventually(lambda: server.engine.running)
    eventually(lambda: server.engine.aborted == ["cmpl-0"])
    eventually(lambda: server.context.num_under_way == 0)
    assert not server.engine.running


def test_a_client_that_leaves_the_queue(serve, eventually):
    """It is removed, and the request that runs is not touched."""
    server = serve(pieces=MANY, step_s=0.002, max_num_seqs=1)
    running = Stream(server.url, max_tokens=500).open()
    running.read(1)
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + TEXT, json={"prompt": "B"}, timeout=0.3)
    eventually(lambda: server.engine.aborted == ["cmpl-1"])
    assert len(server.engine.waiting) == 0
    assert len(texts(running.lines)) == 499
    assert server.engine.finished == ["cmpl-0"]


def test_a_client_that_leaves_while_its_prompt_is_rendered(serve, eventually, monkeypatch):
    server = serve()
    gate = threading.Event()
    encode = server.engine.chat_template.encode
    monkeypatch.setattr(
        server.engine.chat_template,
        "encode",
        lambda *args, **options: gate.wait(10) and encode(*args, **options),
    )
    with pytest.raises(httpx.TimeoutException):
        messages = [{"role": "user", "content": "A"}]
        httpx.post(server.url + CHAT, json={"messages": messages}, timeout=0.3)
    eventually(lambda: server.context.num_under_way == 0)
    gate.set()
    assert not server.engine.requests


def test_a_slow_template_holds_up_nobody_else(serve, monkeypatch):
    server = serve(settings={"render_timeout_s": 0.5})
    gate = threading.Event()
    monkeypatch.setattr(server.engine.chat_template, "encode", lambda *args, **options: gate.wait(10))
    answer = httpx.post(server.url + CHAT, json={"messages": [{"role": "user", "content": "A"}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "render_timeout")
    assert httpx.get(f"{server.url}/health").status_code == 200
    gate.set()


def test_a_full_queue(serve):
    server = serve(pieces=MANY, step_s=0.01, max_num_seqs=1, max_queue=2)
    streams = [Stream(server.url) for _ in range(3)]
    streams[0].open().read(1)
    threads = [threading.Thread(target=stream.open, daemon=True) for stream in streams[1:]]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(server.engine.waiting) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    for stream in (False, True):
        answer = httpx.post(server.url + TEXT, json={"prompt": "B", "stream": stream})
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert "2 requests wait" in answer.json()["error"]["message"]
    streams[0].drop()


def test_a_request_that_waits_too_long(serve):
    server = serve(fail_at={-1: QueueTimeoutError(3, 12.5)})
    answer = httpx.post(server.url + TEXT, json={"prompt": "A"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
    assert "12.5 s" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers


def test_several_prompts_fail_together(serve, eventually):
    """One of them does not fit: no other goes on for nobody."""
    server = serve(pieces=MANY, step_s=0.01)
    answer = httpx.post(server.url + TEXT, json={"prompt": ["A", "B " * 3000]})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "exceed_context_size_error")
    eventually(lambda: not server.engine.running)


@pytest.mark.parametrize("error", [ValueError("x"), MemoryError(), RecursionError(), CapacityError("x")])
def test_a_request_that_fails_alone(serve, error):
    server = serve(fail_at={1: error})
    answer = httpx.post(server.url + TEXT, json={"prompt": "A"})
    assert answer.status_code == (503 if isinstance(error, MemoryError | CapacityError) else 500)
    assert answer.json()["error"]["type"] == "server_error"
    server.engine.fail_at.clear()
    assert httpx.post(server.url + TEXT, json={"prompt": "A"}).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_engine_that_dies(serve, eventually):
    """Streams get an error event and no [DONE], whole answers a 503; the server ends with code 1."""
    server = serve(pieces=MANY, step_s=0.01)
    stream = Stream(server.url).open()
    stream.read(2)
    answers = []
    whole = threading.Thread(
        target=lambda: answers.append(httpx.post(server.url + TEXT, json={"prompt": "B"}, timeout=20))
    )
    whole.start()
    eventually(lambda: len(server.engine.running) == 2)
    server.call(server.engine.die)
    last = [line for line in stream.lines if line][-1]
    assert json.loads(last[6:])["error"]["code"] == "engine_failed"
    whole.join(10)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "engine_failed"
    server.thread.join(10)
    assert server.exit_code == 1
    assert server.engine.closed


def test_health_of_a_dead_engine(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(type(server.server), "_fail", lambda self: _nothing())
    server.engine.errored = RuntimeError("x")
    answer = httpx.get(f"{server.url}/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    assert httpx.post(server.url + TEXT, json={"prompt": "A"}).status_code == 503
    server.engine.errored = None


async def _nothing():
    return None


def test_draining(serve, eventually):
    server = serve(pieces=MANY, step_s=0.005)
    stream = Stream(server.url, max_tokens=200).open()
    stream.read(1)
    server.call(server.server.stop)
    eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    assert httpx.get(f"{server.url}/health").json()["status"] == "draining"
    refused = httpx.post(server.url + TEXT, json={"prompt": "B"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    lines = list(stream.lines)
    assert len(texts(lines)) == 199
    assert "data: [DONE]" in lines
    server.thread.join(10)
    assert (server.exit_code, server.engine.closed) == (0, True)


def test_draining_has_an_end(serve):
    server = serve(pieces=MANY, step_s=0.05, settings={"shutdown_timeout_s": 0.3})
    stream = Stream(server.url).open()
    stream.read(1)
    server.call(server.server.stop)
    last = [line for line in stream.lines if line][-1]
    assert json.loads(last[6:])["error"]["code"] == "draining"
    server.thread.join(10)
    assert (server.exit_code, server.engine.aborted) == (0, ["cmpl-0"])


def test_a_thousand_streams_cut_at_random(serve, eventually, wire):
    """Nothing is left of them: no place in the engine, no task, no connection."""
    server = serve(pieces=MANY, step_s=0.001, max_num_seqs=16, max_queue=1000)
    generator = random.Random(1)
    data = wire.request(TEXT, b'{"prompt": "A", "stream": true}')
    before = threading.active_count()
    for _ in range(40):
        connections = []
        for _ in range(25):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.sendall(
                data[: generator.randrange(10, len(data))] if generator.random() < 0.2 else data
            )
            connections.append(connection)
        time.sleep(generator.random() * 0.02)
        for connection in connections:
            connection.close()
    eventually(lambda: not server.engine.running and not server.engine.waiting)
    eventually(lambda: not server.server.server_state.connections)
    eventually(lambda: server.context.num_under_way == 0)
    assert not server.context._generations
    assert threading.active_count() <= before + 8
    assert httpx.post(server.url + TEXT, json={"prompt": "A", "max_tokens": 2}).status_code == 200


def test_answers_are_cleaned_up_where_a_response_breaks(serve, monkeypatch, eventually):
    """An error of our own in the middle of a stream: an event, no [DONE], the request aborted."""
    server = serve(pieces=MANY, step_s=0.01)
    count = iter(range(100))
    original = respond.Reply._count

    def broken(self, event):
        if next(count) == 3:
            raise ZeroDivisionError
        original(self, event)

    monkeypatch.setattr(respond.Reply, "_count", broken)
    answer = httpx.post(server.url + TEXT, json={"prompt": "A", "stream": True})
    assert "[DONE]" not in answer.text
    assert "internal error" in answer.text
    eventually(lambda: server.engine.aborted == ["cmpl-0"])
