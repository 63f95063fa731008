"""Headers of published DeepSeek and Kimi files, as converters of their time wrote them: all are accepted.

The shapes are the real ones; the files hold headers alone.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from hybrid.backends.fake import FakeBackend
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType
from hybrid.models import deepseek2
from hybrid.models.registry import family_of
from hybrid.models.weights import WeightCheck
from hybrid.placement.planner import plan

V2_LITE = {
    "block_count": 27, "context_length": 163840, "embedding_length": 2048, "feed_forward_length": 10944,
    "vocab_size": 102400, "leading_dense_block_count": 1, "attention.head_count": 16,
    "attention.head_count_kv": 16, "attention.layer_norm_rms_epsilon": 1e-6, "attention.kv_lora_rank": 512,
    "attention.key_length": 192, "attention.value_length": 128, "rope.dimension_count": 64,
    "rope.freq_base": 10000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 4096, "rope.scaling.yarn_log_multiplier": 0.0707,
    "expert_count": 64, "expert_used_count": 6, "expert_shared_count": 2, "expert_weights_scale": 1.0,
    "expert_feed_forward_length": 1408,
}  # fmt: skip
V3 = V2_LITE | {
    "block_count": 61, "embedding_length": 7168, "feed_forward_length": 18432, "vocab_size": 129280,
    "leading_dense_block_count": 3, "attention.head_count": 128, "attention.head_count_kv": 128,
    "attention.q_lora_rank": 1536, "rope.scaling.yarn_log_multiplier": 0.1, "expert_count": 256,
    "expert_used_count": 8, "expert_shared_count": 1, "expert_weights_scale": 2.5,
    "expert_feed_forward_length": 2048, "expert_weights_norm": True, "expert_gating_func": 2,
}  # fmt: skip
LATENT = {
    "attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512,
    "attention.key_length_mla": 192, "attention.value_length_mla": 128,
}  # fmt: skip
GROUPS = {"expert_group_count": 8, "expert_group_used_count": 4}
BETAS = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
KIMI = V3 | LATENT | {
    "vocab_size": 163840, "context_length": 131072, "leading_dense_block_count": 1,
    "attention.head_count": 64, "rope.freq_base": 50000.0, "rope.scaling.factor": 32.0, "expert_count": 384,
    "expert_weights_scale": 2.827,
}  # fmt: skip

MLA_KEYS = {"attention.key_length_mla", "attention.value_length_mla"}
GROUP_KEYS = {"expert_group_count", "expert_group_used_count"}
BETA_KEYS = set(BETAS)


def without(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in keys.items() if name not in names}


@dataclass(frozen=True)
class Header:
    """A file: its keys, the attention tensors it has, the gaps that must be logged, what must come out."""

    keys: dict[str, Any]
    missing: set[str]
    expected: dict[str, Any]
    kv_b: str = "kv_b"
    nextn: bool = False
    router: dict[str, Any] = field(default_factory=dict)


HEADERS = {
    "V2-Lite, 2024": Header(
        V2_LITE,
        MLA_KEYS | GROUP_KEYS | BETA_KEYS | {"expert_gating_func", "expert_weights_norm"},
        {"num_layers": 27, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": 0},
        router={"scoring": "softmax", "norm_topk_prob": False, "num_groups": 1},
    ),
    "V2, 2024": Header(
        V2_LITE
        | {"block_count": 60, "embedding_length": 5120, "feed_forward_length": 12288, "expert_count": 160}
        | {"attention.head_count": 128, "attention.head_count_kv": 128, "attention.q_lora_rank": 1536}
        | {"expert_feed_forward_length": 1536, "expert_weights_scale": 16.0},
        MLA_KEYS | GROUP_KEYS | BETA_KEYS | {"expert_gating_func", "expert_weights_norm"},
        {"num_layers": 60, "q_lora_rank": 1536},
        router={"scoring": "softmax", "routed_scaling_factor": 16.0},
    ),
    "V3 and R1, January 2025": Header(
        V3,
        MLA_KEYS | GROUP_KEYS | BETA_KEYS,
        {"num_layers": 61, "qk_nope_head_dim": 128, "kv_lora_rank": 512},
        router={"scoring": "sigmoid", "norm_topk_prob": True, "num_groups": 1},
    ),
    "R1 with all three kv_b tensors": Header(
        V3, MLA_KEYS | GROUP_KEYS | BETA_KEYS, {"qk_nope_head_dim": 128}, kv_b="all"
    ),
    "R1 with kv_b of before the final layout": Header(
        without(V3 | LATENT, *MLA_KEYS),
        MLA_KEYS | GROUP_KEYS | BETA_KEYS,
        {"qk_nope_head_dim": 128, "v_head_dim": 128},
        kv_b="flat",
    ),
    "V3 without a gating function": Header(
        without(V3, "expert_gating_func"),
        MLA_KEYS | GROUP_KEYS | BETA_KEYS | {"expert_gating_func"},
        {},
        router={"scoring": "sigmoid"},
    ),
    "R1-0528": Header(V3 | LATENT, GROUP_KEYS | BETA_KEYS, {"qk_nope_head_dim": 128}, kv_b="split"),
    "V3.1": Header(
        V3 | LATENT | GROUPS | BETAS,
        set(),
        {"v_head_dim": 128},
        kv_b="split",
        router={"num_groups": 8, "topk_groups": 4},
    ),
    "V3 with its prediction layer": Header(
        V3 | LATENT | GROUPS | {"block_count": 62, "nextn_predict_layers": 1},
        BETA_KEYS,
        {"num_layers": 61, "num_nextn_layers": 1},
        kv_b="split",
        nextn=True,
    ),
    "Kimi-K2": Header(
        KIMI,
        GROUP_KEYS | BETA_KEYS,
        {"num_heads": 64, "rope_theta": 50000.0},
        kv_b="split",
        router={"num_experts": 384, "num_groups": 1},
    ),
}


def shapes_of(keys: dict[str, Any], kv_b: str, nextn: bool) -> dict[str, tuple[int, ...]]:
    """All tensors of a model, from its keys alone."""
    hidden, heads, latent, rope = (
        keys["embedding_length"],
        keys["attention.head_count"],
        keys["attention.kv_lora_rank"],
        keys["rope.dimension_count"],
    )
    nope, v_dim, q_rank = 128, 128, keys.get("attention.q_lora_rank")
    width, experts = keys["expert_feed_forward_length"], keys["expert_count"]
    shared, dense = width * keys["expert_shared_count"], keys["feed_forward_length"]
    kv_b_shapes = {
        "kv_b": {"attn_kv_b": (heads * (nope + v_dim), latent)},
        "split": {"attn_k_b": (heads, latent, nope), "attn_v_b": (heads, v_dim, latent)},
        "flat": {"attn_k_b": (heads * latent, nope), "attn_v_b": (heads * v_dim, latent)},
    }
    kv_b_shapes["all"] = kv_b_shapes["kv_b"] | kv_b_shapes["split"]
    attention = {
        "attn_norm": (hidden,), "attn_kv_a_mqa": (latent + rope, hidden), "attn_kv_a_norm": (latent,),
        "attn_output": (hidden, heads * v_dim), "ffn_norm": (hidden,), **kv_b_shapes[kv_b],
    }  # fmt: skip
    if q_rank:
        attention |= {"attn_q_a": (q_rank, hidden), "attn_q_a_norm": (q_rank,)}
        attention |= {"attn_q_b": (heads * (nope + rope), q_rank)}
    else:
        attention |= {"attn_q": (heads * (nope + rope), hidden)}
    mlp = {"ffn_gate": (dense, hidden), "ffn_up": (dense, hidden), "ffn_down": (hidden, dense)}
    moe = {
        "ffn_gate_inp": (experts, hidden), "ffn_gate_exps": (experts, width, hidden),
        "ffn_up_exps": (experts, width, hidden), "ffn_down_exps": (experts, hidden, width),
        "ffn_gate_shexp": (shared, hidden), "ffn_up_shexp": (shared, hidden),
        "ffn_down_shexp": (hidden, shared),
    }  # fmt: skip
    shapes = {
        "token_embd": (keys["vocab_size"], hidden),
        "output_norm": (hidden,),
        "output": (keys["vocab_size"], hidden),
    }
    for layer in range(keys["block_count"]):
        parts = attention | (mlp if layer < keys["leading_dense_block_count"] else moe)
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    if "expert_weights_norm" in keys:  # the sigmoid models
        for layer in range(keys["leading_dense_block_count"], keys["block_count"]):
            shapes[f"blk.{layer}.exp_probs_b.bias"] = (experts,)
    if nextn:
        shapes[f"blk.{keys['block_count'] - 1}.nextn.eh_proj.weight"] = (hidden, 2 * hidden)
    return shapes


@pytest.fixture(params=HEADERS)
def published(request, tmp_path):
    header = HEADERS[request.param]
    path = tmp_path / "model.gguf"
    with GGUFWriter(path, header_only=True) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        for key, value in header.keys.items():
            writer.add_metadata(
                f"deepseek2.{key}", value, ValueType.FLOAT32 if isinstance(value, float) else None
            )
        for name, shape in shapes_of(header.keys, header.kv_b, header.nextn).items():
            plain = len(shape) == 1 or shape[-1] % 256
            writer.add_tensor(name, shape, GGMLType.F32 if plain else GGMLType.Q4_K)
    with GGUFFile.open(path, header_only=True) as file:
        yield header, file


def test_published_header_is_accepted_and_its_gaps_are_logged(published, caplog):
    header, file = published
    with caplog.at_level(logging.INFO, logger="hybrid"):
        config = family_of(file).read_config(file)
    logged = {record.args[1].removeprefix("deepseek2.") for record in caplog.records}
    assert logged == header.missing
    for name, value in header.expected.items():
        assert getattr(config, name) == value, name
    for name, value in header.router.items():
        assert getattr(config.router, name) == pytest.approx(value), name


def test_published_tensors_are_all_used(published, caplog):
    header, file = published
    config = deepseek2.read_config(file)
    placements = plan(file)
    check = WeightCheck(file, placements, {"cpu": FakeBackend("cpu")})
    deepseek2.load(config, check, 1)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hybrid"):
        check.finish(config.num_layers)
    assert ("next-token prediction" in caplog.text) == header.nextn
    assert placements.one_line().startswith(f"all {config.num_layers} layers on cpu (")


def test_yarn_of_published_files(tmp_path):
    # The file has a tenth of mscale_all_dim (1 for V3); DeepSeek's own code scales the softmax by the square
    # of 0.1 * mscale_all_dim * ln(factor) + 1.
    path = tmp_path / "v3.gguf"
    with GGUFWriter(path, header_only=True) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        for key, value in (V3 | LATENT).items():
            writer.add_metadata(
                f"deepseek2.{key}", value, ValueType.FLOAT32 if isinstance(value, float) else None
            )
        writer.add_tensor("token_embd.weight", (129280, 7168), GGMLType.F32)
    with GGUFFile.open(path, header_only=True) as file:
        config = deepseek2.read_config(file)
    assert config.attention_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192), rel=1e-6)
    assert config.yarn.magnitude == 1.0
    assert (config.yarn.beta_fast, config.yarn.beta_slow) == (32.0, 1.0)


def test_beta_fast_of_kimi(tmp_path):
    path = tmp_path / "kimi.gguf"
    with GGUFWriter(path, header_only=True) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        for key, value in KIMI.items():
            writer.add_metadata(
                f"deepseek2.{key}", value, ValueType.FLOAT32 if isinstance(value, float) else None
            )
        writer.add_tensor("token_embd.weight", (163840, 7168), GGMLType.F32)
    with GGUFFile.open(path, header_only=True) as file:
        assert deepseek2.read_config(file).yarn.beta_fast == 1.0
