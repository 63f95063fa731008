"""From the section ``experts: cache:`` of rules to the copies a device keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from hybrid.gguf import GGMLType, GGUFFile
from hybrid.placement.capabilities import can_multiply, kind_of
from hybrid.placement.cost import cached_expert_seconds, cached_layer_seconds, cpu_expert_seconds
from hybrid.placement.hot_experts import Chosen, ExpertCachePlan, LayerExperts, choose, choose_slots
from hybrid.placement.machine import Machine
from hybrid.placement.memory import Model, Tensor
from hybrid.placement.plan import Placement, Plan
from hybrid.placement.rules import RuleSet
from hybrid.placement.rules.nodes import fail
from hybrid.placement.sections import EXPERT_CACHE
from hybrid.placement.usage import UsageProfile, check_model, read_profile


def cache_profile(rule_set: RuleSet, file: GGUFFile, model: Model, *, weights: bool) -> UsageProfile | None:
    """The profile that rules name, checked against the model; without its ``weights``, as far as a header
    tells.

    Raises:
        PlacementError: at the place of the key, what is wrong with the file.
    """
    cache = rule_set.experts.cache
    if cache is None or cache.profile is None:
        return None

    def refuse(problem: str) -> NoReturn:
        fail(rule_set.where("experts.cache.profile"), f"profile: {problem}")

    profile = read_profile(cache.profile, refuse)
    check_model(profile, file, model.dims, weights=weights, fail=refuse)
    return profile


def plan_cache(
    model: Model, plan: Plan, rule_set: RuleSet, profile: UsageProfile | None
) -> ExpertCachePlan | None:
    """What the cache of the rules holds at start in the bytes that the plan has for it."""
    cache = rule_set.experts.cache
    if cache is None:
        return None
    layers = cached_layers(model, plan.placements, plan.machine, cache.device, profile)
    n_bytes = plan.memory[cache.device].scratch_parts[EXPERT_CACHE]
    if not layers:
        fail(
            rule_set.where("experts.cache"),
            f"cache: no routed experts are on the CPU in formats that {cache.device} computes with, so there "
            "is nothing to copy; leave it out",
        )
    layer_s = cached_layer_seconds(cache.device)
    chosen = _choose(layers, n_bytes, layer_s, known=profile is not None)
    without, with_ = None, None
    if plan.prediction is not None:
        without = plan.prediction.decode_tps
        with_ = 1 / max(1 / without - chosen.saved_s, 1e-9)
    name = None if profile is None else cache.profile
    return ExpertCachePlan(cache.device, cache.policy, name, chosen, tuple(layers), with_, without)


def _choose(layers: list[LayerExperts], n_bytes: int, layer_s: float, *, known: bool) -> Chosen:
    """Copies for as much as rules ask for, also where no layer earns what its copies cost."""
    chosen = choose(layers, n_bytes, layer_s) if known else choose_slots(layers, n_bytes)
    if known and chosen.experts:
        return chosen
    chosen = choose(layers, n_bytes) if known else chosen
    return replace(chosen, saved_s=chosen.saved_s - layer_s * len(chosen.experts))


def cached_layers(
    model: Model,
    placements: Mapping[str, Placement],
    machine: Machine,
    device: str,
    profile: UsageProfile | None,
) -> list[LayerExperts]:
    """Layers with experts on the CPU that ``device`` could compute as well."""
    by_layer: dict[int, list[Tensor]] = {}
    for tensor in model.tensors:
        if tensor.num_experts and tensor.share and tensor.layer is not None:
            by_layer.setdefault(tensor.layer, []).append(tensor)
    found = []
    for layer, tensors in sorted(by_layer.items()):
        here = [_on_cpu(tensor, placements[tensor.name]) for tensor in tensors]
        experts = set.intersection(*(set(formats) for formats in here))
        formats = [next(iter(formats.values())) for formats in here] if experts else []
        kind = kind_of(device)
        if not experts or not all(can_multiply(format_, kind) for format_ in formats):
            continue
        share, count = tensors[0].share, tensors[0].num_experts
        rates = profile.rates(layer) if profile is not None else [share] * count
        saved = cpu_expert_seconds(tensors, formats, machine)
        saved -= cached_expert_seconds(tensors, formats, machine, device)
        found.append(
            LayerExperts(
                layer,
                " ".join(f"{f.name}{list(t.info.shape[1:])}" for t, f in zip(tensors, formats, strict=True)),
                sum(t.bytes_on(kind, f, num_experts=1) for t, f in zip(tensors, formats, strict=True)),
                {expert: rates[expert] for expert in sorted(experts)},
                saved,
            )
        )
    return found


def _on_cpu(tensor: Tensor, placement: Placement) -> dict[int, GGMLType]:
    """Experts on the CPU and the format they have there; a tensor whose parts differ counts by its first."""
    found: dict[int, GGMLType] = {}
    for part in placement.parts:
        if part.device == "cpu":
            format_ = tensor.info.type if part.format is None else GGMLType[part.format]
            experts = range(tensor.num_experts) if part.experts is None else part.experts
            if not found or format_ is next(iter(found.values())):
                found |= dict.fromkeys(experts, format_)
    return found
