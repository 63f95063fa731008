"""Choosing scales: the codes of a group are tried for a few scales, and the best least-squares fit stays.

A group is a row of ``x``, ``float32`` [n, width]; scales are ``float32`` [n, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid.gguf.codebooks import IQ4_NL_VALUES
from hybrid.gguf.fields import F32, U8

_TINY = np.float32(1e-30)


def inverse(d: F32) -> F32:
    """1 / d, and 0 where d is 0."""
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > _TINY)


def round_clip(x: F32, low: int, high: int) -> F32:
    return np.clip(np.rint(x), low, high)


def f16_round(d: F32) -> F32:
    """Rounds to what a float16 field can hold.

    Raises:
        ValueError: too large for float16.
    """
    with np.errstate(over="ignore"):
        stored = d.astype(np.float16).astype(np.float32)
    if np.isinf(stored).any():
        raise ValueError(f"a block scale of {np.abs(d).max():g} is too large for float16")
    return stored


def _peak(x: F32) -> F32:
    """The value of largest magnitude in each group."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)


@dataclass(frozen=True)
class Grid:
    """Sorted values, in uneven steps, that codes stand for."""

    values: F32

    def nearest(self, x: F32) -> U8:
        """Codes of the nearest values."""
        return np.searchsorted((self.values[1:] + self.values[:-1]) / 2, x).astype(np.uint8)


IQ4_NL_GRID = Grid(IQ4_NL_VALUES)


def fit_integers(x: F32, low: int, high: int) -> F32:
    """Scales d for x ~ d * q with integers q from ``low`` (negative) to ``high``.

    The largest value meets ``low``, so d may be negative.
    """
    steps = np.array([0.5, 0.6, 0.75, 1.0]) if low == -1 else 1 + np.arange(-8, 9) * 0.1 / abs(low)
    inverse_peak = inverse(_peak(x))
    best_gain = np.full((len(x), 1), -1, dtype=np.float32)
    best = np.zeros((len(x), 1), dtype=np.float32)
    for step in steps.astype(np.float32):
        q = round_clip(x * (inverse_peak * (low * step)), low, high)
        best, best_gain = _keep_better(x, q, best, best_gain)
    return best


def fit_grid(x: F32, grid: Grid) -> F32:
    """Scales d for x ~ d * v with v from a grid."""
    inverse_peak = inverse(_peak(x))
    best_gain = np.full((len(x), 1), -1, dtype=np.float32)
    best = np.zeros((len(x), 1), dtype=np.float32)
    for extreme in (grid.values[0], grid.values[-1]):
        for step in np.arange(0.9, 1.2, 0.05, dtype=np.float32):
            v = grid.values[grid.nearest(x * (inverse_peak * (extreme * step)))]
            best, best_gain = _keep_better(x, v, best, best_gain)
    return best


def _keep_better(x: F32, v: F32, best: F32, best_gain: F32) -> tuple[F32, F32]:
    """For fixed v the best d is (x.v)/(v.v), and lowers the squared error by (x.v)^2/(v.v)."""
    cross = np.einsum("ij,ij->i", x, v)[:, None]
    norm = np.einsum("ij,ij->i", v, v)[:, None]
    d = cross * inverse(norm)
    gain = cross * d
    better = gain > best_gain
    return np.where(better, d, best), np.where(better, gain, best_gain)


def fit_affine(x: F32, high: int, *, max_low: float | None = None) -> tuple[F32, F32]:
    """Scales d >= 0 and offsets for x ~ d * q + low with q from 0 to ``high``.

    ``max_low`` bounds the offset from above (the K formats store its negative, unsigned).
    """
    top = x.max(axis=1, keepdims=True)
    bottom = x.min(axis=1, keepdims=True)
    if max_low is not None:
        bottom = np.minimum(bottom, np.float32(max_low))
    span = top - bottom
    best_d, best_low = span / np.float32(high), bottom
    best_error = _affine_error(x, best_d, best_low, high)
    for step in np.arange(-5, 7, dtype=np.float32) * np.float32(0.1):
        q = round_clip((x - bottom) * (inverse(span) * (high + step)), 0, high)
        d, low = _solve_affine(x, q)
        if max_low is not None:
            over = low > max_low
            free = np.einsum("ij,ij->i", x - np.float32(max_low), q)[:, None]
            bound = free * inverse(np.einsum("ij,ij->i", q, q)[:, None])
            d, low = np.where(over, bound, d), np.where(over, np.float32(max_low), low)
        error = _affine_error(x, d, low, high)
        better = (error < best_error) & (d > 0)
        best_d, best_low = np.where(better, d, best_d), np.where(better, low, best_low)
        best_error = np.where(better, error, best_error)
    return best_d, best_low


def _solve_affine(x: F32, q: F32) -> tuple[F32, F32]:
    """Least squares for fixed q."""
    q_mean, x_mean = q.mean(axis=1, keepdims=True), x.mean(axis=1, keepdims=True)
    q_off = q - q_mean
    d = np.einsum("ij,ij->i", q_off, x)[:, None] * inverse(np.einsum("ij,ij->i", q_off, q_off)[:, None])
    return d, x_mean - d * q_mean


def _affine_error(x: F32, d: F32, low: F32, high: int) -> F32:
    q = round_clip((x - low) * inverse(d), 0, high)
    error: F32 = np.square(x - d * q - low).sum(axis=1, keepdims=True)
    return error
