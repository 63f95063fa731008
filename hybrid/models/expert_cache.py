"""Making the copies of experts that a plan asks for."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybrid.backends.base import Backend
from hybrid.errors import PlacementError
from hybrid.models.hybrid_step import layer_backends
from hybrid.moe.cache import DynamicPolicy, PolicyOptions
from hybrid.moe.copier import CopySource
from hybrid.moe.copies import ExpertCopies
from hybrid.placement.hot_experts import ExpertCachePlan, LayerExperts


def make_copies(
    network: Any,
    plan: ExpertCachePlan,
    backends: dict[str, Backend],
    options: PolicyOptions | None = None,
) -> ExpertCopies:
    """Copies experts as planned, and lets the network's layers use them.

    Raises:
        PlacementError: the device cannot hold copies of experts, or no layer runs on it.
        DeviceError: copying has failed.
    """
    backend, options = backends[plan.device], options or PolicyOptions()
    _check(network, backend)
    layers = {layer.layer: layer for layer in plan.layers}
    sources = {number: _source(network, backends, layer) for number, layer in layers.items()}
    num_experts = network.config.router.num_experts
    policy = _policy(list(layers.values()), num_experts, options) if plan.policy == "dynamic" else None
    copies = ExpertCopies(
        backend, sources, num_experts, plan.chosen.experts, policy=policy, interval=options.interval
    )
    for number in sources:
        network.moes[number].experts.copies = copies.layer(number)
    return copies


def _check(network: Any, backend: Backend) -> None:
    if not backend.can_unpack:
        raise PlacementError(
            f"experts.cache: {backend.describe()} cannot hold copies of experts; leave it out"
        )
    if backend.runtime is not None and backend not in layer_backends(network):
        raise PlacementError(
            f"experts.cache: no layer runs on {backend.name}, so its streams take no part in steps; "
            "keep the cache on a device that attention is on"
        )


def _source(network: Any, backends: dict[str, Backend], layer: LayerExperts) -> CopySource:
    wanted = set(layer.rates)
    for stack in network.moes[layer.layer].experts.stacks:
        has = wanted if stack.experts is None else set(stack.experts)
        if stack.backend is backends["cpu"] and wanted <= has:
            return CopySource(stack.backend, (stack.gate, stack.up, stack.down), stack.experts)
    raise PlacementError(f"experts.cache: experts of layer {layer.layer} are not where the plan has them")


def _policy(layers: list[LayerExperts], num_experts: int, options: PolicyOptions) -> DynamicPolicy:
    rates = np.zeros((len(layers), num_experts))
    usable = np.zeros(rates.shape, bool)
    for row, layer in enumerate(layers):
        usable[row, list(layer.rates)] = True
        rates[row, list(layer.rates)] = list(layer.rates.values())
    policy = DynamicPolicy(np.array([layer.saved_s for layer in layers]), usable, options)
    if rates.std() > 0:  # of a profile
        policy.start(rates)
    return policy
