"""How many tokens the cache is made for."""

from __future__ import annotations

import pytest

from hybrid import LLM
from hybrid.calibration import this_machine
from hybrid.config import BLOCK_SIZE, model_path
from hybrid.errors import CapacityError, ConfigError
from hybrid.gguf import GGUFFile
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import Planner


@pytest.fixture
def planner_with():
    """A planner of the demo model for a machine with so many bytes."""
    with GGUFFile.open(model_path(None)) as file:
        yield lambda n_bytes: Planner(file, "auto", this_machine(1).with_budget("cpu", n_bytes))


def total(planner, size):
    return planner.draft(size).memory["cpu"].total_bytes


def test_it_has_room_for_every_sequence_where_ram_has(planner_with):
    size = RunSize(max_model_len=1000, max_num_seqs=8)
    assert planner_with(1 << 40).plan(size).size.cache_tokens == 8 * 1024


def test_it_shrinks_to_what_fits_and_no_further_than_one_context(planner_with):
    size = RunSize(max_model_len=1000, max_num_seqs=8)
    unlimited = planner_with(1 << 40)
    three = RunSize(max_model_len=1000, max_num_seqs=8, kv_cache_tokens=3 * 1024)
    found = planner_with(total(unlimited, three) + 1000).plan(size)
    assert found.size.cache_tokens == 3 * 1024
    assert (found.size.max_model_len, found.size.max_num_seqs) == (1000, 8)
    one = RunSize(max_model_len=1000, max_num_seqs=8, kv_cache_tokens=1024)
    assert planner_with(total(unlimited, one)).plan(size).size.cache_tokens == 1024
    with pytest.raises(CapacityError):
        planner_with(total(unlimited, one) - 1000).plan(size)


def test_a_size_that_is_asked_for_is_not_changed(planner_with):
    size = RunSize(max_model_len=1000, max_num_seqs=8, kv_cache_tokens=3000)
    found = planner_with(1 << 40).plan(size)
    assert found.size.cache_tokens == 47 * BLOCK_SIZE
    with pytest.raises(CapacityError):
        planner_with(total(planner_with(1 << 40), size) - 1000).plan(size)


def test_the_engine_has_the_cache_of_the_plan():
    with LLM("demo", max_model_len=300, max_num_seqs=4, num_threads=1, kv_cache_tokens=700) as llm:
        assert llm.stats().kv_cache_tokens == llm.plan().size.cache_tokens == 11 * BLOCK_SIZE
    for wrong in (299, 0, 1.5, True):
        with pytest.raises(ConfigError, match="kv_cache_tokens"):
            LLM("demo", max_model_len=300, kv_cache_tokens=wrong)
