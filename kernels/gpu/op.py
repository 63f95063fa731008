"""What the registry knows of an operation, and how arguments for it are made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hybrid.kernels.gpu.launch import Plan
from hybrid.kernels.gpu.target import TARGETS

Shape = Mapping[str, Any]
EPS32 = torch.finfo(torch.float32).eps


@dataclass
class Make:
    """Random arguments on a device; on ``meta`` only their shapes and types.

    ``dtype`` is that of activations.
    """

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(shape, generator=self.generator) * scale if self.real else torch.empty(shape)
        return made.to(dtype or self.dtype).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        made = torch.rand(shape, generator=self.generator) if self.real else torch.empty(shape)
        return made.to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        if not self.real:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def values(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What ``fill`` computes on the host; on ``meta`` it is not called."""
        if not self.real:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return fill().to(dtype).reshape(shape).contiguous().to(self.device)

    @property
    def real(self) -> bool:
        return self.device.type != "meta"


@dataclass(frozen=True)
class Work:
    """Bytes of device memory a call must move at least, and operations (a product and a sum are two)."""

    bytes: int
    ops: int = 0


@dataclass(frozen=True)
class Op:
    """An operation: tests, ahead-of-time compilation and benchmarks follow from this row.

    Attributes:
        plan: the launcher without its launch: ``(target, **arguments) -> Plan``.
        reference: plain torch, ``(**arguments) -> results`` in float64 (integers as they are).
        arguments: ``(shape, make) -> arguments`` by name.
        bounds: ``(arguments, references) -> `` largest allowed difference for each result, from arithmetic:
            a number or a tensor of the result's shape.
        changed: arguments written in place: compared too, after the results, and in this order.
        test_shapes: small, with every branch; run in float32 and float16 by the interpreter, in bfloat16 on
        a device.
        production_shapes: what models have; compiled ahead of time and timed.
        any_dtype: whether arguments have a type that models choose; otherwise one type is tested.
        work: least traffic and arithmetic of a shape, the benchmark's roofline.
        interpreted: whether the interpreter's tests have it; those of a format without are made of the same
            device functions as rows with it.
        targets: compute capabilities that it is compiled for ahead of time.
    """

    name: str
    plan: Callable[..., Plan]
    reference: Callable[..., tuple[torch.Tensor, ...]]
    arguments: Callable[[Shape, Make], dict[str, Any]]
    bounds: Callable[[Mapping[str, Any], tuple[torch.Tensor, ...]], tuple[torch.Tensor | float, ...]]
    test_shapes: tuple[Shape, ...]
    production_shapes: tuple[Shape, ...]
    work: Callable[[Shape], Work]
    changed: tuple[str, ...] = ()
    any_dtype: bool = True
    interpreted: bool = True
    targets: tuple[int, ...] = tuple(TARGETS)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def shape_name(shape: Shape) -> str:
    return "-".join(f"{k}={v}" for k, v in shape.items())
