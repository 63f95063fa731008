"""Decode steps over devices with streams: the numbers of a device that does everything at once, whatever the
delays, and none of the waits can be left out."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.backends import streams as stream_sites
from hybrid.backends.fake import FakeBackend
from hybrid.backends.fake_gpu import FakeGpuBackend
from hybrid.backends.fake_streams import FakeEvent, FakeOptions
from hybrid.errors import DeviceError
from hybrid.layers.linear import Linear
from hybrid.layers.mlp import MLP
from hybrid.models import hybrid_step
from hybrid.models import weights as weights_module
from hybrid.models.loader import Model
from hybrid.moe import handoff as handoff_module

spec = importlib.util.spec_from_file_location("streams_of_tests", Path(__file__).with_name("streams.py"))
assert spec is not None and spec.loader is not None
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
Decoding, creator, experts_in_ram = helpers.Decoding, helpers.creator, helpers.experts_in_ram

VARIANT = "v3"
PLACES = {
    "one device": ("fakegpu:0",),
    "two devices": ("fakegpu:0", "fakegpu:1"),
}
Load = Callable[..., Model]


@pytest.fixture
def load(make_reference, open_model, monkeypatch) -> Load:
    """``load(devices, options, **keywords)``: the small model with its experts in RAM."""

    def load_(devices: tuple[str, ...], options: FakeOptions | None = None, **keywords: Any) -> Model:
        monkeypatch.setattr(weights_module, "create_backend", creator(options))
        path = make_reference(VARIANT).path
        return open_model(path, experts_in_ram(*devices), num_threads=2, **keywords).model

    return load_


@pytest.fixture
def expected(load) -> Callable[[int, int], torch.Tensor]:
    """Logits of steps on a device that does everything at once."""

    def logits(num_seqs: int, count: int) -> torch.Tensor:
        return Decoding(load(("fake:0",)), num_seqs).steps(count)

    return logits


@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize("devices", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("num_seqs", [1, 3])
def test_the_numbers_of_a_device_without_streams(load, expected, devices, num_seqs, use_graphs):
    reference = expected(num_seqs, 5)
    for seed in range(3):
        options = FakeOptions(seed=seed, max_delay_s=1e-3, serial_calls=seed == 1)
        found = Decoding(load(devices, options, use_graphs=use_graphs), num_seqs).steps(5)
        # Lanes multiply other numbers of rows at once than a whole batch; torch sums in another order.
        torch.testing.assert_close(found, reference, rtol=0, atol=0 if num_seqs == 1 else 1e-4)


def test_delays_and_graphs_change_no_bits(load):
    runs = [
        Decoding(load(PLACES["two devices"], options, use_graphs=use_graphs), 3).steps(6)
        for use_graphs, options in [
            (False, FakeOptions()),
            (True, FakeOptions()),
            (True, FakeOptions(seed=7, max_delay_s=2e-3)),
            (False, FakeOptions(seed=8, max_delay_s=2e-3, serial_calls=True)),
        ]
    ]
    for run in runs[1:]:
        assert torch.equal(run, runs[0])


def test_python_queues_two_steps_of_a_size(load, monkeypatch):
    """One that loads kernels, and the one that is captured."""
    queued: list[int] = []
    enqueue = hybrid_step.HybridStep._enqueue
    monkeypatch.setattr(
        hybrid_step.HybridStep, "_enqueue", lambda self: (queued.append(len(self._lanes)), enqueue(self))
    )
    model = load(PLACES["one device"])
    Decoding(model, 1).steps(5)
    Decoding(model, 2).steps(5)
    assert queued == [1, 1, 2, 2]


# Every wait and call of a step. One that is added appears in `FakeOptions.sites`, and must come here.
SITES = {
    hybrid_step.EARLIER_WORK,
    hybrid_step.LANE_STARTS,
    hybrid_step.LANE_ENDS,
    hybrid_step.RESULT_IS_THERE,
    hybrid_step.STEP_IS_DONE,
    handoff_module.SUBMIT,
    handoff_module.WAIT,
    stream_sites.HANDOVER,
    stream_sites.HANDOVER_READ,
}
STEPS = 4


def count_sites(load: Load, use_graphs: bool) -> Counter[str]:
    """How often each wait is met in one step of Python's: the last, or the captured one."""
    options = FakeOptions()
    decoding = Decoding(load(PLACES["two devices"], options, use_graphs=use_graphs), 3)
    decoding.step()
    options.sites.clear()
    decoding.step()
    return options.sites


def test_all_waits_are_known(load):
    assert set(count_sites(load, True)) == set(count_sites(load, False)) == SITES


def is_noticed(load: Load, use_graphs: bool, reference: torch.Tensor, drop: tuple[str, int | None]) -> bool:
    """Whether steps without a wait fail or give other numbers than the reference, when one stream is slow.

    The first step is whole, so that the n-th wait of a site is the n-th of the step that is captured.
    """
    for slow in (f"{device} {stream}" for stream in ("main", "b", "a") for device in PLACES["two devices"]):
        options = FakeOptions()
        decoding = Decoding(load(PLACES["two devices"], options, use_graphs=use_graphs), 3)
        first = decoding.step()
        options.sites.clear()
        options.slow, options.drop = slow, drop
        try:
            if not torch.equal(torch.stack([first, *decoding.steps(STEPS - 1)]), reference):
                return True
        except DeviceError:
            return True
    return False


# Not in the default tier: without the wait for experts their buffers may go while C++ reads them, and the
# process, not the test, ends.
@pytest.mark.slow
@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize("site", sorted(SITES))
def test_no_wait_can_be_left_out(load, monkeypatch, site, use_graphs):
    """Neither all waits of a site nor any single one of them."""
    monkeypatch.setattr(handoff_module, "LIMIT_S", 2.0)
    reference = Decoding(load(PLACES["two devices"]), 3).steps(STEPS)
    assert is_noticed(load, use_graphs, reference, (site, None))
    # Two tensors cross between devices together, so that the waits for one are there for the other.
    alone = () if site in (stream_sites.HANDOVER, stream_sites.HANDOVER_READ) else range(99)
    for number in alone[: count_sites(load, use_graphs)[site]]:
        assert is_noticed(load, use_graphs, reference, (site, number)), f"wait {number} of the step"


def test_the_waits_of_a_single_device(load):
    sites = {site for site in SITES if "device" not in site}
    options = FakeOptions()
    Decoding(load(PLACES["one device"], options), 3).steps(2)
    assert set(options.sites) == sites


def test_a_layer_that_fails_is_named(load, monkeypatch):
    model = load(PLACES["one device"])
    Decoding(model, 1).steps(3)
    route = FakeGpuBackend.route

    def wrong(self, *args):
        ids, weights = route(self, *args)
        ids.fill_(99)
        return ids, weights

    monkeypatch.setattr(FakeGpuBackend, "route", wrong)
    with pytest.raises(DeviceError, match=r"at layer 1: moe: topk_ids of token 0, slot 0 is 99"):
        Decoding(model, 1).step()


def test_a_layer_that_takes_too_long_is_named(load, monkeypatch):
    monkeypatch.setattr(handoff_module, "LIMIT_S", 1e-7)
    model = load(PLACES["one device"], FakeOptions(seed=1))
    decoding = Decoding(model, 2)
    begin = time.perf_counter()
    with pytest.raises(DeviceError, match=r"at layer [12]: the CPU has not finished it after"):
        for _ in range(200):  # a thread that wakes late finds the layer finished
            decoding.step()
    with pytest.raises(DeviceError, match=r"at layer [12]"):  # and it stays so
        decoding.step()
    assert time.perf_counter() - begin < 60


def test_a_device_that_fails_ends_the_step(load, monkeypatch):
    model = load(PLACES["two devices"], FakeOptions(max_delay_s=1e-3))
    Decoding(model, 3).steps(3)

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("broken kernel")

    monkeypatch.setattr(FakeBackend, "mlp", broken)
    with pytest.raises(
        DeviceError, match=r"fakegpu:0: mlp on stream '[ab]' failed: ValueError\('broken kernel'\)"
    ):
        Decoding(model, 3).step()


# What Python runs at three moments of a step, and at which call of it the step is interrupted.
MOMENTS = {
    "between submit and wait": (MLP, "__call__", 2),  # the shared expert, behind a dense layer of each lane
    "before the capture ends": (Linear, "__call__", 0),  # the head
    "while the host waits": (FakeEvent, "synchronize", 0),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("use_graphs", [True, False])
def test_an_interrupted_step_is_made_again(load, monkeypatch, moment, use_graphs):
    reference = Decoding(load(PLACES["two devices"]), 3).steps(STEPS)
    options = FakeOptions(seed=3, max_delay_s=2e-3)
    decoding = Decoding(load(PLACES["two devices"], options, use_graphs=use_graphs), 3)
    found = [decoding.step()]
    class_, name, number = MOMENTS[moment]
    original, calls = getattr(class_, name), itertools.count()

    def interrupted(*args: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(class_, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoding.step()
    found += [decoding.step() for _ in range(STEPS - 1)]
    assert torch.equal(torch.stack(found), reference)


def test_nothing_is_left_behind_by_thousands_of_steps(load):
    model = load(PLACES["two devices"])
    decoding = Decoding(model, 3, wrap=60)
    decoding.steps(20)

    def counts() -> tuple[int, ...]:
        gc.collect()
        decoder = model._hybrid
        assert decoder is not None and decoder.handoff is not None
        devices = [
            (runtime.num_tensors, len(runtime._streams), len(runtime._pinned)) for runtime in decoder.runtimes
        ]
        tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
        return (*itertools.chain(*devices), tensors, threading.active_count())

    before, done = counts(), model._hybrid.handoff.native.num_done
    for _ in range(2000):
        decoding.step()
    assert counts() == before
    # Two layers of experts for each of two lanes.
    assert model._hybrid.handoff.native.num_done - done == 2000 * 2 * 2


def test_closing_ends_all_threads(load):
    before = threading.active_count()
    model = load(PLACES["two devices"], FakeOptions(seed=2, max_delay_s=2e-3))
    Decoding(model, 3).steps(3)
    assert threading.active_count() > before
    model.close()
    assert threading.active_count() == before
