"""Products with the transpose of a matrix for each head: what absorbs queries into the key half of a joint
``attn_kv_b``, whose rows are columns here. A head's matrix is read once for 16 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.dequantize_torch import dense
from hybrid.kernels.gpu.expand import part_columns, part_values
from hybrid.kernels.gpu.formats import FORMATS, QuantizedMatrix
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.random_matrix import random_matrix
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def transposed_kernel(
    x,
    codes,
    high,
    scales,
    head,
    table,
    out,
    num_tokens,
    num_rows,
    units,
    DECODE: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """UNITS units of a head's columns for TOKENS tokens."""
    begin = tl.program_id(0) * UNITS
    h, num_heads = tl.program_id(1), tl.num_programs(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    x_row = x + (tl.minimum(token, num_tokens - 1) * num_heads + h)[:, None].to(tl.int64) * num_rows
    out_row = out + (token * num_heads + h)[:, None].to(tl.int64) * units * (32 * PARTS)
    inside = (begin + tl.arange(0, 32 * UNITS) // 32) < units
    for p in tl.static_range(PARTS):
        sums = tl.zeros([TOKENS, 32 * UNITS], tl.float32)
        for start in range(0, num_rows, ROWS):
            row = start + tl.arange(0, ROWS)
            first = (h * num_rows + tl.minimum(row, num_rows - 1)) * units
            w = part_values(
                DECODE, codes, high, scales, head, table, first, units, begin, p, OFFSET, ROWS, UNITS
            )
            values = tl.load(x_row + row[None, :], mask=(row < num_rows)[None, :], other=0.0)
            sums = tl.dot(values, w.to(values.dtype), sums, input_precision=PRECISION)
        there = (token < num_tokens)[:, None] & inside[None, :]
        tl.store(out_row + part_columns(HALF, begin, p, UNITS)[None, :], sums, mask=there)


@triton.jit
def transposed_float_kernel(
    x,
    weight,
    out,
    num_tokens,
    num_rows,
    cols,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The same with a float matrix for each head."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    h, num_heads = tl.program_id(1), tl.num_programs(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    x_row = x + (tl.minimum(token, num_tokens - 1) * num_heads + h)[:, None].to(tl.int64) * num_rows
    sums = tl.zeros([TOKENS, COLS], tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (h * num_rows + row)[:, None].to(tl.int64) * cols + col[None, :]
        w = tl.load(weight + at, mask=(row < num_rows)[:, None] & (col < cols)[None, :], other=0.0)
        values = tl.load(x_row + row[None, :], mask=(row < num_rows)[None, :], other=0.0)
        sums = tl.dot(values, w.to(values.dtype), sums, input_precision=PRECISION)
    at = out + (token * num_heads + h)[:, None].to(tl.int64) * cols + col[None, :]
    tl.store(at, sums, mask=(token < num_tokens)[:, None] & (col < cols)[None, :])


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"TOKENS": 16, "ROWS": 32, "UNITS": 2}


def plan_transposed(target: Target, x: torch.Tensor, weight: QuantizedMatrix | torch.Tensor) -> Plan:
    op, (num_tokens, heads, rows) = "transposed", x.shape
    check_tensor(op, "x", x, (None, None, None), FLOATS, x.device)
    precision = "ieee" if x.dtype is torch.float32 else "tf32"
    config = launch_config({}, x.dtype, target)
    units = config.pop("UNITS")
    args: dict[str, Any] = {"x": x, "num_tokens": num_tokens, "num_rows": rows}
    constants: dict[str, Any] = {"PRECISION": precision, **config}
    blocks = triton.cdiv(num_tokens, config["TOKENS"])
    if isinstance(weight, QuantizedMatrix):
        fmt = weight.format
        check((weight.batch, weight.rows) == (heads, rows), op, f"{heads} matrices of {rows} rows",
              (weight.batch, weight.rows))  # fmt: skip
        check(weight.data.device == x.device, op, f"weights on {x.device}", weight.data.device)
        out = torch.empty(num_tokens, heads, weight.cols, dtype=torch.float32, device=x.device)
        args |= {**weight.planes(), "out": out, "units": weight.units}
        constants |= {"DECODE": fmt.decode, "HALF": fmt.half, "PARTS": fmt.parts, "OFFSET": fmt.offset}
        constants["UNITS"] = units
        grid = (triton.cdiv(weight.units, units), heads, blocks)
        launch = Launch(transposed_kernel, grid, args, constants, max_registers=255)
        return Plan((launch,), (out,))
    check_tensor(op, "weight", weight, (heads, rows, None), FLOATS, x.device)
    cols = weight.shape[2]
    out = torch.empty(num_tokens, heads, cols, dtype=torch.float32, device=x.device)
    args |= {"weight": weight, "out": out, "cols": cols}
    constants["COLS"] = 64
    return Plan(
        (Launch(transposed_float_kernel, (triton.cdiv(cols, 64), heads, blocks), args, constants),), (out,)
    )


def transposed(x: torch.Tensor, weight: QuantizedMatrix | torch.Tensor) -> torch.Tensor:
    """``y[t, h] = x[t, h] W[h]``: ``[T, heads, rows]`` by ``[heads, rows, cols]`` -> float32
    ``[T, heads, cols]``. Weights are rounded to the type of ``x``; rows are summed in ascending order.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_transposed(target_of(x.device), x, weight).run()[0]


def _dense(weight: QuantizedMatrix | torch.Tensor, *, magnitude: bool = False) -> torch.Tensor:
    if isinstance(weight, QuantizedMatrix):
        return dense(weight, magnitude=magnitude).double()
    return weight.double().abs() if magnitude else weight.double()


def transposed_torch(x: torch.Tensor, weight: QuantizedMatrix | torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.einsum("thr,hrc->thc", x.double(), _dense(weight)),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    heads, rows, cols = shape["heads"], shape["rows"], shape["cols"]
    quantized = "format" in shape
    weight = random_matrix(make, shape["format"], heads, rows, cols) if quantized else None
    return {
        "x": make.normal(shape["num_tokens"], heads, rows),
        "weight": make.normal(heads, rows, cols) if weight is None else weight,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # As of `gemm`: weights rounded to the type of x, a product and a sum for each row.
    x, dtype = args["x"].double().abs(), args["x"].dtype
    size = torch.einsum("thr,hrc->thc", x, _dense(args["weight"], magnitude=True))
    rounded = torch.einsum("thr,hrc->thc", x, _dense(args["weight"]).abs())
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = EPS32 * (2 * x.shape[2] + 4) * size + unit_roundoff(dtype) * rounded
    return (error + tiny * (1 + x.sum(-1).max()),)


def _work(shape: Shape) -> Work:
    weights = shape["heads"] * shape["rows"] * shape["cols"]
    fmt = FORMATS.get(shape.get("format", ""))
    n_bytes = 2 * weights if fmt is None else weights // fmt.block_cols * fmt.block_bytes
    return Work(n_bytes, 2 * weights * shape["num_tokens"])


# One format for each number of parts, with offsets and minimums.
_FORMATS = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q3_K", "Q2_K")


def _op(name: str | None) -> Op:
    cols = 40 if name is None else max(FORMATS[name].block_cols, FORMATS[name].unit_cols)
    fmt = {} if name is None else {"format": name}
    return Op(
        name=f"transposed_{name or 'float'}",
        plan=plan_transposed,
        reference=transposed_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(
            {**fmt, "num_tokens": 3, "heads": 2, "rows": 35, "cols": 2 * cols},
            {**fmt, "num_tokens": 17, "heads": 1, "rows": 5, "cols": cols},
        ),
        production_shapes=({**fmt, "num_tokens": 16, "heads": 128, "rows": 128, "cols": 512},),
        work=_work,
    )


OPS = tuple(_op(name) for name in (None, *_FORMATS))
