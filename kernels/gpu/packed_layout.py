"""Rows as the CPU kernels hold them in RAM, as a table; and which of their fields make up a plane.

The layout is stated in kernels/cpu/block_formats.h: groups of 16 rows, a group's K-blocks one after another,
and a block's fields in a fixed order as ``[count][16 rows][unit bytes]``. Neighbouring fields of one unit are
one field.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.kernels.gpu.formats import FORMATS, PLANE_NAMES, Format

GROUP_ROWS = 16

PackedField = tuple[int, int, int]
"""First byte in the file's block, bytes of a unit, number of units."""

_D, _M = (0, 2, 1), (2, 2, 1)
_QK = {
    "Q4_0": [(2, 4, 4), _D],
    "Q4_1": [(4, 4, 4), _D, _M],
    "Q5_0": [(6, 4, 4), (2, 4, 1), _D],
    "Q5_1": [(8, 4, 4), (4, 4, 1), _D, _M],
    "Q8_0": [(2, 4, 8), _D],
    "Q2_K": [(16, 4, 16), (0, 4, 4), (80, 2, 1), (82, 2, 1)],
    "Q3_K": [(32, 4, 16), (0, 4, 8), (96, 4, 3), (108, 2, 1)],
    "Q4_K": [(16, 4, 32), (4, 4, 3), _D, _M],
    "Q5_K": [(48, 4, 32), (16, 4, 8), (4, 4, 3), _D, _M],
    "Q6_K": [(0, 4, 32), (128, 4, 16), (192, 4, 4), (208, 2, 1)],
    "IQ4_NL": [(2, 4, 4), _D],
    "IQ4_XS": [(8, 4, 32), (4, 4, 1), (2, 2, 1), _D],
    "TQ1_0": [(0, 4, 12), (48, 4, 1), (52, 2, 1)],
    "TQ2_0": [(0, 4, 16), (64, 2, 1)],
    "MXFP4": [(1, 4, 4), (0, 1, 1)],
}
FIELDS: dict[str, list[PackedField]] = {
    **_QK,
    "IQ2_XXS": [(2, 4, 16), _D],
    "IQ2_XS": [(2, 4, 16), (66, 4, 2), _D],
    "IQ2_S": [(2, 4, 16), (66, 4, 2), (74, 4, 2), _D],
    "IQ3_XXS": [(2, 4, 16), (66, 4, 8), _D],
    "IQ3_S": [(2, 4, 16), (66, 4, 2), (74, 4, 8), (106, 4, 1), _D],
}
"""Fields of the GGUF block in packed order; IQ1 has none, it is coded anew."""

SPREAD_BITS = ("Q5_0", "Q5_1")
"""Their fifth bits are permuted within a word: packed bit 8c + m is the file's bit 4m + c."""

GROUP_BYTES = {"IQ1_S": 920, "IQ1_M": 1024}
FLOAT_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (2, 4)}
"""Columns and bytes of a block of float formats, which have one field."""


def group_block_bytes(name: str) -> int:
    """Bytes of the packed K-block of 16 rows."""
    if name in FLOAT_BLOCKS:
        return GROUP_ROWS * FLOAT_BLOCKS[name][1]
    return GROUP_BYTES.get(name, GROUP_ROWS * FORMATS[name].block_bytes)


def packed_bytes(name: str, batch: int, rows: int, cols: int) -> int:
    """Bytes of a packed matrix, padding rows included."""
    block_cols = FLOAT_BLOCKS[name][0] if name in FLOAT_BLOCKS else FORMATS[name].block_cols
    return batch * -(-rows // GROUP_ROWS) * (cols // block_cols) * group_block_bytes(name)


@dataclass(frozen=True)
class Piece:
    """Units of a plane from units of a packed field: unit ``i < count`` of a block comes from ``step * i``
    on.

    Attributes:
        plane: which.
        start, per_block: its first unit of the plane's block, and how many that has.
        at: first byte of the source within the K-block of 16 rows.
        change: what becomes of it on the way; a name of `unpack.CHANGES`.
    """

    plane: str
    start: int
    per_block: int
    at: int
    unit: int
    count: int
    step: int = 1
    change: str = "keep"


def _plain(fmt: Format) -> list[Piece]:
    """Planes that are fields of the file's block, or several of them."""
    pieces, at = [], 0
    for offset, unit, count in FIELDS[fmt.name]:
        for plane, field in zip(PLANE_NAMES, fmt.planes, strict=True):
            if field is not None and field.offset <= offset < field.offset + field.num_bytes:
                start, per_block = (offset - field.offset) // unit, field.num_bytes // unit
                change = "spread" if plane == "high" and fmt.name in SPREAD_BITS else "keep"
                pieces.append(Piece(plane, start, per_block, at, unit, count, change=change))
        at += GROUP_ROWS * unit * count
    return pieces


def _words(plane: str, first: int, count: int, **more: int | str) -> Piece:
    """The words from ``first`` on of a K-block of words."""
    return Piece(plane, 0, count, 4 * GROUP_ROWS * first, 4, count, **more)  # type: ignore[arg-type]


def _trit_words(scales: int) -> list[Piece]:
    """The words of trits, and the first word of ``scales`` of a plane of as many."""
    return [
        _words("codes", 0, 8),
        _words("high", 8, 4),
        Piece("scales", 0, scales, 4 * GROUP_ROWS * 12, 4, 1),
    ]


def _d(words: int) -> Piece:
    """d behind so many words."""
    return Piece("head", 0, 1, 4 * GROUP_ROWS * words, 2, 1)


_REARRANGED = {
    "TQ1_0": [*_trit_words(1), _d(13)],
    # The scales of IQ1_S are bytes and nibbles: `unpack` has a kernel for them.
    "IQ1_S": [*_trit_words(2), Piece("head", 0, 1, 888, 2, 1)],
    "IQ1_M": [
        *_trit_words(2),
        Piece("scales", 1, 2, 4 * GROUP_ROWS * 13, 4, 1),
        Piece("head", 0, 2, 4 * GROUP_ROWS * 14, 4, 2),
    ],
    "IQ2_XXS": [
        _words("codes", 0, 8, step=2),
        _words("high", 0, 8, step=2, change="signs_2_of_7"),
        _d(16),
    ],
    "IQ2_XS": [
        _words("codes", 0, 8, step=2, change="low_bytes"),
        _words("high", 0, 8, step=2, change="ninth_and_signs"),
        _words("scales", 16, 2),
        _d(18),
    ],
    "IQ2_S": [
        _words("codes", 0, 8),
        _words("high", 8, 8, change="signs_2_of_8"),
        _words("scales", 16, 4),
        _d(20),
    ],
    "IQ3_XXS": [_words("codes", 0, 16), _words("high", 16, 8, change="signs_3_of_7"), _d(24)],
    "IQ3_S": [
        _words("codes", 0, 16),
        Piece("scales", 0, 3, 4 * GROUP_ROWS * 16, 4, 2),
        _words("high", 18, 8, change="signs_3_of_8"),
        Piece("scales", 2, 3, 4 * GROUP_ROWS * 26, 4, 1),
        _d(27),
    ],
}


def pieces_of(fmt: Format) -> list[Piece]:
    """What a launch each moves, to fill the planes of a format."""
    return _REARRANGED.get(fmt.name) or _plain(fmt)
