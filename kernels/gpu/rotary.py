"""Rotary position embedding of interleaved pairs, by a table that holds YaRN's frequencies and magnitude."""

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
def rotary_kernel(
    x, positions, table, num_heads, token_stride, head_stride, half, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """One program rotates HEADS heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (pair < half)
    position = tl.load(positions + token).to(tl.int64)
    turn = table + position * half * 2 + pair * 2
    cos = tl.load(turn, mask=pair < half, other=1.0)
    sin = tl.load(turn + 1, mask=pair < half, other=0.0)
    at = x + token * token_stride + head * head_stride + pair * 2
    even = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (even * cos - odd * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(at + 1, (even * sin + odd * cos).to(x.dtype.element_ty), mask=inside)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    half = power_of_two(shape["rope_dim"] // 2)
    return {"HALF": half, "HEADS": min(power_of_two(shape["num_heads"]), max(1, 2048 // half))}


def plan_rotary(
    target: Target, x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, rope_dim: int
) -> Plan:
    num_tokens, num_heads, head_dim = x.shape
    check_tensor("rotary", "x", x, (None, None, None), FLOATS, x.device, contiguous=False)
    check(x.stride(2) == 1, "rotary", "x with contiguous heads", f"strides {x.stride()}")
    check_tensor("rotary", "positions", positions, (num_tokens,), (torch.int32,), x.device)
    check_tensor("rotary", "table", table, (None, rope_dim // 2, 2), (torch.float32,), x.device)
    check(
        rope_dim % 2 == 0 and 0 < rope_dim <= head_dim,
        "rotary",
        f"an even rope_dim of 2 to {head_dim}",
        rope_dim,
    )
    config = launch_config({"rope_dim": rope_dim, "num_heads": num_heads}, x.dtype, target)
    rotated = x[:, :, head_dim - rope_dim :]
    launch = Launch(
        rotary_kernel,
        (num_tokens, triton.cdiv(num_heads, config["HEADS"])),
        {
            "x": rotated,
            "positions": positions,
            "table": table,
            "num_heads": num_heads,
            "token_stride": x.stride(0),
            "head_stride": x.stride(1),
            "half": rope_dim // 2,
        },
        config,
    )
    return Plan((launch,), ())


def rotary(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, rope_dim: int) -> None:
    """Rotates the last ``rope_dim`` numbers of each head of ``x`` ``[T, heads, head_dim]`` in place.

    Pairs are interleaved (2i, 2i + 1). ``table`` is float32 ``[max_positions, rope_dim / 2, 2]`` of (cos,
    sin); ``positions`` int32 ``[T]``, each below ``max_positions``.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    plan_rotary(target_of(x.device), x, positions, table, rope_dim).run()


def rotary_torch(
    x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, rope_dim: int
) -> tuple[torch.Tensor, ...]:
    part = x[:, :, x.shape[2] - rope_dim :]
    pairs = part.double().unflatten(-1, (-1, 2))
    cos, sin = table[positions.long()].double()[:, None].unbind(-1)
    even, odd = pairs.unbind(-1)
    part.copy_(torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2))
    return ()


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    half, max_positions = shape["rope_dim"] // 2, shape["max_positions"]

    def turns() -> torch.Tensor:
        angles = torch.arange(max_positions)[:, None] * 10000.0 ** -(torch.arange(half) / half)
        return torch.stack((angles.cos(), angles.sin()), -1) * 1.2

    return {
        "x": make.normal(shape["num_tokens"], shape["num_heads"], shape["head_dim"]),
        "positions": make.integers(0, max_positions, shape["num_tokens"]),
        "table": make.values((max_positions, half, 2), torch.float32, turns),
        "rope_dim": shape["rope_dim"],
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    # Two products and a sum in float32, then both sides round the result to the type of x.
    largest = float(args["x"].abs().max()) * 1.5
    return (largest * (3 * EPS32 + 2 * unit_roundoff(args["x"].dtype)) * 2,)


OPS = (
    Op(
        name="rotary",
        plan=plan_rotary,
        reference=rotary_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=(
            {"num_tokens": 3, "num_heads": 5, "head_dim": 24, "rope_dim": 8, "max_positions": 40},
            {"num_tokens": 2, "num_heads": 1, "head_dim": 64, "rope_dim": 64, "max_positions": 9},
            {"num_tokens": 1, "num_heads": 3, "head_dim": 20, "rope_dim": 20, "max_positions": 9},
        ),
        production_shapes=(
            {"num_tokens": 16, "num_heads": 128, "head_dim": 192, "rope_dim": 64, "max_positions": 163840},
            {"num_tokens": 16, "num_heads": 16, "head_dim": 192, "rope_dim": 64, "max_positions": 163840},
        ),
        work=lambda s: Work(4 * s["num_tokens"] * s["num_heads"] * s["rope_dim"]),
        changed=("x",),
    ),
)
