"""What rules leave open, in order of benefit per byte.

A weight that every token reads gains most where memory is fast: attention first, with the cache of its layer
(which lies where attention runs) and with norms and router, so that hidden states do not travel; then shared
experts, dense blocks and output; then the routed experts of whole layers, of which a token reads a few of
many. The embedding gives one row a token and stays in RAM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hybrid.placement.capabilities import cache_row_bytes, can_multiply
from hybrid.placement.machine import Device, Machine
from hybrid.placement.memory import Model, Placed, RunSize, Tensor, scratch_parts
from hybrid.placement.roles import ROLES

CPU = "cpu"
_WITH_ATTENTION = ("attention", "norm", "router", "rope")
_DENSE = ("shared_experts", "dense_ffn", "output")


@dataclass
class Unit:
    """Tensors of one layer that are computed together, and the cache that comes with them."""

    tensors: list[Tensor] = field(default_factory=list)
    cache_bytes: int = 0

    def bytes_on(self, kind: str) -> int:
        return self.cache_bytes + sum(tensor.bytes_on(kind) for tensor in self.tensors)


def place_open(model: Model, fixed: Mapping[str, Placed], machine: Machine, size: RunSize) -> dict[str, str]:
    """Tensor -> device for all that ``fixed`` lacks. Tensors join those of their unit that are fixed."""
    free = {gpu.name: _room(gpu, model, fixed, machine, size) for gpu in machine.gpus}
    devices: dict[str, str] = {}
    for unit in _units(model, size):
        rest = [tensor for tensor in unit.tensors if tensor.name not in fixed]
        if not rest:
            continue
        joined = _joined(unit, fixed)
        need = Unit(rest, 0 if joined else unit.cache_bytes)
        device = joined or _first_with_room(need, machine, free)
        if device in free:
            free[device] -= need.bytes_on("cuda")
        devices.update((tensor.name, device) for tensor in rest)
    return devices


def _room(gpu: Device, model: Model, fixed: Mapping[str, Placed], machine: Machine, size: RunSize) -> int:
    """Bytes of a GPU that are open: its budget less what is fixed there and what running takes."""
    if gpu.budget_bytes is None:
        return 0
    working = sum(scratch_parts(model, gpu.kind, size, machine.num_threads, ROLES, hybrid=True).values())
    weights = sum(placed.n_bytes for placed in fixed.values() if placed.device == gpu.name)
    layers = {t.layer for t in model.tensors if t.role == "attention" and _is_on(gpu.name, t, fixed)}
    return gpu.budget_bytes - working - weights - len(layers) * _cache_bytes(model, size)


def _is_on(device: str, tensor: Tensor, fixed: Mapping[str, Placed]) -> bool:
    return tensor.name in fixed and fixed[tensor.name].device == device


def _cache_bytes(model: Model, size: RunSize) -> int:
    """Of one layer."""
    return size.cache_tokens * cache_row_bytes(model.dims.cache_width, size.kv_format)


def _units(model: Model, size: RunSize) -> Iterator[Unit]:
    """In order of benefit; of the experts the last layers come first."""
    by_role: dict[tuple[str, int | None], Unit] = {}
    tied = not any(tensor.role == "output" for tensor in model.tensors)
    for tensor in model.tensors:
        role = "output" if tied and tensor.role == "embedding" else tensor.role
        role = "attention" if role in _WITH_ATTENTION and tensor.layer is not None else role
        role = "output" if role == "norm" else role
        by_role.setdefault((role, tensor.layer), Unit()).tensors.append(tensor)
    for layer in model.dims.layers:
        if ("attention", layer) in by_role:
            unit = by_role.pop(("attention", layer))
            unit.cache_bytes = _cache_bytes(model, size)
            yield unit
    for key in [key for key in by_role if key[0] in _DENSE]:
        yield by_role.pop(key)
    experts = [key for key in by_role if key[0] == "routed_experts"]
    for key in sorted(experts, key=lambda key: -(key[1] or 0)):
        yield by_role.pop(key)
    for unit in by_role.values():
        yield Unit(list(unit.tensors))


def _joined(unit: Unit, fixed: Mapping[str, Placed]) -> str | None:
    """The device of the unit's tensors that rules have placed; of several, that of the heaviest's role."""
    placed = [tensor for tensor in unit.tensors if tensor.name in fixed]
    if not placed:
        return None
    return fixed[max(placed, key=lambda tensor: tensor.info.n_bytes).name].device


def _first_with_room(unit: Unit, machine: Machine, free: Mapping[str, int]) -> str:
    if all(tensor.role == "embedding" and tensor.share < 1 for tensor in unit.tensors):
        return CPU
    if not any(tensor.share for tensor in unit.tensors):
        return CPU
    runs = all(not t.parts or can_multiply(t.info.type, "cuda") for t in unit.tensors)
    for gpu in machine.gpus if runs else ():
        if unit.bytes_on(gpu.kind) <= free[gpu.name]:
            return gpu.name
    return CPU
