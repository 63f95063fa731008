"""Counting which experts tokens use, where they are routed, so that counting waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid.backends.base import Backend
from hybrid.backends.streams import Stream


@dataclass
class Phase:
    """Which steps a model is computing; all counters of a model share one.

    A pass over a prompt may pause between layers for steps that write, never the other way round: who runs
    such a step sets ``decodes`` and takes it back.
    """

    decodes: bool = False


class ExpertCounts:
    """Uses of ``num_experts`` experts, counted on a backend's device.

    Streams work at the same time, so each has counts of its own: int64 ``[num_experts]``, at an address that
    recordings and graphs keep, made when the stream counts first, which must not be within a capture.
    """

    def __init__(self, backend: Backend, num_experts: int) -> None:
        self.backend, self.num_experts = backend, num_experts
        self._counts: dict[Stream | None, torch.Tensor] = {}

    def add(self, topk_ids: torch.Tensor) -> None:
        """int32 ``[T, k]`` on the device; -1 is no expert."""
        runtime = self.backend.runtime
        stream = None if runtime is None else runtime.current
        if stream not in self._counts:
            zeros = torch.zeros(self.num_experts, dtype=torch.int64)
            self._counts[stream] = self.backend.receive(zeros)
        self.backend.count_experts(topk_ids, self._counts[stream])

    def tensors(self) -> list[torch.Tensor]:
        """The counts of all streams; their sum is that of the experts."""
        return list(self._counts.values())

    def read(self) -> tuple[int, ...]:
        """Of all streams, between steps; waits for the current one."""
        lists = [counts.tolist() for counts in self.tensors()] or [[0] * self.num_experts]
        return tuple(map(sum, zip(*lists, strict=True)))


class UsageCounter:
    """Uses of the experts of one layer by tokens of prompts and by tokens that are written."""

    def __init__(self, backend: Backend, num_experts: int, phase: Phase) -> None:
        self.phase = phase
        self.prompt, self.decode = ExpertCounts(backend, num_experts), ExpertCounts(backend, num_experts)

    def add(self, topk_ids: torch.Tensor) -> None:
        """int32 ``[T, k]`` of the router; -1 is no expert."""
        (self.decode if self.phase.decodes else self.prompt).add(topk_ids)
