"""From a request's body to its response, for every endpoint that generates: see `Answer` and `Reply`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from hybrid.errors import QueueFullError, QueueTimeoutError
from hybrid.server import sse
from hybrid.server.context import ServerContext, engine_failed
from hybrid.server.errors import ApiError, ClientGone, from_exception, unavailable
from hybrid.server.generation import Generation, Job, Output, Progress
from hybrid.server.json_response import json_response
from hybrid.server.record import Record


class Answer(ABC):
    """One protocol's way to ask and to answer. Made for one request.

    Attributes:
        record: what `usage` and `timings` are taken from; it has each output before `chunks` and `add` do.
    """

    record: Record
    stream: bool
    wants_progress = False

    @abstractmethod
    def jobs(self) -> list[Job]:
        """Prompts for the engine. Runs in a thread; raises `ApiError` or `RequestError`."""

    @abstractmethod
    def add(self, event: Output) -> None:
        """Take in an output of an answer that is sent as a whole."""

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole answer."""

    @abstractmethod
    def opening(self) -> bytes:
        """The events a stream begins with; the first output may be in the record already."""

    @abstractmethod
    def chunks(self, event: Output) -> bytes:
        """The events that tell an output; perhaps none."""

    def progress(self, event: Progress) -> bytes:
        """The event that tells how much of the prompt is computed."""
        return b""

    def closing(self) -> bytes:
        """The events after the last output."""
        return sse.DONE

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a stream that failed."""
        return sse.event(error.body())

    def prompt_text(self) -> str:
        """What was asked, for a log that may say so."""
        return ""


class Reply(Response):
    """The ASGI response of an answer: works while the client is there, and no longer."""

    def __init__(self, context: ServerContext, answer: Answer) -> None:
        super().__init__()
        self._context, self._answer = context, answer
        self._engine, _ = context.check_ready()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = self._answer.record
        scope.setdefault("state", {})["record"] = record
        if self._context.settings.log_prompts:
            scope["state"]["prompt"] = self._answer.prompt_text()
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            with self._context.work():
                await while_connected(receive, self._work(watch))
        except asyncio.CancelledError:
            record.outcome = "gone"
            raise
        except ClientGone:
            record.outcome = "gone"
            if not started:
                raise  # the log is told of a status; after the first byte there is nothing left to say
        except Exception as error:
            failure = self._failure(error)
            record.outcome = failure.code or failure.type
            raise failure from error
        finally:
            if record.outcome:
                self._context.metrics.failed(record.outcome)
            else:
                self._context.metrics.finished(record, time.monotonic() - record.started)

    async def _work(self, send: Send) -> None:
        context, answer = self._context, self._answer
        jobs = await context.in_thread(answer.jobs)
        async with Generation(self._engine, jobs) as generation:
            with context.running(generation):
                if answer.stream:
                    await self._stream(generation, sse.EventStream(send))
                    return
                await self._collect(generation)
        await json_response(answer.body())({"type": "http"}, _no_receive, send)

    async def _collect(self, generation: Generation) -> None:
        while not generation.finished:
            event = await generation.next(None)
            if isinstance(event, Output):
                self._count(event)
                self._answer.add(event)

    async def _stream(self, generation: Generation, stream: sse.EventStream) -> None:
        """Errors before the first byte are raised: they have a status. Later ones become an event.

        The response begins with the first token, or with the first ping if the prompt takes longer.
        """
        answer, ping_s = self._answer, self._context.settings.ping_s
        try:
            while not generation.finished:
                event = await generation.next(ping_s)
                await stream.write(self._event(event, begun=stream.started))
            await stream.write(answer.closing())
        except Exception as error:
            if not stream.started:
                raise
            failure = self._failure(error)
            answer.record.outcome = failure.code or failure.type
            await stream.write(answer.failure(failure))
        await stream.end()

    def _event(self, event: Output | Progress | None, *, begun: bool) -> bytes:
        """What to send of an event, and before it what a stream begins with."""
        answer = self._answer
        if isinstance(event, Progress) and not answer.wants_progress:
            return b""
        if isinstance(event, Output):
            self._count(event)
        opening = b"" if begun else answer.opening()
        if event is None:
            return opening + sse.PING
        return opening + (answer.progress(event) if isinstance(event, Progress) else answer.chunks(event))

    def _failure(self, error: Exception) -> ApiError:
        """What to tell the client about ``error``."""
        if isinstance(error, QueueTimeoutError):
            return unavailable(str(error), "queue_timeout")
        if isinstance(error, QueueFullError):
            return self._context.busy(error.num_waiting)
        if self._engine.errored is not None and not isinstance(error, ApiError):
            return engine_failed()
        return from_exception(error)

    def _count(self, event: Output) -> None:
        record, metrics = self._answer.record, self._context.metrics
        is_first = record.first_output is None
        for seconds, num_tokens in record.add(event):
            metrics.gap(seconds, num_tokens)
        if is_first:
            metrics.first_token(time.monotonic() - record.started)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` until it is done or the client has gone.

    Raises:
        ClientGone: it has; ``work`` was cancelled and has cleaned up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _no_receive() -> Any:
    raise RuntimeError("a plain response receives nothing")
