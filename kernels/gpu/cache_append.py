"""Latent rows into the cache: as bf16, f16 or f32 numbers, or as q8_0.

A q8_0 row is ``dim`` int8 codes, and in a separate plane one f16 scale for each 32 of them, so that codes
stay aligned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.launch import FLOATS, Launch, Plan, check, check_tensor, power_of_two
from hybrid.kernels.gpu.op import EPS32, Make, Op, Shape, Work, unit_roundoff
from hybrid.kernels.gpu.target import Target, target_of

Q8_BLOCK = 32


@triton.jit
def round_half_even(x):
    """To the nearest integer for ``|x| < 2^22``: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def cache_append_kernel(
    rows, slots, codes, scales, dim, QUANTIZED: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """One program for each row; a negative slot is skipped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        group = tl.arange(0, GROUPS)
        cols = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = tl.load(rows + token * dim + cols, mask=cols < dim, other=0.0).to(tl.float32)
        at = codes + slot * dim + cols
        if QUANTIZED:
            scale = tl.max(tl.abs(values), axis=1) / 127.0
            # Codes belong to the scale as it is stored, so that its rounding adds no error.
            scale = scale.to(tl.float16).to(tl.float32)
            inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
            code = round_half_even(tl.minimum(tl.maximum(values * inverse[:, None], -127.0), 127.0))
            tl.store(at, code.to(tl.int8), mask=cols < dim)
            tl.store(scales + slot * (dim // WIDTH) + group, scale.to(tl.float16), mask=group * WIDTH < dim)
        else:
            tl.store(at, values.to(codes.dtype.element_ty), mask=cols < dim)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"WIDTH": Q8_BLOCK, "GROUPS": power_of_two(triton.cdiv(shape["dim"], Q8_BLOCK))}


def plan_cache_append(
    target: Target,
    rows: torch.Tensor,
    slots: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> Plan:
    num_tokens, dim = rows.shape
    quantized = scales is not None
    check_tensor("cache_append", "rows", rows, (None, None), FLOATS, rows.device)
    check_tensor("cache_append", "slots", slots, (num_tokens,), (torch.int32,), rows.device)
    kinds = (torch.int8,) if quantized else FLOATS
    check_tensor("cache_append", "codes", codes, (None, dim), kinds, rows.device)
    if scales is not None:
        check(dim % Q8_BLOCK == 0, "cache_append", "q8_0 rows of a multiple of 32 numbers", dim)
        size = (codes.shape[0], dim // Q8_BLOCK)
        check_tensor("cache_append", "scales", scales, size, (torch.float16,), rows.device)
    config = launch_config({"dim": dim}, rows.dtype, target)
    args = {"rows": rows, "slots": slots, "codes": codes, "scales": scales, "dim": dim}
    return Plan((Launch(cache_append_kernel, (num_tokens,), args, {"QUANTIZED": quantized, **config}),), ())


def cache_append(
    rows: torch.Tensor, slots: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None = None
) -> None:
    """Stores ``rows`` ``[T, dim]`` at ``slots`` (int32 ``[T]``; negative: not stored) of a cache.

    Without ``scales``, ``codes`` is a float cache ``[num_slots, dim]``. With them, int8 codes and float16
    ``[num_slots, dim / 32]``: a block's scale is its largest magnitude / 127, rounded to float16 before
    codes are taken; ``code * scale`` is off by half a scale at most, besides what clamping to 127 loses when
    the scale was rounded down (1/16 of a step). Numbers must be finite, and of magnitude below 127 * 65504.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    plan_cache_append(target_of(rows.device), rows, slots, codes, scales).run()


def dequantize_rows(codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Rows of a cache in float64."""
    values = codes.double()
    return values if scales is None else values * scales.double().repeat_interleave(Q8_BLOCK, -1)


def cache_append_torch(
    rows: torch.Tensor, slots: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    kept, at = rows[slots >= 0].float(), slots[slots >= 0].long()
    if scales is None:
        codes[at] = kept.to(codes.dtype)
        return ()
    blocks = kept.unflatten(-1, (-1, Q8_BLOCK))
    scale = (blocks.abs().amax(-1) / 127).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    codes[at] = (blocks * inverse[..., None]).clamp(-127, 127).round().flatten(-2).to(torch.int8)
    scales[at] = scale
    return ()


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    num_tokens, dim, num_slots = shape["num_tokens"], shape["dim"], shape["num_slots"]

    def slots() -> torch.Tensor:
        chosen = torch.randperm(num_slots, generator=make.generator)[:num_tokens]
        chosen[1:2] = -1
        return chosen

    quantized = shape["cache"] == "q8_0"
    kind = torch.int8 if quantized else make.dtype
    return {
        "rows": make.normal(num_tokens, dim)
        * (torch.arange(num_tokens, device=make.device) % 5 > 0)[:, None],
        "slots": make.values((num_tokens,), torch.int32, slots),
        "codes": make.integers(-127, 128, num_slots, dim, dtype=kind),
        "scales": make.normal(num_slots, dim // Q8_BLOCK, dtype=torch.float16) if quantized else None,
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    if args["scales"] is None:
        return (0.0,)
    # A product within an ulp of a half may round to either neighbour; a quotient within one of a tie of
    # float16, too.
    return (1.0, refs[1].double().abs() * (2 * unit_roundoff(torch.float16) + EPS32))


def _op(quantized: bool) -> Op:
    cache = "q8_0" if quantized else "float"
    return Op(
        name=f"cache_append_{cache}",
        plan=plan_cache_append,
        reference=cache_append_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(
            {"num_tokens": 7, "dim": 96, "num_slots": 128, "cache": cache},
            {"num_tokens": 1, "dim": 576, "num_slots": 64, "cache": cache},
        ),
        production_shapes=({"num_tokens": 16, "dim": 576, "num_slots": 32768, "cache": cache},),
        work=lambda s: Work(s["num_tokens"] * s["dim"] * (3 if quantized else 4)),
        changed=("codes", "scales") if quantized else ("codes",),
    )


OPS = (_op(False), _op(True))
