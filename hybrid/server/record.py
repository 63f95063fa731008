"""What is counted about a request: for its `usage` and `timings`, the log and the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hybrid.outputs import RequestMetrics
from hybrid.server.generation import Output


@dataclass
class Record:
    """Grows with each output of a request. Times are of `time.monotonic`, durations in seconds.

    Attributes:
        outcome: how it ended, if not by answering: what the log and the metrics call it.
    """

    request_id: str
    started: float = field(default_factory=time.monotonic)
    prompt_tokens: dict[int, int] = field(default_factory=dict)  # of each prompt
    cached_tokens: dict[int, int] = field(default_factory=dict)
    generated_tokens: int = 0
    num_choices: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    first_output: float | None = None
    metrics: RequestMetrics | None = None
    outcome: str = ""
    _last: dict[tuple[int, int], float] = field(default_factory=dict)

    def add(self, event: Output) -> list[tuple[float, int]]:
        """Take in what the engine added; returns the gaps that end here, each with the tokens after it."""
        now = time.monotonic()
        gaps = []
        output, prompt = event.output, event.prompt_index
        self.first_output = self.first_output or now
        self.prompt_tokens[prompt] = len(output.prompt_token_ids)
        self.cached_tokens[prompt] = output.num_cached_tokens
        self.metrics = output.metrics or self.metrics
        for completion in output.outputs:
            key = (prompt, completion.index)
            if key in self._last and completion.token_ids:
                gaps.append((now - self._last[key], len(completion.token_ids)))
            self._last[key] = now
            self.generated_tokens += len(completion.token_ids)
            if completion.finish_reason is not None:
                self.finish_reasons.append(completion.finish_reason)
        self.num_choices = len(self._last)
        return gaps

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_tokens.values())

    @property
    def num_cached_tokens(self) -> int:
        return sum(self.cached_tokens.values())

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.num_prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    def timings(self) -> dict[str, Any]:
        """llama.cpp's ``timings``; a rate is ``null`` where there is no time to divide by."""
        prompt_s, generation_s = self.prompt_s, self.generation_s
        prompt_n = self.num_prompt_tokens - self.num_cached_tokens
        return {
            "cache_n": self.num_cached_tokens,
            "prompt_n": prompt_n,
            "prompt_ms": _ms(prompt_s),
            "prompt_per_second": _rate(prompt_n, prompt_s),
            "predicted_n": self.generated_tokens,
            "predicted_ms": _ms(generation_s),
            # The first token of each completion comes with the prompt.
            "predicted_per_second": _rate(self.generated_tokens - self.num_choices, generation_s),
        }

    @property
    def queue_s(self) -> float | None:
        return None if self.metrics is None else self.metrics.queue_s

    @property
    def prompt_s(self) -> float | None:
        return None if self.metrics is None else self.metrics.prompt_s

    @property
    def generation_s(self) -> float | None:
        return None if self.metrics is None else self.metrics.generation_s


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _rate(count: int, seconds: float | None) -> float | None:
    return round(count / seconds, 3) if seconds and count > 0 else None
