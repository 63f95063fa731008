"""The routed experts of a layer, on one device or on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.moe.copies import LayerCopies
from hybrid.moe.handoff import HandedStack, Handoff, HandoffLane
from hybrid.moe.streaming import StreamedExperts


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

    The parts of several devices are summed in the order of their stacks, that of `copies` last. Every expert
    is in one stack.

    Attributes:
        copies: of some experts on another device, which computes those instead; ``None``: there are none.
        streamed: what computes experts of long prompts on a device; ``None``: nothing does.
    """

    copies: LayerCopies | None = None
    streamed: StreamedExperts | None = None

    def __init__(self, stacks: Sequence[ExpertStack], num_experts: int) -> None:
        self.backend = stacks[0].backend
        self._parts = [(stack, _places(stack, num_experts)) for stack in stacks]
        self._handoff: Handoff | None = None
        self._home = self.backend  # where parts are summed
        self._handed: dict[int, HandedStack] = {}

    @property
    def can_record(self) -> bool:
        """Whether nothing but operations of one backend takes part, see `Backend.record`."""
        return self.copies is None and all(places is None for _, places in self._parts)

    @property
    def backends(self) -> list[Backend]:
        copies = [] if self.copies is None else [self.copies.backend]
        return [stack.backend for stack, _ in self._parts] + copies

    @property
    def stacks(self) -> list[ExpertStack]:
        return [stack for stack, _ in self._parts]

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
        if lane is None and self.streamed is not None:
            return self._begin_streamed(self.streamed, x, topk_ids, topk_weights)
        return self._begin(lane, x, topk_ids, topk_weights)

    def _begin_streamed(
        self, streamed: StreamedExperts, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """With experts of many tokens on the device, where all is summed, while others are computed here."""
        compute = None
        if self.copies is not None:
            topk_ids, compute = self.copies.split(x, topk_ids, topk_weights)
        # Reading from the device waits for its stream, so it comes before all that is queued for this layer.
        here = self.backend
        host_x, host_ids, host_weights = here.receive(x), here.receive(topk_ids), here.receive(topk_weights)
        copied = None if compute is None else compute(False)
        experts = streamed.choose(host_ids)
        taken = torch.isin(host_ids, torch.tensor(experts, dtype=host_ids.dtype))
        there = streamed.begin(experts, x, host_ids, topk_weights)
        try:
            rest = self._begin(None, host_x, host_ids.masked_fill(taken, -1), host_weights, split=False)()
        except BaseException:
            there.abandon()
            raise
        total = there.finish()
        streamed.backend.add(streamed.backend.receive(rest), total)
        if copied is not None:
            streamed.backend.add(streamed.backend.receive(copied), total)
        return lambda: total

    def _begin(
        self,
        lane: HandoffLane | None,
        x: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        split: bool = True,
    ) -> Callable[[], torch.Tensor]:
        home = self.backend if lane is None else self._home
        pending = {}
        compute = None
        if split and self.copies is not None:
            topk_ids, compute = self.copies.split(x, topk_ids, topk_weights)
        if lane is not None:
            for slot, handed in self._handed.items():
                pending[slot] = lane.submit(handed, x, topk_ids, topk_weights)
        if compute is not None and not pending:
            # Reading from a device waits for its stream: before more is queued there.
            x, topk_ids, topk_weights = map(self.backend.receive, (x, topk_ids, topk_weights))
        # Behind what is handed over, and before what is computed here while the device works.
        copied = None if compute is None else compute(bool(pending))
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
            if copied is not None:
                home.add(home.receive(copied), first)
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
