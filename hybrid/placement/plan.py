"""A plan: which device every tensor goes to and by which rule, what that takes, and how fast it should be."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid.placement.cost import Prediction
from hybrid.placement.hot_experts import ExpertCachePlan
from hybrid.placement.machine import Machine
from hybrid.placement.memory import DeviceMemory, RunSize
from hybrid.placement.roles import layer_of, role_of
from hybrid.placement.rules.ranges import ranges_of


@dataclass(frozen=True)
class ExpertShare:
    """Some experts of a stacked tensor on one device. ``experts`` ascend; the rest is as in `Placement`."""

    device: str
    rule: str
    experts: tuple[int, ...]
    n_bytes: int
    numa: str = "none"
    format: str | None = None

    def __str__(self) -> str:
        return " ".join((self.device, *_extras(self.numa, self.format), f"experts={ranges_of(self.experts)}"))


@dataclass(frozen=True)
class Placement:
    """The decision for one tensor.

    ``rule`` says where it comes from: a place in a file, or "auto". ``n_bytes`` are those on the device,
    padding and copies for NUMA nodes included; ``format`` is the name of the GGML type that a matrix is
    stored in there, ``None``: as in the file. Vectors are float32 everywhere.

    ``shares`` divide a stack of experts: every expert is in exactly one of them, ``device`` is the first
    one's and ``n_bytes`` their sum. With none the whole tensor is on ``device``.
    """

    device: str
    rule: str
    n_bytes: int
    numa: str = "none"
    format: str | None = None
    shares: tuple[ExpertShare, ...] = ()

    @property
    def experts(self) -> None:
        """All of them, where it is a stack."""
        return None

    @property
    def parts(self) -> tuple[Placement, ...] | tuple[ExpertShare, ...]:
        """The shares, or the whole tensor as the only one."""
        return self.shares or (self,)

    @property
    def devices(self) -> set[str]:
        """Devices that hold some of the tensor."""
        return {part.device for part in self.parts}

    def bytes_on(self, device: str) -> int:
        """Bytes of the tensor on ``device``."""
        return sum(part.n_bytes for part in self.parts if part.device == device)

    def __str__(self) -> str:
        if self.shares:
            return "; ".join(map(str, self.shares))
        return " ".join((self.device, *_extras(self.numa, self.format)))


@dataclass(frozen=True)
class Plan:
    """All placements of a model by tensor name, and what follows from them.

    Attributes:
        memory: device -> bytes there.
        size: what the run is sized for.
        prediction: ``None`` where the header does not tell enough.
        numa: the mode of weights on the CPU for which no rule says one, and why it was chosen.
        node_bytes: NUMA node -> bytes of weights bound to it.
        warnings: what is likely not meant, in whole sentences.
        expert_cache: ``None`` where rules ask for none.
    """

    placements: dict[str, Placement]
    memory: Mapping[str, DeviceMemory] = field(default_factory=dict)
    size: RunSize = field(default_factory=RunSize)
    machine: Machine = field(default_factory=Machine)
    prediction: Prediction | None = None
    numa: str = "none"
    numa_reason: str = ""
    node_bytes: Mapping[int, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    expert_cache: ExpertCachePlan | None = None

    @property
    def devices(self) -> list[str]:
        """Devices in use, in order of their names."""
        return sorted({device for placement in self.placements.values() for device in placement.devices})

    def bytes_on(self, device: str) -> int:
        """Bytes of the weights on ``device``."""
        return sum(placement.bytes_on(device) for placement in self.placements.values())

    def digest(self) -> str:
        """Eight hexadecimal digits that two plans share exactly if they place every tensor alike."""
        lines = [f"{name} {placement}" for name, placement in sorted(self.placements.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]

    def one_line(self) -> str:
        """What runs where, for a person."""
        layers = {layer_of(name) for name in self.placements} - {None}
        layers -= {layer_of(name) for name in self.placements if role_of(name) == "nextn"}
        sizes = {device: f"{self.bytes_on(device) / 2**30:.2f} GiB" for device in self.devices}
        if len(sizes) == 1:
            ((device, size),) = sizes.items()
            return f"all {len(layers)} layers on {device} ({size})"
        parts = []
        for device, size in sizes.items():
            roles = {role_of(name) for name, p in self.placements.items() if device in p.devices}
            parts.append(f"{device}: {', '.join(sorted(roles))} ({size})")
        return "; ".join(parts)


def _extras(numa: str, format_: str | None) -> list[str]:
    extras = [f"numa={numa}"] if numa != "none" else []
    return extras + ([f"format={format_}"] if format_ is not None else [])
