"""Products of few tokens with a float matrix: bound by memory. Columns are summed in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def gemv_float_kernel(
    x,
    weight,
    ids,
    out,
    num_rows,
    cols,
    slots_per_x,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS rows of the product of one slot."""
    slot = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = weight
    end = cols
    if HAS_IDS:
        matrix = tl.load(ids + slot)
        end = tl.where(matrix < 0, 0, cols)  # a negative id has no columns
        base += matrix.to(tl.int64) * num_rows * cols
    token = (slot // slots_per_x).to(tl.int64)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(0, end, COLS):
        col = begin + tl.arange(0, COLS)
        there = (row < num_rows)[:, None] & (col < cols)[None, :]
        w = tl.load(base + row[:, None].to(tl.int64) * cols + col[None, :], mask=there, other=0.0)
        values = tl.load(x + token * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        sums += w.to(tl.float32) * values[None, :]
    tl.store(out + slot.to(tl.int64) * num_rows + row, tl.sum(sums, axis=1), mask=row < num_rows)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"ROWS": 8, "COLS": 512}


def plan_gemv_float(
    target: Target, x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor | None = None
) -> Plan:
    num_x, cols = x.shape
    check_tensor("gemv_float", "x", x, (None, None), (torch.float32,), x.device)
    check_tensor("gemv_float", "weight", weight, (None, None, cols), FLOATS, x.device)
    num_slots, num_rows = num_x, weight.shape[1]
    if ids is None:
        check(
            weight.shape[0] == 1, "gemv_float", "ids, for a stack of matrices", f"none for {weight.shape[0]}"
        )
    else:
        check_tensor("gemv_float", "ids", ids, (None,), (torch.int32,), x.device)
        num_slots = len(ids)
        check(num_x > 0 and num_slots % num_x == 0, "gemv_float", f"a multiple of {num_x} ids", num_slots)
    config = launch_config({}, weight.dtype, target)
    out = torch.empty(num_slots, num_rows, dtype=torch.float32, device=x.device)
    args = {
        "x": x,
        "weight": weight,
        "ids": ids,
        "out": out,
        "num_rows": num_rows,
        "cols": cols,
        "slots_per_x": num_slots // max(1, num_x),
    }
    grid = (triton.cdiv(num_rows, config["ROWS"]), num_slots)
    constants = {"HAS_IDS": ids is not None, **config}
    return Plan((Launch(gemv_float_kernel, grid, args, constants, num_warps=8),), (out,))


def gemv_float(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x Wᵀ``: float32 ``[T, cols]`` by a stack ``[batch, rows, cols]`` of F32, F16 or BF16.

    ``ids`` as in `gemv.gemv`.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_gemv_float(target_of(x.device), x, weight, ids).run()[0]


def _dot(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    if ids is None:
        return x @ weight[0].T
    products = (weight[ids.clamp(min=0).long()] @ x.repeat_interleave(len(ids) // len(x), 0)[..., None])[
        ..., 0
    ]
    return torch.where((ids >= 0)[:, None], products, 0.0)


def gemv_float_torch(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    return (_dot(x.double(), weight.double(), ids),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    batch, slots = shape.get("batch", 1), shape.get("slots", 0)
    return {
        "x": make.normal(shape["num_tokens"], shape["cols"], dtype=torch.float32),
        "weight": make.normal(batch, shape["rows"], shape["cols"], dtype=shape.get("dtype")),
        "ids": make.integers(-1, batch, slots) if slots else None,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # A product and a sum in each lane for each pass of 512 columns, and 9 sums of lanes.
    terms = _dot(args["x"].double().abs(), args["weight"].double().abs(), args["ids"])
    return (EPS32 * (triton.cdiv(args["x"].shape[1], 512) + 1 + 9) * terms,)


def _work(shape: Shape) -> Work:
    weights = shape["rows"] * shape["cols"] * max(1, shape.get("slots", 1))
    return Work(weights * 2, 2 * weights * max(1, shape["num_tokens"] if "slots" not in shape else 1))


OPS = (
    Op(
        name="gemv_float",
        plan=plan_gemv_float,
        reference=gemv_float_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(
            {"num_tokens": 2, "rows": 9, "cols": 700},
            {"num_tokens": 2, "rows": 4, "cols": 32, "batch": 3, "slots": 4},
        ),
        production_shapes=(
            {"num_tokens": 1, "rows": 18432, "cols": 7168},
            {"num_tokens": 1, "rows": 18432, "cols": 7168, "dtype": torch.float16},
            {"num_tokens": 1, "rows": 256, "cols": 7168, "dtype": torch.float32},
            {"num_tokens": 1, "rows": 2048, "cols": 7168, "batch": 8, "slots": 8},
        ),
        work=_work,
    ),
)
