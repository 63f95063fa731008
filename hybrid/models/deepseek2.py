"""DeepSeek-V2, V2-Lite, V3, R1, V3.1 and Kimi-K2: the GGUF architecture `deepseek2`.

Multi-head latent attention, leading dense layers, then routed and shared experts. Key names and tensor
layouts follow llama.cpp's conversion; the architecture is that of arXiv:2405.04434 and arXiv:2412.19437.
"""

from __future__ import annotations

import torch

from hybrid.backends.base import Backend
from hybrid.config import KVFormat
from hybrid.kvcache.blocks import AttentionBatch
from hybrid.layers.attention import MLAAttention, MLAShape, MLAWeights
from hybrid.layers.linear import Embedding, Linear
from hybrid.layers.mlp import MLP
from hybrid.layers.moe import MoE, Router
from hybrid.layers.norm import RMSNorm
from hybrid.layers.rotary import rope_table
from hybrid.models.deepseek2_config import DeepseekConfig, read_config
from hybrid.models.layer_steps import LayerSteps, run_layers
from hybrid.models.weights import Weights
from hybrid.moe.experts import Experts, ExpertStack
from hybrid.moe.reduction import ExpertCount

__all__ = ["DeepseekConfig", "DeepseekForCausalLM", "load", "read_config"]


class DecoderLayer:
    """Attention and feed-forward around the residual stream."""

    def __init__(
        self, attn_norm: RMSNorm, attention: MLAAttention, ffn_norm: RMSNorm, ffn: MLP | MoE
    ) -> None:
        self.attn_norm, self.attention, self.ffn_norm, self.ffn = attn_norm, attention, ffn_norm, ffn

    @property
    def backends(self) -> list[Backend]:
        """Those of all but routed experts; the first takes the residual stream, the last has it in the
        end."""
        return [self.attn_norm.backend, self.attention.backend, *self.ffn.backends, self.ffn_norm.backend]

    def __call__(
        self, delta: torch.Tensor | None, residual: torch.Tensor, batch: AttentionBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.attn_norm.add(delta, residual)
        hidden_states, residual = self.ffn_norm.add(self.attention(hidden_states, batch), residual)
        return self.ffn(hidden_states), residual


class DeepseekForCausalLM:
    """The whole model. Built by `load`; see `hybrid.models.loader.Model` for the interface."""

    def __init__(
        self,
        config: DeepseekConfig,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: Linear,
    ) -> None:
        self.config, self.embedding, self.layers, self.norm, self.head = config, embedding, layers, norm, head
        self.moes = {index: layer.ffn for index, layer in enumerate(layers) if isinstance(layer.ffn, MoE)}

    @property
    def can_record(self) -> bool:
        """Whether nothing but operations of backends takes part, see `Backend.record`."""
        return all(moe.can_record for moe in self.moes.values())

    @property
    def can_capture(self) -> bool:
        """Whether Python has no part in a pass, so that a `Graph` repeats all of it."""
        return not self.config.router.expert_threshold

    @property
    def expert_count(self) -> ExpertCount:
        counts = [moe.router.counter.read() for moe in self.moes.values()]
        return ExpertCount(*(sum(numbers) for numbers in zip(*counts, strict=True)))

    def allocate_cache(self, num_blocks: int, fmt: KVFormat) -> None:
        for layer in self.layers:
            layer.attention.allocate_cache(num_blocks, fmt)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for layer in self.layers:
            layer.attention.copy_blocks(pairs)

    def forward(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        return run_layers(self.forward_layers(token_ids, batch))

    def forward_layers(self, token_ids: torch.Tensor, batch: AttentionBatch) -> LayerSteps:
        return self.continue_layers(self.embedding(token_ids), batch)

    def continue_layers(self, residual: torch.Tensor, batch: AttentionBatch) -> LayerSteps:
        """`forward_layers` after the embedding, whose rows are changed."""
        delta: torch.Tensor | None = None
        for layer in self.layers:
            delta, residual = layer(delta, residual, batch)
            yield
        if delta is not None:
            last = self.layers[-1].ffn_norm.backend
            last.add(last.receive(delta), residual)
        return residual

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(hidden_states))


def load(config: DeepseekConfig, weights: Weights, max_model_len: int) -> DeepseekForCausalLM:
    """Builds every layer from the placements of its tensors."""
    hidden, eps = config.hidden_size, config.rms_norm_eps
    rope = rope_table(max_model_len, config.qk_rope_head_dim, config.rope_theta, config.yarn)
    backend = weights.backend_of("token_embd.weight")
    table = weights.matrix(backend, "token_embd.weight", config.vocab_size, hidden)
    layers = [_load_layer(config, weights, index, rope) for index in range(config.num_layers)]
    norm = _load_norm(weights, "output_norm.weight", hidden, eps)
    if weights.has("output.weight"):
        head_backend = weights.backend_of("output.weight")
        head = Linear(head_backend, weights.matrix(head_backend, "output.weight", config.vocab_size, hidden))
    else:
        head = Linear(backend, table)  # tied to the embedding
    return DeepseekForCausalLM(config, Embedding(backend, table), layers, norm, head)


def _load_norm(weights: Weights, name: str, size: int, eps: float) -> RMSNorm:
    backend = weights.backend_of(name)
    return RMSNorm(backend, weights.vector(backend, name, size), eps)


def _load_layer(config: DeepseekConfig, weights: Weights, index: int, rope: torch.Tensor) -> DecoderLayer:
    prefix, eps = f"blk.{index}.", config.rms_norm_eps
    attn_norm = _load_norm(weights, prefix + "attn_norm.weight", config.hidden_size, eps)
    attention = _load_attention(config, weights, prefix, rope)
    ffn_norm = _load_norm(weights, prefix + "ffn_norm.weight", config.hidden_size, eps)
    ffn: MLP | MoE
    if index < config.first_k_dense_replace:
        ffn = _load_mlp(weights, prefix, "", config.hidden_size, config.intermediate_size)
    else:
        ffn = _load_moe(config, weights, prefix)
    return DecoderLayer(attn_norm, attention, ffn_norm, ffn)


def _load_attention(
    config: DeepseekConfig, weights: Weights, prefix: str, rope: torch.Tensor
) -> MLAAttention:
    heads, nope, v_dim = config.num_heads, config.qk_nope_head_dim, config.v_head_dim
    latent, hidden, q_rank = config.kv_lora_rank, config.hidden_size, config.q_lora_rank
    split = weights.has(prefix + "attn_k_b.weight")
    kinds = ["attn_kv_a_mqa", "attn_kv_a_norm", "attn_output"]
    kinds += ["attn_k_b", "attn_v_b"] if split else ["attn_kv_b"]
    kinds += ["attn_q_a", "attn_q_a_norm", "attn_q_b"] if q_rank else ["attn_q"]
    names = {kind: f"{prefix}{kind}.weight" for kind in kinds}
    backend = weights.backend_of(*names.values())
    if split:
        k_b = weights.heads(backend, names["attn_k_b"], heads, latent, nope)
        v_b = weights.heads(backend, names["attn_v_b"], heads, v_dim, latent)
        if weights.has(prefix + "attn_kv_b.weight"):
            weights.ignore(prefix + "attn_kv_b.weight", "attn_k_b and attn_v_b hold the same")
    else:
        rows = nope + v_dim
        k_b = weights.heads(backend, names["attn_kv_b"], heads, rows, latent, slice(0, nope))
        v_b = weights.heads(backend, names["attn_kv_b"], heads, rows, latent, slice(nope, rows))
    q_name, q_cols = (names["attn_q_b"], q_rank) if q_rank else (names["attn_q"], hidden)
    handles = MLAWeights(
        q=weights.matrix(backend, q_name, heads * (nope + config.qk_rope_head_dim), q_cols),
        q_a=weights.matrix(backend, names["attn_q_a"], q_rank, hidden) if q_rank else None,
        q_a_norm=weights.vector(backend, names["attn_q_a_norm"], q_rank) if q_rank else None,
        kv_a=weights.matrix(backend, names["attn_kv_a_mqa"], config.cache_width, hidden),
        kv_a_norm=weights.vector(backend, names["attn_kv_a_norm"], latent),
        k_b=k_b,
        k_b_transposed=not split,
        v_b=v_b,
        output=weights.matrix(backend, names["attn_output"], hidden, heads * v_dim),
    )
    shape = MLAShape(
        heads, nope, config.qk_rope_head_dim, latent, config.attention_scale, config.rms_norm_eps
    )
    return MLAAttention(backend, handles, shape, rope)


def _load_mlp(weights: Weights, prefix: str, suffix: str, hidden: int, width: int) -> MLP:
    names = [f"{prefix}ffn_{kind}{suffix}.weight" for kind in ("gate", "up", "down")]
    backend = weights.backend_of(*names)
    gate, up = (weights.matrix(backend, name, width, hidden) for name in names[:2])
    return MLP(backend, gate, up, weights.matrix(backend, names[2], hidden, width))


def _load_moe(config: DeepseekConfig, weights: Weights, prefix: str) -> MoE:
    hidden, experts = config.hidden_size, config.router.num_experts
    router_name, bias_name = prefix + "ffn_gate_inp.weight", prefix + "exp_probs_b.bias"
    biased = weights.has(bias_name)
    router_backend = weights.backend_of(router_name, *([bias_name] if biased else []))
    router = Router(
        router_backend,
        weights.matrix(router_backend, router_name, experts, hidden),
        weights.vector(router_backend, bias_name, experts) if biased else None,
        config.router,
    )
    routed = _load_experts(config, weights, prefix)
    shared = None
    if config.num_shared_experts:
        shared = _load_mlp(
            weights, prefix, "_shexp", hidden, config.moe_intermediate_size * config.num_shared_experts
        )
    return MoE(router, routed, shared)


def _load_experts(config: DeepseekConfig, weights: Weights, prefix: str) -> Experts:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.router.num_experts
    down, fused = prefix + "ffn_down_exps.weight", prefix + "ffn_gate_up_exps.weight"
    halves = [f"{prefix}ffn_{kind}_exps.weight" for kind in ("gate", "up")]
    is_fused = weights.has(fused)
    stacks = []
    for group in weights.expert_groups([fused, down] if is_fused else [*halves, down], experts):
        if is_fused:  # rows of the gate, then rows of up
            parts = slice(0, width), slice(width, 2 * width)
            gate, up = (weights.stack(group, fused, experts, 2 * width, hidden, part) for part in parts)
        else:
            gate, up = (weights.stack(group, name, experts, width, hidden) for name in halves)
        down_weight = weights.stack(group, down, experts, hidden, width)
        stacks.append(ExpertStack(weights.backends[group.device], gate, up, down_weight, group.experts))
    return Experts(stacks, experts)
