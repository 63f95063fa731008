"""The machine that a command plans for: this one, or one that differs from it by flags."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.placement.machine import Machine


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Flags that `machine_of` reads."""
    group = parser.add_argument_group("machine", "this one, or one that differs from it by these")
    for name in ("--vram", "--bandwidth"):
        arguments.flag(group, name, action=arguments.Extend)
    for names in (("--ram",), ("--nodes",), ("-t", "--threads"), ("--isa",)):
        arguments.flag(group, *names)


def machine_of(args: argparse.Namespace) -> Machine:
    """This machine with what the flags change.

    Raises:
        ConfigError: a device is named that is neither ``ram``, ``pcie`` nor ``cuda:N``, or twice.
    """
    from hybrid.backends.isa import select_isa
    from hybrid.calibration import this_machine
    from hybrid.placement.capabilities import ISAS

    # Kernels of an imagined machine need not run here.
    isa = args.isa if args.isa in ISAS else select_isa(args.isa)
    machine = this_machine(args.threads, isa)
    for device, n_bytes in arguments.vram_of(args).items():
        machine = machine.with_budget(device, n_bytes)
    if args.ram is not None:
        machine = machine.with_budget("cpu", args.ram)
    if args.nodes is not None:
        machine = replace(machine, num_nodes=args.nodes, numa=args.nodes > 1)
    changes = (args.vram, args.ram, args.nodes, args.bandwidth, args.isa)
    machine = replace(machine, imagined=any(value is not None for value in changes))
    for device, per_second in arguments.by_device(args.bandwidth, "--bandwidth", "ram").items():
        machine = _with_bandwidth(machine, device, per_second * 1e9)
    if args.nodes is not None or machine.cpu.read_bandwidth is not None:
        machine = replace(machine, rates=None)  # those of another machine
    return machine


def _with_bandwidth(machine: Machine, device: str, per_second: float) -> Machine:
    if device == "pcie":
        return replace(machine, pcie_bandwidth=per_second)
    name = "cpu" if device == "ram" else device
    if machine.device(name) is None:
        there = ", ".join(("ram", "pcie", *(gpu.name for gpu in machine.gpus)))
        raise ConfigError(f"--bandwidth: no device {device!r} on this machine; there are {there}")
    devices = tuple(
        replace(entry, read_bandwidth=per_second) if entry.name == name else entry
        for entry in machine.devices
    )
    return replace(machine, devices=devices)
