"""`hybrid plan MODEL`: where everything goes and how fast it should be, from the header alone."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.placement.machine import Machine
    from hybrid.placement.plan import Plan
    from hybrid.placement.planner import Planner

HELP = "show where a model's tensors go, what that takes and how fast it should be"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", metavar="MODEL", help="a GGUF file; a header alone will do (default: -m)"
    )
    arguments.add_model(parser)
    arguments.flag(parser, "-c", "--ctx-size")
    arguments.flag(parser, "-ub", "--ubatch-size", default=512)
    arguments.flag(parser, "-np", "--parallel", default=1)
    arguments.flag(parser, "-ctk", "--cache-type-k", "--kv-format", choices=_CACHE_FORMATS)
    arguments.flag(parser, "--rules", default="auto")
    arguments.flag(parser, "--fit")
    arguments.add_experts(parser)
    group = parser.add_argument_group("machine", "this one, or one that differs from it by these")
    for name in ("--vram", "--bandwidth"):
        arguments.flag(group, name, action=arguments.Extend)
    for names in (("--ram",), ("--nodes",), ("-t", "--threads"), ("--isa",)):
        arguments.flag(group, *names)
    output = parser.add_argument_group("output")
    arguments.flag(output, "-o", "--output", default="md", choices=("md", "json", "yaml", "html"))
    arguments.flag(output, "--explain")
    arguments.flag(output, "--emit")


_CACHE_FORMATS = ("f32", "f16", "bf16", "q8_0")
_THRESHOLD = "speed is predicted as if the threshold dropped no experts; how many it does shows when running"


def run(args: argparse.Namespace) -> int:
    from hybrid.config import DEFAULT_MAX_MODEL_LEN, ExpertUse, model_path
    from hybrid.gguf import GGUFFile
    from hybrid.placement.memory import RunSize
    from hybrid.placement.planner import Planner
    from hybrid.placement.settings import context_of, kv_format_of

    path = model_path(args.model if args.file is None else args.file)
    with GGUFFile.open(path, header_only=True) as file:
        experts = ExpertUse(args.experts_per_token, args.expert_threshold)
        planner = Planner(file, args.rules, machine_of(args), experts)
        longest = planner.model.dims.context_length or DEFAULT_MAX_MODEL_LEN
        context = context_of(args.ctx_size, planner.rule_set, longest)
        if context > longest:
            raise ConfigError(f"-c: expected at most the {longest} tokens the model was made for")
        kv_format = kv_format_of(args.kv_format, planner.rule_set)
        size = RunSize(context, args.parallel, args.ubatch_size, kv_format)
        if args.explain is not None:
            print("\n".join(planner.explain(args.explain, size)))
            return 0
        found = planner.plan(size, fit=args.fit)
        if planner.experts.threshold:
            found = replace(found, warnings=(*found.warnings, _THRESHOLD))
    _print(args, planner, found, path)
    return 0


def _print(args: argparse.Namespace, planner: Planner, found: Plan, path: Path) -> None:
    if args.emit is not None:
        from hybrid.placement.llamacpp import flags

        print(shlex.join(flags(planner.model, found)))
    elif args.output == "md":
        from hybrid.cli.plan_text import sections

        for part in sections(planner.model, found, path.name):
            print(part)
    elif args.output == "html":
        from hybrid.cli.plan_page import page

        print(page(planner.model, found, path.name))
    else:
        from hybrid.placement.report import as_json

        content = {"file": str(path), **as_json(planner.model, found)}
        if args.output == "json":
            print(json.dumps(content, indent=2, ensure_ascii=False))
        else:
            import yaml

            print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=200), end="")


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
    for device, n_bytes in _by_device(args.vram, "--vram", "cuda:0").items():
        if not device.startswith("cuda:"):
            raise ConfigError(f"--vram: expected cuda:N, found {device!r}; RAM is given by --ram")
        machine = machine.with_budget(device, round(n_bytes))
    if args.ram is not None:
        machine = machine.with_budget("cpu", args.ram)
    if args.nodes is not None:
        machine = replace(machine, num_nodes=args.nodes, numa=args.nodes > 1)
    changes = (args.vram, args.ram, args.nodes, args.bandwidth, args.isa)
    machine = replace(machine, imagined=any(value is not None for value in changes))
    for device, per_second in _by_device(args.bandwidth, "--bandwidth", "ram").items():
        machine = _with_bandwidth(machine, device, per_second * 1e9)
    if args.nodes is not None or machine.cpu.read_bandwidth is not None:
        machine = replace(machine, rates=None)  # those of another machine
    return machine


def _by_device(given: list[tuple[str | None, float]] | None, flag: str, default: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in given or ():
        device = name or default
        if device in found:
            raise ConfigError(f"{flag}: {device} is given twice")
        found[device] = value
    return found


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
