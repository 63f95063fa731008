"""Gaps in the headers of published files, and what stands in for what is missing.

Files made before a key existed are still good; this table is the only place that knows about them, and each
use is logged. Anything not listed here is required.
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


def _expert_width(file: GGUFFile) -> StandIn | None:
    for name, info in file.tensors.items():
        if name.endswith(".ffn_gate_exps.weight") and len(info.shape) == 3:
            return StandIn(info.shape[1], f"the experts' own shape says {info.shape[1]}")
    return None


def _gating(file: GGUFFile) -> StandIn:
    return StandIn(1, "files of before the key existed are softmax models (DeepSeek-V2)")


def _constant(value: Any, reason: str) -> Callable[[GGUFFile], StandIn | None]:
    return lambda file: StandIn(value, reason)


_TABLE: dict[str, Callable[[GGUFFile], StandIn | None]] = {
    "expert_gating_func": _gating,
    "expert_feed_forward_length": _expert_width,
    "expert_group_count": _constant(1, "no groups"),
    "expert_group_used_count": _constant(1, "no groups"),
    "expert_weights_norm": _constant(False, "weights are not normalised (DeepSeek-V2)"),
    "expert_weights_scale": _constant(1.0, "weights are not scaled (DeepSeek-V2-Lite)"),
    "leading_dense_block_count": _constant(0, "all layers have experts"),
}


def stand_in(name: str, file: GGUFFile) -> StandIn | None:
    """What to use for a missing key (without its architecture prefix), if anything."""
    entry = _TABLE.get(name)
    return None if entry is None else entry(file)
