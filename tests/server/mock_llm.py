"""An engine without a model: answers are written down, time passes when the test says so.

It keeps `AsyncLLM`'s contract: a queue, requests that run side by side, deltas, errors before the first item,
closing that ends a request. Tokens are those of the demo model's vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from dataclasses import dataclass, field

from hybrid.chat import ChatTemplate
from hybrid.config import model_path
from hybrid.errors import ContextLengthError, EngineError, QueueFullError, RequestError
from hybrid.gguf import GGUFFile
from hybrid.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from hybrid.server.model_card import ModelCard
from hybrid.tokenizer import Tokenizer

METRICS = RequestMetrics(0, 0, queue_s=0.5, prompt_s=2.0, generation_s=4.0)


@functools.cache
def demo_parts():
    with GGUFFile.open(model_path("demo")) as file:
        tokenizer = Tokenizer.from_gguf(file)
        return tokenizer, ChatTemplate.from_gguf(file, tokenizer)


@dataclass
class MockStats:
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.25
    prefix_cache_queries: int = 100
    prefix_cache_hits: int = 40
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    num_preemptions_total: int = 0
    expert_cpu_seconds_total: float | None = None


@dataclass
class MockLLM:
    """Attributes are the script.

    pieces: text of each token; finish_reason: of the last one. prefill_s, step_s: time they take.
    fail_at: {index of a token: error raised instead of it}; -1 stands for the prompt.
    die_at: at this token the whole engine fails.
    """

    pieces: list[str] = field(default_factory=lambda: ["Once", " upon", " a", " time"])
    finish_reason: str = "stop"
    prefill_s: float = 0.0
    step_s: float = 0.0
    prompt_steps: int = 0
    fail_at: dict[int, Exception] = field(default_factory=dict)
    die_at: int | None = None
    max_model_len: int = 2048
    max_num_seqs: int = 8
    max_queue: int = 256
    num_cached_tokens: int = 0
    errored: BaseException | None = None
    closed: bool = False

    def __post_init__(self):
        self.tokenizer, self.chat_template = demo_parts()
        self.counts = MockStats()
        self.running, self.waiting = {}, {}  # id -> the request's future, as the engine has them
        self.requests = []  # (prompt ids, params) of each request
        self.aborted, self.finished = [], []
        self._free = asyncio.Event()
        self._failed = asyncio.Event()

    def stats(self):
        self.counts.num_requests_running = len(self.running)
        self.counts.num_requests_waiting = len(self.waiting)
        return self.counts

    def describe(self):
        return "mock.gguf: all on cpu"

    def close(self):
        self.closed = True

    async def abort(self, request_id):
        raise NotImplementedError

    def die(self):
        self.errored = RuntimeError("the model runner crashed")
        self._failed.set()

    async def generate(self, prompt, sampling_params=None, request_id=None, *, on_prompt=None):
        ids = prompt["prompt_token_ids"]
        if len(ids) >= self.max_model_len:
            raise ContextLengthError(len(ids), self.max_model_len)
        for token_id in ids:
            if not 0 <= token_id < self.tokenizer.vocab_size:
                raise RequestError("invalid token id", field="prompt", expected="one", found=token_id)
        if self.errored is not None:
            raise EngineError("the engine failed before")
        if len(self.running) >= self.max_num_seqs and len(self.waiting) >= self.max_queue:
            raise QueueFullError(len(self.waiting))
        self.requests.append((ids, sampling_params))
        self.counts.prompt_tokens_total += len(ids)
        try:
            await self._wait_for_a_place(request_id)
            async for output in self._run(ids, sampling_params, request_id, on_prompt):
                if output.finished:
                    self.finished.append(request_id)
                yield output
        finally:
            self.waiting.pop(request_id, None)
            self.running.pop(request_id, None)
            if request_id not in self.finished:
                self.aborted.append(request_id)
            self._free.set()

    async def _wait_for_a_place(self, request_id):
        self.waiting[request_id] = True
        while len(self.running) >= self.max_num_seqs:
            self._free.clear()
            await self._free.wait()
        del self.waiting[request_id]
        self.running[request_id] = True

    async def _sleep(self, seconds):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._failed.wait()
                raise self.errored

    async def _run(self, ids, params, request_id, on_prompt):
        for step in range(1, self.prompt_steps + 1):
            await self._sleep(self.prefill_s / self.prompt_steps)
            on_prompt(len(ids) * step // (self.prompt_steps + 1), len(ids))
        if not self.prompt_steps:
            await self._sleep(self.prefill_s)
        if -1 in self.fail_at:
            raise self.fail_at[-1]
        pieces = self.pieces[: params.max_tokens]
        reason = "length" if len(pieces) < len(self.pieces) else self.finish_reason
        for number, piece in enumerate(pieces):
            if number == self.die_at:
                self.die()
            await self._sleep(self.step_s)
            if number in self.fail_at:
                raise self.fail_at[number]
            last = number == len(pieces) - 1
            self.counts.generation_tokens_total += params.n
            for index in range(params.n):
                yield self._output(request_id, ids, params, index, piece, reason if last else None)

    def _output(self, request_id, ids, params, index, piece, reason):
        token_id = self.tokenizer.encode(piece[:20], add_special=False)[0] if piece else 1
        logprobs = None
        if params.logprobs is not None:
            logprobs = [{token_id: Logprob(-0.5, 1), 100: Logprob(-1.5, 2), 101: Logprob(-2.5, 3)}]
        completion = CompletionOutput(index, piece, [token_id], None, logprobs, reason)
        finished = reason is not None and index == params.n - 1
        return RequestOutput(
            request_id, None, ids, outputs=[completion], finished=finished, metrics=METRICS,
            num_cached_tokens=self.num_cached_tokens,
        )  # fmt: skip


def mock_card(engine, names=("demo",)):
    return ModelCard(names, "deepseek2", None, engine.max_model_len, created=1_700_000_000)
