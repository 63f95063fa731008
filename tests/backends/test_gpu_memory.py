"""The cap on a GPU's memory, with the numbers of a card that is not here."""

from __future__ import annotations

import pytest
import torch

from hybrid.backends import gpu_memory
from hybrid.errors import CapacityError
from hybrid.placement.machine import usable_vram

GIB, MIB = 1 << 30, 1 << 20
CARD = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """80 GiB, of which the context and others take 700 MiB and torch 100 MiB; limits are kept in it."""
    limits = {}
    taken = {"bytes": 800 * MIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB - taken["bytes"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * MIB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.update({device: share})
    )
    return limits, taken


def test_a_large_card_gives_what_a_small_one_has(card):
    limits, _ = card
    assert gpu_memory.limit_memory({CARD: 24 * GIB}) == {CARD: 700 * MIB}
    assert limits[CARD] * 80 * GIB == pytest.approx(24 * GIB - 700 * MIB)


def test_nothing_left(card):
    with pytest.raises(CapacityError, match=r"cuda:0: 734003200 bytes are taken .* or raise --vram"):
        gpu_memory.limit_memory({CARD: 600 * MIB})


def test_what_is_taken_later_counts(card):
    _, taken = card
    gpu_memory.check_memory({CARD: 24 * GIB})
    taken["bytes"] = 25 * GIB
    with pytest.raises(CapacityError, match=r"cuda:0: 26843545600 bytes are taken, 26738688000 of them by"):
        gpu_memory.check_memory({CARD: 24 * GIB})


def test_what_may_be_used_if_nobody_says():
    assert usable_vram(24 * GIB) == 23.5 * GIB
    assert usable_vram(int(23.67 * GIB)) == 23.5 * GIB  # a card of 24 GiB as the driver states it
    assert usable_vram(int(79.1 * GIB)) == int(79.1 * GIB)
