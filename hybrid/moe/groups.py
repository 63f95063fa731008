"""Which experts of a layer are loaded together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid.errors import PlacementError
from hybrid.placement.plan import ExpertShare, Placement

Placed = Placement | ExpertShare


@dataclass(frozen=True)
class ExpertGroup:
    """Experts on one device, each of their weights in one format. ``experts``: ``None`` means all."""

    device: str
    experts: tuple[int, ...] | None


def group_experts(placements: Mapping[str, Placement], num_experts: int) -> list[ExpertGroup]:
    """Divides the experts of a layer, given the placements of their stacked tensors by name.

    Groups come in the order of their first experts.

    Raises:
        PlacementError: weights of an expert are on different devices, or a tensor's shares leave one out.
    """
    if not any(placement.shares for placement in placements.values()):
        return [ExpertGroup(require_one_device(placements), None)]
    of_tensor = {name: _by_expert(name, found, num_experts) for name, found in placements.items()}
    groups: dict[tuple[str, ...], list[int]] = {}
    for expert in range(num_experts):
        shares = {name: owners[expert] for name, owners in of_tensor.items()}
        device = require_one_device(shares, f"weights of expert {expert}")
        key = device, *(f"{share.format} {share.numa}" for share in shares.values())
        groups.setdefault(key, []).append(expert)
    if len(groups) == 1:
        return [ExpertGroup(key[0], None) for key in groups]
    return [ExpertGroup(key[0], tuple(experts)) for key, experts in groups.items()]


def _by_expert(name: str, placement: Placement, num_experts: int) -> Sequence[Placed]:
    if not placement.shares:
        return [placement] * num_experts
    owners = {expert: share for share in placement.shares for expert in share.experts}
    count = sum(len(share.experts) for share in placement.shares)
    if sorted(owners) != list(range(num_experts)) or count != num_experts:
        raise PlacementError(
            f"{name}: the plan's shares must hold each of the {num_experts} experts once, found {placement}"
        )
    return [owners[expert] for expert in range(num_experts)]


def require_one_device(placed: Mapping[str, Placed], what: str = "tensors") -> str:
    """The device of what is computed together.

    Raises:
        PlacementError: there are several; the message names them and the rules.
    """
    devices = {placement.device: name for name, placement in placed.items()}
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device} (by {placed[name].rule})" for device, name in devices.items())
        raise PlacementError(
            f"{what} that are computed together are on different devices: {where}. "
            "Place them by role, or all of these by one rule."
        )
    (device,) = devices
    return device
