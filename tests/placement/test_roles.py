"""Roles by name, over every tensor name that published files of the family have."""

from __future__ import annotations

import pytest

from hybrid.placement.roles import ROLES, layer_of, role_of

ROLE_OF = {
    "token_embd.weight": "embedding",
    "output.weight": "output",
    "output_norm.weight": "norm",
    "rope_freqs.weight": "rope",
    "blk.0.attn_norm.weight": "norm",
    "blk.0.ffn_norm.weight": "norm",
    "blk.0.attn_q.weight": "attention",
    "blk.0.attn_q_a.weight": "attention",
    "blk.0.attn_q_a_norm.weight": "attention",
    "blk.0.attn_q_b.weight": "attention",
    "blk.0.attn_kv_a_mqa.weight": "attention",
    "blk.0.attn_kv_a_norm.weight": "attention",
    "blk.0.attn_kv_b.weight": "attention",
    "blk.0.attn_k_b.weight": "attention",
    "blk.0.attn_v_b.weight": "attention",
    "blk.0.attn_output.weight": "attention",
    "blk.0.ffn_gate.weight": "dense_ffn",
    "blk.0.ffn_up.weight": "dense_ffn",
    "blk.0.ffn_down.weight": "dense_ffn",
    "blk.10.ffn_gate_inp.weight": "router",
    "blk.10.exp_probs_b.bias": "router",
    "blk.10.ffn_gate_exps.weight": "routed_experts",
    "blk.10.ffn_up_exps.weight": "routed_experts",
    "blk.10.ffn_down_exps.weight": "routed_experts",
    "blk.10.ffn_gate_up_exps.weight": "routed_experts",
    "blk.10.ffn_gate_shexp.weight": "shared_experts",
    "blk.10.ffn_up_shexp.weight": "shared_experts",
    "blk.10.ffn_down_shexp.weight": "shared_experts",
    "blk.61.nextn.eh_proj.weight": "nextn",
    "blk.61.nextn.shared_head_norm.weight": "nextn",
    "something.else": "other",
}


@pytest.mark.parametrize("name", ROLE_OF)
def test_role(name):
    assert role_of(name) == ROLE_OF[name]


def test_every_role_is_met():
    assert set(ROLE_OF.values()) == set(ROLES)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("blk.0.attn_norm.weight", 0),
        ("blk.61.x", 61),
        ("output.weight", None),
        ("xblk.3.y", None),
        ("blk.x.y", None),
    ],
)
def test_layer(name, layer):
    assert layer_of(name) == layer
