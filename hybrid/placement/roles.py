"""What a tensor is for, by its name: the words people think in when they place a model."""

from __future__ import annotations

import re

ROLES = (
    "attention",
    "router",
    "norm",
    "routed_experts",
    "shared_experts",
    "dense_ffn",
    "embedding",
    "output",
    "rope",
    "nextn",
    "other",
)

_BLOCK = re.compile(r"^blk\.(\d+)\.")
# First match wins.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("nextn", r"\.nextn\."),
        ("embedding", r"^token_embd\."),
        ("output", r"^output\."),
        ("rope", r"rope_(freqs|factors)"),
        ("attention", r"\.attn_(q_a|kv_a)_norm\."),
        ("norm", r"norm\.(weight|bias)$"),
        ("routed_experts", r"\.ffn_(gate|up|down|gate_up)_exps\."),
        ("shared_experts", r"\.ffn_(gate|up|down|gate_inp)_shexp\."),
        ("router", r"\.(ffn_gate_inp|exp_probs_b)\."),
        ("dense_ffn", r"\.ffn_(gate|up|down)\."),
        ("attention", r"\.attn_"),
    )
)


def role_of(tensor_name: str) -> str:
    """The role of a tensor, one of `ROLES`."""
    for role, pattern in _PATTERNS:
        if pattern.search(tensor_name):
            return role
    return "other"


def layer_of(tensor_name: str) -> int | None:
    """The layer a tensor belongs to; ``None`` for embedding, output and the like."""
    match = _BLOCK.match(tensor_name)
    return int(match[1]) if match else None
