"""From a file's header and rules to a plan. Pure: reads no weights, imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrid.errors import PlacementError
from hybrid.gguf import GGUFFile
from hybrid.placement.plan import Placement, Plan
from hybrid.placement.rules import RuleSet, load_rules

__all__ = ["Placement", "Plan", "plan"]

AUTO = "auto"


def plan(file: GGUFFile, rules: str | Path | dict[str, Any] = AUTO) -> Plan:
    """Places every tensor of ``file``: the first rule that matches decides, the rest goes to the CPU.

    Raises:
        PlacementError: the rules are malformed, are for another architecture, or one of them matches nothing.
    """
    if rules == AUTO:
        return Plan({name: Placement("cpu", AUTO, info.n_bytes) for name, info in file.tensors.items()})
    rule_set = load_rules(rules)
    _check_architecture(rule_set, file)
    used: set[int] = set()
    reached: set[int] = set()
    placements: dict[str, Placement] = {}
    for name, info in file.tensors.items():
        fitting = [index for index, rule in enumerate(rule_set.rules) if rule.matches(name)]
        reached.update(fitting)
        if fitting:
            used.add(fitting[0])
            rule = rule_set.rules[fitting[0]]
            placements[name] = Placement(rule.device, rule.origin, info.n_bytes)
        else:
            placements[name] = Placement("cpu", AUTO, info.n_bytes)
    for index, rule in enumerate(rule_set.rules):
        if index not in reached:
            raise PlacementError(f"{rule.origin}: this rule matches no tensor of {file.path.name}")
        if index not in used:
            raise PlacementError(f"{rule.origin}: every tensor this rule matches is taken by an earlier rule")
    return Plan(placements)


def _check_architecture(rule_set: RuleSet, file: GGUFFile) -> None:
    allowed = rule_set.architectures
    if allowed is not None and file.architecture not in allowed:
        raise PlacementError(
            f"{rule_set.source}: these rules are for {', '.join(sorted(allowed))}, "
            f"but {file.path.name} is {file.architecture}"
        )
