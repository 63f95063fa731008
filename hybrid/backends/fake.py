"""The contract of `base` in plain torch on dequantised float32 weights.

It stands in for a second device in tests of mixed placements, and it is the plain reference the kernels are
tested against. ``activation="q8"`` rounds the input of every product with a quantised weight to int8
with one scale for 256 columns, which is what the CPU kernels may lose and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from hybrid.backends.base import Backend, RouterConfig
from hybrid.backends.source import TensorSource
from hybrid.config import KVFormat
from hybrid.gguf import DEQUANTIZABLE, GGMLType
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch

_FLOAT_TYPES = frozenset((GGMLType.F32, GGMLType.F16, GGMLType.BF16))
_CACHE_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "q8_0": torch.float32,  # of rounded numbers
}
_CACHE_SCALE_BLOCK = 32


@dataclass(frozen=True)
class FloatMatrix:
    """``[batch, rows, cols]`` float32; ``quantized`` tells whether the file's weights were."""

    values: torch.Tensor
    quantized: bool


@dataclass(frozen=True)
class FloatCache:
    """``[num_blocks * BLOCK_SIZE, latent_dim + rope_dim]``, and the format whose rounding it has."""

    rows: torch.Tensor
    fmt: KVFormat


def round_to_q8(x: torch.Tensor, cols: int = 256, *, half_scales: bool = False) -> torch.Tensor:
    """``x`` as int8 codes with one scale for every ``cols`` columns of a row would hold it."""
    pieces = []
    for block in torch.split(x, cols, dim=-1):
        scale = block.abs().amax(dim=-1, keepdim=True) / 127
        scale = scale.half().float() if half_scales else scale
        pieces.append(torch.where(scale > 0, torch.round(block / scale) * scale, block))
    return torch.cat(pieces, dim=-1)


class FakeBackend(Backend):
    """Operations in float32 torch. ``name`` is any device name."""

    device = torch.device("cpu")

    def __init__(self, name: str = "fake:0", activation: Literal["f32", "q8"] = "f32") -> None:
        self.name, self.activation = name, activation

    def _input(self, x: torch.Tensor, weight: FloatMatrix) -> torch.Tensor:
        return round_to_q8(x) if self.activation == "q8" and weight.quantized else x

    def can_multiply(self, type_: GGMLType) -> bool:
        return type_ in DEQUANTIZABLE

    def describe(self) -> str:
        return self.name

    def load_vector(self, source: TensorSource) -> torch.Tensor:
        return torch.from_numpy(source.dequantized().reshape(source.cols))

    def load_matrix(self, source: TensorSource) -> Any:
        return FloatMatrix(torch.from_numpy(source.dequantized()), source.type not in _FLOAT_TYPES)

    def loading_done(self) -> None:
        """Nothing is staged."""

    def weight_bytes(self, weight: Any) -> int:
        return int(weight.values.nbytes)

    def allocate_latent_cache(self, num_blocks: int, latent_dim: int, rope_dim: int, fmt: KVFormat) -> Any:
        rows = torch.zeros(num_blocks * BLOCK_SIZE, latent_dim + rope_dim, dtype=_CACHE_DTYPES[fmt])
        return FloatCache(rows, fmt)

    def copy_cache_blocks(self, cache: Any, pairs: list[tuple[int, int]]) -> None:
        blocks = cache.rows.view(-1, BLOCK_SIZE, cache.rows.shape[1])
        for source, target in pairs:
            blocks[target].copy_(blocks[source])

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device)

    def close(self) -> None:
        """Nothing is held but tensors."""

    def embed(self, token_ids: torch.Tensor, table: Any) -> torch.Tensor:
        rows: torch.Tensor = table.values[0][token_ids.long()]
        return rows

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        if residual is not None:
            residual += x
            x = residual
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def add(self, x: torch.Tensor, sums: torch.Tensor) -> None:
        sums += x

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        out: torch.Tensor = self._input(x, weight) @ weight.values[0].T
        return out

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
        cos_sin = rope[batch.positions.long()]
        rope_dim = 2 * rope.shape[1]
        q[..., -rope_dim:] = _rotate(q[..., -rope_dim:], cos_sin[:, None])
        latent = F.rms_norm(kv[:, :-rope_dim], kv_norm.shape, kv_norm, eps)
        rows = torch.cat((latent, _rotate(kv[:, -rope_dim:], cos_sin)), dim=-1)
        if cache.fmt == "q8_0":
            rows = round_to_q8(rows, _CACHE_SCALE_BLOCK, half_scales=True)
        cache.rows[batch.slot_mapping.long()] = rows.to(cache.rows.dtype)

    def absorb_q(self, q: torch.Tensor, k_b: Any, nope_dim: int, *, transposed: bool) -> torch.Tensor:
        q_nope = q[..., :nope_dim]
        if transposed:
            return torch.einsum("thn,hnc->thc", q_nope, k_b.values).contiguous()
        return torch.einsum("thn,hcn->thc", self._input(q_nope, k_b), k_b.values).contiguous()

    def mla_attention(
        self, q: torch.Tensor, q_latent: torch.Tensor, cache: Any, batch: AttentionBatch, scale: float
    ) -> torch.Tensor:
        latent_dim = q_latent.shape[-1]
        q_all = torch.cat((q_latent, q[..., q.shape[-1] - (cache.rows.shape[1] - latent_dim) :]), dim=-1)
        out = torch.empty_like(q_latent)
        for s, length in enumerate(batch.seq_lens.tolist()):
            start, stop = batch.query_start[s : s + 2].tolist()
            slots = torch.arange(length)
            blocks = batch.block_tables[s].long()[slots // BLOCK_SIZE]
            keys = cache.rows[blocks * BLOCK_SIZE + slots % BLOCK_SIZE].float()
            scores = torch.einsum("thd,kd->htk", q_all[start:stop], keys) * scale
            hidden = slots[None] > batch.positions[start:stop].long()[:, None]
            probabilities = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            out[start:stop] = torch.einsum("htk,kd->thd", probabilities, keys[:, :latent_dim])
        return out

    def project_v(self, context: torch.Tensor, v_b: Any) -> torch.Tensor:
        return torch.einsum("thc,hvc->thv", self._input(context, v_b), v_b.values).flatten(1).contiguous()

    def route(
        self, x: torch.Tensor, router: Any, bias: torch.Tensor | None, config: RouterConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.linear(x, router)
        scores = logits.softmax(dim=-1) if config.scoring == "softmax" else logits.sigmoid()
        choice = scores if bias is None else scores + bias
        if config.num_groups > 1:
            groups = choice.view(x.shape[0], config.num_groups, -1)
            best = groups.amax(-1) if config.scoring == "softmax" else groups.topk(2, dim=-1).values.sum(-1)
            chosen = torch.zeros_like(best, dtype=torch.bool)
            chosen.scatter_(1, best.topk(config.topk_groups, dim=-1).indices, True)
            choice = groups.masked_fill(~chosen[..., None], float("-inf")).flatten(1)
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : config.num_experts_per_tok]
        weights = scores.gather(1, ids)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids.int().contiguous(), (weights * config.routed_scaling_factor).contiguous()

    def moe(
        self,
        x: torch.Tensor,
        gate: Any,
        up: Any,
        down: Any,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        out = torch.zeros(x.shape[0], down.values.shape[1])
        for expert in sorted({*topk_ids.flatten().tolist()}):
            if expert < 0:
                continue
            tokens, slots = torch.where(topk_ids == expert)
            result = self._swiglu(x[tokens], gate, up, down, expert)
            out.index_add_(0, tokens, result * topk_weights[tokens, slots][:, None])
        return out

    def mlp(self, x: torch.Tensor, gate: Any, up: Any, down: Any) -> torch.Tensor:
        return self._swiglu(x, gate, up, down, 0)

    def _swiglu(self, x: torch.Tensor, gate: Any, up: Any, down: Any, expert: int) -> torch.Tensor:
        hidden = F.silu(self._input(x, gate) @ gate.values[expert].T) * (
            self._input(x, up) @ up.values[expert].T
        )
        out: torch.Tensor = self._input(hidden, down) @ down.values[expert].T
        return out


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (2i, 2i + 1) of the last dimension; ``cos_sin`` is [..., pairs, 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos_sin.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
