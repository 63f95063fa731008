"""Routed experts beside a shared one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hybrid.backends.base import Backend, RouterConfig
from hybrid.layers.mlp import MLP
from hybrid.moe.experts import Experts
from hybrid.moe.reduction import ExpertCounter, drop_minor_experts


@dataclass(frozen=True)
class Router:
    """The router's weight and selection bias, on their own device. Counts experts where it drops some."""

    backend: Backend
    weight: Any
    bias: torch.Tensor | None
    config: RouterConfig
    counter: ExpertCounter = field(default_factory=ExpertCounter)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = self.backend.route(self.backend.receive(x), self.weight, self.bias, self.config)
        if self.config.expert_threshold:
            ids, weights = drop_minor_experts(ids, weights, self.config)
            self.counter.add(ids)
        return ids, weights


class MoE:
    """``[T, hidden] -> [T, hidden]``: the routed experts' sum plus the shared expert."""

    def __init__(self, router: Router, experts: Experts, shared: MLP | None) -> None:
        self.router, self.experts, self.shared = router, experts, shared

    @property
    def can_record(self) -> bool:
        """Whether nothing but operations of backends takes part, see `Backend.record`."""
        return self.experts.can_record and not self.router.config.expert_threshold

    @property
    def backends(self) -> list[Backend]:
        """Those of all but the routed experts."""
        return [self.router.backend, *([] if self.shared is None else self.shared.backends)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        routed = self.experts.begin(x, *self.router(x))
        if self.shared is None:
            return routed()
        out = self.shared(x)
        self.shared.backend.add(self.shared.backend.receive(routed()), out)
        return out
