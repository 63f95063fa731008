"""One text inside the engine."""

from __future__ import annotations

import enum
import hashlib
import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Any

import torch

from hybrid.config import BLOCK_SIZE
from hybrid.engine.constraint import Constraint
from hybrid.engine.logprobs import PromptLogprobsBuilder
from hybrid.kvcache.prefix import BlockKeys
from hybrid.outputs import FinishReason, PromptLogprobs, RequestMetrics, TokenLogprobs
from hybrid.sampling_params import MAX_SEED, SamplingParams


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True)
class SampledToken:
    """A chosen token, its log-probability and, if asked for, those of others."""

    token_id: int
    logprob: float | None = None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class FailedSample:
    """No token could be chosen, for a reason that concerns this sequence alone."""

    error: Exception


@dataclass(frozen=True)
class TokenOutput:
    """What one step did for a text of a request: the new token, and how the text stands.

    Attributes:
        is_text: whether the token belongs to the text; one that ends it does not.
        index: which of the request's texts it is.
        num_cached_tokens: tokens of the prompt that were found in the cache.
    """

    request_id: str
    sampled: SampledToken
    metrics: RequestMetrics
    prompt_logprobs: PromptLogprobs | list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    is_text: bool = True
    index: int = 0
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class FailedRequest:
    """A request that ended with an error of its own."""

    request_id: str
    error: Exception


class Sequence:
    """Tokens of a text and how far they are computed.

    The first ``num_computed_tokens`` of ``token_ids`` are in the cache, in the blocks of ``block_table``.
    A step computes some of the rest; when none is left, a new token is chosen and appended.

    Attributes:
        index: which text of its request it is.
        siblings: other texts of the request, which begin when the prompt is computed.
        arrival: its place among all that came; the engine sets it.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Tokens[int],
        params: SamplingParams,
        *,
        end_token_ids: frozenset[int],
        max_tokens: int,
        prompt_logprobs: PromptLogprobsBuilder | None = None,
        constraint: Constraint | None = None,
        index: int = 0,
    ) -> None:
        self.request_id, self.index = request_id, index
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.end_token_ids = frozenset() if params.ignore_eos else end_token_ids
        self.max_tokens = max_tokens
        self.generator = torch.Generator()
        self.prompt_logprobs = prompt_logprobs
        self.constraint = constraint
        self.adjustments: Any = None  # see `hybrid.engine.adjustments`
        self.siblings: list[Sequence] = []
        self.arrival: tuple[int, int] = (0, index)
        self.block_table: list[int] = []
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_published_blocks = 0
        self._keys = BlockKeys()
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None
        self.ends_in_text = True  # whether the last token belongs to the text
        self.arrived = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def writes(self) -> bool:
        """Whether a token follows after a single one is computed, and nothing else is wanted of that."""
        return (
            self.status is Status.RUNNING and self.num_uncomputed_tokens == 1 and self.prompt_logprobs is None
        )

    @property
    def stopping_token_ids(self) -> frozenset[int]:
        """Tokens that end the text: the model's and the request's."""
        return self.end_token_ids.union(self.params.stop_token_ids or ())

    def reusable_keys(self) -> list[bytes]:
        """Keys of the blocks that may be taken from the cache instead of being computed.

        The last token is always computed, for what follows it; all are if log-probabilities of the prompt are
        wanted.
        """
        if self.prompt_logprobs is not None:
            return []
        return self._keys.first((len(self.token_ids) - 1) // BLOCK_SIZE, self.token_ids)

    def begin_like(self, first: Sequence) -> None:
        """Take over what is known of the prompt from the request's first text."""
        self._keys = BlockKeys(first._keys.first(first.num_prompt_tokens // BLOCK_SIZE, first.token_ids))
        self.started, self.num_cached_tokens = first.started, first.num_cached_tokens

    def computed_keys(self) -> list[bytes]:
        """Keys of the full blocks that are computed."""
        return self._keys.first(self.num_computed_tokens // BLOCK_SIZE, self.token_ids)

    def seed(self, seed: int) -> None:
        """Start the text's own random numbers. All but the first text of a request mix in their index."""
        if self.index:
            digest = hashlib.blake2b(f"{seed}/{self.index}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little") & MAX_SEED
        self.generator.manual_seed(seed)

    def append(self, token_id: int) -> None:
        """Add a chosen token and see whether the text ends with it. Errors are the constraint's."""
        self.token_ids.append(token_id)
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
        if self.num_output_tokens >= self.params.min_tokens and token_id in self.stopping_token_ids:
            self.finish_reason = "stop"
            self.stop_reason = None if token_id in self.end_token_ids else token_id
            self.ends_in_text = False
            return
        if self.constraint is not None:
            self.constraint.accept(token_id)
            if self.constraint.finished:
                self.finish_reason = "stop"
                return
        if self.num_output_tokens >= self.max_tokens:
            self.finish_reason = "length"

    def metrics(self) -> RequestMetrics:
        return RequestMetrics(
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.num_output_tokens,
            queue_s=_difference(self.arrived, self.started),
            prompt_s=_difference(self.started, self.first_token),
            generation_s=_difference(self.first_token, self.last_token),
            num_cached_tokens=self.num_cached_tokens,
        )


def _difference(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
