"""Counting which experts tokens use, where they are routed, so that counting waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid.backends.base import Backend


@dataclass
class Phase:
    """Which steps a model is computing; all counters of a model share one.

    A pass over a prompt may pause between layers for steps that write, never the other way round: who runs
    such a step sets ``decodes`` and takes it back.
    """

    decodes: bool = False


class UsageCounter:
    """Uses of the experts of one layer by tokens of prompts and by tokens that are written.

    Attributes:
        prompt, decode: int64 ``[num_experts]`` on the router's device; a recorded step adds to the latter.
    """

    def __init__(self, backend: Backend, num_experts: int, phase: Phase) -> None:
        self.backend, self.phase = backend, phase
        zeros = torch.zeros(num_experts, dtype=torch.int64)
        self.prompt, self.decode = backend.receive(zeros.clone()), backend.receive(zeros.clone())

    def add(self, topk_ids: torch.Tensor) -> None:
        """int32 ``[T, k]``; -1 is no expert."""
        self.backend.count_experts(topk_ids, self.decode if self.phase.decodes else self.prompt)
