"""Runs the model on a scheduled batch."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hybrid.engine.scheduler import ScheduledSequence
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.moe.reduction import ExpertCount

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

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float32 ``[n, hidden] -> [n, vocab]``."""

    def decode(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Logits float32 ``[S, vocab]`` of one new token for each of the batch's ``S`` sequences."""

    @property
    def expert_count(self) -> ExpertCount:
        """Experts chosen and run by now; zeros where none is ever dropped."""

    def close(self) -> None:
        """Free everything."""


class ModelRunner:
    """Turns scheduled sequences into the tensors of a step, and hidden states into logits."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, scheduled: list[ScheduledSequence]) -> torch.Tensor:
        """Logits float32 ``[n, vocab]`` for the ``n`` sequences that sample, in batch order.

        Log-probabilities of prompt positions go to their sequence's builder.
        """
        token_ids, batch = prepare(scheduled)
        if all(item.decodes for item in scheduled):
            return self.model.decode(token_ids, batch)
        hidden_states = self.model.forward(token_ids, batch)
        last_rows, start = [], 0
        for item in scheduled:
            stop = start + item.num_new_tokens
            self._collect_prompt_logprobs(item, hidden_states[start:stop])
            if item.samples:
                last_rows.append(stop - 1)
            start = stop
        if not last_rows:
            return hidden_states.new_empty((0, 0))
        return self.model.compute_logits(hidden_states[last_rows])

    def _collect_prompt_logprobs(self, item: ScheduledSequence, hidden_states: torch.Tensor) -> None:
        builder = item.sequence.prompt_logprobs
        if builder is None:
            return
        start = item.sequence.num_computed_tokens
        wanted = hidden_states[: builder.num_wanted(start, start + item.num_new_tokens)]
        for first in range(0, len(wanted), LOGITS_ROWS):
            builder.add(self.model.compute_logits(wanted[first : first + LOGITS_ROWS]))


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
