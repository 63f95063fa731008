"""Hyper-parameters of the GGUF architecture `deepseek2`; key names follow llama.cpp's conversion."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.backends.base import RouterConfig
from hybrid.gguf import GGUFFile
from hybrid.layers.rotary import YarnConfig
from hybrid.models.hparams import HParams


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
    num_heads = h.integer("attention.head_count", high=4096)
    num_kv_heads = h.integer("attention.head_count_kv", default=1, high=4096)
    if num_kv_heads not in (1, num_heads):
        h.fail("attention.head_count_kv", f"1 (latent) or {num_heads} (as many as heads)", num_kv_heads)
    rope_dim = h.integer("rope.dimension_count", high=1024)
    if rope_dim % 2:
        h.fail("rope.dimension_count", "an even number", rope_dim)
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
        num_heads=num_heads,
        q_lora_rank=h.integer("attention.q_lora_rank", default=0, low=0),
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=key_dim - rope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=v_dim,
        intermediate_size=h.integer("feed_forward_length"),
        first_k_dense_replace=dense,
        moe_intermediate_size=h.integer("expert_feed_forward_length"),
        num_shared_experts=h.integer("expert_shared_count", low=0, high=64),
        router=_router(h),
        rms_norm_eps=h.number("attention.layer_norm_rms_epsilon", high=1.0),
        rope_theta=h.number("rope.freq_base", above=1.0),
        yarn=_yarn(h),
    )


def _head_dims(h: HParams, kv_lora_rank: int, rope_dim: int) -> tuple[int, int]:
    """Key and value width of a head. Where they have keys of their own (`_mla`), key_length and value_length
    are those of the latent cache."""
    key_dim = h.integer("attention.key_length_mla", high=8192)
    v_dim = h.integer("attention.value_length_mla", high=8192)
    stated = h.integer("attention.key_length", default=key_dim)
    if stated not in (kv_lora_rank + rope_dim, key_dim):
        expected = f"kv_lora_rank + rope.dimension_count = {kv_lora_rank + rope_dim}"
        h.fail("attention.key_length", expected, stated)
    if key_dim <= rope_dim:
        h.fail("attention.key_length_mla", f"more than the {rope_dim} rotary dimensions", key_dim)
    return key_dim, v_dim


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
    if function not in (1, 2):
        h.fail("expert_gating_func", "1 (softmax) or 2 (sigmoid)", function)
    if function == 2 and groups > 1 and num_experts // groups < 2:
        h.fail("expert_group_count", "groups of at least two experts, whose two best score them", groups)
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
    if h.word("rope.scaling.type", ("none", "yarn"), default="none") == "none":
        return None
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        h.only(f"rope.scaling.{name}", 1.0)
    return YarnConfig(
        factor=h.number("rope.scaling.factor", least=1.0),
        original_context_length=h.integer("rope.scaling.original_context_length", high=1 << 30),
        beta_fast=h.number("rope.scaling.yarn_beta_fast"),
        beta_slow=h.number("rope.scaling.yarn_beta_slow"),
        log_multiplier=h.number("rope.scaling.yarn_log_multiplier", least=0.0, high=10.0),
    )
