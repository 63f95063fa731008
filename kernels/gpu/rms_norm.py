"""RMS normalisation, with the residual sum before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor, power_of_two
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def rms_norm_kernel(x, weight, residual, out, dim, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    """One program for each row."""
    row = tl.program_id(0).to(tl.int64) * dim
    cols = tl.arange(0, BLOCK)
    inside = cols < dim
    values = tl.load(x + row + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row + cols, mask=inside, other=0.0)
        tl.store(residual + row + cols, values, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / dim + eps)
    w = tl.load(weight + cols, mask=inside, other=0.0)
    tl.store(out + row + cols, (values * scale * w).to(out.dtype.element_ty), mask=inside)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    block = power_of_two(shape["dim"])
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def plan_rms_norm(
    target: Target,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Plan:
    num_rows, dim = x.shape
    check_tensor("rms_norm", "x", x, (None, None), FLOATS, x.device)
    check_tensor("rms_norm", "weight", weight, (dim,), (torch.float32,), x.device)
    if residual is not None:
        check_tensor("rms_norm", "residual", residual, (num_rows, dim), (torch.float32,), x.device)
    check(0 < dim <= 1 << 16, "rms_norm", "rows of 1 to 65536 numbers", dim)
    check(eps >= 0, "rms_norm", "eps of at least 0", eps)
    config = launch_config({"dim": dim}, x.dtype, target)
    out = torch.empty(num_rows, dim, dtype=out_dtype or x.dtype, device=x.device)
    launch = Launch(
        rms_norm_kernel,
        (num_rows,),
        {"x": x, "weight": weight, "residual": residual, "out": out, "dim": dim, "eps": float(eps)},
        {"HAS_RESIDUAL": residual is not None, "BLOCK": config["BLOCK"]},
        config["num_warps"],
    )
    return Plan((launch,), (out,))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``y = x / sqrt(mean(x²) + eps) * weight`` for ``[T, dim]``, in the type of ``x`` or ``out_dtype``.

    ``weight`` is float32 ``[dim]``. With ``residual``, float32 ``[T, dim]``: ``residual += x`` in place
    first, and the sum is what is normalised.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_rms_norm(target_of(x.device), x, weight, eps, residual, out_dtype).run()[0]


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    values = x.double()
    if residual is not None:
        residual += x.to(residual.dtype)
        values = residual.double()
    return (values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double(),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    num_rows, dim = shape["num_tokens"], shape["dim"]
    return {
        "x": make.normal(num_rows, dim),
        "weight": make.normal(dim, dtype=torch.float32),
        "eps": 1e-6,
        "residual": make.normal(num_rows, dim, dtype=torch.float32) if shape["residual"] else None,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # The sum of squares has only positive terms: relative error (dim + 1) eps, halved by the root; then a
    # division and two products, and the rounding of the result.
    relative = EPS32 * ((args["x"].shape[1] + 1) / 2 + 4) + unit_roundoff(args["x"].dtype)
    tiny = torch.finfo(args["x"].dtype).smallest_normal * torch.finfo(args["x"].dtype).eps
    return (relative * refs[0].abs() + tiny, *([0.0] if args["residual"] is not None else []))


def _work(shape: Shape) -> Work:
    numbers = shape["num_tokens"] * shape["dim"]
    return Work(numbers * (4 + (8 if shape["residual"] else 0)), 4 * numbers)


def _op(residual: bool) -> Op:
    return Op(
        name="rms_norm_residual" if residual else "rms_norm",
        plan=plan_rms_norm,
        reference=rms_norm_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=tuple(
            {"num_tokens": t, "dim": d, "residual": residual}
            for t, d in ((1, 1), (3, 96), (2, 512), (2, 1536))
        ),
        production_shapes=tuple(
            {"num_tokens": t, "dim": d, "residual": residual}
            for t, d in ((16, 7168), (2048, 7168), (16, 2048), (16, 1536))
        ),
        work=_work,
        changed=("residual",) if residual else (),
    )


OPS = (_op(False), _op(True))
