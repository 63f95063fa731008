"""`quantize` and `random_blocks`: errors bounded by each format's step, random weights as asked."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.gguf import (
    QUANTIZABLE,
    RANDOM_TYPES,
    TRAITS,
    GGMLType,
    dequantize,
    quantize,
    random_blocks,
    row_bytes,
    tensor_bytes,
)

REQUIRED = {
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0",
}  # fmt: skip
BLOCK_TYPES = sorted(t for t in QUANTIZABLE if TRAITS[t].block_size > 1)

# Root mean square error on a standard normal, in percent: what the search reaches, plus 3 %.
NORMAL_ERROR = {
    "Q4_0": 8.4, "Q4_1": 7.3, "Q5_0": 4.2, "Q5_1": 3.6, "Q8_0": 0.56, "Q2_K": 27.8, "Q3_K": 14.9, "Q4_K": 7.5,
    "Q5_K": 3.8, "Q6_K": 1.8, "IQ4_NL": 7.6, "IQ4_XS": 7.7, "MXFP4": 11.6, "TQ1_0": 59.1, "TQ2_0": 59.1,
}  # fmt: skip


def test_required_types() -> None:
    assert {GGMLType[name] for name in REQUIRED} <= QUANTIZABLE


def relative_error(values: np.ndarray, raw: np.ndarray, kind: GGMLType) -> float:
    error = values - dequantize(raw, kind, values.shape)
    return float(np.sqrt(np.mean(np.square(error)) / np.mean(np.square(values))))


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_error_on_normal_values(kind: GGMLType) -> None:
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    assert relative_error(values, quantize(values, kind), kind) < NORMAL_ERROR[kind.name] / 100


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"])
def test_no_worse_than_the_package(name: str) -> None:
    kind, theirs = GGMLType[name], gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    error = values - gguf.quants.dequantize(gguf.quants.quantize(values, theirs), theirs)
    package_error = np.sqrt(np.mean(np.square(error)) / np.mean(np.square(values)))
    assert relative_error(values, quantize(values, kind), kind) <= package_error * 1.001


@pytest.mark.parametrize("kind", sorted(QUANTIZABLE - {GGMLType.MXFP4, GGMLType.TQ1_0, GGMLType.TQ2_0}),
                         ids=lambda t: t.name)  # fmt: skip
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-8, 10), shift=st.floats(-3, 3))
def test_error_is_bounded_by_the_step(kind: GGMLType, seed: int, exponent: int, shift: float) -> None:
    """No weight is off by more than the widest step between codes at the scale of its block."""
    values = np.random.default_rng(seed).normal(shift, 1, (3, 256)).astype(np.float32) * np.float32(
        2.0**exponent
    )
    found = dequantize(quantize(values, kind), kind, values.shape)
    # Peak over the fewest codes to either side, doubled for the rounding of scales of scales.
    codes = {"Q2_K": 1, "Q3_K": 3, "IQ4_NL": 4, "IQ4_XS": 4}.get(kind.name, 7)
    assert np.abs(found - values).max() <= 2 * np.abs(values).max() / codes


@pytest.mark.parametrize("kind", sorted(QUANTIZABLE), ids=lambda t: t.name)
def test_zeros_stay_zero(kind: GGMLType) -> None:
    values = np.zeros((2, 256), dtype=np.float32)
    assert not dequantize(quantize(values, kind), kind, values.shape).any()


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda t: t.name)
def test_values_on_the_grid_are_exact(kind: GGMLType) -> None:
    """Small integers that all formats hold exactly at scale 1: -1, 0 and 1, with both ends in each group."""
    pattern = np.tile(np.array([-1, 0, 1, 1, -1, 0, 0, 1], dtype=np.float32), 64).reshape(2, 256)
    found = dequantize(quantize(pattern, kind), kind, pattern.shape)
    # A float16 scale of scales rounds by 2^-11; K formats and IQ4 do not have 1 among their multiples.
    coarse = {"Q2_K": 0.35, "Q3_K": 0.15, "IQ4_NL": 0.06, "IQ4_XS": 0.06, "Q4_1": 0.08, "Q4_K": 0.08}
    assert np.abs(found - pattern).max() <= coarse.get(kind.name, 0.04)


@pytest.mark.parametrize("kind", [GGMLType.TQ1_0, GGMLType.TQ2_0], ids=lambda t: t.name)
def test_ternary_weights_are_exact(kind: GGMLType) -> None:
    values = np.random.default_rng(3).integers(-1, 2, (4, 512)).astype(np.float32) * np.float32(0.25)
    np.testing.assert_array_equal(dequantize(quantize(values, kind), kind, values.shape), values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", sorted(QUANTIZABLE), ids=lambda t: t.name)
def test_values_that_are_not_finite(kind: GGMLType, bad: float) -> None:
    values = np.ones((2, 256), dtype=np.float32)
    values[1, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(values, kind)


@pytest.mark.parametrize("kind", sorted(QUANTIZABLE - {GGMLType.F32, GGMLType.F64, GGMLType.MXFP4}),
                         ids=lambda t: t.name)  # fmt: skip
def test_values_too_large(kind: GGMLType) -> None:
    with pytest.raises(ValueError, match="too large"):
        quantize(np.full((1, 256), -3.4e38, dtype=np.float32), kind)


def test_shapes_and_types() -> None:
    assert quantize(np.ones((2, 3, 64)), GGMLType.Q8_0).shape == (2, 3, 68)
    with pytest.raises(ValueError, match="do not fill Q8_0's blocks of 32"):
        quantize(np.ones((2, 33)), GGMLType.Q8_0)
    with pytest.raises(NotImplementedError, match="IQ2_XXS"):
        quantize(np.ones((2, 256)), GGMLType.IQ2_XXS)
    with pytest.raises(NotImplementedError, match="IQ4_KS"):
        dequantize(np.zeros(140, dtype=np.uint8), GGMLType.IQ4_KS, (1, 256))
    with pytest.raises(ValueError, match="takes 34 bytes, found 35"):
        dequantize(np.zeros(35, dtype=np.uint8), GGMLType.Q8_0, (1, 32))


@pytest.mark.parametrize("kind", sorted(RANDOM_TYPES), ids=lambda t: t.name)
@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_random_blocks(kind: GGMLType, scale: float) -> None:
    shape = (128, 2048)
    raw = random_blocks(kind, *shape, np.random.default_rng(5), scale)
    assert raw.shape == (128, row_bytes(kind, 2048)) and raw.nbytes == tensor_bytes(kind, shape)
    weights = dequantize(raw, kind, shape)
    assert np.isfinite(weights).all()
    assert abs(weights.std() / scale - 1) < 0.05
    # 1024 blocks of either sign: the mean of a block is a fraction of the deviation.
    assert abs(weights.mean()) < 0.05 * scale
    assert len(np.unique(weights)) > 2 and (weights < 0).any() and (weights > 0).any()


@pytest.mark.parametrize("kind", sorted(RANDOM_TYPES), ids=lambda t: t.name)
def test_random_blocks_follow_the_seed(kind: GGMLType) -> None:
    one, same, other = (random_blocks(kind, 4, 512, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_random_ternary_codes_are_valid() -> None:
    codes = random_blocks(GGMLType.TQ2_0, 16, 1024, np.random.default_rng(0)).reshape(-1, 66)[:, :64]
    assert all(((codes >> shift) & 3).max() == 2 for shift in (0, 2, 4, 6))


def test_random_blocks_refuse() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(NotImplementedError, match="IQ4_KS"):
        random_blocks(GGMLType.IQ4_KS, 1, 256, rng)
    with pytest.raises(ValueError, match="no multiple"):
        random_blocks(GGMLType.Q4_K, 1, 255, rng)
    for scale in (0.0, -1.0, float("nan"), float("inf"), 1e9, 1e-12):
        with pytest.raises(ValueError, match=r"scale|standard deviation"):
            random_blocks(GGMLType.Q4_K, 1, 256, rng, scale)
        with pytest.raises(ValueError, match=r"scale|standard deviation"):
            random_blocks(GGMLType.NVFP4, 1, 256, rng, scale)


class CountingGenerator:
    """Draws as numpy's generator does, and adds up what it draws."""

    def __init__(self, seed: int) -> None:
        self._rng, self.num_drawn = np.random.default_rng(seed), 0

    def __getattr__(self, name: str) -> Any:
        draw = getattr(self._rng, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            drawn = draw(*args, **kwargs)
            self.num_drawn += np.size(drawn)
            return drawn

        return counted


@pytest.mark.parametrize("kind", [GGMLType.Q4_K, GGMLType.Q4_0, GGMLType.IQ1_M], ids=lambda t: t.name)
def test_random_blocks_of_any_size_draw_one_pool(kind: GGMLType) -> None:
    """Large files are written with these: beyond the pools of 16 MiB and 2^16 scales all is copied."""
    counts = []
    for n_bytes in (32_000_000, 128_000_000):
        rng = CountingGenerator(0)
        random_blocks(kind, n_bytes // row_bytes(kind, 4096), 4096, rng)  # type: ignore[arg-type]
        counts.append(rng.num_drawn)
    pools = (16 << 20) // 8 + 2 * (1 << 16)  # eight bytes a draw; scales, and signs where there are any
    repeats = 128_000_000 // 16_000_000 + 128_000_000 // (1 << 16)  # where each copy begins
    assert counts[0] <= counts[1] <= pools + repeats
