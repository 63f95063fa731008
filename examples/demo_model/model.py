"""The demo model in plain torch, for training: a DeepSeek-V3 architecture in small.

Parameter names and shapes follow transformers' DeepseekV3 (its `state_dict` loads as it is), rotary pairs are
interleaved, experts are stacked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class DemoConfig:
    """Names follow transformers' DeepseekV3Config."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 256
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    intermediate_size: int = 768
    moe_intermediate_size: int = 256
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates interleaved pairs of the last dimension; cos, sin are [tokens, dim / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention with expanded keys and values."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c, self.heads = c, c.num_attention_heads
        qk = c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, self.heads * qk, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            c.kv_lora_rank, self.heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        c, (batch, length, _) = self.c, x.shape
        q = (
            self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
            .view(batch, length, self.heads, -1)
            .transpose(1, 2)
        )
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, self.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_pe = rotate(k_pe, cos, sin)[:, None].expand(-1, self.heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_pe, cos, sin)), dim=-1)
        k = torch.cat((k_nope, k_pe), dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return result


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Router(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))


class Experts(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        shape = (c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], c.hidden_size, c.moe_intermediate_size))


class MoE(nn.Module):
    """Sigmoid router with a selection bias that a rule, not the gradient, keeps balanced."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        self.gate, self.experts = Router(c), Experts(c)
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)
        self.load = torch.zeros(c.n_routed_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, flat = self.c, x.reshape(-1, x.shape[-1])
        scores = torch.sigmoid(F.linear(flat.float(), self.gate.weight))
        ids = (
            (scores.detach() + self.gate.e_score_correction_bias).topk(c.num_experts_per_tok, dim=-1).indices
        )
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) * c.routed_scaling_factor
        order = ids.flatten().argsort()
        counts = torch.bincount(ids.flatten(), minlength=c.n_routed_experts)
        self.load = counts.float() / counts.sum()
        tokens = order // c.num_experts_per_tok
        # unbind: indexing an expert would zero the gradient of all of them, once each.
        experts = zip(self.experts.gate_up_proj.unbind(), self.experts.down_proj.unbind(), strict=True)
        pieces = []
        for rows, (gate_up_proj, down_proj) in zip(flat[tokens].split(counts.tolist()), experts, strict=True):
            gate, up = F.linear(rows, gate_up_proj).chunk(2, dim=-1)
            pieces.append(F.linear(F.silu(gate) * up, down_proj))
        weighted = torch.cat(pieces) * weights.flatten()[order][:, None].to(flat.dtype)
        out = torch.zeros_like(flat).index_add(0, tokens, weighted.to(flat.dtype))
        return (out + self.shared_experts(flat)).view_as(x)

    def balance(self, rate: float) -> None:
        """Moves the selection bias a step toward equal load (DeepSeek-V3, section 2.1.2)."""
        bias = self.gate.e_score_correction_bias
        bias += rate * torch.sign(1.0 / bias.numel() - self.load)


class Layer(nn.Module):
    def __init__(self, c: DemoConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        dense = index < c.first_k_dense_replace
        self.mlp: nn.Module = MLP(c.hidden_size, c.intermediate_size) if dense else MoE(c)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        result: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Decoder(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class DemoModel(nn.Module):
    """[batch, tokens] ids -> [batch, tokens, vocab] logits."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        self.model = Decoder(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                depth = (
                    (2 * c.num_hidden_layers) ** -0.5
                    if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
                    else 1
                )
                nn.init.normal_(
                    parameter, std=0.02 if "embed" in name else depth * parameter.shape[-1] ** -0.5
                )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        c = self.c
        frequencies = c.rope_theta ** (-torch.arange(0, c.qk_rope_head_dim, 2).float() / c.qk_rope_head_dim)
        angles = torch.arange(ids.shape[1]).float()[:, None] * frequencies
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, angles.cos(), angles.sin())
        logits: torch.Tensor = self.lm_head(self.model.norm(x))
        return logits

    def balance(self, rate: float) -> None:
        for layer in self.model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.balance(rate)
