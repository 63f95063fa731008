"""What the sections of rules besides the rules themselves mean for a plan: caches of keys and of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hybrid.errors import PlacementError
from hybrid.placement.capabilities import kind_of
from hybrid.placement.memory import DeviceMemory, Model, cache_devices
from hybrid.placement.plan import Placement
from hybrid.placement.rules import RuleSet
from hybrid.placement.rules.ranges import ranges_of

EXPERT_CACHE = "expert cache"


def require_cache_device(rule_set: RuleSet, model: Model, placements: Mapping[str, Placement]) -> None:
    """The cache lies where attention runs; rules may say where they expect that.

    Raises:
        PlacementError: attention of some layers runs elsewhere.
    """
    wanted = rule_set.kv_cache.device
    if wanted is None:
        return
    elsewhere = {n: found for n, found in cache_devices(model, placements).items() if found != wanted}
    if elsewhere:
        devices = ", ".join(sorted(set(elsewhere.values())))
        raise PlacementError(
            f"{rule_set.where('kv_cache.device')}: device: the cache lies where attention runs, and that of "
            f"layers {ranges_of(elsewhere)} runs on {devices}, not on {wanted}; place attention there, or "
            "leave device out"
        )


def expert_bytes(model: Model, kind: str) -> int:
    """Bytes of the largest expert, all its matrices together, on a device of this kind."""
    layers: dict[int | None, int] = {}
    for tensor in model.tensors:
        if tensor.num_experts:
            layers[tensor.layer] = layers.get(tensor.layer, 0) + tensor.bytes_on(kind, num_experts=1)
    return max(layers.values(), default=0)


def cache_bytes(model: Model, rule_set: RuleSet) -> dict[str, int]:
    """Device -> bytes that an expert cache of a stated size takes, in whole experts; 0: what will be left.

    Raises:
        PlacementError: less than one expert.
    """
    cache = rule_set.experts.cache
    if cache is None:
        return {}
    if cache.n_bytes is None:
        return {cache.device: 0}
    one = expert_bytes(model, kind_of(cache.device))
    if cache.n_bytes < one:
        raise PlacementError(
            f"{rule_set.where('experts.cache.bytes')}: bytes: expected at least the {one} bytes of one "
            f"expert, found {cache.n_bytes}"
        )
    return {cache.device: cache.n_bytes // one * one}


def with_expert_cache(
    memory: Mapping[str, DeviceMemory], model: Model, rule_set: RuleSet
) -> dict[str, DeviceMemory]:
    """Memory with the copies of experts that a device keeps, in whole experts.

    Raises:
        PlacementError: all that is left is asked for, of a device whose budget is not known.
    """
    found = dict(memory)
    for device, stated in cache_bytes(model, rule_set).items():
        before = found.get(device) or DeviceMemory(device, None, 0, 0, {})
        n_bytes = stated
        if not stated:
            if before.budget_bytes is None:
                raise PlacementError(
                    f"{rule_set.where('experts.cache.bytes')}: bytes: fill needs a budget of {device}; give "
                    f'it one (budget: {{"{device}": 24GiB}} or --vram {device}=24GiB), or say how many bytes'
                )
            one = expert_bytes(model, kind_of(device))
            n_bytes = max(before.budget_bytes - before.total_bytes, 0) // one * one
        found[device] = replace(before, scratch_parts={**before.scratch_parts, EXPERT_CACHE: n_bytes})
    return found
