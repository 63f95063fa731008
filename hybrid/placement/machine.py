"""The machine a plan is for: this one or an imagined one. Plain values; who fills them in is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hybrid.placement.capabilities import kind_of

GIB = 1 << 30

# What is left to the system and to this process's own libraries where a budget is not given but is the
# memory that is free.
RAM_MARGIN_BYTES = GIB // 2

# The same of a GPU's memory: 23.5 GiB of a card of 24, which itself reports a little less than 24.
VRAM_MARGIN_BYTES = GIB // 2

# Bytes per second where neither measured nor given: two channels of DDR5 at 80 % of 83 GB/s, an RTX 3090,
# PCIe 4.0 x16.
DEFAULT_RAM_BANDWIDTH = 67e9
DEFAULT_VRAM_BANDWIDTH = 936e9
DEFAULT_PCIE_BANDWIDTH = 25e9


def usable_vram(total_bytes: int) -> int:
    """What may be used of a GPU's memory if nobody says."""
    return min(total_bytes, -(-total_bytes // GIB) * GIB - VRAM_MARGIN_BYTES)


@dataclass(frozen=True)
class Device:
    """``budget_bytes`` may be used in all, ``None``: not known; ``stated``: somebody said so for this run.
    ``read_bandwidth``: bytes per second, of one NUMA node for the CPU; ``None``: see `Rates` and the defaults
    above."""

    name: str
    budget_bytes: int | None = None
    read_bandwidth: float | None = None
    stated: bool = False

    @property
    def kind(self) -> str:
        return kind_of(self.name)


@dataclass(frozen=True)
class Node:
    """A NUMA node: bytes of it that may be used, and whether workers run there or it has memory alone."""

    id: int
    budget_bytes: int
    has_workers: bool = True


@dataclass(frozen=True)
class Rates:
    """What a CPU was measured to do with all its threads, by `hybrid.calibration`.

    Attributes:
        read_bandwidth: bytes per second of RAM, all nodes together.
        call_s: seconds an operation takes besides its arithmetic.
        attention_macs: multiply-adds per second of latent attention over a long cache, one token at a time.
        weight_s: format -> tokens of a product -> seconds for one weight, from RAM.
        num_threads: threads all of it was measured with.
    """

    read_bandwidth: float
    call_s: float
    attention_macs: float
    weight_s: dict[str, dict[int, float]]
    num_threads: int


@dataclass(frozen=True)
class Machine:
    """``devices`` hold the CPU first. ``numa`` says whether copies for each node may be chosen; rates are
    those measured on this machine, ``None`` where there are none. ``num_nodes`` counts nodes with workers;
    ``nodes`` has what is known of them and of those with memory alone, nothing on an imagined machine."""

    devices: tuple[Device, ...] = (Device("cpu"),)
    num_nodes: int = 1
    num_threads: int = 1
    isa: str = "avx2"
    numa: bool = False
    nodes: tuple[Node, ...] = ()
    imagined: bool = False
    pcie_bandwidth: float = DEFAULT_PCIE_BANDWIDTH
    rates: Rates | None = None
    notes: tuple[str, ...] = field(default=())

    def device(self, name: str) -> Device | None:
        return next((device for device in self.devices if device.name == name), None)

    @property
    def worker_nodes(self) -> tuple[int, ...]:
        """Ids of the nodes with workers."""
        known = tuple(node.id for node in self.nodes if node.has_workers)
        return known or tuple(range(self.num_nodes))

    @property
    def node_ids(self) -> tuple[int, ...]:
        """Ids of all nodes."""
        return tuple(node.id for node in self.nodes) or self.worker_nodes

    @property
    def cpu(self) -> Device:
        return self.device("cpu") or Device("cpu")

    @property
    def gpus(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.kind == "cuda")

    def with_budget(self, name: str, budget_bytes: int) -> Machine:
        """The machine with a stated budget of a device, which is added if there is none of the name."""
        found = self.device(name)
        if found is None:
            return replace(self, devices=(*self.devices, Device(name, budget_bytes, stated=True)))
        changed = replace(found, budget_bytes=budget_bytes, stated=True)
        return replace(self, devices=tuple(changed if d is found else d for d in self.devices))

    def with_rules(self, budgets: Mapping[str, int]) -> Machine:
        """The machine within the budgets of rules: a stated one wins, and of what is free no more is taken
        than there is, except on an imagined machine. A GPU that is not there becomes an imagined one."""
        machine = self
        for name, n_bytes in budgets.items():
            found = self.device(name)
            if found is None:
                machine = replace(machine.with_budget(name, n_bytes), imagined=True)
            elif not found.stated:
                free = None if self.imagined else found.budget_bytes
                machine = machine.with_budget(name, n_bytes if free is None else min(n_bytes, free))
        return machine
