"""Perplexity of a text, and the divergence from another run's log-probabilities.

The convention is llama-perplexity's, so that figures compare: the text's tokens are cut into
windows of ``n_ctx`` that share nothing, the rest is dropped; the first token of each window is
replaced by BOS where the vocabulary asks for one; positions ``n_ctx / 2`` to ``n_ctx - 2`` of each
window predict the token after them and are scored, the earlier ones are context.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hybrid.errors import ModelError, RequestError
from hybrid.logprob_file import LogprobKey, LogprobReader, LogprobWriter

_ROWS_AT_ONCE = 16  # bounds the float64 temporaries: 16 rows of 130,000 tokens are 17 MB

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class LogitSource(Protocol):
    """A model, seen from here."""

    @property
    def vocab_size(self) -> int: ...

    def logits(self, token_ids: npt.NDArray[np.int32], first: int) -> Iterator[Array]:
        """Logits of positions ``first`` to ``len - 2`` of a fresh sequence, in pieces ``[n, vocab_size]``."""
        ...


@dataclass
class Moments:
    """Mean of a stream of values and the standard error of that mean."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Doubles) -> None:
        self.count += values.size
        self.total += float(values.sum())
        self.squares += float((values * values).sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def error(self) -> float:
        if self.count < 2:
            return math.nan
        variance = max(0.0, self.squares / self.count - self.mean**2)
        return math.sqrt(variance / (self.count - 1))


@dataclass
class Estimate:
    """Results by now. The divergence fields stay empty without a base to compare with."""

    num_windows: int
    windows_done: int = 0
    nll: Moments = field(default_factory=Moments)
    base_nll: Moments = field(default_factory=Moments)
    nll_change: Moments = field(default_factory=Moments)
    kl: Moments = field(default_factory=Moments)
    same_top: Moments = field(default_factory=Moments)
    kl_values: list[Doubles] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.mean)

    @property
    def perplexity_error(self) -> float:
        return self.perplexity * self.nll.error

    @property
    def compares(self) -> bool:
        return self.kl.count > 0

    def report(self) -> dict[str, Any]:
        """Plain JSON values; the keys are part of the command line's interface."""
        result: dict[str, Any] = {
            "chunks": self.windows_done,
            "tokens_scored": self.nll.count,
            "perplexity": self.perplexity,
            "perplexity_error": self.perplexity_error,
            "kl_mean": None,
        }
        if self.compares:
            values = np.concatenate(self.kl_values)
            result |= {
                "base_perplexity": math.exp(self.base_nll.mean),
                "log_perplexity_ratio": self.nll_change.mean,
                "log_perplexity_ratio_error": self.nll_change.error,
                "kl_mean": self.kl.mean,
                "kl_mean_error": self.kl.error,
                "kl_median": float(np.median(values)),
                "kl_p99": float(np.quantile(values, 0.99)),
                "kl_max": float(values.max()),
                "top1_agreement": self.same_top.mean,
                "top1_agreement_error": self.same_top.error,
            }
        return result


def cut_windows(
    token_ids: list[int], n_ctx: int, bos_id: int | None, max_windows: int | None = None
) -> npt.NDArray[np.int32]:
    """The windows a model is given, ``[num_windows, n_ctx]``.

    Args:
        bos_id: replaces the first token of each window; None where the vocabulary adds no BOS.

    Raises:
        RequestError: a window too short to score, or a text shorter than one window.
    """
    if n_ctx < 4:
        raise RequestError(f"a context of {n_ctx} is too short to score: expected at least 4 tokens")
    if max_windows is not None and max_windows < 1:
        raise RequestError(f"--chunks {max_windows}: expected a positive number")
    count = len(token_ids) // n_ctx
    if count == 0:
        raise RequestError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {n_ctx};"
            " give more text or a smaller -c"
        )
    count = min(count, max_windows or count)
    windows = np.array(token_ids[: count * n_ctx], dtype=np.int32).reshape(count, n_ctx)
    if bos_id is not None:
        windows[:, 0] = bos_id
    return windows


def log_softmax(logits: Array) -> Array:
    """Row-wise, summed in float64, rounded to float32."""
    top = logits.max(axis=1, keepdims=True).astype(np.float64)
    log_sum = np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    result: Array = (logits - top - log_sum).astype(np.float32)
    return result


def evaluate(
    source: LogitSource,
    windows: npt.NDArray[np.int32],
    *,
    base: str | None = None,
    save: str | None = None,
) -> Iterator[Estimate]:
    """Scores window by window, yielding the same, growing estimate after each.

    Args:
        windows: from `cut_windows`.
        base: file of log-probabilities to compare with.
        save: file to write this run's log-probabilities to; it appears when the last window is done.

    Raises:
        ConfigError: ``base`` does not fit this run.
        CapacityError: no room for ``save``.
        RequestError: a token id outside the model's vocabulary.
        ModelError: the model computed NaN.
    """
    if windows.min() < 0 or windows.max() >= source.vocab_size:
        raise RequestError(f"token ids reach {windows.max()}, but the model has {source.vocab_size} tokens")
    first = windows.shape[1] // 2
    key = LogprobKey.of(windows, first, source.vocab_size)
    estimate = Estimate(num_windows=len(windows))
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(LogprobReader(base, key)) if base is not None else None
        writer = stack.enter_context(LogprobWriter(save, key)) if save is not None else None
        for window in windows:
            targets = window[first + 1 :]
            for logits in _in_pieces(source.logits(window, first)):
                log_probs = log_softmax(logits)
                if writer is not None:
                    writer.write(log_probs)
                base_rows = reader.read(len(log_probs)) if reader is not None else None
                _score(estimate, log_probs, targets[: len(log_probs)], base_rows)
                targets = targets[len(log_probs) :]
            estimate.windows_done += 1
            yield estimate


def _in_pieces(pieces: Iterator[Array]) -> Iterator[Array]:
    for piece in pieces:
        for start in range(0, len(piece), _ROWS_AT_ONCE):
            yield piece[start : start + _ROWS_AT_ONCE]


def _score(estimate: Estimate, log_probs: Array, targets: npt.NDArray[np.int32], base: Array | None) -> None:
    nll = -np.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0].astype(np.float64)
    if np.isnan(nll).any():
        raise ModelError(
            f"window {estimate.windows_done + 1} of {estimate.num_windows}: the logits are not numbers: "
            "the model's file or its kernels are broken"
        )
    estimate.nll.add(nll)
    if base is None:
        return
    base_nll = -np.take_along_axis(base, targets[:, None], axis=1)[:, 0].astype(np.float64)
    estimate.base_nll.add(base_nll)
    estimate.nll_change.add(nll - base_nll)
    wide = base.astype(np.float64)
    kl = (np.exp(wide) * (wide - log_probs)).sum(axis=1)
    estimate.kl.add(kl)
    estimate.kl_values.append(kl)
    estimate.same_top.add((base.argmax(axis=1) == log_probs.argmax(axis=1)).astype(np.float64))
