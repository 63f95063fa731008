"""A dynamic cache's decisions, by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid.moe.cache import DynamicPolicy, PolicyOptions, Slots

LAYERS, EXPERTS, PER_TOKEN = 4, 64, 4


class Simulation:
    """Tokens choose experts by weights; copies arrive an interval after they were begun."""

    def __init__(self, capacity=48, seed=0, **options):
        self.rng = np.random.default_rng(seed)
        self.slots = Slots([0] * LAYERS, EXPERTS, [capacity])
        usable = np.ones((LAYERS, EXPERTS), bool)
        self.policy = DynamicPolicy(np.full(LAYERS, 1e-3), usable, PolicyOptions(**options))
        self.copies = self.most_at_once = 0

    def weights(self, seed):
        rng = np.random.default_rng(seed)
        zipf = 1 / np.arange(1, EXPERTS + 1) ** 1.1
        return np.stack([rng.permutation(zipf) for _ in range(LAYERS)])

    def run(self, weights, tokens):
        """The rate of hits."""
        hits = uses = 0
        interval = self.policy.options.interval
        for _ in range(tokens // interval):
            noise = self.rng.gumbel(size=(interval, LAYERS, EXPERTS))
            chosen = np.argsort(-(np.log(weights) + noise), axis=-1)[..., :PER_TOKEN]
            counts = np.zeros((LAYERS, EXPERTS), np.int64)
            for layer in range(LAYERS):
                np.add.at(counts[layer], chosen[:, layer].ravel(), 1)
            hits += counts[self.slots.ready].sum()
            uses += counts.sum()
            for expert in self.slots.loading:
                self.slots.finish(expert)
            self.policy.observe(counts, interval)
            begun = self.policy.decide(self.slots)
            self.copies += len(begun)
            self.most_at_once = max(self.most_at_once, len(self.slots.loading))
            self.check()
        return hits / uses

    def check(self):
        table = self.slots.table[:, :-1]
        used = table[table >= 0].tolist() + list(self.slots._loading.values())
        assert len(set(used)) == len(used) <= self.slots.capacity[0]
        assert (self.slots.table[:, -1] == -1).all()

    def best(self, weights):
        """Hits of the best fixed choice, over many tokens."""
        noise = self.rng.gumbel(size=(4000, LAYERS, EXPERTS))
        chosen = np.argsort(-(np.log(weights) + noise), axis=-1)[..., :PER_TOKEN]
        counts = np.stack([np.bincount(chosen[:, n].ravel(), minlength=EXPERTS) for n in range(LAYERS)])
        return np.sort(counts.ravel())[::-1][: self.slots.capacity[0]].sum() / counts.sum()


def test_it_comes_near_the_best_fixed_choice():
    sim = Simulation()
    weights = sim.weights(1)
    sim.run(weights, 1600)
    assert sim.run(weights, 1600) > 0.95 * sim.best(weights) > 0.4


def test_it_follows_what_is_asked():
    sim = Simulation()
    first, second = sim.weights(1), sim.weights(2)
    sim.run(first, 2400)
    before = sim.run(second, 80)
    sim.run(second, 2400)
    after = sim.run(second, 1600)
    assert before < 0.6 * after and after > 0.93 * sim.best(second)


def test_when_use_is_steady_it_comes_to_rest():
    """Experts of nearly equal use do not drive each other out for ever."""
    sim = Simulation(half_life=2048)
    weights = sim.weights(3)
    sim.run(weights, 6000)
    settled = sim.copies
    sim.run(weights, 4000)
    assert sim.copies - settled < 4000 // 40
    restless = Simulation(half_life=2048, hysteresis=1.0, min_uses=0.0)
    restless.run(weights, 6000)
    settled_restless = restless.copies
    restless.run(weights, 4000)
    assert restless.copies - settled_restless > 3 * (sim.copies - settled)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_copies_under_way_are_bounded(most):
    sim = Simulation(max_copies=most)
    sim.run(sim.weights(1), 400)
    assert sim.most_at_once == most


def test_kinds_keep_to_their_slots():
    slots = Slots([0, 1, 0], 4, [1, 2])
    policy = DynamicPolicy(np.ones(3), np.ones((3, 4), bool), PolicyOptions(max_copies=9))
    counts = np.zeros((3, 4), np.int64)
    counts[0, 1], counts[2, 2], counts[1] = 50, 60, [10, 20, 30, 40]
    policy.observe(counts, 0)
    begun = {r.expert for r in policy.decide(slots)}
    assert begun == {(2, 2), (1, 3), (1, 2)}


def test_the_worst_makes_room_for_what_is_worth_more():
    slots = Slots([0, 0], 4, [2])
    policy = DynamicPolicy(np.array([1.0, 3.0]), np.ones((2, 4), bool), PolicyOptions())
    for expert in ((0, 0), (1, 0)):
        slots.begin(expert)
        slots.finish(expert)
    counts = np.zeros((2, 4), np.int64)
    counts[0, 0], counts[1, 0], counts[1, 2] = 30, 20, 12  # worth 30, 60, 36
    policy.observe(counts, 0)
    assert policy.decide(slots) == []  # 36 is more than 30, but not 1.25 times
    counts[:] = 0
    counts[1, 2] = 2  # 42
    policy.observe(counts, 0)
    (found,) = policy.decide(slots)
    assert (found.expert, found.victim, found.slot) == ((1, 2), (0, 0), 0)
    assert slots.slot_of((0, 0)) is None and slots.slot_of((1, 2)) is None
    slots.finish((1, 2))
    assert slots.slot_of((1, 2)) == 0


def test_experts_that_cannot_have_copies_get_none():
    usable = np.zeros((1, 4), bool)
    usable[0, 3] = True
    slots, policy = Slots([0], 4, [4]), DynamicPolicy(np.ones(1), usable, PolicyOptions(max_copies=4))
    policy.observe(np.full((1, 4), 100), 0)
    assert [r.expert for r in policy.decide(slots)] == [(0, 3)]


def test_single_uses_move_nothing():
    slots, policy = Slots([0], 4, [4]), DynamicPolicy(np.ones(1), np.ones((1, 4), bool), PolicyOptions())
    policy.observe(np.ones((1, 4), np.int64), 0)
    assert policy.decide(slots) == []


def test_a_failed_copy_gives_its_slot_back():
    slots = Slots([0], 4, [1])
    slots.begin((0, 1))
    assert not slots.has_free(0)
    slots.abandon((0, 1))
    assert slots.has_free(0) and slots.loading == ()
