"""Attention over the latent cache, checked and then timed beside what the machine can do at most.

Its limit is the slower of two: reading the cache once, and products of 16-bit words, of which half as many as
of 8-bit ones end in a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hybrid.kernels import cpu
from hybrid.kernels.bench import KernelError, KernelResult, Limits

FORMAT = "attention"  # what asks for these rows
_HEADS, _LATENT, _ROPE, _HEAD_DIM, _BLOCK = 16, 512, 64, 192, 64  # of DeepSeek-V2-Lite
_CASES = ((1, 4097), (512, 4608))  # new tokens, and tokens of the sequence with them
_CACHES = 32  # taken in turn with one token: several times the last-level caches
_SECONDS = 0.5
_ERROR = 2e-3  # of the root mean square, twice what standard normal numbers give


@dataclass(frozen=True)
class _Case:
    """Queries for the last tokens of one sequence, over float16 caches."""

    q: npt.NDArray[np.float32]
    q_latent: npt.NDArray[np.float32]
    caches: npt.NDArray[np.float16]
    positions: npt.NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    def run(self, pool: cpu.ThreadPool, number: int) -> npt.NDArray[np.float32]:
        length = int(self.positions[-1]) + 1
        blocks = np.arange(-(-length // _BLOCK), dtype=np.int32)
        starts, lengths = np.array([0, self.num_tokens], np.int32), np.array([length], np.int32)
        out = np.empty_like(self.q_latent)
        cpu.mla_attention(
            pool, self.q.ctypes.data, self.q_latent.ctypes.data, self.num_tokens, _HEADS, _HEAD_DIM,
            self.caches[number].ctypes.data, "f16", len(blocks), _LATENT, _ROPE,
            1, self.positions.ctypes.data, starts.ctypes.data, lengths.ctypes.data,
            blocks.ctypes.data, len(blocks), _HEAD_DIM**-0.5, out.ctypes.data,
        )  # fmt: skip
        return out


def bench_attention(pool: cpu.ThreadPool, limits: Limits) -> Iterator[KernelResult]:
    """A decoded token and a piece of a prompt, both after 4096 tokens.

    Raises:
        KernelError: results are wrong.
    """
    for new, length in _CASES:
        case = _make_case(new, length)
        error = _check(case, case.run(pool, 0))
        seconds = _time(pool, case)
        n_bytes = length * (_LATENT + _ROPE) * 2
        ops = 2 * int((case.positions + 1).sum()) * _HEADS * (2 * _LATENT + _ROPE)
        floor = max(n_bytes / limits.read_bandwidth, ops / (limits.int8_rate / 2))
        yield KernelResult(
            f"mla_attention_d{length - new}", "f16", cpu.current_isa(), pool.num_threads, new, error,
            n_bytes / seconds, ops / seconds, floor / seconds, None,
        )  # fmt: skip


def _make_case(new: int, length: int) -> _Case:
    rng = np.random.default_rng(new)
    shape = -(-length // _BLOCK) * _BLOCK, _LATENT + _ROPE
    first = rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
    return _Case(
        rng.standard_normal((new, _HEADS, _HEAD_DIM), dtype=np.float32),
        rng.standard_normal((new, _HEADS, _LATENT), dtype=np.float32),
        np.repeat(first[None], _CACHES if new == 1 else 1, axis=0),
        np.arange(length - new, length, dtype=np.int32),
    )


def _check(case: _Case, found: npt.NDArray[np.float32]) -> float:
    """The root mean square error of the last token, relative to float64."""
    keys = case.caches[0, : case.positions[-1] + 1].astype(np.float64)
    query = np.concatenate([case.q_latent[-1], case.q[-1, :, -_ROPE:]], -1).astype(np.float64)
    scores = query @ keys.T * _HEAD_DIM**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights @ keys[:, :_LATENT] / weights.sum(-1, keepdims=True)
    error = float(np.sqrt(((found[-1] - expected) ** 2).mean() / (expected**2).mean()))
    if not error <= _ERROR:
        raise KernelError(f"mla_attention with {case.num_tokens} tokens is wrong: off by {error:.2e}")
    return error


def _time(pool: cpu.ThreadPool, case: _Case) -> float:
    """Median seconds of a call."""
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 5 or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        case.run(pool, len(samples) % len(case.caches))
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
