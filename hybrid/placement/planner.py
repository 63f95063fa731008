"""From a file's header and rules to a plan. Pure: reads no weights, imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid.config import ExpertUse
from hybrid.errors import CapacityError, PlacementError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.placement.auto import CPU, place_open
from hybrid.placement.capabilities import kind_of
from hybrid.placement.cautions import cautions
from hybrid.placement.cost import predict
from hybrid.placement.machine import Machine
from hybrid.placement.memory import DeviceMemory, RunSize, Tensor, memory_of, read_model
from hybrid.placement.plan import Placement, Plan
from hybrid.placement.refusal import refusal
from hybrid.placement.rules import Rule, RuleSet, load_rules

__all__ = ["Placement", "Plan", "plan"]

AUTO = "auto"
_CONTEXT_STEP = 256  # fitted contexts are multiples of it
_SMALLEST_BATCH = 64


def plan(
    file: GGUFFile,
    rules: str | Path | dict[str, Any] = AUTO,
    *,
    machine: Machine | None = None,
    size: RunSize | None = None,
    fit: bool = False,
    experts: ExpertUse | None = None,
) -> Plan:
    """Places every tensor of ``file``: the first rule that matches decides, `place_open` does the rest.

    Args:
        machine: whose devices and budgets count; a CPU with unknown memory if not given.
        size: what the run is sized for.
        fit: shorten the context, and then the batch, until everything fits.
        experts: of those of a token, which are run; the model's own number if not given.

    Raises:
        PlacementError: the rules are malformed, are for another architecture, or one of them matches nothing.
        ConfigError: the model has fewer experts per token than asked for.
        CapacityError: a device's budget is exceeded; the message holds the table and what would fit.
        GGUFError: the header contradicts itself.
    """
    return Planner(file, rules, machine or Machine(), experts).plan(size or RunSize(), fit=fit)


class Planner:
    """Plans of one file under one set of rules, for any size."""

    def __init__(
        self,
        file: GGUFFile,
        rules: str | Path | dict[str, Any],
        machine: Machine,
        experts: ExpertUse | None = None,
    ) -> None:
        self.machine, self.experts = machine, experts or ExpertUse()
        self.model = read_model(file, self.experts.per_token)
        self.rule_set = None if rules == AUTO else load_rules(rules)
        self._chosen: dict[str, Rule] = {}
        if self.rule_set is not None:
            _check_architecture(self.rule_set, file)
            self._chosen = choose_rules(self.rule_set, file)

    def plan(self, size: RunSize, *, fit: bool = False) -> Plan:
        """See `plan`."""
        found = self.draft(size)
        if fit and _missing(found):
            found = self.draft(self.largest_fitting(size))
        if _missing(found):
            raise CapacityError(refusal(self, found))
        prediction = predict(self.model, found.placements, self.machine, found.size)
        warnings = tuple(cautions(self.model, found, self.experts))
        return replace(found, prediction=prediction, warnings=warnings)

    def explain(self, name: str, size: RunSize) -> list[str]:
        """The rules tried for a tensor, one line each, and where it goes.

        Raises:
            PlacementError: the model has no such tensor.
        """
        tensor = next((t for t in self.model.tensors if t.name == name), None)
        if tensor is None:
            near = difflib.get_close_matches(name, [t.name for t in self.model.tensors], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlacementError(f"--explain: the model has no tensor {name!r}{hint}")
        layer = "" if tensor.layer is None else f", layer {tensor.layer}"
        lines = [f"{name}: role {tensor.role}{layer}, {tensor.info.type.name} {list(tensor.info.shape)}"]
        taken = False
        for rule in () if self.rule_set is None else self.rule_set.rules:
            matches = rule.matches(name)
            outcome = "matches, but the rule above has it" if taken else f"matches: {rule.device}"
            lines.append(f"  {rule.origin}: {outcome if matches else 'does not match'}")
            taken = taken or matches
        placement = self.draft(size).placements[name]
        if not tensor.share:
            lines.append("  it is not loaded: nothing reads it")
        elif not taken:
            lines.append("  no rule matches: auto decides")
        lines.append(f"  {placement.device} by {placement.rule}, {placement.n_bytes} bytes there")
        return lines

    def draft(self, size: RunSize) -> Plan:
        """Placements and bytes, whether they fit or not."""
        mode = "none"
        if self.machine.numa and self.machine.num_nodes > 1:
            mode = "replicate"
        found = self._draft(size, mode)
        if mode == "replicate" and found.memory[CPU].missing_bytes:
            found = self._draft(size, "shard")
        return found

    def largest_fitting(self, size: RunSize) -> RunSize:
        """The longest context that fits, with smaller batches where none does; ``size`` if nothing does."""
        batch = size.max_num_batched_tokens
        while True:
            smaller = replace(size, max_num_batched_tokens=batch)
            context = self._largest_context(smaller)
            if context:
                return replace(smaller, max_model_len=context)
            if batch // 2 < max(_SMALLEST_BATCH, size.max_num_seqs):
                return size
            batch //= 2

    def _largest_context(self, size: RunSize) -> int:
        low, high = 0, size.max_model_len // _CONTEXT_STEP + 1
        while high - low > 1:
            middle = (low + high) // 2
            trial = replace(size, max_model_len=middle * _CONTEXT_STEP)
            low, high = (low, middle) if _missing(self.draft(trial)) else (middle, high)
        return low * _CONTEXT_STEP

    def _draft(self, size: RunSize, numa: str) -> Plan:
        fixed = {
            tensor.name: self._placement(tensor, rule.device, rule.origin, numa, rule)
            for tensor in self.model.tensors
            if (rule := self._chosen.get(tensor.name)) is not None
        }
        devices = place_open(self.model, fixed, self.machine, size)
        placements = {
            t.name: fixed.get(t.name) or self._placement(t, devices[t.name], AUTO, numa, None)
            for t in self.model.tensors
        }
        budgets = [(device.name, device.budget_bytes) for device in self.machine.devices]
        memory = memory_of(self.model, placements, budgets, size, self.machine.num_threads)
        return Plan(placements, memory, size, self.machine)

    def _placement(self, tensor: Tensor, device: str, origin: str, numa: str, rule: Rule | None) -> Placement:
        mode = numa if kind_of(device) == "cpu" else "none"
        format_: GGMLType | None = None
        copies = self.machine.num_nodes if mode == "replicate" else 1
        n_bytes = tensor.bytes_on(kind_of(device), format_) * copies
        return Placement(device, origin, n_bytes, mode, None)


def choose_rules(rule_set: RuleSet, file: GGUFFile) -> dict[str, Rule]:
    """Tensor -> the first rule that matches it.

    Raises:
        PlacementError: a rule matches nothing, or nothing that an earlier one left.
    """
    used: set[int] = set()
    reached: set[int] = set()
    chosen: dict[str, Rule] = {}
    for name in file.tensors:
        fitting = [index for index, rule in enumerate(rule_set.rules) if rule.matches(name)]
        reached.update(fitting)
        if fitting:
            used.add(fitting[0])
            chosen[name] = rule_set.rules[fitting[0]]
    for index, rule in enumerate(rule_set.rules):
        if index not in reached:
            raise PlacementError(f"{rule.origin}: this rule matches no tensor of {file.path.name}")
        if index not in used:
            raise PlacementError(f"{rule.origin}: every tensor this rule matches is taken by an earlier rule")
    return chosen


def _missing(found: Plan) -> list[DeviceMemory]:
    """Devices whose budget is exceeded."""
    return [memory for memory in found.memory.values() if memory.missing_bytes]


def _check_architecture(rule_set: RuleSet, file: GGUFFile) -> None:
    allowed = rule_set.architectures
    if allowed is not None and file.architecture not in allowed:
        raise PlacementError(
            f"{rule_set.source}: these rules are for {', '.join(sorted(allowed))}, "
            f"but {file.path.name} is {file.architecture}"
        )
