"""The CUDA side of streams as far as it goes without a driver."""

from __future__ import annotations

import ctypes

import pytest
import torch

from hybrid.backends import cuda_streams
from hybrid.backends.fake_streams import FakeRuntime
from hybrid.backends.streams import Runtime
from hybrid.errors import DeviceError


def test_it_has_all_of_the_interface():
    assert not cuda_streams.CudaRuntime.__abstractmethods__
    assert not FakeRuntime.__abstractmethods__
    assert Runtime.__abstractmethods__


def test_without_a_driver(monkeypatch):
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    cuda_streams._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DeviceError, match=r"the CUDA driver cannot be loaded: libcuda\.so\.1"):
        cuda_streams._launch_host_function(0, 0, 0)
    cuda_streams._driver.cache_clear()


def test_a_refused_callback_says_why(monkeypatch):
    class Driver:
        def cuLaunchHostFunc(self, *_: int) -> int:
            return 900

        def cuGetErrorString(self, code: int, text: ctypes._Pointer) -> None:
            text._obj.value = b"operation not permitted when stream is capturing"

    monkeypatch.setattr(cuda_streams, "_driver", Driver)
    with pytest.raises(DeviceError, match=r"cuLaunchHostFunc failed: operation not permitted .* \(900\)"):
        cuda_streams._launch_host_function(0, 0, 0)


def test_memory_that_cannot_be_pinned_is_ordinary_with_a_warning(monkeypatch, caplog):
    empty = torch.empty

    def refusing(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("cudaErrorMemoryAllocation")
        return empty(*args, **kwargs)

    runtime = object.__new__(cuda_streams.CudaRuntime)
    runtime.name = "cuda:0"
    monkeypatch.setattr(torch, "empty", refusing)
    assert runtime.pinned((2, 3), torch.int32).shape == (2, 3)
    assert "cuda:0: the system refuses to pin memory of [2, 3]" in caplog.text
