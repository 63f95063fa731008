"""Which GPU a device name means."""

from __future__ import annotations

from functools import cache

import torch

from hybrid import env
from hybrid.backends.cuda_streams import CudaRuntime
from hybrid.backends.streams import Runtime
from hybrid.errors import PlacementError
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
