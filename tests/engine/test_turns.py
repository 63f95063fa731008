"""How a prompt and running texts share the time, on a clock that the test moves."""

from __future__ import annotations

import pytest

import hybrid.engine.turns
from hybrid.engine.turns import Turns


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(hybrid.engine.turns, "time", clock)
    return clock


def solo_seconds(num_tokens, num_layers, layer_s, step=512):
    pieces = [min(step, num_tokens - start) for start in range(0, num_tokens, step)]
    return sum(num_layers * layer_s(piece) for piece in pieces)


def share_time(clock, num_tokens, num_layers, layer_s, decode_s, step=512):
    """A prompt of ``num_tokens`` beside running texts: its seconds, and the longest pause of the texts."""
    turns = Turns()
    for _ in range(20):
        turns.decoded(decode_s)
    turns.start_prompt(512, limited=False)
    clock.now += layer_s(512)
    turns.prompt_is_over()
    turns.decoded(decode_s)
    begun = last_token = clock.now
    longest = left = layers = 0
    while num_tokens or left:
        if turns.prompt_is_next:
            if not left:
                piece = min(num_tokens, turns.piece(step))
                num_tokens, left = num_tokens - piece, num_layers
            turns.start_prompt(piece, limited=True)
            over = False
            while left and not over:
                clock.now += layer_s(piece)
                left, layers = left - 1, layers + 1
                over = turns.prompt_is_over()
        else:
            clock.now += decode_s
            turns.decoded(decode_s)
            longest, last_token = max(longest, clock.now - last_token), clock.now
    return clock.now - begun, longest


# A layer's seconds by tokens: weights are read once, then each token costs; and a decode step's seconds.
COSTS = {
    "DeepSeek-V2-Lite, Q4_K, two cores": (27, lambda n: 0.008 + 0.00008 * n, 0.2),
    "a layer longer than a decode step": (27, lambda n: 0.01 + 0.0006 * n, 0.13),
    "a layer of nearly the time there is": (27, lambda n: 0.002 + 0.0003 * n, 0.1),
    "a slow prompt on a large machine": (61, lambda n: 0.02 + 0.0002 * n, 0.12),
}


@pytest.mark.parametrize("name", COSTS)
def test_pauses_stay_below_three_steps_and_the_prompt_gets_most_of_the_time(clock, name):
    num_layers, layer_s, decode_s = COSTS[name]
    taken_s, longest_s = share_time(clock, 4000, num_layers, layer_s, decode_s)
    assert longest_s <= 3 * decode_s
    share = solo_seconds(4000, num_layers, layer_s) / taken_s
    print(f"{name}: longest pause {longest_s / decode_s:.2f} steps, prompt at {share:.1%} of its own rate")
    assert share >= 0.6


def test_a_layer_is_computed_between_steps_however_long_it_is(clock):
    turns = Turns()
    turns.decoded(0.001)
    turns.start_prompt(32, limited=True)
    clock.now += 5.0
    assert turns.prompt_is_over()
    assert not turns.prompt_is_next
    turns.decoded(0.001)
    assert turns.prompt_is_next
    assert turns.piece(512) == 32


def test_a_prompt_alone_has_all_the_time(clock):
    turns = Turns()
    turns.decoded(0.001)
    turns.start_prompt(512, limited=False)
    for _ in range(100):
        clock.now += 1.0
        assert not turns.prompt_is_over()
    assert turns.prompt_is_next


def test_without_a_decode_step_to_measure_pieces_are_whole(clock):
    turns = Turns()
    assert turns.piece(512) == 512
    turns.start_prompt(512, limited=True)
    clock.now += 1.0
    assert turns.prompt_is_over()
    assert turns.piece(512) == 512
