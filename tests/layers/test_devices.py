"""Layers move what they receive to their own device, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from hybrid.backends.base import RouterConfig
from hybrid.backends.fake import FakeBackend, FloatMatrix
from hybrid.layers.linear import Embedding, Linear
from hybrid.layers.mlp import MLP
from hybrid.layers.moe import MoE, Router
from hybrid.layers.norm import RMSNorm
from hybrid.moe.experts import Experts, ExpertStack


class Device(FakeBackend):
    """Counts what it receives."""

    def __init__(self) -> None:
        super().__init__("fake:9")
        self.received: list[torch.Tensor] = []

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        self.received.append(x)
        return x.clone()


def matrix(*shape: int) -> FloatMatrix:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return FloatMatrix(values if values.dim() == 3 else values[None], quantized=False)


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def test_linear_and_embedding(x):
    device, weight = Device(), matrix(6, 8)
    assert torch.equal(Linear(device, weight)(x), x @ weight.values[0].T)
    ids = torch.tensor([2, 0], dtype=torch.int32)
    assert torch.equal(Embedding(device, weight)(ids), weight.values[0][[2, 0]])
    assert [tensor is source for tensor, source in zip(device.received, (x, ids), strict=True)] == [
        True,
        True,
    ]


def test_norm_adds_before_it_normalises(x):
    norm = RMSNorm(Device(), torch.ones(8), 1e-6)
    residual, delta = x.clone(), torch.ones(5, 8)
    out, added = norm.add(delta, residual)
    assert torch.equal(added, x + 1)
    assert torch.equal(out, norm(x + 1))
    out, unchanged = norm.add(None, residual)
    assert torch.equal(unchanged, residual)
    assert torch.equal(out, norm(residual))


def test_router_and_experts_on_different_devices(x):
    config = RouterConfig(4, 2, "sigmoid", norm_topk_prob=True)
    routers, experts, shared = Device(), Device(), Device()
    weights = matrix(4, 6, 8), matrix(4, 6, 8), matrix(4, 8, 6)
    shared_mlp = MLP(shared, matrix(6, 8), matrix(6, 8), matrix(8, 6))
    router = Router(routers, matrix(4, 8), torch.zeros(4), config)
    routed = Experts([ExpertStack(experts, *weights)], 4)
    together = MoE(router, routed, shared_mlp)(x)
    alone = MoE(router, routed, None)(x)
    assert torch.equal(together, alone + shared_mlp(x))
    assert any(tensor is x for tensor in routers.received)
    assert any(tensor.dtype is torch.int32 for tensor in experts.received)
