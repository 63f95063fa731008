"""Tensor types: their ids, block sizes and how many bytes a tensor of one takes.

Mainline types follow the gguf package (`GGML_QUANT_SIZES`); ids 133 and up are defined by
ik_llama.cpp. Many of those put a scale in front of each row (``row_meta_bytes``), and the ``_R4``/``_R8``
types interleave the rows of a group, so that the number of rows must be a multiple of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum


class GGMLType(IntEnum):
    """Type ids as files store them."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    I2_S = 36
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42
    Q6_0 = 133
    IQ1_BN = 134
    IQ2_BN = 135
    IQ2_K = 137
    IQ3_K = 138
    IQ4_K = 139
    IQ5_K = 140
    IQ6_K = 141
    IQ4_KS = 144
    IQ2_KS = 145
    IQ4_KSS = 146
    Q8_KV = 151
    IQ5_KS = 152
    IQ2_KT = 153
    IQ3_KT = 154
    IQ4_KT = 155
    IQ3_KS = 156
    IQ2_KL = 157
    IQ1_KT = 158
    Q4_0_R8 = 202
    Q5_0_R4 = 206
    Q8_0_R8 = 208
    Q2_K_R4 = 210
    Q3_K_R4 = 211
    Q4_K_R4 = 212
    Q5_K_R4 = 213
    Q6_K_R4 = 214
    IQ2_XXS_R4 = 216
    IQ2_XS_R4 = 217
    IQ3_XXS_R4 = 218
    IQ1_S_R4 = 219
    IQ4_NL_R4 = 220
    IQ3_S_R4 = 221
    IQ2_S_R4 = 222
    IQ4_XS_R8 = 223
    IQ1_M_R4 = 229
    BF16_R16 = 230
    Q6_0_R4 = 233
    IQ2_BN_R4 = 335
    IQ2_K_R4 = 337
    IQ3_K_R4 = 338
    IQ4_K_R4 = 339
    IQ5_K_R4 = 340
    IQ4_KS_R4 = 344
    IQ5_KS_R4 = 352
    MXFP4_R8 = 353
    Q8_K_R16 = 397
    Q8_KV_R8 = 398
    Q8_K_R8 = 399


UNUSABLE_IDS: dict[int, str] = {
    4: "Q4_2, removed from ggml",
    5: "Q4_3, removed from ggml",
    31: "Q4_0_4_4, removed from ggml",
    32: "Q4_0_4_8, removed from ggml",
    33: "Q4_0_8_8, removed from ggml",
    37: "IQ4_NL_4_8, removed from ggml",
    38: "IQ4_NL_8_8, removed from ggml",
    97: "Q8_0_X4, which is for activations",
    98: "Q8_1_X4, which is for activations",
    99: "Q8_2_X4, which is for activations",
    136: "Q8_K64, which is for activations",
    142: "IQ2_TN, removed from ik_llama.cpp",
    143: "IQ1_TN, removed from ik_llama.cpp",
    147: "Q8_K16, which is for activations",
    148: "Q8_K32, which is for activations",
    149: "Q8_KR8, which is for activations",
    150: "Q8_K128, which is for activations",
}
"""Ids that once were or elsewhere are types, and that no model file can use."""


@dataclass(frozen=True)
class TypeTraits:
    """Storage of a type: ``block_size`` weights take ``block_bytes``; a row starts with
    ``row_meta_bytes``; rows come in groups of ``rows_per_group``; ``tail_bytes`` end the tensor."""

    name: str
    block_size: int
    block_bytes: int
    row_meta_bytes: int = 0
    rows_per_group: int = 1
    tail_bytes: int = 0


_SIZES: dict[str, tuple[int, int] | tuple[int, int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8),
    "I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q8_0": (32, 34), "Q8_1": (32, 36),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18),
    "Q2_0": (64, 18), "I2_S": (4, 1),
    "Q6_0": (32, 26), "IQ1_BN": (64, 13, 2), "IQ2_BN": (64, 16, 4),
    "IQ2_K": (256, 76), "IQ3_K": (256, 110), "IQ4_K": (256, 144), "IQ5_K": (256, 176), "IQ6_K": (256, 212),
    "IQ4_KS": (256, 136, 4), "IQ2_KS": (256, 70, 2), "IQ4_KSS": (256, 128, 4), "Q8_KV": (32, 32, 8),
    "IQ5_KS": (256, 168, 4), "IQ2_KT": (256, 68, 4), "IQ3_KT": (256, 100, 4), "IQ4_KT": (256, 128, 4),
    "IQ3_KS": (256, 102, 2), "IQ2_KL": (256, 86, 2), "IQ1_KT": (256, 56, 4),
    # Interleaved types whose bytes a row differ from their base type's.
    "IQ1_S_R4": (32, 6, 2), "IQ1_M_R4": (32, 7, 2), "Q8_K_R8": (256, 258), "Q8_K_R16": (256, 258),
    "Q8_KV_R8": (32, 32, 4),
}  # fmt: skip


_TAILS = {"I2_S": 32}  # one scale for the whole tensor


def _traits(type_: GGMLType) -> TypeTraits:
    name = type_.name
    base, _, group = name.rpartition("_R")
    rows = int(group) if base and group.isdigit() else 1
    block_size, block_bytes, *meta = _SIZES.get(name) or _SIZES[base]
    return TypeTraits(name, block_size, block_bytes, meta[0] if meta else 0, rows, _TAILS.get(name, 0))


TRAITS: dict[GGMLType, TypeTraits] = {type_: _traits(type_) for type_ in GGMLType}


def row_bytes(type_: GGMLType, cols: int) -> int:
    """Bytes of one row of ``cols`` weights.

    Raises:
        ValueError: ``cols`` is no multiple of the block size.
    """
    traits = TRAITS[type_]
    blocks, rest = divmod(cols, traits.block_size)
    if rest:
        raise ValueError(f"a row of {cols} is no multiple of {traits.name}'s block of {traits.block_size}")
    return traits.row_meta_bytes + blocks * traits.block_bytes


def tensor_bytes(type_: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; ``shape`` is (..., rows, cols).

    Raises:
        ValueError: the row length does not fit the block size, the rows do not fill whole groups, or the
            size takes more than 63 bits.
    """
    traits = TRAITS[type_]
    rows = math.prod(shape[:-1])
    if rows % traits.rows_per_group or (len(shape) > 1 and shape[-2] % traits.rows_per_group):
        raise ValueError(f"{rows} rows do not fill {traits.name}'s groups of {traits.rows_per_group}")
    size = rows * row_bytes(type_, shape[-1]) + traits.tail_bytes
    if size >= 1 << 63:
        raise ValueError(f"{size} bytes are more than 2^63 - 1")
    return size
