"""Servers in a thread on a mock engine, and `hybrid serve` as a process on the demo model."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from hybrid.server.lifecycle import ModelServer, listen
from hybrid.server.settings import ServerSettings

HERE = Path(__file__).parent


def _mock_module():
    spec = importlib.util.spec_from_file_location("mock_llm", HERE / "mock_llm.py")
    module = sys.modules["mock_llm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mock_llm = sys.modules.get("mock_llm") or _mock_module()


@pytest.fixture(autouse=True, scope="session")
def plain_http():
    """`httpx.get` and the like without reading the machine's certificates each time."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with (
        httpx.Client(verify=False, limits=limits, timeout=20) as client,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("get", "post", "options", "stream"):
            patch.setattr(httpx, name, getattr(client, name))
        yield


class RunningServer:
    """A `ModelServer` on a loop of its own, in a thread. Ids and times of its answers are fixed."""

    def __init__(self, engine, **settings):
        self.engine = engine
        self.settings = ServerSettings(**{"port": 0, "shutdown_timeout_s": 5.0, **settings})
        listener = listen(self.settings)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop, self.exit_code, self.error = None, None, None
        self._ready = threading.Event()

        def run():
            try:
                self.exit_code = asyncio.run(self._run(listener))
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert self._ready.wait(20)

    async def _run(self, listener):
        self.loop = asyncio.get_running_loop()
        self.server = ModelServer(self.settings, listener, self._load)
        context = self.context = self.server.context
        numbers = iter(range(1_000_000))
        context.clock = lambda: 1_700_000_000.0
        context.new_id = lambda prefix: f"{prefix}{next(numbers)}"
        ready = context.ready

        def tell(engine, card):
            ready(engine, card)
            self._ready.set()

        context.ready = tell
        return await self.server.run()

    def _load(self, progress):
        return self.engine, mock_llm.mock_card(self.engine)

    def call(self, function, *arguments):
        """Run ``function`` on the server's loop."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def stop(self):
        with contextlib.suppress(RuntimeError):
            self.call(lambda: self.server._stopping is None and self.server.stop())
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def mock_servers():
    """``start(mock keywords..., settings={...})`` -> a running server and its mock."""
    servers = []

    def start(*, settings=None, **mock):
        servers.append(RunningServer(mock_llm.MockLLM(**mock), **(settings or {})))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def serve():
    """Starts servers for one test."""
    with mock_servers() as start:
        yield start


@pytest.fixture(scope="module")
def start_server():
    """Starts servers for a module."""
    with mock_servers() as start:
        yield start


@pytest.fixture(scope="module")
def start_engine():
    """``start(engine)`` serves a real engine, which the server closes in the end, for a module."""
    servers = []

    def start(engine, **settings):
        servers.append(RunningServer(engine, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def shared_server(start_server):
    """A server of a module that writes "Once upon a time"."""
    return start_server()


def wait_until(condition, seconds=10.0):
    """Until ``condition()``; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def eventually():
    return wait_until


def raw_request(port, data, *, timeout=10.0, half=False):
    """Send bytes, read until the server closes or nothing more comes for a second."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
        return received


def http_bytes(path, body, *, method="POST", headers=()):
    """A request as it goes over the wire; the connection closes after it."""
    lines = [
        f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close",
        "Content-Type: application/json", f"Content-Length: {len(body)}", *headers,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture
def wire():
    return SimpleNamespace(send=raw_request, request=http_bytes)


class ServerProcess:
    """`hybrid serve`, or a script that serves a mock, in a process of its own."""

    def __init__(self, arguments, log, environment=None):
        self.log = log
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-P", *map(str, arguments)],
            stderr=self._file, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        found = []

        def listening():
            assert self.process.poll() is None, self.text()
            found[:] = re.findall(r"listening on (http://\S+:(\d+))", self.text())
            return bool(found)

        wait_until(listening, 60)
        self.url, self.port = found[0][0], int(found[0][1])

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_ready(self):
        def ready():
            assert self.process.poll() is None, self.text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/health").status_code == 200

        wait_until(ready, 60)
        return self

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self._file.close()


@pytest.fixture
def process(tmp_path):
    """``process("-m", "hybrid", "serve", ...)`` starts one; it is killed at the end."""
    running = []

    def start(*arguments, environment=None):
        log = tmp_path / f"server{len(running)}.log"
        running.append(ServerProcess(arguments, log, environment))
        return running[-1]

    yield start
    for each in running:
        each.end()


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory):
    """`hybrid serve` on the demo model; requests of all tests go to it."""
    log = tmp_path_factory.mktemp("server") / "demo.log"
    arguments = ("-m", "hybrid", "serve", "--port", 0, "--max-queue", 32, "-np", 8, "-t", 2)
    server = ServerProcess(arguments, log)
    try:
        yield server.wait_ready()
    finally:
        server.end()
