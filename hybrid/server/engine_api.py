"""What the server needs of `AsyncLLM`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Protocol

from hybrid.chat import ChatTemplate
from hybrid.outputs import RequestOutput
from hybrid.sampling_params import SamplingParams
from hybrid.tokenizer import Tokenizer

PromptCallback = Callable[[int, int], None]


class Stats(Protocol):
    """A moment of the engine; counters count from its start."""

    @property
    def num_requests_running(self) -> int: ...
    @property
    def num_requests_waiting(self) -> int: ...
    @property
    def kv_cache_usage(self) -> float: ...
    @property
    def prefix_cache_queries(self) -> int: ...
    @property
    def prefix_cache_hits(self) -> int: ...
    @property
    def prompt_tokens_total(self) -> int: ...
    @property
    def generation_tokens_total(self) -> int: ...
    @property
    def num_preemptions_total(self) -> int: ...


class AsyncEngine(Protocol):
    """The part of `AsyncLLM` that answers requests; its docstrings say what each does."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def chat_template(self) -> ChatTemplate: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def errored(self) -> BaseException | None: ...

    def generate(
        self,
        prompt: str | Mapping[str, Any],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        on_prompt: PromptCallback | None = None,
    ) -> AsyncGenerator[RequestOutput, None]: ...

    def stats(self) -> Stats: ...
    def describe(self) -> str: ...
    def close(self) -> None: ...
