"""What makes and follows requests, for `LLM` and `AsyncLLM` alike."""

from __future__ import annotations

import itertools
import queue
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Self

from hybrid.engine.engine import Engine
from hybrid.engine.output_processor import RequestState
from hybrid.engine.prompts import ParsedPrompt
from hybrid.engine.stats import EngineStats
from hybrid.engine.thread import EngineThread, Event, PromptProgress, QueueLimits, Request
from hybrid.errors import RequestError
from hybrid.outputs import RequestOutput
from hybrid.sampling_params import SamplingParams
from hybrid.tokenizer import Tokenizer


class Requests:
    """Requests to an engine that runs on a thread of its own. Any thread may use it.

    When it is dropped, or the program ends, it closes itself.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        limits: QueueLimits | None = None,
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._ids = itertools.count()
        self._thread = EngineThread(engine, limits or QueueLimits())
        weakref.finalize(self, self._thread.close)

    @property
    def errored(self) -> BaseException | None:
        """What ended the engine; ``None`` while it works."""
        return self._thread.errored

    def prepare(
        self,
        prompt: ParsedPrompt,
        params: SamplingParams | None,
        deliver: Callable[[Event], None],
        request_id: str | None = None,
    ) -> Request:
        """A request to `submit`. Checks everything but its id, which can take a while.

        Raises:
            RequestError: the prompt or a parameter is invalid.
        """
        self.check_open()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(
                "invalid type", field="sampling_params", expected="SamplingParams", found=params
            )
        if request_id is not None and not isinstance(request_id, str):
            raise RequestError("invalid type", field="request_id", expected="a string", found=request_id)
        if request_id is None:
            request_id = f"request-{next(self._ids)}"
        sequence = self._engine.prepare(request_id, prompt.token_ids, params)
        make_detokenizer = partial(
            self._tokenizer.detokenizer, skip_special=params.skip_special_tokens, prompt_ids=prompt.token_ids
        )
        state = RequestState(request_id, *prompt, params, make_detokenizer, self._decode_one)
        return Request(state, sequence, deliver)

    def submit(self, request: Request) -> None:
        """See `EngineThread.submit`."""
        self._thread.submit(request)

    def abort(self, request: Request) -> None:
        """End a request within a step; one that has ended is left alone."""
        self._thread.abort(request)

    def abort_id(self, request_id: str) -> None:
        """`abort` the open request of this id, if there is one."""
        request = self._thread.find(request_id)
        if request is not None:
            self._thread.abort(request)

    def stream(self, prompt: ParsedPrompt, params: SamplingParams | None) -> TokenStream:
        """`prepare` and `submit`, with an iterator over what comes."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.prepare(prompt, params, events.put)
        self.submit(request)
        return TokenStream(self, request, events)

    def stats(self) -> EngineStats:
        return self._thread.stats()

    def check_open(self) -> None:
        """Raise `RequestError` after `close`, `EngineError` after a failure of the engine."""
        self._thread.check_open()

    def close(self) -> None:
        """End every request, free the engine, join its thread. Calling it again does nothing."""
        self._thread.close()

    def _decode_one(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


class TokenStream(Iterator[RequestOutput]):
    """What a request adds, step by step. `close`, a ``with`` statement or its deletion end the request.

    The engine does not wait for its reader.

    Attributes:
        on_prompt: called while the first token is awaited with (prompt tokens computed, in all).
    """

    def __init__(self, requests: Requests, request: Request, events: queue.SimpleQueue[Event]) -> None:
        self._requests, self._request, self._events = requests, request, events
        self._ended = False
        self.on_prompt: Callable[[int, int], None] | None = None

    def __next__(self) -> RequestOutput:
        while not self._ended:
            event = self._events.get()
            if isinstance(event, PromptProgress):
                if self.on_prompt is not None:
                    self.on_prompt(event.num_done, event.num_total)
                continue
            self._ended = isinstance(event, BaseException) or event.finished
            if isinstance(event, BaseException):
                raise event
            return event
        raise StopIteration

    def close(self) -> None:
        """End the request and wait for that; `result` still has what it wrote."""
        self._requests.abort(self._request)
        while not self._ended:
            event = self._events.get()
            self._ended = isinstance(event, BaseException) or (
                isinstance(event, RequestOutput) and event.finished
            )

    def result(self) -> RequestOutput:
        """Everything so far, as `LLM.generate` returns it."""
        return self._request.state.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._ended:
            self._requests.abort(self._request)
