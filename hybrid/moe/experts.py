"""The routed experts of a layer, on one device or on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.moe.handoff import HandedStack, Handoff


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
        self._handoff: Handoff | None = None
        self._home = self.backend  # where parts are summed
        self._handed: dict[int, HandedStack] = {}

    @property
    def can_record(self) -> bool:
        """Whether nothing but operations of one backend takes part, see `Backend.record`."""
        return all(places is None for _, places in self._parts)

    @property
    def backends(self) -> list[Backend]:
        return [stack.backend for stack, _ in self._parts]

    def hand_over(self, handoff: Handoff, layer: int, home: Backend, num_experts_per_tok: int) -> None:
        """From now on lanes of ``handoff`` take the stacks of backends that work for others, and the sum is
        made on ``home``."""
        self._handoff, self._home, self._handed = handoff, home, {}
        for slot, (stack, places) in enumerate(self._parts):
            if stack.backend.serves_handoff:
                here = None if places is None else home.receive(places)
                self._handed[slot] = handoff.add(
                    HandedStack(
                        layer, slot, home, stack.gate, stack.up, stack.down, here, num_experts_per_tok
                    )
                )

    def keep(self) -> None:
        """Ends `hand_over`."""
        self._handoff, self._home, self._handed = None, self.backend, {}

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return self.begin(x, topk_ids, topk_weights)()

    def begin(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Starts the experts; the function returned gives their sum. What the caller does in between runs
        beside experts that are handed over."""
        lane = None if self._handoff is None else self._handoff.lane
        home = self.backend if lane is None else self._home
        pending = {}
        if lane is not None:
            for slot, handed in self._handed.items():
                pending[slot] = lane.submit(handed, x, topk_ids, topk_weights)
        done = {
            slot: _run(stack, places, x, topk_ids, topk_weights)
            for slot, (stack, places) in enumerate(self._parts)
            if slot not in pending
        }

        def finish() -> torch.Tensor:
            parts = (done[slot] if slot in done else pending[slot]() for slot in range(len(self._parts)))
            first, *others = map(home.receive, parts)
            for part in others:
                home.add(part, first)
            return first

        return finish


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
