"""Device names to backends. Backends are imported when they are first asked for."""

from __future__ import annotations

import re

from hybrid.backends.base import Backend
from hybrid.errors import PlacementError

_FAKE = re.compile(r"^fake:\d+$")
_CUDA = re.compile(r"^cuda:\d+$")
_FAKE_GPU = re.compile(r"^fakegpu:\d+$")


def create_backend(device: str, num_threads: int | None = None) -> Backend:
    """The backend of ``cpu``, ``cuda:N``, ``fake:N`` or ``fakegpu:N``, which works asynchronously.

    Raises:
        PlacementError: there is no such device, or it cannot be used; the message says what to do.
    """
    if device == "cpu":
        from hybrid.backends.cpu import CpuBackend

        return CpuBackend(num_threads)
    if _FAKE.match(device):
        from hybrid.backends.fake import FakeBackend

        return FakeBackend(device)
    if _CUDA.match(device):
        from hybrid.backends.cuda import CudaBackend

        return CudaBackend(device)
    if _FAKE_GPU.match(device):
        from hybrid.backends.fake_gpu import FakeGpuBackend

        return FakeGpuBackend(device)
    raise PlacementError(f"device {device!r} is not available: this build runs on cpu, cuda:N and fake:N")
