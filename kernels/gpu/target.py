"""GPUs that kernels are compiled for, and what a program may use there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels of this process run in Triton's interpreter; fixed when they are decorated."""


@dataclass(frozen=True)
class Target:
    """A compute capability (``86`` is 8.6).

    Attributes:
        shared_bytes: shared memory one program may use (CUDA C++ Programming Guide, "Technical
            Specifications per Compute Capability").
    """

    capability: int
    shared_bytes: int


TARGETS = {
    t.capability: t
    for t in (
        Target(80, 163 << 10),
        Target(86, 99 << 10),
        Target(89, 99 << 10),
        Target(90, 227 << 10),
        Target(120, 99 << 10),
    )
}


def target_of(device: torch.device) -> Target:
    """The target of a device; the interpreter takes that of sm_86.

    Raises:
        RuntimeError: kernels cannot run on the device in this process.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (known := TARGETS.get(10 * major + minor)) is not None:
            return known
        smaller = [t for c, t in TARGETS.items() if c <= 10 * major + minor]
        if not smaller:
            raise RuntimeError(f"{device}: compute capability {major}.{minor}; kernels need 8.0 or more")
        return min(smaller, key=lambda t: t.shared_bytes)
    if INTERPRETED:
        return TARGETS[86]
    raise RuntimeError(
        f"{device}: Triton kernels need a CUDA device; TRITON_INTERPRET=1, set before the start, "
        f"runs them on the CPU, slowly"
    )
