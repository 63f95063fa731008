"""Slow and silent clients are cut off; the others do not notice."""

from __future__ import annotations

import socket
import time

import httpx
import pytest

from hybrid.server import body

TEXT = "/v1/completions"


def connect(port, receive_buffer=None):
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    return connection


def read_to_end(connection):
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionError:
        pass
    return received


def read_answer(connection):
    """The server's word that it is healthy, in one piece or more."""
    received = b""
    while not received.endswith(b'{"status":"ok"}'):
        piece = connection.recv(65536)
        assert piece
        received += piece
    assert received.startswith(b"HTTP/1.1 200")


def drip(connection, data, *, seconds=5.0, pause=0.05):
    """Send byte by byte until the server has had enough; what it answered, and after how long."""
    started = time.monotonic()
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            connection.settimeout(pause)
            try:
                if not (received := connection.recv(65536)):
                    break
                return received, time.monotonic() - started
            except TimeoutError:
                pass
            assert time.monotonic() - started < seconds, "it was never cut off"
    except ConnectionError:
        pass
    return b"", time.monotonic() - started


@pytest.fixture
def hasty(serve):
    return serve(settings={"header_timeout_s": 0.5, "body_timeout_s": 0.5, "send_timeout_s": 0.5})


def test_headers_in_drips(hasty):
    with connect(hasty.port) as connection:
        received, seconds = drip(connection, b"GET /health HTTP/1.1\r\nX: " + b"a" * 1000)
    assert received.startswith(b"HTTP/1.1 408")
    assert 0.4 < seconds < 3
    assert httpx.get(f"{hasty.url}/health").status_code == 200


def test_a_connection_that_says_nothing(hasty):
    with connect(hasty.port) as connection:
        assert read_to_end(connection) == b""


def test_headers_in_drips_after_a_good_request(hasty):
    with connect(hasty.port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_answer(connection)
        received, seconds = drip(connection, b"GET /health HTTP/1.1\r\nX: " + b"a" * 1000)
    assert received.startswith(b"HTTP/1.1 408")
    assert seconds < 3


def test_a_body_in_drips(hasty):
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n"
    )
    with connect(hasty.port) as connection:
        connection.sendall(head)
        received, seconds = drip(connection, b" " * 1000)
        assert received.startswith(b"HTTP/1.1 408")
        assert b"body_timeout" in received + read_to_end(connection)
    assert seconds < 3


def test_a_body_that_nobody_reads_in_drips(hasty):
    with connect(hasty.port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        read_answer(connection)
        assert drip(connection, b" " * 1000)[1] < 3


def test_large_bodies_share_a_bounded_memory(serve, monkeypatch, eventually):
    monkeypatch.setattr(body, "_MAX_ON_THEIR_WAY", 3_000_000)
    server = serve(settings={"max_body": 2_000_000})
    whole = {"prompt": "A" * 1_800_000}
    free = server.context.bodies._free
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(server.port) as slow:
        slow.sendall(head + b"Content-Length: 1900000\r\n\r\n" + b" " * 1_700_000)
        eventually(lambda: server.context.bodies._free == free - 1_700_000)
        refused = httpx.post(server.url + TEXT, json=whole)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
        assert httpx.post(server.url + TEXT, json={"prompt": "A"}).status_code == 200
    eventually(lambda: server.context.bodies._free == free)
    assert httpx.post(server.url + TEXT, json=whole).json()["error"]["type"] == "exceed_context_size_error"


def test_many_slow_connections_leave_room(hasty):
    slow = [connect(hasty.port) for _ in range(200)]
    for connection in slow:
        connection.sendall(b"GET / HTTP/1.1\r\n")
    started = time.monotonic()
    assert httpx.get(f"{hasty.url}/health").status_code == 200
    assert time.monotonic() - started < 2
    assert all(read_to_end(connection).startswith(b"HTTP/1.1 408") for connection in slow)
    for connection in slow:
        connection.close()


def test_a_reader_that_stops(serve, wire, eventually):
    """The request ends, and what was held for it is bounded; another stream is not held up."""
    piece = "x" * 20_000
    server = serve(pieces=[piece] * 400, step_s=0.001, settings={"send_timeout_s": 1.0})  # 8 MB
    with connect(server.port, 4096) as connection:
        connection.sendall(wire.request(TEXT, b'{"prompt": "A", "stream": true}'))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        answer = httpx.post(server.url + TEXT, json={"prompt": "B", "max_tokens": 3}, timeout=10)
        assert answer.status_code == 200
        eventually(lambda: len(server.engine.aborted) == 1)
        assert not server.engine.running
        eventually(lambda: len(server.server.server_state.connections) <= 1)


def test_a_reader_that_is_slow_but_reads(serve, wire):
    server = serve(pieces=["x" * 20_000] * 100, settings={"send_timeout_s": 0.5})
    received = b""
    with connect(server.port, 65536) as connection:
        connection.sendall(wire.request(TEXT, b'{"prompt": "A", "stream": true}'))
        started = time.monotonic()
        while piece := connection.recv(100_000):
            received += piece
            if time.monotonic() - started < 1.5:
                time.sleep(0.1)
    assert received.count(b'xx"') == 100
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_whole_answer_that_nobody_takes(serve, wire, eventually):
    server = serve(pieces=["x" * 1_000_000] * 8, settings={"send_timeout_s": 0.5})
    with connect(server.port, 4096) as connection:
        connection.sendall(wire.request(TEXT, b'{"prompt": "A"}'))
        eventually(lambda: server.engine.finished)
        eventually(lambda: not server.server.server_state.connections)


def test_pipelined_requests_are_answered_in_order(shared_server):
    body = b'{"prompt": "A", "max_tokens": 1}'
    one = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    last = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connect(shared_server.port) as connection:
        connection.sendall(one + one + last)
        received = read_to_end(connection)
    assert received.count(b"HTTP/1.1 200") == 3
    assert received.index(b"cmpl-0") < received.index(b"cmpl-1") < received.index(b'"version"')
