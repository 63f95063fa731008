"""A plan: which device every tensor goes to, and by which rule."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from hybrid.placement.roles import layer_of, role_of


@dataclass(frozen=True)
class Placement:
    """The decision for one tensor. ``rule`` says where it comes from: a place in a file, or "auto"."""

    device: str
    rule: str
    n_bytes: int


@dataclass(frozen=True)
class Plan:
    """All placements of a model, by tensor name."""

    placements: dict[str, Placement]

    @property
    def devices(self) -> list[str]:
        """Devices in use, in order of their names."""
        return sorted({placement.device for placement in self.placements.values()})

    def bytes_on(self, device: str) -> int:
        """Bytes of the file's tensors placed on ``device``."""
        return sum(p.n_bytes for p in self.placements.values() if p.device == device)

    def digest(self) -> str:
        """Eight hexadecimal digits that two plans share exactly if they place every tensor alike."""
        text = "\n".join(f"{name} {p.device}" for name, p in sorted(self.placements.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

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
