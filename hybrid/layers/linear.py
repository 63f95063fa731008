"""A matrix on its device: embedding table and linear layer."""

from __future__ import annotations

from typing import Any

import torch

from hybrid.backends.base import Backend


class Linear:
    """``[T, cols] -> [T, rows]``."""

    def __init__(self, backend: Backend, weight: Any) -> None:
        self.backend, self.weight = backend, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.backend.linear(self.backend.receive(x), self.weight)


class Embedding:
    """Token ids, int32 ``[T]``, to their rows of the table, ``[T, hidden]``."""

    def __init__(self, backend: Backend, table: Any) -> None:
        self.backend, self.table = backend, table

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.backend.embed(self.backend.receive(token_ids), self.table)
