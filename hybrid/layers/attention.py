"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), absorbed.

Keys and values are never expanded: queries are multiplied into the latent space, attention runs over the
latent cache, and the result is multiplied out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.config import KVFormat
from hybrid.kvcache.blocks import AttentionBatch


@dataclass(frozen=True)
class MLAWeights:
    """Handles of one backend. ``q_a``, ``q_a_norm`` are ``None`` for models without a query bottleneck;
    ``k_b_transposed`` as in `Backend.absorb_q`."""

    q: Any
    q_a: Any | None
    q_a_norm: torch.Tensor | None
    kv_a: Any
    kv_a_norm: torch.Tensor
    k_b: Any
    k_b_transposed: bool
    v_b: Any
    output: Any


@dataclass(frozen=True)
class MLAShape:
    """Widths of a head in numbers, and what its scores are multiplied by (YaRN's part included)."""

    num_heads: int
    nope_dim: int
    rope_dim: int
    kv_lora_rank: int
    scale: float
    eps: float


class MLAAttention:
    """``[T, hidden] -> [T, hidden]``; owns its layer's latent cache."""

    def __init__(self, backend: Backend, weights: MLAWeights, shape: MLAShape, rope: torch.Tensor) -> None:
        self.backend, self.weights, self.shape = backend, weights, shape
        self.rope = backend.receive(rope)
        self.cache: Any = None

    def allocate_cache(self, num_blocks: int, fmt: KVFormat) -> None:
        shape = self.shape
        self.cache = self.backend.allocate_latent_cache(num_blocks, shape.kv_lora_rank, shape.rope_dim, fmt)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        self.backend.copy_cache_blocks(self.cache, pairs)

    def __call__(self, x: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        backend, w, shape = self.backend, self.weights, self.shape
        x, batch = backend.receive(x), backend.receive_batch(batch)
        q_in = x
        if w.q_a is not None and w.q_a_norm is not None:
            q_in = backend.rms_norm(backend.linear(x, w.q_a), w.q_a_norm, shape.eps)
        q = backend.linear(q_in, w.q).view(x.shape[0], shape.num_heads, -1)
        kv = backend.linear(x, w.kv_a)
        backend.mla_append(q, kv, w.kv_a_norm, shape.eps, self.rope, self.cache, batch)
        q_latent = backend.absorb_q(q, w.k_b, shape.nope_dim, transposed=w.k_b_transposed)
        context = backend.mla_attention(q, q_latent, self.cache, batch, shape.scale)
        return backend.linear(backend.project_v(context, w.v_b), w.output)
