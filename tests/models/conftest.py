"""Random small DeepSeek models of transformers, written to GGUF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from hybrid.gguf import TRAITS, GGMLType, GGUFFile, GGUFWriter, ValueType, quantize
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models.loader import Model, load_model
from hybrid.placement.planner import plan

SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
}
NO_GROUPS = {"n_group": 1, "topk_group": 1}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Name -> (version, configuration beyond SHAPE).
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "v2-lite": (2, {"q_lora_rank": None, "first_k_dense_replace": 1, "topk_method": "greedy"}),
    "v2-groups-yarn": (
        2,
        {
            "q_lora_rank": 32,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": YARN,
        },
    ),
    "v2-no-dense": (
        2,
        {"q_lora_rank": 32, "first_k_dense_replace": 0, "topk_method": "greedy", "n_shared_experts": 2},
    ),
    "v3": (3, {"q_lora_rank": 32, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}),
    "v3-yarn": (
        3,
        {
            "q_lora_rank": 48,
            "first_k_dense_replace": 2,
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": YARN,
        },
    ),
    "v3-no-groups": (3, {"q_lora_rank": 32, "first_k_dense_replace": 1, **NO_GROUPS}),
    "v3-lite": (3, {"q_lora_rank": None, "first_k_dense_replace": 1, "norm_topk_prob": False, **NO_GROUPS}),
    "v3-wide-experts": (
        3,
        {
            "q_lora_rank": 32,
            "first_k_dense_replace": 1,
            "hidden_size": 256,
            "moe_intermediate_size": 256,
            **NO_GROUPS,
        },
    ),
}


def build_reference(variant: str, seed: int = 0) -> Any:
    """A random transformers model in float32, with routing that is spread and biased.

    transformers masks the groups that were not chosen with -inf in V3, as DeepSeek's own code does, and with
    0 in V2. Scores of softmax are positive, so both mean the same there.
    """
    version, changes = VARIANTS[variant]
    values = SHAPE | {"rope_parameters": PLAIN_ROPE} | changes
    torch.manual_seed(seed)
    config = DeepseekV2Config(**values) if version == 2 else DeepseekV3Config(**values)
    config._attn_implementation = "eager"
    model = (DeepseekV2ForCausalLM if version == 2 else DeepseekV3ForCausalLM)(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            value.data = torch.randn(value.shape, generator=generator) * 0.2
        elif value.dim() > 1:
            value.data = torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5
        elif "norm" in name:
            value.data = 1 + torch.randn(value.shape, generator=generator) * 0.2
    return model


def metadata_of(config: Any, version: int, split_kv_b: bool) -> dict[str, Any]:
    """Architecture keys as a conversion writes them."""
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim if split_kv_b else head_dim,
        "attention.value_length": config.kv_lora_rank if split_kv_b else config.v_head_dim,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_gating_func": 1 if version == 2 else 2,
    }
    if split_kv_b:
        keys |= {"attention.key_length_mla": head_dim, "attention.value_length_mla": config.v_head_dim}
    if config.q_lora_rank:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if version == 3:
        keys["expert_weights_norm"] = bool(config.norm_topk_prob)
    if version == 3 or config.topk_method == "group_limited_greedy":
        keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
    return {f"deepseek2.{key}": value for key, value in keys.items()}


_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def tensors_of(model: Any, split_kv_b: bool) -> dict[str, np.ndarray]:
    """A state dict under GGUF names."""
    config = model.config
    tensors: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if not name.startswith("model.layers."):
            top = {
                "model.embed_tokens.weight": "token_embd",
                "model.norm.weight": "output_norm",
                "lm_head.weight": "output",
            }
            tensors[top[name] + ".weight"] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        prefix = f"blk.{layer}."
        if rest == "mlp.experts.gate_up_proj":
            width = config.moe_intermediate_size
            tensors[prefix + "ffn_gate_exps.weight"] = array[:, :width]
            tensors[prefix + "ffn_up_exps.weight"] = array[:, width:]
        elif rest == "mlp.experts.down_proj":
            tensors[prefix + "ffn_down_exps.weight"] = array
        elif rest == "self_attn.kv_b_proj.weight" and split_kv_b:
            per_head = array.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            tensors[prefix + "attn_k_b.weight"] = per_head[:, : config.qk_nope_head_dim].transpose(0, 2, 1)
            tensors[prefix + "attn_v_b.weight"] = per_head[:, config.qk_nope_head_dim :]
        else:
            tensors[prefix + _NAMES[rest]] = array
    return tensors


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    type_of: Callable[[str], GGMLType] | None = None,
    split_max_bytes: int | None = None,
) -> Path:
    """A model file, F32 where ``type_of`` does not say otherwise. Arrays of uint8 are blocks, taken as they
    are: their last dimension is that of a row in bytes."""
    type_of = type_of or (lambda name: GGMLType.F32)
    with GGUFWriter(path, split_max_bytes=split_max_bytes) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        for key, value in metadata.items():
            writer.add_metadata(key, value, ValueType.FLOAT32 if isinstance(value, float) else None)
        for name, value in tensors.items():
            writer.add_tensor(name, shape_of(value, type_of(name)), type_of(name))
        for name, value in tensors.items():
            raw = value.dtype == np.uint8
            writer.write_tensor(name, value if raw else quantize(np.ascontiguousarray(value), type_of(name)))
    return path


def shape_of(value: np.ndarray, type_: GGMLType) -> tuple[int, ...]:
    if value.dtype != np.uint8:
        return value.shape
    traits = TRAITS[type_]
    return (*value.shape[:-1], value.shape[-1] // traits.block_bytes * traits.block_size)


@pytest.fixture
def write_model():
    """`write_gguf`, for tests."""
    return write_gguf


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    """Every variant in turn."""
    return request.param


def everywhere(device: str) -> dict[str, Any]:
    """Rules that put all tensors on one device."""
    return {"version": 1, "rules": [{"select": {"name": "*"}, "place": {"device": device}}]}


def batch_of(start: int, count: int) -> AttentionBatch:
    """Tokens ``start : start + count`` of one sequence, in scattered cache blocks."""
    positions = torch.arange(start, start + count, dtype=torch.int32)
    blocks = torch.tensor([[3, 0, 5, 1, 4, 2, 7, 6]], dtype=torch.int32)
    slots = blocks[0].long()[positions.long() // BLOCK_SIZE] * BLOCK_SIZE + positions.long() % BLOCK_SIZE
    return AttentionBatch(
        positions=positions,
        slot_mapping=slots.int(),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([start + count], dtype=torch.int32),
        block_tables=blocks,
    )


@dataclass
class Runner:
    """Runs a loaded model over a sequence in pieces of any size."""

    model: Model

    def logits(self, ids: torch.Tensor, chunks: list[int] | None = None) -> torch.Tensor:
        """Logits ``[T, vocab]`` of every position."""
        self.model.allocate_cache(8)
        hidden, start = [], 0
        with torch.inference_mode():
            for count in chunks or [len(ids)]:
                piece = ids[start : start + count].contiguous()
                hidden.append(self.model.forward(piece, batch_of(start, count)))
                start += count
            assert start == len(ids)
            return self.model.compute_logits(torch.cat(hidden))


@pytest.fixture
def open_model():
    """``open_model(path, rules, **options)`` -> Runner; models are closed at the end."""
    models: list[Model] = []

    def open_(path: Path, rules: dict[str, Any] | str = "auto", **options: Any) -> Runner:
        with GGUFFile.open(path) as file:
            options = {"max_model_len": 512, "kv_format": "f32"} | options
            models.append(load_model(file, plan=plan(file, rules), **options))
        return Runner(models[-1])

    yield open_
    for model in models:
        model.close()


@dataclass(frozen=True)
class Reference:
    """A transformers model, its file, a text and its logits."""

    variant: str
    model: Any
    path: Path
    ids: torch.Tensor
    logits: torch.Tensor

    def contents(self, split_kv_b: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Metadata and tensors, for another file."""
        version = VARIANTS[self.variant][0]
        return metadata_of(self.model.config, version, split_kv_b), tensors_of(self.model, split_kv_b)


@pytest.fixture(scope="module")
def make_reference(tmp_path_factory):
    """``make_reference(variant, split_kv_b)``, each made once."""
    made: dict[tuple[str, bool], Reference] = {}

    def make(variant: str, split_kv_b: bool = False) -> Reference:
        if (variant, split_kv_b) not in made:
            model = build_reference(variant)
            path = tmp_path_factory.mktemp("models") / f"{variant}.gguf"
            version = VARIANTS[variant][0]
            write_gguf(path, metadata_of(model.config, version, split_kv_b), tensors_of(model, split_kv_b))
            ids = torch.randint(0, SHAPE["vocab_size"], (100,), generator=torch.Generator().manual_seed(1))
            with torch.inference_mode():
                logits = model(ids[None]).logits[0]
            made[variant, split_kv_b] = Reference(variant, model, path, ids.int(), logits)
        return made[variant, split_kv_b]

    return make
