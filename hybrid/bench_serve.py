"""A load generator: clients that stream completions from a server, and what they saw.

Prompts are random token ids, so that their length is exact and no prefix is shared but one that is asked for.
Times are the client's: to the first token, between tokens, to the end.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from hybrid.errors import ConfigError, HybridError

MAX_LENGTH = 1 << 20
PERCENTILES = (50, 90, 99)
_FIRST_ID = 256  # ids below are often control tokens or bytes


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: ``N``, ``LOW-HIGH`` (uniform) or ``normal:MEAN,DEVIATION``.

    Raises:
        ConfigError: it is something else, or out of range.
    """

    text: str

    def __post_init__(self) -> None:
        self.draw(random.Random(0))

    def draw(self, generator: random.Random) -> int:
        """A length, at least 1."""
        if found := re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", self.text):
            low = int(found[1])
            high = int(found[2] or found[1])
            if 1 <= low <= high <= MAX_LENGTH:
                return generator.randint(low, high)
        elif found := re.fullmatch(r"normal:(\d{1,7}),(\d{1,7})", self.text):
            return min(max(1, round(generator.gauss(int(found[1]), int(found[2])))), MAX_LENGTH)
        raise ConfigError(f"lengths: expected N, LOW-HIGH or normal:MEAN,DEVIATION, found {self.text!r}")


@dataclass(frozen=True)
class LoadOptions:
    """What to send. ``rate``: requests begun a second, with exponential pauses; ``None``: no pauses."""

    url: str = "http://127.0.0.1:8000"
    num_clients: int = 8
    num_requests: int = 64
    rate: float | None = None
    prompt_tokens: Lengths = Lengths("128")
    output_tokens: Lengths = Lengths("64")
    shared_prefix: int = 0
    request_timeout_s: float = 600.0
    seed: int = 0
    api_key: str | None = None


@dataclass
class Sample:
    """What a client saw of one request. Seconds; ``error`` is why it was not answered."""

    num_prompt_tokens: int
    first_token_s: float | None = None
    total_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

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


async def measure(options: LoadOptions, on_sample: Callable[[Sample], None] = lambda sample: None) -> Result:
    """Send the requests, at most ``num_clients`` at once.

    Raises:
        HybridError: the server cannot be reached, or has no model yet.
    """
    model = await _model(options)
    generator = random.Random(options.seed)
    num_ids = model["meta"]["n_vocab"]
    prefix = _prompt(generator, options.shared_prefix, num_ids)
    places = asyncio.Semaphore(options.num_clients)
    samples: list[Sample] = []

    async def one(prompt: list[int], num_output: int) -> None:
        async with places:
            samples.append(await _request(options, model["id"], prompt, num_output))
            on_sample(samples[-1])

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(options.num_requests):
            prompt = prefix + _prompt(generator, options.prompt_tokens.draw(generator), num_ids)
            group.create_task(one(prompt, options.output_tokens.draw(generator)))
            if options.rate is not None:
                await asyncio.sleep(generator.expovariate(options.rate))
    return Result(options, model["id"], samples, time.perf_counter() - started)


@dataclass(frozen=True)
class Result:
    """All samples of a run that took ``duration_s``."""

    options: LoadOptions
    model: str
    samples: list[Sample]
    duration_s: float

    def summary(self) -> dict[str, Any]:
        """Counts, rates (per second) and percentiles (milliseconds)."""
        good = [sample for sample in self.samples if sample.error is None]
        errors: dict[str, int] = {}
        for sample in self.samples:
            if sample.error is not None:
                errors[sample.error] = errors.get(sample.error, 0) + 1
        num_prompt = sum(sample.num_prompt_tokens for sample in good)
        num_output = sum(sample.num_output_tokens for sample in good)
        return {
            "model": self.model,
            "clients": self.options.num_clients,
            "requests": len(self.samples),
            "answered": len(good),
            "errors": errors,
            "duration_s": round(self.duration_s, 3),
            "prompt_tokens": num_prompt,
            "cached_tokens": sum(sample.num_cached_tokens for sample in good),
            "output_tokens": num_output,
            "requests_per_second": round(len(good) / self.duration_s, 3),
            "prompt_tokens_per_second": round(num_prompt / self.duration_s, 2),
            "output_tokens_per_second": round(num_output / self.duration_s, 2),
            "ttft_ms": percentiles([sample.first_token_s for sample in good]),
            "inter_token_ms": percentiles([gap for sample in good for gap in sample.gaps_s]),
            "total_ms": percentiles([sample.total_s for sample in good]),
        }


def percentiles(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and nearest-rank percentiles in milliseconds; ``None`` if there is nothing."""
    known = sorted(value * 1000 for value in seconds if value is not None)
    if not known:
        return None
    found = {f"p{rank}": known[-(-rank * len(known) // 100) - 1] for rank in PERCENTILES}
    return {name: round(value, 3) for name, value in {"mean": sum(known) / len(known), **found}.items()}


def _prompt(generator: random.Random, length: int, num_ids: int) -> list[int]:
    first = _FIRST_ID if num_ids > 2 * _FIRST_ID else 0
    return [generator.randrange(first, num_ids) for _ in range(length)]


async def _model(options: LoadOptions) -> dict[str, Any]:
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


async def _request(options: LoadOptions, model: str, prompt: list[int], num_output: int) -> Sample:
    sample = Sample(len(prompt))
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_output,
        "min_tokens": num_output,
        "ignore_eos": True,
        "stream": True,
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
    started = last = time.perf_counter()
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
                if sample.first_token_s is None:
                    sample.first_token_s = now - started
                else:
                    sample.gaps_s.append(now - last)
                last = now
    sample.total_s = time.perf_counter() - started
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
