"""What attention needs to know about a batch: where each token's keys live and how far it may look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hybrid.config import BLOCK_SIZE as BLOCK_SIZE


@dataclass(frozen=True)
class AttentionBatch:
    """Sequences packed one after another on the token axis.

    All tensors are int32, on the host unless `on` made them. ``T`` tokens of ``S`` sequences take part in the
    step.

    Attributes:
        positions: ``[T]`` position of each token in its sequence.
        slot_mapping: ``[T]`` cache slot each new token is written to (block id * BLOCK_SIZE + offset).
        query_start: ``[S + 1]`` prefix sums; sequence ``s`` has tokens ``query_start[s]:query_start[s+1]``.
        seq_lens: ``[S]`` tokens in the cache after this step (cached + new).
        block_tables: ``[S, max_blocks]`` block ids of each sequence, in order; unused entries are -1.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    host: AttentionBatch | None = None  # of a copy on a device: what it was copied from
    _copies: dict[str, AttentionBatch] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Kernels take addresses: another type or a gap between numbers would be read as garbage.
        for name in ("positions", "slot_mapping", "query_start", "seq_lens"):
            tensor = getattr(self, name)
            if tensor.dtype is not torch.int32 or not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous int32 tensor, found {tensor.dtype}")
        if self.block_tables.dtype is not torch.int32 or self.block_tables.stride(1) != 1:
            raise ValueError("block_tables: expected int32 with contiguous rows")

    def on(self, device: str, receive: Callable[[torch.Tensor], torch.Tensor]) -> AttentionBatch:
        """The batch on a device, by a function that copies a tensor there; copied when it is first asked
        for."""
        if device not in self._copies:
            tensors = self.positions, self.slot_mapping, self.query_start, self.seq_lens, self.block_tables
            host = AttentionBatch(*tensors)  # without copies of its own: nothing refers to itself
            positions, slots, starts, lens, tables = map(receive, tensors)
            self._copies[device] = AttentionBatch(positions, slots, starts, lens, tables, host)
        return self._copies[device]

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]
