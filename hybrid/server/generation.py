"""One HTTP request's completions: what the engine yields for each of its prompts, in one stream of events.

Each prompt has a task that takes outputs from the engine. At most `MAX_EVENTS` of them wait for the client: a
slow reader holds up its own tasks and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from hybrid.errors import EngineError
from hybrid.outputs import RequestOutput
from hybrid.sampling_params import SamplingParams
from hybrid.server.engine_api import AsyncEngine

MAX_EVENTS = 64


@dataclass(frozen=True)
class Job:
    """A prompt for the engine."""

    prompt: Mapping[str, Any]
    params: SamplingParams
    request_id: str


@dataclass(frozen=True)
class Output:
    """What the engine added to a prompt's completions."""

    prompt_index: int
    output: RequestOutput


@dataclass(frozen=True)
class Progress:
    """How many tokens of a prompt are computed."""

    prompt_index: int
    computed: int
    total: int


class Generation:
    """An async context manager; leaving it ends what still runs in the engine."""

    def __init__(self, engine: AsyncEngine, jobs: Sequence[Job]) -> None:
        self._engine, self._jobs = engine, jobs
        self._events: deque[Output | Progress | BaseException] = deque()
        self._arrived, self._room = asyncio.Event(), asyncio.Event()
        self._unfinished = len(jobs)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def finished(self) -> bool:
        """Whether the last event has been taken."""
        return self._unfinished == 0

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._take(index, job)) for index, job in enumerate(self._jobs)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self, timeout_s: float | None) -> Output | Progress | None:
        """The next event; ``None`` if there is none for ``timeout_s``.

        Raises:
            Exception: the engine refused or failed a request. The others are over too.
        """
        while not self._events:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        event = self._events.popleft()
        self._room.set()
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Output) and event.output.finished:
            self._unfinished -= 1
        return event

    def fail(self, error: BaseException) -> None:
        """End everything with ``error``, after the events that have arrived."""
        for task in self._tasks:
            task.cancel()
        self._push(error)

    async def _take(self, index: int, job: Job) -> None:
        def tell(computed: int, total: int) -> None:
            if len(self._events) < MAX_EVENTS:  # else the next one says more
                self._push(Progress(index, computed, total))

        try:
            outputs = self._engine.generate(job.prompt, job.params, job.request_id, on_prompt=tell)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    while len(self._events) >= MAX_EVENTS:
                        self._room.clear()
                        await self._room.wait()
                    self._push(Output(index, output))
                    if output.finished:
                        return
            raise EngineError("the engine ended a request without finishing it")
        except Exception as error:
            self._push(error)

    def _push(self, event: Output | Progress | BaseException) -> None:
        self._events.append(event)
        self._arrived.set()
