"""How a prompt and running texts share the time, on a clock that the test moves."""

from __future__ import annotations

import random

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


def solo_seconds(num_tokens, num_layers, parts, step=512):
    pieces = [min(step, num_tokens - start) for start in range(0, num_tokens, step)]
    return sum(num_layers * part_s(piece) for piece in pieces for part_s in parts.values())


def share_time(clock, num_tokens, num_layers, parts, decode_s, step=512, noise=0.0):
    """A prompt of ``num_tokens`` beside running texts: its seconds, and the pauses of the texts."""
    turns, generator = Turns(), random.Random(1)

    def spend(seconds):
        clock.now += seconds * generator.uniform(1 - noise, 1 + noise)

    def compute(kind, piece):
        spend(parts[kind](piece))
        return turns.prompt_is_over(kind)

    def decode():
        begun = clock.now
        spend(decode_s)
        turns.decoded(clock.now - begun)

    for _ in range(20):
        decode()
    turns.start_prompt(512, limited=False)
    for kind in parts:
        compute(kind, 512)
    decode()
    begun = last_token = clock.now
    pauses, left = [], []
    while num_tokens or left:
        if turns.prompt_is_next:
            if not left:
                piece = min(num_tokens, turns.piece(step))
                num_tokens, left = num_tokens - piece, list(parts) * num_layers
            turns.start_prompt(piece, limited=True)
            while left and not compute(left.pop(0), piece):
                pass
        else:
            decode()
            pauses.append(clock.now - last_token)
            last_token = clock.now
    return clock.now - begun, pauses


def halves(layer_s, attention=0.35):
    """The parts of a layer: weights are read once in each, then each token costs."""
    return {"attention": lambda n: attention * layer_s(n), "experts": lambda n: (1 - attention) * layer_s(n)}


# A layer's parts, their seconds by tokens, and a decode step's seconds.
COSTS = {
    "DeepSeek-V2-Lite, Q4_K, two cores": (27, halves(lambda n: 0.008 + 0.00008 * n), 0.2),
    "its slower processor": (27, halves(lambda n: 0.02 + 0.0008 * n), 0.35),
    "a layer longer than a decode step": (27, halves(lambda n: 0.01 + 0.0006 * n), 0.13),
    "a layer of nearly the time there is": (27, halves(lambda n: 0.002 + 0.0003 * n), 0.1),
    "a slow prompt on a large machine": (61, halves(lambda n: 0.02 + 0.0002 * n), 0.12),
    "whole layers": (27, {"layer": lambda n: 0.01 + 0.0006 * n}, 0.13),
}


@pytest.mark.parametrize("name", COSTS)
def test_pauses_stay_below_three_steps_and_the_prompt_gets_most_of_the_time(clock, name):
    num_layers, parts, decode_s = COSTS[name]
    taken_s, pauses = share_time(clock, 4000, num_layers, parts, decode_s)
    longest = max(pauses) / decode_s
    share = solo_seconds(4000, num_layers, parts) / taken_s
    print(f"{name}: longest pause {longest:.2f} steps, prompt at {share:.1%} of its own rate")
    assert longest <= 3
    assert share >= 0.6


@pytest.mark.parametrize("name", COSTS)
def test_noise_of_a_twentieth_changes_little(clock, name):
    num_layers, parts, decode_s = COSTS[name]
    taken_s, pauses = share_time(clock, 4000, num_layers, parts, decode_s, noise=0.05)
    share = solo_seconds(4000, num_layers, parts) / taken_s
    print(f"{name}: longest pause {max(pauses) / decode_s:.2f} steps, prompt at {share:.1%} of its own rate")
    assert max(pauses) <= 3 * decode_s
    assert share >= 0.57


def test_a_layer_is_computed_between_steps_however_long_it_is(clock):
    turns = Turns()
    turns.decoded(0.001)
    turns.start_prompt(32, limited=True)
    clock.now += 5.0
    assert turns.prompt_is_over("layer")
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
        assert not turns.prompt_is_over("layer")
    assert turns.prompt_is_next


def test_without_a_decode_step_to_measure_pieces_are_whole(clock):
    turns = Turns()
    assert turns.piece(512) == 512
    turns.start_prompt(512, limited=True)
    clock.now += 1.0
    assert turns.prompt_is_over("layer")
    assert turns.piece(512) == 512
