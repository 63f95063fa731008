"""Blocks are handed out once, come back, and are never invented."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.kvcache.pool import BlockPool, blocks_for
from hybrid.kvcache.prefix import BlockKeys


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


# --- shared and kept blocks --------------------------------------------------------------------


def filled(pool, num_blocks, prefix=""):
    """A table of published blocks; block i has the key ``prefix`` and i."""
    table: list[int] = []
    assert pool.grow(table, num_blocks * BLOCK_SIZE)
    for index, block in enumerate(table):
        pool.publish(block, f"{prefix}{index}".encode())
    return table


def keys(count, prefix=""):
    return [f"{prefix}{index}".encode() for index in range(count)]


def test_a_released_block_can_be_found_until_it_is_needed():
    pool = BlockPool(4)
    table = filled(pool, 3)
    blocks = list(table)
    assert pool.find(keys(5)) == blocks
    pool.release(table)
    assert pool.num_free == 4
    assert pool.find(keys(5)) == blocks
    other: list[int] = []
    assert pool.grow(other, 2 * BLOCK_SIZE)  # the empty one, then the end of the text
    assert pool.find(keys(5)) == blocks[:2]
    assert pool.grow(other, 4 * BLOCK_SIZE)
    assert pool.find(keys(5)) == []


def test_the_least_recently_used_goes_first():
    pool = BlockPool(4)
    old, new = filled(pool, 2, "old"), filled(pool, 2, "new")
    pool.release(old)
    pool.release(new)
    again = pool.find(keys(2, "old"))
    pool.share(again)
    pool.release(again)
    taken: list[int] = []
    pool.grow(taken, 2 * BLOCK_SIZE)
    assert len(pool.find(keys(2, "old"))) == 2
    assert pool.find(keys(2, "new")) == []


def test_a_shared_block_is_free_when_its_last_user_leaves():
    pool = BlockPool(3)
    table = filled(pool, 2)
    shared = list(table)
    pool.share(shared)
    assert pool.num_free == 1
    pool.release(table)
    assert pool.num_free == 1
    pool.release(shared)
    assert pool.num_free == 3
    assert pool.num_free_without(pool.find(keys(2))) == 1


def test_the_first_block_of_a_content_stays_the_one_that_is_found():
    pool = BlockPool(4)
    first = filled(pool, 1)
    second = filled(pool, 1)
    assert pool.find(keys(1)) == first
    pool.release(second)
    assert pool.find(keys(1)) == first
    pool.release(first)
    taken: list[int] = []
    pool.grow(taken, 4 * BLOCK_SIZE)
    assert pool.find(keys(1)) == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 5)), max_size=80))
def test_references_add_up(steps):
    """Four users of nine blocks, three texts: take, share what is found, release."""
    pool = BlockPool(9)
    tables: list[list[int]] = [[] for _ in range(4)]
    for user, text, count in steps:
        pool.release(tables[user])
        if text == 3:
            continue
        names = keys(count, f"{text}-")
        found = pool.find(names)
        if count - len(found) > pool.num_free_without(found):
            continue
        pool.share(found)
        tables[user] += found
        assert pool.grow(tables[user], count * BLOCK_SIZE)
        for block, name in zip(tables[user], names, strict=True):
            pool.publish(block, name)
        held = [block for table in tables for block in table]
        assert pool.num_free == 9 - len(set(held))
        assert [pool._references[block] for block in range(9)] == [held.count(block) for block in range(9)]
        assert pool.find(names) != []
    for table in tables:
        pool.release(table)
    assert pool.num_free == 9


def test_keys_tell_texts_apart():
    def key(tokens):
        return BlockKeys().first(len(tokens) // BLOCK_SIZE, tokens)

    text = list(range(3 * BLOCK_SIZE))
    assert len(set(key(text))) == 3
    assert key(text)[:2] == key(text[: 2 * BLOCK_SIZE + 5])
    assert key(text[BLOCK_SIZE:])[0] != key(text)[1]  # the same tokens after others
    growing = BlockKeys()
    assert growing.first(1, text[:BLOCK_SIZE]) == key(text)[:1]
    assert growing.first(3, text) == key(text)
    assert growing.first(2, text) == key(text)[:2]
