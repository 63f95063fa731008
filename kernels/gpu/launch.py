"""Launches as data: what an operation starts, made from shapes and types alone.

A launcher checks its arguments and returns a `Plan`. The same plan runs on a device, in the interpreter or,
made from tensors on the ``meta`` device, is compiled ahead of time: tests and benchmarks follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hybrid.kernels.gpu.target import INTERPRETED

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and arguments by name; ``constants`` are compiled in.

    ``max_registers`` of a thread: ptxas's own choice now and then spills a word to run one more program.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        given = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return given if self.max_registers is None else {**given, "maxnreg": self.max_registers}

    def run(self) -> None:
        if 0 in self.grid:
            return
        options = {} if INTERPRETED else self.options()
        self.kernel[self.grid](**self.args, **self.constants, **options)


@dataclass(frozen=True)
class Plan:
    """Launches in order and the tensors they write."""

    launches: tuple[Launch, ...]
    results: tuple[torch.Tensor, ...]
    keep: tuple[torch.Tensor, ...] = field(default=())

    def run(self) -> tuple[torch.Tensor, ...]:
        for launch in self.launches:
            launch.run()
        return self.results


def check(condition: bool, op: str, expected: str, found: object) -> None:
    """Raises ``ValueError`` in the one form all launchers use."""
    if not condition:
        raise ValueError(f"{op}: expected {expected}, found {found}")


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    """Shape (``None`` matches anything), type, device and order of one argument.

    Raises:
        ValueError: something differs, or the type cannot be interpreted.
    """
    fits = tensor.dim() == len(shape) and all(
        e is None or e == n for e, n in zip(shape, tensor.shape, strict=True)
    )
    check(fits, op, f"{name} of shape {shape}", tuple(tensor.shape))
    check(tensor.dtype in dtypes, op, f"{name} of {' or '.join(map(str, dtypes))}", tensor.dtype)
    check(tensor.device == device, op, f"{name} on {device}", tensor.device)
    if contiguous:
        check(tensor.is_contiguous(), op, f"contiguous {name}", f"strides {tensor.stride()}")
    refused = INTERPRETED and tensor.dtype is torch.bfloat16
    check(
        not refused,
        op,
        f"{name} in float32 or float16 under the interpreter, which computes bfloat16 wrongly",
        "bfloat16",
    )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()
