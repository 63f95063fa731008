"""A plan as a rule file: short, commented, and meaning the same plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hybrid.placement.memory import DeviceMemory, Model, Tensor
from hybrid.placement.plan import Plan
from hybrid.placement.rules.ranges import ranges_of
from hybrid.placement.size_text import size_text

_GIB, _MIB = 1 << 30, 1 << 20


@dataclass
class _Group:
    """Roles placed alike, and their tensors by device; ``whole``: nothing of these roles is elsewhere."""

    roles: list[str] = field(default_factory=list)
    by_device: dict[str, list[Tensor]] = field(default_factory=dict)
    whole: bool = False


def rule_file(model: Model, plan: Plan, title: str, architecture: str) -> str:
    """YAML. Tensors that are not loaded are left out, since auto does the same with them."""
    size = plan.size
    lines = [
        f"# Placement of {_printable(title)}, as auto chose it for {_machine(plan)}",
        f"# and a context of {size.max_model_len} tokens.",
        "# The first rule that matches a tensor decides; auto places what no rule matches.",
        "# `hybrid rules check FILE --model MODEL` tells what is wrong, "
        "`hybrid plan MODEL --rules FILE` what it does.",
        "version: 1",
        f"architecture: [{json.dumps(architecture)}]",
        "rules:",
    ]
    for group in _groups(model, plan):
        lines += _rules(group, plan)
    lines += ["", "# Sections that may be changed. An option on the command line wins over the file."]
    lines.append(f"# kv_cache: {{max_tokens: {size.max_model_len}, format: {size.kv_format}}}")
    lines += _budgets(plan)
    return "\n".join(lines) + "\n"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _machine(plan: Plan) -> str:
    parts = [
        f"{size_text(memory.budget_bytes)} of {name}"
        for name, memory in plan.memory.items()
        if memory.budget_bytes is not None
    ]
    kind = "an imagined machine" if plan.machine.imagined else "this machine"
    return f"{kind}{' with ' if parts else ''}{' and '.join(parts)}"


def _groups(model: Model, plan: Plan) -> list[_Group]:
    """Roles whose layers are placed alike come together."""
    found: dict[tuple[object, ...], _Group] = {}
    for role in dict.fromkeys(tensor.role for tensor in model.tensors):
        tensors = [tensor for tensor in model.tensors if tensor.role == role]
        by_device: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.share:
                by_device.setdefault(plan.placements[tensor.name].device, []).append(tensor)
        devices = {plan.placements[tensor.name].device for tensor in tensors}
        whole = len(devices) == 1
        if not by_device:
            continue
        key: tuple[object, ...] = (whole, *by_device) if whole else (role,)
        group = found.setdefault(key, _Group(whole=whole))
        group.roles.append(role)
        for device, some in by_device.items():
            group.by_device.setdefault(device, []).extend(some)
    return list(found.values())


def _rules(group: _Group, plan: Plan) -> Iterator[str]:
    for device, tensors in group.by_device.items():
        n_bytes = sum(plan.placements[tensor.name].n_bytes for tensor in tensors)
        named = [tensor.name for tensor in tensors if tensor.layer is None]
        yield f"  # {', '.join(group.roles)}: {size_text(n_bytes)}"
        if group.whole:
            yield from _rule(f"role: {_listed(group.roles)}", device)
            continue
        layers = {tensor.layer for tensor in tensors if tensor.layer is not None}
        if layers:
            yield from _rule(f'role: {_listed(group.roles)}, layers: "{ranges_of(layers)}"', device)
        for name in named:
            yield from _rule(f"name: {json.dumps(name)}", device)


def _rule(select: str, device: str) -> Iterator[str]:
    yield f"  - select: {{{select}}}"
    yield f'    place: {{device: "{device}"}}' if ":" in device else f"    place: {{device: {device}}}"


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"[{', '.join(words)}]"


def _budgets(plan: Plan) -> Iterator[str]:
    """GPUs are given theirs, so that the file can be looked at where there is none."""
    known = {n: m for n, m in plan.memory.items() if m.budget_bytes is not None and m.total_bytes}
    gpus = {name: memory for name, memory in known.items() if name.startswith("cuda")}
    if "cpu" in known:
        yield f"# budget: {{cpu: {(known['cpu'].budget_bytes or 0) // _MIB}MiB}}"
    if gpus:
        yield "budget:"
        yield from (f'  "{name}": {_exact(memory)}' for name, memory in gpus.items())


def _exact(memory: DeviceMemory) -> str:
    n_bytes = memory.budget_bytes or 0
    for unit, factor in (("GiB", _GIB), ("MiB", _MIB)):
        if n_bytes % factor == 0:
            return f"{n_bytes // factor}{unit}"
    return f"{n_bytes}B"
