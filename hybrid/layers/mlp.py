"""A dense SwiGLU block."""

from __future__ import annotations

from typing import Any

import torch

from hybrid.backends.base import Backend


class MLP:
    """``down(silu(gate x) * up x)``, ``[T, hidden] -> [T, hidden]``."""

    def __init__(self, backend: Backend, gate: Any, up: Any, down: Any) -> None:
        self.backend, self.gate, self.up, self.down = backend, gate, up, down

    @property
    def backends(self) -> list[Backend]:
        return [self.backend]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.backend.mlp(self.backend.receive(x), self.gate, self.up, self.down)
