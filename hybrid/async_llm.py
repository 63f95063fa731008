"""The generation API for an event loop: many requests at once, each an async generator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from hybrid.chat import ChatTemplate
from hybrid.config import KVFormat
from hybrid.engine.load import LoadOptions, load
from hybrid.engine.prompts import Prompt, parse_prompt
from hybrid.engine.requests import Requests
from hybrid.engine.stats import EngineStats
from hybrid.engine.thread import Event, PromptProgress, QueueLimits, Request
from hybrid.outputs import RequestOutput
from hybrid.placement.planner import Plan
from hybrid.placement.rules import Rules
from hybrid.sampling_params import SamplingParams
from hybrid.tokenizer import Tokenizer

_PREPARING_THREADS = 2  # prompts are tokenised and grammars compiled beside the event loop


class AsyncLLM:
    """A loaded model that writes several texts at once, each an async generator.

    The constructor loads the model and blocks meanwhile. The model runs on a thread of its own; any event
    loop may call it. `close` frees everything, and ``async with`` calls it.

    Args and errors are those of `LLM`, and:
        max_queue: requests that may wait beyond those that run; one more raises `QueueFullError`.
        max_queue_wait_s: a request that waits longer raises `QueueTimeoutError`; ``None``: it waits on.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        rules: Rules = "auto",
        max_model_len: int | None = None,
        *,
        num_threads: int | None = None,
        isa: str | None = None,
        kv_format: KVFormat | None = None,
        seed: int = 0,
        max_num_seqs: int = 1,
        max_num_batched_tokens: int = 512,
        progress: Callable[[int, int], None] | None = None,
        ram_bytes: int | None = None,
        fit: bool = False,
        experts_per_token: int | None = None,
        expert_threshold: float | None = None,
        kv_cache_tokens: int | None = None,
        numa: str = "auto",
        packed_cache: str | Path | None = None,
        cuda_graph: bool = True,
        vram_bytes: Mapping[str, int] | None = None,
        max_queue: int = 256,
        max_queue_wait_s: float | None = None,
    ) -> None:
        options = LoadOptions(
            rules, max_model_len, num_threads, isa, kv_format, seed, max_num_seqs, max_num_batched_tokens,
            ram_bytes, fit, experts_per_token, expert_threshold, kv_cache_tokens, numa,
            packed_cache, cuda_graph, vram_bytes,
        )  # fmt: skip
        limits = QueueLimits(max_queue, max_queue_wait_s)
        self._loaded = load(model, options, progress)
        self._requests = Requests(self._loaded.engine, self._loaded.tokenizer, limits)
        self._preparing = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="hybrid-prepare")

    @property
    def errored(self) -> BaseException | None:
        """What ended the engine; ``None`` while it works."""
        return self._requests.errored

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template; its ``problem`` says why it cannot be used, if so."""
        return self._loaded.chat_template

    @property
    def max_model_len(self) -> int:
        return self._loaded.engine.config.max_model_len

    def plan(self) -> Plan:
        """Where every tensor lies."""
        return self._loaded.plan

    def describe(self) -> str:
        """One line: what runs where, with which kernels, threads and context."""
        return self._loaded.describe()

    def stats(self) -> EngineStats:
        """What runs, what waits, and what was done so far. Any thread may call it."""
        return self._requests.stats()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        on_prompt: Callable[[int, int], None] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt. Each `RequestOutput` holds what is new; the last one is ``finished``.

        Closing the generator, or cancelling the task that awaits it, ends the request within a step. The
        engine does not wait for the reader.

        Args:
            request_id: a name of the caller's; not that of another open request.
            on_prompt: called on the event loop with (prompt tokens computed, in all) until the first token.

        Raises:
            RequestError: before the first item: the request is invalid. `ContextLengthError`,
                `QueueFullError` and `QueueTimeoutError` are subclasses.
            HybridError: the engine failed; `errored` has the same error.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def prepare() -> Request:
            parsed = parse_prompt(prompt, self.tokenizer)
            return self._requests.prepare(parsed, sampling_params, deliver, request_id)

        self._requests.check_open()
        request = await loop.run_in_executor(self._preparing, prepare)
        self._requests.submit(request)
        try:
            finished = False
            while not finished:
                event = await events.get()
                if isinstance(event, PromptProgress):
                    if on_prompt is not None:
                        on_prompt(event.num_done, event.num_total)
                    continue
                if isinstance(event, BaseException):
                    raise event
                finished = event.finished
                yield event
        finally:
            self._requests.abort(request)

    async def abort(self, request_id: str) -> None:
        """End a request; its generator's last output has the finish reason ``"abort"``.

        One that is unknown or has ended is left alone.
        """
        self._requests.abort_id(request_id)

    def close(self) -> None:
        """End every request, free the model, join the threads. Calling it again does nothing."""
        self._requests.close()
        self._preparing.shutdown(cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)
