"""Sizes of every type: the package's for mainline ones, the format notes' bits per weight for the others."""

from __future__ import annotations

from fractions import Fraction

import gguf
import pytest

from hybrid.gguf import TRAITS, GGMLType, row_bytes, tensor_bytes
from hybrid.gguf.types import UNUSABLE_IDS

# Name: id, block, bytes a block, row meta, bits a weight without the row meta (ik_llama.cpp, ggml-common.h).
IK_TYPES = {
    "Q6_0": (133, 32, 26, 0, "6.5"), "IQ1_BN": (134, 64, 13, 2, "1.625"), "IQ2_BN": (135, 64, 16, 4, "2"),
    "IQ2_K": (137, 256, 76, 0, "2.375"), "IQ3_K": (138, 256, 110, 0, "3.4375"),
    "IQ4_K": (139, 256, 144, 0, "4.5"), "IQ5_K": (140, 256, 176, 0, "5.5"),
    "IQ6_K": (141, 256, 212, 0, "6.625"), "IQ4_KS": (144, 256, 136, 4, "4.25"),
    "IQ2_KS": (145, 256, 70, 2, "2.1875"), "IQ4_KSS": (146, 256, 128, 4, "4"), "Q8_KV": (151, 32, 32, 8, "8"),
    "IQ5_KS": (152, 256, 168, 4, "5.25"), "IQ2_KT": (153, 256, 68, 4, "2.125"),
    "IQ3_KT": (154, 256, 100, 4, "3.125"), "IQ4_KT": (155, 256, 128, 4, "4"),
    "IQ3_KS": (156, 256, 102, 2, "3.1875"), "IQ2_KL": (157, 256, 86, 2, "2.6875"),
    "IQ1_KT": (158, 256, 56, 4, "1.75"), "IQ1_S_R4": (219, 32, 6, 2, "1.5"),
    "IQ1_M_R4": (229, 32, 7, 2, "1.75"), "Q8_KV_R8": (398, 32, 32, 4, "8"),
    "Q8_K_R8": (399, 256, 258, 0, "8.0625"), "Q8_K_R16": (397, 256, 258, 0, "8.0625"),
}  # fmt: skip

# Interleaved types that are their base type in another order.
INTERLEAVED = {
    "Q4_0_R8": 202, "Q5_0_R4": 206, "Q8_0_R8": 208, "Q2_K_R4": 210, "Q3_K_R4": 211, "Q4_K_R4": 212,
    "Q5_K_R4": 213, "Q6_K_R4": 214, "IQ2_XXS_R4": 216, "IQ2_XS_R4": 217, "IQ3_XXS_R4": 218, "IQ4_NL_R4": 220,
    "IQ3_S_R4": 221, "IQ2_S_R4": 222, "IQ4_XS_R8": 223, "BF16_R16": 230, "Q6_0_R4": 233, "IQ2_BN_R4": 335,
    "IQ2_K_R4": 337, "IQ3_K_R4": 338, "IQ4_K_R4": 339, "IQ5_K_R4": 340, "IQ4_KS_R4": 344, "IQ5_KS_R4": 352,
    "MXFP4_R8": 353,
}  # fmt: skip


@pytest.mark.parametrize("theirs", list(gguf.GGMLQuantizationType), ids=lambda t: t.name)
def test_mainline_sizes_equal_the_package(theirs: gguf.GGMLQuantizationType) -> None:
    ours = GGMLType(int(theirs))
    assert ours.name == theirs.name
    sizes = TRAITS[ours].block_size, TRAITS[ours].block_bytes
    # ggml's block_q8_1 has two float16 before the codes, the package counts two float32.
    assert sizes == ((32, 36) if theirs.name == "Q8_1" else gguf.GGML_QUANT_SIZES[theirs])
    assert (TRAITS[ours].row_meta_bytes, TRAITS[ours].rows_per_group) == (0, 1)


@pytest.mark.parametrize("name", IK_TYPES)
def test_row_meta_types(name: str) -> None:
    number, block, block_bytes, meta, bits = IK_TYPES[name]
    traits = TRAITS[GGMLType(number)]
    assert (traits.name, traits.block_size, traits.block_bytes, traits.row_meta_bytes) == (
        name,
        block,
        block_bytes,
        meta,
    )
    assert Fraction(8 * block_bytes, block) == Fraction(bits)
    assert row_bytes(GGMLType(number), 2 * block) == meta + 2 * block_bytes


@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_types_take_their_base_types_bytes(name: str) -> None:
    kind = GGMLType(INTERLEAVED[name])
    base, _, group = name.rpartition("_R")
    assert kind.name == name and TRAITS[kind].rows_per_group == int(group)
    shape = (3, int(group) * 2, 512)
    assert tensor_bytes(kind, shape) == tensor_bytes(GGMLType[base], shape)
    with pytest.raises(ValueError, match="groups"):
        tensor_bytes(kind, (3, int(group) + 1, 512))


def test_every_type_is_checked_here() -> None:
    mainline = {t.name for t in gguf.GGMLQuantizationType} | {"Q2_0", "I2_S"}
    assert {t.name for t in GGMLType} == mainline | IK_TYPES.keys() | INTERLEAVED.keys()
    assert not UNUSABLE_IDS.keys() & {int(t) for t in GGMLType}


def test_row_meta_counts_once_a_row() -> None:
    """A loader that multiplies bits by elements gets 3 x 7 x 4 bytes too few here."""
    assert tensor_bytes(GGMLType.IQ4_KS, (3, 7, 512)) == 3 * 7 * (4 + 2 * 136)


def test_i2_s_has_one_scale_for_the_tensor() -> None:
    assert tensor_bytes(GGMLType.I2_S, (10, 64)) == 10 * 64 // 4 + 32
