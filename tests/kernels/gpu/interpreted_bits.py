"""Launchers refuse what does not fit, and a token's result is the same bits alone and in any batch."""

from __future__ import annotations

import pytest
import torch
from hybrid.kernels.gpu.formats import FORMATS, QuantizedMatrix, split_planes
from hybrid.kernels.gpu.gemm import align_slots, gemm, grouped_gemm
from hybrid.kernels.gpu.gemv import gemv
from hybrid.kernels.gpu.mla_attention import mla_attention
from hybrid.kernels.gpu.quantize_activations import quantize_activations
from hybrid.kernels.gpu.random_matrix import random_blocks
from hybrid.kernels.gpu.rms_norm import rms_norm
from hybrid.kernels.gpu.route import route
from hybrid.kernels.gpu.sampling import sample


def matrix(name, batch, rows, cols):
    fmt = FORMATS[name]
    blocks = random_blocks(fmt, batch * rows * cols // fmt.block_cols, torch.Generator().manual_seed(3))
    return QuantizedMatrix(fmt, batch, rows, cols, split_planes(fmt, blocks))


def test_bfloat16_is_refused():
    with pytest.raises(ValueError, match="under the interpreter, which computes bfloat16 wrongly"):
        rms_norm(torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(8), 1e-6)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rms_norm: expected weight of shape \(8,\), found \(9,\)"):
        rms_norm(torch.ones(1, 8), torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match=r"gemv: expected ids, for a stack of matrices, found none for 2"):
        gemv(*quantize_activations(torch.ones(1, 256)), matrix("Q4_K", 2, 4, 256))
    with pytest.raises(ValueError, match="route: expected 1 to 8 experts a token, found 9"):
        route(torch.zeros(1, 16), None, 9, "softmax", 4, 2)


def test_a_token_times_a_matrix_is_the_same_in_any_batch():
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    weight = matrix("Q4_K", 1, 5, 512)
    together = gemv(*quantize_activations(x), weight)
    alone = torch.cat([gemv(*quantize_activations(row[None]), weight) for row in x])
    assert torch.equal(together, alone)
    many = gemm(x.half(), weight)
    assert torch.equal(many[2:3], gemm(x[2:3].half(), weight))
    ids = torch.zeros(5, 1, dtype=torch.int32)
    assert torch.equal(grouped_gemm(x.half(), weight, ids), many)


def test_slots_are_sorted_by_expert_and_padded_to_blocks():
    ids = torch.tensor([[2, -1], [0, 2], [2, 0]], dtype=torch.int32)
    slots, experts = align_slots(ids, 4)
    blocks = slots.reshape(len(experts), -1)
    found = {
        int(e): sorted(b[b < 6].tolist()) for e, b in zip(experts, blocks, strict=True) if int(b.min()) < 6
    }
    assert found == {-1: [1], 0: [2, 5], 2: [0, 3, 4]}
    assert sorted(slots[slots < 6].tolist()) == list(range(6))


def test_attention_is_the_same_however_a_prompt_is_cut_and_in_any_batch():
    generator = torch.Generator().manual_seed(4)
    q, pe = (torch.randn(5, 2, dim, generator=generator) for dim in (32, 16))
    cache = torch.randn(128, 48, generator=generator)
    table, lens = torch.tensor([1, 0], dtype=torch.int32), torch.arange(64, 69, dtype=torch.int32)
    whole = mla_attention(q, pe, cache, None, table, lens, 0.1)
    halves = [
        mla_attention(q[s], pe[s], cache, None, table, lens[s], 0.1) for s in (slice(0, 3), slice(3, 5))
    ]
    assert torch.equal(whole, torch.cat(halves))
    tables = table.expand(5, 2).contiguous()
    batch = mla_attention(q, pe, cache, None, tables, lens, 0.1)
    assert torch.equal(batch[3:4], mla_attention(q[3:4], pe[3:4], cache, None, tables[3:4], lens[3:4], 0.1))


def test_top_k_of_one_is_greedy_and_every_admitted_token_can_be_drawn():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.5]]).repeat(4, 1)
    ones, all_ks = torch.ones(4), torch.zeros(4, dtype=torch.int32)
    uniforms = torch.tensor([0.0, 0.1, 0.5, 0.9999])
    zeros = torch.zeros(4)
    assert sample(logits, ones, all_ks + 1, ones, zeros, uniforms).tolist() == [3] * 4
    assert sample(logits, ones, all_ks, ones, zeros, uniforms).tolist() == [0, 1, 3, 3]
    assert sample(logits, ones, all_ks + 2, ones, zeros, uniforms).tolist() == [1, 1, 3, 3]
