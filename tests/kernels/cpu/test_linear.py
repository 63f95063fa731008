"""Every row of the kernel table through `linear`, `linear_batched` and `gather_rows`.

The reference rounds activations in numpy, dequantises the weights with `hybrid.gguf` and multiplies in
float64. What a kernel may add to that is the rounding of its sums, bounded by `eps * (k + 1) * max²`;
one wrong code would cost more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import GGMLType, dequantize, random_blocks

pytestmark = pytest.mark.usefixtures("restored_isa")

EPS = float(np.finfo(np.float32).eps)
ROWS = [row for row in cpu.kernel_rows() if row["supported"]]
FORMATS = sorted({row["format"] for row in ROWS})
TOKENS = 33
Pack = Callable[[int, np.ndarray, int], cpu.PackedMatrix]


def widths(row: dict[str, Any]) -> list[int]:
    """One block, two, five; rows that are no multiple of 256 where the format has them."""
    block = row["block_cols"]
    odd = [32, 96, 288, 1408] if block <= 32 else []
    return [block, 2 * block, 5 * block, *odd]


def weights(kind: GGMLType, rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """GGUF bytes ``[rows, row_bytes]`` and the values they stand for."""
    raw = random_blocks(kind, rows, cols, np.random.default_rng(seed))
    return raw, dequantize(raw.reshape(-1), kind, (rows, cols))


def activations(tokens: int, cols: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """What int8 codes and one scale for 256 columns leave of x, in float64."""
    out = np.zeros(x.shape)
    for start in range(0, x.shape[1], 256):
        block = x[:, start : start + 256]
        largest = np.abs(block).max(1, keepdims=True)
        codes = np.rint(block * (np.float32(127) / largest)).astype(np.float64)
        out[:, start : start + 256] = codes * (largest / np.float32(127)).astype(np.float64)
    return out


def run_linear(pool: cpu.ThreadPool, matrix: cpu.PackedMatrix, x: np.ndarray) -> np.ndarray:
    """`linear` into NaN with four guard columns, from rows with a stride, over poisoned scratch."""
    tokens, cols = x.shape
    strided = np.full((tokens, cols + 3), np.nan, np.float32)
    strided[:, :cols] = x
    out = np.full((tokens, matrix.rows + 4), np.nan, np.float32)
    cpu.fill_scratch(0xFF)
    cpu.linear(pool, matrix, strided.ctypes.data, tokens, cols + 3, out.ctypes.data, matrix.rows + 4)
    assert np.isnan(out[:, matrix.rows :]).all()
    return out[:, : matrix.rows].copy()


def test_kernels_of_this_host_are_tested() -> None:
    assert {row["isa"] for row in ROWS} == set(cpu.supported_isas())
    assert len(ROWS) >= 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_linear(row: dict[str, Any], pool: cpu.ThreadPool, pack: Pack) -> None:
    kind = GGMLType(row["ggml_type"])
    cpu.select_isa(row["isa"])
    for cols in widths(row):
        x = activations(TOKENS, cols)
        used = rounded(x) if row["activation"] == "q8" else x.astype(np.float64)
        for num_rows in (1, 15, 16, 17, 40):
            raw, w = weights(kind, num_rows, cols)
            out = run_linear(pool, pack(kind, raw, cols), x)
            bound = EPS * (cols + 1) * np.abs(w).max() * np.abs(used).max()
            np.testing.assert_allclose(out, used @ w.astype(np.float64).T, rtol=0, atol=bound)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_the_same_everywhere(name: str, pack: Pack) -> None:
    kind = GGMLType[name]
    raw, _ = weights(kind, 40, 512)
    matrix = pack(kind, raw, 512)
    x = activations(TOKENS, 512)
    first: np.ndarray | None = None
    for isa in cpu.supported_isas():
        cpu.select_isa(isa)
        for threads in (1, 2, 3):
            pool = cpu.ThreadPool(threads)
            whole = run_linear(pool, matrix, x)
            if first is None:
                first = whole
            assert whole.tobytes() == first.tobytes(), (isa, threads)
        assert first is not None
        for tokens in range(1, 10):
            assert run_linear(pool, matrix, x[:tokens]).tobytes() == first[:tokens].tobytes(), (isa, tokens)
    assert first is not None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_many_tokens_give_the_bits_of_one(row: dict[str, Any], pool: cpu.ThreadPool, pack: Pack) -> None:
    """Tiles of tokens, their ragged end, and what is left after the last full one."""
    kind = GGMLType(row["ggml_type"])
    cpu.select_isa(row["isa"])
    for cols in widths(row)[-2:]:
        matrix = pack(kind, weights(kind, 49, cols)[0], cols)
        x = activations(135, cols)
        alone = np.concatenate([run_linear(pool, matrix, x[t : t + 1]) for t in range(len(x))])
        for tokens in (8, 11, 128, 131, 135):
            assert run_linear(pool, matrix, x[:tokens]).tobytes() == alone[:tokens].tobytes(), (cols, tokens)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_gather_rows_equals_dequantize(row: dict[str, Any], pool: cpu.ThreadPool, pack: Pack) -> None:
    kind = GGMLType(row["ggml_type"])
    cpu.select_isa(row["isa"])
    ids = np.array([39, 0, 16, 15, 38, 0], np.int32)
    for cols in widths(row):
        raw, w = weights(kind, 40, cols)
        out = np.full((len(ids), cols), np.nan, np.float32)
        cpu.gather_rows(pool, pack(kind, raw, cols), ids.ctypes.data, len(ids), out.ctypes.data)
        np.testing.assert_array_equal(out, w[ids])


@pytest.mark.parametrize("name", FORMATS)
def test_batched_equals_one_by_one(name: str, pool: cpu.ThreadPool, pack: Pack) -> None:
    kind, batch, rows, cols, tokens = GGMLType[name], 3, 17, 256, 5
    stack = np.stack([weights(kind, rows, cols, seed=b)[0] for b in range(batch)])
    x = np.random.default_rng(5).standard_normal((tokens, batch, cols + 8)).astype(np.float32)
    out = np.full((tokens, batch, rows + 2), np.nan, np.float32)
    cpu.linear_batched(
        pool,
        pack(kind, stack, cols),
        x.ctypes.data,
        tokens,
        x.shape[1] * x.shape[2],
        x.shape[2],
        out.ctypes.data,
        out.shape[1] * out.shape[2],
        out.shape[2],
    )
    assert np.isnan(out[..., rows:]).all()
    for b in range(batch):
        alone = run_linear(pool, pack(kind, stack[b], cols), np.ascontiguousarray(x[:, b, :cols]))
        assert alone.tobytes() == np.ascontiguousarray(out[:, b, :rows]).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "Q6_K", "IQ4_XS", "F32", "BF16"])
def test_what_is_not_finite_stays_alone(name: str, bad: float, pool: cpu.ThreadPool, pack: Pack) -> None:
    kind = GGMLType[name]
    raw, _ = weights(kind, 17, 512)
    matrix = pack(kind, raw, 512)
    x = activations(3, 512)
    clean = run_linear(pool, matrix, x)
    x[1, 300] = bad
    for isa in cpu.supported_isas():
        cpu.select_isa(isa)
        out = run_linear(pool, matrix, x)
        assert not np.isfinite(out[1]).any()
        assert out[[0, 2]].tobytes() == clean[[0, 2]].tobytes()


def test_no_tokens_write_nothing(pool: cpu.ThreadPool, pack: Pack) -> None:
    raw, _ = weights(GGMLType.Q8_0, 16, 32)
    matrix = pack(GGMLType.Q8_0, raw, 32)
    cpu.linear(pool, matrix, 0, 0, 32, 0, 16)
    cpu.gather_rows(pool, matrix, 0, 0, 0)


def test_bad_arguments(pool: cpu.ThreadPool, pack: Pack) -> None:
    raw, _ = weights(GGMLType.Q8_0, 40, 64)
    matrix, stack = pack(GGMLType.Q8_0, raw, 64), pack(GGMLType.Q8_0, np.stack([raw, raw]), 64)
    x, out = np.zeros((4, 64), np.float32), np.full((4, 40), np.nan, np.float32)
    xp, op = x.ctypes.data, out.ctypes.data
    for arguments, message in [
        ((matrix, 0, 4, 64, op, 40), "`x` is null"),
        ((matrix, xp, 4, 64, 0, 40), "`out` is null"),
        ((matrix, xp + 1, 4, 64, op, 40), "aligned"),
        ((matrix, xp, -1, 64, op, 40), "must not be negative"),
        ((matrix, xp, 2**40, 64, op, 40), "32 bits"),
        ((matrix, xp, 4, 63, op, 40), "token stride of x"),
        ((matrix, xp, 4, 64, op, 39), "token stride of out"),
        ((stack, xp, 1, 64, op, 40), "stack of 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu.linear(pool, *arguments)
    with pytest.raises(ValueError, match="batch stride"):
        cpu.linear_batched(pool, stack, xp, 2, 128, 64, op, 80, 39)
    ids = np.array([0, 40], np.int32)
    with pytest.raises(ValueError, match="id 40 at position 1"):
        cpu.gather_rows(pool, matrix, ids.ctypes.data, 2, op)
    ids[1] = -1
    with pytest.raises(ValueError, match="id -1 at position 1"):
        cpu.gather_rows(pool, matrix, ids.ctypes.data, 2, op)
    assert np.isnan(out).all()


def test_scratch_does_not_grow_with_calls(pool: cpu.ThreadPool, pack: Pack) -> None:
    raw, _ = weights(GGMLType.Q4_K, 40, 512)
    matrix, x = pack(GGMLType.Q4_K, raw, 512), activations(TOKENS, 512)
    run_linear(pool, matrix, x)
    before = cpu.scratch_bytes()
    for tokens in (1, TOKENS, 5, TOKENS):
        run_linear(pool, matrix, x[:tokens])
    assert cpu.scratch_bytes() == before
