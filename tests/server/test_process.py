"""Signals and exit codes of a server that is a process of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from hybrid.cli.main import main

MOCK = Path(__file__).parent / "mock_server.py"
MANY = [" word"] * 2000
TEXT = "/v1/completions"


@pytest.fixture
def mock(process):
    """``mock(script...)`` -> a process that serves a mock."""
    return lambda **script: process(MOCK, json.dumps(script))


def read_stream(server, into, **body):
    """Reads a stream in a thread; its lines go to ``into``."""

    def read():
        request = {"prompt": "A", "stream": True, **body}
        with (
            contextlib.suppress(httpx.TransportError),  # the server may end in the middle
            httpx.stream("POST", server.url + TEXT, json=request, timeout=30) as answer,
        ):
            for line in answer.iter_lines():
                into.append(line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains(mock, eventually, signum):
    server = mock(pieces=MANY, step_s=0.005).wait_ready()
    lines = []
    thread = read_stream(server, lines, max_tokens=200)
    eventually(lambda: len(lines) > 3)
    server.process.send_signal(signum)
    eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    thread.join(20)
    assert lines[-2] == "data: [DONE]"
    assert sum('"text":" word"' in line for line in lines) == 200
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.text()


def test_the_second_signal_ends_it_at_once(mock, eventually):
    server = mock(pieces=MANY, step_s=0.5).wait_ready()
    lines = []
    read_stream(server, lines)
    eventually(lambda: lines)
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: "draining" in server.text())
    assert server.process.poll() is None
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 5
    assert "Traceback" not in server.text()


def test_a_drain_has_an_end(mock, eventually):
    server = mock(pieces=MANY, step_s=0.1, settings={"shutdown_timeout_s": 0.5}).wait_ready()
    lines = []
    thread = read_stream(server, lines)
    eventually(lambda: lines)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    thread.join(10)
    assert '"code":"draining"' in lines[-2]


@pytest.mark.parametrize("deaf", [False, True], ids=["listening", "deaf"])
def test_a_signal_while_the_model_loads(mock, eventually, deaf):
    server = mock(load_s=120.0, deaf=deaf)
    answer = httpx.get(f"{server.url}/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "loading")
    refused = httpx.post(server.url + TEXT, json={"prompt": "A"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    assert "retry-after" in refused.headers
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(15) == 0
    assert "Traceback" not in server.text()


def test_an_engine_that_dies_ends_the_process(mock):
    server = mock(pieces=MANY, step_s=0.01, die_at=20).wait_ready()
    lines = []
    read_stream(server, lines).join(20)
    assert '"code":"engine_failed"' in lines[-2]
    assert server.process.wait(10) == 1
    assert "the engine has failed, ending: RuntimeError: the model runner crashed" in server.text()


def hybrid(*arguments):
    command = [sys.executable, "-P", "-m", "hybrid", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_two_servers_on_one_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = hybrid("serve", "--port", port)
    assert done.returncode == 1
    assert done.stderr == (
        f"hybrid: cannot listen on 127.0.0.1:{port}: address already in use; "
        "choose another with --host and --port\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-m", "/nowhere.gguf"), 1, "/nowhere.gguf: cannot open the file: No such file"),
        (("--host", "203.0.113.7"), 1, "cannot listen on 203.0.113.7:8000"),
        (("--port", "0", "-c", "100000"), 2, "expected at most the 2048 tokens"),
    ],
)
def test_what_it_does_not_start_with(arguments, code, message):
    done = hybrid("serve", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "70000"), "expected a port, 0 to 65535"),
        (("--api-key", ""), "--api-key"),
        (("--cors-origins", "*"), "--cors-origins *"),
        (("--max-body", "lots"), "expected a size, as in 8MiB"),
        (("--allowed-hosts", "a b"), "expected names"),
    ],
)
def test_flags_that_are_wrong(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "command"), [("fastapi", "serve"), ("uvicorn", "serve"), ("h11", "bench-serve")]
)
def test_packages_that_are_not_installed(package, command):
    code = (
        f"import sys; sys.modules[{package!r}] = None; from hybrid.cli.main import main;"
        f"sys.exit(main([{command!r}]))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"the package {package}: pip install 'hybrid-moe[server]'" in done.stderr


def test_it_warns_of_an_open_door(process):
    server = process("-m", "hybrid", "serve", "--host", "0.0.0.0", "--port", "0")
    assert "anybody who reaches 0.0.0.0 can use this server; set --api-key" in server.text()
