"""Bytes of weights bound to each NUMA node, and whether it has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hybrid.errors import PlacementError
from hybrid.placement.capabilities import kind_of
from hybrid.placement.machine import Machine, Node
from hybrid.placement.memory import Model
from hybrid.placement.numa import bytes_by_node, check_mode, node_of, side_of
from hybrid.placement.size_text import size_text

if TYPE_CHECKING:
    from hybrid.placement.plan import Placement, Plan


def require_mode(mode: str, machine: Machine) -> str:
    """``mode`` if it means something on a machine.

    Raises:
        ConfigError: it is no mode.
        PlacementError: the machine lacks its node.
    """
    node = node_of(check_mode(mode, "--numa"))
    if node is not None and node not in machine.node_ids:
        there = ", ".join(map(str, machine.node_ids))
        raise PlacementError(f"--numa: there is no NUMA node {node} on this machine, which has {there}")
    return mode


def node_bytes(model: Model, placements: Mapping[str, Placement], machine: Machine) -> dict[int, int]:
    """Node -> bytes of weights bound to it; pages left to first touch are on no node yet."""
    found: dict[int, int] = {}
    for tensor in model.tensors:
        for part in placements[tensor.name].parts if tensor.share else ():
            if kind_of(part.device) != "cpu" or part.numa == "none":
                continue
            side = side_of(tensor.name, tensor.role)
            shares = bytes_by_node(part.numa, side, tensor.parts, part.n_bytes, machine.worker_nodes)
            for node, n_bytes in shares:
                found[node] = found.get(node, 0) + n_bytes
    return found


def crowded_nodes(plan: Plan) -> list[Node]:
    """Nodes that have less memory than is bound to them, as far as it is known."""
    return [node for node in plan.machine.nodes if plan.node_bytes.get(node.id, 0) > node.budget_bytes]


def node_refusal(plan: Plan) -> str:
    """The message for a plan with crowded nodes."""
    bound = [(node, size_text(plan.node_bytes.get(node.id, 0))) for node in plan.machine.nodes]
    rows = [
        f"node {node.id}: {weights} of weights, {size_text(node.budget_bytes)} there"
        for node, weights in bound
    ]
    crowded = ", ".join(str(node.id) for node in crowded_nodes(plan))
    return (
        f"the weights do not fit on NUMA node {crowded}: {'; '.join(rows)} "
        f"(numa {plan.numa}, {plan.numa_reason}). Take --numa auto, or free memory there"
    )
