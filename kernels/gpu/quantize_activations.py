"""Activations to int8 with one float32 scale for 256 columns, as the CPU kernels round them.

Products with quantised weights of a decoded token use these: integers are exact, and a token's result does
not depend on where its weights lie more than by the order of a few float sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.cache_append import round_half_even
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import Op, Shape, Work
from hybrid.kernels.gpu.target import Target, target_of

ACTIVATION_BLOCK = 256
SUM_BLOCK = 16


@triton.jit
def quantize_activations_kernel(
    x, codes, scales, sums, cols, num_scales, BLOCK: tl.constexpr, SUMMED: tl.constexpr
):
    """One program for each block of a row."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < cols
    values = tl.load(x + row * cols + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values))
    # NaN and infinity make the scale NaN; a maximum alone may pass over NaN.
    scale = tl.div_rn(largest, 127.0) + tl.sum(values * 0.0)
    # The inverse of anything below 2^-120 would overflow; such blocks count as zero.
    big = (largest >= 7.52316384526264e-37) & (scale == scale)
    inverse = tl.where(big, tl.div_rn(127.0, tl.where(big, largest, 1.0)), 0.0)
    code = round_half_even(tl.where(big, values, 0.0) * inverse)
    tl.store(codes + row * cols + at, code.to(tl.int8), mask=inside)
    group = tl.arange(0, BLOCK // SUMMED)
    totals = tl.sum(tl.reshape(code, [BLOCK // SUMMED, SUMMED]), axis=1)
    first = block * (BLOCK // SUMMED) + group
    tl.store(sums + row * (cols // SUMMED) + first, totals.to(tl.int16), mask=first < cols // SUMMED)
    tl.store(scales + row * num_scales + block, scale)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"BLOCK": ACTIVATION_BLOCK, "SUMMED": SUM_BLOCK}


def plan_quantize_activations(target: Target, x: torch.Tensor) -> Plan:
    check_tensor("quantize_activations", "x", x, (None, None), FLOATS, x.device)
    num_rows, cols = x.shape
    check(cols % SUM_BLOCK == 0, "quantize_activations", "a multiple of 16 columns", cols)
    num_scales = triton.cdiv(cols, ACTIVATION_BLOCK)
    codes = torch.empty(num_rows, cols, dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, num_scales, dtype=torch.float32, device=x.device)
    sums = torch.empty(num_rows, cols // SUM_BLOCK, dtype=torch.int16, device=x.device)
    args = {"x": x, "codes": codes, "scales": scales, "sums": sums, "cols": cols, "num_scales": num_scales}
    config = launch_config({}, x.dtype, target)
    launch = Launch(quantize_activations_kernel, (num_rows, num_scales), args, config, num_warps=1)
    return Plan((launch,), (codes, scales, sums))


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[T, cols]`` to int8 codes ``[T, cols]``, float32 scales ``[T, ceil(cols / 256)]``, and sums of codes.

    Sums are int16 ``[T, cols / 16]``, of 16 columns each: what minimums and offsets of weights are
    multiplied by. A scale is the block's largest magnitude / 127. A block with NaN or infinity gets the
    scale NaN.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    codes, scales, sums = plan_quantize_activations(target_of(x.device), x).run()
    return codes, scales, sums


def quantize_activations_torch(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codes, scales = [], []
    for block in x.float().split(ACTIVATION_BLOCK, dim=-1):
        largest = block.abs().amax(-1, keepdim=True)
        scale = torch.where(block.isfinite().all(-1, keepdim=True), largest / 127, torch.nan)
        big = (largest >= 2.0**-120) & ~scale.isnan()
        inverse = torch.where(big, 127 / torch.where(big, largest, 1.0), 0.0)
        codes.append((torch.where(big, block, 0.0) * inverse).round().to(torch.int8))
        scales.append(scale)
    joined = torch.cat(codes, -1)
    return joined, torch.cat(scales, -1), joined.unflatten(-1, (-1, SUM_BLOCK)).sum(-1).to(torch.int16)


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    return (0.0, 0.0, 0.0)


OPS = (
    Op(
        name="quantize_activations",
        plan=plan_quantize_activations,
        reference=quantize_activations_torch,
        arguments=lambda shape, make: {"x": make.normal(shape["num_tokens"], shape["cols"], scale=3.0)},
        bounds=_bounds,
        test_shapes=({"num_tokens": 2, "cols": 704}, {"num_tokens": 1, "cols": 32}),
        production_shapes=({"num_tokens": 16, "cols": 7168}, {"num_tokens": 1, "cols": 1408}),
        work=lambda s: Work(3 * s["num_tokens"] * s["cols"]),
    ),
)
