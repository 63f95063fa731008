"""The GPU backend: Triton kernels on weights in GGUF blocks; the contract is in `base`.

Operations are launched on the current stream and wait for nothing but where a tensor comes from or goes to
the host; shapes alone decide what is launched, so a decode step can be captured. Without a GPU the same
operations run in Triton's interpreter on CPU tensors (``TRITON_INTERPRET=1``, set before the start), which is
for tests: it is thousands of times slower, and has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from hybrid.backends import cuda_products as products
from hybrid.backends.base import Backend, RouterConfig
from hybrid.backends.cuda_device import open_device, runtime_of
from hybrid.backends.cuda_weights import FloatMatrix, Matrix, WeightStore, rows_of
from hybrid.backends.source import TensorSource
from hybrid.config import KVFormat
from hybrid.errors import PlacementError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.kernels.gpu import mla_attention as mla
from hybrid.kernels.gpu.cache_append import cache_append
from hybrid.kernels.gpu.expand import expand
from hybrid.kernels.gpu.rms_norm import rms_norm
from hybrid.kernels.gpu.rotary import rotary
from hybrid.kernels.gpu.route import route
from hybrid.kernels.gpu.target import INTERPRETED
from hybrid.kernels.gpu.transposed import transposed
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.placement.capabilities import CUDA_FORMATS, cache_problem

_CACHE_DTYPES: dict[KVFormat, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "q8_0": torch.int8,
}


@dataclass(frozen=True)
class PagedCache:
    """The latent cache of a layer, ``[num_blocks * BLOCK_SIZE, latent_dim + rope_dim]``: numbers, or with
    ``scales`` (float16, one for 32 numbers) int8 codes."""

    codes: torch.Tensor
    scales: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


class CudaBackend(Backend):
    """One GPU, ``cuda:N``.

    Args:
        name: of the device.
        half: type of a prompt's activations in products; bfloat16, or in the interpreter float32.

    Raises:
        PlacementError: the device cannot be used; the message says why and what to do.
    """

    def __init__(self, name: str, half: torch.dtype | None = None) -> None:
        self.name, self.device = name, open_device(name)
        self.half = half or (torch.float32 if INTERPRETED else torch.bfloat16)
        self.runtime = runtime_of(self.device)
        self._weights = WeightStore(self.device)
        self._head_ids: dict[tuple[int, int], torch.Tensor] = {}  # by number of heads and of tokens

    def can_multiply(self, type_: GGMLType) -> bool:
        return type_ in CUDA_FORMATS and not (INTERPRETED and type_ is GGMLType.BF16)

    def describe(self) -> str:
        if self.device.type != "cuda":
            return f"{self.name} (Triton's interpreter)"
        return f"{self.name} ({torch.cuda.get_device_name(self.device)})"

    def prepare(self, file: GGUFFile, sources: Sequence[TensorSource]) -> None:
        self._enter()
        self._weights.prepare(file, sources)

    def load_vector(self, source: TensorSource) -> torch.Tensor:
        return torch.from_numpy(source.dequantized().reshape(source.cols)).to(self.device)

    def load_matrix(self, source: TensorSource) -> Any:
        self._enter()
        return self._weights.load(source)

    def loading_done(self) -> None:
        self._weights.finish()

    def weight_bytes(self, weight: Any) -> int:
        data: torch.Tensor = weight.data
        return -(-data.nbytes // 16) * 16

    def allocate_latent_cache(self, num_blocks: int, latent_dim: int, rope_dim: int, fmt: KVFormat) -> Any:
        problem = cache_problem("cuda", latent_dim, rope_dim, fmt)
        if INTERPRETED and fmt == "bf16":
            problem = "Triton's interpreter has no bf16; take f16"
        if problem:
            raise PlacementError(f"{self.name}: a cache of {fmt} cannot be kept: {problem}")
        rows, dim = num_blocks * BLOCK_SIZE, latent_dim + rope_dim
        codes = torch.zeros(rows, dim, dtype=_CACHE_DTYPES[fmt], device=self.device)
        scales = None
        if fmt == "q8_0":
            scales = torch.zeros(rows, dim // 32, dtype=torch.float16, device=self.device)
        return PagedCache(codes, scales)

    def copy_cache_blocks(self, cache: Any, pairs: list[tuple[int, int]]) -> None:
        for plane in (cache.codes, cache.scales):
            if plane is not None:
                blocks = plane.view(-1, BLOCK_SIZE, plane.shape[1])
                for source, target in pairs:
                    blocks[target].copy_(blocks[source])

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        # Between GPUs torch has the current streams of both wait for each other.
        return x if x.device == self.device else x.to(self.device, non_blocking=x.is_cuda or x.is_pinned())

    def receive_batch(self, batch: AttentionBatch) -> AttentionBatch:
        return batch.on(self.name, self.receive) if batch.host is None else batch

    def close(self) -> None:
        if self.runtime is not None:
            self.runtime.synchronize()
        self._weights.close()
        self._head_ids.clear()

    def embed(self, token_ids: torch.Tensor, table: Any) -> torch.Tensor:
        self._enter()
        rows = rows_of(table, token_ids)
        return rows.data[0].float() if isinstance(rows, FloatMatrix) else expand(rows, torch.float32)[0]

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._enter()
        return rms_norm(x, weight, eps, residual)

    def add(self, x: torch.Tensor, sums: torch.Tensor) -> None:
        sums.add_(x)

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        self._enter()
        if self.decoding:
            return products.multiply_few(x, [weight])[0]
        return products.multiply_many(x, weight, self.half, torch.float32)

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
        self._enter()
        latent, rope_dim = kv_norm.shape[0], 2 * rope.shape[1]
        rotary(q, batch.positions, rope, rope_dim)
        rows = kv.clone()
        rotary(rows[:, None], batch.positions, rope, rope_dim)
        rows[:, :latent] = rms_norm(kv[:, :latent].contiguous(), kv_norm, eps)
        cache_append(rows, batch.slot_mapping, cache.codes, cache.scales)

    def absorb_q(self, q: torch.Tensor, k_b: Any, nope_dim: int, *, transposed: bool) -> torch.Tensor:
        self._enter()
        q_nope = q[..., :nope_dim]
        if transposed:
            return _transposed(q_nope.to(self.half).contiguous(), k_b)
        return products.by_head(q_nope, k_b, self._heads_of(q), None if self.decoding else self.half)

    def mla_attention(
        self, q: torch.Tensor, q_latent: torch.Tensor, cache: Any, batch: AttentionBatch, scale: float
    ) -> torch.Tensor:
        self._enter()
        rope_dim = cache.codes.shape[1] - q_latent.shape[-1]
        latent, pe = q_latent.to(self.half), q[..., q.shape[-1] - rope_dim :].to(self.half)
        planes = cache.codes, cache.scales
        if self.decoding:
            return mla.mla_attention(latent, pe, *planes, batch.block_tables, batch.seq_lens, scale).float()
        seen = batch.positions + 1
        starts = _starts(batch)
        parts = [
            mla.mla_attention(
                latent[first:end], pe[first:end], *planes, batch.block_tables[s], seen[first:end], scale
            )
            for s, (first, end) in enumerate(pairwise(starts))
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()

    def project_v(self, context: torch.Tensor, v_b: Any) -> torch.Tensor:
        self._enter()
        half = None if self.decoding else self.half
        return products.by_head(context, v_b, self._heads_of(context), half).flatten(1)

    def route(
        self, x: torch.Tensor, router: Any, bias: torch.Tensor | None, config: RouterConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.linear(x, router)
        return route(
            logits, bias, config.num_experts_per_tok, config.scoring, config.num_groups, config.topk_groups,
            config.norm_topk_prob, config.routed_scaling_factor,
        )  # fmt: skip

    def moe(
        self,
        x: torch.Tensor,
        gate: Any,
        up: Any,
        down: Any,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        self._enter()
        if self.decoding:
            return products.moe_few(x, (gate, up, down), topk_ids, topk_weights)
        return products.moe_many(x, (gate, up, down), topk_ids, topk_weights, self.half)

    def mlp(self, x: torch.Tensor, gate: Any, up: Any, down: Any) -> torch.Tensor:
        self._enter()
        if self.decoding:
            return products.mlp_few(x, gate, up, down)
        return products.mlp_many(x, gate, up, down, self.half)

    def _enter(self) -> None:
        """Kernels start on the current device, whatever device their arguments are on."""
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            torch.cuda.set_device(self.device)

    def _heads_of(self, x: torch.Tensor) -> torch.Tensor:
        """int32 ``[T * heads]``: the head of each row of ``x`` ``[T, heads, ...]``. Made before any capture:
        a capture follows a run of the same size."""
        tokens, heads = x.shape[:2]
        size = max(16, 1 << (tokens - 1).bit_length())
        found = self._head_ids.get((heads, size))
        if found is None:  # never dropped: captured steps refer to it
            found = torch.arange(heads, dtype=torch.int32, device=self.device).repeat(size)
            if self.device.type == "cuda":  # streams that did not make it use it, too
                torch.cuda.current_stream(self.device).synchronize()
            self._head_ids[heads, size] = found
        return found[: tokens * heads]


def _transposed(q_nope: torch.Tensor, k_b: Matrix) -> torch.Tensor:
    return transposed(q_nope, products.matrix_of_heads(k_b))


def _starts(batch: AttentionBatch) -> list[int]:
    """First token of each sequence of a prompt's batch, and the number of tokens."""
    if batch.seq_lens.shape[0] == 1:
        return [0, batch.num_tokens]
    host = batch if batch.host is None else batch.host
    starts: list[int] = host.query_start.tolist()
    return starts
