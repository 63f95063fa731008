"""Routed experts beside a shared one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend, RouterConfig
from hybrid.layers.mlp import MLP


@dataclass(frozen=True)
class Router:
    """The router's weight and selection bias, on their own device."""

    backend: Backend
    weight: Any
    bias: torch.Tensor | None
    config: RouterConfig

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.backend.route(self.backend.receive(x), self.weight, self.bias, self.config)


class MoE:
    """``[T, hidden] -> [T, hidden]``: the routed experts' sum plus the shared expert."""

    def __init__(
        self, router: Router, backend: Backend, gate: Any, up: Any, down: Any, shared: MLP | None
    ) -> None:
        self.router, self.backend, self.shared = router, backend, shared
        self.gate, self.up, self.down = gate, up, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        topk_ids, topk_weights = self.router(x)
        backend = self.backend
        ids, weights = backend.receive(topk_ids), backend.receive(topk_weights)
        routed = backend.moe(backend.receive(x), self.gate, self.up, self.down, ids, weights)
        if self.shared is None:
            return routed
        out = self.shared(x)
        self.shared.backend.add(self.shared.backend.receive(routed), out)
        return out
