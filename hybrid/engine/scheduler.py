"""Which tokens of which sequences the next step computes."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from hybrid.config import EngineConfig
from hybrid.engine.sequence import (
    FailedRequest,
    FailedSample,
    SampledToken,
    Sequence,
    Status,
    TokenOutput,
)
from hybrid.kvcache.pool import BlockPool, blocks_for


@dataclass(frozen=True)
class ScheduledSequence:
    """The next ``num_new_tokens`` uncomputed tokens of ``sequence``."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        """Whether a token is chosen after them: no uncomputed one is left."""
        return self.num_new_tokens == self.sequence.num_uncomputed_tokens

    @property
    def decodes(self) -> bool:
        """Whether it is a single token after which one is chosen, and nothing else is wanted of it."""
        return self.num_new_tokens == 1 and self.samples and self.sequence.prompt_logprobs is None


class Scheduler:
    """First come, first served; running sequences go before waiting ones.

    State changes only in `postprocess`, `finish` and `reset`, apart from blocks, which a sequence
    owns from the moment they are taken: a step that is interrupted can be abandoned or repeated.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.max_num_seqs * blocks_for(config.max_model_len))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[ScheduledSequence]:
        """Share out ``max_num_batched_tokens``: a token for each running sequence, then prompt chunks.

        Sequences that write come first in the batch, so that a long prompt delays nobody's next
        token by more than one chunk.
        """
        self._admit()
        budget = self.config.max_num_batched_tokens
        batch = []
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_uncomputed_tokens > 1):
            num_new_tokens = min(sequence.num_uncomputed_tokens, budget)
            end = sequence.num_computed_tokens + num_new_tokens
            if num_new_tokens and self.pool.grow(sequence.block_table, end):
                batch.append(ScheduledSequence(sequence, num_new_tokens))
                budget -= num_new_tokens
        return batch

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting.popleft()
            sequence.status = Status.RUNNING
            sequence.started = time.perf_counter()
            self.running.append(sequence)

    def postprocess(
        self, batch: list[ScheduledSequence], sampled: list[SampledToken | FailedSample]
    ) -> list[TokenOutput | FailedRequest]:
        """Book what was computed, append a token to each sequence that samples, end what ends."""
        outputs: list[TokenOutput | FailedRequest] = []
        chosen = iter(sampled)
        for item in batch:
            sequence, samples = item.sequence, item.samples
            sequence.num_computed_tokens += item.num_new_tokens
            if samples:
                outputs.append(_appended(sequence, next(chosen)))
                if isinstance(outputs[-1], FailedRequest) or outputs[-1].finish_reason is not None:
                    self.finish(sequence)
        return outputs

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and free its blocks."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        sequence.status = Status.FINISHED
        self.pool.release(sequence.block_table)

    def reset(self) -> None:
        """Drop every sequence."""
        for sequence in (*self.waiting, *self.running):
            sequence.status = Status.FINISHED
            sequence.block_table.clear()
        self.waiting.clear()
        self.running.clear()
        self.pool.reset()


def _appended(sequence: Sequence, token: SampledToken | FailedSample) -> TokenOutput | FailedRequest:
    if isinstance(token, FailedSample):
        return FailedRequest(sequence.request_id, token.error)
    try:
        sequence.append(token.token_id)
    except Exception as error:
        if sequence.constraint is None:
            raise
        return FailedRequest(sequence.request_id, error)
    prompt_logprobs = None
    if sequence.num_output_tokens == 1 and sequence.prompt_logprobs is not None:
        prompt_logprobs = sequence.prompt_logprobs.finish()
    return TokenOutput(
        sequence.request_id,
        token,
        sequence.metrics(),
        prompt_logprobs,
        sequence.finish_reason,
        sequence.stop_reason,
        sequence.ends_in_text,
    )
