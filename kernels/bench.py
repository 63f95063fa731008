"""Every row of the kernel table, checked and then timed beside what the machine can do at most.

The CPU's rows are here; those of a GPU, which follow its registry, in `hybrid.kernels.gpu.bench`.

Decoding is bound by reading weights, prompts by int8 products: a row with one token stands beside the read
bandwidth of RAM, one with many beside the rate of int8 products, both measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from hybrid.kernels import cpu

if TYPE_CHECKING:
    from hybrid.kernels.cpu._cpu import KernelRow

TOKENS = (1, 4, 48)  # one sequence, a few, an expert's share of a prompt
_ROWS, _COLS = 1408, 2048  # an expert of DeepSeek-V2-Lite; padded to whole blocks of every format
_BYTES = 256 << 20  # of weights read in turn with one token: several times the last-level caches
_CACHED_BYTES = 640 << 10  # less than the second-level cache of any core of the last years but the smallest
_SECONDS = 0.1
_REGION, _LIMIT_SECONDS = 1 << 30, 1.0

RandomRows = Callable[[int, int, int], npt.NDArray[np.uint8]]
"""``(ggml_type, rows, cols)`` -> the bytes of random finite weights, as a file holds them."""


@dataclass(frozen=True)
class Limits:
    """Bytes a second read from RAM, and int8 operations a second (a product and a sum are two)."""

    read_bandwidth: float
    int8_rate: float


@dataclass(frozen=True)
class KernelResult:
    """One row of the table with so many tokens.

    Attributes:
        error: largest difference from float64 products of the same weights and of activations rounded as the
            kernel does, over the largest result.
        bytes_s, ops_s: weights read and operations done in a second.
        limit_fraction: share of the read bandwidth (one token) or of the int8 rate (more).
        cached_bytes_s: bytes, as the file has them, of weights in its second-level cache that one thread
            multiplies with one token in a second of processor time; ``None`` with more tokens.
    """

    name: str
    format: str
    isa: str
    num_threads: int
    num_tokens: int
    error: float
    bytes_s: float
    ops_s: float
    limit_fraction: float
    cached_bytes_s: float | None


class KernelError(Exception):
    """A kernel's results are wrong; its speed means nothing."""


def measure_limits(pool: cpu.ThreadPool) -> Limits:
    """Of the current ISA and all threads of the pool."""
    return Limits(
        cpu.measure_read_bandwidth(pool, _REGION, _LIMIT_SECONDS), cpu.measure_int8_rate(pool, _LIMIT_SECONDS)
    )


def bench_kernels(
    pool: cpu.ThreadPool,
    limits: Limits,
    random_rows: RandomRows,
    *,
    formats: Sequence[str] = (),
    tokens: Sequence[int] = TOKENS,
) -> Iterator[KernelResult]:
    """Results of the rows that the current ISA computes with, all of them or those of ``formats``.

    Raises:
        KernelError: a row fails its check.
    """
    for row in cpu.kernel_rows():
        chosen = row["name"] == cpu.kernel_name(row["ggml_type"], cpu.current_isa())
        if chosen and (not formats or row["format"] in formats):
            yield from _bench_row(pool, limits, row, random_rows, tokens)


def _bench_row(
    pool: cpu.ThreadPool,
    limits: Limits,
    row: KernelRow,
    random_rows: RandomRows,
    tokens: Sequence[int],
) -> Iterator[KernelResult]:
    cols = -(-_COLS // row["block_cols"]) * row["block_cols"]
    matrix = cpu.PackedMatrix(row["ggml_type"], 1, _ROWS, cols)
    stack = cpu.PackedMatrix(row["ggml_type"], max(2, _BYTES // matrix.nbytes), _ROWS, cols)
    data = random_rows(row["ggml_type"], _ROWS, cols)
    matrix.pack_rows(pool, 0, 0, _ROWS, data.ctypes.data)
    for index in range(stack.batch):
        stack.pack_rows(pool, index, 0, _ROWS, data.ctypes.data)
    for count in tokens:
        x = np.random.default_rng(count).standard_normal((count, cols), dtype=np.float32)
        error = _check(pool, row, matrix, x)
        # With one token all of the stack is read; with more, arithmetic is the limit.
        target = stack if count == 1 else matrix
        seconds = _time(pool, target, x)
        weights = target.batch * _ROWS * cols
        bytes_s, ops_s = target.nbytes / seconds, 2 * weights * count / seconds
        fraction = bytes_s / limits.read_bandwidth if count == 1 else ops_s / limits.int8_rate
        yield KernelResult(
            row["name"], row["format"], row["isa"], pool.num_threads, count, error, bytes_s, ops_s, fraction,
            _cached_bytes_s(row, random_rows, x) if count == 1 else None,
        )  # fmt: skip


def _cached_bytes_s(row: KernelRow, random_rows: RandomRows, x: npt.NDArray[np.float32]) -> float:
    """Processor time, unlike the clock, does not count what other processes take."""
    cols = x.shape[1]
    num_rows = max(
        16, _CACHED_BYTES * 16 // cpu.PackedMatrix(row["ggml_type"], 1, 16, cols).nbytes // 16 * 16
    )
    pool = cpu.ThreadPool(1)  # the calling thread
    data = random_rows(row["ggml_type"], num_rows, cols)
    matrix = cpu.PackedMatrix(row["ggml_type"], 1, num_rows, cols)
    matrix.pack_rows(pool, 0, 0, num_rows, data.ctypes.data)
    return data.nbytes / _time(pool, matrix, x, time.thread_time)


def _check(
    pool: cpu.ThreadPool, row: KernelRow, matrix: cpu.PackedMatrix, x: npt.NDArray[np.float32]
) -> float:
    """The error of a product, checked against one in float64 of the same weights and rounded activations."""
    ids = np.arange(matrix.rows, dtype=np.int32)
    weights = np.empty((matrix.rows, matrix.cols), np.float32)
    cpu.gather_rows(pool, matrix, ids.ctypes.data, len(ids), weights.ctypes.data)
    found = _multiply(pool, matrix, x)[:, 0]
    taken = (_rounded(x) if row["activation"] == "q8" else x).astype(np.float64)
    expected = taken @ weights.T.astype(np.float64)
    scale = float(np.abs(expected).max())
    error = float(np.abs(found - expected).max()) / scale
    # A rounding of each product and sum.
    terms = np.abs(taken) @ np.abs(weights.T).astype(np.float64)
    allowed = (matrix.cols + 2) * float(np.finfo(np.float32).eps) * float(terms.max()) / scale
    if not error <= allowed:
        raise KernelError(
            f"{row['name']} with {len(x)} tokens is wrong: off by {error:.2e} of the largest result, "
            f"where rounding explains {allowed:.2e}"
        )
    return error


def _rounded(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What kernels of quantised weights see of activations: int8 with one scale for 256 columns."""
    num_tokens, cols = x.shape
    padded, blocks = -(-cols // 64) * 64, -(-cols // 256)
    out = np.empty_like(x)
    for token in range(num_tokens):
        codes, scales = np.empty(padded, np.int8), np.empty(blocks, np.float32)
        sums = np.empty(padded // 16, np.int16)
        cpu.quantize_activations(
            x[token].ctypes.data, cols, codes.ctypes.data, scales.ctypes.data, sums.ctypes.data
        )
        out[token] = codes[:cols] * np.repeat(scales, 256)[:cols]
    return out


def _multiply(
    pool: cpu.ThreadPool, matrix: cpu.PackedMatrix, x: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """``[T, cols] -> [T, batch, rows]``, the same tokens by every matrix of the stack."""
    out = np.full((len(x), matrix.batch, matrix.rows), np.nan, np.float32)
    cpu.linear_batched(
        pool, matrix, x.ctypes.data, len(x), matrix.cols, 0,
        out.ctypes.data, matrix.batch * matrix.rows, matrix.rows,
    )  # fmt: skip
    return out


def _time(
    pool: cpu.ThreadPool,
    matrix: cpu.PackedMatrix,
    x: npt.NDArray[np.float32],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median seconds of a product."""
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 5 or time.perf_counter() - begin < _SECONDS:
        start = clock()
        _multiply(pool, matrix, x)
        samples.append(clock() - start)
    return statistics.median(samples)
