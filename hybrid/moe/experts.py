"""The routed experts of a layer, on one device or on several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend


@dataclass(frozen=True)
class ExpertStack:
    """Experts of a layer on one device: stacks of their three weights, and which they are.

    ``experts``: ids, in the order of the stacks; ``None``: all of the layer.
    """

    backend: Backend
    gate: Any
    up: Any
    down: Any
    experts: Sequence[int] | None = None


class Experts:
    """``[T, hidden]`` and the router's ids and weights ``[T, k]`` -> ``[T, hidden]`` on the first device.

    The parts of several devices are summed in the order of their stacks. Every expert is in one stack.
    """

    def __init__(self, stacks: Sequence[ExpertStack], num_experts: int) -> None:
        self.backend = stacks[0].backend
        self._parts = [(stack, _places(stack, num_experts)) for stack in stacks]

    @property
    def can_record(self) -> bool:
        """Whether nothing but operations of one backend takes part, see `Backend.record`."""
        return all(places is None for _, places in self._parts)

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        first, *others = (_run(stack, places, x, topk_ids, topk_weights) for stack, places in self._parts)
        for part in others:
            self.backend.add(self.backend.receive(part), first)
        return first


def _places(stack: ExpertStack, num_experts: int) -> torch.Tensor | None:
    """int32 ``[num_experts + 1]``: id -> place in the stack, -1 for experts elsewhere and, last, id -1."""
    if stack.experts is None:
        return None
    places = torch.full((num_experts + 1,), -1, dtype=torch.int32)
    places[list(stack.experts)] = torch.arange(len(stack.experts), dtype=torch.int32)
    return stack.backend.receive(places)


def _run(
    stack: ExpertStack,
    places: torch.Tensor | None,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> torch.Tensor:
    backend = stack.backend
    ids = backend.receive(topk_ids)
    if places is not None:
        ids = places[ids.long()]
    return backend.moe(
        backend.receive(x), stack.gate, stack.up, stack.down, ids, backend.receive(topk_weights)
    )
