"""Shapes of published DeepSeek-family models, and the GGUF metadata that states them.

Numbers are those of the models' published `config.json`. Metadata keys are the ones llama.cpp's
converter writes (`conversion/deepseek.py`), so that llama.cpp and ik_llama.cpp load the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from hybrid.errors import ConfigError

KvBLayout = Literal["split", "joint"]

# llama.cpp and ik_llama.cpp take a model with these layer counts for one without q_lora, and read no key.
LITE_LAYER_COUNTS = (26, 27)
_GATING_FUNCTIONS = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True)
class VocabularyShape:
    """Size and special tokens of a generated vocabulary; ``pre`` is `tokenizer.ggml.pre`."""

    size: int
    pre: str
    bos_id: int
    eos_id: int


@dataclass(frozen=True)
class ModelShape:
    """A `deepseek2` model. ``q_lora_rank`` 0 = none."""

    name: str
    vocabulary: VocabularyShape
    hidden_size: int
    num_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int
    scoring: Literal["softmax", "sigmoid"]
    routed_scaling_factor: float
    norm_topk_prob: bool
    num_groups: int = 1
    topk_groups: int = 1
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn_factor: float = 40.0
    yarn_original_context: int = 4096
    yarn_mscale_all_dim: float = 1.0

    @property
    def context_length(self) -> int:
        return int(self.yarn_factor * self.yarn_original_context)


PRESETS: dict[str, ModelShape] = {
    "deepseek-v2-lite": ModelShape(
        name="deepseek-v2-lite",
        vocabulary=VocabularyShape(102400, "deepseek-llm", 100000, 100001),
        hidden_size=2048,
        num_layers=27,
        first_k_dense_replace=1,
        intermediate_size=10944,
        num_attention_heads=16,
        q_lora_rank=0,
        num_experts=64,
        num_experts_per_tok=6,
        num_shared_experts=2,
        moe_intermediate_size=1408,
        scoring="softmax",
        routed_scaling_factor=1.0,
        norm_topk_prob=False,
        yarn_mscale_all_dim=0.707,
    ),
    "deepseek-v3": ModelShape(
        name="deepseek-v3",
        vocabulary=VocabularyShape(129280, "deepseek-v3", 0, 1),
        hidden_size=7168,
        num_layers=61,
        first_k_dense_replace=3,
        intermediate_size=18432,
        num_attention_heads=128,
        q_lora_rank=1536,
        num_experts=256,
        num_experts_per_tok=8,
        num_shared_experts=1,
        moe_intermediate_size=2048,
        scoring="sigmoid",
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        num_groups=8,
        topk_groups=4,
    ),
    "kimi-k2": ModelShape(
        name="kimi-k2",
        vocabulary=VocabularyShape(163840, "kimi-k2", 163584, 163585),
        hidden_size=7168,
        num_layers=61,
        first_k_dense_replace=1,
        intermediate_size=18432,
        num_attention_heads=64,
        q_lora_rank=1536,
        num_experts=384,
        num_experts_per_tok=8,
        num_shared_experts=1,
        moe_intermediate_size=2048,
        scoring="sigmoid",
        routed_scaling_factor=2.827,
        norm_topk_prob=True,
        rope_theta=50000.0,
        yarn_factor=32.0,
    ),
    "tiny": ModelShape(
        name="tiny",
        vocabulary=VocabularyShape(1024, "deepseek-v3", 0, 1),
        hidden_size=256,
        num_layers=3,
        first_k_dense_replace=1,
        intermediate_size=512,
        num_attention_heads=4,
        q_lora_rank=256,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=1,
        moe_intermediate_size=256,
        scoring="sigmoid",
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        yarn_factor=4.0,
        yarn_original_context=1024,
    ),
}


# Beyond what any model has; larger numbers are slips, and their headers would take minutes.
_LIMITS = {"--layers": 1024, "--num-experts": 4096, "--expert-width": 1 << 20}


def resolve_shape(
    preset: str,
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    moe_intermediate_size: int | None = None,
) -> ModelShape:
    """A preset with some of its numbers replaced.

    Raises:
        ConfigError: unknown preset, or numbers that make no model.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}")
    given = (num_layers, num_experts, moe_intermediate_size)
    for (flag, most), number in zip(_LIMITS.items(), given, strict=True):
        if number is not None and number > most:
            raise ConfigError(f"{flag}: expected at most {most}, found {number}")
    shape = PRESETS[preset]
    if num_layers is not None:
        shape = replace(shape, num_layers=num_layers)
    if num_experts is not None:
        shape = _with_experts(shape, num_experts)
    if moe_intermediate_size is not None:
        shape = replace(shape, moe_intermediate_size=moe_intermediate_size)
    if shape.num_layers <= shape.first_k_dense_replace:
        raise ConfigError(
            f"--layers {shape.num_layers} leaves {preset} without experts: its first"
            f" {shape.first_k_dense_replace} layers are dense, so take at least"
            f" {shape.first_k_dense_replace + 1}"
        )
    if shape.moe_intermediate_size < 32 or shape.moe_intermediate_size % 32:
        raise ConfigError(
            f"--expert-width {shape.moe_intermediate_size} is no positive multiple of 32, the smallest"
            " block of a quantised row; multiples of 256 suit every format"
        )
    return shape


def _with_experts(shape: ModelShape, num_experts: int) -> ModelShape:
    if num_experts < shape.num_experts_per_tok:
        raise ConfigError(
            f"--num-experts {num_experts} is fewer than the {shape.num_experts_per_tok} experts that a token"
            f" of {shape.name} takes"
        )
    if num_experts % shape.num_groups:
        raise ConfigError(
            f"--num-experts {num_experts} is no multiple of {shape.name}'s {shape.num_groups} expert groups"
        )
    reachable = num_experts // shape.num_groups * shape.topk_groups
    if reachable < shape.num_experts_per_tok:
        raise ConfigError(
            f"--num-experts {num_experts}: the {shape.topk_groups} of {shape.num_groups} groups that a token"
            f" may use hold {reachable} experts, fewer than the {shape.num_experts_per_tok} it takes"
        )
    return replace(shape, num_experts=num_experts)


def metadata(shape: ModelShape, kv_b: KvBLayout) -> dict[str, Any]:
    """Hyper-parameters as GGUF keys. Integers are u32, floats f32 in the file.

    The split layout states the latent sizes as head sizes and one key/value head, and the true
    head sizes under ``*_length_mla``; the joint (older) layout states the true ones.
    """
    prefix = "deepseek2"
    nope_and_rope = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    values: dict[str, Any] = {
        "vocab_size": shape.vocabulary.size,
        "context_length": shape.context_length,
        "embedding_length": shape.hidden_size,
        "block_count": shape.num_layers,
        "leading_dense_block_count": shape.first_k_dense_replace,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "attention.kv_lora_rank": shape.kv_lora_rank,
        "expert_count": shape.num_experts,
        "expert_used_count": shape.num_experts_per_tok,
        "expert_shared_count": shape.num_shared_experts,
        "expert_feed_forward_length": shape.moe_intermediate_size,
        "expert_weights_scale": shape.routed_scaling_factor,
        "expert_weights_norm": shape.norm_topk_prob,
        "expert_gating_func": _GATING_FUNCTIONS[shape.scoring],
        "rope.dimension_count": shape.qk_rope_head_dim,
        "rope.freq_base": shape.rope_theta,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": shape.yarn_factor,
        "rope.scaling.original_context_length": shape.yarn_original_context,
        # llama.cpp's converter stores a tenth of mscale_all_dim.
        "rope.scaling.yarn_log_multiplier": 0.1 * shape.yarn_mscale_all_dim,
    }
    if kv_b == "split":
        values["attention.head_count_kv"] = 1
        values["attention.key_length"] = shape.kv_lora_rank + shape.qk_rope_head_dim
        values["attention.value_length"] = shape.kv_lora_rank
        values["attention.key_length_mla"] = nope_and_rope
        values["attention.value_length_mla"] = shape.v_head_dim
    else:
        values["attention.head_count_kv"] = shape.num_attention_heads
        values["attention.key_length"] = nope_and_rope
        values["attention.value_length"] = shape.v_head_dim
    if shape.num_groups > 1:
        values["expert_group_count"] = shape.num_groups
        values["expert_group_used_count"] = shape.topk_groups
    if shape.q_lora_rank or shape.num_layers not in LITE_LAYER_COUNTS:
        values["attention.q_lora_rank"] = shape.q_lora_rank
    return {f"{prefix}.{key}": value for key, value in values.items()}
