"""What rules leave open, in order of benefit per byte.

A weight that every token reads gains most where memory is fast: attention first, with the cache of its layer
(which lies where attention runs) and with norms and router, so that hidden states do not travel; then shared
experts, dense blocks and output; then the routed experts of whole layers, of which a token reads a few of
many. The embedding gives one row a token and stays in RAM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hybrid.placement.capabilities import cache_row_bytes, can_multiply, columns_problem
from hybrid.placement.machine import Device, Machine
from hybrid.placement.memory import Model, RunSize, Tensor, scratch_parts
from hybrid.placement.plan import Placement
from hybrid.placement.roles import ROLES

CPU = "cpu"
_WITH_ATTENTION = ("attention", "norm", "router", "rope")
_DENSE = ("shared_experts", "dense_ffn", "output")


@dataclass
class Unit:
    """Tensors of one layer that are computed together, and the cache that comes with them.

    ``num_experts``: how many of a stack are meant; ``None``: all.
    """

    tensors: list[Tensor] = field(default_factory=list)
    cache_bytes: int = 0
    num_experts: int | None = None

    def bytes_on(self, kind: str) -> int:
        return self.cache_bytes + sum(t.bytes_on(kind, num_experts=self.num_experts) for t in self.tensors)


@dataclass(frozen=True)
class Fixed:
    """What rules have decided.

    Attributes:
        placements: by tensor; those of stacks in ``open_experts`` hold what is decided of them.
        open_experts: stack -> its experts that are open.
        cache: device -> bytes kept for copies of experts, 0: what is left; no experts are placed there.
    """

    placements: Mapping[str, Placement]
    open_experts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    cache: Mapping[str, int] = field(default_factory=dict)


def place_open(model: Model, fixed: Fixed, machine: Machine, size: RunSize) -> dict[str, str]:
    """Tensor -> device for all that is not fixed, or for the rest of it. Tensors join those of their unit
    that are fixed whole."""
    whole = {name: p for name, p in fixed.placements.items() if name not in fixed.open_experts}
    free = {gpu.name: _room(gpu, model, fixed, machine, size) for gpu in machine.gpus}
    devices: dict[str, str] = {}
    for unit in _units(model, size):
        rest = [tensor for tensor in unit.tensors if tensor.name not in whole]
        if not rest:
            continue
        joined = _joined(unit, whole)
        some = fixed.open_experts.get(rest[0].name)
        need = Unit(rest, 0 if joined else unit.cache_bytes, None if some is None else len(some))
        device = joined or _first_with_room(need, machine, free, fixed.cache)
        if device in free:
            free[device] -= need.bytes_on("cuda")
        devices.update((tensor.name, device) for tensor in rest)
    return devices


def _room(gpu: Device, model: Model, fixed: Fixed, machine: Machine, size: RunSize) -> int:
    """Bytes of a GPU that are open: its budget less what is fixed there and what running takes."""
    if gpu.budget_bytes is None:
        return 0
    working = sum(scratch_parts(model, gpu.kind, size, machine.num_threads, ROLES, hybrid=True).values())
    weights = sum(placement.bytes_on(gpu.name) for placement in fixed.placements.values())
    weights += fixed.cache.get(gpu.name, 0)
    layers = {
        t.layer for t in model.tensors if t.role == "attention" and _is_on(gpu.name, t, fixed.placements)
    }
    return gpu.budget_bytes - working - weights - len(layers) * _cache_bytes(model, size)


def _is_on(device: str, tensor: Tensor, fixed: Mapping[str, Placement]) -> bool:
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


def _joined(unit: Unit, fixed: Mapping[str, Placement]) -> str | None:
    """The device of the unit's tensors that rules have placed; of several, that of the heaviest's role."""
    placed = [tensor for tensor in unit.tensors if tensor.name in fixed]
    if not placed:
        return None
    return fixed[max(placed, key=lambda tensor: tensor.info.n_bytes).name].device


def _runs_on_gpu(tensor: Tensor) -> bool:
    format_ = tensor.info.type
    return can_multiply(format_, "cuda") and not columns_problem(format_, "cuda", tensor.parts[0][2])


def _first_with_room(unit: Unit, machine: Machine, free: Mapping[str, int], caches: Mapping[str, int]) -> str:
    if all(tensor.role == "embedding" and tensor.share < 1 for tensor in unit.tensors):
        return CPU
    if not any(tensor.share for tensor in unit.tensors):
        return CPU
    runs = all(not t.parts or _runs_on_gpu(t) for t in unit.tensors)
    experts = any(tensor.role == "routed_experts" for tensor in unit.tensors)
    for gpu in machine.gpus if runs else ():
        if experts and gpu.name in caches:
            continue
        if unit.bytes_on(gpu.kind) <= free[gpu.name]:
            return gpu.name
    return CPU
