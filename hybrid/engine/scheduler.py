"""Which tokens of which sequences the next step computes, and who has which cache blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator

from hybrid.config import BLOCK_SIZE, EngineConfig
from hybrid.engine.batch import Batch, ScheduledSequence
from hybrid.engine.sequence import (
    FailedRequest,
    FailedSample,
    SampledToken,
    Sequence,
    Status,
    TokenOutput,
)
from hybrid.engine.stats import Counters
from hybrid.engine.turns import Turns
from hybrid.kvcache.pool import BlockPool, blocks_for


class Scheduler:
    """First come, first served.

    A sequence gets the blocks of all its tokens when it is admitted, and one more now and then while it
    writes. When none is left for the latter, the sequence that came last gives its blocks back and starts
    again later: its text stays, and is computed once more like a prompt.

    A full block is published when it is computed, in a prompt or while writing: both give the same bits, as
    the contract of `hybrid.backends.base` demands.

    Sequences change only in `postprocess`, `finish` and `reset`, apart from blocks, which a sequence owns
    from the moment they are taken: a step that is interrupted can be abandoned or repeated.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.waiting: list[Sequence] = []  # in the order they came, as are
        self.running: list[Sequence] = []
        self.prompt: Batch | None = None  # begun
        self.copies: list[tuple[int, int]] = []  # of blocks, to be made before the next step
        self.turns = Turns()
        self.counters = Counters()

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """A token for each text that is written, or a piece of prompts; they take turns."""
        self._admit()
        writing = [item for sequence in list(self.running) for item in self._next_token(sequence)]
        if not writing or self.turns.prompt_is_next:
            self.prompt = self.prompt or self._next_prompts(limited=bool(writing))
            if self.prompt is not None:
                self.turns.start_prompt(self.prompt.num_tokens, limited=bool(writing))
                return self.prompt
        return Batch(writing, decodes=True) if writing else None

    def _admit(self) -> None:
        """Start waiting sequences, in their order, while there are places and blocks for them."""
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            found = self.pool.find(sequence.reusable_keys())
            missing = blocks_for(len(sequence.token_ids)) - len(found)
            # Each running text may need a block before any of them ends.
            if missing + len(self.running) > self.pool.num_free_without(found):
                break
            del self.waiting[0]
            self.pool.share(found)
            sequence.block_table += found
            self.pool.grow(sequence.block_table, len(sequence.token_ids))
            self._start(sequence, len(found) * BLOCK_SIZE)

    def _start(self, sequence: Sequence, num_found_tokens: int) -> None:
        if sequence.started is None:
            sequence.started = time.perf_counter()
            sequence.num_cached_tokens = num_found_tokens
            self.counters.prefix_cache_queries += sequence.num_prompt_tokens
            self.counters.prefix_cache_hits += num_found_tokens
        self._run(sequence, num_found_tokens)

    def _run(self, sequence: Sequence, num_computed_tokens: int) -> None:
        sequence.status, sequence.num_computed_tokens = Status.RUNNING, num_computed_tokens
        sequence.num_published_blocks = num_computed_tokens // BLOCK_SIZE
        self.running.append(sequence)
        self.running.sort(key=_arrival)

    def _next_token(self, sequence: Sequence) -> Iterator[ScheduledSequence]:
        """The item of a sequence that writes and has, or gets, a block for its next token."""
        if not sequence.writes:
            return
        while not self.pool.grow(sequence.block_table, len(sequence.token_ids)):
            # A batch that has begun cannot lose sequences to others; its end is near.
            if self.prompt is not None or not self._preempt_last(sequence):
                return
        yield ScheduledSequence(sequence, 1)

    def _preempt_last(self, needs: Sequence) -> bool:
        """Take the blocks of the sequence that came last. False: it is the one that ``needs`` them."""
        last = self.running.pop()
        last.status, last.num_computed_tokens = Status.WAITING, 0
        self.pool.release(last.block_table)
        self._wait([last])
        self.counters.num_preemptions_total += 1
        return last is not needs

    def _next_prompts(self, *, limited: bool) -> Batch | None:
        """Pieces of prompts for ``max_num_batched_tokens``, or fewer while texts are written.

        At least half are for the first, so that it is soon done, the rest for those behind it, so that a long
        one does not keep short ones waiting.
        """
        prompts = [s for s in self.running if s.num_uncomputed_tokens and not s.writes]
        if not prompts:
            return None
        budget = self.config.max_num_batched_tokens
        if limited:
            budget = self.turns.piece(budget)
        others = min(sum(s.num_uncomputed_tokens for s in prompts[1:]), budget // 2)
        pieces = [min(prompts[0].num_uncomputed_tokens, budget - others)]
        budget -= pieces[0]
        for sequence in prompts[1:]:
            pieces.append(min(sequence.num_uncomputed_tokens, budget))
            budget -= pieces[-1]
        items = [ScheduledSequence(s, count) for s, count in zip(prompts, pieces, strict=True) if count]
        held = [block for item in items for block in item.sequence.block_table]
        self.pool.share(held)
        return Batch(items, decodes=False, held_blocks=held)

    def count(self, batch: Batch, seconds: float, *, finished: bool) -> None:
        """Book the time of a step; ``finished``: it did not stop between layers."""
        counters = self.counters
        if batch.decodes:
            self.turns.decoded(seconds)
            counters.decode_seconds_total += seconds
            counters.decode_steps_total += finished
        else:
            counters.prompt_seconds_total += seconds
            counters.prompt_steps_total += finished

    def postprocess(
        self, batch: Batch, sampled: list[SampledToken | FailedSample]
    ) -> list[TokenOutput | FailedRequest]:
        """Book what was computed, append a token to each sequence that samples, end what ends."""
        if batch is self.prompt:
            self._drop_prompt()
        outputs: list[TokenOutput | FailedRequest] = []
        chosen = iter(sampled)
        for item in batch.items:
            sequence = item.sequence
            tokens = [next(chosen) for _ in item.samplers]
            if sequence.status is Status.FINISHED:  # it was aborted while its prompt was computed
                continue
            sequence.num_computed_tokens += item.num_new_tokens
            self._publish(sequence)
            if tokens:
                outputs += self._append(sequence, tokens)
        return outputs

    def _append(
        self, sequence: Sequence, tokens: list[SampledToken | FailedSample]
    ) -> list[TokenOutput | FailedRequest]:
        """Give a sequence, and siblings that begin now, a token each."""
        texts, sequence.siblings = [sequence, *sequence.siblings], []
        for text in texts[1:]:
            self._fork(sequence, text)
        outputs = [_appended(text, token) for text, token in zip(texts, tokens, strict=True)]
        for text, output in zip(texts, outputs, strict=True):
            if isinstance(output, FailedRequest) or output.finish_reason is not None:
                self.finish(text)
        self.counters.generation_tokens_total += sum(isinstance(o, TokenOutput) for o in outputs)
        return outputs

    def _publish(self, sequence: Sequence) -> None:
        if sequence.num_computed_tokens // BLOCK_SIZE == sequence.num_published_blocks:
            return
        keys = sequence.computed_keys()
        for index in range(sequence.num_published_blocks, len(keys)):
            self.pool.publish(sequence.block_table[index], keys[index])
        sequence.num_published_blocks = len(keys)

    def _fork(self, sequence: Sequence, text: Sequence) -> None:
        """Let another text of a computed prompt begin: at once, sharing its full blocks and copying the last
        one, or, without a place or a block, later, computing what is not in the cache by then."""
        text.begin_like(sequence)
        num_full, num_more = divmod(sequence.num_computed_tokens, BLOCK_SIZE)
        if (
            len(self.running) == self.config.max_num_seqs
            or (num_more > 0) + len(self.running) > self.pool.num_free
        ):
            self._wait([text])
            return
        text.block_table = sequence.block_table[:num_full]
        self.pool.share(text.block_table)
        if num_more:
            self.pool.grow(text.block_table, sequence.num_computed_tokens)
            self.copies.append((sequence.block_table[num_full], text.block_table[num_full]))
        self._run(text, sequence.num_computed_tokens)

    def _wait(self, sequences: list[Sequence]) -> None:
        """Let sequences wait that came before some that wait already."""
        self.waiting += sequences
        self.waiting.sort(key=_arrival)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and free its blocks."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        sequence.status = Status.FINISHED
        self.pool.release(sequence.block_table)
        batch = self.prompt
        if batch is not None and all(item.sequence.status is Status.FINISHED for item in batch.items):
            self._drop_prompt()

    def reset(self) -> None:
        """Drop every sequence, and what is in the cache."""
        for sequence in (*self.waiting, *self.running):
            sequence.status = Status.FINISHED
            sequence.block_table.clear()
        self.waiting.clear()
        self.running.clear()
        self.prompt = None
        self.pool.reset()

    def _drop_prompt(self) -> None:
        """The begun batch of prompts is over."""
        if self.prompt is not None:
            self.pool.release(self.prompt.held_blocks)
            self.prompt = None


def _arrival(sequence: Sequence) -> tuple[int, int]:
    return sequence.arrival


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
    if sequence.prompt_logprobs is not None:
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs.finish(), None
    return TokenOutput(
        sequence.request_id,
        token,
        sequence.metrics(),
        prompt_logprobs,
        sequence.finish_reason,
        sequence.stop_reason,
        is_text=sequence.ends_in_text,
        index=sequence.index,
        num_cached_tokens=sequence.num_cached_tokens,
    )
