"""Gaps in the headers of published files, and what stands in for what is missing.

Files made before a key existed are still good. This table is the only place that knows about them, and each
use is logged. What is not listed here is required, or has its default where it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybrid.gguf import GGUFFile


@dataclass(frozen=True)
class StandIn:
    """A value for a missing key, and why it is the right one."""

    value: Any
    reason: str


_Entry = Callable[[GGUFFile], StandIn | None]


def _integer(file: GGUFFile, name: str) -> int:
    return file.get(f"{file.architecture}.{name}", int)


def _first_shape(file: GGUFFile, ending: str) -> tuple[int, ...] | None:
    return next((info.shape for name, info in file.tensors.items() if name.endswith(ending)), None)


def _expert_width(file: GGUFFile) -> StandIn | None:
    shape = _first_shape(file, ".ffn_gate_exps.weight")
    if shape is None or len(shape) != 3:
        return None
    return StandIn(shape[1], f"the experts' own shape says {shape[1]}")


def _gating(file: GGUFFile) -> StandIn:
    # llama.cpp tells such files apart by layer and vocabulary counts; the bias says the same directly.
    if _first_shape(file, ".exp_probs_b.bias") is not None:
        return StandIn(2, "sigmoid, since only those models have a selection bias (exp_probs_b)")
    return StandIn(1, "softmax, as in DeepSeek-V2 files of before the key existed")


def _head_key_length(file: GGUFFile) -> StandIn:
    """Before latent attention was stored, key_length was a head's; some files with split `attn_k_b` state the
    cache's width there and no head's anywhere."""
    stated, rope_dim = _integer(file, "attention.key_length"), _integer(file, "rope.dimension_count")
    k_b = _first_shape(file, ".attn_k_b.weight")
    if k_b is not None and stated == _integer(file, "attention.kv_lora_rank") + rope_dim:
        return StandIn(k_b[-1] + rope_dim, f"the shape of attn_k_b says {k_b[-1]} and rotary dimensions")
    return StandIn(stated, "attention.key_length is that of a head in files of before the key existed")


def _head_value_length(file: GGUFFile) -> StandIn:
    stated, latent = _integer(file, "attention.value_length"), _integer(file, "attention.kv_lora_rank")
    v_b = _first_shape(file, ".attn_v_b.weight")
    if v_b is not None and stated == latent:
        rows = v_b[-2] if len(v_b) == 3 else v_b[0] // max(_integer(file, "attention.head_count"), 1)
        return StandIn(rows, f"the shape of attn_v_b says {rows}")
    return StandIn(stated, "attention.value_length is that of a head in files of before the key existed")


def _beta_fast(file: GGUFFile) -> StandIn:
    # Kimi-K2's configuration has beta_fast 1; converters did not write the key until late in 2025.
    factor = file.get(f"{file.architecture}.rope.scaling.factor", float, default=0.0)
    if factor == 32 and file.get(f"{file.architecture}.expert_count", int, default=0) == 384:
        return StandIn(1.0, "1, as in the configuration of Kimi-K2")
    return StandIn(32.0, "32, as in the configurations of DeepSeek models")


def _constant(value: Any, reason: str) -> _Entry:
    return lambda file: StandIn(value, reason)


TABLE: dict[str, _Entry] = {
    "attention.key_length_mla": _head_key_length,
    "attention.value_length_mla": _head_value_length,
    "expert_feed_forward_length": _expert_width,
    "expert_gating_func": _gating,
    # V3 and R1 were trained with 8 groups, 4 used. Files that leave them out run without everywhere.
    "expert_group_count": _constant(1, "experts are chosen without groups"),
    "expert_group_used_count": _constant(1, "experts are chosen without groups"),
    "expert_shared_count": _constant(0, "no shared experts"),
    "expert_weights_norm": _constant(False, "weights are not normalised, as in DeepSeek-V2"),
    "expert_weights_scale": _constant(1.0, "weights are not scaled, as in DeepSeek-V2-Lite"),
    "leading_dense_block_count": _constant(0, "all layers have experts"),
    "rope.freq_base": _constant(10000.0, "10000, as in all DeepSeek models"),
    "rope.scaling.yarn_beta_fast": _beta_fast,
    "rope.scaling.yarn_beta_slow": _constant(1.0, "1, as in the configurations of all these models"),
    "rope.scaling.yarn_log_multiplier": _constant(0.0, "YaRN scales the rotation, not the softmax"),
}
"""Key without its architecture -> what stands in for it, if anything."""


def stand_in(name: str, file: GGUFFile) -> StandIn | None:
    """What to use for a missing key (without its architecture prefix), if anything."""
    entry = TABLE.get(name)
    return None if entry is None else entry(file)
