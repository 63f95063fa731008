"""``silu(gate) * up``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check_tensor
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def swiglu_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    # exp(-g) overflows to infinity for large negative g, and the quotient is then the right zero.
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"BLOCK": 1024}


def plan_swiglu(target: Target, gate: torch.Tensor, up: torch.Tensor) -> Plan:
    check_tensor("swiglu", "gate", gate, (None, None), FLOATS, gate.device)
    check_tensor("swiglu", "up", up, tuple(gate.shape), (gate.dtype,), gate.device)
    config = launch_config({}, gate.dtype, target)
    out = torch.empty_like(gate)
    args = {"gate": gate, "up": up, "out": out, "size": gate.numel()}
    return Plan((Launch(swiglu_kernel, (triton.cdiv(gate.numel(), config["BLOCK"]),), args, config),), (out,))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, all ``[T, intermediate]`` of one type.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_swiglu(target_of(gate.device), gate, up).run()[0]


def swiglu_torch(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.nn.functional.silu(gate.double()) * up.double(),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    size = shape["num_tokens"], shape["dim"]
    return {"gate": make.normal(*size, scale=4.0), "up": make.normal(*size)}


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # exp2 of a rounded product: |g| log2(e) eps relative, 2 ulp of the instruction; sum, quotient, product.
    relative = EPS32 * (args["gate"].double().abs() * 1.5 + 6) + unit_roundoff(args["gate"].dtype)
    tiny = torch.finfo(args["gate"].dtype).smallest_normal * torch.finfo(args["gate"].dtype).eps
    return (relative * refs[0].abs() + tiny,)


OPS = (
    Op(
        name="swiglu",
        plan=plan_swiglu,
        reference=swiglu_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=({"num_tokens": 3, "dim": 700}, {"num_tokens": 1, "dim": 16}),
        production_shapes=({"num_tokens": 16, "dim": 2048}, {"num_tokens": 2048, "dim": 18432}),
        work=lambda s: Work(6 * s["num_tokens"] * s["dim"]),
    ),
)
