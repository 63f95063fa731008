"""Packed rows of float formats, back to a matrix; see `unpack`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from hybrid.kernels.gpu.launch import Plan, check, check_tensor
from hybrid.kernels.gpu.op import Make, Op, Shape, Work
from hybrid.kernels.gpu.packed_layout import FLOAT_BLOCKS, GROUP_ROWS, Piece, group_block_bytes, packed_bytes
from hybrid.kernels.gpu.target import Target, target_of
from hybrid.kernels.gpu.unpack import launch_config, move_launch

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def plan_unpack_float(
    target: Target, name: str, batch: int, rows: int, cols: int, packed: torch.Tensor
) -> Plan:
    check(name in DTYPES, "unpack_float", f"one of {', '.join(DTYPES)}", name)
    block_cols, block_bytes = FLOAT_BLOCKS[name]
    check(cols % block_cols == 0, "unpack_float", f"a multiple of {block_cols} columns", cols)
    size = (packed_bytes(name, batch, rows, cols),)
    check_tensor("unpack_float", "packed rows", packed, size, (torch.uint8,), packed.device)
    out = torch.empty(batch, rows, cols, dtype=DTYPES[name], device=packed.device)
    piece = Piece("", 0, 1, 0, block_bytes, 1)
    width = launch_config({}, out.dtype, target)["WIDTH"]
    shape = (batch, rows, cols // block_cols)
    return Plan((move_launch(packed, out, piece, shape, group_block_bytes(name), width),), (out,))


def unpack_float(name: str, batch: int, rows: int, cols: int, packed: torch.Tensor) -> torch.Tensor:
    """``[batch, rows, cols]`` of F32, F16 or BF16 from the packed bytes of a ``PackedMatrix``.

    Raises:
        ValueError: another format, or a size that does not fit.
    """
    return plan_unpack_float(target_of(packed.device), name, batch, rows, cols, packed).run()[0]


def unpack_float_torch(
    name: str, batch: int, rows: int, cols: int, packed: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    groups, num_blocks = triton.cdiv(rows, GROUP_ROWS), cols // FLOAT_BLOCKS[name][0]
    blocks = packed.reshape(batch, groups, num_blocks, GROUP_ROWS, -1).transpose(2, 3)
    return (blocks.reshape(batch, groups * GROUP_ROWS, -1)[:, :rows].contiguous().view(DTYPES[name]),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    sizes = {"batch": shape["batch"], "rows": shape["rows"], "cols": shape["cols"]}
    padded = triton.cdiv(shape["rows"], GROUP_ROWS) * GROUP_ROWS
    numbers = make.normal(shape["batch"] * padded * shape["cols"], dtype=DTYPES[shape["format"]])
    return {"name": shape["format"], **sizes, "packed": numbers.view(torch.uint8)}


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    return (0.0,)


def _op(name: str) -> Op:
    return Op(
        name=f"unpack_{name}",
        plan=plan_unpack_float,
        reference=unpack_float_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=({"format": name, "batch": 2, "rows": 19, "cols": 200},),
        production_shapes=({"format": name, "batch": 4, "rows": 2048, "cols": 7168},),
        work=lambda s: Work(2 * s["batch"] * s["rows"] * s["cols"] * DTYPES[s["format"]].itemsize),
        any_dtype=False,
    )


OPS = tuple(_op(name) for name in DTYPES)
