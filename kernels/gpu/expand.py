"""Weights expanded from their blocks: in registers for products, or once into memory for `torch.matmul`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.dequantize_torch import dense
from hybrid.kernels.gpu.formats import FORMATS, QuantizedMatrix
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.random_matrix import random_matrix
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def part_columns(HALF: tl.constexpr, begin, P: tl.constexpr, UNITS: tl.constexpr):
    """Columns of part ``P`` of units from ``begin``: ``[32 * UNITS]``, in runs of 16."""
    k = tl.arange(0, 32 * UNITS)
    return 16 * HALF(begin + k // 32, P, k // 16 % 2) + k % 16


@triton.jit
def part_values(
    DECODE: tl.constexpr,
    codes,
    high,
    scales,
    head,
    table,
    first,
    units,
    begin,
    P: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Float32 weights ``[ROWS, 32 * UNITS]`` in the order of `part_columns`; where a row has no more units,
    its last one again.

    ``first`` is the first unit, counted through the matrix, of a row that there is.
    """
    unit = begin + tl.arange(0, UNITS)[None, :, None]
    h = tl.arange(0, 2)[None, None, :]
    g = first[:, None, None] + tl.minimum(unit, units - 1)
    code, scale, minimum = DECODE(codes, high, scales, head, table, g, h, P)
    shift = 24 - 8 * tl.arange(0, 4)[None, None, None, None, :]
    q = ((code[:, :, :, :, None] << shift) >> 24) - OFFSET
    values = q.to(tl.float32) * scale[:, :, :, None, None] - minimum[:, :, :, None, None]
    return tl.reshape(values, [ROWS, 32 * UNITS])


@triton.jit
def expand_kernel(
    codes,
    high,
    scales,
    head,
    table,
    out,
    num_rows,
    units,
    DECODE: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * UNITS
    for p in tl.static_range(PARTS):
        values = part_values(
            DECODE,
            codes,
            high,
            scales,
            head,
            table,
            tl.minimum(row, num_rows - 1) * units,
            units,
            begin,
            p,
            OFFSET,
            ROWS,
            UNITS,
        )
        cols = part_columns(HALF, begin, p, UNITS)
        unit = begin + tl.arange(0, 32 * UNITS) // 32
        at = out + row[:, None].to(tl.int64) * units * (32 * PARTS) + cols[None, :]
        tl.store(
            at, values.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & (unit < units)[None, :]
        )


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"ROWS": 8, "UNITS": 16 // shape["parts"]}


def plan_expand(target: Target, weight: QuantizedMatrix, dtype: torch.dtype) -> Plan:
    fmt, num_rows = weight.format, weight.batch * weight.rows
    check(dtype in FLOATS, "expand", f"one of {FLOATS}", dtype)
    config = launch_config({"parts": fmt.parts}, dtype, target)
    out = torch.empty(weight.batch, weight.rows, weight.cols, dtype=dtype, device=weight.data.device)
    launch = Launch(
        expand_kernel,
        (triton.cdiv(num_rows, config["ROWS"]), triton.cdiv(weight.units, config["UNITS"])),
        {**weight.planes(), "out": out, "num_rows": num_rows, "units": weight.units},
        {"DECODE": fmt.decode, "HALF": fmt.half, "PARTS": fmt.parts, "OFFSET": fmt.offset, **config},
    )
    return Plan((launch,), (out,))


def expand(weight: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Weights as ``[batch, rows, cols]`` of a float type: with `torch.matmul`, the product of long prompts.

    Raises:
        ValueError: the type is no float type.
    """
    return plan_expand(target_of(weight.data.device), weight, dtype).run()[0]


def expand_torch(weight: QuantizedMatrix, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (dense(weight).double(),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    weight = random_matrix(make, shape["format"], shape.get("batch", 1), shape["rows"], shape["cols"])
    return {"weight": weight, "dtype": make.dtype}


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # Scale, minimum, product and difference, on either side; then the rounding of the result.
    dtype = args["dtype"]
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = 8 * EPS32 * dense(args["weight"], magnitude=True).double()
    return (error + unit_roundoff(dtype) * refs[0].abs() + tiny,)


def _work(shape: Shape) -> Work:
    weights = shape["rows"] * shape["cols"]
    fmt = FORMATS[shape["format"]]
    return Work(weights // fmt.block_cols * fmt.block_bytes + 2 * weights)


def _op(name: str) -> Op:
    return Op(
        name=f"expand_{name}",
        plan=plan_expand,
        reference=expand_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=({"format": name, "rows": 5, "cols": 256, "batch": 2},),
        production_shapes=({"format": name, "rows": 18432, "cols": 7168},),
        work=_work,
    )


OPS = tuple(_op(name) for name in FORMATS)
