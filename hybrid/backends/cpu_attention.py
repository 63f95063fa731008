"""Attention on the CPU, and the caches it reads; the contract is in `base`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.config import KVFormat
from hybrid.kernels import cpu
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.placement.capabilities import cache_row_bytes

_HOST = torch.device("cpu")
_CACHE_DTYPES: dict[KVFormat, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "q8_0": torch.uint8,
}


@dataclass(frozen=True)
class LatentCache:
    """The latent cache of a layer: ``[num_blocks * BLOCK_SIZE, latent_dim + rope_dim]``, flat; of q8_0 the
    codes, and behind them the scales (`kernels/cpu/attention.h`)."""

    data: torch.Tensor
    fmt: KVFormat
    num_blocks: int
    latent_dim: int
    rope_dim: int

    @property
    def address(self) -> int:
        return self.data.data_ptr()

    @property
    def planes(self) -> list[torch.Tensor]:
        return _planes(self.data, self.fmt, self.num_blocks, self.latent_dim + self.rope_dim)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of a layer: ``[num_blocks * BLOCK_SIZE, num_kv_heads * head_dim]`` each, flat as a
    `LatentCache` is."""

    keys: torch.Tensor
    values: torch.Tensor
    fmt: KVFormat
    num_blocks: int
    num_kv_heads: int
    head_dim: int

    @property
    def planes(self) -> list[torch.Tensor]:
        width = self.num_kv_heads * self.head_dim
        return [
            p for data in (self.keys, self.values) for p in _planes(data, self.fmt, self.num_blocks, width)
        ]


def _allocate(num_blocks: int, width: int, fmt: KVFormat) -> torch.Tensor:
    dtype = _CACHE_DTYPES[fmt]
    n_bytes = num_blocks * BLOCK_SIZE * cache_row_bytes(width, fmt)
    return torch.zeros(n_bytes // dtype.itemsize, dtype=dtype, device=_HOST)


def _planes(data: torch.Tensor, fmt: KVFormat, num_blocks: int, width: int) -> list[torch.Tensor]:
    """Views ``[num_blocks, ...]``: rows, or the codes of q8_0 and then their scales."""
    if fmt != "q8_0":
        return [data.view(num_blocks, -1)]
    end = num_blocks * BLOCK_SIZE * width
    codes, scales = data[:end], data[end:]
    return [codes.view(num_blocks, -1), scales.view(num_blocks, -1)]


class CpuAttention(Backend):
    """The operations of `CpuBackend` that read or write a cache, or lead to those that do.

    Attributes:
        recorded: results of the operations being recorded.
    """

    pool: cpu.ThreadPool
    recorded: list[torch.Tensor] | None = None

    def _result(self, like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        out = like.new_empty(shape, dtype=dtype)
        if self.recorded is not None:
            self.recorded.append(out)
        return out

    def allocate_latent_cache(self, num_blocks: int, latent_dim: int, rope_dim: int, fmt: KVFormat) -> Any:
        data = _allocate(num_blocks, latent_dim + rope_dim, fmt)
        return LatentCache(data, fmt, num_blocks, latent_dim, rope_dim)

    def allocate_kv_cache(self, num_blocks: int, num_kv_heads: int, head_dim: int, fmt: KVFormat) -> Any:
        keys, values = (_allocate(num_blocks, num_kv_heads * head_dim, fmt) for _ in range(2))
        return KVCache(keys, values, fmt, num_blocks, num_kv_heads, head_dim)

    def copy_cache_blocks(self, cache: Any, pairs: list[tuple[int, int]]) -> None:
        for blocks in cache.planes:
            for source, target in pairs:
                blocks[target].copy_(blocks[source])

    def mla_append(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        kv_norm: torch.Tensor,
        eps: float,
        rope: torch.Tensor,
        cache: Any,
        batch: AttentionBatch,
    ) -> None:
        tokens, heads, head_dim = q.shape
        cpu.mla_append(
            self.pool, q.data_ptr(), tokens, heads, head_dim, kv.data_ptr(), kv_norm.data_ptr(), eps,
            rope.data_ptr(), rope.shape[0], cache.address, cache.fmt,
            cache.num_blocks, cache.latent_dim, cache.rope_dim,
            batch.positions.data_ptr(), batch.slot_mapping.data_ptr(),
        )  # fmt: skip

    def absorb_q(self, q: torch.Tensor, k_b: Any, nope_dim: int, *, transposed: bool) -> torch.Tensor:
        tokens, heads, head_dim = q.shape
        latent: int = k_b.cols if transposed else k_b.rows
        out = self._result(q, tokens, heads, latent)
        product = cpu.linear_transposed_batched if transposed else cpu.linear_batched
        product(
            self.pool,
            k_b,
            q.data_ptr(),
            tokens,
            heads * head_dim,
            head_dim,
            out.data_ptr(),
            heads * latent,
            latent,
        )
        return out

    def mla_attention(
        self, q: torch.Tensor, q_latent: torch.Tensor, cache: Any, batch: AttentionBatch, scale: float
    ) -> torch.Tensor:
        tokens, heads, head_dim = q.shape
        out = self._result(q_latent, *q_latent.shape)
        cpu.mla_attention(
            self.pool, q.data_ptr(), q_latent.data_ptr(), tokens, heads, head_dim, cache.address, cache.fmt,
            cache.num_blocks, cache.latent_dim, cache.rope_dim,
            batch.seq_lens.shape[0], batch.positions.data_ptr(), batch.query_start.data_ptr(),
            batch.seq_lens.data_ptr(), batch.block_tables.data_ptr(), batch.block_tables.stride(0), scale,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def project_v(self, context: torch.Tensor, v_b: Any) -> torch.Tensor:
        tokens, heads, latent = context.shape
        v_dim: int = v_b.rows
        out = self._result(context, tokens, heads * v_dim)
        cpu.linear_batched(
            self.pool,
            v_b,
            context.data_ptr(),
            tokens,
            heads * latent,
            latent,
            out.data_ptr(),
            heads * v_dim,
            v_dim,
        )
        return out

    def gqa_append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: torch.Tensor,
        cache: Any,
        batch: AttentionBatch,
        *,
        halves: bool,
    ) -> None:
        tokens, heads, head_dim = q.shape
        cpu.gqa_append(
            self.pool, q.data_ptr(), tokens, heads, cache.num_kv_heads, head_dim, k.data_ptr(), v.data_ptr(),
            rope.data_ptr(), 2 * rope.shape[1], rope.shape[0], halves,
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.fmt, cache.num_blocks,
            batch.positions.data_ptr(), batch.slot_mapping.data_ptr(),
        )  # fmt: skip

    def gqa_attention(self, q: torch.Tensor, cache: Any, batch: AttentionBatch, scale: float) -> torch.Tensor:
        tokens, heads, head_dim = q.shape
        out = self._result(q, *q.shape)
        cpu.gqa_attention(
            self.pool, q.data_ptr(), tokens, heads, cache.num_kv_heads, head_dim,
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.fmt, cache.num_blocks,
            batch.seq_lens.shape[0], batch.positions.data_ptr(), batch.query_start.data_ptr(),
            batch.seq_lens.data_ptr(), batch.block_tables.data_ptr(), batch.block_tables.stride(0), scale,
            out.data_ptr(),
        )  # fmt: skip
        return out
