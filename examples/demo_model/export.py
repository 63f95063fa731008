"""From trained weights to the GGUF that the package ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hybrid.gguf import GGMLType, GGUFWriter, ValueType, quantize

from . import vocabulary
from .model import DemoConfig, DemoModel

T = GGMLType
# Formats by what a tensor is. Rows of attn_k_b are qk_nope_head_dim long, too short for a block of 256.
FORMATS = {
    "token_embd": T.Q5_K,
    "output": T.Q6_K,
    "attn_q_a": T.Q6_K,
    "attn_q_b": T.Q6_K,
    "attn_kv_a_mqa": T.Q6_K,
    "attn_k_b": T.Q8_0,
    "attn_v_b": T.Q6_K,
    "attn_output": T.Q6_K,
    "ffn_gate": T.Q5_K,
    "ffn_up": T.Q5_K,
    "ffn_down": T.Q6_K,
    "ffn_gate_exps": T.Q4_K,
    "ffn_up_exps": T.Q4_K,
    "ffn_down_exps": T.Q5_K,
    "ffn_gate_shexp": T.Q6_K,
    "ffn_up_shexp": T.Q6_K,
    "ffn_down_shexp": T.Q6_K,
}


def gguf_tensors(model: DemoModel) -> dict[str, np.ndarray]:
    """Float tensors under their GGUF names, shapes (..., rows, cols)."""
    c = model.c
    state = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for index in range(c.num_hidden_layers):
        source, target = f"model.layers.{index}.", f"blk.{index}."
        for theirs, ours in _LAYER_NAMES.items():
            if source + theirs in state:
                tensors[target + ours] = state[source + theirs]
        kv_b = state[source + "self_attn.kv_b_proj.weight"].reshape(c.num_attention_heads, -1, c.kv_lora_rank)
        tensors[target + "attn_k_b.weight"] = kv_b[:, : c.qk_nope_head_dim].transpose(0, 2, 1)
        tensors[target + "attn_v_b.weight"] = kv_b[:, c.qk_nope_head_dim :]
        gate_up = state.get(source + "mlp.experts.gate_up_proj")
        if gate_up is not None:
            tensors[target + "ffn_gate_exps.weight"] = gate_up[:, : c.moe_intermediate_size]
            tensors[target + "ffn_up_exps.weight"] = gate_up[:, c.moe_intermediate_size :]
            tensors[target + "ffn_down_exps.weight"] = state[source + "mlp.experts.down_proj"]
    return tensors


_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
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


def model_metadata(c: DemoConfig) -> dict[str, Any]:
    """Architecture keys, as llama.cpp's deepseek2 reads them."""
    keys: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "leading_dense_block_count": c.first_k_dense_replace,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": c.rope_theta,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
    }
    return {f"deepseek2.{key}": value for key, value in keys.items()}


def tokenizer_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Vocabulary keys of a byte-level BPE."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ids = tokenizer.token_to_id
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.PRE_NAME,
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [3 if token in vocabulary.SPECIAL else 1 for token, _ in vocab],
        "tokenizer.ggml.merges": _merges(tokenizer),
        "tokenizer.ggml.bos_token_id": ids(vocabulary.BOS),
        "tokenizer.ggml.eos_token_id": ids(vocabulary.EOS),
        "tokenizer.ggml.padding_token_id": ids(vocabulary.PAD),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": vocabulary.CHAT_TEMPLATE,
    }


def _merges(tokenizer: Tokenizer) -> list[str]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def export_gguf(model: DemoModel, tokenizer: Tokenizer, path: Path) -> None:
    """Writes the quantised model."""
    general = {
        "general.architecture": "deepseek2",
        "general.name": "hybrid demo stories",
        "general.license": "mit",
        "general.description": "Little stories by a small DeepSeek-V3, trained on generated text",
    }
    tensors = gguf_tensors(model)
    formats = {name: FORMATS.get(name.split(".")[-2], T.F32) for name in tensors}
    with GGUFWriter(path) as writer:
        for key, value in (general | model_metadata(model.c) | tokenizer_metadata(tokenizer)).items():
            writer.add_metadata(key, value, ValueType.FLOAT32 if isinstance(value, float) else None)
        for name, value in tensors.items():
            writer.add_tensor(name, value.shape, formats[name])
        for name, value in tensors.items():
            writer.write_tensor(name, quantize(np.ascontiguousarray(value), formats[name]))
