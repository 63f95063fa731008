"""The quantised formats, one row each, and matrices of them on the GPU.

A GGUF block is split at load into up to four *planes*, each field of all blocks in order: codes, their high
bits, scales, and the head (``d``, ``dmin``). That is a permutation of the file's bytes, of its bits for IQ2
and IQ3; IQ1 is coded anew, in 15 % more bytes (`rearrange`). The start of a plane is moved up to a multiple
of 16. Blocks of 18, 22, 34, 110 or 210 bytes would not even be aligned to words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hybrid.kernels.gpu import codebooks
from hybrid.kernels.gpu import decode as d
from hybrid.kernels.gpu import decode_codebook as b
from hybrid.kernels.gpu import decode_trits as t
from hybrid.kernels.gpu.launch import check
from hybrid.kernels.gpu.rearrange import REARRANGED

PLANE_NAMES = ("codes", "high", "scales", "head")
PLANE_ALIGNMENT = 16


@dataclass(frozen=True)
class Field:
    """``num_bytes`` of a block from ``offset``, which kernels read as ``dtype``."""

    offset: int
    num_bytes: int
    dtype: torch.dtype


Planes = tuple[Field, Field | None, Field | None, Field]


@dataclass(frozen=True)
class Format:
    """A quantised format; names and numbers are those of GGUF.

    Attributes:
        planes: fields of `PLANE_NAMES`; ``None`` where a format has no such field. Offsets are those of the
        file's
            block, or of what `rearrange` makes of it.
        parts: columns of a unit / 32.
        offset: subtracted from codes.
        has_minimum: whether `decode` returns one that is not 0.
        decode, half: device functions of `decode`.
    """

    name: str
    ggml_type: int
    block_cols: int
    block_bytes: int
    planes: Planes
    parts: int
    offset: int
    has_minimum: bool
    decode: Any
    half: Any

    @property
    def unit_cols(self) -> int:
        return 32 * self.parts

    @property
    def plane_bytes(self) -> int:
        """Bytes of a block in the planes: those of the file, but for IQ1."""
        return sum(field.num_bytes for field in self.planes if field is not None)


_I32, _U8, _I16, _F16 = torch.int32, torch.uint8, torch.int16, torch.float16


def _planes(
    at: int, num_bytes: int, high: Field | None, scales: Field | None, head: tuple[int, int]
) -> Planes:
    return (Field(at, num_bytes, _I32), high, scales, Field(*head, _F16))


def _row(
    name: str,
    ggml_type: int,
    block: tuple[int, int],
    fields: Planes,
    codes: tuple[int, int],
    decode: Any,
    half: Any,
    has_minimum: bool = False,
) -> Format:
    """``block``: columns and bytes; ``codes``: parts and offset."""
    return Format(name, ggml_type, *block, fields, *codes, has_minimum, decode, half)


_Q4K, _Q5_HIGH = Field(4, 12, _U8), Field(2, 4, _I32)
_Q3K = Field(0, 32, _I32), Field(96, 12, _U8)
_Q6K = Field(128, 64, _I32), Field(192, 16, _U8)
_IQ1 = Field(32, 16, _I32), Field(48, 8, _I32)


def _iq(high: int, scales: int, parts_bytes: int = 32) -> Planes:
    """Codes and signs, scales behind them, d at the end."""
    after = parts_bytes + high
    return _planes(
        0,
        parts_bytes,
        Field(parts_bytes, high, _I32),
        Field(after, scales, _U8) if scales else None,
        (after + scales, 2),
    )


FORMATS = {
    f.name: f
    for f in (
        _row("Q8_0", 8, (32, 34), _planes(2, 32, None, None, (0, 2)), (1, 0), d.decode_q8_0, d.half_straight),
        _row("Q4_0", 2, (32, 18), _planes(2, 16, None, None, (0, 2)), (2, 8), d.decode_q4_0, d.half_32),
        _row("Q5_0", 6, (32, 22), _planes(6, 16, _Q5_HIGH, None, (0, 2)), (2, 16), d.decode_q5_0, d.half_32),
        _row("IQ4_NL", 20, (32, 18), _planes(2, 16, None, None, (0, 2)), (2, 0), d.decode_iq4_nl, d.half_32),
        _row("IQ4_XS", 23, (256, 136), _planes(8, 128, Field(2, 2, _I16), Field(4, 4, _U8), (0, 2)), (2, 0),
             d.decode_iq4_xs, d.half_32),
        _row("Q4_K", 12, (256, 144), _planes(16, 128, None, _Q4K, (0, 4)), (2, 0),
             d.decode_q4_k, d.half_64, True),
        _row("Q5_K", 13, (256, 176), _planes(48, 128, Field(16, 32, _I32), _Q4K, (0, 4)), (2, 0),
             d.decode_q5_k, d.half_64, True),
        _row("Q6_K", 14, (256, 210), _planes(0, 128, *_Q6K, (208, 2)), (2, 32),
             d.decode_q6_k, d.half_q6_k),
        _row("Q2_K", 10, (256, 84), _planes(16, 64, None, Field(0, 16, _U8), (80, 4)), (4, 0),
             d.decode_q2_k, d.half_128, True),
        _row("Q3_K", 11, (256, 110), _planes(32, 64, *_Q3K, (108, 2)), (4, 4),
             d.decode_q3_k, d.half_128),
        _row("Q4_1", 3, (32, 20), _planes(4, 16, None, None, (0, 4)), (2, 0), d.decode_q4_1, d.half_32, True),
        _row("Q5_1", 7, (32, 24), _planes(8, 16, Field(4, 4, _I32), None, (0, 4)), (2, 0),
             d.decode_q5_1, d.half_32, True),
        _row("MXFP4", 39, (32, 17), (Field(1, 16, _I32), None, None, Field(0, 1, _U8)), (2, 0),
             d.decode_mxfp4, d.half_32),
        _row("TQ2_0", 35, (256, 66), _planes(0, 64, None, None, (64, 2)), (4, 1), d.decode_tq2_0, d.half_128),
        _row("TQ1_0", 34, (256, 54), _planes(0, 32, Field(32, 16, _I32), Field(48, 4, _I32), (52, 2)), (8, 1),
             t.decode_tq1_0, t.half_trits),
        _row("IQ1_S", 19, (256, 50), _planes(0, 32, *_IQ1, (56, 2)), (8, 0),
             t.decode_iq1_s, t.half_trits, True),
        _row("IQ1_M", 29, (256, 56), (Field(0, 32, _I32), *_IQ1, Field(56, 8, _I32)), (8, 9),
             t.decode_iq1_m, t.half_trits),
        _row("IQ2_XXS", 16, (256, 66), _iq(32, 0), (4, 0), b.decode_iq2_xxs, b.half_codebook),
        _row("IQ2_XS", 17, (256, 74), _iq(32, 8), (4, 0), b.decode_iq2_xs, b.half_codebook),
        _row("IQ2_S", 22, (256, 82), _iq(32, 16), (4, 0), b.decode_iq2_s, b.half_codebook),
        _row("IQ3_XXS", 18, (256, 98), _iq(32, 0, 64), (4, 0), b.decode_iq3_xxs, b.half_codebook),
        _row("IQ3_S", 21, (256, 110), _iq(32, 12, 64), (4, 0), b.decode_iq3_s, b.half_codebook),
    )
}  # fmt: skip


@dataclass(frozen=True)
class QuantizedMatrix:
    """``[batch, rows, cols]`` weights in planes; ``data`` is uint8, as `split_planes` returns it."""

    format: Format
    batch: int
    rows: int
    cols: int
    data: torch.Tensor

    def __post_init__(self) -> None:
        name = self.format.name
        check(min(self.batch, self.rows) > 0, name, "at least one row", (self.batch, self.rows))
        multiple = max(self.format.block_cols, self.format.unit_cols)
        check(
            self.cols > 0 and self.cols % multiple == 0, name, f"a multiple of {multiple} columns", self.cols
        )
        size = plane_starts(self.format, self.num_blocks)[-1]
        check(self.data.dtype is torch.uint8, name, "uint8 data", self.data.dtype)
        check(tuple(self.data.shape) == (size,), name, f"{size} bytes", tuple(self.data.shape))
        check(size < 1 << 33, name, "at most 8 GiB, addressable in words of 4 bytes", size)

    @property
    def num_blocks(self) -> int:
        return self.batch * self.rows * self.cols // self.format.block_cols

    @property
    def units(self) -> int:
        """Units of a row."""
        return self.cols // self.format.unit_cols

    def planes(self) -> dict[str, torch.Tensor | None]:
        """What kernels take: `PLANE_NAMES`, and the ``table`` of a code book."""
        starts = plane_starts(self.format, self.num_blocks)
        views: dict[str, torch.Tensor | None] = {}
        for name, field, start in zip(PLANE_NAMES, self.format.planes, starts, strict=False):
            views[name] = None
            if field is not None:
                views[name] = self.data[start : start + field.num_bytes * self.num_blocks].view(field.dtype)
        book = self.format.name in codebooks.NUM_ENTRIES
        views["table"] = codebooks.table(self.format.name, self.data.device) if book else None
        return views

    def to(self, device: torch.device) -> QuantizedMatrix:
        return QuantizedMatrix(self.format, self.batch, self.rows, self.cols, self.data.to(device))


def plane_starts(fmt: Format, num_blocks: int) -> list[int]:
    """Byte each plane begins at, and the bytes in all."""
    starts, at = [], 0
    for field in fmt.planes:
        starts.append(at)
        if field is not None:
            at += -(-field.num_bytes * num_blocks // PLANE_ALIGNMENT) * PLANE_ALIGNMENT
    return [*starts, at]


_CHUNK_BLOCKS = 1 << 16
"""Blocks rearranged at once: that takes about 3 KiB a block."""


def split_planes(fmt: Format, blocks: torch.Tensor) -> torch.Tensor:
    """GGUF blocks, uint8 ``[..., block_bytes]``, to planes on the same device; gaps between them are 0."""
    check(
        blocks.shape[-1] == fmt.block_bytes,
        fmt.name,
        f"blocks of {fmt.block_bytes} bytes",
        tuple(blocks.shape),
    )
    blocks = blocks.reshape(-1, fmt.block_bytes)
    starts = plane_starts(fmt, len(blocks))
    data = torch.zeros(starts[-1], dtype=torch.uint8, device=blocks.device)
    change = REARRANGED.get(fmt.name)
    step = len(blocks) if change is None else _CHUNK_BLOCKS
    for first in range(0, len(blocks), max(1, step)):
        part = blocks[first : first + step]
        if change is not None:
            part = change.forward(part)
        for field, start in zip(fmt.planes, starts, strict=False):
            if field is not None:
                at = start + field.num_bytes * first
                plane = data[at : at + field.num_bytes * len(part)].view(len(part), field.num_bytes)
                plane.copy_(part[:, field.offset : field.offset + field.num_bytes])
    return data


def join_planes(fmt: Format, data: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The inverse of `split_planes`: uint8 ``[num_blocks, block_bytes]``."""
    starts = plane_starts(fmt, num_blocks)
    check(tuple(data.shape) == (starts[-1],), fmt.name, f"{starts[-1]} bytes", tuple(data.shape))
    blocks = torch.empty(num_blocks, fmt.plane_bytes, dtype=torch.uint8, device=data.device)
    for field, start in zip(fmt.planes, starts, strict=False):
        if field is not None:
            plane = data[start : start + field.num_bytes * num_blocks].view(num_blocks, field.num_bytes)
            blocks[:, field.offset : field.offset + field.num_bytes] = plane
    change = REARRANGED.get(fmt.name)
    if change is None:
        return blocks
    return torch.cat([change.backward(part) for part in blocks.split(_CHUNK_BLOCKS)])
