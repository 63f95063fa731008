"""RMS normalisation, with the residual addition that goes before it."""

from __future__ import annotations

import torch

from hybrid.backends.base import Backend


class RMSNorm:
    """``y = x / rms(x) * weight`` on the device of its weight."""

    def __init__(self, backend: Backend, weight: torch.Tensor, eps: float) -> None:
        self.backend, self.weight, self.eps = backend, weight, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.backend.rms_norm(self.backend.receive(x), self.weight, self.eps)

    def add(self, delta: torch.Tensor | None, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``residual += delta``, then normalises the sum. Returns both; the residual may be moved here."""
        residual = self.backend.receive(residual)
        if delta is None:
            return self.backend.rms_norm(residual, self.weight, self.eps), residual
        delta = self.backend.receive(delta)
        return self.backend.rms_norm(delta, self.weight, self.eps, residual), residual
