"""Products of many tokens with float matrices, and with stacks of them by expert: the tiles of `gemm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.gemm import TOKENS, align_slots
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def gemm_float_kernel(
    x,
    weight,
    slots,
    experts,
    out,
    num_slots,
    num_rows,
    cols,
    slots_per_x,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """TOKENS slots by ROWS rows."""
    place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = place
    expert = 0
    end = cols
    base = weight
    if GROUPED:
        expert = tl.load(experts + tl.program_id(1))
        end = tl.where(expert < 0, 0, cols)
        slot = tl.load(slots + place)
        base += tl.maximum(expert, 0).to(tl.int64) * num_rows * cols
    token = tl.minimum(slot, num_slots - 1) // slots_per_x
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    for begin in range(0, end, COLS):
        col = begin + tl.arange(0, COLS)
        there = (row < num_rows)[:, None] & (col < cols)[None, :]
        w = tl.load(base + row[:, None].to(tl.int64) * cols + col[None, :], mask=there, other=0.0)
        at = token[:, None].to(tl.int64) * cols + col[None, :]
        values = tl.load(x + at, mask=(col < cols)[None, :], other=0.0)
        sums = tl.dot(values, tl.trans(w.to(values.dtype)), sums, input_precision=PRECISION)
    at = out + slot[:, None].to(tl.int64) * num_rows + row[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(slot < num_slots)[:, None] & (row < num_rows)[None, :])


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"TOKENS": TOKENS, "ROWS": 64, "COLS": 32}


def plan_gemm_float(
    target: Target,
    x: torch.Tensor,
    weight: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Plan:
    op, (num_x, cols) = "gemm_float", x.shape
    check_tensor(op, "x", x, (None, None), FLOATS, x.device)
    check_tensor(op, "weight", weight, (None, None, cols), FLOATS, x.device)
    num_slots, num_rows, slots, experts = num_x, weight.shape[1], None, None
    num_blocks = triton.cdiv(num_slots, TOKENS)
    if topk_ids is None:
        check(weight.shape[0] == 1, op, "topk_ids, for a stack of matrices", f"none for {weight.shape[0]}")
    else:
        check_tensor(op, "topk_ids", topk_ids, (num_x, None), (torch.int32,), x.device)
        num_slots = topk_ids.numel()
        slots, experts = align_slots(topk_ids, weight.shape[0])
        num_blocks = len(experts)
    config = launch_config({}, x.dtype, target)
    out = torch.empty(num_slots, num_rows, dtype=out_dtype or x.dtype, device=x.device)
    args = {
        "x": x, "weight": weight, "slots": slots, "experts": experts, "out": out, "num_slots": num_slots,
        "num_rows": num_rows, "cols": cols, "slots_per_x": num_slots // max(1, num_x),
    }  # fmt: skip
    precision = "ieee" if x.dtype is torch.float32 else "tf32"
    constants = {"GROUPED": topk_ids is not None, "PRECISION": precision, **config}
    grid = (triton.cdiv(num_rows, config["ROWS"]), num_blocks)
    return Plan((Launch(gemm_float_kernel, grid, args, constants, num_warps=4, num_stages=2),), (out,))


def gemm_float(
    x: torch.Tensor,
    weight: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``y = x Wᵀ`` by a stack ``[batch, rows, cols]`` of F32, F16 or BF16, rounded to the type of ``x``.

    Without ``topk_ids`` the stack is one matrix and the result ``[T, rows]``; with them it is that of
    `gemm.grouped_gemm`, ``[T * k, rows]``. The type is that of ``x``, or ``out_dtype``.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_gemm_float(target_of(x.device), x, weight, topk_ids, out_dtype).run()[0]


def _dot(x: torch.Tensor, weight: torch.Tensor, topk_ids: torch.Tensor | None) -> torch.Tensor:
    if topk_ids is None:
        return x @ weight[0].T
    ids, rows = topk_ids.flatten(), x.repeat_interleave(topk_ids.shape[1], 0)
    products = (weight[ids.clamp(min=0).long()] @ rows[..., None])[..., 0]
    return torch.where((ids >= 0)[:, None], products, 0.0)


def gemm_float_torch(
    x: torch.Tensor, weight: torch.Tensor, topk_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    return (_dot(x.double(), weight.double(), topk_ids),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    batch, k = shape.get("batch", 1), shape.get("k", 0)
    return {
        "x": make.normal(shape["num_tokens"], shape["cols"], dtype=shape.get("x")),
        "weight": make.normal(batch, shape["rows"], shape["cols"], dtype=shape.get("weight")),
        "topk_ids": make.integers(-1, batch, shape["num_tokens"], k) if k else None,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # Weights are rounded to the type of x; a product and a sum for each column; the result's rounding.
    x, weight = args["x"].double().abs(), args["weight"].double().abs()
    size, dtype = _dot(x, weight, args["topk_ids"]), args["x"].dtype
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (EPS32 * 2 * weight.shape[2] + unit_roundoff(dtype)) * size + unit_roundoff(dtype) * refs[0].abs()
    return (error + tiny * (1 + x.sum(-1).max()),)


def _work(shape: Shape) -> Work:
    slots = shape["num_tokens"] * max(1, shape.get("k", 1))
    weights = shape["rows"] * shape["cols"] * shape.get("batch", 1)
    return Work(2 * weights + 2 * slots * (shape["cols"] + shape["rows"]),
                2 * shape["rows"] * shape["cols"] * slots)  # fmt: skip


OPS = (
    Op(
        name="gemm_float",
        plan=plan_gemm_float,
        reference=gemm_float_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(
            {"num_tokens": 66, "rows": 5, "cols": 70},
            {"num_tokens": 3, "rows": 66, "cols": 32, "batch": 4, "k": 2},
            {"num_tokens": 2, "rows": 3, "cols": 40, "weight": torch.float16},
        ),
        production_shapes=(
            {"num_tokens": 2048, "rows": 2048, "cols": 7168},
            {"num_tokens": 2048, "rows": 256, "cols": 7168, "x": torch.float32, "weight": torch.float32},
            {"num_tokens": 2048, "rows": 2048, "cols": 7168, "batch": 8, "k": 8},
        ),
        work=_work,
    ),
)
