"""Rows as the CPU kernels hold them in RAM, back to planes on the GPU: an upload needs no second copy.

`packed_layout` says where each plane's units lie; a launch for each piece moves them, and the bits that have
another order there move within their words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hybrid.kernels.gpu.formats import FORMATS, Format, QuantizedMatrix, plane_starts, split_planes
from hybrid.kernels.gpu.launch import Launch, Plan, check, check_tensor
from hybrid.kernels.gpu.op import Make, Op, Shape, Work
from hybrid.kernels.gpu.packed_layout import (
    FIELDS,
    GROUP_ROWS,
    SPREAD_BITS,
    group_block_bytes,
    packed_bytes,
    pieces_of,
)
from hybrid.kernels.gpu.rearrange import REARRANGED, trits_of
from hybrid.kernels.gpu.target import Target, target_of


@triton.jit
def keep(a, b):
    return a


@triton.jit
def spread(a, b):
    """Packed bit 8c + m to the file's bit 4m + c."""
    word = a * 0
    for c in tl.static_range(4):
        bits = (a >> (8 * c)) & 255
        bits = (bits | (bits << 12)) & 0x000F000F
        bits = (bits | (bits << 6)) & 0x03030303
        word |= ((bits | (bits << 3)) & 0x11111111) << c
    return word


@triton.jit
def move_signs(word, WIDTH: tl.constexpr, IQ3: tl.constexpr):
    """See `rearrange`: fields of WIDTH bits to the signs of each column together."""
    out = (word & -0x10000000) if WIDTH == 7 else word * 0
    for c in tl.static_range(WIDTH):
        for e in tl.static_range(4):
            place = 8 * (c % 4) + 4 * (c // 4) + e if IQ3 else 4 * c + e
            out |= ((word >> (WIDTH * e + c)) & 1) << place
    return out


@triton.jit
def signs_2_of_7(a, b):
    return move_signs(b, 7, False)


@triton.jit
def signs_2_of_8(a, b):
    return move_signs(a, 8, False)


@triton.jit
def signs_3_of_7(a, b):
    return move_signs(a, 7, True)


@triton.jit
def signs_3_of_8(a, b):
    return move_signs(a, 8, True)


@triton.jit
def low_bytes(a, b):
    """The low bytes of four halves of words."""
    return (a & 255) | ((a >> 8) & 0xFF00) | ((b & 255) << 16) | ((b & 0xFF0000) << 8)


@triton.jit
def ninth_and_signs(a, b):
    """Four halves of words: seven signs from bit 9, and bit 8 of an index."""
    word = a * 0
    for e in tl.static_range(4):
        q = ((a if e < 2 else b) >> (16 * (e % 2))) & 0xFFFF
        word |= ((q >> 9) << (7 * e)) | (((q >> 8) & 1) << (28 + e))
    return move_signs(word, 7, False)


CHANGES = {
    "keep": keep,
    "spread": spread,
    "signs_2_of_7": signs_2_of_7,
    "signs_2_of_8": signs_2_of_8,
    "signs_3_of_7": signs_3_of_7,
    "signs_3_of_8": signs_3_of_8,
    "low_bytes": low_bytes,
    "ninth_and_signs": ninth_and_signs,
}


@triton.jit
def unpack_kernel(
    packed,
    plane,
    num_rows,
    units,
    row_units,
    start,
    group_units,
    block_units,
    field_units,
    COUNT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    CHANGE: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WIDTH of the ``units`` units that a piece gives a row, for a group of 16 rows of a matrix."""
    group, matrix = tl.program_id(0), tl.program_id(2)
    lane = tl.arange(0, GROUP)[:, None]
    unit = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    row = group * GROUP + lane
    there = (row < num_rows) & (unit < units)
    source = packed + (matrix * tl.num_programs(0) + group).to(tl.int64) * group_units
    source += (unit // COUNT) * block_units + field_units + (unit % COUNT) * (STEP * GROUP) + lane
    value = tl.load(source, mask=there, other=0)
    more = value
    if STEP == 2:
        more = tl.load(source + GROUP, mask=there, other=0)
    at = (
        (matrix * num_rows + row).to(tl.int64) * row_units
        + (unit // COUNT) * PER_BLOCK
        + start
        + unit % COUNT
    )
    tl.store(plane + at, CHANGE(value, more), mask=there)


@triton.jit
def unpack_iq1_s_scales_kernel(packed, plane, num_rows, num_blocks, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Word 1 of the scales of IQ1_S: 24 bits of scales, four signs in a nibble and four as fifth trits."""
    group, matrix = tl.program_id(0), tl.program_id(2)
    lane = tl.arange(0, GROUP)[:, None]
    block = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    row = group * GROUP + lane
    there = (row < num_rows) & (block < num_blocks)
    source = packed + ((matrix * tl.num_programs(0) + group).to(tl.int64) * num_blocks + block) * 920
    word = (
        tl.load(source + 880 + lane % 8, mask=there, other=0).to(tl.int32) >> (4 * (lane // 8)) & 15
    ) << 24
    for i in tl.static_range(3):
        word |= tl.load(source + 832 + 16 * i + lane, mask=there, other=0).to(tl.int32) << (8 * i)
    for b in tl.static_range(4):
        last = tl.load(source + 768 + 4 * lane + b, mask=there, other=0).to(tl.int32)
        word |= (((last * 81 & 255) * 3) >> 8) << (28 + b)
    tl.store(plane + 2 * ((matrix * num_rows + row).to(tl.int64) * num_blocks + block) + 1, word, mask=there)


def launch_config(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, int]:
    return {"GROUP": GROUP_ROWS, "WIDTH": 128}


_KINDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def move_launch(
    packed: torch.Tensor,
    plane: torch.Tensor,
    piece: Any,
    shape: tuple[int, int, int],
    block_bytes: int,
    width: int,
) -> Launch:
    batch, rows, num_blocks = shape
    kind, unit, units = _KINDS[piece.unit], piece.unit, num_blocks * piece.count
    args = {
        "packed": packed.view(kind),
        "plane": plane.view(kind),
        "num_rows": rows,
        "units": units,
        "row_units": num_blocks * piece.per_block,
        "start": piece.start,
        "group_units": num_blocks * block_bytes // unit,
        "block_units": block_bytes // unit,
        "field_units": piece.at // unit,
    }
    constants = {
        "COUNT": piece.count,
        "PER_BLOCK": piece.per_block,
        "STEP": piece.step,
        "CHANGE": CHANGES[piece.change],
        "GROUP": GROUP_ROWS,
        "WIDTH": width,
    }
    return Launch(
        unpack_kernel, (triton.cdiv(rows, GROUP_ROWS), triton.cdiv(units, width), batch), args, constants
    )


def plan_unpack(target: Target, name: str, batch: int, rows: int, cols: int, packed: torch.Tensor) -> Plan:
    check(name in FORMATS, "unpack", f"one of {', '.join(FORMATS)}", name)
    fmt = FORMATS[name]
    num_blocks = cols // fmt.block_cols
    size = (packed_bytes(name, batch, rows, cols),)
    check_tensor("unpack", "packed rows", packed, size, (torch.uint8,), packed.device)
    total = plane_starts(fmt, batch * rows * num_blocks)[-1]
    data = torch.zeros(total, dtype=torch.uint8, device=packed.device)
    planes = QuantizedMatrix(fmt, batch, rows, cols, data).planes()
    width = launch_config({}, torch.uint8, target)["WIDTH"]
    launches, shape = [], (batch, rows, num_blocks)
    for piece in pieces_of(fmt):
        plane = planes[piece.plane]
        assert plane is not None
        launches.append(move_launch(packed, plane, piece, shape, group_block_bytes(name), width))
    if name == "IQ1_S":
        args = {"packed": packed, "plane": planes["scales"], "num_rows": rows, "num_blocks": num_blocks}
        grid = (triton.cdiv(rows, GROUP_ROWS), triton.cdiv(num_blocks, 16), batch)
        constants = {"GROUP": GROUP_ROWS, "WIDTH": 16}
        launches.append(Launch(unpack_iq1_s_scales_kernel, grid, args, constants))
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
    source = packed.reshape(batch, groups, num_blocks, group_block_bytes(fmt.name))
    if fmt.name in ("IQ1_S", "IQ1_M"):
        out = REARRANGED[fmt.name].backward(_recoded(fmt, source))
        out = out.reshape(batch, groups, num_blocks, GROUP_ROWS, -1).transpose(2, 3)
        return out.flatten(1, 2)[:, :rows]
    out = torch.empty(batch, groups, GROUP_ROWS, num_blocks, fmt.block_bytes, dtype=torch.uint8)
    at = 0
    for offset, unit, count in FIELDS[fmt.name]:
        part = source[..., at : at + GROUP_ROWS * unit * count]
        part = part.reshape(batch, groups, num_blocks, count, GROUP_ROWS, unit)
        part = part.permute(0, 1, 4, 2, 3, 5).flatten(-2)
        if fmt.name in SPREAD_BITS and (unit, count) == (4, 1):
            bits = (part[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [..., c, m]
            bits = bits.transpose(-1, -2).reshape(*part.shape[:-1], 4, 8)
            part = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)
        out[..., offset : offset + unit * count] = part
        at += GROUP_ROWS * unit * count
    return out.flatten(1, 2)[:, :rows]


def _recoded(fmt: Format, source: torch.Tensor) -> torch.Tensor:
    """IQ1's packed blocks ``[batch, groups, blocks, bytes]`` to those of `rearrange`, ``[all rows,
    plane_bytes]``.
    """
    flat = source.reshape(-1, source.shape[-1])
    num_words = 13 if fmt.name == "IQ1_S" else 16
    words = flat[:, : 64 * num_words].reshape(-1, num_words, GROUP_ROWS, 4).transpose(1, 2).flatten(2)
    if fmt.name == "IQ1_M":
        return words.flatten(0, 1)
    scales = flat[:, 832:880].reshape(-1, 3, GROUP_ROWS).transpose(1, 2)
    early = torch.cat((flat[:, 880:888] & 15, flat[:, 880:888] >> 4), 1)
    late = trits_of(words.flatten(0, 1))[:, 256:].long() << torch.arange(4)
    signs = early | (late.sum(1).to(torch.uint8) << 4).reshape(early.shape)
    d = flat[:, 888:].reshape(-1, GROUP_ROWS, 2)
    return torch.cat((words, scales, signs[..., None], d), 2).flatten(0, 1)


def unpack_torch(
    name: str, batch: int, rows: int, cols: int, packed: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    fmt = FORMATS[name]
    return (split_planes(fmt, unpack_blocks_torch(fmt, batch, rows, cols, packed)),)


def packed_bytes_of(name: str, batch: int, rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """Random packed rows. Any bytes are such, but those of IQ1, whose trits must be of its code book."""
    size = packed_bytes(name, batch, rows, cols)
    if name not in ("IQ1_S", "IQ1_M"):
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    fmt = FORMATS[name]
    num_blocks, padded = cols // fmt.block_cols, -(-rows // GROUP_ROWS) * GROUP_ROWS
    blocks = torch.randint(
        0, 256, (batch * padded * num_blocks, fmt.block_bytes), dtype=torch.uint8, generator=generator
    )
    coded = (
        REARRANGED[name].forward(blocks).reshape(-1, GROUP_ROWS, num_blocks, fmt.plane_bytes).transpose(1, 2)
    )
    num_words = 13 if name == "IQ1_S" else 16
    words = coded[..., : 4 * num_words].unflatten(-1, (num_words, 4)).transpose(2, 3).flatten(2)
    if name == "IQ1_M":
        flat: torch.Tensor = words.flatten()
        return flat
    scales, signs = coded[..., 52:55].transpose(2, 3).flatten(2), coded[..., 55] & 15
    nibbles = signs[..., :8] | signs[..., 8:] << 4
    joined = torch.cat((words, scales, nibbles, coded[..., 56:].flatten(2)), -1)
    return joined.flatten()


def _arguments(shape: Shape, make: Make) -> dict[str, Any]:
    sizes = {"batch": shape["batch"], "rows": shape["rows"], "cols": shape["cols"]}
    total = (packed_bytes(shape["format"], **sizes),)
    packed = make.values(
        total, torch.uint8, lambda: packed_bytes_of(shape["format"], **sizes, generator=make.generator)
    )
    return {"name": shape["format"], **sizes, "packed": packed}


def _bounds(args: Mapping[str, Any], refs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | float, ...]:
    return (0.0,)


def _work(shape: Shape) -> Work:
    fmt = FORMATS[shape["format"]]
    return Work(2 * shape["batch"] * shape["rows"] * shape["cols"] // fmt.block_cols * fmt.plane_bytes)


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
