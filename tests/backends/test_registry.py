"""Device names, and what a backend of the CPU is made of."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hybrid.kernels import cpu

from hybrid.backends.cpu import CpuBackend
from hybrid.backends.fake import FakeBackend, round_to_q8
from hybrid.backends.registry import create_backend
from hybrid.errors import ConfigError, PlacementError
from hybrid.gguf import GGMLType


def test_devices_by_name():
    assert isinstance(create_backend("cpu", 1), CpuBackend)
    fake = create_backend("fake:12")
    assert isinstance(fake, FakeBackend)
    assert fake.name == "fake:12"


@pytest.mark.parametrize("name", ["cuda", "cuda:x", "fake", "fake:x", "cpu:0", ""])
def test_unknown_device(name):
    with pytest.raises(PlacementError, match="not available") as caught:
        create_backend(name)
    assert repr(name) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there():
    with pytest.raises(
        PlacementError, match=r"cuda:0 cannot be used: torch .*; `hybrid doctor` tells what there is"
    ):
        create_backend("cuda:0")


def test_backends_are_imported_when_asked_for():
    code = (
        "import sys, hybrid.backends.registry as r; r.create_backend('fake:0');"
        "sys.exit('hybrid.backends.cpu' in sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_any_number_of_threads(num_threads):
    backend = CpuBackend(num_threads)
    assert backend.num_threads == backend.pool.num_threads == num_threads
    backend.close()


def test_threads_default_to_physical_cores():
    assert CpuBackend().num_threads == len(cpu.physical_cores())


@pytest.mark.parametrize("num_threads", [0, -1])
def test_no_threads(num_threads):
    with pytest.raises(ConfigError, match="num_threads"):
        CpuBackend(num_threads)


def test_description_names_the_isa():
    assert CpuBackend(1).describe() == f"cpu ({cpu.current_isa()})"
    assert FakeBackend("fake:3").describe() == "fake:3"


@pytest.mark.parametrize("device", ["cpu", "fake:0"])
def test_formats(device):
    backend = create_backend(device, 1)
    assert backend.can_multiply(GGMLType.Q4_K)
    assert not backend.can_multiply(GGMLType.IQ4_K)


def test_rounding_of_activations():
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    rounded = round_to_q8(x)
    for part in (slice(0, 256), slice(256, 300)):
        step = x[:, part].abs().amax(dim=1, keepdim=True) / 127
        assert ((rounded[:, part] - x[:, part]).abs() <= step / 2 * (1 + 1e-5)).all()
        assert (rounded[:, part].abs().amax(1) - x[:, part].abs().amax(1)).abs().max() < 1e-6
    assert not torch.equal(rounded, x)
