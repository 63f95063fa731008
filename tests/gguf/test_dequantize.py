"""`dequantize` gives the bits of the gguf package, for random bytes and so for any scale."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.gguf import DEQUANTIZABLE, TRAITS, GGMLType, dequantize, tensor_bytes

# Q1_0 has no decoder in the gguf package; the wide integers and F64 are plain casts there.
PACKAGE_TYPES = sorted(
    t for t in DEQUANTIZABLE if t.name[0] != "I" or t.name.startswith("IQ") if t.name not in ("Q1_0", "F64")
)
REQUIRED = {
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4",
}  # fmt: skip


def package_dequantize(raw: np.ndarray, kind: GGMLType, shape: tuple[int, ...]) -> np.ndarray:
    quant = gguf.GGMLQuantizationType(int(kind))
    rows = raw.reshape(-1, raw.size // int(np.prod(shape[:-1])))
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, quant).astype(np.float32).reshape(shape)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """NaN payloads may differ: which operand's payload survives is up to the processor."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    bits = found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan]
    np.testing.assert_array_equal(*bits)


def test_every_mainline_type_is_covered() -> None:
    assert {GGMLType[name] for name in REQUIRED} <= set(PACKAGE_TYPES)


@pytest.mark.parametrize("kind", PACKAGE_TYPES, ids=lambda t: t.name)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 3))
def test_bits_equal_the_package(kind: GGMLType, seed: int, rows: int, blocks: int) -> None:
    shape = (rows, blocks * TRAITS[kind].block_size)
    raw = np.random.default_rng(seed).integers(0, 256, tensor_bytes(kind, shape), dtype=np.uint8)
    assert_same_bits(dequantize(raw, kind, shape), package_dequantize(raw, kind, shape))


@pytest.mark.parametrize("kind", PACKAGE_TYPES, ids=lambda t: t.name)
def test_bits_equal_the_package_over_many_blocks(kind: GGMLType) -> None:
    """More weights than one step of the decoder takes, every code of the wide code books among them."""
    shape = (3, 6, 100 * 256)
    raw = np.random.default_rng(7).integers(0, 256, tensor_bytes(kind, shape), dtype=np.uint8)
    assert_same_bits(dequantize(raw, kind, shape), package_dequantize(raw, kind, shape))
