"""Decode steps over devices with streams: the numbers of a device that does everything at once, whatever the
delays, and none of the waits can be left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.backends import streams as stream_sites
from hybrid.backends.fake_streams import FakeOptions
from hybrid.errors import DeviceError
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
STEPS = 5


def sites_of(load: Load, use_graphs: bool) -> dict[str, int]:
    """How often each wait is met in the steps of `notices`."""
    options = FakeOptions()
    Decoding(load(PLACES["two devices"], options, use_graphs=use_graphs), 3).steps(STEPS)
    return dict(options.sites)


def test_all_waits_are_known(load):
    assert set(sites_of(load, True)) == set(sites_of(load, False)) == SITES


def notices(load: Load, use_graphs: bool, reference: torch.Tensor, drop: tuple[str, int | None]) -> bool:
    """Whether steps without a wait fail or give other numbers, with delays of some seed."""
    for seed in range(12):
        options = FakeOptions(seed=seed, max_delay_s=3e-3, drop=drop)
        try:
            model = load(PLACES["two devices"], options, use_graphs=use_graphs)
            if not torch.equal(Decoding(model, 3).steps(STEPS), reference):
                return True
        except DeviceError:
            return True
    return False


@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize("site", sorted(SITES))
def test_no_wait_can_be_left_out(load, monkeypatch, site, use_graphs):
    monkeypatch.setattr(handoff_module, "LIMIT_S", 2.0)
    reference = Decoding(load(PLACES["two devices"]), 3).steps(STEPS)
    assert notices(load, use_graphs, reference, (site, None))
