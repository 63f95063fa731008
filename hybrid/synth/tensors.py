"""The tensors of a model shape: names, shapes, formats, and how their random values are spread.

Every matrix has values of standard deviation 1/sqrt(columns), so that a normalised hidden state
leaves with unit variance; those that follow a SwiGLU gate make up for the gate's loss. The
residual stream then grows like the square root of the layer count, attention scores and
router logits have unit variance, and routing is spread over the experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from hybrid.errors import ConfigError
from hybrid.gguf import TRAITS, GGMLType, tensor_bytes
from hybrid.synth.presets import KvBLayout, ModelShape

# What llama.cpp's quantiser takes when a row is no multiple of the 256-weight block
# (`llama-quant.cpp`, tensor_type_fallback).
FALLBACKS: dict[GGMLType, GGMLType] = {
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
    GGMLType.TQ1_0: GGMLType.Q4_0,
    GGMLType.TQ2_0: GGMLType.Q4_0,
    **dict.fromkeys(
        (
            GGMLType.IQ1_S,
            GGMLType.IQ1_M,
            GGMLType.IQ2_XXS,
            GGMLType.IQ2_XS,
            GGMLType.IQ2_S,
            GGMLType.IQ3_XXS,
            GGMLType.IQ3_S,
            GGMLType.IQ4_XS,
        ),
        GGMLType.IQ4_NL,
    ),
}

_ROUTER_BIAS_STD = 0.02
_SWIGLU_RMS = 0.6  # root mean square of silu(g) * u for independent g, u ~ N(0, 1)


@dataclass(frozen=True)
class Formats:
    """Formats by what the weights are for. The defaults are close to a published Q4_K_M file.

    ``experts`` are the routed experts' gate and up, ``dense`` the dense layers and shared experts.
    Norms, router and its bias are F32 always. ``k_b`` rows are 128 wide, too short for 256-weight blocks.
    """

    experts: GGMLType = GGMLType.Q4_K
    down: GGMLType = GGMLType.Q4_K
    dense: GGMLType = GGMLType.Q4_K
    attention: GGMLType = GGMLType.Q4_K
    embedding: GGMLType = GGMLType.Q4_K
    output: GGMLType = GGMLType.Q6_K


@dataclass(frozen=True)
class SynthTensor:
    """One tensor to be written; ``shape`` is (..., rows, cols). ``std`` 0 means all ``mean``."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    std: float
    mean: float = 0.0

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.type, self.shape)


@dataclass
class _Builder:
    shape: ModelShape
    formats: Formats
    fallbacks: dict[tuple[GGMLType, int], GGMLType] = field(default_factory=dict)

    def vector(self, name: str, size: int, *, mean: float = 1.0, std: float = 0.0) -> SynthTensor:
        return SynthTensor(name, (size,), GGMLType.F32, std, mean)

    def matrix(self, name: str, shape: tuple[int, ...], type_: GGMLType, *, gain: float = 1.0) -> SynthTensor:
        return SynthTensor(name, shape, self.fit(type_, shape[-1]), gain / math.sqrt(shape[-1]))

    def fit(self, type_: GGMLType, cols: int) -> GGMLType:
        """``type_``, or what stands in for it when rows of ``cols`` are no multiple of its block."""
        if cols % TRAITS[type_].block_size == 0:
            return type_
        fallback = FALLBACKS.get(type_)
        if fallback is None or cols % TRAITS[fallback].block_size:
            raise ConfigError(
                f"{type_.name} needs rows that are a multiple of {TRAITS[type_].block_size}, but"
                f" {self.shape.name} has rows of {cols}; choose a format with a smaller block, such as Q8_0"
            )
        self.fallbacks[type_, cols] = fallback
        return fallback

    def attention(self, prefix: str, kv_b: KvBLayout) -> Iterator[SynthTensor]:
        s, f = self.shape, self.formats.attention
        head_dim = s.qk_nope_head_dim + s.qk_rope_head_dim
        heads, latent = s.num_attention_heads, s.kv_lora_rank
        yield self.vector(f"{prefix}.attn_norm.weight", s.hidden_size)
        if s.q_lora_rank:
            yield self.matrix(f"{prefix}.attn_q_a.weight", (s.q_lora_rank, s.hidden_size), f)
            yield self.vector(f"{prefix}.attn_q_a_norm.weight", s.q_lora_rank)
            yield self.matrix(f"{prefix}.attn_q_b.weight", (heads * head_dim, s.q_lora_rank), f)
        else:
            yield self.matrix(f"{prefix}.attn_q.weight", (heads * head_dim, s.hidden_size), f)
        yield self.matrix(f"{prefix}.attn_kv_a_mqa.weight", (latent + s.qk_rope_head_dim, s.hidden_size), f)
        yield self.vector(f"{prefix}.attn_kv_a_norm.weight", latent)
        if kv_b == "split":
            # Keys are latent · k_bᵀ, a sum over the latent: that is what sets the spread, not the row length.
            gain = math.sqrt(s.qk_nope_head_dim / latent)
            k_type = f if s.qk_nope_head_dim % TRAITS[f].block_size == 0 else GGMLType.Q8_0
            shape = (heads, latent, s.qk_nope_head_dim)
            yield self.matrix(f"{prefix}.attn_k_b.weight", shape, k_type, gain=gain)
            yield self.matrix(f"{prefix}.attn_v_b.weight", (heads, s.v_head_dim, latent), f)
        else:
            rows = heads * (s.qk_nope_head_dim + s.v_head_dim)
            yield self.matrix(f"{prefix}.attn_kv_b.weight", (rows, latent), f)
        yield self.matrix(f"{prefix}.attn_output.weight", (s.hidden_size, heads * s.v_head_dim), f)
        yield self.vector(f"{prefix}.ffn_norm.weight", s.hidden_size)

    def dense(self, prefix: str, width: int, suffix: str = "") -> Iterator[SynthTensor]:
        hidden, f = self.shape.hidden_size, self.formats.dense
        yield self.matrix(f"{prefix}.ffn_gate{suffix}.weight", (width, hidden), f)
        yield self.matrix(f"{prefix}.ffn_up{suffix}.weight", (width, hidden), f)
        yield self.matrix(f"{prefix}.ffn_down{suffix}.weight", (hidden, width), f, gain=1 / _SWIGLU_RMS)

    def experts(self, prefix: str) -> Iterator[SynthTensor]:
        s, f = self.shape, self.formats
        hidden, width, count = s.hidden_size, s.moe_intermediate_size, s.num_experts
        yield self.matrix(f"{prefix}.ffn_gate_inp.weight", (count, hidden), GGMLType.F32)
        if s.scoring == "sigmoid":
            yield self.vector(f"{prefix}.exp_probs_b.bias", count, mean=0.0, std=_ROUTER_BIAS_STD)
        yield self.matrix(f"{prefix}.ffn_gate_exps.weight", (count, width, hidden), f.experts)
        yield self.matrix(f"{prefix}.ffn_up_exps.weight", (count, width, hidden), f.experts)
        down_shape = (count, hidden, width)
        yield self.matrix(f"{prefix}.ffn_down_exps.weight", down_shape, f.down, gain=1 / _SWIGLU_RMS)
        yield from self.dense(prefix, width * s.num_shared_experts, "_shexp")


def list_tensors(
    shape: ModelShape, formats: Formats, kv_b: KvBLayout
) -> tuple[list[SynthTensor], dict[tuple[GGMLType, int], GGMLType]]:
    """All tensors in file order, and the fallbacks taken: (format asked for, row length) -> format written.

    Raises:
        ConfigError: a format fits a row length neither itself nor by its fallback.
    """
    build = _Builder(shape, formats)
    vocabulary, hidden = shape.vocabulary.size, shape.hidden_size
    # Rows of the embedding are hidden states themselves: unit variance, hence the gain.
    gain = math.sqrt(hidden)
    tensors = [build.matrix("token_embd.weight", (vocabulary, hidden), formats.embedding, gain=gain)]
    tensors.append(build.vector("output_norm.weight", hidden))
    tensors.append(build.matrix("output.weight", (vocabulary, hidden), formats.output))
    for layer in range(shape.num_layers):
        prefix = f"blk.{layer}"
        tensors.extend(build.attention(prefix, kv_b))
        if layer < shape.first_k_dense_replace:
            tensors.extend(build.dense(prefix, shape.intermediate_size))
        else:
            tensors.extend(build.experts(prefix))
    return tensors, build.fallbacks
