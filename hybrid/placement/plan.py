"""A plan: which device every tensor goes to and by which rule, what that takes, and how fast it should be."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid.placement.cost import Prediction
from hybrid.placement.machine import Machine
from hybrid.placement.memory import DeviceMemory, RunSize
from hybrid.placement.roles import layer_of, role_of


@dataclass(frozen=True)
class Placement:
    """The decision for one tensor.

    ``rule`` says where it comes from: a place in a file, or "auto". ``n_bytes`` are those on the device,
    padding and copies for NUMA nodes included; ``format`` is what it is stored in there, ``None``: as in the
    file.
    """

    device: str
    rule: str
    n_bytes: int
    numa: str = "none"
    format: str | None = None


@dataclass(frozen=True)
class Plan:
    """All placements of a model by tensor name, and what follows from them.

    Attributes:
        memory: device -> bytes there.
        size: what the run is sized for.
        prediction: ``None`` where the header does not tell enough.
        warnings: what is likely not meant, in whole sentences.
    """

    placements: dict[str, Placement]
    memory: Mapping[str, DeviceMemory] = field(default_factory=dict)
    size: RunSize = field(default_factory=RunSize)
    machine: Machine = field(default_factory=Machine)
    prediction: Prediction | None = None
    warnings: tuple[str, ...] = ()

    @property
    def devices(self) -> list[str]:
        """Devices in use, in order of their names."""
        return sorted({placement.device for placement in self.placements.values()})

    def bytes_on(self, device: str) -> int:
        """Bytes of the weights on ``device``."""
        return sum(p.n_bytes for p in self.placements.values() if p.device == device)

    def digest(self) -> str:
        """Eight hexadecimal digits that two plans share exactly if they place every tensor alike."""
        lines = []
        for name, p in sorted(self.placements.items()):
            extra = [f"numa={p.numa}"] if p.numa != "none" else []
            extra += [f"format={p.format}"] if p.format is not None else []
            lines.append(" ".join((name, p.device, *extra)))
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
            roles = Counter(role_of(name) for name, p in self.placements.items() if p.device == device)
            parts.append(f"{device}: {', '.join(sorted(roles))} ({size})")
        return "; ".join(parts)
