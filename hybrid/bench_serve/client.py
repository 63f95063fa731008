"""One request of a load test, on a connection of its own."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from hybrid.bench_serve.options import LoadOptions
from hybrid.errors import ConfigError, HybridError


@dataclass
class Sample:
    """What a client saw of one request. Seconds; ``error`` is why it was not answered.

    ``begun`` and ``token_times`` are readings of `time.perf_counter`.
    """

    num_prompt_tokens: int
    begun: float = 0.0
    token_times: list[float] = field(default_factory=list)
    total_s: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def first_token_s(self) -> float | None:
        return self.token_times[0] - self.begun if self.token_times else None

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times)]

    @property
    def num_output_tokens(self) -> int:
        return int(self.usage.get("completion_tokens", 0))

    @property
    def num_cached_tokens(self) -> int:
        details = self.usage.get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)


def check_loopback(url: str) -> None:
    """Raise `ConfigError` unless ``url`` leads to this machine: a load test of others must be meant."""
    host = _parts(url)[0]
    addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise ConfigError(f"--url: {host} is another machine; --allow-remote if it is yours to load")


async def model_card(options: LoadOptions) -> dict[str, Any]:
    """The server's model, as ``/v1/models`` has it.

    Raises:
        HybridError: the server cannot be reached, or has no model yet.
    """
    try:
        status, lines = await _exchange(options, "GET", "/v1/models", None)
        text = b"".join([line async for line in lines])
    except OSError as error:
        raise HybridError(f"{options.url}: {error.strerror or error}; is `hybrid serve` running?") from None
    answer = json.loads(text)
    if status != 200:
        raise HybridError(f"{options.url}/v1/models: {status} {answer['error']['message']}")
    found: dict[str, Any] = answer["data"][0]
    return found


async def complete(
    options: LoadOptions, model: str, prompt: list[int], num_output: int, sample: Sample | None = None
) -> Sample:
    """Stream ``num_output`` tokens after ``prompt``; failures are in the sample, which fills meanwhile."""
    sample = Sample(len(prompt)) if sample is None else sample
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_output,
        "min_tokens": num_output,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,  # an event for each token, also for one that is half a character
        "stream_options": {"include_usage": True},
    }
    try:
        async with asyncio.timeout(options.request_timeout_s):
            await _watch(options, body, sample)
    except TimeoutError:
        sample.error = "timeout"
    except (OSError, EOFError, h11.ProtocolError) as error:
        sample.error = type(error).__name__
    return sample


async def _watch(options: LoadOptions, body: dict[str, Any], sample: Sample) -> None:
    sample.begun = time.perf_counter()
    status, lines = await _exchange(options, "POST", "/v1/completions", body)
    ended = False
    async for line in lines:
        if status != 200:
            sample.error = f"HTTP {status}"
        elif line == b"data: [DONE]":
            ended = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            now = time.perf_counter()
            if "error" in event:
                sample.error = str(event["error"].get("type"))
            sample.usage = event.get("usage") or sample.usage
            if event.get("choices"):
                sample.token_times.append(now)
    sample.total_s = time.perf_counter() - sample.begun
    if sample.error is None and not ended:
        sample.error = "cut off"


async def _exchange(
    options: LoadOptions, method: str, path: str, body: dict[str, Any] | None
) -> tuple[int, AsyncIterator[bytes]]:
    """Send a request on a connection of its own; status, and the lines of the answer as they arrive."""
    host, port, base = _parts(options.url)
    reader, writer = await asyncio.open_connection(host, port)
    connection = h11.Connection(h11.CLIENT)
    data = b"" if body is None else json.dumps(body).encode()
    headers = [("host", f"{host}:{port}"), ("connection", "close"), ("content-length", str(len(data)))]
    headers += [("content-type", "application/json")] if body is not None else []
    headers += [("authorization", f"Bearer {options.api_key}")] if options.api_key else []
    request = h11.Request(method=method, target=base + path, headers=headers)
    for event in (request, h11.Data(data), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")

    async def receive() -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await reader.read(1 << 16))
        return event

    async def lines() -> AsyncIterator[bytes]:
        rest = b""
        try:
            while isinstance(event := await receive(), h11.Data):
                *whole, rest = (rest + bytes(event.data)).split(b"\n")
                for line in whole:
                    yield line
            yield rest
        finally:
            writer.close()

    try:
        answer = await receive()
        while isinstance(answer, h11.InformationalResponse):
            answer = await receive()
    except BaseException:
        writer.close()
        raise
    if not isinstance(answer, h11.Response):
        raise EOFError
    return answer.status_code, lines()


def _parts(url: str) -> tuple[str, int, str]:
    """Host, port and path of an ``http://`` address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme != "http":
        raise ConfigError(f"--url: expected http://HOST:PORT, found {url!r}")
    return host, port or 80, parts.path.rstrip("/")
