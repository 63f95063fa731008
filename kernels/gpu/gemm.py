"""Products of many tokens with quantised weights: tiles expand in registers and feed tensor cores.

One kernel serves a matrix and a stack of experts: there, token slots are sorted by expert and each program
takes a block of slots of one expert. The tile does not depend on the number of tokens, nor does the order in
which columns are summed, so a token's result is the same bits in any batch.
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
from hybrid.kernels.gpu.target import TARGETS, Target, target_of

TOKENS = 64
"""Slots of a program."""


@triton.jit
def gemm_kernel(
    x,
    codes,
    high,
    scales,
    head,
    table,
    slots,
    experts,
    out,
    num_slots,
    num_rows,
    units,
    slots_per_x,
    DECODE: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """TOKENS slots by ROWS rows."""
    place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = place
    expert = 0
    end = units
    if GROUPED:
        expert = tl.load(experts + tl.program_id(1))
        end = tl.where(expert < 0, 0, units)
        slot = tl.load(slots + place)
    cols = units * (32 * PARTS)
    first = (expert * num_rows + tl.minimum(row, num_rows - 1)) * units
    x_row = x + (tl.minimum(slot, num_slots - 1) // slots_per_x)[:, None].to(tl.int64) * cols
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    for begin in range(0, end, UNITS):
        inside = (begin + tl.arange(0, 32 * UNITS) // 32) < units
        for p in tl.static_range(PARTS):
            w = part_values(
                DECODE, codes, high, scales, head, table, first, units, begin, p, OFFSET, ROWS, UNITS
            )
            values = tl.load(
                x_row + part_columns(HALF, begin, p, UNITS)[None, :], mask=inside[None, :], other=0.0
            )
            w = tl.trans(w.to(x.dtype.element_ty))
            sums = tl.dot(values, w, sums, input_precision=PRECISION)
    at = out + slot[:, None].to(tl.int64) * num_rows + row[None, :]
    there = (slot < num_slots)[:, None] & (row < num_rows)[None, :]
    if GROUPED:
        # Slots of an absent expert are zeros; blocks beyond the last slot have no slots.
        sums = tl.where(expert < 0, 0.0, sums)
    tl.store(at, sums.to(out.dtype.element_ty), mask=there)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    # Two blocks of trits at once spill two words.
    return {"TOKENS": TOKENS, "ROWS": 64, "UNITS": 2 if shape["parts"] < 8 else 1}


def align_slots(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots sorted by expert, each expert's padded to blocks of `TOKENS`: what `grouped_gemm` takes.

    ``topk_ids`` is int32 of any shape, -1 for "not here". Returns int32 ``slots`` (a slot's index in the
    flat ids; their number where there is none) and the expert of each block, -1 for slots of no expert and
    for unused blocks. Sizes depend on shapes alone and nothing is read back, so that it runs within a
    captured graph.
    """
    ids = topk_ids.flatten().long() + 1
    order = torch.argsort(ids, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device).scatter_add_(
        0, ids, torch.ones_like(ids)
    )
    blocks = (counts + TOKENS - 1) // TOKENS
    num_blocks = triton.cdiv(len(ids), TOKENS) + min(num_experts + 1, len(ids))
    block_ends = blocks.cumsum(0)
    block = torch.arange(num_blocks, device=ids.device)
    owner = torch.searchsorted(block_ends, block, right=True)
    experts = torch.where(owner <= num_experts, owner - 1, -1)
    starts = (block_ends - blocks) * TOKENS
    rank = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[ids[order]]
    slots = torch.full((num_blocks * TOKENS,), len(ids), dtype=torch.int32, device=ids.device)
    slots[starts[ids[order]] + rank] = order.int()
    return slots, experts.int()


def plan_gemm(
    target: Target,
    x: torch.Tensor,
    weight: QuantizedMatrix,
    topk_ids: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    aligned: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Plan:
    """``aligned``: what `align_slots` gave for these ids, where several products share them."""
    fmt, grouped = weight.format, topk_ids is not None
    check_tensor("gemm", "x", x, (None, weight.cols), FLOATS, x.device)
    check(weight.data.device == x.device, "gemm", f"weights on {x.device}", weight.data.device)
    num_slots, slots, experts = x.shape[0], None, None
    num_blocks = triton.cdiv(num_slots, TOKENS)
    if topk_ids is None:
        check(weight.batch == 1, "gemm", "topk_ids, for a stack of matrices", f"none for {weight.batch}")
    else:
        check_tensor("gemm", "topk_ids", topk_ids, (x.shape[0], None), (torch.int32,), x.device)
        num_slots = topk_ids.numel()
        slots, experts = aligned or align_slots(topk_ids, weight.batch)
        num_blocks = len(experts)
    config = launch_config({"parts": fmt.parts}, x.dtype, target)
    out = torch.empty(num_slots, weight.rows, dtype=out_dtype or x.dtype, device=x.device)
    launch = Launch(
        gemm_kernel,
        (triton.cdiv(weight.rows, config["ROWS"]), num_blocks),
        {
            "x": x,
            **weight.planes(),
            "slots": slots,
            "experts": experts,
            "out": out,
            "num_slots": num_slots,
            "num_rows": weight.rows,
            "units": weight.units,
            "slots_per_x": num_slots // max(1, x.shape[0]),
        },
        {
            "DECODE": fmt.decode,
            "HALF": fmt.half,
            "PARTS": fmt.parts,
            "OFFSET": fmt.offset,
            "GROUPED": grouped,
            "PRECISION": "ieee" if x.dtype is torch.float32 else "tf32",
            **config,
        },
        num_warps=4,
        num_stages=2,
        max_registers=255,
    )
    return Plan((launch,), (out,))


def gemm(x: torch.Tensor, weight: QuantizedMatrix, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """``y = x Wᵀ``: ``[T, rows]`` in the type of ``x`` or ``out_dtype``; weights are rounded to the type of
    ``x``.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_gemm(target_of(x.device), x, weight, None, out_dtype).run()[0]


def grouped_gemm(
    x: torch.Tensor, weight: QuantizedMatrix, topk_ids: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Each token by the experts it chose: ``x`` ``[T, cols]``, ``topk_ids`` int32 ``[T, k]`` -> ``[T * k,
    rows]``.

    An id of -1 gives zeros. For the down projection give each slot its own row: ``topk_ids`` of shape ``[T *
    k, 1]``.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    return plan_gemm(target_of(x.device), x, weight, topk_ids, out_dtype).run()[0]


def _dot(x: torch.Tensor, weights: torch.Tensor, topk_ids: torch.Tensor | None) -> torch.Tensor:
    if topk_ids is None:
        return x @ weights[0].T
    ids, rows = topk_ids.flatten(), x.repeat_interleave(topk_ids.shape[1], 0)
    out = torch.zeros(len(ids), weights.shape[1], dtype=x.dtype)
    for expert in ids[ids >= 0].unique():
        out[ids == expert] = rows[ids == expert] @ weights[expert].T
    return out


def gemm_torch(
    x: torch.Tensor, weight: QuantizedMatrix, topk_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    return (_dot(x.double(), dense(weight).double(), topk_ids),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    batch, k = shape.get("batch", 1), shape.get("k", 0)
    return {
        "x": make.normal(shape["num_tokens"], shape["cols"]),
        "weight": random_matrix(make, shape["format"], batch, shape["rows"], shape["cols"]),
        "topk_ids": make.integers(-1, batch, shape["num_tokens"], k) if k else None,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # Weights are computed in float32 and rounded to the type of x; tensor cores sum in float32, rounding or
    # truncating.
    x, weight = args["x"].double().abs(), args["weight"]
    size = _dot(x, dense(weight, magnitude=True).double(), args["topk_ids"])
    rounded = _dot(x, dense(weight).double().abs(), args["topk_ids"])
    dtype = args["x"].dtype
    # Float16 has a smallest number: below it, rounding is off by half of that.
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    steps = 2 * weight.cols + 4
    error = EPS32 * steps * size + unit_roundoff(dtype) * (rounded + refs[0].abs())
    return (error + tiny * (1 + x.sum(-1).max()),)


def _work(shape: Shape) -> Work:
    fmt, slots = FORMATS[shape["format"]], shape["num_tokens"] * max(1, shape.get("k", 1))
    weights = shape["rows"] * shape["cols"] * shape.get("batch", 1)
    moved = weights // fmt.block_cols * fmt.block_bytes + 2 * slots * (shape["cols"] + shape["rows"])
    return Work(moved, 2 * shape["rows"] * shape["cols"] * slots)


# `expand` has every format's decoding: of products, one of each kind.
_INTERPRETED = ("Q8_0", "Q4_K", "Q6_K", "IQ1_S", "IQ3_S")


def _op(name: str) -> Op:
    cols = max(FORMATS[name].block_cols, FORMATS[name].unit_cols)
    grouped: tuple[Shape, ...] = ()
    if name in ("Q4_K", "Q6_K"):
        grouped = ({"format": name, "num_tokens": 2048, "rows": 2048, "cols": 7168, "batch": 256, "k": 8},)
    return Op(
        name=f"gemm_{name}",
        plan=plan_gemm,
        reference=gemm_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(
            {"format": name, "num_tokens": 66 if name == "Q4_K" else 3, "rows": 5, "cols": 3 * cols},
            {"format": name, "num_tokens": 3, "rows": 33, "cols": cols, "batch": 4, "k": 2},
        ),
        production_shapes=({"format": name, "num_tokens": 2048, "rows": 18432, "cols": 7168}, *grouped),
        work=_work,
        interpreted=name in _INTERPRETED,
        targets=tuple(TARGETS) if name in _INTERPRETED else (86,),
    )


OPS = tuple(_op(name) for name in FORMATS)
