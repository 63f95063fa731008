"""DeepSeek-V2, V2-Lite, V3, R1, V3.1 and Kimi-K2: the GGUF architecture `deepseek2`.

Multi-head latent attention, leading dense layers, then routed and shared experts. Key names and tensor
layouts follow llama.cpp's conversion; the architecture is that of arXiv:2405.04434 and arXiv:2412.19437.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid.backends.base import CacheFormat, RouterConfig
from hybrid.gguf import GGUFFile
from hybrid.kvcache.blocks import AttentionBatch
from hybrid.layers.attention import MLAAttention, MLAShape, MLAWeights
from hybrid.layers.linear import Embedding, Linear
from hybrid.layers.mlp import MLP
from hybrid.layers.moe import MoE, Router
from hybrid.layers.norm import RMSNorm
from hybrid.layers.rotary import YarnConfig, rope_table
from hybrid.models.hparams import HParams
from hybrid.models.weights import WeightLoader

_SCORING = {1: "softmax", 2: "sigmoid"}


@dataclass(frozen=True)
class DeepseekConfig:
    """Hyper-parameters; names follow the published configurations. ``q_lora_rank`` 0: no query bottleneck."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_nextn_layers: int
    max_position_embeddings: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    first_k_dense_replace: int
    moe_intermediate_size: int
    num_shared_experts: int
    router: RouterConfig
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnConfig | None

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by, YaRN's part included."""
        plain = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        return plain if self.yarn is None else float(plain * self.yarn.softmax_scale)

    @property
    def cache_width(self) -> int:
        """Numbers a token keeps in the cache of a layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def read_config(file: GGUFFile) -> DeepseekConfig:
    """Reads and checks the hyper-parameters.

    Raises:
        GGUFError: a key is missing or has the wrong type.
        ModelError: a value is impossible, or values contradict each other.
    """
    h = HParams(file)
    num_nextn = h.integer("nextn_predict_layers", default=0, low=0, high=64)
    num_blocks = h.integer("block_count", high=1024)
    if num_nextn >= num_blocks:
        h.fail("nextn_predict_layers", f"fewer than the {num_blocks} blocks", num_nextn)
    rope_dim = h.integer("rope.dimension_count", high=1024)
    kv_lora_rank = h.integer("attention.kv_lora_rank", high=65536)
    key_dim, v_dim = _head_dims(h, kv_lora_rank, rope_dim)
    dense = h.integer("leading_dense_block_count", low=0)
    if dense > num_blocks - num_nextn:
        h.fail("leading_dense_block_count", f"at most the {num_blocks - num_nextn} layers", dense)
    embedding = file.tensors.get("token_embd.weight")
    return DeepseekConfig(
        vocab_size=h.integer("vocab_size", default=1 if embedding is None else embedding.shape[0]),
        hidden_size=h.integer("embedding_length"),
        num_layers=num_blocks - num_nextn,
        num_nextn_layers=num_nextn,
        max_position_embeddings=h.integer("context_length", high=1 << 30),
        num_heads=h.integer("attention.head_count", high=4096),
        q_lora_rank=h.integer("attention.q_lora_rank", default=0, low=0),
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=key_dim - rope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=v_dim,
        intermediate_size=h.integer("feed_forward_length"),
        first_k_dense_replace=dense,
        moe_intermediate_size=h.integer("expert_feed_forward_length"),
        num_shared_experts=h.integer("expert_shared_count", default=0, low=0, high=64),
        router=_router(h),
        rms_norm_eps=h.number("attention.layer_norm_rms_epsilon", high=1.0),
        rope_theta=h.number("rope.freq_base", default=10000.0, low=1.0),
        yarn=_yarn(h),
    )


def _head_dims(h: HParams, kv_lora_rank: int, rope_dim: int) -> tuple[int, int]:
    """Key and value width of a head. Files with split `attn_k_b` state them under `_mla` names and give the
    width of the latent cache as key_length; older files give them as key_length and value_length."""
    mla = h.has("attention.key_length_mla")
    if mla:
        latent = h.integer("attention.key_length", default=kv_lora_rank + rope_dim)
        if latent != kv_lora_rank + rope_dim:
            h.fail(
                "attention.key_length", f"kv_lora_rank + rope dimensions = {kv_lora_rank + rope_dim}", latent
            )
    suffix = "_mla" if mla else ""
    key_dim = h.integer("attention.key_length" + suffix, high=8192)
    if key_dim <= rope_dim:
        h.fail("attention.key_length" + suffix, f"more than the {rope_dim} rotary dimensions", key_dim)
    if rope_dim % 2:
        h.fail("rope.dimension_count", "an even number", rope_dim)
    return key_dim, h.integer("attention.value_length" + suffix, high=8192)


def _router(h: HParams) -> RouterConfig:
    num_experts = h.integer("expert_count", high=65536)
    used = h.integer("expert_used_count", high=1024)
    groups, groups_used = h.integer("expert_group_count"), h.integer("expert_group_used_count")
    function = h.integer("expert_gating_func", low=0)
    if used > num_experts:
        h.fail("expert_used_count", f"at most the {num_experts} experts", used)
    if num_experts % groups:
        h.fail("expert_group_count", f"a divisor of the {num_experts} experts", groups)
    if groups_used > groups or groups_used * (num_experts // groups) < used:
        h.fail("expert_group_used_count", f"at most {groups} groups that hold {used} experts", groups_used)
    if function not in _SCORING:
        h.fail("expert_gating_func", "1 (softmax) or 2 (sigmoid)", function)
    return RouterConfig(
        num_experts=num_experts,
        num_experts_per_tok=used,
        scoring="softmax" if function == 1 else "sigmoid",
        num_groups=groups,
        topk_groups=groups_used,
        norm_topk_prob=h.flag("expert_weights_norm"),
        routed_scaling_factor=h.number("expert_weights_scale"),
    )


def _yarn(h: HParams) -> YarnConfig | None:
    kind = h.file.get(h.prefix + "rope.scaling.type", str, default="none")
    if kind == "none":
        return None
    if kind != "yarn":
        h.fail("rope.scaling.type", "'yarn' or 'none'", repr(kind))
    return YarnConfig(
        factor=h.number("rope.scaling.factor"),
        original_context_length=h.integer("rope.scaling.original_context_length", high=1 << 30),
        beta_fast=h.number("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=h.number("rope.scaling.yarn_beta_slow", default=1.0),
        log_multiplier=h.number("rope.scaling.yarn_log_multiplier", default=0.0, low=-1e-9, high=10.0),
        attn_factor=h.number("rope.scaling.attn_factor", default=1.0),
    )


class DecoderLayer:
    """Attention and feed-forward around the residual stream."""

    def __init__(
        self, attn_norm: RMSNorm, attention: MLAAttention, ffn_norm: RMSNorm, ffn: MLP | MoE
    ) -> None:
        self.attn_norm, self.attention, self.ffn_norm, self.ffn = attn_norm, attention, ffn_norm, ffn

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

    def allocate_cache(self, num_blocks: int, fmt: CacheFormat) -> None:
        for layer in self.layers:
            layer.attention.allocate_cache(num_blocks, fmt)

    def forward(self, token_ids: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        residual = self.embedding(token_ids)
        delta: torch.Tensor | None = None
        for layer in self.layers:
            delta, residual = layer(delta, residual, batch)
        return residual if delta is None else residual + delta.to(residual.device)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(hidden_states))


def load(config: DeepseekConfig, weights: WeightLoader, max_model_len: int) -> DeepseekForCausalLM:
    """Builds every layer from the placements of its tensors."""
    hidden, eps = config.hidden_size, config.rms_norm_eps
    rope = rope_table(max_model_len, config.qk_rope_head_dim, config.rope_theta, config.yarn)
    weights.require("token_embd.weight")
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


def _load_norm(weights: WeightLoader, name: str, size: int, eps: float) -> RMSNorm:
    weights.require(name)
    backend = weights.backend_of(name)
    return RMSNorm(backend, weights.vector(backend, name, size), eps)


def _load_layer(
    config: DeepseekConfig, weights: WeightLoader, index: int, rope: torch.Tensor
) -> DecoderLayer:
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
    config: DeepseekConfig, weights: WeightLoader, prefix: str, rope: torch.Tensor
) -> MLAAttention:
    heads, nope, v_dim = config.num_heads, config.qk_nope_head_dim, config.v_head_dim
    latent, hidden, q_rank = config.kv_lora_rank, config.hidden_size, config.q_lora_rank
    split = weights.has(prefix + "attn_k_b.weight")
    kinds = [
        "attn_kv_a_mqa",
        "attn_kv_a_norm",
        "attn_output",
        *(["attn_k_b", "attn_v_b"] if split else ["attn_kv_b"]),
    ]
    kinds += ["attn_q_a", "attn_q_a_norm", "attn_q_b"] if q_rank else ["attn_q"]
    for kind in kinds:
        weights.require(f"{prefix}{kind}.weight")
    backend = weights.backend_of(*(f"{prefix}{kind}.weight" for kind in kinds))

    def matrix(kind: str, rows: int, cols: int) -> object:
        return weights.matrix(backend, f"{prefix}{kind}.weight", rows, cols)

    if split:
        k_b = weights.stack(backend, prefix + "attn_k_b.weight", heads, latent, nope)
        v_b = weights.stack(backend, prefix + "attn_v_b.weight", heads, v_dim, latent)
        if weights.has(prefix + "attn_kv_b.weight"):
            weights.ignore(prefix + "attn_kv_b.weight", "attn_k_b and attn_v_b hold the same")
    else:
        name, rows = prefix + "attn_kv_b.weight", nope + v_dim
        k_b = weights.stack(backend, name, heads, rows, latent, slice(0, nope))
        v_b = weights.stack(backend, name, heads, rows, latent, slice(nope, rows))
    q_width = heads * (nope + config.qk_rope_head_dim)
    handles = MLAWeights(
        q=matrix("attn_q_b", q_width, q_rank) if q_rank else matrix("attn_q", q_width, hidden),
        q_a=matrix("attn_q_a", q_rank, hidden) if q_rank else None,
        q_a_norm=weights.vector(backend, prefix + "attn_q_a_norm.weight", q_rank) if q_rank else None,
        kv_a=matrix("attn_kv_a_mqa", config.cache_width, hidden),
        kv_a_norm=weights.vector(backend, prefix + "attn_kv_a_norm.weight", latent),
        k_b=k_b,
        k_b_transposed=not split,
        v_b=v_b,
        output=matrix("attn_output", hidden, heads * v_dim),
    )
    shape = MLAShape(
        heads, nope, config.qk_rope_head_dim, latent, config.attention_scale, config.rms_norm_eps
    )
    return MLAAttention(backend, handles, shape, rope)


def _load_mlp(weights: WeightLoader, prefix: str, suffix: str, hidden: int, width: int) -> MLP:
    names = [f"{prefix}ffn_{kind}{suffix}.weight" for kind in ("gate", "up", "down")]
    for name in names:
        weights.require(name)
    backend = weights.backend_of(*names)
    gate, up = (weights.matrix(backend, name, width, hidden) for name in names[:2])
    return MLP(backend, gate, up, weights.matrix(backend, names[2], hidden, width))


def _load_moe(config: DeepseekConfig, weights: WeightLoader, prefix: str) -> MoE:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.router.num_experts
    router_name, bias_name = prefix + "ffn_gate_inp.weight", prefix + "exp_probs_b.bias"
    weights.require(router_name)
    biased = weights.has(bias_name)
    router_backend = weights.backend_of(router_name, *([bias_name] if biased else []))
    router = Router(
        router_backend,
        weights.matrix(router_backend, router_name, experts, hidden),
        weights.vector(router_backend, bias_name, experts) if biased else None,
        config.router,
    )
    names = [f"{prefix}ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")]
    for name in names:
        weights.require(name)
    backend = weights.backend_of(*names)
    gate, up = (weights.stack(backend, name, experts, width, hidden) for name in names[:2])
    down = weights.stack(backend, names[2], experts, hidden, width)
    shared = None
    if config.num_shared_experts:
        shared = _load_mlp(weights, prefix, "_shexp", hidden, width * config.num_shared_experts)
    return MoE(router, backend, gate, up, down, shared)
