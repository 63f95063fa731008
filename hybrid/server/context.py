"""What the endpoints of one server share: its phase, its model, the requests under way."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import TypeVar

from hybrid.server.body import BodyReader
from hybrid.server.engine_api import AsyncEngine
from hybrid.server.errors import SERVER_ERROR, ApiError, busy, not_found, unavailable
from hybrid.server.generation import Generation
from hybrid.server.metrics import ServerMetrics
from hybrid.server.model_card import ModelCard
from hybrid.server.settings import ServerSettings

T = TypeVar("T")

_RENDER_THREADS = 2
_MIN_RENDERING = 64  # may wait for these threads, however short the engine's queue is
_MAX_RETRY_AFTER_S = 120


class Phase(StrEnum):
    LOADING = "loading"
    READY = "ok"
    DRAINING = "draining"
    FAILED = "failed"


class ServerContext:
    """Lives on the event loop; nothing here is for other threads.

    Attributes:
        engine, card: the model and what to say about it; ``None`` while it loads.
        progress: share of the model's bytes that are read, 0 to 1.
        clock: seconds since 1970; new_id: makes an id from a prefix. Tests replace both.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.phase = Phase.LOADING
        self.engine: AsyncEngine | None = None
        self.card: ModelCard | None = None
        self.progress = 0.0
        self.clock: Callable[[], float] = time.time
        self.new_id: Callable[[str], str] = lambda prefix: f"{prefix}{uuid.uuid4().hex}"
        self.metrics = ServerMetrics(lambda: None if self.engine is None else self.engine.stats())
        self.bodies = BodyReader(settings)
        self.idle = asyncio.Event()
        self.idle.set()
        self._under_way = 0
        self._generations: set[Generation] = set()
        self._threads = ThreadPoolExecutor(_RENDER_THREADS, "render")
        self._rendering = 0
        self._mean_duration_s = 1.0

    def ready(self, engine: AsyncEngine, card: ModelCard) -> None:
        """The model is loaded."""
        self.engine, self.card = engine, card
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def check_ready(self) -> tuple[AsyncEngine, ModelCard]:
        """The model, for a new request.

        Raises:
            ApiError: 503, saying why there is none.
        """
        if self.phase is Phase.LOADING:
            raise unavailable(f"the model is loading ({self.progress:.0%})", "loading")
        if self.phase is Phase.DRAINING:
            raise unavailable("the server is shutting down", "draining")
        if (
            self.phase is Phase.FAILED
            or self.engine is None
            or self.card is None
            or self.engine.errored is not None
        ):
            raise engine_failed()
        return self.engine, self.card

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError`: 404 if ``name`` is not a name of the model; none means it."""
        _, card = self.check_ready()
        if name is not None and name not in card.names:
            message = f"there is no model {name[:100]!r} here, only {', '.join(card.names)}"
            raise not_found(message, code="model_not_found", param="model")

    @property
    def num_under_way(self) -> int:
        return self._under_way

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Counts a request that the server must not be stopped under."""
        self._under_way += 1
        self.idle.clear()
        started = time.monotonic()
        try:
            yield
        finally:
            self._under_way -= 1
            self._mean_duration_s += (time.monotonic() - started - self._mean_duration_s) / 16
            if self._under_way == 0:
                self.idle.set()

    @contextlib.contextmanager
    def running(self, generation: Generation) -> Iterator[None]:
        """Lets `fail_all` reach ``generation``."""
        self._generations.add(generation)
        try:
            yield
        finally:
            self._generations.discard(generation)

    def fail_all(self, error: ApiError) -> None:
        """End every request under way with ``error``."""
        for generation in list(self._generations):
            generation.fail(error)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """``function()`` off the event loop: rendering, tokenising, compiling schemas.

        Raises:
            ApiError: 429 too many wait already, 503 it took too long.
        """
        if self._rendering >= max(self.settings.max_queue, _MIN_RENDERING):
            raise self.busy(self._rendering)
        self._rendering += 1
        try:
            async with asyncio.timeout(self.settings.render_timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except TimeoutError:
            message = f"preparing the request took longer than {self.settings.render_timeout_s:g} s"
            raise unavailable(message, "render_timeout") from None
        finally:
            self._rendering -= 1

    def busy(self, num_waiting: int) -> ApiError:
        """The 429 of a full queue, with a guess of when there is room."""
        running = 1 if self.engine is None else max(1, self.engine.stats().num_requests_running)
        wait_s = math.ceil(self._mean_duration_s * max(1, num_waiting) / running)
        message = (
            f"{num_waiting} requests wait already (--max-queue {self.settings.max_queue}); try again later"
        )
        return busy(message, min(max(1, wait_s), _MAX_RETRY_AFTER_S))

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def engine_failed() -> ApiError:
    return ApiError(503, "the engine has failed; the server ends", type=SERVER_ERROR, code="engine_failed")
