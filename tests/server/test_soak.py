"""A real server under streams that are cut: nothing of them stays."""

from __future__ import annotations

import random
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest


def left(pid):
    """Descriptors, threads and resident memory (MiB) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return descriptors, int(fields["Threads"]), int(fields["VmRSS"].split()[0]) / 1024


def cut_streams(port, wire, count, generator):
    """Open streams, 20 at a time, and close each after a random while."""
    for _ in range(count // 20):
        connections = []
        for number in range(20):
            connection = socket.create_connection(("127.0.0.1", port))
            body = b'{"prompt": "%s %d", "stream": true, "max_tokens": 200}' % (
                b"once " * generator.randrange(1, 60),
                number,
            )
            connection.sendall(wire.request("/v1/completions", body))
            connections.append(connection)
        generator.shuffle(connections)
        for connection in connections:
            time.sleep(generator.random() * 0.01)
            connection.close()


@pytest.mark.slow
def test_a_thousand_cut_streams_leave_nothing(process, wire, eventually, record_property):
    server = process("-m", "hybrid", "serve", "--port", 0, "-t", 2, "-np", 8, "--max-queue", 64).wait_ready()
    generator = random.Random(3)
    ask = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 16}
    before_text = httpx.post(f"{server.url}/v1/completions", json=ask).json()["choices"]
    cut_streams(server.port, wire, 500, generator)
    settled(server, eventually)
    before = left(server.process.pid)
    cut_streams(server.port, wire, 1000, generator)
    settled(server, eventually)
    after = left(server.process.pid)
    print(f"descriptors, threads, MiB: {before} -> {after}")
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1]
    assert after[2] <= before[2] + 16
    assert httpx.post(f"{server.url}/v1/completions", json=ask).json()["choices"] == before_text
    server.process.terminate()
    assert server.process.wait(20) == 0


def settled(server, eventually):
    def quiet():
        text = httpx.get(f"{server.url}/metrics").text
        return "num_requests_running 0.0" in text and "num_requests_waiting 0.0" in text

    eventually(quiet, 30)
    time.sleep(0.5)


@pytest.mark.slow
def test_a_drain_under_load(process, eventually):
    """Streams of the real engine that are under way finish; the process ends with 0."""
    server = process("-m", "hybrid", "serve", "--port", 0, "-t", 2, "-np", 4).wait_ready()
    streams = [[] for _ in range(8)]  # four run, four wait

    def read(number):
        body = {"prompt": f"Story {number}:", "stream": True, "max_tokens": 150, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            streams[number].extend(answer.iter_lines())

    threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: "num_requests_running 4.0" in httpx.get(f"{server.url}/metrics").text, 30)
    server.process.terminate()
    eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    for thread in threads:
        thread.join(60)
    for lines in streams:
        assert lines[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in lines[-4]
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.text()
