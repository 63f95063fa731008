"""A decode step that runs without Python between its operations: recorded once, repeated for every token."""

from __future__ import annotations

from typing import Protocol

import torch

from hybrid.backends.base import Backend, Recording
from hybrid.kvcache.blocks import AttentionBatch


class Network(Protocol):
    """What a family's module is to the rest of the engine."""

    def forward(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor: ...

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor: ...


class DecodeStep:
    """One new token for each of ``num_seqs`` sequences with at most ``max_blocks`` cache blocks.

    Inputs lie at fixed addresses, because that is what a recording repeats.
    """

    def __init__(self, num_seqs: int, max_blocks: int) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32)

        self._token_ids = zeros(num_seqs)
        self._batch = AttentionBatch(
            positions=zeros(num_seqs),
            slot_mapping=zeros(num_seqs),
            query_start=torch.arange(num_seqs + 1, dtype=torch.int32),
            seq_lens=zeros(num_seqs),
            block_tables=zeros(num_seqs, max_blocks),
        )
        self._recording: Recording | None = None
        self._logits = torch.empty(0)

    def run(
        self, network: Network, backend: Backend, token_ids: torch.Tensor, batch: AttentionBatch
    ) -> torch.Tensor:
        """Logits ``[num_seqs, vocab]`` of a step, a new tensor. Network and backend are always the same."""
        self._token_ids.copy_(token_ids)
        for name in ("positions", "slot_mapping", "seq_lens"):
            getattr(self._batch, name).copy_(getattr(batch, name))
        self._batch.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        if self._recording is None:
            with backend.record() as recording:
                self._logits = network.compute_logits(network.forward(self._token_ids, self._batch))
            self._recording = recording
        else:
            self._recording.run()
        return self._logits.clone()
