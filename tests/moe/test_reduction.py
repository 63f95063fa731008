"""Fewer experts than the router chose, against the definition written out token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybrid.backends.base import RouterConfig
from hybrid.backends.fake import FakeBackend, FloatMatrix
from hybrid.layers.moe import MoE, Router
from hybrid.moe.experts import Experts, ExpertStack
from hybrid.moe.reduction import drop_minor_experts

NUM_EXPERTS, TOKENS, HIDDEN, WIDTH = 8, 40, 16, 12
CONFIGS = {
    "softmax": RouterConfig(NUM_EXPERTS, 3, "softmax", routed_scaling_factor=1.0),
    "softmax, scaled": RouterConfig(NUM_EXPERTS, 4, "softmax", 4, 2, False, 16.0),
    "softmax, normalised": RouterConfig(NUM_EXPERTS, 4, "softmax", norm_topk_prob=True),
    "sigmoid": RouterConfig(NUM_EXPERTS, 4, "sigmoid", 2, 1, True, 2.5),
}
CASES = [(name, threshold) for name in CONFIGS for threshold in (0.3, 0.7, 1.0)]


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = noise(TOKENS, HIDDEN, seed=0)
ROUTER, BIAS = noise(NUM_EXPERTS, HIDDEN, seed=1) * HIDDEN**-0.5, noise(NUM_EXPERTS, seed=2) * 0.3
GATE, UP = noise(NUM_EXPERTS, WIDTH, HIDDEN, seed=3), noise(NUM_EXPERTS, WIDTH, HIDDEN, seed=4)
DOWN = noise(NUM_EXPERTS, HIDDEN, WIDTH, seed=5)


def routed(config: RouterConfig) -> tuple[torch.Tensor, torch.Tensor]:
    return FakeBackend().route(X, FloatMatrix(ROUTER[None], False), BIAS, config)


def kept_by_definition(config: RouterConfig, threshold: float) -> list[dict[int, float]]:
    """For each token: expert -> weight, from the router's own scores in float64."""
    logits = X.double() @ ROUTER.double().T
    scores = logits.softmax(-1) if config.scoring == "softmax" else logits.sigmoid()
    tokens = []
    for ids, score in zip(routed(config)[0].tolist(), scores.tolist(), strict=True):
        heaviest = max(score[e] for e in ids)
        kept = {e: score[e] for e in ids if score[e] >= threshold * heaviest}
        total = sum(kept.values()) if config.norm_topk_prob else 1.0
        tokens.append({e: config.routed_scaling_factor * s / total for e, s in kept.items()})
    return tokens


def with_threshold(config: RouterConfig, threshold: float) -> RouterConfig:
    return replace(config, expert_threshold=threshold)


@pytest.mark.parametrize("name, threshold", CASES)
def test_experts_kept_and_their_weights(name: str, threshold: float) -> None:
    config = CONFIGS[name]
    before_ids, before = routed(config)
    ids, weights = drop_minor_experts(before_ids, before, with_threshold(config, threshold))
    assert ids.dtype is torch.int32
    assert weights.dtype is torch.float32
    assert ids.is_contiguous() and weights.is_contiguous()
    expected = kept_by_definition(config, threshold)
    for row_ids, row, wanted in zip(ids.tolist(), weights.tolist(), expected, strict=True):
        found = {e: w for e, w in zip(row_ids, row, strict=True) if e >= 0}
        assert found.keys() == wanted.keys()
        assert found == pytest.approx(wanted, rel=1e-5)
        assert all(w == 0 for e, w in zip(row_ids, row, strict=True) if e < 0)
    counts = {len(wanted) for wanted in expected}
    assert counts == {1} if threshold == 1 else min(counts) < config.num_experts_per_tok
    assert torch.equal(before_ids, routed(config)[0])  # left as they were
    assert torch.equal(before, routed(config)[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_threshold_that_drops_none_changes_none(name: str) -> None:
    config = CONFIGS[name]
    ids, weights = drop_minor_experts(*routed(config), with_threshold(config, 1e-6))
    assert torch.equal(ids, routed(config)[0])
    assert torch.allclose(weights, routed(config)[1], rtol=1e-6)


def test_a_token_gets_the_same_bits_alone_and_among_others() -> None:
    config = with_threshold(CONFIGS["sigmoid"], 0.5)
    ids, weights = routed(config)
    whole = drop_minor_experts(ids, weights, config)
    alone = [drop_minor_experts(ids[t : t + 1], weights[t : t + 1], config) for t in range(TOKENS)]
    assert torch.equal(torch.cat([a[0] for a in alone]), whole[0])
    assert torch.equal(torch.cat([a[1] for a in alone]), whole[1])


def layer(config: RouterConfig) -> MoE:
    backend = FakeBackend()
    weights = (FloatMatrix(w, False) for w in (GATE, UP, DOWN))
    router = Router(backend, FloatMatrix(ROUTER[None], False), BIAS, config)
    return MoE(router, Experts([ExpertStack(backend, *weights)], NUM_EXPERTS), None)


@pytest.mark.parametrize("name, threshold", CASES)
def test_a_layer_runs_what_is_kept(name: str, threshold: float) -> None:
    config = CONFIGS[name]
    moe = layer(with_threshold(config, threshold))
    found = moe(X)
    expected = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    tokens = kept_by_definition(config, threshold)
    for t, kept in enumerate(tokens):
        for e, weight in kept.items():
            x = X[t].double()
            hidden = torch.nn.functional.silu(GATE[e].double() @ x) * (UP[e].double() @ x)
            expected[t] += weight * (DOWN[e].double() @ hidden)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    count = moe.router.counter.read()
    assert count == (TOKENS * config.num_experts_per_tok, sum(map(len, tokens)))
    assert not moe.can_record


def test_nothing_is_counted_without_a_threshold() -> None:
    moe = layer(CONFIGS["sigmoid"])
    moe(X)
    assert moe.router.counter.read() == (0, 0)
    assert moe.can_record
