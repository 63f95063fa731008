"""Blocks are handed out once, come back, and are never invented."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.kvcache.pool import BlockPool, blocks_for


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_blocks_for(tokens, blocks):
    assert blocks_for(tokens) == blocks


def test_growing_beyond_the_pool_changes_nothing():
    pool = BlockPool(3)
    table: list[int] = []
    assert pool.grow(table, 2 * BLOCK_SIZE)
    before = list(table)
    assert not pool.grow(table, 4 * BLOCK_SIZE)
    assert table == before
    assert pool.num_free == 1
    assert pool.grow(table, 2 * BLOCK_SIZE)
    assert table == before


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 300)), max_size=60))
def test_no_block_is_in_two_places(steps):
    pool = BlockPool(9)
    tables: list[list[int]] = [[] for _ in range(5)]
    for which, tokens in steps:
        if tokens == 0:
            pool.release(tables[which])
        else:
            pool.grow(tables[which], tokens)
        held = [block for table in tables for block in table]
        assert len(held) == len(set(held)) == 9 - pool.num_free
        assert set(held) <= set(range(9))
    pool.reset()
    assert pool.num_free == 9


def tensors(**changes):
    fields = {name: torch.zeros(1, dtype=torch.int32) for name in ("positions", "slot_mapping", "seq_lens")}
    fields["query_start"] = torch.zeros(2, dtype=torch.int32)
    fields["block_tables"] = torch.zeros(1, 1, dtype=torch.int32)
    return fields | changes


@pytest.mark.parametrize("name", tensors())
def test_a_batch_takes_int32_alone(name):
    AttentionBatch(**tensors())
    with pytest.raises(ValueError, match=name):
        AttentionBatch(**tensors(**{name: tensors()[name].long()}))


def test_a_batch_takes_no_gaps():
    with pytest.raises(ValueError, match="positions"):
        AttentionBatch(**tensors(positions=torch.zeros(8, dtype=torch.int32)[::2]))
    with pytest.raises(ValueError, match="block_tables"):
        AttentionBatch(**tensors(block_tables=torch.zeros(4, 4, dtype=torch.int32).T))
