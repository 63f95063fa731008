"""A forward pass that can pause within and between layers."""

from __future__ import annotations

from collections.abc import Generator

import torch

from hybrid.trace import Trace

# Yields after each part of a layer what kind of part that was: those of a kind take about as long for as many
# tokens. Its return value are the hidden states. Whoever has one may compute other batches in between, as
# long as they write no cache block of this one.
LayerSteps = Generator[str, None, torch.Tensor]


def run_layers(steps: LayerSteps) -> torch.Tensor:
    """All that is left of a pass, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            hidden_states: torch.Tensor = done.value
            return hidden_states


def traced_layers(steps: LayerSteps, trace: Trace, num_tokens: int) -> LayerSteps:
    """The same pass; notes how long Python takes for each part of a layer: all of it where nothing is
    queued."""
    layer = 0
    while True:
        try:
            with trace.span("engine", f"layer {layer}, {num_tokens} tokens"):
                part = next(steps)
        except StopIteration as done:
            hidden_states: torch.Tensor = done.value
            return hidden_states
        layer += part != "attention"
        yield part
