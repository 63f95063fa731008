"""Dividing a layer's experts between CPU and uploads: against all divisions, and a simulated layer."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest

from hybrid.moe.divide import Division, StreamRates, divide

PCIE_BOUND = StreamRates(cpu_expert_s=2e-4, cpu_token_s=4e-6, upload_s=1e-3, device_token_s=1e-8)
BALANCED = StreamRates(cpu_expert_s=1e-4, cpu_token_s=5e-6, upload_s=3e-4, device_token_s=2e-6)
RATES = {"pcie": PCIE_BOUND, "balanced": BALANCED}


def by_force(counts, rates):
    used = [expert for expert, count in enumerate(counts) if count]
    best = float("inf")
    for size in range(len(used) + 1):
        for some in itertools.combinations(used, size):
            cpu_s = sum(rates.cpu_s(counts[e]) for e in used if e not in some)
            best = min(best, max(cpu_s, rates.device_s([counts[e] for e in some])))
    return best


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("seed", range(12))
def test_no_division_ends_earlier(name, seed):
    rng, rates = np.random.default_rng(seed), RATES[name]
    counts = np.maximum(rng.zipf(1.6, 10).clip(0, 400) - rng.integers(0, 3, 10), 0).tolist()
    found, best = divide(counts, rates), by_force(counts, rates)
    assert found.seconds == pytest.approx(max(found.cpu_s, found.device_s))
    if name == "pcie":
        assert found.seconds == pytest.approx(best)
    else:  # less than one expert takes
        assert best <= found.seconds <= best + max(rates.device_s([max(counts)]), rates.upload_s)


def test_what_is_streamed_has_the_most_tokens():
    counts = [0, 5, 900, 0, 40, 900, 1]
    found = divide(counts, PCIE_BOUND)
    assert found.streamed == (2, 5)
    rest = [count for expert, count in enumerate(counts) if expert not in found.streamed]
    assert found.cpu_s == pytest.approx(sum(map(PCIE_BOUND.cpu_s, rest)))
    assert found.device_s == pytest.approx(2e-3)


@pytest.mark.parametrize("counts", [[], [0, 0], [1, 1, 0, 1]])
def test_few_tokens_stay(counts):
    """A decode step, or nothing: an upload takes longer than reading the expert here."""
    found = divide(counts, PCIE_BOUND)
    assert found.streamed == () and found.device_s == 0
    assert isinstance(found, Division)


def test_a_cpu_without_limits_gets_all_and_a_slow_one_nothing():
    counts = [100] * 8
    assert divide(counts, StreamRates(0, 1e-12, 1.0, 0)).streamed == ()
    assert len(divide(counts, StreamRates(1.0, 1.0, 1e-6, 0)).streamed) == 8


def simulate(counts, found, rates, num_slots, rng):
    """Seconds of a layer: uploads through a ring, each up to a tenth slower than modelled, computed in order;
    the CPU beside them."""

    def noise():
        return 1 + rng.uniform(0, 0.1)

    upload_end = compute_end = 0.0
    slots = [0.0] * num_slots
    heapq.heapify(slots)
    for expert in found.streamed:
        start = max(upload_end, heapq.heappop(slots))
        upload_end = start + rates.upload_s * noise()
        compute_end = max(compute_end, upload_end) + rates.device_token_s * counts[expert] * noise()
        heapq.heappush(slots, compute_end)
    here = (count for expert, count in enumerate(counts) if expert not in found.streamed)
    return max(compute_end, sum(rates.cpu_s(count) * noise() for count in here))


@pytest.mark.parametrize("tokens", [2048, 8192, 16384])
def test_a_layer_reaches_80_percent_of_both_rates_together(tokens):
    """DeepSeek-V3: 256 experts, 8 a token; 25 MB an expert over 25 GB/s, CPU at 50 GB/s and 2 T MAC/s, GPU
    35 T MAC/s. The modelled rate is that of CPU and uploads when both work all the time."""
    rates = StreamRates(25e6 / 50e9, 44e6 / 2e12, 25e6 / 25e9, 44e6 / 35e12)
    rng = np.random.default_rng(tokens)
    popularity = rng.lognormal(0, 0.8, 256)
    for _ in range(10):
        counts = rng.multinomial(tokens * 8, popularity / popularity.sum()).tolist()
        found = divide(counts, rates)
        # Without a border between experts: shift work until both sides end together.
        order = sorted(counts, reverse=True)
        modelled = min(
            max(sum(map(rates.cpu_s, order[n + 1 :])), rates.device_s(order[:n])) for n in range(257)
        )
        seconds = simulate(counts, found, rates, 3, rng)
        alone = sum(map(rates.cpu_s, counts)), rates.device_s(counts)
        assert modelled / seconds > 0.8
        assert seconds < min(alone)
