"""Open requests of an engine: each step's tokens go to whichever request they belong to."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from hybrid.engine.engine import Engine
from hybrid.engine.output_processor import RequestState
from hybrid.errors import RequestError
from hybrid.outputs import RequestOutput
from hybrid.sampling_params import SamplingParams
from hybrid.tokenizer import Tokenizer


class Request:
    """A request's state, and the outputs that nobody has taken yet."""

    def __init__(self, state: RequestState) -> None:
        self.state = state
        self.new: deque[RequestOutput] = deque()


class Requests:
    """Adds requests to an engine and sorts what comes out. Several may be open, from several threads."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._lock = threading.RLock()
        self._engine, self._tokenizer = engine, tokenizer
        self._ids = itertools.count()
        self._open: dict[str, Request] = {}
        self._closed = False

    def add(self, text: str | None, token_ids: list[int], params: SamplingParams) -> Request:
        """Queue a request; invalid ones raise `RequestError` here."""
        with self._lock:
            self.check_open()
            request_id = str(next(self._ids))
            self._engine.add_request(request_id, token_ids, params)
            detokenizer = self._tokenizer.detokenizer(
                skip_special=params.skip_special_tokens, prompt_ids=token_ids
            )
            state = RequestState(request_id, text, token_ids, params, detokenizer, self._decode_one)
            request = self._open[request_id] = Request(state)
            return request

    def advance(self, request: Request) -> None:
        """One step of the engine for all requests, unless ``request`` has ended or has outputs to take."""
        with self._lock:
            self.check_open()
            if request.state.finished or request.new:
                return
            for output in self._engine.step():
                advanced = self._open[output.request_id]
                advanced.new.append(advanced.state.update(output))
                if advanced.state.finished:
                    self.drop(advanced)

    def drop(self, request: Request) -> None:
        """End a request; one that has ended is left alone."""
        with self._lock:
            if self._open.pop(request.state.request_id, None) is not None:
                self._engine.abort_request(request.state.request_id)

    def prompt_progress(self, request: Request) -> tuple[int, int]:
        """Tokens of the prompt that are computed, and in all; all of a request that has ended."""
        total = len(request.state.prompt_token_ids)
        with self._lock:
            open_ = self.is_open(request)
            return self._engine.num_computed_tokens(request.state.request_id) if open_ else total, total

    def is_open(self, request: Request) -> bool:
        return request.state.request_id in self._open

    def check_open(self) -> None:
        """Raise `RequestError` after `close`."""
        if self._closed:
            raise RequestError("it is closed; load the model again", field="LLM")

    def close(self) -> None:
        """Drop everything and free the engine. Calling it again does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._open.clear()
                self._engine.close()

    def _decode_one(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


class TokenStream(Iterator[RequestOutput]):
    """What a request adds, step by step. `close`, a ``with`` statement or its deletion end the request.

    Attributes:
        on_prompt: called between the steps before the first token with (prompt tokens computed, in all).
    """

    def __init__(self, requests: Requests, request: Request) -> None:
        self._requests, self._request = requests, request
        self.on_prompt: Callable[[int, int], None] | None = None

    def __next__(self) -> RequestOutput:
        while not self._request.new:
            if self._request.state.finished:
                raise StopIteration
            self._requests.advance(self._request)
            if self.on_prompt is not None and not self._request.new:
                self.on_prompt(*self._requests.prompt_progress(self._request))
        return self._request.new.popleft()

    def close(self) -> None:
        """End the request; `result` still has what it wrote."""
        if self._requests.is_open(self._request):
            self._requests.drop(self._request)
            self._request.state.abort()
        self._request.new.clear()

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
        self.close()
