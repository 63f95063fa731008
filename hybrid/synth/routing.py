"""How evenly a random router spreads tokens: the entropy of expert use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.synth.presets import ModelShape

Array = npt.NDArray[np.float32]


def choose_experts(logits: Array, bias: Array | None, shape: ModelShape) -> npt.NDArray[np.int64]:
    """Ids of the experts each token takes, ``[T, num_experts_per_tok]``.

    ``logits`` are the router's, ``[T, num_experts]``.

    Groups are scored by their maximum (softmax) or the sum of their two best (sigmoid), as in
    DeepSeek-V2 and V3.
    """
    if shape.scoring == "softmax":
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    if bias is not None:
        scores = scores + bias
    if shape.num_groups > 1:
        grouped = scores.reshape(len(scores), shape.num_groups, -1)
        best = np.sort(grouped, axis=2)
        group_scores = best[..., -1] if shape.scoring == "softmax" else best[..., -2:].sum(axis=2)
        dropped = np.argsort(-group_scores, axis=1)[:, shape.topk_groups :]
        np.put_along_axis(grouped, dropped[..., None], -np.inf, axis=1)
        scores = grouped.reshape(scores.shape)
    return np.argsort(-scores, axis=1)[:, : shape.num_experts_per_tok]


@dataclass
class RoutingEntropy:
    """Counts the experts that random hidden states of unit variance choose, layer by layer.

    Layers' entropies are averaged; at most ``max_layers`` are looked at, since one is like another.
    """

    shape: ModelShape
    rng: np.random.Generator
    num_tokens: int = 1024
    max_layers: int = 4

    def __post_init__(self) -> None:
        self._hidden = self.rng.standard_normal((self.num_tokens, self.shape.hidden_size), dtype=np.float32)
        self._entropies: list[float] = []

    @property
    def complete(self) -> bool:
        return len(self._entropies) >= self.max_layers

    def add_layer(self, router: Array, bias: Array | None) -> None:
        """``router`` is ``[num_experts, hidden_size]``."""
        chosen = choose_experts(self._hidden @ router.T, bias, self.shape)
        counts = np.bincount(chosen.ravel(), minlength=self.shape.num_experts)
        share = counts[counts > 0] / counts.sum()
        self._entropies.append(float(-(share * np.log2(share)).sum()))

    @property
    def bits(self) -> float:
        """Mean entropy of expert use, in bits."""
        return float(np.mean(self._entropies))

    @property
    def max_bits(self) -> float:
        """The entropy of even use, log2(num_experts)."""
        return math.log2(self.shape.num_experts)
