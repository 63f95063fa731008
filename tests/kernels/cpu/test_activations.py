"""Rounding activations to int8 against numpy, on every ISA."""

from __future__ import annotations

import numpy as np
import pytest
from hybrid.kernels import cpu

pytestmark = pytest.mark.usefixtures("restored_isa")


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and sums of a row, written between guard bytes."""
    cols = len(x)
    padded = -(-cols // 64) * 64
    codes = np.full(padded + 64, 99, np.int8)
    scales = np.full(-(-cols // 256) + 1, 99, np.float32)
    sums = np.full(padded // 16 + 1, 9999, np.int16)
    cpu.quantize_activations(x.ctypes.data, cols, codes.ctypes.data, scales.ctypes.data, sums.ctypes.data)
    assert (codes[padded:] == 99).all()
    assert scales[-1] == 99
    assert sums[-1] == 9999
    return codes[:padded], scales[:-1], sums[:-1]


def model(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    padded = np.zeros(-(-len(x) // 64) * 64, np.float32)
    padded[: len(x)] = x
    codes = np.zeros(len(padded), np.int8)
    scales = np.zeros(-(-len(x) // 256), np.float32)
    for i, start in enumerate(range(0, len(padded), 256)):
        block = padded[start : start + 256]
        largest = np.abs(block).max()
        if not np.isfinite(largest):
            scales[i] = np.nan
            continue
        scales[i] = largest / np.float32(127)
        if largest >= np.float32(2.0**-120):
            codes[start : start + 256] = np.rint(block * (np.float32(127) / largest)).astype(np.int8)
    return codes, scales, codes.reshape(-1, 16).sum(1).astype(np.int16)


def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    normal = {
        f"normal-{n}": rng.standard_normal(n).astype(np.float32) for n in (1, 5, 32, 96, 256, 257, 288, 1408)
    }
    one_nan = rng.standard_normal(600).astype(np.float32)
    one_nan[300] = np.nan
    infinity = rng.standard_normal(300).astype(np.float32)
    infinity[299] = -np.inf
    ties = (np.arange(256, dtype=np.float32) - 127.5).astype(np.float32)
    ties[0] = 127
    return normal | {
        "zeros": np.zeros(288, np.float32),
        "nan": one_nan,
        "infinity": infinity,
        "ties": ties,
        "largest": np.float32(3.4e38) * rng.uniform(-1, 1, 256).astype(np.float32),
        "subnormal": np.full(64, 1e-40, np.float32),
        "just-above-zero": np.full(64, 2.0**-120, np.float32),
    }


@pytest.mark.parametrize("name", list(rows()))
def test_equals_the_model_on_every_isa(name: str) -> None:
    x = rows()[name]
    expected = model(x)
    tested = 0
    for isa in cpu.supported_isas():
        cpu.select_isa(isa)
        for found, wanted in zip(quantize(x), expected, strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=isa)
        tested += 1
    assert tested > 0


def test_bad_arguments() -> None:
    x = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match="cols"):
        cpu.quantize_activations(x.ctypes.data, 0, x.ctypes.data, x.ctypes.data, x.ctypes.data)
    with pytest.raises(ValueError, match="null"):
        cpu.quantize_activations(0, 64, x.ctypes.data, x.ctypes.data, x.ctypes.data)
    with pytest.raises(ValueError, match="aligned"):
        cpu.quantize_activations(x.ctypes.data + 2, 32, x.ctypes.data, x.ctypes.data, x.ctypes.data)
