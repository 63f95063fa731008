"""Prompts whose experts are streamed to a device: the same numbers, every wait needed, decoding between."""

from __future__ import annotations

import time

import pytest
import torch

from hybrid.backends import fake_streams
from hybrid.backends.fake import FakeBackend
from hybrid.backends.fake_streams import FakeOptions
from hybrid.engine.torch_threads import single_torch_thread
from hybrid.errors import DeviceError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models.loader import load_model
from hybrid.moe.copier import CopySource
from hybrid.moe.divide import StreamRates
from hybrid.moe.streaming import (
    EXPERT_IS_THERE,
    PINNED_IS_READ,
    RING_BYTES,
    SLOT_IS_COMPUTED,
    ring_slots,
)
from hybrid.placement.planner import plan
from hybrid.synth import Formats, resolve_shape, synthesise

EXPERTS, TOKENS = 16, 48
F32 = GGMLType.F32
RULES = {
    "version": 1,
    "rules": [
        {"select": {"role": "routed_experts"}, "place": {"device": "cpu"}},
        {"select": {"name": "*"}, "place": {"device": "fakegpu:0"}},
    ],
}
ALL = StreamRates(1.0, 1.0, 1e-9, 0.0)
NONE = StreamRates(0.0, 0.0, 1.0, 0.0)
SOME = StreamRates(0.0, 1.0, 12.0, 0.0)  # about half of the uses


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("stream") / "tiny.gguf"
    shape = resolve_shape("tiny", num_experts=EXPERTS, moe_intermediate_size=64)
    synthesise(found, shape, Formats(F32, F32, F32, F32, F32, F32))
    return found


@pytest.fixture
def options(monkeypatch):
    found = FakeOptions(seed=1, max_delay_s=5e-4)
    monkeypatch.setattr(fake_streams, "FakeOptions", lambda: found)
    return found


def batch(block, start, count):
    positions = torch.arange(start, start + count, dtype=torch.int32)
    return AttentionBatch(
        positions, positions + block * BLOCK_SIZE, torch.tensor([0, count]).int(),
        torch.tensor([start + count]).int(), torch.tensor([[block]]).int(),
    )  # fmt: skip


IDS = torch.randint(0, 1024, (TOKENS,), generator=torch.Generator().manual_seed(5)).int()


def next_layer(steps):
    while next(steps) == "attention":
        pass


class Run:
    """Logits of a prompt, computed once or layer by layer with decode steps of another text in between."""

    def __init__(self, path, rates, *, rules=RULES, between=False, cancel=False, **more):
        self.uploads: list[int] = []
        with GGUFFile.open(path) as file:
            model = load_model(file, plan=plan(file, rules), max_model_len=256, num_threads=2,
                               kv_format="f32", stream_rates=rates, **more)  # fmt: skip
        try:
            model.allocate_cache(2)
            self.rings, self.decoded = list(model._rings), []
            for ring in self.rings:
                self.watch(ring)
            with single_torch_thread(), torch.inference_mode():
                if cancel:
                    steps = model.forward_layers(IDS, batch(0, 0, TOKENS))
                    next_layer(steps), next_layer(steps)
                    steps.close()
                steps = model.forward_layers(IDS, batch(0, 0, TOKENS))
                while True:
                    try:
                        next_layer(steps)
                    except StopIteration as done:
                        self.logits = model.compute_logits(done.value)
                        break
                    if between:
                        at = len(self.decoded)
                        self.decoded.append(model.decode(IDS[at : at + 1], batch(1, at, 1)).clone())
        finally:
            model.close()

    def watch(self, ring):
        upload = ring.upload

        def watched(source, expert):
            self.uploads.append(expert)
            return upload(source, expert)

        ring.upload = watched


def assert_close(found, expected):
    # Float sums of at most 256 products in another order, through three layers.
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.fixture(scope="module")
def expected(path):
    return Run(path, NONE, between=True)


@pytest.mark.parametrize("rates", [ALL, SOME, NONE], ids=["all", "some", "none"])
def test_streaming_changes_no_numbers(path, expected, options, rates):
    found = Run(path, rates)
    assert_close(found.logits, expected.logits)
    num_slots = [len(ring.slots) for ring in found.rings]
    if rates is NONE:
        assert found.uploads == []
    elif rates is ALL:
        assert len(found.uploads) > 3 * num_slots[0]  # the ring goes round
    else:
        assert 0 < len(found.uploads) < 2 * EXPERTS


def test_the_same_division_gives_the_same_bits(path, options):
    first, second = (Run(path, SOME) for _ in range(2))
    assert 0 < len(first.uploads) < 2 * EXPERTS and first.uploads == second.uploads
    assert torch.equal(first.logits, second.logits)


def test_decode_steps_run_between_layers(path, expected, options):
    found = Run(path, SOME, between=True)
    assert_close(found.logits, expected.logits)
    assert len(found.decoded) == 3
    assert_close(torch.cat(found.decoded), torch.cat(expected.decoded))


def test_a_prompt_given_up_between_layers_leaves_nothing(path, expected, options):
    assert_close(Run(path, ALL, cancel=True).logits, expected.logits)


def test_with_copies_as_well(path, expected, options):
    cache = {"device": "fakegpu:0", "bytes": f"{8 * 3 * 64 * 256 * 4}B", "policy": "dynamic"}
    found = Run(path, SOME, rules={**RULES, "experts": {"cache": cache}})
    assert_close(found.logits, expected.logits)
    assert found.uploads


@pytest.mark.parametrize("site", [PINNED_IS_READ, SLOT_IS_COMPUTED, EXPERT_IS_THERE])
def test_every_wait_is_needed(path, expected, options, monkeypatch, site):
    # What the wait is for is late: the layer's arithmetic, or the uploads.
    name = "moe" if site is SLOT_IS_COMPUTED else "unpack"
    operation = getattr(FakeBackend, name)

    def late(backend, *args):
        time.sleep(3e-3)
        return operation(backend, *args)

    monkeypatch.setattr(FakeBackend, name, late)
    monkeypatch.setattr("hybrid.moe.streaming.MAX_SLOTS", 3)
    assert_close(Run(path, ALL).logits, expected.logits)
    options.drop = site, None
    with pytest.raises((AssertionError, DeviceError)):
        assert_close(Run(path, ALL).logits, expected.logits)


def test_an_expert_that_cannot_be_read_is_an_error(path, options, monkeypatch):
    def broken(*_, **__):
        raise OSError("broken")

    monkeypatch.setattr(CopySource, "read", broken)
    with pytest.raises(DeviceError, match="streaming experts to fakegpu:0 failed: OSError"):
        Run(path, ALL)


def test_an_error_of_the_cpu_ends_the_uploads(path, options, monkeypatch):
    from hybrid.backends.cpu import CpuBackend

    def broken(*_):
        raise ValueError("broken")

    monkeypatch.setattr(CpuBackend, "moe", broken)
    with pytest.raises(ValueError, match="broken"):
        Run(path, SOME)


@pytest.mark.parametrize("mib, rings, slots", [(1, 1, 8), (24.8, 1, 3), (24.8, 2, 0), (29, 1, 0), (10, 2, 4)])
def test_rings_keep_to_their_memory(mib, rings, slots):
    assert ring_slots(int(mib * 2**20), rings) == slots
    assert rings * slots * 3 * mib * 2**20 <= RING_BYTES


def test_experts_too_large_for_a_ring_are_computed_here(path, expected, options, monkeypatch, caplog):
    monkeypatch.setattr("hybrid.moe.streaming.RING_BYTES", 1 << 20)
    found = Run(path, ALL)
    assert found.uploads == [] and found.rings == []
    assert_close(found.logits, expected.logits)
    assert "experts of layer 1 are not streamed to fakegpu:0" in caplog.text
