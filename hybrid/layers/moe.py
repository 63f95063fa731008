"""Routed experts beside a shared one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend, RouterConfig
from hybrid.layers.mlp import MLP
from hybrid.moe.experts import Experts


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

    def __init__(self, router: Router, experts: Experts, shared: MLP | None) -> None:
        self.router, self.experts, self.shared = router, experts, shared

    @property
    def can_record(self) -> bool:
        """Whether nothing but operations of backends takes part, see `Backend.record`."""
        return self.experts.can_record

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        routed = self.experts(x, *self.router(x))
        if self.shared is None:
            return routed
        out = self.shared(x)
        self.shared.backend.add(self.shared.backend.receive(routed), out)
        return out
