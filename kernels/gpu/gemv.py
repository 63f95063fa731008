"""Products of few tokens with a quantised matrix, read from its blocks as they are: bound by memory.

Weights meet activations as int8 words (`dp4a`): see `quantize_activations`. A program owns whole rows and
takes units in ascending order, so a token's result is the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.decode import dot4
from hybrid.kernels.gpu.dequantize_torch import dense
from hybrid.kernels.gpu.formats import FORMATS, QuantizedMatrix
from hybrid.kernels.gpu.launch import Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work
from hybrid.kernels.gpu.quantize_activations import ACTIVATION_BLOCK, SUM_BLOCK, quantize_activations_torch
from hybrid.kernels.gpu.random_matrix import random_matrix
from hybrid.kernels.gpu.target import TARGETS, Target, target_of

MAX_TOKENS = 4
"""Tokens a program takes at once; more take more programs, which read the weights again."""


@triton.jit
def gemv_kernel(
    x,
    x_scales,
    x_sums,
    codes,
    high,
    scales,
    head,
    table,
    ids,
    out,
    num_tokens,
    num_rows,
    units,
    num_x_scales,
    slots_per_x,
    DECODE: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_IDS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """ROWS rows of the products of TOKENS tokens. With ids a token takes the matrix its id names."""
    first = tl.program_id(1) * TOKENS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix = 0
    if HAS_IDS:
        matrix = tl.load(ids + first)
    h = tl.arange(0, 2)[None, None, :]
    i = tl.arange(0, 4)[None, None, None, :]
    num_halves = units * 2 * PARTS
    sums = (tl.zeros([ROWS, UNITS, 2], tl.float32),) * TOKENS
    # A negative id has no units.
    end = units
    if HAS_IDS:
        end = tl.where(matrix < 0, 0, units)
    first_unit = ((matrix * num_rows + tl.minimum(row, num_rows - 1)) * units)[:, None, None]
    for begin in range(0, end, UNITS):
        unit = begin + tl.arange(0, UNITS)[None, :, None]
        # Who has no unit takes the last one, whose activations count as zeros.
        there = unit < units
        unit = tl.minimum(unit, units - 1)
        g = first_unit + unit
        # Parts are a constant apart, which pointers of 64 bits let loads have as their offset.
        first_half = HALF(unit, 0, h)
        for p in tl.static_range(PARTS):
            code, scale, minimum = DECODE(codes, high, scales, head, table, g, h, p)
            step = HALF(0, p, h) - HALF(0, 0, h)
            more = ()
            for t in tl.static_range(TOKENS):
                token = tl.minimum(first + t, num_tokens - 1) // slots_per_x
                at = token * num_halves + first_half
                words = tl.load(x + 4 * at[:, :, :, None] + 4 * step[:, :, :, None] + i)
                dots = dot4(code, tl.broadcast_to(words, code.shape), tl.zeros(code.shape, tl.int32))
                dot = tl.sum(dots, axis=3)
                if OFFSET != 0 or HAS_MINIMUM:
                    total = tl.load(x_sums + at + step).to(tl.int32)
                if OFFSET != 0:
                    dot -= OFFSET * total
                term = dot.to(tl.float32) * scale
                if HAS_MINIMUM:
                    term -= total.to(tl.float32) * minimum
                block = token * num_x_scales + ((unit * PARTS) >> 3)
                x_scale = tl.load(x_scales + block, mask=there, other=0.0)
                more = more + (sums[t] + term * x_scale,)  # type: ignore[assignment] # noqa: RUF005
            sums = more
    for t in tl.static_range(TOKENS):
        result = tl.sum(tl.sum(sums[t], axis=2), axis=1)
        at = out + (first + t).to(tl.int64) * num_rows + row
        # Compared as a block: the interpreter cannot combine a scalar condition with one.
        there = (row * 0 + first + t) < num_tokens
        tl.store(at, result, mask=(row < num_rows) & there)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    """8 warps for 256 halves, one a thread: see `decode`. Rows and units never depend on tokens."""
    most = MAX_TOKENS if shape["parts"] < 8 else 2  # four would need more registers than there are
    tokens = 1 if shape["ids"] else min(most, 1 << (shape["num_tokens"] - 1).bit_length())
    units = 16 if shape["parts"] < 8 else 8  # of 256 columns: more would be idle in a row of 2048
    return {"TOKENS": tokens, "ROWS": 128 // units, "UNITS": units}


def plan_gemv(
    target: Target,
    x_codes: torch.Tensor,
    x_scales: torch.Tensor,
    x_sums: torch.Tensor,
    weight: QuantizedMatrix,
    ids: torch.Tensor | None = None,
) -> Plan:
    fmt, device = weight.format, x_codes.device
    num_x = x_codes.shape[0]
    num_scales = triton.cdiv(weight.cols, ACTIVATION_BLOCK)
    check_tensor("gemv", "x_codes", x_codes, (num_x, weight.cols), (torch.int8,), device)
    check_tensor("gemv", "x_scales", x_scales, (num_x, num_scales), (torch.float32,), device)
    check_tensor("gemv", "x_sums", x_sums, (num_x, weight.cols // SUM_BLOCK), (torch.int16,), device)
    check(weight.data.device == device, "gemv", f"weights on {device}", weight.data.device)
    num_tokens = num_x
    if ids is None:
        check(weight.batch == 1, "gemv", "ids, for a stack of matrices", f"none for {weight.batch}")
    else:
        check_tensor("gemv", "ids", ids, (None,), (torch.int32,), device)
        num_tokens = len(ids)
        check(num_x > 0 and num_tokens % num_x == 0, "gemv", f"a multiple of {num_x} ids", num_tokens)
    shape = {"num_tokens": max(1, num_tokens), "ids": ids is not None, "parts": fmt.parts}
    config = launch_config(shape, torch.int8, target)
    out = torch.empty(num_tokens, weight.rows, dtype=torch.float32, device=device)
    launch = Launch(
        gemv_kernel,
        (triton.cdiv(weight.rows, config["ROWS"]), triton.cdiv(num_tokens, config["TOKENS"])),
        {
            "x": x_codes.view(torch.int32),
            "x_scales": x_scales,
            "x_sums": x_sums,
            **weight.planes(),
            "ids": ids,
            "out": out,
            "num_tokens": num_tokens,
            "num_rows": weight.rows,
            "units": weight.units,
            "num_x_scales": num_scales,
            "slots_per_x": num_tokens // max(1, num_x),
        },
        {
            "DECODE": fmt.decode,
            "HALF": fmt.half,
            "PARTS": fmt.parts,
            "OFFSET": fmt.offset,
            "HAS_MINIMUM": fmt.has_minimum,
            "HAS_IDS": ids is not None,
            **config,
        },
        num_warps=8,
        # Three programs at once where they need no more; two of those with four parts.
        max_registers=None if config["TOKENS"] == 1 else 80 if fmt.parts < 4 else 128,
    )
    return Plan((launch,), (out,))


def gemv(
    x_codes: torch.Tensor,
    x_scales: torch.Tensor,
    x_sums: torch.Tensor,
    weight: QuantizedMatrix,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = x Wᵀ``: float32 ``[T, rows]`` from what `quantize_activations` returns.

    Without ``ids`` the matrix is one and every token meets it. With them (int32 ``[slots]``, a multiple of
    T: slot ``s`` takes token ``s * T // slots``) each slot meets the matrix of the stack that its id names,
    and the result is ``[slots, rows]``; a negative id gives zeros. The columns of a row are summed in an
    order that depends on the format and the number of columns alone.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_gemv(target_of(x_codes.device), x_codes, x_scales, x_sums, weight, ids).run()[0]


def _dot(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    if ids is None:
        return x @ weights[0].double().T
    taken = weights[ids.clamp(min=0).long()].double()
    products = (taken @ x.repeat_interleave(len(ids) // len(x), 0)[..., None])[..., 0]
    return torch.where((ids >= 0)[:, None], products, 0.0)


def gemv_torch(
    x_codes: torch.Tensor,
    x_scales: torch.Tensor,
    x_sums: torch.Tensor,
    weight: QuantizedMatrix,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    x = x_codes.double() * x_scales.double().repeat_interleave(ACTIVATION_BLOCK, 1)[:, : weight.cols]
    return (_dot(x, dense(weight), ids),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    slots, batch = shape.get("slots", 0), shape.get("batch", 1)
    x = make.normal(shape["num_tokens"], shape["cols"], dtype=torch.float32)
    if make.real:
        codes, scales, sums = (v.to(make.device) for v in quantize_activations_torch(x.cpu()))
    else:
        codes = x.to(torch.int8)
        sums = torch.empty(len(x), shape["cols"] // SUM_BLOCK, dtype=torch.int16, device=make.device)
        scales = torch.empty(len(x), triton.cdiv(shape["cols"], ACTIVATION_BLOCK), device=make.device)
    return {
        "x_codes": codes,
        "x_scales": scales,
        "x_sums": sums,
        "weight": random_matrix(make, shape["format"], batch, shape["rows"], shape["cols"]),
        "ids": make.integers(-1, batch, slots) if slots else None,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # Integers are exact. A term takes 5 roundings (scale, minimum, activation's scale, product), a sum in a
    # lane two for each part of each pass, and the 128 lanes of a row 7 more.
    weight, x = args["weight"], args["x_codes"]
    passes = triton.cdiv(weight.units, 16 if weight.format.parts < 8 else 8)
    size = (
        x.double().abs() * args["x_scales"].double().repeat_interleave(ACTIVATION_BLOCK, 1)[:, : weight.cols]
    )
    terms = _dot(size, dense(weight, magnitude=True), args["ids"])
    return (EPS32 * (5 + 5 + weight.format.parts * passes) * terms,)


def _work(shape: Shape) -> Work:
    fmt = FORMATS[shape["format"]]
    weights = shape["rows"] * shape["cols"] * max(1, shape.get("slots", 1))
    tokens = 1 if "slots" in shape else shape["num_tokens"]
    moved = weights // fmt.block_cols * fmt.block_bytes + tokens * (shape["cols"] + 4 * shape["rows"])
    return Work(moved, 2 * weights * tokens)


# The code with ids is that without and a branch: two formats are compiled with them.
_STACKS = ("Q8_0", "Q4_K")
_STACK_TESTS: dict[str, tuple[Shape, ...]] = {
    "Q4_K": (
        {"format": "Q4_K", "num_tokens": 2, "rows": 9, "cols": 256, "batch": 3, "slots": 4},
        {"format": "Q4_K", "num_tokens": 5, "rows": 9, "cols": 256},
    ),
    "IQ1_S": ({"format": "IQ1_S", "num_tokens": 2, "rows": 17, "cols": 256, "batch": 3, "slots": 4},),
}


# Of decoding with words alone, with scales in fields, with a table, with code books and with trits.
_EVERY_TARGET = ("Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_S")


def _op(fmt: str) -> Op:
    cols = max(FORMATS[fmt].block_cols, FORMATS[fmt].unit_cols)
    passes = 9 if FORMATS[fmt].parts == 8 else 20  # units: one pass, and part of a second
    return Op(
        name=f"gemv_{fmt}",
        plan=plan_gemv,
        reference=gemv_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(
            {"format": fmt, "num_tokens": 2, "rows": 3, "cols": max(cols, passes * FORMATS[fmt].unit_cols)},
            *_STACK_TESTS.get(fmt, ()),
        ),
        production_shapes=(
            {"format": fmt, "num_tokens": 1, "rows": 18432, "cols": 7168},
            {"format": fmt, "num_tokens": 16, "rows": 10944, "cols": 2048},
            *(
                {"format": f, "num_tokens": 1, "rows": 2048, "cols": 7168, "batch": 8, "slots": 8}
                for f in _STACKS
                if f == fmt
            ),
        ),
        work=_work,
        any_dtype=False,
        targets=tuple(TARGETS) if fmt in _EVERY_TARGET else (86, 90),
    )


OPS = tuple(_op(fmt) for fmt in FORMATS)
