"""MoE layers handed over by callbacks, called as a driver calls them: from threads without Python."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import GGMLType, random_blocks

EXPERTS, WIDTH, HIDDEN, K, MAX_TOKENS = 6, 256, 512, 3, 5
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
submit, wait = CALLBACK(cpu.Handoff.submit_address), CALLBACK(cpu.Handoff.wait_address)


class Layer:
    """Weights of a layer, buffers, and the job over them."""

    def __init__(self, pack, number: int, width: int = WIDTH) -> None:
        rng = np.random.default_rng(number)

        def weight(rows: int, cols: int) -> cpu.PackedMatrix:
            raw = random_blocks(GGMLType.Q4_K, EXPERTS * rows, cols, rng).reshape(EXPERTS, rows, -1)
            return pack(GGMLType.Q4_K, raw, cols)

        self.number = number
        self.gate, self.up, self.down = weight(width, HIDDEN), weight(width, HIDDEN), weight(HIDDEN, width)
        self.num_tokens = np.zeros(1, np.int32)
        self.x = np.zeros((MAX_TOKENS, HIDDEN), np.uint16)
        self.ids = np.full((MAX_TOKENS, K), -1, np.int32)
        self.weights = np.zeros((MAX_TOKENS, K), np.float32)
        self.out = np.full((MAX_TOKENS, HIDDEN), np.nan, np.float32)

    def add_to(self, handoff: cpu.Handoff) -> int:
        buffers = (self.num_tokens, self.x, self.ids, self.weights, self.out)
        addresses = [buffer.ctypes.data for buffer in buffers]
        self.job = handoff.add(self.number, self.gate, self.up, self.down, MAX_TOKENS, K, *addresses)
        return self.job

    def fill(self, tokens: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.num_tokens[0] = tokens
        self.x[:tokens] = rng.standard_normal((tokens, HIDDEN)).astype(np.float32).view(np.uint32) >> 16
        for row in range(tokens):
            self.ids[row] = rng.permutation(EXPERTS)[:K]
        self.ids[0, 1] = -1
        self.weights[:tokens] = rng.uniform(0.1, 1, (tokens, K))
        self.out[:] = np.nan

    def expected(self, pool: cpu.ThreadPool) -> np.ndarray:
        """The layer by a plain call."""
        tokens = int(self.num_tokens[0])
        x = np.ascontiguousarray((self.x[:tokens].astype(np.uint32) << 16).view(np.float32))
        out = np.empty((tokens, HIDDEN), np.float32)
        cpu.moe(
            pool, self.gate, self.up, self.down, x.ctypes.data, tokens, self.ids.ctypes.data,
            self.weights.ctypes.data, K, out.ctypes.data,
        )  # fmt: skip
        return out


@pytest.fixture
def handoff(pool):
    return cpu.Handoff(pool)


def test_a_step_of_layers(handoff, pack, pool):
    layers = [Layer(pack, number) for number in range(3)]
    for layer in layers:
        layer.add_to(handoff)
    for step, tokens in enumerate([1, MAX_TOKENS, 2, 0, 3]):
        for layer in layers:
            if tokens:
                layer.fill(tokens, seed=10 * step + layer.number)
            else:
                layer.num_tokens[0] = 0
                layer.out[:] = np.nan
            submit(layer.job)
            wait(layer.job)
            handoff.check()
            if tokens:
                np.testing.assert_array_equal(layer.out[:tokens], layer.expected(pool))
            assert np.isnan(layer.out[tokens:]).all()
    assert handoff.num_done == 15 and handoff.busy_s > 0


def test_two_micro_batches_alternate(handoff, pack, pool):
    """Two streams, each submitting its layer while the other's is computed."""
    halves = [[Layer(pack, 2 * number + half) for number in range(4)] for half in range(2)]
    for layer in (*halves[0], *halves[1]):
        layer.add_to(handoff)
    wrong = []

    def stream(layers: list[Layer], seed: int) -> None:
        rng = np.random.default_rng(seed)
        for step in range(20):
            for layer in layers:
                layer.fill(int(rng.integers(1, MAX_TOKENS + 1)), seed=int(rng.integers(1 << 30)))
                submit(layer.job)
                time.sleep(float(rng.uniform(0, 2e-4)))
                wait(layer.job)
                if not (layer.out[: layer.num_tokens[0]] == layer.expected(cpu.ThreadPool(1))).all():
                    wrong.append((step, layer.number))

    threads = [threading.Thread(target=stream, args=(layers, seed)) for seed, layers in enumerate(halves)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handoff.check()
    assert not wrong


def test_submit_returns_while_the_layer_is_computed(pack, pool):
    handoff, layer = cpu.Handoff(pool), Layer(pack, 0, width=4096)
    layer.add_to(handoff)
    layer.fill(MAX_TOKENS, seed=1)
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        submit(layer.job)
        submitted = time.perf_counter()
        wait(layer.job)
        times.append((submitted - begin, time.perf_counter() - begin))
    handoff.check()
    assert np.median([first for first, _ in times]) < np.median([whole for _, whole in times]) / 3


def test_a_failed_layer_is_named_and_ends_the_handoff(handoff, pack):
    good, bad = Layer(pack, 3), Layer(pack, 7)
    for layer in (good, bad):
        layer.add_to(handoff)
        layer.fill(2, seed=1)
    bad.ids[1, 2] = EXPERTS
    submit(bad.job)
    wait(bad.job)
    with pytest.raises(RuntimeError, match="at layer 7: moe: topk_ids of token 1, slot 2 is 6"):
        handoff.check()
    assert np.isnan(bad.out).all()
    submit(good.job)
    wait(good.job)
    assert np.isnan(good.out).all()
    with pytest.raises(RuntimeError, match="at layer 7"):  # the first failure stays
        handoff.check()


@pytest.mark.parametrize("tokens", [-1, MAX_TOKENS + 1])
def test_a_wrong_number_of_tokens(handoff, pack, tokens):
    layer = Layer(pack, 1)
    layer.add_to(handoff)
    layer.num_tokens[0] = tokens
    submit(layer.job)
    wait(layer.job)
    with pytest.raises(RuntimeError, match=rf"layer 1: num_tokens must be in 0\.\.5, found {tokens}"):
        handoff.check()
    assert np.isnan(layer.out).all()


def test_a_layer_that_takes_too_long(pack):
    slow, next_ = Layer(pack, 4, width=8192), Layer(pack, 5)
    for _ in range(20):  # a thread that wakes late finds the layer finished
        handoff = cpu.Handoff(cpu.ThreadPool(1), limit_s=1e-4)
        for layer in (slow, next_):
            layer.add_to(handoff)
            layer.fill(MAX_TOKENS, seed=2)
        submit(slow.job)
        wait(slow.job)
        try:
            handoff.check()
        except RuntimeError as error:
            assert "layer 4: the CPU has not finished it after 0.0001" in str(error)
            break
    else:
        pytest.fail("the limit was never passed")
    submit(next_.job)  # neither call hangs
    wait(next_.job)
    del handoff  # before the buffers it may still be writing


def test_order_of_calls(handoff, pack):
    layer = Layer(pack, 2, width=4096)
    layer.add_to(handoff)
    wait(layer.job)
    with pytest.raises(RuntimeError, match="layer 2: waited for, but not submitted"):
        handoff.check()
    twice = cpu.Handoff(cpu.ThreadPool(1))
    layer.add_to(twice)
    layer.fill(1, seed=3)
    submit(layer.job)
    submit(layer.job)
    wait(layer.job)
    with pytest.raises(RuntimeError, match="layer 2: submitted again before it was waited for"):
        twice.check()


def test_it_ends_with_jobs_in_the_queue(pack):
    for _ in range(20):
        handoff = cpu.Handoff(cpu.ThreadPool(2))
        layers = [Layer(pack, number) for number in range(2)]
        for layer in layers:
            layer.add_to(handoff)
            layer.fill(1, seed=4)
            submit(layer.job)
        del handoff


def test_bad_arguments(handoff, pack, pool):
    layer = Layer(pack, 1)
    with pytest.raises(ValueError, match=r"limit_s must be above 0, found 0\.0"):
        cpu.Handoff(pool, limit_s=0.0)
    with pytest.raises(ValueError, match="CPU 99999"):
        cpu.Handoff(pool, cpu=99999)
    layer.down = layer.gate
    with pytest.raises(ValueError, match=r"down \[experts, hidden, intermediate\]"):
        layer.add_to(handoff)
