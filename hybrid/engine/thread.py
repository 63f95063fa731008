"""The thread that runs an engine. Everybody else sends it commands; nobody else touches the engine.

Ordering: commands are handled between steps, in the order they were sent, and a step that computes a prompt
returns early for them. A request's events are delivered from this thread, in order. It is no longer open when
its last event is delivered: whoever gets that event may use its id again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hybrid.engine.engine import Engine
from hybrid.engine.output_processor import RequestState
from hybrid.engine.sequence import FailedRequest, Sequence, TokenOutput
from hybrid.engine.stats import EngineStats
from hybrid.errors import ConfigError, EngineError, QueueFullError, QueueTimeoutError, RequestError
from hybrid.outputs import RequestOutput


@dataclass(frozen=True)
class PromptProgress:
    """Tokens of a prompt that are in the cache, and in all."""

    num_done: int
    num_total: int


# The last event of a request is an output that is finished, or an error.
Event = RequestOutput | PromptProgress | BaseException


@dataclass(frozen=True)
class QueueLimits:
    """How many requests may wait, and how long.

    Attributes:
        max_queue: requests that may wait beyond those the engine runs at once; ``None``: any number.
        max_queue_wait_s: a request that waits longer ends with `QueueTimeoutError`; ``None``: never.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    max_queue: int | None = None
    max_queue_wait_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_queue is not None and (type(self.max_queue) is not int or self.max_queue < 0):
            raise ConfigError(f"max_queue: expected an integer >= 0, found {self.max_queue!r}")
        wait_s = self.max_queue_wait_s
        if wait_s is not None and (type(wait_s) not in (int, float) or not wait_s > 0):
            raise ConfigError(f"max_queue_wait_s: expected seconds above 0, found {wait_s!r}")


class Request:
    """A request between its user and the engine's thread.

    ``deliver`` is called with each `Event`, on the engine's thread; what it raises ends the request.
    """

    def __init__(self, state: RequestState, sequence: Sequence, deliver: Callable[[Event], None]) -> None:
        self.state, self.sequence, self.deliver = state, sequence, deliver
        self.num_prompt_done = 0

    @property
    def request_id(self) -> str:
        return self.state.request_id

    @property
    def waits(self) -> bool:
        """Whether no step has worked on it yet."""
        return self.sequence.started is None


class EngineThread:
    """Runs ``engine`` until `close`.

    Attributes:
        errored: what ended the engine; ``None`` while it works.
    """

    def __init__(self, engine: Engine, limits: QueueLimits) -> None:
        self.errored: BaseException | None = None
        self._engine, self._limits = engine, limits
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: dict[str, Request] = {}
        # Taken to add to _open, to set errored and to close; a finaliser may close while it is held.
        self._lock = threading.RLock()
        self._closed = False
        engine.interrupted = self._has_commands
        self._thread = threading.Thread(target=self._run, name="hybrid-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a prepared request.

        Raises:
            QueueFullError: too many wait.
            RequestError: its id is in use, or the engine is closed.
            EngineError: the engine failed before.
        """
        with self._lock:
            self.check_open()
            if request.request_id in self._open:
                expected = "one that is not in use"
                raise RequestError(
                    "invalid id", field="request_id", expected=expected, found=request.request_id
                )
            limit = self._limits.max_queue
            if limit is not None and len(self._open) >= self._engine.config.max_num_seqs + limit:
                raise QueueFullError(self._num_waiting())
            self._open[request.request_id] = request
            self._commands.put(partial(self._add, request))

    def abort(self, request: Request) -> None:
        """End a request; one that has ended is left alone. Takes no lock: finalisers may call it."""
        self._commands.put(partial(self._abort, request))

    def find(self, request_id: str) -> Request | None:
        """An open request."""
        return self._open.get(request_id)

    def stats(self) -> EngineStats:
        requests = list(self._open.values())
        num_waiting = sum(request.waits for request in requests)
        return self._engine.stats(len(requests) - num_waiting, num_waiting)

    def check_open(self) -> None:
        """Raise `RequestError` after `close`, `EngineError` after a failure."""
        if self._closed:
            raise RequestError("it is closed; load the model again", field="LLM")
        if self.errored is not None:
            raise EngineError(f"the engine failed before: {self.errored}") from self.errored

    def close(self) -> None:
        """End every request, free the engine, join the thread. Calling it again does nothing."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._commands.put(None)
        if self._thread is not threading.current_thread():  # a finaliser may run on it
            self._thread.join()

    def _has_commands(self) -> bool:
        return not self._commands.empty()

    def _run(self) -> None:
        try:
            while self._handle_commands():
                self._drop_late()
                self._deliver_outputs(self._engine.step())
                self._deliver_progress()
        except BaseException as error:
            self._end_all(error)
            while self._commands.get() is not None:
                pass
        else:
            self._end_all(None)
        self._engine.close()

    def _handle_commands(self) -> bool:
        """Handle what was sent; wait while there is nothing else to do. False: the engine is closed."""
        while self._has_commands() or not self._engine.has_unfinished_requests():
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _add(self, request: Request) -> None:
        if self._open.get(request.request_id) is request:
            self._engine.add(request.sequence)

    def _abort(self, request: Request) -> None:
        if self._open.get(request.request_id) is request:
            self._engine.abort_request(request.request_id)
            self._end(request, request.state.abort())

    def _end(self, request: Request, event: Event) -> None:
        """Deliver a last event."""
        self._open.pop(request.request_id, None)
        try:
            request.deliver(event)
        except Exception:  # nobody is there any more
            return

    def _deliver(self, request: Request, event: Event) -> None:
        try:
            request.deliver(event)
        except Exception:
            self._engine.abort_request(request.request_id)
            self._open.pop(request.request_id, None)

    def _deliver_outputs(self, outputs: list[TokenOutput | FailedRequest]) -> None:
        for output in outputs:
            request = self._open.get(output.request_id)
            if request is None:
                continue
            if isinstance(output, FailedRequest):
                self._end(request, output.error)
                continue
            event = request.state.update(output)
            if request.state.text_finished(output.index):
                self._engine.abort_text(output.request_id, output.index)  # the engine knows no stop strings
            if request.state.finished:
                self._end(request, event)
            else:
                self._deliver(request, event)

    def _deliver_progress(self) -> None:
        for sequence in self._engine.sequences_in_prompt():
            request = self._open.get(sequence.request_id)
            if request is not None and request.num_prompt_done != sequence.num_computed_tokens:
                request.num_prompt_done = sequence.num_computed_tokens
                self._deliver(
                    request, PromptProgress(sequence.num_computed_tokens, sequence.num_prompt_tokens)
                )

    def _drop_late(self) -> None:
        longest_s = self._limits.max_queue_wait_s
        if longest_s is None:
            return
        now = time.perf_counter()
        late = [
            request
            for request in list(self._open.values())  # others add to it meanwhile
            if request.waits and now - request.sequence.arrived > longest_s
        ]
        for request in late:
            self._engine.abort_request(request.request_id)
            self._end(request, QueueTimeoutError(self._num_waiting(), now - request.sequence.arrived))

    def _num_waiting(self) -> int:
        return sum(request.waits for request in list(self._open.values()))

    def _end_all(self, error: BaseException | None) -> None:
        """End every request with ``error``, or because the engine is closed."""
        with self._lock:
            self.errored = error
            requests = list(self._open.values())
        for request in requests:
            self._end(request, error or RequestError("it was closed meanwhile", field="LLM"))
