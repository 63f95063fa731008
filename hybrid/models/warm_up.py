"""The largest steps of a run, once at its start: on a GPU all memory is taken and all kernels are compiled
before the first request, so that nothing runs out in the middle of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from hybrid.errors import CapacityError
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.placement.plan import Plan
from hybrid.placement.refusal import memory_table

if TYPE_CHECKING:
    from hybrid.models.loader import Model


@contextmanager
def told_by_the_plan(plan: Plan) -> Iterator[None]:
    """Out of memory on a GPU becomes a `CapacityError` with the plan's table."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lines = [
            f"a GPU has too little memory: {error}",
            "The plan was:",
            *memory_table(plan.memory.values()),
            "Give it less by rules, a shorter context (-c) or smaller steps (-ub), or raise --vram.",
        ]
        raise CapacityError("\n".join(lines)) from error


@torch.inference_mode()
def warm_up(model: Model, plan: Plan) -> None:
    """Runs the longest prompt step and the widest decode steps. Writes to the cache, which must be unused.

    Raises:
        CapacityError: a GPU's memory does not suffice.
    """
    size = plan.size
    num_tokens = min(size.max_num_batched_tokens, size.max_model_len - 1)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    positions = torch.arange(num_tokens, dtype=torch.int32)
    batch = AttentionBatch(
        positions,
        positions,
        torch.tensor([0, num_tokens], dtype=torch.int32),
        torch.tensor([num_tokens], dtype=torch.int32),
        torch.arange(num_blocks, dtype=torch.int32)[None],
    )
    with told_by_the_plan(plan):
        hidden_states = model.forward(torch.zeros(num_tokens, dtype=torch.int32), batch)
        model.compute_logits(hidden_states[-size.max_num_seqs :])
        del hidden_states
        for num_seqs in sorted({1, size.max_num_seqs}):
            for _ in range(2):  # the second time it is captured
                model.decode(
                    torch.zeros(num_seqs, dtype=torch.int32), _decode_batch(num_seqs, size.max_model_len)
                )


def _decode_batch(num_seqs: int, max_model_len: int) -> AttentionBatch:
    """The first token of each sequence, all in block 0, with tables for the longest."""
    zeros = torch.zeros(num_seqs, dtype=torch.int32)
    tables = torch.zeros(num_seqs, -(-max_model_len // BLOCK_SIZE), dtype=torch.int32)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32)
    return AttentionBatch(zeros, zeros, starts, zeros + 1, tables)
