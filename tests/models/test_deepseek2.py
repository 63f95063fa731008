"""Whole models against transformers' own implementation."""

from __future__ import annotations

import pytest
import torch
from hybrid.kernels import cpu

DEVICES = ["fake:0", "cpu"]
LOGIT_TOLERANCE = 2e-4  # of the range of the logits


def everywhere(device):
    return {"version": 1, "rules": [{"select": {"name": "*"}, "place": {"device": device}}]}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the range of the expected logits."""
    return ((found - expected).abs().max() / (expected.max() - expected.min())).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split_kv_b", [False, True], ids=["kv_b", "k_b+v_b"])
def test_logits_equal_transformers(make_reference, open_model, variant, split_kv_b, device):
    reference = make_reference(variant, split_kv_b)
    found = open_model(reference.path, everywhere(device)).logits(reference.ids)
    assert error(found, reference.logits) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("variant", ["v2-groups-yarn", "v3"])
def test_decode_and_chunks_give_the_bits_of_one_prefill(make_reference, open_model, variant):
    reference = make_reference(variant)
    runner = open_model(reference.path)
    whole = runner.logits(reference.ids)
    for chunks in ([1] * 100, [64, 36], [7, 57, 1, 35]):
        assert torch.equal(runner.logits(reference.ids, chunks), whole)


def test_thread_count_does_not_change_bits(make_reference, open_model):
    reference = make_reference("v3")
    results = [open_model(reference.path, num_threads=n).logits(reference.ids) for n in (1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_every_isa_of_the_host(make_reference, open_model, isa):
    reference = make_reference("v3-yarn")
    before = cpu.current_isa()
    try:
        cpu.select_isa(isa)
        found = open_model(reference.path).logits(reference.ids)
    finally:
        cpu.select_isa(before)
    assert error(found, reference.logits) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("kv_format, unit", [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 254)])
def test_cache_formats(make_reference, open_model, kv_format, unit):
    # Half a unit in the last place of every latent. A token whose experts change is off by more, so the
    # middle one of the positions is looked at.
    reference = make_reference("v3")
    found = open_model(reference.path, kv_format=kv_format).logits(reference.ids)
    worst = (found - reference.logits).abs().amax(dim=1) / (reference.logits.max() - reference.logits.min())
    assert 0 < worst.median().item() <= 2 * unit


MIXED = {
    "by layer": [
        {"select": {"layers": 0}, "place": {"device": "fake:0"}},
        {"select": {"layers": 2}, "place": {"device": "fake:1"}},
    ],
    "experts apart": [
        {"select": {"role": "routed_experts"}, "place": {"device": "cpu"}},
        {"select": {"name": "*"}, "place": {"device": "fake:0"}},
    ],
    "by role": [
        {"select": {"role": ["attention", "embedding"]}, "place": {"device": "fake:0"}},
        {"select": {"role": ["router", "shared_experts", "output"]}, "place": {"device": "fake:1"}},
    ],
}


@pytest.mark.parametrize("split", MIXED)
def test_mixed_placements_agree(make_reference, open_model, split):
    reference = make_reference("v3")
    runner = open_model(reference.path, {"version": 1, "rules": MIXED[split]})
    assert len(runner.model.plan.devices) > 1
    assert error(runner.logits(reference.ids, [60, 40]), reference.logits) <= LOGIT_TOLERANCE
