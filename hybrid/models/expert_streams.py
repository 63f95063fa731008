"""Letting layers on a device stream the experts that lie in RAM."""

from __future__ import annotations

from typing import Any

from hybrid.backends.base import Backend, PackedShape
from hybrid.log import get_logger
from hybrid.moe.copier import CopySource
from hybrid.moe.divide import StreamRates
from hybrid.moe.experts import Experts
from hybrid.moe.streaming import MIN_SLOTS, Ring, StreamedExperts, ring_slots

logger = get_logger(__name__)

_RING = tuple[Backend, tuple[PackedShape, ...]]


def stream_experts(network: Any, rates: dict[int, StreamRates]) -> list[Ring]:
    """Gives each layer in ``rates`` whose device has streams, and whose experts are all in RAM, a ring for
    long prompts; layers of equal shapes share one, and all rings together have their bound of memory."""
    layers: dict[int, tuple[Backend, CopySource]] = {}
    for number, moe in network.moes.items():
        device, source = moe.router.backend, _source(moe.experts)
        if number in rates and source is not None and device.runtime is not None and device.can_unpack:
            layers[number] = device, source
    kinds = list(dict.fromkeys((device, source.shapes) for device, source in layers.values()))
    rings: dict[_RING, Ring] = {}
    for number, (device, source) in layers.items():
        key = device, source.shapes
        n_bytes = sum(shape.n_bytes for shape in source.shapes)
        count = ring_slots(n_bytes, len(kinds))
        if not count:
            logger.warning(
                "experts of layer %d are not streamed to %s: %d of %.0f MiB do not fit the upload ring",
                number, device.name, MIN_SLOTS, n_bytes / (1 << 20),
            )  # fmt: skip
            continue
        if key not in rings:
            rings[key] = Ring(device, source, count)
        num_experts = network.moes[number].router.config.num_experts
        experts: Experts = network.moes[number].experts
        experts.streamed = StreamedExperts(rings[key], source, rates[number], num_experts)
    return list(rings.values())


def _source(experts: Experts) -> CopySource | None:
    """The experts of a layer, if one stack in RAM has all of them."""
    stacks = experts.stacks
    if len(stacks) > 1 or not stacks[0].backend.serves_handoff:
        return None
    stack = stacks[0]
    return CopySource(stack.backend, (stack.gate, stack.up, stack.down), stack.experts)
