"""Runs the model on a scheduled batch."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

import torch

from hybrid.engine.batch import Batch, ScheduledSequence
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models.layer_steps import LayerSteps
from hybrid.moe.copies import CopyStats
from hybrid.moe.reduction import ExpertCount
from hybrid.placement.usage import Usage

LOGITS_ROWS = 64  # rows of prompt logits computed at once: 33 MB of a vocabulary of 130k


class CausalLM(Protocol):
    """What the engine needs of a model. `hybrid.models` gives real ones, tests a mock."""

    @property
    def config(self) -> Any:
        """Has ``vocab_size`` and ``max_position_embeddings``."""

    def allocate_cache(self, num_blocks: int) -> None:
        """Make the cache, of ``num_blocks * BLOCK_SIZE`` tokens."""

    def forward(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """int32 ``[T]`` -> float32 hidden states ``[T, hidden]``; writes the cache."""

    def forward_layers(self, token_ids: torch.Tensor, batch: AttentionBatch) -> LayerSteps:
        """`forward`, yielding after each part of a layer: other batches may be computed in between."""

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy cache blocks in all layers, each from the first to the second of a pair."""

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float32 ``[n, hidden] -> [n, vocab]``, on the host."""

    def decode(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Logits float32 ``[S, vocab]`` of one new token for each of ``S`` sequences, on the host."""

    @property
    def expert_count(self) -> ExpertCount:
        """Experts chosen and run by now; zeros where none is ever dropped."""

    @property
    def copy_stats(self) -> CopyStats | None:
        """What copies of experts did; ``None`` where there are none."""

    def count_usage(self) -> None:
        """Count from now on which experts tokens use."""

    @property
    def usage(self) -> Usage:
        """What was counted."""

    @property
    def expert_cpu_seconds(self) -> float | None:
        """Time that routed experts took on the CPU; ``None`` where it is not measured. Any thread may ask."""

    def close(self) -> None:
        """Free everything."""


class ModelRunner:
    """Turns scheduled sequences into the tensors of a step, and hidden states into logits."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, batch: Batch, must_pause: Callable[[str], bool]) -> torch.Tensor | None:
        """Logits float32 ``[n, vocab]`` for the ``n`` sequences of ``batch.samplers``.

        A batch of prompts may pause after each part of a layer: then the result is ``None``, and running the
        same batch goes on from there. Log-probabilities of prompt positions go to their sequence's builder.
        """
        if batch.decodes:
            return _for_siblings(self.model.decode(*prepare(batch.items)), batch.items)
        steps = batch.steps or self._prompt_steps(batch.items)
        batch.steps = None  # what fails begins anew
        while True:
            try:
                kind = next(steps)
            except StopIteration as done:
                return _for_siblings(done.value, batch.items)
            if must_pause(kind):
                batch.steps = steps
                return None

    def _prompt_steps(self, items: list[ScheduledSequence]) -> LayerSteps:
        hidden_states = yield from self.model.forward_layers(*prepare(items))
        last_rows, start = [], 0
        for item in items:
            stop = start + item.num_new_tokens
            yield from self._collect_prompt_logprobs(item, hidden_states[start:stop])
            if item.samples:
                last_rows.append(stop - 1)
            start = stop
        if not last_rows:
            return torch.empty(0, 0)
        return self.model.compute_logits(hidden_states[torch.tensor(last_rows)])

    def _collect_prompt_logprobs(
        self, item: ScheduledSequence, hidden_states: torch.Tensor
    ) -> Generator[str, None, None]:
        builder = item.sequence.prompt_logprobs
        if builder is None:
            return
        start = item.sequence.num_computed_tokens
        wanted = hidden_states[: builder.num_wanted(start, start + item.num_new_tokens)]
        for first in range(0, len(wanted), LOGITS_ROWS):
            builder.add(start + first, self.model.compute_logits(wanted[first : first + LOGITS_ROWS]))
            yield "logits"


def _for_siblings(logits: torch.Tensor, items: list[ScheduledSequence]) -> torch.Tensor:
    """From a row for each item that samples to one for each of its samplers."""
    counts = [len(item.samplers) for item in items if item.samples]
    if len(logits) == sum(counts):
        return logits
    return logits.repeat_interleave(torch.tensor(counts), 0)


def prepare(scheduled: list[ScheduledSequence]) -> tuple[torch.Tensor, AttentionBatch]:
    """Token ids int32 ``[T]`` of the step, and where each token stands in its sequence and in the cache."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_start, seq_lens = [0], []
    max_blocks = max(len(item.sequence.block_table) for item in scheduled)
    for item in scheduled:
        sequence = item.sequence
        start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + item.num_new_tokens
        token_ids += sequence.token_ids[start:stop]
        positions += range(start, stop)
        slots += [
            sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in range(start, stop)
        ]
        query_start.append(query_start[-1] + item.num_new_tokens)
        seq_lens.append(stop)
    tables = [
        item.sequence.block_table + [-1] * (max_blocks - len(item.sequence.block_table)) for item in scheduled
    ]
    batch = AttentionBatch(
        positions=torch.tensor(positions, dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int32),
        query_start=torch.tensor(query_start, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
    )
    return torch.tensor(token_ids, dtype=torch.int32), batch
