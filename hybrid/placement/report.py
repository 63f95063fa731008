"""A plan as plain JSON values, and the same cut by role, by layer range and by rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hybrid.placement.memory import Model, Tensor
from hybrid.placement.plan import ExpertShare, Placement, Plan

Part = Placement | ExpertShare


@dataclass(frozen=True)
class RoleShare:
    """A role's tensors on one device; ``formats`` are those of the most bytes first."""

    role: str
    device: str
    num_tensors: int
    n_bytes: int
    active_bytes: float
    formats: tuple[str, ...]


@dataclass(frozen=True)
class LayerRange:
    """Consecutive layers placed alike: role -> device. ``first`` is ``None`` for what is in no layer."""

    first: int | None
    last: int | None
    devices: dict[str, str]
    n_bytes: int

    @property
    def label(self) -> str:
        if self.first is None:
            return "-"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class RuleShare:
    """What one rule placed."""

    rule: str
    devices: tuple[str, ...]
    num_tensors: int
    n_bytes: int


def stored(model: Model, plan: Plan) -> Iterator[tuple[Tensor, Placement]]:
    """Tensors that are loaded, with their placements."""
    for tensor in model.tensors:
        if tensor.share:
            yield tensor, plan.placements[tensor.name]


def parts(model: Model, plan: Plan) -> Iterator[tuple[Tensor, Part]]:
    """The same; those that are divided come part by part."""
    for tensor, placement in stored(model, plan):
        for part in placement.parts:
            yield tensor, part


def by_role(model: Model, plan: Plan) -> list[RoleShare]:
    """One entry for each role and device, in the order of the file."""
    found: dict[tuple[str, str], list[tuple[Tensor, Part]]] = {}
    for tensor, part in parts(model, plan):
        found.setdefault((tensor.role, part.device), []).append((tensor, part))
    shares = []
    for (role, device), entries in found.items():
        formats: Counter[str] = Counter()
        for tensor, part in entries:
            formats[part.format or tensor.info.type.name] += part.n_bytes
        shares.append(
            RoleShare(
                role,
                device,
                len({tensor.name for tensor, _ in entries}),
                sum(part.n_bytes for _, part in entries),
                sum(tensor.active_bytes(part) for tensor, part in entries),
                tuple(name for name, _ in formats.most_common()),
            )
        )
    return shares


def by_layers(model: Model, plan: Plan) -> list[LayerRange]:
    """Layers placed alike stand together; tensors of no layer come last."""
    devices: dict[int | None, dict[str, str]] = {}
    sizes: Counter[int | None] = Counter()
    for tensor, part in parts(model, plan):
        roles = devices.setdefault(tensor.layer, {})
        known = roles.setdefault(tensor.role, part.device)
        if part.device not in known.split("+"):
            roles[tensor.role] = f"{known}+{part.device}"
        sizes[tensor.layer] += part.n_bytes
    ranges: list[LayerRange] = []
    for layer in sorted(layer for layer in devices if layer is not None):
        last = ranges[-1] if ranges else None
        if last and last.devices == devices[layer] and last.last == layer - 1:
            ranges[-1] = LayerRange(last.first, layer, last.devices, last.n_bytes + sizes[layer])
        else:
            ranges.append(LayerRange(layer, layer, devices[layer], sizes[layer]))
    if None in devices:
        ranges.append(LayerRange(None, None, devices[None], sizes[None]))
    return ranges


def by_rule(model: Model, plan: Plan) -> list[RuleShare]:
    """In order of first use."""
    found: dict[str, list[tuple[str, Part]]] = {}
    for tensor, part in parts(model, plan):
        found.setdefault(part.rule, []).append((tensor.name, part))
    return [
        RuleShare(
            rule,
            tuple(sorted({part.device for _, part in placed})),
            len({name for name, _ in placed}),
            sum(part.n_bytes for _, part in placed),
        )
        for rule, placed in found.items()
    ]


def as_json(model: Model, plan: Plan) -> dict[str, Any]:
    """Everything; the keys are part of the command line's interface."""
    prediction = plan.prediction
    return {
        "context": plan.size.max_model_len,
        "max_num_seqs": plan.size.max_num_seqs,
        "max_num_batched_tokens": plan.size.max_num_batched_tokens,
        "kv_format": plan.size.kv_format,
        "placement_hash": plan.digest(),
        "devices": {
            name: {
                "budget_bytes": memory.budget_bytes,
                "weights_bytes": memory.weights_bytes,
                "kv_cache_bytes": memory.kv_cache_bytes,
                "scratch_bytes": memory.scratch_bytes,
                "total_bytes": memory.total_bytes,
                "scratch": dict(memory.scratch_parts),
            }
            for name, memory in plan.memory.items()
        },
        "numa": {
            "mode": plan.numa,
            "reason": plan.numa_reason,
            "node_bytes": {str(node): n_bytes for node, n_bytes in sorted(plan.node_bytes.items())},
        },
        "predicted": {
            "decode_tps": prediction and prediction.decode_tps,
            "prefill_tps": prediction and prediction.prefill_tps,
            "bytes_per_token": prediction and {k: round(v) for k, v in prediction.bytes_read.items()},
            "rates": "measured" if prediction and prediction.measured else "estimated",
        },
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "device": placement.device,
                "format": placement.format or tensor.info.type.name,
                "bytes": placement.n_bytes,
                "rule": placement.rule,
                "numa": placement.numa,
                **_shares(placement),
            }
            for tensor, placement in ((t, plan.placements[t.name]) for t in model.tensors)
        ],
        "expert_cache": _expert_cache(plan),
        "warnings": list(plan.warnings),
    }


def _expert_cache(plan: Plan) -> dict[str, Any] | None:
    cache = plan.expert_cache
    if cache is None:
        return None
    return {
        "device": cache.device,
        "policy": cache.policy,
        "profile": cache.profile,
        "bytes": cache.chosen.n_bytes,
        "copies": cache.chosen.num_experts,
        "experts": cache.num_experts,
        "hit_rate": cache.chosen.hit_rate,
        "decode_tps": cache.decode_tps,
        "decode_tps_without": cache.without_tps,
        "pays": cache.pays,
        "layers": {str(layer): list(experts) for layer, experts in cache.chosen.experts.items()},
    }


def _shares(placement: Placement) -> dict[str, Any]:
    """Of a stack that is divided, which experts are where."""
    if not placement.shares:
        return {}
    return {
        "shares": [
            {
                "device": share.device,
                "experts": list(share.experts),
                "bytes": share.n_bytes,
                "rule": share.rule,
                "numa": share.numa,
                "format": share.format,
            }
            for share in placement.shares
        ]
    }
