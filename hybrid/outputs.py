"""What a request returns, by vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of a token and its rank in the vocabulary (1 = likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = Mapping[int, Logprob]


class VocabularyLogprobs(Mapping[int, Logprob]):
    """Every token's `Logprob` at one position, made when it is asked for.

    ``row`` is float32 ``[vocab]``.
    """

    def __init__(self, row: np.ndarray, decode: Callable[[int], str] | None = None) -> None:
        self.row, self._decode = row, decode

    def __getitem__(self, token_id: int) -> Logprob:
        if not 0 <= token_id < len(self.row):
            raise KeyError(token_id)
        value = self.row[token_id]
        rank = 1 + int(np.count_nonzero(self.row > value))
        return Logprob(float(value), rank, self._decode(token_id) if self._decode else None)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.row)))

    def __len__(self) -> int:
        return len(self.row)


class PromptLogprobs(Sequence[TokenLogprobs | None]):
    """Log-probabilities of the whole vocabulary at each prompt position; entry 0 is ``None``.

    ``array`` is float32 ``[num_prompt_tokens - 1, vocab]``; its row ``i - 1`` belongs to entry ``i``, the
    distribution of prompt token ``i`` given the tokens before it.
    """

    def __init__(self, array: np.ndarray, decode: Callable[[int], str] | None = None) -> None:
        self.array, self._decode = array, decode

    def __len__(self) -> int:
        return len(self.array) + 1

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs | None]: ...
    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return VocabularyLogprobs(self.array[position - 1], self._decode) if position else None


@dataclass(frozen=True)
class RequestMetrics:
    """Times of a request in seconds, from its arrival on; ``None`` until they are known.

    Attributes:
        queue_s: until the first step that worked on it.
        prompt_s: from there until its prompt was computed and the first token chosen.
        generation_s: from there until the last token; of all completions.
        num_cached_tokens: tokens of the prompt that were in the cache and not computed again.
    """

    num_prompt_tokens: int
    num_generated_tokens: int
    queue_s: float | None = None
    prompt_s: float | None = None
    generation_s: float | None = None
    num_cached_tokens: int = 0

    @property
    def first_token_s(self) -> float | None:
        """Time to the first token."""
        if self.queue_s is None or self.prompt_s is None:
            return None
        return self.queue_s + self.prompt_s

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Rate of the tokens that were computed."""
        return (self.num_prompt_tokens - self.num_cached_tokens) / self.prompt_s if self.prompt_s else None

    @property
    def generated_tokens_per_s(self) -> float | None:
        """Rate of the tokens after the first, whose time is the prompt's."""
        count = self.num_generated_tokens - 1
        return count / self.generation_s if self.generation_s and count > 0 else None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion; in a stream, what came since the last one.

    Attributes:
        finish_reason: ``"stop"`` (end token or stop string), ``"length"`` (max_tokens or context),
            ``"abort"``, or ``None`` while it runs.
        stop_reason: the stop string or stop token id that ended it; ``None`` for the model's end tokens.
        cumulative_logprob: sum over all chosen tokens so far, if logprobs were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its completions. ``prompt`` is ``None`` if token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
