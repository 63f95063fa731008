"""Rows as the CPU kernels hold them in RAM, back to planes on the GPU: an upload needs no second copy.

The packed layout is stated in kernels/cpu/block_formats.h: groups of 16 rows, a group's K-blocks one after
another, and a block's fields in a fixed order as ``[count][16 rows][unit bytes]``. Each field is a plane
here, so a launch for each plane moves units from one order to the other, and the fifth bits of Q5_0 move
within their words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.formats import (
    FORMATS,
    PLANE_NAMES,
    Format,
    QuantizedMatrix,
    plane_starts,
    split_planes,
)
from hybrid.kernels.gpu.launch import Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import Make, Op, Shape, Work
from hybrid.kernels.gpu.target import Target, target_of

GROUP_ROWS = 16


@triton.jit
def unpack_kernel(
    packed,
    plane,
    num_rows,
    units,
    group_units,
    block_units,
    field_units,
    COUNT: tl.constexpr,
    SPREAD: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WIDTH of the ``units`` units that a row has in a plane, for a group of 16 rows of a matrix."""
    group, matrix = tl.program_id(0), tl.program_id(2)
    lane = tl.arange(0, GROUP)[:, None]
    unit = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    row = group * GROUP + lane
    there = (row < num_rows) & (unit < units)
    source = packed + (matrix * tl.num_programs(0) + group).to(tl.int64) * group_units
    source += (unit // COUNT) * block_units + field_units + (unit % COUNT) * GROUP + lane
    value = tl.load(source, mask=there, other=0)
    if SPREAD:
        # Packed bit 8c + m is the file's bit 4m + c.
        word = value * 0
        for c in tl.static_range(4):
            bits = (value >> (8 * c)) & 255
            bits = (bits | (bits << 12)) & 0x000F000F
            bits = (bits | (bits << 6)) & 0x03030303
            word |= ((bits | (bits << 3)) & 0x11111111) << c
        value = word
    tl.store(plane + (matrix * num_rows + row).to(tl.int64) * units + unit, value, mask=there)


def packed_fields(fmt: Format) -> list[tuple[str, int, int, int]]:
    """Plane, first byte within a row's packed block, unit bytes and count of each field, in packed order.

    d and dmin are two fields of one unit there, which is the same as one field of two.
    """
    order = list(PLANE_NAMES)
    if fmt.name == "IQ4_XS":  # its scales_l come before its scales_h
        order[1:3] = ["scales", "high"]
    fields, at = [], 0
    for name in order:
        field = fmt.planes[PLANE_NAMES.index(name)]
        if field is not None:
            unit = 2 if name == "head" or field.num_bytes < 4 else 4
            fields.append((name, at, unit, field.num_bytes // unit))
            at += field.num_bytes
    return fields


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"GROUP": GROUP_ROWS, "WIDTH": 128}


def plan_unpack(target: Target, name: str, batch: int, rows: int, cols: int, packed: torch.Tensor) -> Plan:
    check(name in FORMATS, "unpack", f"one of {', '.join(FORMATS)}", name)
    fmt = FORMATS[name]
    num_blocks, groups = cols // fmt.block_cols, triton.cdiv(rows, GROUP_ROWS)
    size = batch * groups * GROUP_ROWS * num_blocks * fmt.block_bytes
    check_tensor("unpack", "packed rows", packed, (size,), (torch.uint8,), packed.device)
    total = plane_starts(fmt, batch * rows * num_blocks)[-1]
    data = torch.zeros(total, dtype=torch.uint8, device=packed.device)
    planes = QuantizedMatrix(fmt, batch, rows, cols, data).planes()
    config = launch_config({}, torch.uint8, target)
    launches = []
    for plane_name, at, unit, count in packed_fields(fmt):
        plane = planes[plane_name]
        assert plane is not None
        kind = torch.int32 if unit == 4 else torch.int16
        args = {
            "packed": packed.view(kind),
            "plane": plane.view(kind),
            "num_rows": rows,
            "units": num_blocks * count,
            "group_units": GROUP_ROWS * num_blocks * fmt.block_bytes // unit,
            "block_units": GROUP_ROWS * fmt.block_bytes // unit,
            "field_units": GROUP_ROWS * at // unit,
        }
        constants = {"COUNT": count, "SPREAD": name == "Q5_0" and plane_name == "high", **config}
        grid = (groups, triton.cdiv(num_blocks * count, config["WIDTH"]), batch)
        launches.append(Launch(unpack_kernel, grid, args, constants))
    return Plan(tuple(launches), (data,))


def unpack(name: str, batch: int, rows: int, cols: int, packed: torch.Tensor) -> QuantizedMatrix:
    """The matrix that ``PackedMatrix(ggml_type, batch, rows, cols)`` holds in the uint8 bytes ``packed``.

    Raises:
        ValueError: the format is none of `formats`, or the size does not fit.
    """
    data = plan_unpack(target_of(packed.device), name, batch, rows, cols, packed).run()[0]
    return QuantizedMatrix(FORMATS[name], batch, rows, cols, data)


def unpack_blocks_torch(fmt: Format, batch: int, rows: int, cols: int, packed: torch.Tensor) -> torch.Tensor:
    """GGUF blocks ``[batch, rows, blocks, block_bytes]``, from the statement of the packed layout alone."""
    num_blocks, groups = cols // fmt.block_cols, triton.cdiv(rows, GROUP_ROWS)
    source = packed.reshape(batch, groups, num_blocks, GROUP_ROWS * fmt.block_bytes)
    out = torch.empty(batch, groups, GROUP_ROWS, num_blocks, fmt.block_bytes, dtype=torch.uint8)
    for name, at, unit, count in packed_fields(fmt):
        field = fmt.planes[PLANE_NAMES.index(name)]
        assert field is not None
        part = source[..., GROUP_ROWS * at : GROUP_ROWS * (at + unit * count)]
        part = part.reshape(batch, groups, num_blocks, count, GROUP_ROWS, unit)
        part = part.permute(0, 1, 4, 2, 3, 5).flatten(-2)
        if fmt.name == "Q5_0" and name == "high":
            bits = (part[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [..., c, m]
            bits = bits.transpose(-1, -2).reshape(*part.shape[:-1], 4, 8)
            part = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
        out[..., field.offset : field.offset + field.num_bytes] = part
    return out.flatten(1, 2)[:, :rows]


def unpack_torch(
    name: str, batch: int, rows: int, cols: int, packed: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    fmt = FORMATS[name]
    return (split_planes(fmt, unpack_blocks_torch(fmt, batch, rows, cols, packed)),)


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    # Any bytes are a packed matrix, so random ones serve.
    fmt = FORMATS[shape["format"]]
    groups = triton.cdiv(shape["rows"], GROUP_ROWS)
    size = shape["batch"] * groups * GROUP_ROWS * shape["cols"] // fmt.block_cols * fmt.block_bytes
    return {
        "name": fmt.name,
        "batch": shape["batch"],
        "rows": shape["rows"],
        "cols": shape["cols"],
        "packed": make.integers(0, 256, size, dtype=torch.uint8),
    }


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    return (0.0,)


def _work(shape: Shape) -> Work:
    fmt = FORMATS[shape["format"]]
    return Work(2 * shape["batch"] * shape["rows"] * shape["cols"] // fmt.block_cols * fmt.block_bytes)


def _op(name: str) -> Op:
    return Op(
        name=f"unpack_{name}",
        plan=plan_unpack,
        reference=unpack_torch,
        arguments=_arguments,
        bounds=_bounds,
        test_shapes=({"format": name, "batch": 2, "rows": 19, "cols": 512},),
        production_shapes=({"format": name, "batch": 4, "rows": 2048, "cols": 7168},),
        work=_work,
        any_dtype=False,
    )


OPS = tuple(_op(name) for name in FORMATS)
