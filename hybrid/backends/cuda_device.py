"""Which GPU a device name means, and how much of its memory may be used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from hybrid import env
from hybrid.backends.cuda_streams import CudaRuntime
from hybrid.backends.streams import Runtime
from hybrid.errors import CapacityError, PlacementError
from hybrid.kernels.gpu.target import INTERPRETED, target_of

_NEXT = "`hybrid doctor` tells what there is; `--rules all-cpu` runs the model on the CPU"


def open_device(name: str) -> torch.device:
    """The device of ``cuda:N``, or in Triton's interpreter the CPU. ``HYBRID_CUDA_DEVICES`` may give each N
    another GPU, several the same.

    Raises:
        PlacementError: there is none, or kernels cannot run on it.
    """
    if INTERPRETED:
        return torch.device("cpu")
    index = int(name.partition(":")[2])
    mapped = env.get("HYBRID_CUDA_DEVICES")
    if mapped is not None:
        if index >= len(mapped):
            raise PlacementError(f"{name}: HYBRID_CUDA_DEVICES names {len(mapped)} devices; name one more")
        index = mapped[index]
    if not torch.cuda.is_available():
        raise PlacementError(f"{name} cannot be used: {_why_no_gpu()}; {_NEXT}")
    if index >= torch.cuda.device_count():
        raise PlacementError(
            f"{name}: there is no GPU {index}, torch sees {torch.cuda.device_count()}; {_NEXT}"
        )
    device = torch.device("cuda", index)
    try:
        target_of(device)
    except RuntimeError as error:
        raise PlacementError(f"{name} cannot be used: {error}; {_NEXT}") from None
    return device


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one that is"
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU or no driver "
        "(libcuda.so.1) that is new enough; install or update the NVIDIA driver"
    )


@cache
def runtime_of(device: torch.device) -> Runtime | None:
    """Streams of a GPU, the same for all backends on it; ``None`` in the interpreter."""
    return CudaRuntime(str(device)) if device.type == "cuda" else None


def limit_memory(budgets: Mapping[torch.device, int]) -> dict[torch.device, int]:
    """Lets torch take the budget of each GPU less what is taken there otherwise: by this process's context,
    and by other processes. Whatever would exceed it is an out-of-memory error.

    Returns:
        Bytes taken otherwise, on each GPU.

    Raises:
        CapacityError: nothing is left.
    """
    found = {}
    for device, budget in budgets.items():
        found[device] = other_bytes(device)
        _, total = torch.cuda.mem_get_info(device)
        allowed = min(budget, total) - found[device]
        if allowed <= 0:
            raise CapacityError(
                f"{device}: {found[device]} bytes are taken by the CUDA context and other processes, which "
                f"leaves nothing of the {budget} that may be used; end those, or raise --vram"
            )
        torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    return found


def other_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are neither free nor held by this process's torch."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))
