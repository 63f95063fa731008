"""The outputs of a token's experts, weighted and summed in the order in which they were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.launch import Launch, Plan, check_tensor
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def combine_kernel(parts, weights, out, k, dim, BLOCK: tl.constexpr):
    """BLOCK columns of one token."""
    token = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(k):
        part = tl.load(parts + (token * k + i) * dim + col, mask=col < dim, other=0.0)
        total += part * tl.load(weights + token * k + i)
    tl.store(out + token * dim + col, total, mask=col < dim)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"BLOCK": 1024}


def plan_combine(target: Target, parts: torch.Tensor, weights: torch.Tensor) -> Plan:
    num_tokens, k = weights.shape
    check_tensor("combine", "weights", weights, (None, None), (torch.float32,), parts.device)
    check_tensor("combine", "parts", parts, (num_tokens * k, None), (torch.float32,), parts.device)
    dim = parts.shape[1]
    config = launch_config({}, parts.dtype, target)
    out = torch.empty(num_tokens, dim, dtype=torch.float32, device=parts.device)
    args = {"parts": parts, "weights": weights, "out": out, "k": k, "dim": dim}
    grid = (triton.cdiv(dim, config["BLOCK"]), num_tokens)
    return Plan((Launch(combine_kernel, grid, args, config),), (out,))


def combine(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Float32 ``[T * k, dim]`` and ``[T, k]`` to ``[T, dim]``: ``Σ weights[t, i] * parts[t * k + i]``, ``i``
    ascending.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_combine(target_of(parts.device), parts, weights).run()[0]


def combine_torch(parts: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((parts.double().unflatten(0, weights.shape) * weights.double()[..., None]).sum(1),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    num_tokens, k = shape["num_tokens"], shape["k"]
    return {
        "parts": make.normal(num_tokens * k, shape["dim"], dtype=torch.float32),
        "weights": make.normal(num_tokens, k, dtype=torch.float32),
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    (size,) = combine_torch(args["parts"].abs(), args["weights"].abs())
    return (EPS32 * (args["weights"].shape[1] + 1) * size,)


OPS = (
    Op(
        name="combine",
        plan=plan_combine,
        reference=combine_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=({"num_tokens": 3, "k": 3, "dim": 40}, {"num_tokens": 1, "k": 1, "dim": 1030}),
        production_shapes=(
            {"num_tokens": 16, "k": 8, "dim": 7168},
            {"num_tokens": 2048, "k": 8, "dim": 7168},
        ),
        work=lambda s: Work(4 * s["num_tokens"] * s["dim"] * (s["k"] + 1)),
        any_dtype=False,
    ),
)
